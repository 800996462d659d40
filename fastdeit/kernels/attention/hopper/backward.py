"""Attention's backward in Gluon: one program of two groups of four warps for each head of each sample.

    d = rowsum(dout * out)      p = exp(scale * q k^T - lse)      ds = p * scale * (dout v^T - d)
    dq = ds k                   dk^T += q^T ds                    dv^T += dout^T p

Five products, of which the last two have the channels of the head as their rows: so the tensor cores' 64 rows are all
used, and the keys, of which there are 198, are columns, in chunks of 128, 64 and 16. All of a head is in shared memory,
loaded by TMA when the program begins; dk and dv are in registers, half of the keys in each group of warps.

64 queries and a chunk of keys are a piece of work. The first two products of the next piece are issued before the last
three of this one, which run while the exponentials of the next piece are taken. p and ds pass through shared memory,
since wgmma wants its second operand there. Every sum has one program and one order. Results go out by TMA, through
memory whose contents are used: dq through that of out, dk and dv through that of keys and values.
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

GROUPS = gl.constexpr(2)
"""Groups of four warps, which divide the columns of each product among themselves."""
_UNDER_WAY = gl.constexpr(3)
"""Products that a piece of work leaves under way: those of dv, dk and dq."""


@gluon.constexpr_function
def _shared(columns):
    """The layout of a tile of p or ds in shared memory."""
    return gl.NVMMASharedLayout(swizzle_byte_width=min(128, 2 * columns), element_bitwidth=16, rank=2)


@gluon.jit
def _tile(box):
    """Shared memory for p or ds of 64 queries and a chunk of keys."""
    KEYS: gl.constexpr = box.block_shape[1]
    return gl.allocate_shared_memory(box.dtype, [1, ROWS, KEYS], _shared(KEYS))


@gluon.jit
def _nothing(box, WIDTH: gl.constexpr):
    """dk or dv of a chunk of keys, transposed, before anything is added."""
    KEYS: gl.constexpr = box.block_shape[1]
    return gl.zeros([WIDTH, KEYS], gl.float32, accumulator(KEYS, GROUPS))


@gluon.jit
def _unknown_zero():
    """0, as a number that the compiler does not know. Addresses of shared memory that contain it are computed for each
    piece of work. Otherwise those of all pieces are computed in advance, and spill more than a kilobyte."""
    zero = gl.to_tensor(0)
    return gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [zero], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _at(buffers, number):
    """The buffer of that number of each allocation."""
    chosen = ()
    for c in gl.static_range(len(buffers)):
        chosen = chosen + (buffers[c].index(number),)
    return chosen


@gluon.jit
def _columns(chunk, WIDTH: gl.constexpr):
    """A chunk of keys or values `[KEYS, WIDTH]`."""
    return chunk.reshape([chunk.shape[1], WIDTH])


@gluon.jit
def _issue_scores(rows, chunk, WIDTH: gl.constexpr):
    """rows chunk^T, under way."""
    KEYS: gl.constexpr = chunk.shape[1]
    nothing = gl.zeros([ROWS, KEYS], gl.float32, accumulator(KEYS, GROUPS))
    return warpgroup_mma(rows, _columns(chunk, WIDTH).permute((1, 0)), nothing, use_acc=False, is_async=True)


@gluon.jit
def _row_numbers(grad, result, lse, start, scale, TOKENS: gl.constexpr, WIDTH: gl.constexpr):
    """(lse in powers of two, scale * d) of 64 queries; for a query that does not exist lse is infinite, and p 0."""
    OF_ROW: gl.constexpr = gl.SliceLayout(1, accumulator(WIDTH, GROUPS))
    LOADED: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4 * GROUPS, 1], [1, 0])
    product = grad.load(LOADED).to(gl.float32) * result.load(LOADED).to(gl.float32)
    d = gl.convert_layout(gl.sum(product, 1) * scale, OF_ROW)
    row = start + gl.arange(0, ROWS, OF_ROW)
    return gl.load(lse + row, mask=row < TOKENS, other=float("inf")) * LOG2E, d


@gluon.jit
def _weights_and_gradients(logits, dp, base, d, start, scale, TOKENS: gl.constexpr, RAGGED: gl.constexpr):
    """p and ds of a piece of work; 0 where there is no key, which only RAGGED chunks can have."""
    OF_ROW: gl.constexpr = gl.SliceLayout(1, accumulator(logits.shape[1], GROUPS))
    p = gl.exp2(logits * (scale * LOG2E) - gl.convert_layout(base, OF_ROW)[:, None])
    if RAGGED:
        key = start + gl.arange(0, logits.shape[1], gl.SliceLayout(0, accumulator(logits.shape[1], GROUPS)))
        p = gl.where((key < TOKENS)[None, :], p, 0.0)
    return p, p * (dp * scale - gl.convert_layout(d, OF_ROW)[:, None])


@gluon.jit
def backward_kernel(
    rows,
    first,
    second,
    third,
    grads,
    mixed,
    drows,
    dfirst,
    dsecond,
    dthird,
    lse,
    partial,
    scale,
    TOKENS: gl.constexpr,
    HEADS: gl.constexpr,
    WIDTH: gl.constexpr,
):
    """rows, first to third: boxes of qkv, of 64 queries and of the chunks of keys; drows, dfirst to dthird: those of
    its gradient. grads, mixed: boxes of dout and of out. partial[b] = sum of the gradient of qkv[b] over the tokens."""
    BLOCKS: gl.constexpr = (TOKENS + ROWS - 1) // ROWS
    MIXED: gl.constexpr = HEADS * WIDTH
    OF_ROW: gl.constexpr = gl.SliceLayout(1, accumulator(WIDTH, GROUPS))
    OF_COLUMN: gl.constexpr = gl.SliceLayout(0, accumulator(WIDTH, GROUPS))
    batch, head = gl.program_id(0) // HEADS, gl.program_id(0) % HEADS
    column = head * WIDTH
    of_chunks, of_gradients = present(first, second, third), present(dfirst, dsecond, dthird)
    CHUNKS: gl.constexpr = len(of_chunks)
    dtype: gl.constexpr = rows.dtype

    key_arrived = barriers(CHUNKS)
    value_arrived = barriers(CHUNKS)
    row_arrived = barriers(BLOCKS)
    fence_async_shared()
    gl.barrier()
    queries = gl.allocate_shared_memory(dtype, [BLOCKS, 1, ROWS, WIDTH], rows.layout)
    douts = gl.allocate_shared_memory(dtype, [BLOCKS, 1, ROWS, WIDTH], rows.layout)
    outs = gl.allocate_shared_memory(dtype, [BLOCKS, 1, ROWS, WIDTH], rows.layout)
    keys = ()
    values = ()
    p_tiles = ()
    ds_tiles = ()
    dks = ()
    dvs = ()
    for c in gl.static_range(CHUNKS):
        keys = keys + (gl.allocate_shared_memory(dtype, [1] + of_chunks[c].block_shape, of_chunks[c].layout),)
        values = values + (gl.allocate_shared_memory(dtype, [1] + of_chunks[c].block_shape, of_chunks[c].layout),)
        p_tiles = p_tiles + (_tile(of_chunks[c]),)
        ds_tiles = ds_tiles + (_tile(of_chunks[c]),)
        dks = dks + (_nothing(of_chunks[c], WIDTH),)
        dvs = dvs + (_nothing(of_chunks[c], WIDTH),)
    for block in gl.static_range(BLOCKS):
        mbarrier.expect(row_arrived.index(block), 3 * rows.nbytes_per_cta)
        tma.async_load(rows, [batch, block * ROWS, column], row_arrived.index(block), queries.index(block))
        tma.async_load(grads, [batch, block * ROWS, column], row_arrived.index(block), douts.index(block))
        tma.async_load(mixed, [batch, block * ROWS, column], row_arrived.index(block), outs.index(block))
        if block == 0:
            load_chunks(of_chunks, _at(keys, 0), batch, MIXED + column, key_arrived)
            load_chunks(of_chunks, _at(values, 0), batch, 2 * MIXED + column, value_arrived)

    lse += gl.program_id(0).to(gl.int64) * TOKENS
    if partial is not None:
        dq_sum = gl.allocate_shared_memory(gl.float32, [ROWS, WIDTH], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    dq = gl.zeros([ROWS, WIDTH], gl.float32, accumulator(WIDTH, GROUPS))
    mbarrier.wait(row_arrived.index(0), 0)
    for c in gl.static_range(CHUNKS):
        mbarrier.wait(key_arrived.index(c), 0)
        mbarrier.wait(value_arrived.index(c), 0)
    logits = _issue_scores(queries.index(0).reshape([ROWS, WIDTH]), keys[0].index(0), WIDTH)
    dp = _issue_scores(douts.index(0).reshape([ROWS, WIDTH]), values[0].index(0), WIDTH)
    for block in gl.static_range(BLOCKS):
        zero = _unknown_zero()
        queried = queries.index(block + zero).reshape([ROWS, WIDTH])
        dout = douts.index(block + zero).reshape([ROWS, WIDTH])
        result = outs.index(block + zero).reshape([ROWS, WIDTH])
        base, d = _row_numbers(dout, result, lse, block * ROWS, scale, TOKENS, WIDTH)
        start = 0
        new_dks = ()
        new_dvs = ()
        for c in gl.static_range(CHUNKS):
            zero = _unknown_zero()
            p_tile, ds_tile = p_tiles[c].index(zero), ds_tiles[c].index(zero)
            logits, dp = warpgroup_mma_wait(_UNDER_WAY if block + c > 0 else 0, deps=[logits, dp])
            p, ds = _weights_and_gradients(logits, dp, base, d, start, scale, TOKENS, c == CHUNKS - 1)
            p, ds = p.to(dtype), ds.to(dtype)
            if block > 0 and c == 0:  # dq of the queries before
                dq = warpgroup_mma_wait(0, deps=[dq])
                if partial is not None:
                    if block > 1:
                        dq_sum.store(dq_sum.load(accumulator(WIDTH, GROUPS)) + dq)
                    else:
                        dq_sum.store(dq)
                outs.index(block - 1).reshape([ROWS, WIDTH]).store(dq.to(dtype))
            gl.barrier()  # all warps have waited: these tiles of p and ds are read no more
            p_tile.store(p)
            ds_tile.store(ds)
            fence_async_shared()
            gl.barrier()
            if c == 0:
                if block > 0:
                    tma.async_store(drows, [batch, (block - 1) * ROWS, column], outs.index(block - 1))
                dq = gl.zeros([ROWS, WIDTH], gl.float32, accumulator(WIDTH, GROUPS))
            zero = _unknown_zero()
            if c + 1 < CHUNKS:
                logits = _issue_scores(queried, keys[c + 1].index(zero), WIDTH)
                dp = _issue_scores(dout, values[c + 1].index(zero), WIDTH)
            elif block + 1 < BLOCKS:
                mbarrier.wait(row_arrived.index(block + 1), 0)
                logits = _issue_scores(
                    queries.index(block + 1 + zero).reshape([ROWS, WIDTH]), keys[0].index(zero), WIDTH
                )
                dp = _issue_scores(douts.index(block + 1 + zero).reshape([ROWS, WIDTH]), values[0].index(zero), WIDTH)
            zero = _unknown_zero()
            queried = queries.index(block + zero).reshape([ROWS, WIDTH])
            dout = douts.index(block + zero).reshape([ROWS, WIDTH])
            k, p_tile, ds_tile = keys[c].index(zero), p_tiles[c].index(zero), ds_tiles[c].index(zero)
            new_dvs = new_dvs + (warpgroup_mma(dout.permute((1, 0)), p_tile, dvs[c], is_async=True),)
            new_dks = new_dks + (warpgroup_mma(queried.permute((1, 0)), ds_tile, dks[c], is_async=True),)
            dq = warpgroup_mma(ds_tile, _columns(k, WIDTH), dq, use_acc=c > 0, is_async=True)
            start += k.shape[1]
        dks = new_dks
        dvs = new_dvs

    dq = warpgroup_mma_wait(0, deps=[dq])
    zero = _unknown_zero()
    column += zero  # so that nothing of the stores below is computed before
    key_sum = gl.zeros([WIDTH], gl.float32, OF_ROW)
    value_sum = gl.zeros([WIDTH], gl.float32, OF_ROW)
    gl.barrier()  # all warps have waited: keys and values are read no more
    outs.index(BLOCKS - 1 + zero).reshape([ROWS, WIDTH]).store(dq.to(dtype))
    for c in gl.static_range(CHUNKS):
        dk, dv = warpgroup_mma_wait(0, deps=[dks[c], dvs[c]])
        if partial is not None:
            key_sum += gl.convert_layout(gl.sum(dk, 1), OF_ROW)
            value_sum += gl.convert_layout(gl.sum(dv, 1), OF_ROW)
        _columns(keys[c].index(zero), WIDTH).permute((1, 0)).store(dk.to(dtype))
        _columns(values[c].index(zero), WIDTH).permute((1, 0)).store(dv.to(dtype))
    if partial is not None:
        if BLOCKS > 1:
            dq += dq_sum.load(accumulator(WIDTH, GROUPS))
        # Sums need memory of the compiler's. Behind the last stores it might be what these still read.
        query_sum = gl.sum(dq, 0)
    fence_async_shared()
    gl.barrier()
    tma.async_store(drows, [batch, (BLOCKS - 1) * ROWS, column], outs.index(BLOCKS - 1 + zero))
    start = 0
    for c in gl.static_range(CHUNKS):
        tma.async_store(of_gradients[c], [batch, start, MIXED + column], keys[c].index(zero))
        tma.async_store(of_gradients[c], [batch, start, 2 * MIXED + column], values[c].index(zero))
        start += of_gradients[c].block_shape[1]
    if partial is not None:
        partial += batch.to(gl.int64) * (3 * MIXED) + column
        gl.store(partial + gl.arange(0, WIDTH, OF_COLUMN), query_sum)
        gl.store(partial + MIXED + gl.arange(0, WIDTH, OF_ROW), key_sum)
        gl.store(partial + 2 * MIXED + gl.arange(0, WIDTH, OF_ROW), value_sum)
    invalidate(key_arrived, CHUNKS)
    invalidate(value_arrived, CHUNKS)
    invalidate(row_arrived, BLOCKS)
    tma.store_wait(0)


_triton.expect(backward_kernel, loads=0, stores=0, products=True, boxes=True)


def backward(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, num_heads: int, scale: float, *, sums: bool
) -> tuple[Tensor, Tensor]:
    """Gradient of contiguous qkv `[B, N, 3*H*d]`, packed like it, and its float32 sum over all tokens `[3*H*d]`, empty
    without `sums`."""
    out, grad = out.contiguous(), grad.contiguous()
    batch, tokens, packed = qkv.shape
    width = packed // (3 * num_heads)
    dqkv = torch.empty_like(qkv)
    partial = torch.empty(batch, packed, dtype=torch.float32, device=qkv.device) if sums else None
    rows = ROWS.value
    inputs = boxes(qkv, rows, width), *chunk_boxes(qkv, width), boxes(grad, rows, width), boxes(out, rows, width)
    results = boxes(dqkv, rows, width), *chunk_boxes(dqkv, width)
    constants = {"TOKENS": tokens, "HEADS": num_heads, "WIDTH": width}
    arguments = *inputs, *results, lse, partial, scale
    _triton.launch(backward_kernel, (batch * num_heads,), *arguments, warps=4 * GROUPS.value, **constants)
    return dqkv, lse.new_empty(0) if partial is None else partial.sum(0)
