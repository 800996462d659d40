"""The MLP with GELU: the op in `op.py`, GELU's kernels, products with GELU epilogues, QuACK's kernels."""
