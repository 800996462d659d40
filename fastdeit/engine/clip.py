"""Adaptive gradient clipping: no unit's gradient is longer than a share of the unit's weights.

Brock et al., "High-performance large-scale image recognition without normalization", ICML 2021.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_SHORTEST_WEIGHTS = 1e-3
_SHORTEST_GRADIENT = 1e-6


@dataclass(frozen=True)
class UnitClipping:
    """Clips the gradient of each unit to `limit` times the norm of its weights, as timm's `adaptive_clip_grad` does.

    A unit is what makes one output: a row of a matrix, a filter of a convolution; of a 1-D parameter all of it. Weights
    count as at least 1e-3 long, or those that begin at zero would stay there.

    limit   largest ratio of the two norms, such as 0.01
    exempt  names of parameters, or of modules above them, that are left alone: the heads, as in the paper
    """

    limit: float
    exempt: Sequence[str] = ()

    @torch.no_grad()
    def apply(self, params: Mapping[str, Tensor], unscale: Tensor) -> None:
        """Clip the gradients of `params` in place. `unscale`: scalar that makes true gradients of them.

        A unit with a gradient that is not finite keeps one that is not finite. The device is not waited for.
        """
        clipped = [p for name, p in params.items() if not self._is_exempt(name)]
        if not clipped:
            return
        weights, gradients = ([_unit_norms(tensor) for tensor in tensors] for tensors in (clipped, _grads(clipped)))
        most = torch.cat(weights).clamp(min=_SHORTEST_WEIGHTS) * self.limit
        norms = torch.cat(gradients) * unscale
        # Not a clamp of the ratio: where nothing is clipped no bit may change.
        shares = torch.where(norms < most, 1.0, most / norms.clamp(min=_SHORTEST_GRADIENT))
        for p, share in zip(clipped, shares.split([len(norm) for norm in weights]), strict=True):
            p.grad.mul_(share.view(-1, *[1] * (p.ndim - 1)) if p.ndim > 1 else share.view(()))

    def _is_exempt(self, name: str) -> bool:
        return any(name == own or name.startswith(f"{own}.") for own in self.exempt)


def _grads(params: Sequence[Tensor]) -> list[Tensor]:
    return [p.grad for p in params]


def _unit_norms(tensor: Tensor) -> Tensor:
    """Norms of the units of a parameter or gradient, float32 `[units]`."""
    units = tensor.flatten(1) if tensor.ndim > 1 else tensor.reshape(1, -1)
    return torch.linalg.vector_norm(units.float(), dim=1)
