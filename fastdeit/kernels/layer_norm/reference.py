"""add_layer_norm and layer_norm in PyTorch: what their kernels are held against. `op.py` has the formulas."""

from typing import Any

import torch
from torch import Tensor

from fastdeit.kernels import _derivatives, _op, _rows


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


def plain_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`normalize_backward` with the gradient of x in its dtype: the backward of `normalize`."""
    dx, dweight, dbias = normalize_backward(grad, x, weight, mean, rstd)
    return dx.to(x.dtype), dweight, dbias


def selected(tensor: Tensor, samples: Tensor | None) -> Tensor:
    """The samples `[B']` of `[B, ...]`; None is all."""
    return tensor if samples is None else tensor[samples]


def empty_of_selected(tensor: Tensor, samples: Tensor | None, dtype: torch.dtype) -> Tensor:
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
    held = selected(residual, branch_samples)
    total = held + branch if scale is None else torch.addcmul(held, branch, scale)
    new_residual = total.to(residual.dtype)
    if branch_samples is not None:
        new_residual = residual.index_copy(0, branch_samples, new_residual)
    return new_residual, *normalize(selected(new_residual, norm_samples), weight, bias, eps, out_dtype)


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
        x = selected(new_residual, norm_samples)
        all_samples, dweight, dbias = normalize_backward(dnormed, x, weight, mean, rstd)
        if norm_samples is not None:
            before = torch.zeros_like(new_residual) if dresidual is None else dresidual
            all_samples = before.to(all_samples.dtype).index_add(0, norm_samples, all_samples)
        elif dresidual is not None:
            all_samples = dresidual + all_samples
    dr = selected(all_samples, branch_samples)
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
