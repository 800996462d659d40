"""Residual addition, LayerScale, drop-path and LayerNorm in one op.

    r = residual + keep * gamma * branch                         new residual stream, in residual's dtype
    x = (r - mean(r)) * rstd(r),  rstd = (var(r) + eps)**-0.5    statistics over C, biased variance, float32
    normed = x * weight + bias                                   in out_dtype

Backward, with g = dnormed * weight and averages over C:

    dr = dr_out + rstd * (g - mean(g) - x * mean(g * x))         also the gradient of residual
    dbranch = keep * gamma * dr        dgamma = sum_BN(keep * branch * dr)
    dweight = sum_BN(dnormed * x)      dbias = sum_BN(dnormed)

residual, branch, normed are [..., C]; weight, bias, gamma [C]; keep [B]. Bytes moved at best per element of a float32
residual and a 16-bit branch: forward reads 6 and writes 6; backward reads 10 (and 2 more for dgamma) and writes 6.
"""

import torch
from torch import Tensor

from fastdeit.kernels import _op


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


def _branch_scale(residual: Tensor, gamma: Tensor | None, keep: Tensor | None) -> Tensor | None:
    """`keep * gamma`, shaped to multiply the branch; None when both are None."""
    if keep is None:
        return gamma
    keep = keep.reshape(-1, *[1] * (residual.dim() - 1))
    return keep if gamma is None else keep * gamma


def reference(
    residual: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    gamma: Tensor | None,
    keep: Tensor | None,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(new residual, normed, mean, rstd) as in the module's formula; the statistics, `[..., 1]`, are for backward."""
    scale = _branch_scale(residual, gamma, keep)
    total = residual + branch if scale is None else torch.addcmul(residual, branch, scale)
    new_residual = total.to(residual.dtype)
    return new_residual, *normalize(new_residual, weight, bias, eps, out_dtype)


def reference_backward(
    dresidual: Tensor,
    dnormed: Tensor,
    new_residual: Tensor,
    branch: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    gamma: Tensor | None,
    keep: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of residual, branch, weight, bias and gamma (empty when there is none)."""
    dx, dweight, dbias = normalize_backward(dnormed, new_residual, weight, mean, rstd)
    dr = dresidual + dx
    scale = _branch_scale(dr, gamma, keep)
    # An op's results must not share memory, hence a copy where the branch's gradient is the residual's.
    dbranch = dr.to(branch.dtype, copy=True) if scale is None else (dr * scale).to(branch.dtype)
    if gamma is None:
        dgamma = weight.new_empty(0)
    else:
        kept = _branch_scale(dr, None, keep)
        scaled = branch * dr if kept is None else branch * dr * kept
        dgamma = scaled.sum(tuple(range(dr.dim() - 1))).to(gamma.dtype)
    return dr.to(new_residual.dtype), dbranch, dweight, dbias, dgamma


OP = _op.Op("add_layer_norm", reference, reference_backward)
PLAIN = _op.Op("layer_norm", normalize, _plain_backward)


def _fake_normalize(x: Tensor, out_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty(*x.shape[:-1], 1, dtype=_op.statistics_dtype(x.dtype)) for _ in range(2))
    return x.new_empty(x.shape, dtype=out_dtype), mean, rstd


@OP.registered.register_fake
def _(residual, branch, weight, bias, eps, gamma, keep, out_dtype):
    return residual.new_empty(residual.shape), *_fake_normalize(residual, out_dtype)


@PLAIN.registered.register_fake
def _(x, weight, bias, eps, out_dtype):
    return _fake_normalize(x, out_dtype)


@OP.registered_backward.register_fake
def _(dresidual, dnormed, new_residual, branch, weight, mean, rstd, gamma, keep):
    dgamma = weight.new_empty(0) if gamma is None else gamma.new_empty(gamma.shape)
    return *(like.new_empty(like.shape) for like in (new_residual, branch, weight, weight)), dgamma


@PLAIN.registered_backward.register_fake
def _(grad, x, weight, mean, rstd):
    return tuple(like.new_empty(like.shape) for like in (x, weight, weight))


def _save(ctx, inputs, output):
    _, branch, weight, _, _, gamma, keep, _ = inputs
    new_residual, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(new_residual, branch, weight, mean, rstd, gamma, keep)


def _differentiate(ctx, dresidual, dnormed, *_):
    gamma = ctx.saved_tensors[5]
    *grads, dgamma = OP.registered_backward(dresidual, dnormed, *ctx.saved_tensors)
    return *grads, None, None if gamma is None else dgamma, None, None


def _save_plain(ctx, inputs, output):
    x, weight, *_ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, mean, rstd)


def _differentiate_plain(ctx, grad, *_):
    return *PLAIN.registered_backward(grad, *ctx.saved_tensors), None, None


OP.registered.register_autograd(_differentiate, setup_context=_save)
PLAIN.registered.register_autograd(_differentiate_plain, setup_context=_save_plain)


def add_layer_norm(
    residual: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-6,
    gamma: Tensor | None = None,
    keep: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Add a branch to the residual stream and normalise the sum.

    residual      floating `[..., C]`
    branch        like residual in shape, of any floating dtype; None adds nothing: plain LayerNorm
    weight, bias  `[C]`
    eps           added to the variance
    gamma         LayerScale `[C]`; None is 1
    keep          drop-path factor of each sample, float32 `[B]`, B = residual.shape[0]: 0 or 1 / (1 - p); None is 1
    out_dtype     of the normalised tokens; default the autocast dtype under autocast, else residual's dtype

    Returns (new residual, normed): `residual + keep * gamma * branch` in residual's dtype (residual itself without a
    branch), and its LayerNorm in out_dtype. Statistics are float32 (float64 for float64).
    """
    _check(residual, branch, weight, bias, gamma, keep)
    if out_dtype is None:
        out_dtype = _op.autocast_dtype(residual) or residual.dtype
    if branch is None:
        return residual, PLAIN(residual, weight, bias, eps, out_dtype)[0]
    return OP(residual, branch, weight, bias, eps, gamma, keep, out_dtype)[:2]


def _check(
    residual: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    gamma: Tensor | None,
    keep: Tensor | None,
) -> None:
    _op.check_floating("residual", residual)
    for name, vector in (("weight", weight), ("bias", bias), ("gamma", gamma)):
        if vector is not None:
            _op.check_shape(name, vector, residual.shape[-1:], "[C], C the last dimension of residual,")
    if branch is None:
        if gamma is not None or keep is not None:
            raise ValueError(
                f"{'keep' if gamma is None else 'gamma'} scales the branch, but branch is None; leave it out"
            )
        return
    _op.check_floating("branch", branch)
    _op.check_shape("branch", branch, residual.shape, "like residual")
    if keep is not None:
        _op.check_floating("keep", keep)
        _op.check_shape("keep", keep, residual.shape[:1], "[B], B the first dimension of residual,")
