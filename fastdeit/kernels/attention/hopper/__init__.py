"""Attention for Hopper in Gluon, the dialect of Triton in which a kernel says itself what is asynchronous.

`backend.py` is what the op calls, and says where the kernels run. The other files need a Triton that has Gluon for
Hopper, and are imported when they are.
"""
