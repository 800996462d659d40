"""The native kernels held against the rule that all kernels are held against (`tests/kernels/proof.py`)."""

import contextlib

import torch
from torch import Tensor

from fastdeit import kernels
from fastdeit.kernels.attention.op import reference
from tests.kernels import proof
from tests.kernels.native.simt import Kernels


class _Attention(torch.autograd.Function):
    """`fastdeit.kernels.attention` by native kernels on the CPU."""

    @staticmethod
    def forward(ctx, qkv, bias, native, num_heads, scale, seed):
        out, lse = native.forward(qkv, num_heads, scale, seed)
        ctx.save_for_backward(qkv, out, lse)
        ctx.call = native, num_heads, scale, bias is not None, seed
        return out

    @staticmethod
    def backward(ctx, grad):
        qkv, out, lse = ctx.saved_tensors
        native, num_heads, scale, bias, seed = ctx.call
        dqkv, dbias = native.backward(grad.contiguous(), qkv, out, lse, num_heads, scale, bias, seed)
        return dqkv, dbias, None, None, None, None


def packed(batch: int, tokens: int, heads: int, head_dim: int, size: float = 1.0) -> Tensor:
    """Normal queries, keys and values in float16 that want a gradient."""
    values = proof.normal(batch, tokens, 3 * heads * head_dim, dtype=torch.float32, device="cpu", seed=0)
    return (values * size).half().requires_grad_()


def prove(
    native: Kernels, qkv: Tensor, num_heads: int, *, bias: bool = True, scale: float | None = None, seed: int = 1
) -> None:
    """Output, log-sum-exp and gradients of the native kernels are as good as PyTorch's in float16."""
    if scale is None:
        scale = (qkv.shape[2] // (3 * num_heads)) ** -0.5
    natively = contextlib.ExitStack()

    def attend(qkv: Tensor, bias: Tensor | None) -> Tensor:
        if running:
            return _Attention.apply(qkv, bias, native, num_heads, scale, seed)
        return kernels.attention(qkv, num_heads, scale, bias=bias)

    running: list[bool] = [True]
    natively.callback(running.clear)
    added = proof.normal(qkv.shape[2], dtype=torch.float32, device="cpu", seed=1).requires_grad_() if bias else None
    proof.prove(attend, {"qkv": qkv, "bias": added}, mine=natively, rounded_operands=True)

    x = qkv.detach()
    (_, same), (_, exact) = (reference(values, num_heads, scale, None, None) for values in (x, x.double()))
    proof.assert_as_good(native.forward(x, num_heads, scale, seed)[1], same, exact, "lse")
