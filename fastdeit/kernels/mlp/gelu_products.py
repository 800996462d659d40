"""The two matrix products of the MLP that GELU stands next to, with GELU in their epilogue, in Triton.

    product_gelu            pre = x w1^T + b1      act = gelu(pre)
    product_gelu_backward   dact = dout w2         dpre = dact * gelu'(pre)      act = gelu(pre)      db1 = sum dpre

What a library's product would write and an element-wise kernel read again stays in registers: 8 bytes an element of
pre in 16 bit forward, 8 backward. That pays while these products are slower than the library's by less than the passes
they save, a matter of the card; hence a backend of its own, to be chosen by measurement of the whole region. Backward
writes act only where it was not kept.

16-bit operands, float32 sums. Tiles of 128 rows: with 198 tokens and 64 images or a multiple they divide the rows.
Programs are numbered so that those that share a block of columns run together and find it in cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdeit.kernels import _triton
from fastdeit.kernels.dtypes import HALVES
from fastdeit.kernels.mlp.gelu import gelu_and_derivative


@triton.jit
def _block(row_blocks, column_blocks, GROUP: tl.constexpr):
    """Row and column block of this program: GROUP row blocks go through the column blocks together."""
    program = tl.program_id(0)
    group = program // (GROUP * column_blocks)
    height = tl.minimum(row_blocks - group * GROUP, GROUP)
    inside = program % (GROUP * column_blocks)
    return group * GROUP + inside % height, inside // height


@triton.jit
def _tile(row_block, column_block, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Where a program's tile of a `[rows, WIDTH]` begins, in 64 bit, and the places in it from there, in 32: places of
    64 bit take so many registers that the backward's epilogue spills."""
    corner = row_block.to(tl.int64) * ROWS * WIDTH + column_block * COLUMNS
    return corner, tl.arange(0, ROWS)[:, None] * WIDTH + tl.arange(0, COLUMNS)[None, :]


@triton.jit
def _product(
    a, b, row, column, rows, b_depth, b_column, total, DEPTH: tl.constexpr, WIDTH: tl.constexpr, STEP: tl.constexpr
):
    """total + a b for rows and columns of a `[rows, DEPTH]`, contiguous, and b `[DEPTH, WIDTH]`, of any strides."""
    k = tl.arange(0, STEP)
    left = a + row[:, None].to(tl.int64) * DEPTH + k[None, :]
    right = b + k[:, None].to(tl.int64) * b_depth + column[None, :].to(tl.int64) * b_column
    inside, real = (row < rows)[:, None], (column < WIDTH)[None, :]
    for start in range(0, DEPTH, STEP):
        deep = k < DEPTH - start
        first = tl.load(left, mask=inside & deep[None, :], other=0.0)
        second = tl.load(right, mask=deep[:, None] & real, other=0.0)
        total = tl.dot(first, second, total)
        left += STEP
        right += tl.cast(STEP, tl.int64) * b_depth
    return total


@triton.jit
def _product_gelu_kernel(
    x,
    w1,
    b1,
    pre,
    act,
    rows,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    GROUP: tl.constexpr,
):
    row_block, column_block = _block(tl.cdiv(rows, ROWS), tl.cdiv(WIDTH, COLUMNS), GROUP)
    row = row_block * ROWS + tl.arange(0, ROWS)
    column = column_block * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    total = _product(x, w1, row, column, rows, 1, DEPTH, total, DEPTH, WIDTH, STEP)
    total += tl.load(b1 + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
    mask = (row < rows)[:, None] & (column < WIDTH)[None, :]
    corner, at = _tile(row_block, column_block, WIDTH, ROWS, COLUMNS)
    rounded = total.to(pre.dtype.element_ty)
    tl.store(pre + corner + at, rounded, mask=mask)
    value, _ = gelu_and_derivative(rounded.to(tl.float32), False)
    tl.store(act + corner + at, value.to(act.dtype.element_ty), mask=mask)


_triton.expect(_product_gelu_kernel, products=True)


@triton.jit
def _product_gelu_backward_kernel(
    dout,
    w2,
    pre,
    dpre,
    act,
    partial,
    rows,
    DEPTH: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    GROUP: tl.constexpr,
):
    """partial[row block, column] = sum of the block's rows of dpre, before rounding."""
    row_block, column_block = _block(tl.cdiv(rows, ROWS), tl.cdiv(WIDTH, COLUMNS), GROUP)
    row = row_block * ROWS + tl.arange(0, ROWS)
    column = column_block * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    total = _product(dout, w2, row, column, rows, WIDTH, 1, total, DEPTH, WIDTH, STEP)
    mask = (row < rows)[:, None] & (column < WIDTH)[None, :]
    corner, at = _tile(row_block, column_block, WIDTH, ROWS, COLUMNS)
    value, derivative = gelu_and_derivative(tl.load(pre + corner + at, mask=mask, other=0.0).to(tl.float32), False)
    if act is not None:
        tl.store(act + corner + at, value.to(act.dtype.element_ty), mask=mask)
    gradient = total * derivative
    tl.store(dpre + corner + at, gradient.to(dpre.dtype.element_ty), mask=mask)
    tl.store(partial + row_block.to(tl.int64) * WIDTH + column, tl.sum(gradient, 0), mask=column < WIDTH)


_triton.expect(_product_gelu_backward_kernel, products=True)


def _tiles(device: torch.device, warps: int) -> dict[str, int]:
    """Tiles of 128 x 128. Forward, four warps fill the registers of half an SM, and the epilogue of one program
    overlaps the products of another; the backward's epilogue holds three tiles, for which it needs eight warps."""
    deep = {"STEP": 64, "stages": 3} if _triton.arch(device) >= 90 else {"STEP": 32, "stages": 4}
    return {"ROWS": 128, "COLUMNS": 128, "GROUP": 8, "warps": warps, **deep}


def check(*tensors: Tensor) -> None:
    """`Unsupported` unless all tensors are of one 16-bit dtype and hold anything."""
    for tensor in tensors:
        _triton.require(tensor.dtype in HALVES, f"its products are of 16-bit operands, not {tensor.dtype}")
        _triton.require(tensor.dtype == tensors[0].dtype, f"operands are {tensors[0].dtype} and {tensor.dtype}")
    _triton.require_products(*tensors)
    _triton.require(all(tensor.numel() for tensor in tensors), "an operand is empty")


def product_gelu(x: Tensor, w1: Tensor, b1: Tensor) -> tuple[Tensor, Tensor]:
    """(pre, act) `[rows, F]` of x `[rows, C]`, w1 `[F, C]` and b1 `[F]`, all contiguous and of one 16-bit dtype."""
    check(x, w1, b1)
    (rows, depth), width = x.shape, w1.shape[0]
    pre = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    act = torch.empty_like(pre)
    tiles = _tiles(x.device, warps=4)
    grid = (_triton.cdiv(rows, tiles["ROWS"]) * _triton.cdiv(width, tiles["COLUMNS"]),)
    _triton.launch(_product_gelu_kernel, grid, x, w1, b1, pre, act, rows, DEPTH=depth, WIDTH=width, **tiles)
    return pre, act


def product_gelu_backward(dout: Tensor, w2: Tensor, pre: Tensor, *, act: bool) -> tuple[Tensor, Tensor | None, Tensor]:
    """(dpre, gelu(pre) if `act`, db1) of dout `[rows, C']`, w2 `[C', F]` and pre `[rows, F]`, of which dout and pre are
    contiguous; db1 is float32 `[F]`."""
    w2 = w2.contiguous()
    check(dout, w2, pre)
    (rows, depth), width = dout.shape, w2.shape[1]
    dpre = torch.empty_like(pre)
    value = torch.empty_like(pre) if act else None
    tiles = _tiles(dout.device, warps=8)
    blocks = _triton.cdiv(rows, tiles["ROWS"])
    partial = torch.empty(blocks, width, dtype=torch.float32, device=dout.device)
    grid = (blocks * _triton.cdiv(width, tiles["COLUMNS"]),)
    tensors = dout, w2, pre, dpre, value, partial
    _triton.launch(_product_gelu_backward_kernel, grid, *tensors, rows, DEPTH=depth, WIDTH=width, **tiles)
    return dpre, value, partial.sum(0)
