"""Attention's backward in one Triton kernel with one program for each head of each sample, in 16 bit.

    d = rowsum(dout * out)      p = exp(scale * q k^T - lse)      ds = p * scale * (dout v^T - d)
    dq = ds k                   dk += ds^T q                      dv += p^T dout

for 32 queries at a time. All keys and values stay in shared memory, dk and dv in registers: two float32 tiles of 208 x
64 are 104 registers of 256 threads, hence the limits. Compared with the two kernels of `backward.py`, there
are five products instead of seven, and everything is read once: 10 bytes an element of out, with 6 written. But all
warps of an SM belong to one program, and wait for one another. The gradient of qkv's bias is summed in registers.

d and lse are the forward's. rowsum(p * dout v^T) is d, too, and would spare reading out, but only when p and dout v^T
of all keys are held at once, in 52 more registers, which there are not. So the chunks of keys follow one another.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdeit.kernels import _triton
from fastdeit.kernels.attention import forward as forward_of_all
from fastdeit.kernels.attention.tiles import LOG2E, Operands, chunks, dot, load_tile, logits, store_tile

MOST_TOKENS, WIDEST_HEAD = 208, 64
COMPILER = 3, 5
"""Triton whose code does not spill: that of 3.4 spills 300 bytes."""
_FEW_KEYS = 80
"""Keys whose dk and dv fit the registers of four warps; two programs then share an SM."""


@triton.jit
def _add_chunk(
    keys,
    values,
    queried,
    grad,
    base,
    d,
    column,
    scale,
    key_total,
    value_total,
    query_total,
    TOKENS: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """dk, dv and dq with what a chunk of keys and a block of queries add to them."""
    p = tl.exp2(logits(queried, keys, column, TOKENS, scale * LOG2E, RAGGED) - base[:, None])
    value_total = dot(tl.trans(p.to(grad.dtype)), grad, value_total)
    ds = (p * (dot(grad, tl.trans(values)) * scale - d[:, None])).to(grad.dtype)
    key_total = dot(tl.trans(ds), queried, key_total)
    # Last, and with fewer rows than columns: Triton lays out the warps of all these products as those of the last one
    # want it, which then is along the keys. Otherwise it spills kilobytes.
    query_total = dot(ds, keys, query_total)
    return key_total, value_total, query_total


@triton.jit
def _fused_kernel(
    qkv,
    out,
    dout,
    lse,
    dqkv,
    partial,
    scale,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    THIRD: tl.constexpr,
):
    """Chunks of keys are FIRST, SECOND and THIRD long (0: none); partial[b] = sum of dqkv[b] over the tokens.

    TOKENS is a constant because sizes and strides known to the compiler save the registers that would spill.
    """
    MIXED: tl.constexpr = HEADS * WIDTH
    PACKED: tl.constexpr = 3 * MIXED
    batch, head = (tl.program_id(0) // HEADS).to(tl.int64), tl.program_id(0) % HEADS
    q = qkv + batch * (TOKENS * PACKED) + head * WIDTH
    dq = dqkv + batch * (TOKENS * PACKED) + head * WIDTH
    out += batch * (TOKENS * MIXED) + head * WIDTH
    dout += batch * (TOKENS * MIXED) + head * WIDTH
    lse += (batch * HEADS + head) * TOKENS
    k, v, dk, dv = q + MIXED, q + 2 * MIXED, dq + MIXED, dq + 2 * MIXED

    c0 = tl.arange(0, FIRST)
    k0, v0 = load_tile(k, c0, TOKENS, PACKED, WIDTH, BLOCK), load_tile(v, c0, TOKENS, PACKED, WIDTH, BLOCK)
    dk0, dv0 = tl.zeros((FIRST, BLOCK), tl.float32), tl.zeros((FIRST, BLOCK), tl.float32)
    if SECOND > 0:
        c1 = FIRST + tl.arange(0, SECOND)
        k1, v1 = load_tile(k, c1, TOKENS, PACKED, WIDTH, BLOCK), load_tile(v, c1, TOKENS, PACKED, WIDTH, BLOCK)
        dk1, dv1 = tl.zeros((SECOND, BLOCK), tl.float32), tl.zeros((SECOND, BLOCK), tl.float32)
    if THIRD > 0:
        c2 = FIRST + SECOND + tl.arange(0, THIRD)
        k2, v2 = load_tile(k, c2, TOKENS, PACKED, WIDTH, BLOCK), load_tile(v, c2, TOKENS, PACKED, WIDTH, BLOCK)
        dk2, dv2 = tl.zeros((THIRD, BLOCK), tl.float32), tl.zeros((THIRD, BLOCK), tl.float32)

    query_sum = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, TOKENS, ROWS):
        row = start + tl.arange(0, ROWS)
        queried = load_tile(q, row, TOKENS, PACKED, WIDTH, BLOCK)
        grad = load_tile(dout, row, TOKENS, MIXED, WIDTH, BLOCK)
        mixed = load_tile(out, row, TOKENS, MIXED, WIDTH, BLOCK)
        d = tl.sum(grad.to(tl.float32) * mixed.to(tl.float32), 1) * scale
        base = tl.load(lse + row, mask=row < TOKENS, other=float("inf")) * LOG2E
        total = tl.zeros((ROWS, BLOCK), tl.float32)
        dk0, dv0, total = _add_chunk(k0, v0, queried, grad, base, d, c0, scale, dk0, dv0, total, TOKENS, SECOND == 0)
        if SECOND > 0:
            dk1, dv1, total = _add_chunk(k1, v1, queried, grad, base, d, c1, scale, dk1, dv1, total, TOKENS, THIRD == 0)
        if THIRD > 0:
            dk2, dv2, total = _add_chunk(k2, v2, queried, grad, base, d, c2, scale, dk2, dv2, total, TOKENS, True)
        if partial is not None:
            query_sum += tl.sum(total, 0)
        store_tile(dq, total, row, TOKENS, PACKED, WIDTH, BLOCK)

    store_tile(dk, dk0, c0, TOKENS, PACKED, WIDTH, BLOCK)
    store_tile(dv, dv0, c0, TOKENS, PACKED, WIDTH, BLOCK)
    if SECOND > 0:
        store_tile(dk, dk1, c1, TOKENS, PACKED, WIDTH, BLOCK)
        store_tile(dv, dv1, c1, TOKENS, PACKED, WIDTH, BLOCK)
    if THIRD > 0:
        store_tile(dk, dk2, c2, TOKENS, PACKED, WIDTH, BLOCK)
        store_tile(dv, dv2, c2, TOKENS, PACKED, WIDTH, BLOCK)
    if partial is not None:
        key_sum, value_sum = tl.sum(dk0, 0), tl.sum(dv0, 0)
        if SECOND > 0:
            key_sum += tl.sum(dk1, 0)
            value_sum += tl.sum(dv1, 0)
        if THIRD > 0:
            key_sum += tl.sum(dk2, 0)
            value_sum += tl.sum(dv2, 0)
        feature = tl.arange(0, BLOCK)
        partial += batch * PACKED + head * WIDTH + feature
        tl.store(partial, query_sum, mask=feature < WIDTH)
        tl.store(partial + MIXED, key_sum, mask=feature < WIDTH)
        tl.store(partial + 2 * MIXED, value_sum, mask=feature < WIDTH)


_triton.expect(_fused_kernel, products=True)


def forward(
    qkv: Tensor, num_heads: int, scale: float, bias: Tensor | None, key_mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(out, lse) as of the op's reference, in one launch. `Unsupported` for what the backward does not take: refusing
    there would be too late."""
    _triton.require(key_mask is None, "it does not take a mask of keys yet")
    _check(qkv, num_heads)
    return forward_of_all.forward(Operands.of_packed(qkv.contiguous(), num_heads, scale))


def _check(qkv: Tensor, num_heads: int) -> None:
    tokens, width = qkv.shape[1], qkv.shape[2] // (3 * num_heads)
    _triton.require(qkv.dtype in (torch.float16, torch.bfloat16), f"it computes in 16 bit, not in {qkv.dtype}")
    _triton.require(tokens <= MOST_TOKENS, f"{tokens} tokens, at most {MOST_TOKENS} fit one program")
    _triton.require(width <= WIDEST_HEAD, f"heads are {width} wide, at most {WIDEST_HEAD} fit one program")
    _triton.require(qkv.numel() > 0, f"qkv {list(qkv.shape)} is empty")


def backward(
    grad: Tensor,
    qkv: Tensor,
    out: Tensor,
    lse: Tensor,
    num_heads: int,
    scale: float,
    with_bias: bool,
    key_mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(dqkv, dbias) as of the op's backward, in one launch, and a small sum for the bias."""
    _check(qkv, num_heads)
    qkv, out, grad = qkv.contiguous(), out.contiguous(), grad.contiguous()
    batch, tokens, packed = qkv.shape
    width = packed // (3 * num_heads)
    dqkv = torch.empty_like(qkv)
    partial = torch.empty(batch, packed, dtype=torch.float32, device=qkv.device) if with_bias else None
    block = max(32, _triton.power_of_two(width))
    first, second, third = chunks(tokens)
    constants = {"TOKENS": tokens, "HEADS": num_heads, "WIDTH": width, "BLOCK": block, "ROWS": block // 2}
    constants |= {"FIRST": first, "SECOND": second, "THIRD": third}
    # A program has the SM for itself, so loads have to be ahead of the products, where that does not spill.
    ahead = _triton.arch(qkv.device) // 10 != 9 and _triton.VERSION >= (3, 7)
    warps = 4 if first + second + third <= _FEW_KEYS else 8
    tensors = qkv, out, grad, lse, dqkv, partial
    grid = (batch * num_heads,)
    _triton.launch(_fused_kernel, grid, *tensors, scale, warps=warps, stages=1 + ahead, **constants)
    return dqkv, lse.new_empty(0) if partial is None else partial.sum(0)
