"""Queries of a few tokens, keys and values of all, from the packed weights of a block whose other results nobody reads.

Autograd would make a tensor of zeros around the gradient of each slice, and add them up: 2 bytes an element of x for
the zeros and 6 for the sum, in 16 bit. Here the few rows of x's gradient that have two parts get the second in place.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdeit.kernels import _checks, _derivatives, _op


def queries_apart(x: Tensor, weight: Tensor, bias: Tensor, trained_bias: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """(queries `[B, rows, C]` of the first `rows` tokens, keys and values `[B, N, 2 * C]` of all).

    x             floating `[B, N, C]`
    weight        `[3 * C, C]`, of queries, keys and values
    bias          `[3 * C]`, detached: what is added
    trained_bias  `[3 * C]`, of any floating dtype: what gets the gradient of the bias, summed in its dtype

    x, weight and bias have one dtype, or autocast gives them one.
    """
    _checks.check_shape("weight", weight, (3 * x.shape[-1], x.shape[-1]), "[3 * C, C], C the last dimension of x,")
    if torch.compiler.is_compiling() or _derivatives.transformed():
        width = x.shape[-1]
        biases = trained_bias[:width], trained_bias[width:]
        return tuple(map(_derivatives.with_bias_gradient, _apart(x, weight, bias, rows), biases))
    dtype = _op.autocast_dtype(x)
    if dtype is not None:
        x, weight, bias = (tensor.to(dtype) for tensor in (x, weight, bias))
    return _QueriesApart.apply(x, weight, bias, trained_bias, rows)


def _apart(x: Tensor, weight: Tensor, bias: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    width = x.shape[-1]
    return F.linear(x[:, :rows], weight[:width], bias[:width]), F.linear(x, weight[width:], bias[width:])


class _QueriesApart(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, trained_bias: Tensor, rows: int
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        ctx.rows, ctx.bias_dtype = rows, trained_bias.dtype
        return _apart(x, weight, bias, rows)

    @staticmethod
    def backward(ctx: Any, dq: Tensor, dkv: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        width, rows = x.shape[-1], ctx.rows
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            dx = dkv @ weight[width:]
            dx[:, :rows].add_(dq @ weight[:width])
        parts = (dq.flatten(0, 1), x[:, :rows].flatten(0, 1)), (dkv.flatten(0, 1), x.flatten(0, 1))
        if ctx.needs_input_grad[1]:
            dweight = torch.cat([grad.T @ tokens for grad, tokens in parts])
        if ctx.needs_input_grad[3]:
            dbias = torch.cat([grad.sum(0, dtype=ctx.bias_dtype) for grad, _ in parts])
        return dx, dweight, None, dbias, None
