"""Attention's forward in Gluon: one program of four warps for each head of each sample.

All keys, values and queries of a head are loaded by TMA when the program begins, each piece with a barrier of its own,
so that the first product waits for the first queries and keys alone. For 64 queries at a time:

    the products with all chunks of keys are issued at once, and the maxima of a chunk are taken while the next is
    multiplied; then, chunk by chunk, exponentials are taken while the values of the chunk before are multiplied

with all logits in registers, so that nothing is rescaled. Two programs share an SM, and each computes while the other
waits. Results go out by TMA through the memory of the queries that they belong to.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fastdeit.kernels import _triton
from fastdeit.kernels.attention.hopper.tiles import (
    LOG2E,
    ROWS,
    accumulator,
    barriers,
    boxes,
    chunk_boxes,
    invalidate,
    load_chunks,
    present,
)


@gluon.jit
def _issue_logits(queried, keys, WIDTH: gl.constexpr):
    """queried keys^T, under way."""
    KEYS: gl.constexpr = keys.shape[1]
    nothing = gl.zeros([ROWS, KEYS], gl.float32, accumulator(KEYS))
    keys = keys.reshape([KEYS, WIDTH]).permute((1, 0))
    return warpgroup_mma(queried, keys, nothing, use_acc=False, is_async=True)


@gluon.jit
def _without_missing(logits, start, TOKENS: gl.constexpr):
    """Minus infinity where there is no key."""
    KEYS: gl.constexpr = logits.shape[1]
    key = start + gl.arange(0, KEYS, gl.SliceLayout(0, accumulator(KEYS)))
    return gl.where((key < TOKENS)[None, :], logits, float("-inf"))


@gluon.jit
def _weights(logits, top, factor):
    top = gl.convert_layout(top, gl.SliceLayout(1, accumulator(logits.shape[1])))
    return gl.exp2(logits * factor - top[:, None])


@gluon.jit
def _issue_mixed(weights, values, total, use_total, WIDTH: gl.constexpr):
    """total + weights values, under way."""
    weights = gl.convert_layout(weights.to(values.dtype), gl.DotOperandLayout(0, accumulator(WIDTH), 2))
    values = values.reshape([values.shape[1], WIDTH])
    return warpgroup_mma(weights, values, total, use_acc=use_total, is_async=True)


@gluon.jit
def forward_kernel(
    rows,
    first,
    second,
    third,
    mixed,
    lse,
    scale,
    TOKENS: gl.constexpr,
    HEADS: gl.constexpr,
    WIDTH: gl.constexpr,
):
    """rows, first to third: boxes of qkv, of 64 queries and of the chunks of keys. mixed: boxes of the result."""
    BLOCKS: gl.constexpr = (TOKENS + ROWS - 1) // ROWS
    MIXED: gl.constexpr = HEADS * WIDTH
    OF_ROW: gl.constexpr = gl.SliceLayout(1, accumulator(WIDTH))
    batch, head = gl.program_id(0) // HEADS, gl.program_id(0) % HEADS
    column = head * WIDTH
    of_chunks = present(first, second, third)
    CHUNKS: gl.constexpr = len(of_chunks)

    key_arrived = barriers(CHUNKS)
    value_arrived = barriers(CHUNKS)
    query_arrived = barriers(BLOCKS)
    fence_async_shared()
    gl.barrier()
    queries = gl.allocate_shared_memory(rows.dtype, [BLOCKS, 1, ROWS, WIDTH], rows.layout)
    keys = ()
    values = ()
    for c in gl.static_range(CHUNKS):
        keys = keys + (gl.allocate_shared_memory(rows.dtype, of_chunks[c].block_shape, of_chunks[c].layout),)
        values = values + (gl.allocate_shared_memory(rows.dtype, of_chunks[c].block_shape, of_chunks[c].layout),)
    for block in gl.static_range(BLOCKS):
        mbarrier.expect(query_arrived.index(block), rows.nbytes_per_cta)
        tma.async_load(rows, [batch, block * ROWS, column], query_arrived.index(block), queries.index(block))
        if block == 0:
            load_chunks(of_chunks, keys, batch, MIXED + column, key_arrived)
            load_chunks(of_chunks, values, batch, 2 * MIXED + column, value_arrived)

    lse += gl.program_id(0).to(gl.int64) * TOKENS
    factor = scale * LOG2E
    for block in range(BLOCKS):
        queried = queries.index(block).reshape([ROWS, WIDTH])
        mbarrier.wait(query_arrived.index(block), 0)
        issued = ()
        for c in gl.static_range(CHUNKS):
            mbarrier.wait(key_arrived.index(c), 0)
            issued = issued + (_issue_logits(queried, keys[c], WIDTH),)
        top = gl.full([ROWS], float("-inf"), gl.float32, OF_ROW)
        logits = ()
        start = 0
        for c in gl.static_range(CHUNKS):
            chunk = warpgroup_mma_wait(CHUNKS - 1 - c, deps=[issued[c]])
            if c == CHUNKS - 1:
                chunk = _without_missing(chunk, start, TOKENS)
            top = gl.maximum(top, gl.convert_layout(gl.max(chunk, 1), OF_ROW))
            logits = logits + (chunk,)
            start += of_chunks[c].block_shape[1]
        top = top * factor
        total = gl.zeros([ROWS], gl.float32, OF_ROW)
        summed = gl.zeros([ROWS, WIDTH], gl.float32, accumulator(WIDTH))
        for c in gl.static_range(CHUNKS):
            weights = _weights(logits[c], top, factor)
            total += gl.convert_layout(gl.sum(weights, 1), OF_ROW)
            mbarrier.wait(value_arrived.index(c), 0)
            summed = _issue_mixed(weights, values[c], summed, c > 0, WIDTH)
        row = block * ROWS + gl.arange(0, ROWS, OF_ROW)
        gl.store(lse + row, (top + gl.log2(total)) / LOG2E, mask=row < TOKENS)
        summed = warpgroup_mma_wait(0, deps=[summed])
        gl.barrier()  # all warps have waited: these queries are read no more
        queried.store((summed * (1 / total)[:, None]).to(rows.dtype))
        fence_async_shared()
        gl.barrier()
        tma.async_store(mixed, [batch, block * ROWS, column], queries.index(block))
    invalidate(key_arrived, CHUNKS)
    invalidate(value_arrived, CHUNKS)
    invalidate(query_arrived, BLOCKS)
    tma.store_wait(0)


_triton.expect(forward_kernel, loads=0, stores=32, products=True, boxes=True)


def forward(qkv: Tensor, num_heads: int, scale: float) -> tuple[Tensor, Tensor]:
    """(out `[B, N, H*d]` in qkv's dtype, lse float32 `[B, H, N]`) of contiguous qkv `[B, N, 3*H*d]` in one launch."""
    batch, tokens, packed = qkv.shape
    width = packed // (3 * num_heads)
    out = torch.empty(batch, tokens, num_heads * width, dtype=qkv.dtype, device=qkv.device)
    lse = torch.empty(batch, num_heads, tokens, dtype=torch.float32, device=qkv.device)
    rows = ROWS.value
    inputs = boxes(qkv, rows, width), *chunk_boxes(qkv, width)
    constants = {"TOKENS": tokens, "HEADS": num_heads, "WIDTH": width}
    _triton.launch(
        forward_kernel, (batch * num_heads,), *inputs, boxes(out, rows, width), lse, scale, warps=4, **constants
    )
    return out, lse
