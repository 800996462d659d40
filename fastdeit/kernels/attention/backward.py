"""Attention's backward in two Triton kernels: one for dq, one for dk and dv. Both make the logits and their gradients
(seven products instead of five), so that each result is added up by one program."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdeit.kernels import _triton
from fastdeit.kernels.attention.tiles import (
    LOG2E,
    Operands,
    dot,
    load_tile,
    logits,
    of_head,
    rows_from,
    store_tile,
    visible,
)


@triton.jit
def _query_gradient_kernel(
    q,
    k,
    v,
    key_mask,
    out,
    dout,
    lse,
    delta,
    dq,
    partial,
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
    """dq of 64 queries of one head, their D for the other kernel, and partial[b, program] = column sums of dq."""
    blocks = tl.cdiv(queries, ROWS)
    q, k, v, batch, head, block = of_head(q, k, v, q_batch, k_batch, blocks, HEADS, WIDTH)
    start, row = block * ROWS, tl.arange(0, ROWS)
    left = queries - start
    mixed = (batch * queries + start) * (HEADS * WIDTH) + head * WIDTH
    queried = load_tile(rows_from(q, start, q_row), row, left, q_row, WIDTH, BLOCK)
    grad = load_tile(dout + mixed, row, left, HEADS * WIDTH, WIDTH, BLOCK)
    product = grad.to(tl.float32) * load_tile(out + mixed, row, left, HEADS * WIDTH, WIDTH, BLOCK).to(tl.float32)
    d = tl.sum(product, 1)
    at = (batch * HEADS + head) * queries + start + row
    tl.store(delta + at, d, mask=row < left)
    base = tl.load(lse + at, mask=row < left, other=float("inf")) * LOG2E
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    column = tl.arange(0, KEYS)
    for first in range(0, tokens, KEYS):
        keys = load_tile(rows_from(k, first, k_row), column, tokens - first, k_row, WIDTH, BLOCK)
        # Masked: the exponential of a missing key could be infinite, and times zero that is NaN.
        s = logits(queried, keys, column, tokens - first, scale * LOG2E, False)
        s = tl.where(visible(key_mask, batch, first, column, tokens)[None, :], s, float("-inf"))
        p = tl.exp2(s - base[:, None])
        values = load_tile(rows_from(v, first, k_row), column, tokens - first, k_row, WIDTH, BLOCK)
        dp = dot(grad, tl.trans(values))
        ds = p * (dp - d[:, None]) * scale
        total = dot(ds.to(keys.dtype), keys, total)
    dq += batch * q_batch + head * WIDTH
    store_tile(rows_from(dq, start, q_row), total, row, left, q_row, WIDTH, BLOCK)
    if partial is not None:
        place = (batch * blocks + block) * (HEADS * WIDTH) + head * WIDTH
        feature = tl.arange(0, BLOCK)
        tl.store(partial + place + feature, tl.sum(total, 0), mask=feature < WIDTH)


_triton.expect(_query_gradient_kernel, products=True)


@triton.jit
def _key_gradient_kernel(
    q,
    k,
    v,
    key_mask,
    dout,
    lse,
    delta,
    dk,
    dv,
    partial,
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
    """dk and dv of KEYS keys of one head, and partial[b, program] = column sums of dk, then of dv."""
    blocks = tl.cdiv(tokens, KEYS)
    q, k, v, batch, head, block = of_head(q, k, v, q_batch, k_batch, blocks, HEADS, WIDTH)
    dout += batch * queries * (HEADS * WIDTH) + head * WIDTH
    first, column = block * KEYS, tl.arange(0, KEYS)
    left = tokens - first
    keys = load_tile(rows_from(k, first, k_row), column, left, k_row, WIDTH, BLOCK)
    values = load_tile(rows_from(v, first, k_row), column, left, k_row, WIDTH, BLOCK)
    key_total = tl.zeros((KEYS, BLOCK), tl.float32)
    value_total = tl.zeros((KEYS, BLOCK), tl.float32)
    there = visible(key_mask, batch, first, column, tokens)
    row = tl.arange(0, ROWS)
    for start in range(0, queries, ROWS):
        queried = load_tile(rows_from(q, start, q_row), row, queries - start, q_row, WIDTH, BLOCK)
        grad = load_tile(rows_from(dout, start, HEADS * WIDTH), row, queries - start, HEADS * WIDTH, WIDTH, BLOCK)
        at = (batch * HEADS + head) * queries + start + row
        base = tl.load(lse + at, mask=row < queries - start, other=float("inf")) * LOG2E
        d = tl.load(delta + at, mask=row < queries - start, other=0.0)
        s = tl.where(there[:, None], dot(keys, tl.trans(queried)) * (scale * LOG2E), float("-inf"))
        p = tl.exp2(s - base[None, :])
        value_total = dot(p.to(grad.dtype), grad, value_total)
        ds = p * (dot(values, tl.trans(grad)) - d[None, :]) * scale
        key_total = dot(ds.to(queried.dtype), queried, key_total)
    dk += batch * k_batch + head * WIDTH
    dv += batch * k_batch + head * WIDTH
    store_tile(rows_from(dk, first, k_row), key_total, column, left, k_row, WIDTH, BLOCK)
    store_tile(rows_from(dv, first, k_row), value_total, column, left, k_row, WIDTH, BLOCK)
    if partial is not None:
        place = (batch * blocks + block) * (2 * HEADS * WIDTH) + head * WIDTH
        feature = tl.arange(0, BLOCK)
        tl.store(partial + place + feature, tl.sum(key_total, 0), mask=feature < WIDTH)
        tl.store(partial + place + HEADS * WIDTH + feature, tl.sum(value_total, 0), mask=feature < WIDTH)


_triton.expect(_key_gradient_kernel, products=True)


def backward(
    grad: Tensor,
    operands: Operands,
    out: Tensor,
    lse: Tensor,
    gradients: Operands,
    key_mask: Tensor | None = None,
    *,
    sums: bool,
) -> Tensor | None:
    """Fill the gradients; with `sums`, return the float32 column sums `[3*H*d]` of dq, dk and dv. key_mask is that of
    `forward`."""
    q, tile = operands.q, operands.check()
    batch, queries, width = q.shape
    tokens, step = operands.k.shape[1], tile["ROWS"]
    grad = grad.contiguous()
    delta = torch.empty_like(lse)
    query_grid, key_grid = operands.grid(queries, step), operands.grid(tokens, step)
    query_sums = key_sums = None
    if sums:
        query_blocks, key_blocks = _triton.cdiv(queries, step), _triton.cdiv(tokens, step)
        query_sums = torch.empty(batch * query_blocks, width, dtype=torch.float32, device=q.device)
        key_sums = torch.empty(batch * key_blocks, 2 * width, dtype=torch.float32, device=q.device)
    inputs = q, operands.k, operands.v, key_mask
    constants = tile | {"KEYS": step, "warps": 4 if tile["BLOCK"] <= 64 and q.itemsize == 2 else 8}
    tensors = *inputs, out, grad, lse, delta, gradients.q, query_sums
    _triton.launch(_query_gradient_kernel, query_grid, *tensors, *operands.sizes, **constants)
    tensors = *inputs, grad, lse, delta, gradients.k, gradients.v, key_sums
    _triton.launch(_key_gradient_kernel, key_grid, *tensors, *operands.sizes, **constants)
    if not sums:
        return None
    total = torch.empty(3 * width, dtype=torch.float32, device=q.device)
    torch.sum(query_sums, 0, out=total[:width])
    torch.sum(key_sums, 0, out=total[width:])
    return total
