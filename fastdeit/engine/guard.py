"""The guard of a step: loss scale, global norm, clipping, and the decision to skip, all on the device.

After the gradient reduction the norm is the same on every process, so the decision is, too, without a collective. The
host looks at the counters only when it logs.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastdeit import kernels

_FIRST_SCALE, _GROW_AFTER = 2.0**16, 2000
_SKIPS_IN_A_ROW = {"fp16": 24, "bf16": 3, "fp32": 3}


class Verdict(NamedTuple):
    """What the guard says of the gradients of a step: scalar tensors on their device.

    factor  float32: what an update multiplies the gradients by, for unscaling and clipping
    skip    bool: some gradient is not finite, so nothing may change
    norm    float32: norm of the unscaled gradients of all parameters together, before clipping
    """

    factor: Tensor
    skip: Tensor
    norm: Tensor


class Guard:
    """Loss scale (fp16 only), clip coefficient and skip decision of each step.

    fp16's scale halves on overflow and doubles after 2,000 good steps, as torch's GradScaler does. `limit` is the
    number of skipped steps in a row at which the guard trips, and training must stop. fp16 may skip more, since a
    first scale that is too high costs one step a halving.

    A row of skipped steps is no part of a checkpoint: a run that is resumed begins to count anew, so that it can get
    past what it was stopped for.
    """

    def __init__(self, precision: str, clip_grad: float | None, device: torch.device) -> None:
        self.scaled = precision == "fp16"
        self.clip_grad = clip_grad
        self.limit = _SKIPS_IN_A_ROW[precision]
        self.scale = torch.full((), _FIRST_SCALE if self.scaled else 1.0, device=device)
        self.good = torch.zeros((), device=device)
        self.skipped = torch.zeros((), device=device)
        self.in_a_row = torch.zeros((), device=device)
        self.judged = torch.zeros((), dtype=torch.int64, device=device)
        self.tripped = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def judge(self, gradients: list[Tensor]) -> Verdict:
        """The verdict on this step, for all its parameter groups, and the counters moved on."""
        unscale = 1 / self.scale
        norm = kernels.global_norm(gradients) * unscale
        bad = ~torch.isfinite(norm)
        factor = unscale
        if self.clip_grad is not None:
            factor = unscale * (self.clip_grad / (norm + 1e-6)).clamp(max=1.0)
        self._count(bad)
        return Verdict(factor, bad, norm)

    def _count(self, bad: Tensor) -> None:
        self.skipped += bad
        self.in_a_row.copy_(torch.where(bad, self.in_a_row + 1, torch.zeros_like(self.in_a_row)))
        self.judged += 1
        trips = (self.in_a_row >= self.limit) & (self.tripped == 0)
        self.tripped.copy_(torch.where(trips, self.judged, self.tripped))
        if self.scaled:
            good = torch.where(bad, torch.zeros_like(self.good), self.good + 1)
            grow = good >= _GROW_AFTER
            self.scale.mul_(torch.where(bad, 0.5, torch.where(grow, 2.0, 1.0)))
            self.good.copy_(torch.where(grow, torch.zeros_like(good), good))

    def in_row(self) -> bool:
        """Whether the last step was skipped. Reads the device."""
        return self.in_a_row.item() > 0

    def trip(self) -> int | None:
        """The number of the step, counted from 1 since this guard was made, at which it tripped; None if it has not.

        The `limit - 1` steps before were skipped as well. Reads the device: call it when logging.
        """
        return self.tripped.item() or None

    def state_dict(self) -> dict[str, Tensor]:
        """The number of skipped steps, and the loss scale where there is one, by name, as tensors `[1]`."""
        names = ("skipped", "scale", "good") if self.scaled else ("skipped",)
        return {name: getattr(self, name).reshape(1) for name in names}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave, in place. A loss scale passes between runs in fp16 alone."""
        for name, tensor in self.state_dict().items():
            if name in state:
                tensor.copy_(state[name])
