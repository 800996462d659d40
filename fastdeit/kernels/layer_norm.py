"""Residual addition, LayerScale, drop-path and LayerNorm in one op.

    r = residual + keep * gamma * branch                         new residual stream, in residual's dtype
    x = (r - mean(r)) * rstd(r),  rstd = (var(r) + eps)**-0.5    statistics over C, biased variance, float32
    normed = x * weight + bias                                   in out_dtype

Backward, with g = dnormed * weight and averages over C:

    dr = dr_out + rstd * (g - mean(g) - x * mean(g * x))         also the gradient of residual
    dbranch = keep * gamma * dr        dbranch_bias = sum_BN(dbranch)
    dgamma = sum_BN(keep * branch * dr)
    dweight = sum_BN(dnormed * x)      dbias = sum_BN(dnormed)

residual, branch, normed are [B, ..., C]; weight, bias, gamma, branch_bias [C]; keep [B]. Where samples are skipped,
branch holds those of `branch_samples` and normed those of `norm_samples`; the formulas hold for these, and elsewhere
the stream and its gradient pass unchanged.

Bytes moved at best per element of a float32 residual and a 16-bit branch: forward reads 6 and writes 6; backward reads
10 (and 2 more for dgamma) and writes 6. The Triton backward makes one pass over the rows: each of a fixed number of
programs on every SM adds up its share of the four column sums, and their partial sums are added in a fixed order. So
the result does not depend on timing, and of the card on its number of SMs alone.
"""

from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdeit.kernels import _checks, _derivatives, _op, _rows, _triton
from fastdeit.kernels._example import BASE, BASE_FP16, DEITS, Example, Maker

# ---- reference -------------------------------------------------------------------------------------------------------


def normalize(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """(normed in `out_dtype`, mean, rstd), computed in float32 (float64 for float64); mean and rstd are `[..., 1]`."""
    compute = _op.statistics_dtype(x.dtype)
    weight, bias = weight.to(compute), bias.to(compute)
    normed, mean, rstd = torch.native_layer_norm(x.to(compute), weight.shape, weight, bias, eps)
    return normed.to(out_dtype), mean, rstd


def normalize_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (in the statistics' dtype), weight and bias (both in weight's dtype)."""
    grad = grad.to(mean.dtype)
    hat = (x - mean) * rstd
    g = grad * weight
    dx = rstd * (g - g.mean(-1, keepdim=True) - hat * (g * hat).mean(-1, keepdim=True))
    rows = tuple(range(x.dim() - 1))
    return dx, (grad * hat).sum(rows).to(weight.dtype), grad.sum(rows).to(weight.dtype)


def _plain_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dbias = normalize_backward(grad, x, weight, mean, rstd)
    return dx.to(x.dtype), dweight, dbias


def _selected(tensor: Tensor, samples: Tensor | None) -> Tensor:
    return tensor if samples is None else tensor[samples]


def _empty_of_selected(tensor: Tensor, samples: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Memory for the selected samples of a dense tensor."""
    if samples is None:
        return torch.empty_like(tensor, dtype=dtype)
    return tensor.new_empty((samples.shape[0], *tensor.shape[1:]), dtype=dtype)


def reference(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    gamma: Tensor | None,
    keep: Tensor | None,
    branch_bias: Tensor | None,
    branch_samples: Tensor | None,
    norm_samples: Tensor | None,
    branch_places: Tensor | None,
    norm_places: Tensor | None,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(new residual, normed, mean, rstd) as in the module's formula; the statistics, `[..., 1]`, are for backward."""
    scale = _rows.branch_scale(residual, gamma, keep)
    held = _selected(residual, branch_samples)
    total = held + branch if scale is None else torch.addcmul(held, branch, scale)
    new_residual = total.to(residual.dtype)
    if branch_samples is not None:
        new_residual = residual.index_copy(0, branch_samples, new_residual)
    return new_residual, *normalize(_selected(new_residual, norm_samples), weight, bias, eps, out_dtype)


def native(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    gamma: Tensor | None,
    keep: Tensor | None,
    branch_bias: Tensor | None,
    *others: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference` with a gradient for branch_bias."""
    branch = _derivatives.with_bias_gradient(branch, branch_bias)
    return reference(residual, branch, weight, bias, eps, gamma, keep, None, *others)


def reference_backward(
    dresidual: Tensor | None,
    dnormed: Tensor | None,
    new_residual: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor | None,
    keep: Tensor | None,
    branch_bias: Tensor | None,
    branch_samples: Tensor | None,
    norm_samples: Tensor | None,
    branch_places: Tensor | None,
    norm_places: Tensor | None,
    branch_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of residual, branch, weight, bias, gamma and branch_bias, empty where there is none: the last two
    without that argument, those of weight and bias without `dnormed`. A None for `dresidual` or `dnormed` is zero. The
    branch is there with gamma only."""
    dweight, dbias = weight.new_empty(0), weight.new_empty(0)
    if dnormed is None:
        all_samples = dresidual.to(mean.dtype, copy=True)
    else:
        x = _selected(new_residual, norm_samples)
        all_samples, dweight, dbias = normalize_backward(dnormed, x, weight, mean, rstd)
        if norm_samples is not None:
            before = torch.zeros_like(new_residual) if dresidual is None else dresidual
            all_samples = before.to(all_samples.dtype).index_add(0, norm_samples, all_samples)
        elif dresidual is not None:
            all_samples = dresidual + all_samples
    dr = _selected(all_samples, branch_samples)
    scale = _rows.branch_scale(dr, gamma, keep)
    # An op's results must not share memory, hence a copy where the branch's gradient is the residual's.
    dbranch = dr.to(branch_dtype, copy=True) if scale is None else (dr * scale).to(branch_dtype)
    rows = tuple(range(dr.dim() - 1))
    dgamma = dbranch_bias = weight.new_empty(0)
    if gamma is not None:
        kept = _rows.branch_scale(dr, None, keep)
        scaled = branch * dr if kept is None else branch * dr * kept
        dgamma = scaled.sum(rows).to(gamma.dtype)
    if branch_bias is not None:
        dbranch_bias = (dr if scale is None else dr * scale).sum(rows).to(branch_bias.dtype)
    return all_samples.to(new_residual.dtype), dbranch, dweight, dbias, dgamma, dbranch_bias.clone()


# ---- Triton ----------------------------------------------------------------------------------------------------------

_PROGRAMS = 4
"""Programs, and therefore partial sums, of a backward pass, on every SM."""


@triton.jit
def _places(slot, row, inside, tokens):
    """Rows of a tensor of selected samples that hold `row`, and which of these exist. slot[b] is the place of sample b
    among the selected, or -1; None selects all."""
    place, has = row, inside
    if slot is not None:
        sample = row // tokens
        slots = tl.load(slot + sample, mask=inside, other=-1).to(tl.int64)
        place, has = slots * tokens + (row - sample * tokens), inside & (slots >= 0)
    return place, has


@triton.jit
def _load(pointer, row, column, mask, C: tl.constexpr):
    return tl.load(pointer + row[:, None] * C + column[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load_vector(pointer, column, C: tl.constexpr):
    return tl.load(pointer + column, mask=column < C, other=0.0).to(tl.float32)


@triton.jit
def _forward_kernel(
    residual,
    branch,
    weight,
    bias,
    gamma,
    keep,
    branch_slot,
    norm_slot,
    new_residual,
    normed,
    mean,
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
    inside, real = row < rows, (column < C)[None, :]
    x = _load(residual, row, column, inside[:, None] & real, C)
    if branch is not None:
        place, has = _places(branch_slot, row, inside, tokens)
        mask = has[:, None] & real
        b = _load(branch, place, column, mask, C)
        if gamma is not None:
            b *= _load_vector(gamma, column, C)[None, :]
        if keep is not None:
            b *= tl.load(keep + place // tokens, mask=has, other=0.0).to(tl.float32)[:, None]
        stored = (x + tl.where(mask, b, 0.0)).to(new_residual.dtype.element_ty)
        tl.store(new_residual + row[:, None] * C + column[None, :], stored, mask=inside[:, None] & real)
        x = stored.to(tl.float32)
    place, has = _places(norm_slot, row, inside, tokens)
    mask = has[:, None] & real
    mu = tl.sum(x, 1) / C
    centred = tl.where(mask, x - mu[:, None], 0.0)
    inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / C + eps)
    scaled = centred * inverse[:, None] * _load_vector(weight, column, C)[None, :]
    y = scaled + _load_vector(bias, column, C)[None, :]
    tl.store(normed + place[:, None] * C + column[None, :], y.to(normed.dtype.element_ty), mask=mask)
    tl.store(mean + place, mu, mask=has)
    tl.store(rstd + place, inverse, mask=has)


@triton.jit
def _backward_kernel(
    dresidual,
    dnormed,
    new_residual,
    branch,
    weight,
    mean,
    rstd,
    gamma,
    keep,
    branch_slot,
    norm_slot,
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
    """partial[program] = [dweight, dbias, dbranch_bias, dgamma], the first `SUMS` of them."""
    column = tl.arange(0, BLOCK)
    real = (column < C)[None, :]
    w = _load_vector(weight, column, C)[None, :]
    dweight = tl.zeros((BLOCK,), tl.float32)
    dbias = tl.zeros((BLOCK,), tl.float32)
    dbranch_bias = tl.zeros((BLOCK,), tl.float32)
    dgamma = tl.zeros((BLOCK,), tl.float32)
    first, stride = tl.program_id(0) * ROWS, tl.num_programs(0) * ROWS
    for start in range(first, rows, stride):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        inside = row < rows
        here = inside[:, None] & real
        place, has = _places(norm_slot, row, inside, tokens)
        mask = has[:, None] & real
        dy = _load(dnormed, place, column, mask, C)
        mu = tl.load(mean + place, mask=has, other=0.0)[:, None]
        inverse = tl.load(rstd + place, mask=has, other=0.0)[:, None]
        hat = tl.where(mask, (_load(new_residual, row, column, mask, C) - mu) * inverse, 0.0)
        dweight += tl.sum(dy * hat, 0)
        dbias += tl.sum(dy, 0)
        g = dy * w
        dx = (g - tl.sum(g, 1)[:, None] / C - hat * (tl.sum(g * hat, 1)[:, None] / C)) * inverse
        if dresidual is not None:
            dx += _load(dresidual, row, column, here, C)
        tl.store(dr + row[:, None] * C + column[None, :], dx.to(dr.dtype.element_ty), mask=here)
        if dbranch is not None:
            place, has = _places(branch_slot, row, inside, tokens)
            mask = has[:, None] & real
            db = tl.where(mask, dx, 0.0)
            if keep is not None:
                db *= tl.load(keep + place // tokens, mask=has, other=0.0).to(tl.float32)[:, None]
            if gamma is not None:
                dgamma += tl.sum(db * _load(branch, place, column, mask, C), 0)
                db *= _load_vector(gamma, column, C)[None, :]
            if SUMS > 2:
                dbranch_bias += tl.sum(db, 0)
            tl.store(dbranch + place[:, None] * C + column[None, :], db.to(dbranch.dtype.element_ty), mask=mask)
    at = partial + tl.program_id(0) * (SUMS * C) + column
    tl.store(at, dweight, mask=column < C)
    tl.store(at + C, dbias, mask=column < C)
    if SUMS > 2:
        tl.store(at + 2 * C, dbranch_bias, mask=column < C)
    if SUMS > 3:
        tl.store(at + 3 * C, dgamma, mask=column < C)


@triton.jit
def _apply_kernel(x, weight, bias, mean, rstd, normed, rows, C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = row < rows
    mask = inside[:, None] & (column < C)[None, :]
    centred = _load(x, row, column, mask, C) - tl.load(mean + row, mask=inside, other=0.0)[:, None]
    scaled = centred * tl.load(rstd + row, mask=inside, other=0.0)[:, None] * _load_vector(weight, column, C)[None, :]
    y = scaled + _load_vector(bias, column, C)[None, :]
    tl.store(normed + row[:, None] * C + column[None, :], y.to(normed.dtype.element_ty), mask=mask)


def _places_of(samples: Tensor | None, places: Tensor | None, batch: int) -> Tensor | None:
    """int32 `[batch]`, dense: place of every sample among the selected, -1 for the others; `places`, if it is there."""
    if places is not None:
        return places.contiguous()
    if samples is None:
        return None
    counted = torch.arange(len(samples), dtype=torch.int32, device=samples.device)
    return torch.full((batch,), -1, dtype=torch.int32, device=samples.device).index_copy_(0, samples, counted)


def triton_forward(
    residual: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    gamma: Tensor | None,
    keep: Tensor | None,
    branch_bias: Tensor | None,
    branch_samples: Tensor | None,
    norm_samples: Tensor | None,
    branch_places: Tensor | None,
    norm_places: Tensor | None,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`reference` in one launch."""
    inputs = residual, branch, weight, bias, gamma, keep
    _rows.require(*inputs)
    residual, *others = _rows.dense(*inputs)
    new_residual = None if branch is None else torch.empty_like(residual)
    normed = _empty_of_selected(residual, norm_samples, out_dtype)
    *shape, width = normed.shape
    mean = residual.new_empty((*shape, 1), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    rows, tokens = _rows.rows_and_tokens(residual)
    batch, tile = residual.shape[0], _rows.tile(width)
    slots = _places_of(branch_samples, branch_places, batch), _places_of(norm_samples, norm_places, batch)
    results = new_residual, normed, mean, rstd
    grid = (_triton.cdiv(rows, tile["ROWS"]),)
    _triton.launch(_forward_kernel, grid, residual, *others, *slots, *results, rows, tokens, eps, **tile)
    return results


def triton_backward(
    dresidual: Tensor | None,
    dnormed: Tensor | None,
    new_residual: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor | None,
    keep: Tensor | None,
    branch_bias: Tensor | None,
    branch_samples: Tensor | None,
    norm_samples: Tensor | None,
    branch_places: Tensor | None,
    norm_places: Tensor | None,
    branch_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor]:
    """`reference_backward` in one pass over the rows and a sum of the programs' partial sums. Without `dnormed` nothing
    was normalised, and the reference makes what little is left. Without a branch there is no `branch_dtype`."""
    if dnormed is None:
        selection = branch_samples, norm_samples, branch_places, norm_places, branch_dtype
        scales = gamma, keep, branch_bias
        return reference_backward(dresidual, None, new_residual, branch, weight, mean, rstd, *scales, *selection)
    inputs = dresidual, dnormed, new_residual, branch, weight, mean, rstd, gamma, keep
    _rows.require(new_residual, dnormed, branch, weight, gamma, keep)
    dresidual, dnormed, new_residual, branch, *others = _rows.dense(*inputs)
    dr = torch.empty_like(new_residual)
    dbranch = None if branch_dtype is None else _empty_of_selected(new_residual, branch_samples, branch_dtype)
    rows, tokens = _rows.rows_and_tokens(new_residual)
    batch, *_, width = new_residual.shape
    tile = _rows.tile(width)
    grid = (min(_triton.cdiv(rows, tile["ROWS"]), _PROGRAMS * _triton.processors(dr.device)),)
    sums = 4 if gamma is not None else 3 if branch_bias is not None else 2
    partial = torch.empty(grid[0], sums, width, dtype=torch.float32, device=dr.device)
    slots = _places_of(branch_samples, branch_places, batch), _places_of(norm_samples, norm_places, batch)
    tensors = dresidual, dnormed, new_residual, branch, *others, *slots, dr, dbranch, partial
    _triton.launch(_backward_kernel, grid, *tensors, rows, tokens, SUMS=sums, **tile)
    dweight, dbias, *rest = partial.sum(0).unbind()
    dbranch_bias = rest[0].to(branch_bias.dtype) if branch_bias is not None else weight.new_empty(0)
    dgamma = rest[1].to(gamma.dtype) if gamma is not None else weight.new_empty(0)
    return dr, dbranch, dweight.to(weight.dtype), dbias.to(weight.dtype), dgamma, dbranch_bias


def plain_triton_forward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """`normalize` in one launch."""
    return triton_forward(x, None, weight, bias, eps, *[None] * 7, out_dtype)[1:]


def plain_triton_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, in their dtypes."""
    dx, _, dweight, dbias, *_ = triton_backward(None, grad, x, None, weight, mean, rstd, *[None] * 8)
    return dx, dweight, dbias


def triton_apply(x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, out_dtype: torch.dtype) -> Tensor:
    """The normalised tokens again, from statistics that are known."""
    x, *others = _rows.dense(x, weight, bias, mean, rstd)
    normed = torch.empty_like(x, dtype=out_dtype)
    rows, _ = _rows.rows_and_tokens(x)
    tile = _rows.tile(x.shape[-1])
    grid = (_triton.cdiv(rows, tile["ROWS"]),)
    _triton.launch(_apply_kernel, grid, x, *others, normed, rows, **tile)
    return normed


# ---- registration ----------------------------------------------------------------------------------------------------


def _example(
    make: Maker,
    gamma: bool = False,
    keep: bool = False,
    bias: bool = False,
    skipping: bool = False,
    places: bool = False,
    stream: torch.dtype | None = None,
) -> list[Any]:
    """Arguments of `reference`; `skipping`: a quarter of the samples skip the branch, others the normalisation;
    `places`: it is known who is where among the others."""
    sizes = make.sizes
    kept = sizes.batch - max(1, sizes.batch // 4) if skipping else sizes.batch
    samples = torch.arange(sizes.batch, device=make.device)
    chosen = (samples.flip(0)[:kept], samples[:kept]) if skipping else (None, None)
    residual, branch = (
        make.normal(n, sizes.tokens, sizes.dim, dtype=dtype)
        for n, dtype in ((sizes.batch, stream or make.full), (kept, None))
    )
    factors = 1.25 * (samples[:kept] % 10 > 0).to(make.full)
    scales = make.vector() if gamma else None, factors if keep else None, make.vector() if bias else None
    places = [_places_of(selected, None, sizes.batch) for selected in chosen] if places else (None, None)
    return [residual, branch, make.vector(), make.vector(), 1e-6, *scales, *chosen, *places, make.dtype]


def _plain_example(make: Maker) -> list[Any]:
    return [make.activations(dtype=make.full), make.vector(), make.vector(), 1e-6, make.dtype]


_EXAMPLES = [
    Example(
        "drop_path",
        partial(_example, keep=True, bias=True),
        compiled=DEITS,
        bytes=lambda args: args[0].numel() * (16 + 6 * args[1].itemsize),
    ),
    Example("no bias", _example),
    Example("bias", partial(_example, bias=True), compiled=[*BASE_FP16, (BASE, torch.float32)]),
    Example("layer_scale", partial(_example, gamma=True)),
    Example("layer_scale drop_path", partial(_example, gamma=True, keep=True, bias=True)),
    Example("layer_scale, skipped samples", partial(_example, gamma=True, bias=True, skipping=True)),
    Example(
        "layer_scale drop_path, skipped samples", partial(_example, gamma=True, keep=True, skipping=True, places=True)
    ),
    Example("16-bit stream", lambda make: _example(make, bias=True, stream=make.dtype)),
]
_PLAIN_EXAMPLES = [
    Example("", _plain_example, compiled=DEITS, bytes=lambda args: args[0].numel() * (12 + 2 * args[-1].itemsize))
]
_TRITON = _op.Backend("triton", _triton.capability, triton_forward, triton_backward)
_PLAIN_TRITON = _op.Backend("triton", _triton.capability, plain_triton_forward, plain_triton_backward)
OP = _op.Op("add_layer_norm", reference, reference_backward, examples=_EXAMPLES, others=[_TRITON], native=native)
PLAIN = _op.Op("layer_norm", normalize, _plain_backward, examples=_PLAIN_EXAMPLES, others=[_PLAIN_TRITON])


def _fake_normalize(x: Tensor, samples: Tensor | None, out_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    shape = (len(x if samples is None else samples), *x.shape[1:])
    mean, rstd = (x.new_empty(*shape[:-1], 1, dtype=_op.statistics_dtype(x.dtype)) for _ in range(2))
    return x.new_empty(shape, dtype=out_dtype), mean, rstd


@OP.registered.register_fake
def _(
    residual,
    branch,
    weight,
    bias,
    eps,
    gamma,
    keep,
    branch_bias,
    branch_samples,
    norm_samples,
    branch_places,
    norm_places,
    out_dtype,
):
    return residual.new_empty(residual.shape), *_fake_normalize(residual, norm_samples, out_dtype)


@PLAIN.registered.register_fake
def _(x, weight, bias, eps, out_dtype):
    return _fake_normalize(x, None, out_dtype)


@OP.registered_backward.register_fake
def _(
    dresidual,
    dnormed,
    new_residual,
    branch,
    weight,
    mean,
    rstd,
    gamma,
    keep,
    branch_bias,
    branch_samples,
    norm_samples,
    branch_places,
    norm_places,
    branch_dtype,
):
    count = len(new_residual if branch_samples is None else branch_samples)
    dbranch = new_residual.new_empty((count, *new_residual.shape[1:]), dtype=branch_dtype)
    affine = None if dnormed is None else weight
    optional = affine, affine, gamma, branch_bias
    nothing_or = (weight.new_empty(0) if like is None else like.new_empty(like.shape) for like in optional)
    return new_residual.new_empty(new_residual.shape), dbranch, *nothing_or


@PLAIN.registered_backward.register_fake
def _(grad, x, weight, mean, rstd):
    return tuple(like.new_empty(like.shape) for like in (x, weight, weight))


def _save(ctx, inputs, output):
    _, branch, weight, _, _, *optional, _ = inputs
    new_residual, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.branch_dtype = branch.dtype
    # Without LayerScale only the dtype of the branch is wanted: no memory is kept for it.
    kept = None if optional[0] is None else branch
    ctx.save_for_backward(new_residual, kept, weight, mean, rstd, *optional)


def _differentiate(ctx, dresidual, dnormed, *_):
    saved = ctx.saved_tensors
    gamma, _, branch_bias = saved[5:8]
    grads = OP.run_backward(ctx, dresidual, dnormed, *saved, ctx.branch_dtype)
    dr, dbranch, dweight, dbias, dgamma, dbranch_bias = grads
    affine = (None, None) if dnormed is None else (dweight, dbias)
    dgamma = None if gamma is None else dgamma
    dbranch_bias = None if branch_bias is None else dbranch_bias
    return dr, dbranch, *affine, None, dgamma, None, dbranch_bias, *[None] * 5


def _save_plain(ctx, inputs, output):
    x, weight, *_ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, mean, rstd)


def _differentiate_plain(ctx, grad, *_):
    return *PLAIN.run_backward(ctx, grad, *ctx.saved_tensors), None, None


OP.differentiable(_save, _differentiate)
PLAIN.differentiable(_save_plain, _differentiate_plain)


# ---- public ----------------------------------------------------------------------------------------------------------


def add_layer_norm(
    residual: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    gamma: Tensor | None = None,
    keep: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    *,
    branch_bias: Tensor | None = None,
    branch_samples: Tensor | None = None,
    norm_samples: Tensor | None = None,
    branch_places: Tensor | None = None,
    norm_places: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream and normalise the sum.

    residual      floating `[B, ..., C]`
    branch        like residual in shape, of any floating dtype; None adds nothing: plain LayerNorm
    weight, bias  `[C]`
    eps           added to the variance, at least 0
    gamma         LayerScale `[C]`; None is 1
    keep          drop-path factor of each sample of the branch, float32 `[B]`: 0 or 1 / (1 - p); None is 1
    out_dtype     of the normalised tokens; default the autocast dtype under autocast, else residual's dtype
    branch_bias   `[C]`, the bias that the branch already contains. It changes nothing but its own gradient, which
                  is a by-product of the branch's here: make the branch with the detached bias
    branch_samples, norm_samples
                  distinct int64 `[B']`, `[B'']`: the samples that branch holds, and those to normalise; None is all.
                  This is stochastic depth that saves the work of the samples it drops (Oquab et al., "DINOv2", 2023,
                  section 5): a fixed number of samples a step instead of a Bernoulli draw for each, hence another
                  distribution than `keep`. Scale the branch by `keep`, B / B' for the kept
    branch_places, norm_places
                  int32 `[B]`: the place of every sample among `branch_samples` and `norm_samples`, -1 for those that
                  are not there. The kernels read them; None makes them here and again in backward, in three launches
                  each

    Returns (new residual, normed): `residual + keep * gamma * branch` in residual's dtype (residual itself without a
    branch), and its LayerNorm in out_dtype, `[B'', ..., C]`. Statistics are float32 (float64 for float64). Samples
    outside [0, B) raise IndexError on the CPU, RuntimeError in a compiled graph there; on a GPU the indexing asserts on
    the device.
    """
    _checks.check_number("eps", eps, 0)
    _check(residual, branch, weight, bias, gamma, keep, branch_bias, branch_samples, norm_samples)
    _check_places("branch_places", branch_places, branch_samples, residual)
    _check_places("norm_places", norm_places, norm_samples, residual)
    if out_dtype is None:
        out_dtype = _op.autocast_dtype(residual) or residual.dtype
    if branch is None:
        return residual, PLAIN(_selected(residual, norm_samples), weight, bias, eps, out_dtype)[0]
    selection = branch_samples, norm_samples, branch_places, norm_places
    return OP(residual, branch, weight, bias, eps, gamma, keep, branch_bias, *selection, out_dtype)[:2]


def _check(
    residual: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor | None,
    keep: Tensor | None,
    branch_bias: Tensor | None,
    branch_samples: Tensor | None,
    norm_samples: Tensor | None,
) -> None:
    _checks.check_floating("residual", residual)
    for name, vector in (("weight", weight), ("bias", bias), ("gamma", gamma), ("branch_bias", branch_bias)):
        if vector is not None:
            _checks.check_shape(name, vector, residual.shape[-1:], "[C], C the last dimension of residual,")
            _checks.check_device(name, vector, residual, "residual")
    for name, samples in (("branch_samples", branch_samples), ("norm_samples", norm_samples)):
        _check_samples(name, samples, len(residual))
    if branch is None:
        scales = {"gamma": gamma, "keep": keep, "branch_bias": branch_bias, "branch_samples": branch_samples}
        for name, value in scales.items():
            if value is not None:
                raise ValueError(f"{name} belongs to the branch, but branch is None; leave it out")
        return
    _checks.check_floating("branch", branch)
    _checks.check_device("branch", branch, residual, "residual")
    if branch_samples is None:
        _checks.check_shape("branch", branch, residual.shape, "like residual")
    else:
        shape = (len(branch_samples), *residual.shape[1:])
        _checks.check_shape("branch", branch, shape, "[B', ...] for the B' branch_samples, else like residual")
    if keep is not None:
        _checks.check_floating("keep", keep)
        _checks.check_device("keep", keep, residual, "residual")
        _checks.check_shape("keep", keep, branch.shape[:1], "[B], B the first dimension of branch,")


def _check_samples(name: str, samples: Tensor | None, batch: int) -> None:
    if samples is None:
        return
    _checks.check_dtype(name, samples, torch.int64)
    if samples.dim() != 1:
        raise ValueError(f"{name} has shape {list(samples.shape)}, but must be [B']")
    _checks.check_index(name, samples, batch)
    if _checks.can_look_at(samples) and len(samples.unique()) < len(samples):
        raise ValueError(f"{name} holds a sample more than once, but must be distinct")


def _check_places(name: str, places: Tensor | None, samples: Tensor | None, residual: Tensor) -> None:
    if places is None:
        return
    if samples is None:
        raise ValueError(f"{name} is where samples stand among those selected, but none are: leave it out")
    _checks.check_dtype(name, places, torch.int32)
    _checks.check_device(name, places, residual, "residual")
    _checks.check_shape(name, places, residual.shape[:1], "[B], B the first dimension of residual,")
    if _checks.can_look_at(places) and not torch.equal(places, _places_of(samples, None, len(places))):
        raise ValueError(f"{name} does not say where the samples stand")
