"""LayerNorm, with the residual addition before it: the op in `op.py`, its mathematics, its Triton kernels."""
