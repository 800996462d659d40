"""Attention's forward in Triton: in one pass where all logits of 64 queries fit the registers, else, and with a mask of
keys, online softmax."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdeit.kernels import _triton
from fastdeit.kernels.attention.tiles import (
    LOG2E,
    Operands,
    chunks,
    dot,
    load_tile,
    logits,
    of_head,
    rows_from,
    store_tile,
    visible,
)

_ONE_PASS, _ONE_PASS_BEFORE_HOPPER = 257, 208
"""Most keys whose logits, 64 rows in float32, fit the registers of four warps. Before sm_90, operands of the tensor
cores are in registers, too."""


@triton.jit
def _one_pass_kernel(
    q,
    k,
    v,
    out,
    lse,
    queries,
    tokens,
    scale,
    q_batch,
    q_row,
    k_batch,
    k_row,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    THIRD: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """64 queries of one head against all keys, which are chunks of FIRST, SECOND and THIRD (0: none). A head has BLOCKS
    programs: a constant, because the division by it would cost registers that sm_80 does not have."""
    q, k, v, batch, head, block = of_head(q, k, v, q_batch, k_batch, BLOCKS, HEADS, WIDTH)
    start, row = block * ROWS, tl.arange(0, ROWS)
    left = queries - start
    queried = load_tile(rows_from(q, start, q_row), row, left, q_row, WIDTH, BLOCK)
    first = tl.arange(0, FIRST)
    s0 = logits(queried, load_tile(k, first, tokens, k_row, WIDTH, BLOCK), first, tokens, scale * LOG2E, SECOND == 0)
    top = tl.max(s0, 1)
    if SECOND > 0:
        second = FIRST + tl.arange(0, SECOND)
        s1 = logits(
            queried, load_tile(k, second, tokens, k_row, WIDTH, BLOCK), second, tokens, scale * LOG2E, THIRD == 0
        )
        top = tl.maximum(top, tl.max(s1, 1))
    if THIRD > 0:
        third = FIRST + SECOND + tl.arange(0, THIRD)
        s2 = logits(queried, load_tile(k, third, tokens, k_row, WIDTH, BLOCK), third, tokens, scale * LOG2E, True)
        top = tl.maximum(top, tl.max(s2, 1))
    p0 = tl.exp2(s0 - top[:, None])
    total = tl.sum(p0, 1)
    mixed = dot(p0.to(v.dtype.element_ty), load_tile(v, first, tokens, k_row, WIDTH, BLOCK))
    if SECOND > 0:
        p1 = tl.exp2(s1 - top[:, None])
        total += tl.sum(p1, 1)
        mixed = dot(p1.to(v.dtype.element_ty), load_tile(v, second, tokens, k_row, WIDTH, BLOCK), mixed)
    if THIRD > 0:
        p2 = tl.exp2(s2 - top[:, None])
        total += tl.sum(p2, 1)
        mixed = dot(p2.to(v.dtype.element_ty), load_tile(v, third, tokens, k_row, WIDTH, BLOCK), mixed)
    lse += (tl.program_id(0) // BLOCKS).to(tl.int64) * queries + start
    tl.store(lse + row, (top + tl.log2(total)) / LOG2E, mask=row < left)
    out += (batch * queries + start) * (HEADS * WIDTH) + head * WIDTH
    store_tile(out, mixed / total[:, None], row, left, HEADS * WIDTH, WIDTH, BLOCK)


_triton.expect(_one_pass_kernel, products=True)


@triton.jit
def _online_kernel(
    q,
    k,
    v,
    key_mask,
    out,
    lse,
    queries,
    tokens,
    scale,
    q_batch,
    q_row,
    k_batch,
    k_row,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """64 queries of one head against any number of keys, KEYS at a time. Where a mask leaves no key at all, the result
    is 0, and the log-sum-exp infinite, by which all probabilities of the backward are 0."""
    blocks = tl.cdiv(queries, ROWS)
    q, k, v, batch, head, block = of_head(q, k, v, q_batch, k_batch, blocks, HEADS, WIDTH)
    start, row = block * ROWS, tl.arange(0, ROWS)
    left = queries - start
    queried = load_tile(rows_from(q, start, q_row), row, left, q_row, WIDTH, BLOCK)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, BLOCK), tl.float32)
    column = tl.arange(0, KEYS)
    for first in range(0, tokens, KEYS):
        keys = load_tile(rows_from(k, first, k_row), column, tokens - first, k_row, WIDTH, BLOCK)
        s = logits(queried, keys, column, tokens - first, scale * LOG2E, False)
        s = tl.where(visible(key_mask, batch, first, column, tokens)[None, :], s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        base = new_top
        if key_mask is not None:  # no key so far: minus infinity less itself would be NaN
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink = tl.exp2(top - base)
        p = tl.exp2(s - base[:, None])
        total = total * shrink + tl.sum(p, 1)
        values = load_tile(rows_from(v, first, k_row), column, tokens - first, k_row, WIDTH, BLOCK)
        mixed = dot(p.to(v.dtype.element_ty), values, mixed * shrink[:, None])
        top = new_top
    log_sum = (top + tl.log2(total)) / LOG2E
    if key_mask is not None:
        log_sum = tl.where(total > 0, log_sum, float("inf"))
        total = tl.where(total > 0, total, 1.0)
    first_row = batch * queries + start
    store_tile(
        out + first_row * (HEADS * WIDTH) + head * WIDTH, mixed / total[:, None], row, left, HEADS * WIDTH, WIDTH, BLOCK
    )
    at = (batch * HEADS + head) * queries + start + row
    tl.store(lse + at, log_sum, mask=row < left)


_triton.expect(_online_kernel, products=True)


def forward(operands: Operands, key_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(out `[B, M, H*d]` in q's dtype, lse float32 `[B, H, M]`) in one launch; `Unsupported` as of `Operands.check`.

    key_mask  contiguous uint8 `[B, N]`, 0 for keys that take no part; None where all do
    """
    q, tile = operands.q, operands.check()
    batch, queries, width = q.shape
    tokens = operands.k.shape[1]
    out = torch.empty(batch, queries, width, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, operands.num_heads, queries, dtype=torch.float32, device=q.device)
    inputs, results = (q, operands.k, operands.v), (out, lse)
    grid = operands.grid(queries, tile["ROWS"])
    warps = 4 if tile["BLOCK"] <= 64 else 8
    one_pass = _ONE_PASS if _triton.arch(q.device) >= 90 else _ONE_PASS_BEFORE_HOPPER
    if tokens <= one_pass and q.itemsize == 2 and key_mask is None:
        first, second, third = chunks(tokens)
        blocks = _triton.cdiv(queries, tile["ROWS"])
        constants = tile | {"FIRST": first, "SECOND": second, "THIRD": third, "BLOCKS": blocks}
        _triton.launch(_one_pass_kernel, grid, *inputs, *results, *operands.sizes, warps=warps, **constants)
    else:
        constants = tile | {"KEYS": tile["ROWS"]}
        tensors = *inputs, key_mask, *results
        _triton.launch(_online_kernel, grid, *tensors, *operands.sizes, warps=warps, stages=2, **constants)
    return out, lse
