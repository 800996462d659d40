"""GELU in Triton: device functions for kernels that carry it, its backward with the bias gradient, and column sums.

    gelu(x) = x * Phi(x)        gelu'(x) = Phi(x) + x * phi(x)        Phi, phi: normal distribution and density

16-bit results take Phi from a polynomial without branches, Phi(x) = 1/2 + c * P(c**2) with c = x cut to +-4.4: at most
3e-5 off, below half a unit in the last place of float16 from 0.06 upwards, at half the instructions of erf, which
would make these kernels wait for arithmetic instead of memory. P is the minimax fit with max(1, |x|) as weight and
P(4.4**2) fixed so that Phi reaches 0 and 1. float32 results use erf.

Both kernels read every element once: in 16 bit `backward` reads 4 bytes and writes 2 (4 with `act`), `column_sums`
reads 2. A fixed number of programs on every SM for each column block adds up rows; their partial sums are added in a
fixed order, which depends on the card's number of SMs alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdeit.kernels import _triton

_PROGRAMS = 2
"""Programs of a column block, and therefore partial sums, on every SM: with the 2 to 6 blocks of DeiT, four or more."""
_COLUMNS, _ROWS = 512, 4
"""Tile of four warps: every thread holds two times 8 neighbouring 16-bit elements of a tensor."""


@triton.jit
def normal_distribution(x, EXACT: tl.constexpr):
    """Phi(x): by erf where EXACT, else by the polynomial of the module's formula."""
    if EXACT:
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    c = tl.minimum(tl.maximum(x, -4.4), 4.4)
    u = c * c
    p = 3.733903283510943e-11 * u - 3.902406134727658e-09
    p = p * u + 1.7968836266570816e-07
    p = p * u - 4.8397320720282976e-06
    p = p * u + 8.567648957943049e-05
    p = p * u - 0.0010648837710383252
    p = p * u + 0.009683261288078357
    p = p * u - 0.06615927179832615
    p = p * u + 0.3988250001453334
    return 0.5 + c * p


@triton.jit
def gelu_and_derivative(x, EXACT: tl.constexpr):
    """(gelu(x), gelu'(x)) of float32 x. phi = exp(-x**2 / 2) / sqrt(2 pi), as a power of two."""
    distribution = normal_distribution(x, EXACT)
    density = 0.3989422804014327 * tl.exp2(x * x * -0.7213475204444817)
    return x * distribution, distribution + x * density


@triton.jit
def _backward_kernel(
    dact,
    pre,
    dpre,
    act,
    partial,
    rows,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    EXACT: tl.constexpr,
):
    """partial[program, column] = sum of this program's rows of dpre, before rounding."""
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    real = (column < WIDTH)[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)  # of a matrix: sums over threads once, not once a step
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        mask = (row < rows) & real
        at = row * WIDTH + column[None, :]
        x = tl.load(pre + at, mask=mask, other=0.0).to(tl.float32)
        value, derivative = gelu_and_derivative(x, EXACT)
        gradient = tl.load(dact + at, mask=mask, other=0.0).to(tl.float32) * derivative
        tl.store(dpre + at, gradient.to(dpre.dtype.element_ty), mask=mask)
        if act is not None:
            tl.store(act + at, value.to(act.dtype.element_ty), mask=mask)
        total += gradient
    tl.store(partial + tl.program_id(0) * WIDTH + column, tl.sum(total, 0), mask=column < WIDTH)


@triton.jit
def _column_sums_kernel(x, partial, rows, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    real = (column < WIDTH)[None, :]
    total = tl.zeros((ROWS, COLUMNS), tl.float32)  # of a matrix: sums over threads once, not once a step
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        at = row * WIDTH + column[None, :]
        total += tl.load(x + at, mask=(row < rows) & real, other=0.0).to(tl.float32)
    tl.store(partial + tl.program_id(0) * WIDTH + column, tl.sum(total, 0), mask=column < WIDTH)


_triton.expect(_column_sums_kernel, stores=64)


def _plan(x: Tensor) -> tuple[tuple[int, int], Tensor, dict[str, int]]:
    """Grid, partial sums and tile for `[rows, width]`."""
    rows, width = x.shape
    columns = min(_COLUMNS, max(16, _triton.power_of_two(width)))
    programs = _PROGRAMS * _triton.processors(x.device)
    grid = min(programs, _triton.cdiv(rows, _ROWS)), _triton.cdiv(width, columns)
    partial = torch.empty(grid[0], width, dtype=torch.float32, device=x.device)
    return grid, partial, {"WIDTH": width, "COLUMNS": columns, "ROWS": _ROWS, "warps": 4}


def backward(dact: Tensor, pre: Tensor, *, act: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """(dact * gelu'(pre), gelu(pre) if `act`, column sums of the first) for contiguous `[rows, width]` of one dtype.

    The sums are float32 `[width]`.
    """
    grid, partial, tile = _plan(pre)
    dpre = torch.empty_like(pre)
    value = torch.empty_like(pre) if act else None
    tensors = dact, pre, dpre, value, partial
    _triton.launch(_backward_kernel, grid, *tensors, len(pre), EXACT=pre.dtype == torch.float32, **tile)
    return dpre, value, partial.sum(0)


def column_sums(x: Tensor) -> Tensor:
    """float32 `[width]`: sums over the rows of a contiguous `[rows, width]`."""
    grid, partial, tile = _plan(x)
    _triton.launch(_column_sums_kernel, grid, x, partial, len(x), **tile)
    return partial.sum(0)
