"""Muon (Keller Jordan, 2024): momentum, brought close to the nearest orthogonal matrix before it is applied.

    b = momentum b + (1 - momentum) g
    o = orthogonalised(momentum b + (1 - momentum) g)           Nesterov's momentum
    p = (1 - lr weight_decay) p - lr 0.2 sqrt(max(rows, columns)) o

The last factor gives the step the root mean square of an AdamW step (Liu et al., "Muon is scalable for LLM training",
2025), so that both can share a learning rate. All of this is `torch.optim.Muon` (torch 2.9 and newer) with
`adjust_lr_fn="match_rms_adamw"`. Here matrices of one shape are multiplied in one batch, no value is read from the
device, and a skipped step changes nothing.
"""

from math import sqrt

import torch
from torch import Tensor

from fastdeit.engine.optim import Update

_COEFFICIENTS = 3.4445, -4.7750, 2.0315
"""Of the quintic, as its author tuned them: steep at 0, so that five iterations bring every singular value from
0.002 to 1 into [0.68, 1.21]."""
_ITERATIONS = 5
_SMALLEST_NORM = 1e-7


def orthogonalised(matrices: Tensor) -> Tensor:
    """`[n, rows, columns]` with all singular values brought near 1, by five Newton-Schulz iterations.

    In the dtype of `matrices`. With x = u s v, an iteration makes u (a s + b s**3 + c s**5) v of it.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    # The Frobenius norm is no less than the largest singular value, so all of them are at most 1.
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=_SMALLEST_NORM)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def muon_update(lists: Update, momentum: float) -> None:
    """One Muon step in place for parameters that are all 2-D; `lists.state` is their momentum alone."""
    (buffers,) = lists.state
    skip = lists.verdict.skip
    by_shape: dict[torch.Size, list[int]] = {}
    for index, parameter in enumerate(lists.params):
        by_shape.setdefault(parameter.shape, []).append(index)
    for shape, indices in by_shape.items():
        params, momenta = ([tensors[i] for i in indices] for tensors in (lists.params, buffers))
        p, b = torch.stack(params), torch.stack(momenta)
        g = torch.stack([lists.grads[i] for i in indices]).to(p.dtype) * lists.verdict.factor
        new_b = b.lerp(g, 1 - momentum)
        update = orthogonalised(g.lerp(new_b, momentum).to(_product_dtype(p.device))).to(p.dtype)
        new_p = p * (1 - lists.lr * lists.weight_decay) - update * (lists.lr * 0.2 * sqrt(max(shape)))
        for old, new in ((params, torch.where(skip, p, new_p)), (momenta, torch.where(skip, b, new_b))):
            torch._foreach_copy_(old, list(new.unbind()))
    lists.step.add_(torch.where(skip, 0.0, 1.0))
    if lists.ema is not None:
        for average, parameter in zip(lists.ema, lists.params, strict=True):
            average.copy_(torch.where(skip, average, average.lerp(parameter, 1 - lists.ema_decay)))


def _product_dtype(device: torch.device) -> torch.dtype:
    """bfloat16, as exact as the iterations need it; float32 on cards before Ampere, which have no bfloat16."""
    old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    return torch.float32 if old else torch.bfloat16
