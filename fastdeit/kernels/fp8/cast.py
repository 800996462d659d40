"""Casts of matrices to e4m3, each row with a scale of its own, of the rows themselves or of the columns.

    scale[m] = 2**ceil(log2(max_k |x[m, k]| / 448))        values[m, k] = e4m3(x[m, k] / scale[m])

e4m3 is an 8-bit float with 3 bits of mantissa, the largest number 448, the least normal one 2**-6 and steps of 2**-9
below it (Micikevicius et al., "FP8 formats for deep learning", 2022). A scale is a power of two, so that the division
is exact and nothing is rounded but the mantissa: |values * scale - x| <= max(2**-4 * |x|, 2**-10 * scale). A scale is
at least 2**-126; rows of zeros have that one. Rounding is to the nearest, ties to even.

**A row with a NaN or an Inf is NaN**, its scale and all its values: e4m3 has no Inf, and the cast of PyTorch and that
of the GPU would make 448 of it, which hides from the guard of the gradients what went wrong.

Bytes moved at best per element in 16 bit: 2 read and 1 written. The cast of the columns reads twice; what it casts are
weights, which stay in the L2 cache in between.
"""

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdeit.kernels import _op, _rows, _triton
from fastdeit.kernels._example import BASE, SMALL, TINY, Example, Maker
from fastdeit.kernels.fp8 import _interpreter

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest e4m3: 1.75 * 2**8."""
NEEDS = 89
"""The oldest architecture that casts to e4m3: Ada."""
_INF, _ROUND_UP = 0x7F800000, 0x1FFFFF
"""Bits of float32: of infinity, and what carries a mantissa above 1.75 into the exponent."""

# ---- reference -------------------------------------------------------------------------------------------------------


def reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """(values e4m3 `[R, C]`, scale float32 `[R, 1]`) of the rows of `[R, C]`, as in the module's formula."""
    x = x.float()
    bits = x.contiguous().view(torch.int32).bitwise_and(0x7FFFFFFF).amax(-1, keepdim=True)
    exponent = ((bits + _ROUND_UP) >> 23).clamp(min=9) - 8
    nan = torch.full((), torch.nan, device=x.device)
    scale, inverse = (
        torch.where(bits < _INF, (of << 23).view(torch.float32), nan) for of in (exponent, 254 - exponent)
    )
    return (x * inverse).to(E4M3), scale


def columns_reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """`reference` of the columns of `[R, C]`: (values `[C, R]`, scale `[C, 1]`)."""
    return reference(x.t())


# ---- Triton ----------------------------------------------------------------------------------------------------------

if _triton.INTERPRETED:
    _interpreter.mend()


@triton.jit
def bits_of(x):
    """The bits of |x| as integers, which have the order of the numbers, Inf and NaN above all others."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_and_inverse(bits):
    """(scale, its inverse) of rows whose largest `bits_of` these are."""
    exponent = tl.maximum((bits + 0x1FFFFF) >> 23, 9) - 8
    finite = bits < 0x7F800000
    scale = (exponent << 23).to(tl.float32, bitcast=True)
    inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    return tl.where(finite, scale, float("nan")), tl.where(finite, inverse, float("nan"))


@triton.jit
def _rows_kernel(x, values, scale, rows, C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = row < rows
    mask = inside[:, None] & (column < C)[None, :]
    at = row[:, None] * C + column[None, :]
    y = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    found, inverse = scale_and_inverse(tl.max(bits_of(y), 1))
    tl.store(values + at, (y * inverse[:, None]).to(tl.float8e4nv), mask=mask)
    tl.store(scale + row, found, mask=inside)


@triton.jit
def _columns_kernel(x, values, scale, rows, width, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    real = (column < width)[None, :]
    largest = tl.zeros((ROWS, COLUMNS), tl.int32)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & real
        y = tl.load(x + row[:, None].to(tl.int64) * width + column[None, :], mask=mask, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, bits_of(y))
    found, inverse = scale_and_inverse(tl.max(largest, 0))
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & real
        y = tl.load(x + row[:, None].to(tl.int64) * width + column[None, :], mask=mask, other=0.0).to(tl.float32)
        y = tl.trans((y * inverse[None, :]).to(tl.float8e4nv))
        tl.store(values + column[:, None].to(tl.int64) * rows + row[None, :], y, mask=tl.trans(mask))
    tl.store(scale + column, found, mask=column < width)


_COLUMNS, _ROWS = 16, 256
"""Tile of eight warps: 16 columns are the 32 bytes that memory hands out at least, and narrow weights still have
programs for many SMs."""


def triton_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """`reference` in one launch."""
    _rows.require(x)
    values, scale = torch.empty_like(x, dtype=E4M3, memory_format=torch.contiguous_format), scales(x)
    tile = _rows.tile(x.shape[1])
    _triton.launch(_rows_kernel, (_triton.cdiv(len(x), tile["ROWS"]),), x.contiguous(), values, scale, len(x), **tile)
    return values, scale


def triton_columns(x: Tensor) -> tuple[Tensor, Tensor]:
    """`columns_reference` in one launch."""
    _triton.require_dtypes(x)
    rows, width = x.shape
    values = torch.empty(width, rows, dtype=E4M3, device=x.device)
    scale = torch.empty(width, 1, dtype=torch.float32, device=x.device)
    grid = (_triton.cdiv(width, _COLUMNS),)
    tensors = x.contiguous(), values, scale
    _triton.launch(_columns_kernel, grid, *tensors, rows, width, COLUMNS=_COLUMNS, ROWS=_ROWS, warps=8)
    return values, scale


def scales(x: Tensor) -> Tensor:
    """Memory for the scales of the rows of `x`."""
    return torch.empty(len(x), 1, dtype=torch.float32, device=x.device)


# ---- registration ----------------------------------------------------------------------------------------------------

CAPABILITY = partial(_triton.capability, needs=NEEDS)
COMPILED = tuple((sizes, torch.bfloat16) for sizes in (BASE, SMALL, TINY))
"""The DeiTs in the one dtype whose products can be of 8 bits."""


def _tokens(make: Maker, hidden: bool) -> list[Any]:
    sizes = make.sizes
    return [make.normal(sizes.batch * sizes.tokens, sizes.hidden if hidden else sizes.dim, grad=False)]


def _weights(make: Maker) -> list[Any]:
    return [make.mlp_weights()[0].detach()]


def bytes_of(args: Any) -> float:
    """What a cast moves at best."""
    return args[0].nbytes + args[0].numel()


ROWS = _op.Op(
    "fp8_rows",
    reference,
    examples=[
        Example("", partial(_tokens, hidden=False), compiled=COMPILED, bytes=bytes_of),
        Example("hidden", partial(_tokens, hidden=True), compiled=COMPILED),
    ],
    others=[_op.Backend("triton", CAPABILITY, triton_rows)],
)
COLUMNS = _op.Op(
    "fp8_columns",
    columns_reference,
    examples=[Example("", _weights, compiled=COMPILED, bytes=bytes_of)],
    others=[_op.Backend("triton", CAPABILITY, triton_columns)],
)


@ROWS.registered.register_fake
def _(x):
    return x.new_empty(x.shape, dtype=E4M3), x.new_empty(x.shape[0], 1, dtype=torch.float32)


@COLUMNS.registered.register_fake
def _(x):
    rows, width = x.shape
    return x.new_empty(width, rows, dtype=E4M3), x.new_empty(width, 1, dtype=torch.float32)
