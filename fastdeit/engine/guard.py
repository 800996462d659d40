"""The guard of a step: loss scale, global norm, clipping, and the decision to skip, all on the device.

After the gradient reduction the norm is the same on every process, so the decision is, too; where each process holds a
part of the gradients, one number is summed over all for it. The host looks at the counters only when it logs or saves.
"""

import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastdeit import kernels
from fastdeit.engine.fit import check_fit

OnSpike = Literal["warn", "skip", "rollback"]

_FIRST_SCALE, _GROW_AFTER = 2.0**16, 2000
_LEAST_SCALE, _LARGEST_SCALE = 1.0, 2.0**32
"""A scale that halved without end would reach zero, and one that doubled without end infinity; neither comes back."""
_SKIPS_IN_A_ROW = {"fp16": 24, "bf16": 3, "fp32": 3}
SPIKE = 10.0
"""A norm of more than this many times the usual one is a spike."""
_KNOWN_AFTER, _USUAL_OVER = 8, 32
"""Finite steps before a norm is compared with the usual one, and the number of them that this is the mean of."""


class Verdict(NamedTuple):
    """What the guard says of the gradients of a step: scalar tensors on their device.

    factor  float32: what an update multiplies the gradients by, for unscaling and clipping
    skip    bool: some gradient is not finite, or they are a spike that is to be skipped, so nothing may change
    norm    float32: norm of the unscaled gradients of all parameters together, before clipping
    """

    factor: Tensor
    skip: Tensor
    norm: Tensor


class Spikes(NamedTuple):
    """Spikes of the gradients: how many there were, and the number of the last one's step, counted from 1 since this
    guard was made."""

    count: int
    last: int


class Guard:
    """Loss scale (fp16 only), clip coefficient and skip decision of each step.

    fp16's scale halves on overflow and doubles after 2,000 good steps, as torch's GradScaler does, but stays between 1
    and 2**32. `limit` is the number of steps in a row whose gradients are not finite at which the guard trips, and
    training must stop. fp16 may skip more, since a first scale that is too high costs one step a halving.

    A norm above 10 times the mean over the last 32 or so is a spike. It enters that mean as 10 times the mean, so that
    norms which stay high are the usual ones after a few steps. `on_spike` "warn" counts spikes, "skip" and "rollback"
    skip their steps as well.

    `norm` is the 2-norm of all gradients, a float32 scalar that is the same on all processes; it is given those that
    this process holds.

    A row of skipped steps is no part of a checkpoint: a run that is resumed begins to count anew, so that it can get
    past what it was stopped for.
    """

    def __init__(
        self,
        precision: str,
        clip_grad: float | None,
        device: torch.device,
        on_spike: OnSpike = "warn",
        norm: Callable[[list[Tensor]], Tensor] = kernels.global_norm,
    ) -> None:
        self._norm = norm
        self.scaled = precision == "fp16"
        self.clip_grad = clip_grad
        self.limit = _SKIPS_IN_A_ROW[precision]
        self.skips_spikes = on_spike != "warn"
        self.scale = torch.full((), _FIRST_SCALE if self.scaled else 1.0, device=device)
        self.good = torch.zeros((), device=device)
        self.skipped = torch.zeros((), device=device)
        self.in_a_row = torch.zeros((), device=device)
        self.usual = torch.zeros((), device=device)
        self.seen = torch.zeros((), device=device)
        self.spikes = torch.zeros((), device=device)
        self.judged = torch.zeros((), dtype=torch.int64, device=device)
        self.spiked = torch.zeros((), dtype=torch.int64, device=device)

    @torch.no_grad()
    def judge(self, gradients: list[Tensor]) -> Verdict:
        """The verdict on this step, for all its parameter groups, and the counters moved on."""
        norm = self._norm(gradients)
        unscale = self.scale
        if self.scaled:
            unscale = 1 / self.scale
            norm = norm * unscale
        finite = norm < math.inf  # NaN is not, and a norm is never negative
        bad = ~finite
        factor = unscale
        if self.clip_grad is not None:
            factor = unscale * (self.clip_grad / (norm + 1e-6)).clamp(max=1.0)
        self.judged += 1
        self._count(bad)
        spike = self._compare(norm, finite)
        skip = bad | spike if self.skips_spikes else bad
        self.skipped += skip
        if self.scaled:
            self._rescale(bad)
        return Verdict(factor, skip, norm)

    def _count(self, bad: Tensor) -> None:
        self.in_a_row += 1
        self.in_a_row *= bad | (self.in_a_row > self.limit)  # a guard that has tripped counts on, whatever comes

    def _compare(self, norm: Tensor, finite: Tensor) -> Tensor:
        """Whether this norm is a spike; it becomes a part of the usual one."""
        most = torch.where(self.seen < _KNOWN_AFTER, math.inf, self.usual * SPIKE)
        spike = (norm > most) & finite
        self.spikes += spike
        torch.where(spike, self.judged, self.spiked, out=self.spiked)
        self.seen += finite
        share = 1 / self.seen.clamp(1, _USUAL_OVER)
        usual = torch.lerp(self.usual, torch.minimum(norm, most), share)
        torch.where(finite, usual, self.usual, out=self.usual)
        return spike

    def _rescale(self, overflow: Tensor) -> None:
        good = torch.where(overflow, torch.zeros_like(self.good), self.good + 1)
        grow = good >= _GROW_AFTER
        scale = self.scale * torch.where(overflow, 0.5, torch.where(grow, 2.0, 1.0))
        torch.clamp(scale, _LEAST_SCALE, _LARGEST_SCALE, out=self.scale)
        self.good.copy_(torch.where(grow, torch.zeros_like(good), good))

    def in_row(self) -> bool:
        """Whether the gradients of the last step were not finite, or the guard has tripped. Reads the device."""
        return self.in_a_row.item() > 0

    def trip(self) -> int | None:
        """The number of the step, counted from 1 since this guard was made, at which it tripped; None if it has not.

        The `limit - 1` steps before were skipped as well. Reads the device: call it when logging.
        """
        since = int(self.in_a_row.item()) - self.limit
        return self.judged.item() - since if since >= 0 else None

    def noticed(self) -> Spikes:
        """The spikes of the run so far. Reads the device: call it when logging."""
        return Spikes(int(self.spikes.item()), int(self.spiked.item()))

    def state_dict(self) -> dict[str, Tensor]:
        """Counters, the usual norm, and the loss scale where there is one, by name, as tensors `[1]`."""
        names = ("skipped", "spikes", "usual", "seen", *(("scale", "good") if self.scaled else ()))
        return {name: getattr(self, name).reshape(1) for name in names}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` gave, in place. A loss scale passes between runs in fp16 alone: a run that was in
        another precision begins with a fresh one.

        Raises FitError where names, shapes or dtypes are others.
        """
        mine, theirs = self.state_dict(), dict(state)
        if self.scaled != bool(theirs.keys() & {"scale", "good"}):
            mine, theirs = (_without_scale(group) for group in (mine, theirs))
        check_fit("engine", theirs, mine)
        for name, tensor in mine.items():
            tensor.copy_(theirs[name])


def _without_scale(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if name not in ("scale", "good")}
