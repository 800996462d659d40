"""Multi-head attention on packed queries, keys and values.

    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]      each [B, N, H, d] of qkv viewed as [B, N, 3, H, d]
    P = softmax(scale * q k^T)                              [B, H, N, N], never written to memory
    out = P v                                               [B, N, H*d]

Backward, with dP = dout v^T, D = rowsum(dout * out) and P = exp(scale * q k^T - lse), lse saved by the forward:

    dv = P^T dout      dS = scale * P * (dP - D)      dq = dS k      dk = dS^T q      dbias = sum_BN(dqkv)

`query_attention` is the same with queries of their own, `q [B, M, H*d]` and `kv [B, N, 2*H*d]`: M = 1 or 2 is what the
heads of a ViT read of its last block.

Logits are float32 and scaled there: q k^T in fp16 overflows beyond 65,504, the source of DeiT's NaN under AMP.

Bytes moved at best per element of out in 16 bit: forward reads 6 and writes 2; backward reads 8 and writes 6, since the
gradient is written packed, as the qkv projection's backward wants it. The Triton kernels read keys and values again
for each 64 queries, mostly from cache. Forward: up to 257 keys are a few static chunks of powers of two, hence one
pass without rescaling and little padding (198 keys are 128 + 64 + 16); more keys are a loop of online softmax (Milakov
& Gimelshein, 2018). Backward: one kernel for dq, one for dk and dv; each result is added up by one program, so there
are no atomics, and every run has the same bits.
"""

from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastdeit.kernels import _op, _triton

# ---- reference -------------------------------------------------------------------------------------------------------


def _heads(x: Tensor, parts: int, num_heads: int) -> list[Tensor]:
    """`[B, N, parts*H*d]` as `parts` tensors `[B, H, N, d]`."""
    # Split before transposing: the gradients of the parts are then packed by one copy instead of two.
    return [part.transpose(1, 2) for part in x.reshape(*x.shape[:2], parts, num_heads, -1).unbind(2)]


def _packed(*parts: Tensor) -> Tensor:
    """The inverse of `_heads`."""
    packed = torch.stack([part.transpose(1, 2) for part in parts], 2)
    return packed.reshape(*packed.shape[:2], -1)


def native(qkv: Tensor, num_heads: int, scale: float, bias: Tensor | None) -> Tensor:
    """out `[B, N, H*d]` of qkv `[B, N, 3*H*d]`, in qkv's dtype, or the autocast dtype under autocast."""
    qkv = _op.with_bias_gradient(qkv, bias)
    return _packed(F.scaled_dot_product_attention(*_heads(qkv, 3, num_heads), scale=scale))


def _query_native(q: Tensor, kv: Tensor, num_heads: int, scale: float) -> Tensor:
    return _packed(F.scaled_dot_product_attention(*_heads(q, 1, num_heads), *_heads(kv, 2, num_heads), scale=scale))


def _forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    compute = _op.statistics_dtype(q.dtype)
    lse = torch.logsumexp(scale * q.to(compute) @ k.to(compute).mT, -1)
    return _packed(F.scaled_dot_product_attention(q, k, v, scale=scale)), lse


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, `[B, H, N, d]`, in the dtype of lse."""
    num_heads = q.shape[1]
    (grad,), (out,) = _heads(grad.to(lse.dtype), 1, num_heads), _heads(out.to(lse.dtype), 1, num_heads)
    q, k, v = (part.to(lse.dtype) for part in (q, k, v))
    p = torch.exp(scale * q @ k.mT - lse[..., None])
    ds = scale * p * (grad @ v.mT - (grad * out).sum(-1, keepdim=True))
    return ds @ k, ds.mT @ q, p.mT @ grad


def reference(qkv: Tensor, num_heads: int, scale: float, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """(out, lse float32 `[B, H, N]`) as in the module's formula; lse is for backward."""
    return _forward(*_heads(qkv, 3, num_heads), scale)


def reference_backward(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, num_heads: int, scale: float, with_bias: bool
) -> tuple[Tensor, Tensor]:
    """Gradient of qkv, packed as qkv, and its sum over all tokens, in the dtype of lse (empty unless `with_bias`)."""
    dqkv = _packed(*_backward(grad, *_heads(qkv, 3, num_heads), out, lse, scale))
    return dqkv.to(qkv.dtype), dqkv.sum((0, 1)) if with_bias else dqkv.new_empty(0)


def query_reference(q: Tensor, kv: Tensor, num_heads: int, scale: float) -> tuple[Tensor, Tensor]:
    """(out `[B, M, H*d]`, lse float32 `[B, H, M]`)."""
    return _forward(*_heads(q, 1, num_heads), *_heads(kv, 2, num_heads), scale)


def query_reference_backward(
    grad: Tensor, q: Tensor, kv: Tensor, out: Tensor, lse: Tensor, num_heads: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Gradients of q and kv."""
    dq, dk, dv = _backward(grad, *_heads(q, 1, num_heads), *_heads(kv, 2, num_heads), out, lse, scale)
    return _packed(dq).to(q.dtype), _packed(dk, dv).to(kv.dtype)


# ---- Triton ----------------------------------------------------------------------------------------------------------

_ROWS = 64
"""Queries of a program, and keys of a step of a loop: the smallest tile of the tensor cores of sm_90."""
_ONE_PASS, _ONE_PASS_BEFORE_HOPPER = 257, 208
"""Most keys whose logits, 64 rows in float32, fit the registers of four warps. Before sm_90, operands of the tensor
cores are in registers, too."""
_WIDEST_HEAD = 128
_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile(pointer, row, rows, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows `[len(row), BLOCK]` of one head; zero beyond the last row and beyond WIDTH."""
    column = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < WIDTH)[None, :]
    return tl.load(pointer + row[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def _store_tile(pointer, value, row, rows, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < WIDTH)[None, :]
    tl.store(pointer + row[:, None] * stride + column[None, :], value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _dot(a, b, total=None):
    """a b + total; the products of float32 tiles are those of float32, not of tf32."""
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def _logits(q, keys, column, tokens, scale, RAGGED: tl.constexpr):
    """Logits in powers of two; minus infinity where there is no key, which only RAGGED chunks can have."""
    s = _dot(q, tl.trans(keys)) * scale
    if RAGGED:
        s = tl.where((column < tokens)[None, :], s, float("-inf"))
    return s


@triton.jit
def _of_head(q, k, v, q_batch, k_batch, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """The pointers moved to this program's head, its sample and its head."""
    batch, head = (tl.program_id(1) // HEADS).to(tl.int64), tl.program_id(1) % HEADS
    queries, keys = batch * q_batch + head * WIDTH, batch * k_batch + head * WIDTH
    return q + queries, k + keys, v + keys, batch, head


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
):
    """64 queries of one head against all keys, which are chunks of FIRST, SECOND and THIRD (0: none)."""
    q, k, v, batch, head = _of_head(q, k, v, q_batch, k_batch, HEADS, WIDTH)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    queried = _tile(q, row, queries, q_row, WIDTH, BLOCK)
    first = tl.arange(0, FIRST)
    s0 = _logits(queried, _tile(k, first, tokens, k_row, WIDTH, BLOCK), first, tokens, scale * _LOG2E, SECOND == 0)
    top = tl.max(s0, 1)
    if SECOND > 0:
        second = FIRST + tl.arange(0, SECOND)
        s1 = _logits(queried, _tile(k, second, tokens, k_row, WIDTH, BLOCK), second, tokens, scale * _LOG2E, THIRD == 0)
        top = tl.maximum(top, tl.max(s1, 1))
    if THIRD > 0:
        third = FIRST + SECOND + tl.arange(0, THIRD)
        s2 = _logits(queried, _tile(k, third, tokens, k_row, WIDTH, BLOCK), third, tokens, scale * _LOG2E, True)
        top = tl.maximum(top, tl.max(s2, 1))
    p0 = tl.exp2(s0 - top[:, None])
    total = tl.sum(p0, 1)
    mixed = _dot(p0.to(v.dtype.element_ty), _tile(v, first, tokens, k_row, WIDTH, BLOCK))
    if SECOND > 0:
        p1 = tl.exp2(s1 - top[:, None])
        total += tl.sum(p1, 1)
        mixed = _dot(p1.to(v.dtype.element_ty), _tile(v, second, tokens, k_row, WIDTH, BLOCK), mixed)
    if THIRD > 0:
        p2 = tl.exp2(s2 - top[:, None])
        total += tl.sum(p2, 1)
        mixed = _dot(p2.to(v.dtype.element_ty), _tile(v, third, tokens, k_row, WIDTH, BLOCK), mixed)
    out += batch * queries * (HEADS * WIDTH) + head * WIDTH
    _store_tile(out, mixed / total[:, None], row, queries, HEADS * WIDTH, WIDTH, BLOCK)
    tl.store(lse + (batch * HEADS + head) * queries + row, (top + tl.log2(total)) / _LOG2E, mask=row < queries)


@triton.jit
def _online_kernel(
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
    KEYS: tl.constexpr,
):
    """64 queries of one head against any number of keys, KEYS at a time."""
    q, k, v, batch, head = _of_head(q, k, v, q_batch, k_batch, HEADS, WIDTH)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    queried = _tile(q, row, queries, q_row, WIDTH, BLOCK)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    mixed = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, tokens, KEYS):
        column = start + tl.arange(0, KEYS)
        s = _logits(queried, _tile(k, column, tokens, k_row, WIDTH, BLOCK), column, tokens, scale * _LOG2E, True)
        new_top = tl.maximum(top, tl.max(s, 1))
        shrink = tl.exp2(top - new_top)
        p = tl.exp2(s - new_top[:, None])
        total = total * shrink + tl.sum(p, 1)
        values = _tile(v, column, tokens, k_row, WIDTH, BLOCK)
        mixed = _dot(p.to(v.dtype.element_ty), values, mixed * shrink[:, None])
        top = new_top
    out += batch * queries * (HEADS * WIDTH) + head * WIDTH
    _store_tile(out, mixed / total[:, None], row, queries, HEADS * WIDTH, WIDTH, BLOCK)
    tl.store(lse + (batch * HEADS + head) * queries + row, (top + tl.log2(total)) / _LOG2E, mask=row < queries)


@triton.jit
def _query_gradient_kernel(
    q,
    k,
    v,
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
    q, k, v, batch, head = _of_head(q, k, v, q_batch, k_batch, HEADS, WIDTH)
    mixed = batch * queries * (HEADS * WIDTH) + head * WIDTH
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    queried = _tile(q, row, queries, q_row, WIDTH, BLOCK)
    grad = _tile(dout + mixed, row, queries, HEADS * WIDTH, WIDTH, BLOCK)
    product = grad.to(tl.float32) * _tile(out + mixed, row, queries, HEADS * WIDTH, WIDTH, BLOCK).to(tl.float32)
    d = tl.sum(product, 1)
    at = (batch * HEADS + head) * queries + row
    tl.store(delta + at, d, mask=row < queries)
    base = tl.load(lse + at, mask=row < queries, other=float("inf")) * _LOG2E
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, tokens, KEYS):
        column = start + tl.arange(0, KEYS)
        keys = _tile(k, column, tokens, k_row, WIDTH, BLOCK)
        # Masked: the exponential of a missing key could be infinite, and times zero that is NaN.
        p = tl.exp2(_logits(queried, keys, column, tokens, scale * _LOG2E, True) - base[:, None])
        dp = _dot(grad, tl.trans(_tile(v, column, tokens, k_row, WIDTH, BLOCK)))
        ds = p * (dp - d[:, None]) * scale
        total = _dot(ds.to(keys.dtype), keys, total)
    dq += batch * q_batch + head * WIDTH
    _store_tile(dq, total, row, queries, q_row, WIDTH, BLOCK)
    if partial is not None:
        place = (batch * tl.num_programs(0) + tl.program_id(0)) * (HEADS * WIDTH) + head * WIDTH
        column = tl.arange(0, BLOCK)
        tl.store(partial + place + column, tl.sum(total, 0), mask=column < WIDTH)


@triton.jit
def _key_gradient_kernel(
    q,
    k,
    v,
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
    q, k, v, batch, head = _of_head(q, k, v, q_batch, k_batch, HEADS, WIDTH)
    dout += batch * queries * (HEADS * WIDTH) + head * WIDTH
    column = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    keys, values = _tile(k, column, tokens, k_row, WIDTH, BLOCK), _tile(v, column, tokens, k_row, WIDTH, BLOCK)
    key_total = tl.zeros((KEYS, BLOCK), tl.float32)
    value_total = tl.zeros((KEYS, BLOCK), tl.float32)
    for start in range(0, queries, ROWS):
        row = start + tl.arange(0, ROWS)
        queried = _tile(q, row, queries, q_row, WIDTH, BLOCK)
        grad = _tile(dout, row, queries, HEADS * WIDTH, WIDTH, BLOCK)
        at = (batch * HEADS + head) * queries + row
        base = tl.load(lse + at, mask=row < queries, other=float("inf")) * _LOG2E
        d = tl.load(delta + at, mask=row < queries, other=0.0)
        s = tl.where((column < tokens)[:, None], _dot(keys, tl.trans(queried)) * (scale * _LOG2E), float("-inf"))
        p = tl.exp2(s - base[None, :])
        value_total = _dot(p.to(grad.dtype), grad, value_total)
        ds = p * (_dot(values, tl.trans(grad)) - d[None, :]) * scale
        key_total = _dot(ds.to(queried.dtype), queried, key_total)
    dk += batch * k_batch + head * WIDTH
    dv += batch * k_batch + head * WIDTH
    _store_tile(dk, key_total, column, tokens, k_row, WIDTH, BLOCK)
    _store_tile(dv, value_total, column, tokens, k_row, WIDTH, BLOCK)
    if partial is not None:
        place = (batch * tl.num_programs(0) + tl.program_id(0)) * (2 * HEADS * WIDTH) + head * WIDTH
        feature = tl.arange(0, BLOCK)
        tl.store(partial + place + feature, tl.sum(key_total, 0), mask=feature < WIDTH)
        tl.store(partial + place + HEADS * WIDTH + feature, tl.sum(value_total, 0), mask=feature < WIDTH)


@cache
def chunks(tokens: int) -> tuple[int, int, int]:
    """The fewest of up to three powers of two, from 16, that cover `tokens` with the least padding; 0 is none."""
    sizes = [0, 16, 32, 64, 128, 256]
    covers = [
        (a, b, c)
        for a in sizes[1:]
        for b in sizes
        for c in sizes
        if a >= b >= c and a + b + c >= tokens and (b or not c)
    ]
    return min(covers, key=lambda cover: (sum(cover), sum(size > 0 for size in cover)))


@dataclass(frozen=True)
class _Operands:
    """q, k and v as the kernels address them: pointers into packed tensors, and strides."""

    q: Tensor
    k: Tensor
    v: Tensor
    num_heads: int
    scale: float

    @staticmethod
    def of(q: Tensor, kv: Tensor, num_heads: int, scale: float) -> "_Operands":
        """q `[B, M, H*d]` and kv `[B, N, 2*H*d]`, which may be slices of one qkv."""
        width = kv.shape[2] // 2
        return _Operands(q, kv[..., :width], kv[..., width:], num_heads, scale)

    @property
    def width(self) -> int:
        return self.q.shape[2] // self.num_heads

    @property
    def sizes(self) -> tuple[int | float, ...]:
        strides = *self.q.stride()[:2], *self.k.stride()[:2]
        return self.q.shape[1], self.k.shape[1], self.scale, *strides

    @property
    def tile(self) -> dict[str, int]:
        """Constants of a launch. float32 has no tensor cores here and twice the bytes: smaller tiles."""
        rows = _ROWS if self.q.element_size() == 2 else _ROWS // 2
        block = max(16, triton.next_power_of_2(self.width))
        return {"HEADS": self.num_heads, "WIDTH": self.width, "BLOCK": block, "ROWS": rows}

    def grid(self, rows: int, step: int) -> tuple[int, int]:
        return triton.cdiv(rows, step), len(self.q) * self.num_heads

    def check(self) -> None:
        _triton.require_dtypes(self.q, self.k)
        _triton.require(self.q.dtype == self.k.dtype, f"q is {self.q.dtype}, but kv is {self.k.dtype}")
        _triton.require(self.width <= _WIDEST_HEAD, f"heads are {self.width} wide, at most {_WIDEST_HEAD} fit")
        empty = 0 in self.q.shape or 0 in self.k.shape
        _triton.require(not empty, f"q {list(self.q.shape)} or keys {list(self.k.shape)} are empty")


def _triton_forward(operands: _Operands) -> tuple[Tensor, Tensor]:
    operands.check()
    q, tile = operands.q, operands.tile
    batch, queries, width = q.shape
    tokens = operands.k.shape[1]
    out = torch.empty(batch, queries, width, dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, operands.num_heads, queries, dtype=torch.float32, device=q.device)
    tensors = q, operands.k, operands.v, out, lse
    grid = operands.grid(queries, tile["ROWS"])
    warps = 4 if tile["BLOCK"] <= 64 else 8
    one_pass = _ONE_PASS if _triton.arch(q.device) >= 90 else _ONE_PASS_BEFORE_HOPPER
    if tokens <= one_pass and q.element_size() == 2:
        first, second, third = chunks(tokens)
        constants = tile | {"FIRST": first, "SECOND": second, "THIRD": third}
        _triton.launch(_one_pass_kernel, grid, *tensors, *operands.sizes, warps=warps, **constants)
    else:
        constants = tile | {"KEYS": tile["ROWS"]}
        _triton.launch(_online_kernel, grid, *tensors, *operands.sizes, warps=warps, stages=2, **constants)
    return out, lse


def _triton_backward(
    grad: Tensor, operands: _Operands, out: Tensor, lse: Tensor, gradients: _Operands, *, sums: bool
) -> tuple[Tensor, Tensor] | None:
    """Fill the gradients; with `sums`, return float32 column sums of dq `[H*d]` and of dk and dv `[2*H*d]`."""
    operands.check()
    q, tile = operands.q, operands.tile
    batch, queries, width = q.shape
    tokens, step = operands.k.shape[1], tile["ROWS"]
    grad = grad.contiguous()
    delta = torch.empty_like(lse)
    query_grid, key_grid = operands.grid(queries, step), operands.grid(tokens, step)
    query_sums = key_sums = None
    if sums:
        query_sums = torch.empty(batch * query_grid[0], width, dtype=torch.float32, device=q.device)
        key_sums = torch.empty(batch * key_grid[0], 2 * width, dtype=torch.float32, device=q.device)
    inputs = q, operands.k, operands.v
    constants = tile | {"KEYS": step, "warps": 4 if tile["BLOCK"] <= 64 and q.element_size() == 2 else 8}
    tensors = *inputs, out, grad, lse, delta, gradients.q, query_sums
    _triton.launch(_query_gradient_kernel, query_grid, *tensors, *operands.sizes, **constants)
    tensors = *inputs, grad, lse, delta, gradients.k, gradients.v, key_sums
    _triton.launch(_key_gradient_kernel, key_grid, *tensors, *operands.sizes, **constants)
    return (query_sums.sum(0), key_sums.sum(0)) if sums else None


def _split(qkv: Tensor, num_heads: int, scale: float) -> _Operands:
    width = qkv.shape[2] // 3
    return _Operands.of(qkv[..., :width], qkv[..., width:], num_heads, scale)


def triton_forward(qkv: Tensor, num_heads: int, scale: float, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """`reference` in one launch."""
    return _triton_forward(_split(qkv.contiguous(), num_heads, scale))


def triton_backward(
    grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, num_heads: int, scale: float, with_bias: bool
) -> tuple[Tensor, Tensor]:
    """`reference_backward` in two launches, and a small sum for the bias."""
    qkv = qkv.contiguous()
    dqkv = torch.empty_like(qkv)
    operands, gradients = (_split(packed, num_heads, scale) for packed in (qkv, dqkv))
    sums = _triton_backward(grad, operands, out, lse, gradients, sums=with_bias)
    return dqkv, torch.cat(sums) if sums else lse.new_empty(0)


def query_triton_forward(q: Tensor, kv: Tensor, num_heads: int, scale: float) -> tuple[Tensor, Tensor]:
    """`query_reference` in one launch."""
    return _triton_forward(_Operands.of(q.contiguous(), kv.contiguous(), num_heads, scale))


def query_triton_backward(
    grad: Tensor, q: Tensor, kv: Tensor, out: Tensor, lse: Tensor, num_heads: int, scale: float
) -> tuple[Tensor, Tensor]:
    """`query_reference_backward` in two launches."""
    q, kv = q.contiguous(), kv.contiguous()
    dq, dkv = torch.empty_like(q), torch.empty_like(kv)
    operands, gradients = (_Operands.of(a, b, num_heads, scale) for a, b in ((q, kv), (dq, dkv)))
    _triton_backward(grad, operands, out, lse, gradients, sums=False)
    return dq, dkv


# ---- registration ----------------------------------------------------------------------------------------------------

_capability = partial(_triton.capability, needs=80)
OP = _op.Op(
    "attention",
    reference,
    reference_backward,
    others=[_op.Backend("triton", _capability, triton_forward, triton_backward)],
    native=native,
    cast={"qkv"},
)
QUERY = _op.Op(
    "query_attention",
    query_reference,
    query_reference_backward,
    others=[_op.Backend("triton", _capability, query_triton_forward, query_triton_backward)],
    native=_query_native,
    cast={"q", "kv"},
)


def _fake_lse(q: Tensor, num_heads: int) -> Tensor:
    return q.new_empty(q.shape[0], num_heads, q.shape[1], dtype=_op.statistics_dtype(q.dtype))


@OP.registered.register_fake
def _(qkv, num_heads, scale, bias):
    batch, tokens, width = qkv.shape
    return qkv.new_empty(batch, tokens, width // 3), _fake_lse(qkv, num_heads)


@OP.registered_backward.register_fake
def _(grad, qkv, out, lse, num_heads, scale, with_bias):
    return qkv.new_empty(qkv.shape), lse.new_empty(qkv.shape[2] if with_bias else 0)


@QUERY.registered.register_fake
def _(q, kv, num_heads, scale):
    return q.new_empty(q.shape), _fake_lse(q, num_heads)


@QUERY.registered_backward.register_fake
def _(grad, q, kv, out, lse, num_heads, scale):
    return q.new_empty(q.shape), kv.new_empty(kv.shape)


def _save(ctx, inputs, output):
    qkv, ctx.num_heads, ctx.scale, bias = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(qkv, *output)


def _differentiate(ctx, grad, *_):
    wanted = ctx.bias_dtype is not None
    dqkv, dbias = OP.run_backward(ctx, grad, *ctx.saved_tensors, ctx.num_heads, ctx.scale, wanted)
    return dqkv, None, None, dbias.to(ctx.bias_dtype) if wanted else None


def _save_query(ctx, inputs, output):
    q, kv, ctx.num_heads, ctx.scale = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, kv, *output)


def _differentiate_query(ctx, grad, *_):
    return *QUERY.run_backward(ctx, grad, *ctx.saved_tensors, ctx.num_heads, ctx.scale), None, None


OP.differentiable(_save, _differentiate)
QUERY.differentiable(_save_query, _differentiate_query)


# ---- public ----------------------------------------------------------------------------------------------------------


def attention(qkv: Tensor, num_heads: int, scale: float | None = None, *, bias: Tensor | None = None) -> Tensor:
    """Softmax attention of packed queries, keys and values.

    qkv        floating `[B, N, 3*H*d]`, packed as timm's `reshape(B, N, 3, H, d)`
    num_heads  H
    scale      factor on the logits; default d**-0.5
    bias       `[3*H*d]`, the bias that qkv already contains. It changes nothing but its own gradient, which is a
               by-product of qkv's here: make qkv with the detached bias

    Returns `[B, N, H*d]` in qkv's dtype (the autocast dtype under autocast). Logits and softmax are at least float32.
    """
    _check("qkv", qkv, 3, num_heads)
    if bias is not None:
        _op.check_shape("bias", bias, qkv.shape[2:], "[3*H*d], like the last dimension of qkv,")
        _op.check_device("bias", bias, qkv, "qkv")
    if scale is None:
        scale = (qkv.shape[2] // (3 * num_heads)) ** -0.5
    return _first(OP(qkv, num_heads, scale, bias))


def query_attention(q: Tensor, kv: Tensor, num_heads: int, scale: float | None = None) -> Tensor:
    """Softmax attention of some queries to packed keys and values.

    q          floating `[B, M, H*d]`
    kv         `[B, N, 2*H*d]` of the same dtype, packed as `reshape(B, N, 2, H, d)`
    num_heads  H
    scale      factor on the logits; default d**-0.5

    Returns `[B, M, H*d]`; the rest as of `attention`.
    """
    _check("q", q, 1, num_heads)
    _check("kv", kv, 2, num_heads)
    _op.check_shape("kv", kv, (q.shape[0], kv.shape[1], 2 * q.shape[2]), "[B, N, 2*H*d] for q [B, M, H*d]")
    _op.check_device("kv", kv, q, "q")
    if scale is None:
        scale = (q.shape[2] // num_heads) ** -0.5
    return _first(QUERY(q, kv, num_heads, scale))


def _first(result: Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """The output: native autograd makes no statistics."""
    return result if isinstance(result, Tensor) else result[0]


def _check(name: str, x: Tensor, parts: int, num_heads: int) -> None:
    _op.check_floating(name, x)
    packed = f"{parts}*H*d" if parts > 1 else "H*d"
    if x.dim() != 3:
        raise ValueError(f"{name} has shape {list(x.shape)}, but must be [B, N, {packed}]")
    if num_heads < 1 or x.shape[2] % (parts * num_heads):
        raise ValueError(
            f"num_heads is {num_heads}, but must be positive, and {parts} * num_heads must divide {name}'s last "
            f"dimension {x.shape[2]}"
        )
