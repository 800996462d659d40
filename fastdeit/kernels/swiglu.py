"""SwiGLU's activation in one op (Shazeer, "GLU variants improve transformer", 2020).

    gate, value = x[..., :F], x[..., F:]
    out = silu(gate) * value,  silu(g) = g * s(g),  s the logistic function

Backward, with s = s(gate):

    dvalue = dout * gate * s      dgate = dout * value * s * (1 + gate * (1 - s))

x is [..., 2*F], as one linear layer makes it: the gate first, as in DINOv2 and timm's `SwiGLUPacked`. The two products
around it are PyTorch's. Bytes moved at best per element of out in 16 bit: forward reads 4 and writes 2; backward reads
6 and writes 4. Nothing but x is kept for backward. Arithmetic is float32, and rounded once.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdeit.kernels import _checks, _op, _triton
from fastdeit.kernels._example import BASE, DEITS, Example, Maker

# ---- reference -------------------------------------------------------------------------------------------------------


def _halves(x: Tensor) -> list[Tensor]:
    """Gate and value in float32 (float64 for float64), each in memory of its own: the bits of PyTorch's functions on a
    CPU depend on strides."""
    return [half.to(_op.statistics_dtype(x.dtype)).contiguous() for half in x.chunk(2, -1)]


def reference(x: Tensor) -> Tensor:
    """out `[..., F]` of x `[..., 2*F]`, in the dtype of x."""
    gate, value = _halves(x)
    return (torch.nn.functional.silu(gate) * value).to(x.dtype)


def native(x: Tensor) -> Tensor:
    """`reference`, which takes the autocast dtype itself: none of its operations does."""
    return reference(x.to(_op.autocast_dtype(x) or x.dtype))


def reference_backward(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of x."""
    gate, value = _halves(x)
    grad, s = grad.to(gate.dtype), torch.sigmoid(gate)
    return torch.cat((grad * value * s * (1 + gate * (1 - s)), grad * gate * s), -1).to(x.dtype)


# ---- Triton ----------------------------------------------------------------------------------------------------------

_COLUMNS, _ROWS = 512, 4
"""Tile of four warps: every thread holds two times 8 neighbouring 16-bit elements of a tensor."""


@triton.jit
def _place(rows, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    """Rows, columns and mask of this program's tile; the tiles of a row of tiles follow one another."""
    across = tl.cdiv(WIDTH, COLUMNS)
    row = ((tl.program_id(0) // across).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    column = ((tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    return row, column, (row < rows) & (column < WIDTH)


@triton.jit
def _forward_kernel(x, out, rows, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    row, column, mask = _place(rows, WIDTH, COLUMNS, ROWS)
    at = row * (2 * WIDTH) + column
    gate = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(x + at + WIDTH, mask=mask, other=0.0).to(tl.float32)
    y = gate * tl.sigmoid(gate) * value
    tl.store(out + row * WIDTH + column, y.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(dout, x, dx, rows, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    row, column, mask = _place(rows, WIDTH, COLUMNS, ROWS)
    at = row * (2 * WIDTH) + column
    gate = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    value = tl.load(x + at + WIDTH, mask=mask, other=0.0).to(tl.float32)
    grad = tl.load(dout + row * WIDTH + column, mask=mask, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    dgate = grad * value * s * (1.0 + gate * (1.0 - s))
    dvalue = grad * gate * s
    tl.store(dx + at, dgate.to(dx.dtype.element_ty), mask=mask)
    tl.store(dx + at + WIDTH, dvalue.to(dx.dtype.element_ty), mask=mask)


def _launch(kernel: Any, width: int, *tensors: Tensor) -> None:
    rows = tensors[0].numel() // tensors[0].shape[-1] if tensors[0].numel() else 0
    columns = min(_COLUMNS, max(16, _triton.power_of_two(width)))
    grid = (_triton.cdiv(rows, _ROWS) * _triton.cdiv(width, columns),)
    _triton.launch(kernel, grid, *tensors, rows, WIDTH=width, COLUMNS=columns, ROWS=_ROWS, warps=4)


def triton_forward(x: Tensor) -> Tensor:
    """`reference` in one launch."""
    _triton.require_dtypes(x)
    width = x.shape[-1] // 2
    out = torch.empty(*x.shape[:-1], width, dtype=x.dtype, device=x.device)
    _launch(_forward_kernel, width, x.contiguous(), out)
    return out


def triton_backward(grad: Tensor, x: Tensor) -> Tensor:
    """`reference_backward` in one launch."""
    x = x.contiguous()
    dx = torch.empty_like(x)
    _launch(_backward_kernel, x.shape[-1] // 2, grad.contiguous(), x, dx)
    return dx


# ---- registration ----------------------------------------------------------------------------------------------------


def _example(make: Maker) -> list[Any]:
    return [make.normal(make.sizes.batch, make.sizes.tokens, 2 * make.sizes.hidden)]


_EXAMPLES = [
    Example("", _example, compiled=[*DEITS, (BASE, torch.float32)], bytes=lambda args: 4 * args[0].nbytes),
]
_TRITON = _op.Backend("triton", _triton.capability, triton_forward, triton_backward)
OP = _op.Op("swiglu", reference, reference_backward, examples=_EXAMPLES, others=[_TRITON], native=native, cast={"x"})


@OP.registered.register_fake
def _(x):
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2)


@OP.registered_backward.register_fake
def _(grad, x):
    return x.new_empty(x.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, grad):
    return OP.run_backward(ctx, grad, *ctx.saved_tensors)


OP.differentiable(_save, _differentiate)


# ---- public ----------------------------------------------------------------------------------------------------------


def swiglu(x: Tensor) -> Tensor:
    """`silu(x[..., :F]) * x[..., F:]`, the gate first.

    x  floating `[..., 2*F]`

    Returns `[..., F]` in the dtype of x (the autocast dtype under autocast). ValueError for an odd last dimension.
    """
    _checks.check_floating("x", x)
    if x.dim() < 1 or x.shape[-1] % 2:
        raise ValueError(f"x has shape {list(x.shape)}, but must be [..., 2*F]: gate and value, side by side")
    return OP(x)
