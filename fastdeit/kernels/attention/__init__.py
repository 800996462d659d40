"""Attention: the op in `op.py`, and each of its Triton kernels in a file that could be exchanged for another."""
