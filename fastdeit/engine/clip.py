"""Adaptive gradient clipping: no unit's gradient is longer than a share of the unit's weights.

Brock et al., "High-performance large-scale image recognition without normalization", ICML 2021.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdeit.engine import shards

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
    def apply(
        self, params: Mapping[str, Tensor], unscale: Tensor, total: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """Clip the gradients of `params` in place. `unscale`: scalar that makes true gradients of them. `total`: as of
        `optim.Update`; the rows of a part are whole units.

        A unit with a gradient that is not finite keeps one that is not finite. The device is not waited for.
        """
        named = [p for name, p in params.items() if not self._is_exempt(name)]
        if not named:
            return
        clipped, grads = [shards.local(p) for p in named], [shards.local(p.grad) for p in named]
        weights, gradients = (_unit_norms(tensors, total) for tensors in (clipped, grads))
        most = torch.cat(weights).clamp(min=_SHORTEST_WEIGHTS) * self.limit
        norms = torch.cat(gradients) * unscale
        # Not a clamp of the ratio: where nothing is clipped no bit may change.
        shares = torch.where(norms < most, 1.0, most / norms.clamp(min=_SHORTEST_GRADIENT))
        for grad, share in zip(grads, shares.split([len(norm) for norm in weights]), strict=True):
            grad.mul_(share.view(-1, *[1] * (grad.ndim - 1)) if grad.ndim > 1 else share.view(()))

    def _is_exempt(self, name: str) -> bool:
        return any(name == own or name.startswith(f"{own}.") for own in self.exempt)


def _unit_norms(tensors: Sequence[Tensor], total: Callable[[Tensor], Tensor] | None) -> list[Tensor]:
    """Norms of the units of each parameter or gradient, float32 `[units]`."""
    units = [tensor.flatten(1) if tensor.ndim > 1 else tensor.reshape(1, -1) for tensor in tensors]
    norms = [torch.linalg.vector_norm(rows.float(), dim=1) for rows in units]
    split = [] if total is None else [place for place, tensor in enumerate(tensors) if tensor.ndim <= 1]
    if split:
        whole = total(torch.cat([norms[place] for place in split]).square()).sqrt()
        for place, norm in zip(split, whole.split(1), strict=True):
            norms[place] = norm
    return norms
