"""A linear layer and an MLP whose products of the forward and of their inputs' gradients are of 8 bits.

    out = q(x) q(w)^T + b        dx = q(dout) q'(w)        dw = dout^T x        db = sum dout

q casts rows to e4m3 and q' the columns, each with a scale of its own (`cast.py`): of x and dout for each token, of w
for each output channel in the forward and for each input channel in the gradient, since a scale has to stand outside
of the sum. Sums are float32. The gradients of the weights are products of the dtype that x has, from operands that
were not cast: the recipe `rowwise_with_gw_hp` of torchao, and that of DINOv3's `Fp8Linear` (Siméoni et al., 2025).
torchao has one scale for all of w in the gradient.

The gradient is that of the product at q(x) and q(w), passed on as if q were the identity, with dout rounded as well.
It is therefore not the derivative of the forward, which is a step function. In the MLP

    pre = q(x) q(w1)^T + b1        act = gelu(pre)        out = q(act) q(w2)^T + b2

both casts of act's size are in GELU's passes (`gelu.py`), and backward makes act again.
"""

from typing import Any

import torch
from torch import Tensor

from fastdeit.kernels import _asked, _checks, _derivatives, _op
from fastdeit.kernels.fp8 import cast, gelu, product


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x weight^T + bias` by a product of e4m3, and the gradient of x by another.

    x       floating `[..., C]`
    weight  `[F, C]`; C and F are multiples of 16
    bias    `[F]`, or None. Its gradient is a pass over that of the result, which a bias that requires none saves

    Returns `[..., F]` in the dtype of x. All tensors have one dtype, or autocast gives them one. ValueError for other
    widths and for several dtypes; RuntimeError inside `torch.func` and forward-mode AD, which cannot follow this
    gradient.
    """
    _check("x", x, weight)
    return _Linear.apply(*_arguments("fp8_linear", x, weight, bias))


def fp8_mlp(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
    """Linear, exact GELU, linear, as of `mlp`, with products as of `fp8_linear`.

    x       floating `[..., C]`
    w1, b1  `[F, C]`, `[F]`
    w2, b2  `[C', F]`, `[C']`; C, F and C' are multiples of 16

    Returns `[..., C']` in the dtype of x; else as `fp8_linear`.
    """
    _check("x", x, w1)
    _check("w1", w1.t(), w2)
    return _Mlp.apply(*_arguments("fp8_mlp", x, w1, b1, w2, b2))


def fp8_refusal(device: torch.device, *widths: int) -> str | None:
    """Why there are no products of e4m3 on `device`, or none of layers of these widths; None where there are. A CPU
    makes them in float32, to try them out: that is slower, and the same but for the order of the sums."""
    able, reason = (True, "") if device.type == "cpu" else product.capability(device, False)
    if not able:
        return reason
    odd = [width for width in widths if width % product.MULTIPLE]
    return f"a width of {odd[0]} is not a multiple of {product.MULTIPLE}, as products of 8 bits need" if odd else None


def _check(name: str, x: Tensor, weight: Tensor) -> None:
    _checks.check_floating(name, x)
    if weight.dim() != 2 or x.shape[-1:] != weight.shape[1:]:
        raise ValueError(f"weight has shape {list(weight.shape)}, but must be [F, C], C the last dimension of {name}")
    if reason := fp8_refusal(torch.device("cpu"), *weight.shape):
        raise ValueError(f"weight has shape {list(weight.shape)}, but {reason}")


def _arguments(name: str, x: Tensor, *others: Tensor | None) -> list[Tensor | None]:
    """The arguments in the dtype that autocast gives them."""
    if _derivatives.transformed():
        raise RuntimeError(f"{name} rounds to 8 bits, of which torch.func and forward-mode AD know no derivative")
    tensors = [tensor for tensor in (x, *others) if tensor is not None]
    dtype = _op.autocast_dtype(x)
    if dtype is None and len({tensor.dtype for tensor in tensors}) > 1:
        found = ", ".join(str(tensor.dtype) for tensor in tensors)
        raise ValueError(f"{name} needs tensors of one dtype, or autocast, which gives them one; these have {found}")
    return [None if tensor is None else tensor.to(dtype or x.dtype) for tensor in (x, *others)]


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _forward(rows: tuple[Tensor, Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    return product.OP(*rows, *cast.ROWS(weight), bias, weight.dtype)


def _input_gradient(rows: tuple[Tensor, Tensor], weight: Tensor) -> Tensor:
    return product.OP(*rows, *cast.COLUMNS(weight), None, weight.dtype)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.choices = _asked.used()
        return _forward(cast.ROWS(_flat(x)), weight, bias).view(*x.shape[:-1], len(weight))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _derivatives.check_first_order("fp8_linear")
        x, weight = ctx.saved_tensors
        grads = _flat(grad)
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            with _asked.of_forward(ctx.choices):
                dx = _input_gradient(cast.ROWS(grads), weight).view(x.shape)
        if ctx.needs_input_grad[1]:
            dweight = grads.t() @ _flat(x)
        if ctx.needs_input_grad[2]:
            dbias = _sums(grads)
        return dx, dweight, dbias


class _Mlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        pre = _forward(cast.ROWS(_flat(x)), w1, b1)
        ctx.save_for_backward(x, w1, w2, pre)
        ctx.choices = _asked.used()
        return _forward(gelu.FORWARD(pre), w2, b2).view(*x.shape[:-1], len(w2))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        _derivatives.check_first_order("fp8_mlp")
        x, w1, w2, pre = ctx.saved_tensors
        wanted, grads = ctx.needs_input_grad, _flat(grad)
        with _asked.of_forward(ctx.choices):
            dpre, values, scale, act, db1 = gelu.BACKWARD(_input_gradient(cast.ROWS(grads), w2), pre)
            dx = _input_gradient((values, scale), w1).view(x.shape) if wanted[0] else None
        return (
            dx,
            dpre.t() @ _flat(x) if wanted[1] else None,
            db1 if wanted[2] else None,
            grads.t() @ act if wanted[3] else None,
            _sums(grads) if wanted[4] else None,
        )


def _sums(grads: Tensor) -> Tensor:
    return grads.sum(0, dtype=_op.statistics_dtype(grads.dtype)).to(grads.dtype)
