"""CUDA C++ kernels for cards whose tensor cores Triton does not reach: V100 and Turing."""
