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
10 (and 2 more for dgamma) and writes 6.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastdeit.kernels import _checks, _op, _triton
from fastdeit.kernels._example import BASE, BASE_FP16, DEITS, Example, Maker
from fastdeit.kernels.layer_norm.fused import (
    places_of,
    plain_triton_backward,
    plain_triton_forward,
    triton_backward,
    triton_forward,
)
from fastdeit.kernels.layer_norm.reference import (
    native,
    normalize,
    plain_backward,
    reference,
    reference_backward,
    selected,
)

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
    places = [places_of(some, None, sizes.batch) for some in chosen] if places else (None, None)
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
PLAIN = _op.Op("layer_norm", normalize, plain_backward, examples=_PLAIN_EXAMPLES, others=[_PLAIN_TRITON])


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
        return residual, PLAIN(selected(residual, norm_samples), weight, bias, eps, out_dtype)[0]
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
    if _checks.can_look_at(places) and not torch.equal(places, places_of(samples, None, len(places))):
        raise ValueError(f"{name} does not say where the samples stand")
