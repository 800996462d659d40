"""Normalised and turned queries and keys, in front of attention: packed in, packed out.

    q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]      each [B, N, H, d] of qkv viewed as [B, N, 3, H, d]
    n(x, w) = x / sqrt(mean(x^2) + eps) * w                 over the d channels of a head
    r(x)    = pairs of neighbouring channels (2t, 2t + 1) of token n, turned by the angle of cos[n, t] and sin[n, t]
    out     = [r(n(q, q_weight)), r(n(k, k_weight)), v]

The norm is RMSNorm of queries and keys (after Dehghani et al., "Scaling vision transformers to 22 billion parameters",
2023), r the rotary embedding (Su et al., "RoFormer", 2021; for two axes see `positions.Rope2d`). Either may be missing.

Backward, with the gradient turned back, dn = r^-1(dout), and hat = x / sqrt(mean(x^2) + eps):

    g = dn * w      dx = (g - hat * mean(g * hat)) / sqrt(mean(x^2) + eps)      dw = sum_BNH(dn * hat)

Bytes moved at best per element of q in 16 bit: forward reads 6 and writes 6; backward reads 12 and writes 6, without
norms 6 and 6. Values are copied, because attention reads them packed. PyTorch's operations unpack, compute in float32
one operation at a time, and pack again. Root mean squares are made anew in backward, where their rows are read anyway.
Arithmetic is float32, and rounded once.
"""

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdeit.kernels import _checks, _op, _rows, _triton
from fastdeit.kernels._example import BASE, BASE_FP16, DEITS, Example, Maker

# ---- reference -------------------------------------------------------------------------------------------------------


def _parts(qkv: Tensor, num_heads: int) -> list[Tensor]:
    """`[B, N, 3*H*d]` as three tensors `[B, N, H, d]`, in at least float32."""
    return list(qkv.unflatten(-1, (3, num_heads, -1)).to(_op.statistics_dtype(qkv.dtype)).unbind(2))


def _packed(*parts: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `_parts`."""
    return torch.stack(parts, 2).flatten(2).to(dtype)


def _turned(x: Tensor, cos: Tensor | None, sin: Tensor | None, sign: int = 1) -> Tensor:
    """Pairs of channels of x `[B, N, H, d]`, turned forwards or, with a sign of -1, back."""
    if cos is None:
        return x
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sign * sin[:, None]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)


def _inverse_root(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def reference(
    qkv: Tensor,
    num_heads: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
) -> Tensor:
    """out `[B, N, 3*H*d]` as in the module's formula, in the dtype of qkv."""
    *turned, v = _parts(qkv, num_heads)
    for place, weight in enumerate((q_weight, k_weight)):
        x = turned[place]
        if weight is not None:
            x = x * _inverse_root(x, eps) * weight
        turned[place] = _turned(x, cos, sin)
    return _packed(*turned, v, dtype=qkv.dtype)


def native(qkv: Tensor, *others: Any) -> Tensor:
    """`reference`, which takes the autocast dtype itself: none of its operations does."""
    return reference(qkv.to(_op.autocast_dtype(qkv) or qkv.dtype), *others)


def reference_backward(
    grad: Tensor,
    qkv: Tensor,
    num_heads: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of qkv and of both weights, which are empty where there are none. Without weights, only the shape and
    the dtype of qkv are read."""
    *grads, dv = _parts(grad, num_heads)
    parts = _parts(qkv, num_heads)
    dweights = [grad.new_empty(0), grad.new_empty(0)]
    for place, weight in enumerate((q_weight, k_weight)):
        dn = _turned(grads[place], cos, sin, -1)
        if weight is not None:
            root = _inverse_root(parts[place], eps)
            hat, g = parts[place] * root, dn * weight
            dweights[place] = (dn * hat).sum((0, 1, 2)).to(weight.dtype)
            dn = (g - hat * (g * hat).mean(-1, keepdim=True)) * root
        grads[place] = dn
    return _packed(*grads, dv, dtype=qkv.dtype), *dweights


# ---- Triton ----------------------------------------------------------------------------------------------------------

_PROGRAMS = 4
"""Programs, and therefore partial sums, of a backward pass with norms, on every SM."""


@triton.jit
def _angles(cos, sin, token, tokens, inside, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """cos and sin `[rows, BLOCK / 2]` of the places of these tokens."""
    column = tl.arange(0, BLOCK // 2)
    at = (token % tokens)[:, None] * (WIDTH // 2) + column[None, :]
    mask = inside[:, None] & (column < WIDTH // 2)[None, :]
    return tl.load(cos + at, mask=mask, other=0.0).to(tl.float32), tl.load(sin + at, mask=mask, other=0.0).to(
        tl.float32
    )


@triton.jit
def _turn(x, cos, sin, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    even, odd = tl.split(tl.reshape(x, (ROWS, BLOCK // 2, 2)))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (ROWS, BLOCK))


@triton.jit
def _tile(start, rows, HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Of heads of tokens from row `start` on: tokens, which rows exist, offsets of the queries, mask, columns."""
    row = (start + tl.arange(0, ROWS)).to(tl.int64)
    column = tl.arange(0, BLOCK)
    token, inside = row // HEADS, row < rows
    at = (token * (3 * HEADS * WIDTH) + (row % HEADS) * WIDTH)[:, None] + column[None, :]
    return token, inside, at, inside[:, None] & (column < WIDTH)[None, :], column


@triton.jit
def _forward_kernel(
    qkv,
    q_weight,
    k_weight,
    cos,
    sin,
    out,
    rows,
    tokens,
    eps,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    token, inside, at, mask, column = _tile(tl.program_id(0) * ROWS, rows, HEADS, WIDTH, BLOCK, ROWS)
    q = tl.load(qkv + at, mask=mask, other=0.0).to(tl.float32)
    k = tl.load(qkv + at + HEADS * WIDTH, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(qkv + at + 2 * HEADS * WIDTH, mask=mask, other=0.0)
    if q_weight is not None:
        real = column < WIDTH
        q *= (1.0 / tl.sqrt(tl.sum(q * q, 1) / WIDTH + eps))[:, None]
        k *= (1.0 / tl.sqrt(tl.sum(k * k, 1) / WIDTH + eps))[:, None]
        q *= tl.load(q_weight + column, mask=real, other=0.0).to(tl.float32)[None, :]
        k *= tl.load(k_weight + column, mask=real, other=0.0).to(tl.float32)[None, :]
    if cos is not None:
        c, s = _angles(cos, sin, token, tokens, inside, WIDTH, BLOCK)
        q = _turn(q, c, s, ROWS, BLOCK)
        k = _turn(k, c, s, ROWS, BLOCK)
    tl.store(out + at, q.to(out.dtype.element_ty), mask=mask)
    tl.store(out + at + HEADS * WIDTH, k.to(out.dtype.element_ty), mask=mask)
    tl.store(out + at + 2 * HEADS * WIDTH, v, mask=mask)


@triton.jit
def _normalize_backward(x, dn, w, eps, WIDTH: tl.constexpr):
    """(dx, dn * hat) of the module's formula."""
    root = (1.0 / tl.sqrt(tl.sum(x * x, 1) / WIDTH + eps))[:, None]
    hat = x * root
    g = dn * w
    return (g - hat * (tl.sum(g * hat, 1)[:, None] / WIDTH)) * root, dn * hat


@triton.jit
def _backward_kernel(
    dout,
    qkv,
    q_weight,
    k_weight,
    cos,
    sin,
    dqkv,
    partial,
    rows,
    tokens,
    eps,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """partial[program] = [dq_weight, dk_weight]."""
    column = tl.arange(0, BLOCK)
    real = column < WIDTH
    dq_weight = tl.zeros((BLOCK,), tl.float32)
    dk_weight = tl.zeros((BLOCK,), tl.float32)
    if q_weight is not None:
        wq = tl.load(q_weight + column, mask=real, other=0.0).to(tl.float32)[None, :]
        wk = tl.load(k_weight + column, mask=real, other=0.0).to(tl.float32)[None, :]
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        token, inside, at, mask, _ = _tile(start, rows, HEADS, WIDTH, BLOCK, ROWS)
        dq = tl.load(dout + at, mask=mask, other=0.0).to(tl.float32)
        dk = tl.load(dout + at + HEADS * WIDTH, mask=mask, other=0.0).to(tl.float32)
        dv = tl.load(dout + at + 2 * HEADS * WIDTH, mask=mask, other=0.0)
        if cos is not None:
            c, s = _angles(cos, sin, token, tokens, inside, WIDTH, BLOCK)
            dq = _turn(dq, c, -s, ROWS, BLOCK)
            dk = _turn(dk, c, -s, ROWS, BLOCK)
        if q_weight is not None:
            q = tl.load(qkv + at, mask=mask, other=0.0).to(tl.float32)
            k = tl.load(qkv + at + HEADS * WIDTH, mask=mask, other=0.0).to(tl.float32)
            dq, of_q = _normalize_backward(q, dq, wq, eps, WIDTH)
            dk, of_k = _normalize_backward(k, dk, wk, eps, WIDTH)
            dq_weight += tl.sum(of_q, 0)
            dk_weight += tl.sum(of_k, 0)
        tl.store(dqkv + at, dq.to(dqkv.dtype.element_ty), mask=mask)
        tl.store(dqkv + at + HEADS * WIDTH, dk.to(dqkv.dtype.element_ty), mask=mask)
        tl.store(dqkv + at + 2 * HEADS * WIDTH, dv.to(dqkv.dtype.element_ty), mask=mask)
    if q_weight is not None:
        sums = partial + tl.program_id(0) * (2 * WIDTH) + column
        tl.store(sums, dq_weight, mask=real)
        tl.store(sums + WIDTH, dk_weight, mask=real)


def _launch(
    kernel: Any, programs: int | None, num_heads: int, eps: float, like: Tensor, *tensors: Tensor | None
) -> None:
    """programs: at most; None for one a tile."""
    width = like.shape[2] // (3 * num_heads)
    tile = _rows.tile(width)
    rows = like.shape[0] * like.shape[1] * num_heads
    tiles = _triton.cdiv(rows, tile["ROWS"])
    constants = {"HEADS": num_heads, "WIDTH": width, "BLOCK": tile["BLOCK"], "ROWS": tile["ROWS"]}
    grid = (tiles if programs is None else min(tiles, programs),)
    _triton.launch(kernel, grid, *tensors, rows, like.shape[1], eps, warps=tile["warps"], **constants)


def triton_forward(
    qkv: Tensor,
    num_heads: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
) -> Tensor:
    """`reference` in one launch."""
    _require(qkv, num_heads, q_weight, k_weight, cos, sin)
    tensors = _rows.dense(qkv, q_weight, k_weight, cos, sin)
    out = torch.empty_like(tensors[0])
    _launch(_forward_kernel, None, num_heads, eps, out, *tensors, out)
    return out


def triton_backward(
    grad: Tensor,
    qkv: Tensor,
    num_heads: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    cos: Tensor | None,
    sin: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference_backward` in one pass over the rows, and with norms a sum of the programs' partial sums."""
    _require(qkv, num_heads, grad, q_weight, k_weight, cos, sin)
    tensors = _rows.dense(grad, None if q_weight is None else qkv, q_weight, k_weight, cos, sin)
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    if q_weight is None:
        _launch(_backward_kernel, None, num_heads, eps, dqkv, *tensors, dqkv, None)
        return dqkv, grad.new_empty(0), grad.new_empty(0)
    width = qkv.shape[2] // (3 * num_heads)
    rows = qkv.shape[0] * qkv.shape[1] * num_heads
    programs = min(_triton.cdiv(rows, _rows.tile(width)["ROWS"]), _PROGRAMS * _triton.processors(qkv.device))
    partial = torch.empty(programs, 2, width, dtype=torch.float32, device=qkv.device)
    _launch(_backward_kernel, programs, num_heads, eps, dqkv, *tensors, dqkv, partial)
    dq_weight, dk_weight = partial.sum(0)
    return dqkv, dq_weight.to(q_weight.dtype), dk_weight.to(k_weight.dtype)


_WIDEST_HEAD = 256


def _require(qkv: Tensor, num_heads: int, *others: Tensor | None) -> None:
    _triton.require_dtypes(qkv, *others)
    width = qkv.shape[2] // (3 * num_heads)
    _triton.require(
        width <= _WIDEST_HEAD, f"heads of {width} channels do not fit its registers (at most {_WIDEST_HEAD})"
    )


# ---- registration ----------------------------------------------------------------------------------------------------


def _example(make: Maker, norms: bool, rope: bool) -> list[Any]:
    sizes = make.sizes
    width = sizes.dim // sizes.heads
    weights = [make.normal(width, dtype=make.full) if norms else None for _ in range(2)]
    angles = torch.linspace(-3, 3, sizes.tokens * (width // 2), device=make.device).view(sizes.tokens, width // 2)
    turns = [angles.cos(), angles.sin()] if rope else [None, None]
    return [make.activations(3), sizes.heads, *weights, 1e-6, *turns]


_EXAMPLES = [
    Example(
        "",
        partial(_example, norms=True, rope=True),
        compiled=[*DEITS, (BASE, torch.float32)],
        bytes=lambda args: 5 * args[0].nbytes,
    ),
    Example("rope", partial(_example, norms=False, rope=True), compiled=BASE_FP16),
    Example("norms", partial(_example, norms=True, rope=False), compiled=BASE_FP16),
]
_TRITON = _op.Backend("triton", _triton.capability, triton_forward, triton_backward)
OP = _op.Op(
    "qk_norm_rope",
    reference,
    reference_backward,
    examples=_EXAMPLES,
    others=[_TRITON],
    native=native,
    cast={"qkv"},
)


@OP.registered.register_fake
def _(qkv, num_heads, q_weight, k_weight, eps, cos, sin):
    return qkv.new_empty(qkv.shape)


@OP.registered_backward.register_fake
def _(grad, qkv, num_heads, q_weight, k_weight, eps, cos, sin):
    weights = [
        grad.new_empty(0) if weight is None else weight.new_empty(weight.shape) for weight in (q_weight, k_weight)
    ]
    return qkv.new_empty(qkv.shape), *weights


def _save(ctx, inputs, output):
    qkv, ctx.num_heads, q_weight, k_weight, ctx.eps, cos, sin = inputs
    # Without norms the gradient does not depend on qkv: no memory is kept for it.
    ctx.save_for_backward(None if q_weight is None else qkv, q_weight, k_weight, cos, sin)


def _differentiate(ctx, grad):
    qkv, q_weight, k_weight, cos, sin = ctx.saved_tensors
    qkv = grad if qkv is None else qkv
    grads = OP.run_backward(ctx, grad, qkv, ctx.num_heads, q_weight, k_weight, ctx.eps, cos, sin)
    dqkv, *dweights = grads
    return dqkv, None, *(dweights if q_weight is not None else (None, None)), None, None, None


OP.differentiable(_save, _differentiate)


# ---- public ----------------------------------------------------------------------------------------------------------


def qk_norm_rope(
    qkv: Tensor,
    num_heads: int,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
) -> Tensor:
    """Normalise the queries and keys of each head, turn them by their places, and leave the values.

    qkv       floating `[B, N, 3*H*d]`, packed as `attention` takes it
    num_heads H
    q_weight  of the RMSNorm of queries `[d]`; None for no norms
    k_weight  of that of keys, where there is q_weight
    eps       added to the mean squares, at least 0
    cos       of the angle by which pair t of token n is turned, `[N, d/2]`; None for no rotation. ValueError if it
              requires a gradient
    sin       of the same angles

    Returns `[B, N, 3*H*d]` in qkv's dtype (the autocast dtype under autocast).
    """
    _checks.check_floating("qkv", qkv)
    if qkv.dim() != 3:
        raise ValueError(f"qkv has shape {list(qkv.shape)}, but must be [B, N, 3*H*d]")
    if num_heads < 1 or qkv.shape[2] % (3 * num_heads):
        raise ValueError(
            f"num_heads is {num_heads}, but must be positive, and 3 * num_heads must divide qkv's last dimension "
            f"{qkv.shape[2]}"
        )
    _checks.check_number("eps", eps, 0)
    width = qkv.shape[2] // (3 * num_heads)
    for pair in ({"q_weight": q_weight, "k_weight": k_weight}, {"cos": cos, "sin": sin}):
        given = [name for name, tensor in pair.items() if tensor is not None]
        if len(given) == 1:
            raise ValueError(f"{given[0]} is given alone, but {' and '.join(pair)} belong together")
    for name, weight in {"q_weight": q_weight, "k_weight": k_weight}.items():
        if weight is not None:
            _checks.check_floating(name, weight)
            _checks.check_shape(name, weight, (width,), "[d] of qkv [B, N, 3*H*d]")
            _checks.check_device(name, weight, qkv, "qkv")
    if cos is not None and width % 2:
        raise ValueError(f"heads have {width} channels, but pairs of them can be turned only where 2 divides that")
    for name, turns in {"cos": cos, "sin": sin}.items():
        if turns is not None:
            _checks.check_floating(name, turns)
            _checks.check_shape(name, turns, (qkv.shape[1], width // 2), "[N, d/2] of qkv [B, N, 3*H*d]")
            _checks.check_device(name, turns, qkv, "qkv")
            if turns.requires_grad:
                raise ValueError(f"{name} requires a gradient, which this op does not make: use PyTorch's operations")
    return OP(qkv, num_heads, q_weight, k_weight, eps, cos, sin)
