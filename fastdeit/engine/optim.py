"""The contract of optimizers: parameter groups in, one fused update a group, state by the names of the parameters.

An optimizer is a subclass of `Optimizer` that says which tensors it keeps for a parameter and which op updates a list
of them. Everything else is here: groups and their factors, the count of updates, phases of training in which other
parameters are trained, and state for a checkpoint. `groups.py` says what a group is, `optimizers.py` has the optimizers
that fastdeit brings.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fastdeit.engine import shards
from fastdeit.engine.fit import check_fit
from fastdeit.engine.groups import GradientError, ParamGroup, check
from fastdeit.engine.guard import Verdict
from fastdeit.engine.options import OptimizerOptions


@dataclass(frozen=True)
class Update:
    """What an optimizer's op takes for one list of parameters. All lists have one order; tensors stay on the device.

    params       float32 or float64 parameters, to be changed in place
    grads        their gradients, of any floating dtype, which are to be multiplied by `verdict.factor`
    state        one list for each name that `Optimizer.states_of` has for them, like params, to be changed in place
    step         float32 scalar: updates of these parameters so far, to be incremented in place; None for an optimizer
                 that does not count
    lr           the learning rate of this list: a float, or a float64 scalar tensor
    weight_decay the weight decay of this list
    matrix       whether the parameters are those of a `ParamGroup.matrix`
    verdict      factor on the gradients, skip flag (a bool scalar tensor: true means that nothing may change), and the
                 norm of the gradients of all parameters of the optimizer, float32 scalar, before clipping
    ema          running averages like params, to follow them in the same pass; None for no average
    ema_decay    `ema = ema_decay * ema + (1 - ema_decay) * param` after the update
    total        sums a tensor over all processes, in place, where each holds a part of every parameter, some of its
                 rows or none; None where each has all of them
    """

    params: list[Tensor]
    grads: list[Tensor]
    state: list[list[Tensor]]
    step: Tensor | None
    lr: float | Tensor
    weight_decay: float
    matrix: bool
    verdict: Verdict
    ema: list[Tensor] | None
    ema_decay: float
    total: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class _Part:
    """Parameters of a group that have been updated equally often, and that count (None where nothing counts)."""

    group: ParamGroup
    names: list[str]
    step: Tensor | None


class Optimizer:
    """Base class of optimizers. A subclass sets the three class attributes and overrides `update`.

    `params` are the trained parameters by name, `state` has a dict of tensors like them for each name of
    `state_names`, zeros before the first update; `states_of` may leave some out.

    Raises GroupError for groups that make no sense (`groups.check`).
    """

    Options: ClassVar[type[OptimizerOptions]] = OptimizerOptions
    state_names: ClassVar[tuple[str, ...]] = ()
    counts: ClassVar[bool] = True
    """Whether an update depends on the number of updates before it, as Adam's does through its bias corrections."""
    tells_matrices: ClassVar[bool] = False
    """Whether 2-D weights between embedding and head want a group of their own (`ParamGroup.matrix`)."""
    takes_parts: ClassVar[bool] = False
    """Whether `update` is right for parts of parameters, too (`Update.total`): because an element's update depends on
    that element alone, or on sums that `total` completes. Else `engine.parallel: fsdp2` is refused."""

    def __init__(self, groups: Sequence[ParamGroup], options: OptimizerOptions | None = None) -> None:
        self.options = self.Options() if options is None else options
        self.params: dict[str, Tensor] = {}
        self.state: dict[str, dict[str, Tensor]] = {kind: {} for kind in self.state_names}
        self._parts: list[_Part] = []
        self.regroup(groups)

    def update(self, lists: Update) -> None:
        """One update of some parameters by one fused op, without waiting for the device."""
        raise NotImplementedError

    def states_of(self, group: ParamGroup) -> tuple[str, ...]:
        """The names among `state_names` of which a parameter of this group has a tensor: by default all."""
        return self.state_names

    # ---- groups ------------------------------------------------------------------------------------------------------

    def regroup(self, groups: Sequence[ParamGroup]) -> None:
        """Train these groups from now on, as at the boundary of two phases.

        A parameter that goes on being trained, the same tensor under the same name, keeps its state and its count of
        updates, in whatever group it is now. Any other starts with zero state and count zero. What is in no group any
        more is forgotten, and starts anew if it comes back. A recorded step must be recorded again.
        """
        check(groups)
        self.groups = list(groups)
        before, self.params = self.params, {name: p for group in groups for name, p in group.params.items()}
        stays = {name for name, p in self.params.items() if before.get(name) is p}
        for kind, old in self.state.items():
            owners = {name: p for group in groups if kind in self.states_of(group) for name, p in group.params.items()}
            self.state[kind] = {
                name: old[name] if name in stays and name in old else torch.zeros_like(p) for name, p in owners.items()
            }
        counts = {name: part.step for part in self._parts for name in part.names if name in stays}
        self._parts = self._split(counts)

    def _split(self, counts: Mapping[str, Tensor | None]) -> list[_Part]:
        """The groups in parts: of a group, the parameters that share a tensor in `counts`, and those that have none."""
        parts = []
        for group in self.groups:
            together: dict[int, list[str]] = {}
            for name in group.params:
                together.setdefault(id(counts.get(name)), []).append(name)
            for names in together.values():
                parts.append(_Part(group, names, self._counter(counts.get(names[0]), self.params[names[0]])))
        return parts

    def _counter(self, count: Tensor | None, like: Tensor) -> Tensor | None:
        """A counter of a part's own that starts at `count`: each part's op advances its counter once a step."""
        if not self.counts:
            return None
        return torch.zeros((), device=like.device) if count is None else count.to(like.device, copy=True)

    # ---- a step ------------------------------------------------------------------------------------------------------

    def gradients(self) -> list[Tensor]:
        """What this process holds of the gradients of all parameters. A parameter that got none is a
        GradientError: DDP and the EMA would go wrong silently."""
        missing = [name for name, p in self.params.items() if p.grad is None]
        if missing:
            raise GradientError(
                f"{len(missing)} trained parameters got no gradient, first {missing[0]!r}: the loss does not use them, "
                "or only by values without a gradient, as are all but `total` of kernels.distillation_loss. If they "
                "are not to be trained at all, freeze them with requires_grad_(False) in the method's __init__; if "
                "they are in a part of the run only, say so in the method's phases(). Calling requires_grad_ later "
                "does not help"
            )
        return [shards.local(p.grad) for p in self.params.values()]

    @torch.no_grad()
    def step(
        self,
        lr: float | Tensor,
        verdict: Verdict,
        ema: Mapping[str, Tensor] | None = None,
        ema_decay: float = 0.0,
        total: Callable[[Tensor], Tensor] | None = None,
        decay: float | Tensor | None = None,
    ) -> None:
        """One update of all parameters with what the guard says of their gradients; averages follow in the same pass.

        Nothing changes, in parameters, state, counts and averages, where `verdict.skip` is true. total: as of `Update`.
        decay: factor on the weight decay of every group, a float or a float64 scalar tensor; the parameters then decay
        in a pass of their own, before an `update` without decay. None: no factor, and `update` has the decay in it.

        Raises ValueError for a `decay` where the options are not `decoupled`.
        """
        if decay is not None and not self.options.decoupled:
            raise ValueError(f"the weight decay of {type(self).__name__} is not decoupled, so it can have no factor")
        for part in self._parts:
            params = [self.params[name] for name in part.names]
            local = [shards.local(p) for p in params]
            states = [self.state[kind] for kind in self.states_of(part.group)]
            rate, weight_decay = lr * part.group.lr_scale, part.group.weight_decay
            if decay is not None and weight_decay:
                _decay(local, rate * weight_decay * decay, verdict.skip)
                weight_decay = 0.0
            lists = Update(
                params=local,
                grads=[shards.local(p.grad) for p in params],
                state=[[shards.local(tensors[name]) for name in part.names] for tensors in states],
                step=part.step,
                lr=rate,
                weight_decay=weight_decay,
                matrix=part.group.matrix,
                verdict=verdict,
                ema=None if ema is None else [shards.local(ema[name]) for name in part.names],
                ema_decay=ema_decay,
                total=total,
            )
            self.update(lists)

    def zero_grad(self) -> None:
        """Drop the gradients of all parameters."""
        for p in self.params.values():
            p.grad = None

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """`KIND.PARAMETER` for each kind of state, and `step.PARAMETER`, its count of updates, where these count.

        The names depend neither on groups nor on phases: what was saved in a phase loads into an optimizer that was
        made for that phase alone.
        """
        state = {f"step.{name}": part.step.clone() for part in self._parts if self.counts for name in part.names}
        for kind, tensors in self.state.items():
            state |= {f"{kind}.{name}": tensor for name, tensor in tensors.items()}
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy the state in. A recorded step must be recorded again.

        Raises FitError where names, shapes and dtypes are not exactly this optimizer's.
        """
        check_fit("optim", state, self.state_dict())
        for kind, tensors in self.state.items():
            for name, tensor in tensors.items():
                tensor.copy_(shards.placed(state[f"{kind}.{name}"], tensor))
        if self.counts:
            numbers = torch.stack([state[f"step.{name}"] for name in self.params]).tolist()
            equal = {number: torch.tensor(number) for number in numbers}
            counts = {name: equal[number] for name, number in zip(self.params, numbers, strict=True)}
            self._parts = self._split(counts)


def _decay(params: list[Tensor], share: float | Tensor, skip: Tensor) -> None:
    """Take `share` of the parameters away, in place, where not skipped; nothing is read from the device."""
    kept = 1 - share
    if not isinstance(kept, Tensor):
        kept = torch.full((), kept, dtype=torch.float64, device=skip.device)
    torch._foreach_mul_(params, torch.where(skip, 1.0, kept).to(params[0].dtype))
