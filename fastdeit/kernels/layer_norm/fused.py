"""LayerNorm's kernels in Triton, one pass over the rows each, with all that `op.py` adds to LayerNorm.

Each of a fixed number of programs on every SM of the backward adds up its share of the four column sums, and their
partial sums are added in a fixed order. So the result does not depend on timing, and of the card on its number of SMs
alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdeit.kernels import _rows, _triton
from fastdeit.kernels.layer_norm.reference import empty_of_selected, reference_backward

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


def places_of(samples: Tensor | None, places: Tensor | None, batch: int) -> Tensor | None:
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
    normed = empty_of_selected(residual, norm_samples, out_dtype)
    *shape, width = normed.shape
    mean = residual.new_empty((*shape, 1), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    rows, tokens = _rows.rows_and_tokens(residual)
    batch, tile = residual.shape[0], _rows.tile(width)
    slots = places_of(branch_samples, branch_places, batch), places_of(norm_samples, norm_places, batch)
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
    dbranch = None if branch_dtype is None else empty_of_selected(new_residual, branch_samples, branch_dtype)
    rows, tokens = _rows.rows_and_tokens(new_residual)
    batch, *_, width = new_residual.shape
    tile = _rows.tile(width)
    grid = (min(_triton.cdiv(rows, tile["ROWS"]), _PROGRAMS * _triton.processors(dr.device)),)
    sums = 4 if gamma is not None else 3 if branch_bias is not None else 2
    partial = torch.empty(grid[0], sums, width, dtype=torch.float32, device=dr.device)
    slots = places_of(branch_samples, branch_places, batch), places_of(norm_samples, norm_places, batch)
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
