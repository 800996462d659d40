"""AdamW over named parameters, with DeiT's parameter groups.

One call to `kernels.fused_adamw` a group does unscaling, clipping, update and EMA, and skips a step with non-finite
gradients on the device. State is named after the parameters, so a checkpoint says what belongs to what.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastdeit import kernels


@dataclass(frozen=True)
class ParamGroup:
    """Parameters that share a weight decay and a factor on the learning rate."""

    params: dict[str, Tensor]
    weight_decay: float
    lr_scale: float = 1.0


def default_groups(
    named_parameters: Iterable[tuple[str, Tensor]], weight_decay: float, no_decay: Collection[str] = ()
) -> list[ParamGroup]:
    """Trainable parameters in two groups: decayed, and not (1-D tensors, biases and the names in `no_decay`)."""
    decayed: dict[str, Tensor] = {}
    undecayed: dict[str, Tensor] = {}
    for name, parameter in named_parameters:
        if parameter.requires_grad:
            plain = parameter.ndim <= 1 or name.endswith(".bias") or name in no_decay
            (undecayed if plain else decayed)[name] = parameter
    groups = ParamGroup(decayed, weight_decay), ParamGroup(undecayed, 0.0)
    return [group for group in groups if group.params]


class AdamW:
    """Decoupled weight decay Adam (Loshchilov & Hutter, ICLR 2019), with fp32 moments for every parameter."""

    def __init__(self, groups: list[ParamGroup], betas: tuple[float, float], eps: float) -> None:
        self.groups, self.betas, self.eps = groups, betas, eps
        self.params = {name: p for group in groups for name, p in group.params.items()}
        device = next(iter(self.params.values())).device
        self.exp_avg = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in self.params.items()}
        self.exp_avg_sq = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in self.params.items()}
        # One counter a group: the kernel advances it together with the update it belongs to, or not at all.
        self.steps = [torch.zeros((), device=device) for _ in groups]

    def gradients(self) -> list[Tensor]:
        """Gradients of all parameters. One that got none is an error: DDP and the EMA would go wrong silently."""
        missing = [name for name, p in self.params.items() if p.grad is None]
        if missing:
            raise RuntimeError(
                f"{len(missing)} trainable parameters got no gradient, first {missing[0]!r}; "
                "a method must freeze (requires_grad_(False)) what its loss does not use"
            )
        return [p.grad for p in self.params.values()]

    @torch.no_grad()
    def step(
        self,
        lr: float | Tensor,
        grad_scale: Tensor,
        found_inf: Tensor,
        ema: dict[str, Tensor] | None,
        ema_decay: float,
    ) -> None:
        """One update with gradients multiplied by `grad_scale`; nothing changes when `found_inf` is true."""
        for group, step in zip(self.groups, self.steps, strict=True):
            names = list(group.params)
            params = list(group.params.values())
            kernels.fused_adamw(
                params,
                [p.grad for p in params],
                [self.exp_avg[name] for name in names],
                [self.exp_avg_sq[name] for name in names],
                step,
                lr * group.lr_scale,
                betas=self.betas,
                eps=self.eps,
                weight_decay=group.weight_decay,
                grad_scale=grad_scale,
                found_inf=found_inf,
                ema=None if ema is None else [ema[name] for name in names],
                ema_decay=ema_decay,
            )

    def zero_grad(self) -> None:
        for p in self.params.values():
            p.grad = None

    def state_dict(self) -> dict[str, Tensor]:
        """Moments by parameter name, and the update counter of each group."""
        state = {f"step.{i}": step for i, step in enumerate(self.steps)}
        state |= {f"exp_avg.{name}": t for name, t in self.exp_avg.items()}
        return state | {f"exp_avg_sq.{name}": t for name, t in self.exp_avg_sq.items()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copy the state in; raises KeyError with the names when they are not exactly this optimizer's."""
        mine = self.state_dict()
        if mine.keys() != state.keys():
            raise KeyError(f"optimizer state does not fit: {sorted(mine.keys() ^ state.keys())[:5]}")
        for name, tensor in mine.items():
            tensor.copy_(state[name])
