"""Residual addition, LayerScale, drop-path and RMSNorm in one op (Zhang & Sennrich, "Root mean square layer
normalization", 2019).

    r = residual + keep * gamma * branch                         new residual stream, in residual's dtype
    x = r * rstd(r),  rstd = (mean(r**2) + eps)**-0.5            the mean over C, float32
    normed = x * weight                                          in out_dtype

Backward, with g = dnormed * weight and averages over C:

    dr = dr_out + rstd * (g - x * mean(g * x))                   also the gradient of residual
    dbranch = keep * gamma * dr
    dgamma = sum_BN(keep * branch * dr)      dweight = sum_BN(dnormed * x)

residual, branch, normed are [B, ..., C]; weight, gamma [C]; keep [B].

Bytes moved at best per element of a float32 residual and a 16-bit branch: forward reads 6 and writes 6; backward reads
10 (and 2 more for dgamma) and writes 6. As in `layer_norm`, each of a fixed number of programs of the backward adds up
its share of the column sums, and their partial sums are added in a fixed order.
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


def normalize(x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(normed in `out_dtype`, rstd `[..., 1]`), computed in float32 (float64 for float64)."""
    compute = _op.statistics_dtype(x.dtype)
    x = x.to(compute)
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return (x * rstd * weight.to(compute)).to(out_dtype), rstd


def _normalize_backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x, in the dtype of rstd, and of weight, in its own."""
    grad = grad.to(rstd.dtype)
    hat = x * rstd
    g = grad * weight
    dx = rstd * (g - hat * (g * hat).mean(-1, keepdim=True))
    return dx, (grad * hat).sum(tuple(range(x.dim() - 1))).to(weight.dtype)


def _plain_backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    dx, dweight = _normalize_backward(grad, x, weight, rstd)
    return dx.to(x.dtype), dweight


def reference(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor,
    eps: float,
    gamma: Tensor | None,
    keep: Tensor | None,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """(new residual, normed, rstd) as in the module's formula; rstd, `[..., 1]`, is for backward."""
    scale = _rows.branch_scale(residual, gamma, keep)
    total = residual + branch if scale is None else torch.addcmul(residual, branch, scale)
    new_residual = total.to(residual.dtype)
    return new_residual, *normalize(new_residual, weight, eps, out_dtype)


def reference_backward(
    dnormed: Tensor | None,
    new_residual: Tensor,
    dresidual: Tensor | None,
    branch: Tensor,
    weight: Tensor,
    rstd: Tensor,
    gamma: Tensor | None,
    keep: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of residual, branch, weight and gamma, empty where there is none: that of gamma without that argument,
    that of weight without `dnormed`. A None for `dresidual` or `dnormed` is zero."""
    if dnormed is None:
        dr, dweight = dresidual.to(rstd.dtype, copy=True), weight.new_empty(0)
    else:
        dr, dweight = _normalize_backward(dnormed, new_residual, weight, rstd)
        if dresidual is not None:
            dr = dresidual + dr
    scale = _rows.branch_scale(dr, gamma, keep)
    # An op's results must not share memory, hence a copy where the branch's gradient is the residual's.
    dbranch = dr.to(branch.dtype, copy=True) if scale is None else (dr * scale).to(branch.dtype)
    dgamma = weight.new_empty(0)
    if gamma is not None:
        kept = _rows.branch_scale(dr, None, keep)
        scaled = branch * dr if kept is None else branch * dr * kept
        dgamma = scaled.sum(tuple(range(dr.dim() - 1))).to(gamma.dtype)
    return dr.to(new_residual.dtype), dbranch, dweight, dgamma


# ---- Triton ----------------------------------------------------------------------------------------------------------

_PROGRAMS = 4
"""Programs, and therefore partial sums, of a backward pass, on every SM."""


@triton.jit
def _forward_kernel(
    residual,
    branch,
    weight,
    gamma,
    keep,
    new_residual,
    normed,
    rstd,
    rows,
    tokens,
    eps,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside, real = row < rows, column < C
    at = row[:, None] * C + column[None, :]
    mask = inside[:, None] & real[None, :]
    x = tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    if branch is not None:
        b = tl.load(branch + at, mask=mask, other=0.0).to(tl.float32)
        if gamma is not None:
            b *= tl.load(gamma + column, mask=real, other=0.0).to(tl.float32)[None, :]
        if keep is not None:
            b *= tl.load(keep + row // tokens, mask=inside, other=0.0).to(tl.float32)[:, None]
        stored = (x + b).to(new_residual.dtype.element_ty)
        tl.store(new_residual + at, stored, mask=mask)
        x = stored.to(tl.float32)
    inverse = 1.0 / tl.sqrt(tl.sum(x * x, 1) / C + eps)
    y = x * inverse[:, None] * tl.load(weight + column, mask=real, other=0.0).to(tl.float32)[None, :]
    tl.store(normed + at, y.to(normed.dtype.element_ty), mask=mask)
    tl.store(rstd + row, inverse, mask=inside)


@triton.jit
def _backward_kernel(
    dnormed,
    new_residual,
    dresidual,
    branch,
    weight,
    rstd,
    gamma,
    keep,
    dr,
    dbranch,
    partial,
    rows,
    tokens,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    SUMS: tl.constexpr,
):
    """partial[program] = [dweight, dgamma], the first `SUMS` of them."""
    column = tl.arange(0, BLOCK)
    real = column < C
    w = tl.load(weight + column, mask=real, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros((BLOCK,), tl.float32)
    dgamma = tl.zeros((BLOCK,), tl.float32)
    for start in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        inside = row < rows
        at = row[:, None] * C + column[None, :]
        mask = inside[:, None] & real[None, :]
        dy = tl.load(dnormed + at, mask=mask, other=0.0).to(tl.float32)
        inverse = tl.load(rstd + row, mask=inside, other=0.0)[:, None]
        hat = tl.load(new_residual + at, mask=mask, other=0.0).to(tl.float32) * inverse
        dweight += tl.sum(dy * hat, 0)
        g = dy * w
        dx = (g - hat * (tl.sum(g * hat, 1)[:, None] / C)) * inverse
        if dresidual is not None:
            dx += tl.load(dresidual + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(dr + at, dx.to(dr.dtype.element_ty), mask=mask)
        if dbranch is not None:
            db = dx
            if keep is not None:
                db *= tl.load(keep + row // tokens, mask=inside, other=0.0).to(tl.float32)[:, None]
            if gamma is not None:
                dgamma += tl.sum(db * tl.load(branch + at, mask=mask, other=0.0).to(tl.float32), 0)
                db *= tl.load(gamma + column, mask=real, other=0.0).to(tl.float32)[None, :]
            tl.store(dbranch + at, db.to(dbranch.dtype.element_ty), mask=mask)
    sums = partial + tl.program_id(0) * (SUMS * C) + column
    tl.store(sums, dweight, mask=real)
    if SUMS > 1:
        tl.store(sums + C, dgamma, mask=real)


def triton_forward(
    residual: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    eps: float,
    gamma: Tensor | None,
    keep: Tensor | None,
    out_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """`reference` in one launch."""
    inputs = residual, branch, weight, gamma, keep
    _rows.require(*inputs)
    residual, *others = _rows.dense(*inputs)
    new_residual = None if branch is None else torch.empty_like(residual)
    normed = torch.empty_like(residual, dtype=out_dtype)
    rstd = torch.empty(*residual.shape[:-1], 1, dtype=torch.float32, device=residual.device)
    rows, tokens = _rows.rows_and_tokens(residual)
    tile = _rows.tile(residual.shape[-1])
    results = new_residual, normed, rstd
    grid = (_triton.cdiv(rows, tile["ROWS"]),)
    _triton.launch(_forward_kernel, grid, residual, *others, *results, rows, tokens, eps, **tile)
    return results


def triton_backward(
    dnormed: Tensor | None,
    new_residual: Tensor,
    dresidual: Tensor | None,
    branch: Tensor | None,
    weight: Tensor,
    rstd: Tensor,
    gamma: Tensor | None,
    keep: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """`reference_backward` in one pass over the rows and a sum of the programs' partial sums. Without `dnormed` nothing
    was normalised, and the reference makes what little is left."""
    if dnormed is None:
        return reference_backward(None, new_residual, dresidual, branch, weight, rstd, gamma, keep)
    _rows.require(new_residual, dnormed, dresidual, branch, weight, gamma, keep)
    dbranch = None if branch is None else torch.empty(branch.shape, dtype=branch.dtype, device=branch.device)
    values = None if gamma is None else branch
    tensors = _rows.dense(dnormed, new_residual, dresidual, values, weight, rstd, gamma, keep)
    dr = torch.empty_like(tensors[1])
    rows, tokens = _rows.rows_and_tokens(dr)
    width = dr.shape[-1]
    tile = _rows.tile(width)
    grid = (min(_triton.cdiv(rows, tile["ROWS"]), _PROGRAMS * _triton.processors(dr.device)),)
    sums = 1 if gamma is None else 2
    partial = torch.empty(grid[0], sums, width, dtype=torch.float32, device=dr.device)
    _triton.launch(_backward_kernel, grid, *tensors, dr, dbranch, partial, rows, tokens, SUMS=sums, **tile)
    dweight, *rest = partial.sum(0)
    dgamma = weight.new_empty(0) if gamma is None else rest[0].to(gamma.dtype)
    return dr, dbranch, dweight.to(weight.dtype), dgamma


def _plain_triton_forward(x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return triton_forward(x, None, weight, eps, None, None, out_dtype)[1:]


def _plain_triton_backward(grad: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    dx, _, dweight, _ = triton_backward(grad, x, None, None, weight, rstd, None, None)
    return dx, dweight


# ---- registration ----------------------------------------------------------------------------------------------------


def _example(make: Maker, gamma: bool = False, keep: bool = False, stream: torch.dtype | None = None) -> list[Any]:
    sizes = make.sizes
    residual = make.activations(dtype=stream or make.full)
    factors = 1.25 * (torch.arange(sizes.batch, device=make.device) % 10 > 0).to(make.full)
    scales = make.vector() if gamma else None, factors if keep else None
    return [residual, make.activations(), make.vector(), 1e-6, *scales, make.dtype]


def _plain_example(make: Maker) -> list[Any]:
    return [make.activations(dtype=make.full), make.vector(), 1e-6, make.dtype]


_EXAMPLES = [
    Example(
        "drop_path",
        partial(_example, keep=True),
        compiled=DEITS,
        bytes=lambda args: args[0].numel() * (16 + 6 * args[1].itemsize),
    ),
    Example("neither", _example, compiled=[*BASE_FP16, (BASE, torch.float32)]),
    Example("layer_scale", partial(_example, gamma=True)),
    Example("layer_scale drop_path", partial(_example, gamma=True, keep=True)),
    Example("16-bit stream", lambda make: _example(make, stream=make.dtype)),
]
_PLAIN_EXAMPLES = [
    Example("", _plain_example, compiled=DEITS, bytes=lambda args: args[0].numel() * (12 + 2 * args[-1].itemsize))
]
_TRITON = _op.Backend("triton", _triton.capability, triton_forward, triton_backward)
_PLAIN_TRITON = _op.Backend("triton", _triton.capability, _plain_triton_forward, _plain_triton_backward)
OP = _op.Op("add_rms_norm", reference, reference_backward, examples=_EXAMPLES, others=[_TRITON])
PLAIN = _op.Op("rms_norm", normalize, _plain_backward, examples=_PLAIN_EXAMPLES, others=[_PLAIN_TRITON])


def _fake_normalize(x: Tensor, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    rstd = x.new_empty(*x.shape[:-1], 1, dtype=_op.statistics_dtype(x.dtype))
    return x.new_empty(x.shape, dtype=out_dtype), rstd


@OP.registered.register_fake
def _(residual, branch, weight, eps, gamma, keep, out_dtype):
    return residual.new_empty(residual.shape), *_fake_normalize(residual, out_dtype)


@PLAIN.registered.register_fake
def _(x, weight, eps, out_dtype):
    return _fake_normalize(x, out_dtype)


@OP.registered_backward.register_fake
def _(dnormed, new_residual, dresidual, branch, weight, rstd, gamma, keep):
    dweight = weight.new_empty(0 if dnormed is None else weight.shape)
    dgamma = weight.new_empty(0) if gamma is None else gamma.new_empty(gamma.shape)
    return *(like.new_empty(like.shape) for like in (new_residual, branch)), dweight, dgamma


@PLAIN.registered_backward.register_fake
def _(grad, x, weight, rstd):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx, inputs, output):
    _, branch, weight, _, gamma, keep, _ = inputs
    new_residual, _, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.branch = branch.shape, branch.dtype
    # Without LayerScale only the shape and dtype of the branch are wanted: no memory is kept for it.
    kept = None if gamma is None else branch
    ctx.save_for_backward(new_residual, kept, weight, rstd, gamma, keep)


def _differentiate(ctx, dresidual, dnormed, *_):
    new_residual, branch, *saved = ctx.saved_tensors
    gamma = saved[2]
    if branch is None:
        shape, dtype = ctx.branch
        branch = new_residual.new_empty((), dtype=dtype).expand(shape)
    dr, dbranch, dweight, dgamma = OP.run_backward(ctx, dnormed, new_residual, dresidual, branch, *saved)
    dweight = None if dnormed is None else dweight
    return dr, dbranch, dweight, None, None if gamma is None else dgamma, None, None


def _save_plain(ctx, inputs, output):
    x, weight, *_ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, output[1])


def _differentiate_plain(ctx, grad, *_):
    return *PLAIN.run_backward(ctx, grad, *ctx.saved_tensors), None, None


OP.differentiable(_save, _differentiate)
PLAIN.differentiable(_save_plain, _differentiate_plain)


# ---- public ----------------------------------------------------------------------------------------------------------


def add_rms_norm(
    residual: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    eps: float = 1e-6,
    gamma: Tensor | None = None,
    keep: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream and divide the sum by its root mean square.

    residual   floating `[B, ..., C]`
    branch     like residual in shape, of any floating dtype; None adds nothing: plain RMSNorm
    weight     `[C]`
    eps        added to the mean square, at least 0
    gamma      LayerScale `[C]`; None is 1
    keep       drop-path factor of each sample of the branch, float32 `[B]`: 0 or 1 / (1 - p); None is 1
    out_dtype  of the normalised tokens; default the autocast dtype under autocast, else residual's dtype

    Returns (new residual, normed): `residual + keep * gamma * branch` in residual's dtype (residual itself without a
    branch), and its RMSNorm in out_dtype. The mean square and the product with weight are float32 (float64 for
    float64), and rounded once.
    """
    _checks.check_number("eps", eps, 0)
    _check(residual, branch, weight, gamma, keep)
    if out_dtype is None:
        out_dtype = _op.autocast_dtype(residual) or residual.dtype
    if branch is None:
        return residual, PLAIN(residual, weight, eps, out_dtype)[0]
    return OP(residual, branch, weight, eps, gamma, keep, out_dtype)[:2]


def _check(residual: Tensor, branch: Tensor | None, weight: Tensor, gamma: Tensor | None, keep: Tensor | None) -> None:
    _checks.check_floating("residual", residual)
    for name, vector in {"weight": weight, "gamma": gamma}.items():
        if vector is not None:
            _checks.check_shape(name, vector, residual.shape[-1:], "[C], C the last dimension of residual,")
            _checks.check_device(name, vector, residual, "residual")
    if branch is None:
        for name, value in {"gamma": gamma, "keep": keep}.items():
            if value is not None:
                raise ValueError(f"{name} belongs to the branch, but branch is None; leave it out")
        return
    _checks.check_floating("branch", branch)
    _checks.check_device("branch", branch, residual, "residual")
    _checks.check_shape("branch", branch, residual.shape, "like residual")
    if keep is not None:
        _checks.check_floating("keep", keep)
        _checks.check_device("keep", keep, residual, "residual")
        _checks.check_shape("keep", keep, residual.shape[:1], "[B], B the first dimension of residual,")
