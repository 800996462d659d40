"""GELU and its backward, whose results are cast to e4m3 on the way: the MLP's operands of 8 bits.

    forward    (values, scale) = cast(gelu(pre))
    backward   dpre = dact * gelu'(pre)        (values, scale) = cast(dpre)        act = gelu(pre)        db1 = sum dpre

`cast` is that of the rows in `cast.py`, of float32 results before any other rounding; dpre and act are then rounded to
pre's dtype, for the products of the weights' gradients. All matrices are [R, F]. GELU is that of `mlp/gelu.py`.

Bytes moved per element in 16 bit: forward reads 2 and writes 1, backward reads 4 and writes 5. A program takes whole
rows. In backward a fixed number of programs on every SM adds up its rows' share of db1, as LayerNorm's does.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastdeit.kernels import _op, _rows, _triton
from fastdeit.kernels._example import Example, Maker
from fastdeit.kernels.fp8 import cast
from fastdeit.kernels.fp8.cast import CAPABILITY, COMPILED, E4M3, bits_of, scale_and_inverse
from fastdeit.kernels.mlp.gelu import gelu_and_derivative, normal_distribution

# ---- reference -------------------------------------------------------------------------------------------------------


def reference(pre: Tensor) -> tuple[Tensor, Tensor]:
    """(values e4m3 `[R, F]`, scale float32 `[R, 1]`) of gelu(pre)."""
    return cast.reference(F.gelu(pre.to(_op.statistics_dtype(pre.dtype))))


def backward_reference(dact: Tensor, pre: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(dpre, values, scale, act, db1): as in the module's formula, all but the cast in pre's dtype; db1 is `[F]`."""
    compute = _op.statistics_dtype(pre.dtype)
    exact = torch.ops.aten.gelu_backward(dact.to(compute), pre.to(compute))
    act = F.gelu(pre.to(compute)).to(pre.dtype)
    return exact.to(pre.dtype), *cast.reference(exact), act, exact.sum(0).to(pre.dtype)


# ---- Triton ----------------------------------------------------------------------------------------------------------

_PROGRAMS = 4
"""Programs of a backward pass, and therefore partial sums, on every SM."""


@triton.jit
def _forward_kernel(
    pre, values, scale, rows, C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr, EXACT: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = row < rows
    mask = inside[:, None] & (column < C)[None, :]
    at = row[:, None] * C + column[None, :]
    x = tl.load(pre + at, mask=mask, other=0.0).to(tl.float32)
    y = x * normal_distribution(x, EXACT)
    found, inverse = scale_and_inverse(tl.max(bits_of(y), 1))
    tl.store(values + at, (y * inverse[:, None]).to(tl.float8e4nv), mask=mask)
    tl.store(scale + row, found, mask=inside)


@triton.jit
def _backward_kernel(
    dact,
    pre,
    dpre,
    values,
    scale,
    act,
    partial,
    rows,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    EXACT: tl.constexpr,
):
    """partial[program, column] = sum of this program's rows of dpre, before rounding."""
    column = tl.arange(0, BLOCK)
    real = (column < C)[None, :]
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        inside = row < rows
        mask = inside[:, None] & real
        at = row[:, None] * C + column[None, :]
        x = tl.load(pre + at, mask=mask, other=0.0).to(tl.float32)
        value, derivative = gelu_and_derivative(x, EXACT)
        gradient = tl.load(dact + at, mask=mask, other=0.0).to(tl.float32) * derivative
        found, inverse = scale_and_inverse(tl.max(bits_of(gradient), 1))
        tl.store(dpre + at, gradient.to(dpre.dtype.element_ty), mask=mask)
        tl.store(values + at, (gradient * inverse[:, None]).to(tl.float8e4nv), mask=mask)
        tl.store(act + at, value.to(act.dtype.element_ty), mask=mask)
        tl.store(scale + row, found, mask=inside)
        total += tl.sum(gradient, 0)
    tl.store(partial + tl.program_id(0) * C + column, total, mask=column < C)


def triton_forward(pre: Tensor) -> tuple[Tensor, Tensor]:
    """`reference` in one launch."""
    _rows.require(pre)
    pre = pre.contiguous()
    values, scale, tile = torch.empty_like(pre, dtype=E4M3), cast.scales(pre), _rows.tile(pre.shape[1])
    grid = (_triton.cdiv(len(pre), tile["ROWS"]),)
    _triton.launch(_forward_kernel, grid, pre, values, scale, len(pre), EXACT=pre.dtype == torch.float32, **tile)
    return values, scale


def triton_backward(dact: Tensor, pre: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`backward_reference` in one launch, and one for the sum of the partial sums."""
    _rows.require(dact, pre)
    dact, pre = dact.contiguous(), pre.contiguous()
    dpre, act, values = (torch.empty_like(pre, dtype=dtype) for dtype in (pre.dtype, pre.dtype, E4M3))
    scale, tile = cast.scales(pre), _rows.tile(pre.shape[1])
    programs = min(_PROGRAMS * _triton.processors(pre.device), _triton.cdiv(len(pre), tile["ROWS"]))
    partial = torch.empty(programs, pre.shape[1], dtype=torch.float32, device=pre.device)
    tensors = dact, pre, dpre, values, scale, act, partial
    _triton.launch(_backward_kernel, (programs,), *tensors, len(pre), EXACT=pre.dtype == torch.float32, **tile)
    return dpre, values, scale, act, partial.sum(0).to(pre.dtype)


# ---- registration ----------------------------------------------------------------------------------------------------


def _example(make: Maker, tensors: int) -> list[Any]:
    sizes = make.sizes
    return [make.normal(sizes.batch * sizes.tokens, sizes.hidden, grad=False) for _ in range(tensors)]


def _gradient_bytes(args: Sequence[Any]) -> float:
    return 4 * args[0].nbytes + args[0].numel()


FORWARD = _op.Op(
    "fp8_gelu",
    reference,
    examples=[Example("", lambda make: _example(make, 1), compiled=COMPILED, bytes=cast.bytes_of)],
    others=[_op.Backend("triton", CAPABILITY, triton_forward)],
)
BACKWARD = _op.Op(
    "fp8_gelu_gradient",
    backward_reference,
    examples=[
        Example(
            "",
            lambda make: _example(make, 2),
            compiled=COMPILED,
            bytes=_gradient_bytes,
        )
    ],
    others=[_op.Backend("triton", CAPABILITY, triton_backward)],
)


@FORWARD.registered.register_fake
def _(pre):
    return pre.new_empty(pre.shape, dtype=E4M3), pre.new_empty(pre.shape[0], 1, dtype=torch.float32)


@BACKWARD.registered.register_fake
def _(dact, pre):
    dpre, act, values = (pre.new_empty(pre.shape, dtype=dtype) for dtype in (pre.dtype, pre.dtype, E4M3))
    return dpre, values, pre.new_empty(pre.shape[0], 1, dtype=torch.float32), act, pre.new_empty(pre.shape[1])
