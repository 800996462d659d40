"""Residual addition, LayerScale, drop-path and LayerNorm in one op.

    r = residual + keep * gamma * branch                         new residual stream, in residual's dtype
    x = (r - mean(r)) * rstd(r),  rstd = (var(r) + eps)**-0.5    statistics over C, biased variance, float32
    normed = x * weight + bias                                   in out_dtype

Backward, with g = dnormed * weight and averages over C:

    dr = dr_out + rstd * (g - mean(g) - x * mean(g * x))         also the gradient of residual
    dbranch = keep * gamma * dr        dgamma = sum_BN(keep * branch * dr)
    dweight = sum_BN(dnormed * x)      dbias = sum_BN(dnormed)

residual, branch, normed are [..., C]; weight, bias, gamma [C]; keep [B]. Bytes moved at best per element, float32 residual and
16-bit branch: forward reads 6 and writes 6; backward reads 10 (and 2 more for dgamma) and writes 6.
"""

import torch
from torch import Tensor

from fastdeit.kernels import _op


def normalize(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype) -> tuple[Tensor, ...]:
    """(normed in `out_dtype`, mean, rstd), computed in float32 (float64 for float64); mean and rstd are `[..., 1]`."""
    compute = _op.statistics_dtype(x.dtype)
    normed, mean, rstd = torch.native_layer_norm(
        x.to(compute), weight.shape, weight.to(compute), bias.to(compute), eps
    )
    return normed.to(out_dtype), mean, rstd


def normalize_backward(
    grad: Tensor, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x (in the statistics' dtype), weight and bias (in weight's dtype)."""
    grad = grad.to(mean.dtype)
    hat = (x - mean) * rstd
    g = grad * weight
    dx = rstd * (g - g.mean(-1, keepdim=True) - hat * (g * hat).mean(-1, keepdim=True))
    rows = tuple(range(x.dim() - 1))
    return dx, (grad * hat).sum(rows).to(weight.dtype), grad.sum(rows).to(weight.dtype)


def _branch_scale(residual: Tensor, gamma: Tensor | None, keep: Tensor | None) -> Tensor | None:
    """`keep * gamma`, shaped to multiply the branch; None when both are None."""
    if keep is None:
        return gamma
    keep = keep.reshape(-1, *[1] * (residual.dim() - 1))
    return keep if gamma is None else keep * gamma


def _add(residual: Tensor, branch: Tensor, gamma: Tensor | None, keep: Tensor | None) -> Tensor:
    scale = _branch_scale(residual, gamma, keep)
    total = residual + branch if scale is None else torch.addcmul(residual, branch, scale)
    return total.to(residual.dtype)


def reference(
    residual: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    gamma: Tensor | None,
    keep: Tensor | None,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """(new residual, normed) as in the module's formula."""
    new_residual = residual if branch is None else _add(residual, branch, gamma, keep)
    return new_residual, normalize(new_residual, weight, bias, eps, out_dtype)[0]


def reference_forward(residual, branch, weight, bias, eps, gamma, keep, out_dtype) -> tuple[Tensor, ...]:
    """(new residual, normed, mean, rstd): what `reference` returns, and the statistics its backward needs."""
    new_residual = _add(residual, branch, gamma, keep)
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
) -> tuple[Tensor, ...]:
    """Gradients of residual, branch, weight, bias and gamma (empty when there is none)."""
    dx, dweight, dbias = normalize_backward(dnormed, new_residual, weight, mean, rstd)
    dr = dresidual + dx
    scale = _branch_scale(dr, gamma, keep)
    dbranch = dr if scale is None else dr * scale
    if gamma is None:
        dgamma = weight.new_empty(0)
    else:
        kept = _branch_scale(dr, None, keep)
        scaled = branch * dr if kept is None else branch * dr * kept
        dgamma = scaled.sum(tuple(range(dr.dim() - 1))).to(gamma.dtype)
    return dr.to(new_residual.dtype), dbranch.to(branch.dtype), dweight, dbias, dgamma


OP = _op.Op("add_layer_norm", _op.reference_backend(reference_forward, reference_backward))
PLAIN = _op.Op("layer_norm", _op.reference_backend(normalize, normalize_backward))


def _own(tensors: tuple[Tensor, ...], *inputs: Tensor | None) -> tuple[Tensor, ...]:
    """Contiguous tensors that share no memory with each other or the inputs, as an op's results must be."""
    taken = {tensor.data_ptr() for tensor in inputs if tensor is not None}
    result = []
    for tensor in tensors:
        tensor = tensor.contiguous()
        result.append(tensor.clone() if tensor.data_ptr() in taken else tensor)
        taken.add(tensor.data_ptr())
    return tuple(result)
