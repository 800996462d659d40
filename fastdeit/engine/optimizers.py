"""The optimizers that a recipe may name. Third parties plug in by import path."""

from typing import Annotated

from pydantic import Field, ValidationInfo, field_validator

from fastdeit import kernels
from fastdeit.engine.groups import ParamGroup
from fastdeit.engine.muon import muon_update
from fastdeit.engine.optim import Optimizer, OptimizerOptions, Update
from fastdeit.plugins import load

_Beta = Annotated[float, Field(ge=0, lt=1)]
_Positive = Annotated[float, Field(gt=0)]


class AdamOptions(OptimizerOptions):
    """Of optimizers with Adam's moments. The defaults are those of DeiT's command line."""

    betas: tuple[_Beta, _Beta] = (0.9, 0.999)
    """Decay per update of the running averages of the gradient and of its square."""
    eps: _Positive = 1e-8
    """Added to the root of the averaged square."""


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter, ICLR 2019), by `kernels.fused_adamw`."""

    Options = AdamOptions
    state_names = ("exp_avg", "exp_avg_sq")

    def update(self, lists: Update) -> None:
        kernels.fused_adamw(
            lists.params,
            lists.grads,
            *lists.state,
            lists.step,
            lists.lr,
            betas=self.options.betas,
            eps=self.options.eps,
            weight_decay=lists.weight_decay,
            grad_scale=lists.verdict.factor,
            found_inf=lists.verdict.skip,
            ema=lists.ema,
            ema_decay=lists.ema_decay,
        )


class LambOptions(AdamOptions):
    """LAMB clips gradients by default, as `max_grad_norm=1.0` of apex's FusedLAMB and of timm's Lamb does."""

    clip_grad: _Positive | None = 1.0
    """Largest norm of the gradient of all parameters; null: no clipping."""


class Lamb(Optimizer):
    """LAMB (You et al., ICLR 2020) as in apex's FusedLAMB, which DeiT III is trained with, by `kernels.fused_lamb`.

    Two differences from FusedLAMB: the guard clips, like all gradients, by `clip_grad / (norm + 1e-6)`, where FusedLAMB
    has no 1e-6; and `eps` is 1e-8 by default, which DeiT's command line gives it, where its own is 1e-6. As there, the
    trust ratio applies to parameters with weight decay only.
    """

    Options = LambOptions
    state_names = ("exp_avg", "exp_avg_sq")

    def update(self, lists: Update) -> None:
        kernels.fused_lamb(
            lists.params,
            lists.grads,
            *lists.state,
            lists.step,
            lists.lr,
            betas=self.options.betas,
            eps=self.options.eps,
            weight_decay=lists.weight_decay,
            grad_scale=lists.verdict.factor,
            found_inf=lists.verdict.skip,
            ema=lists.ema,
            ema_decay=lists.ema_decay,
        )


class SgdOptions(OptimizerOptions):
    """The defaults are timm's `sgd`, and the weight decay that DeiT fine-tunes with by SGD."""

    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    """Added to the gradient times the parameter, unless `decoupled_decay` says otherwise."""
    momentum: _Beta = 0.9
    """Share of the running sum of gradients that stays in each update."""
    nesterov: bool = True
    """Look ahead by one momentum step."""
    decoupled_decay: bool = False
    """Shrink the parameters by lr * weight_decay, as AdamW does, instead of adding the decay to the gradient."""

    @field_validator("nesterov")
    @classmethod
    def _needs_momentum(cls, nesterov: bool, info: ValidationInfo) -> bool:
        if nesterov and info.data.get("momentum") == 0:
            raise ValueError("must be false where optim.momentum is 0")
        return nesterov


class Sgd(Optimizer):
    """SGD with momentum as in `torch.optim.SGD`, by `kernels.fused_sgd`."""

    Options = SgdOptions
    state_names = ("momentum_buffer",)
    counts = False

    def update(self, lists: Update) -> None:
        kernels.fused_sgd(
            lists.params,
            lists.grads,
            *lists.state,
            lists.lr,
            momentum=self.options.momentum,
            nesterov=self.options.nesterov,
            decoupled=self.options.decoupled_decay,
            weight_decay=lists.weight_decay,
            grad_scale=lists.verdict.factor,
            found_inf=lists.verdict.skip,
            ema=lists.ema,
            ema_decay=lists.ema_decay,
        )


class MuonOptions(AdamOptions):
    """`betas` and `eps` are AdamW's, for what is no matrix. The momentum is that of `torch.optim.Muon`."""

    momentum: _Beta = 0.95
    """Of the matrices: share of the running average of gradients that stays in each update."""


class Muon(AdamW):
    """Muon for the weights of the blocks' linear layers, AdamW for everything else, as its author advises (Keller
    Jordan, "Muon: an optimizer for hidden layers in neural networks", 2024).

    Both have one learning rate and one weight decay: a Muon step is scaled to the size of an AdamW step, as
    `adjust_lr_fn="match_rms_adamw"` of `torch.optim.Muon` does. q, k and v are one matrix, as they are one layer.
    """

    Options = MuonOptions
    state_names = ("momentum_buffer", "exp_avg", "exp_avg_sq")
    tells_matrices = True

    def states_of(self, group: ParamGroup) -> tuple[str, ...]:
        return self.state_names[:1] if group.matrix else self.state_names[1:]

    def update(self, lists: Update) -> None:
        if lists.matrix:
            muon_update(lists, self.options.momentum)
        else:
            super().update(lists)


OPTIMIZERS: dict[str, type[Optimizer]] = {"adamw": AdamW, "lamb": Lamb, "sgd": Sgd, "muon": Muon}


def find(name: str) -> type[Optimizer]:
    """The optimizer of a recipe's `optim.name`: a name in `OPTIMIZERS` or an import path `package.module:Class`.

    Raises ValueError naming what was not found or is no optimizer.
    """
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    if ":" not in name:
        raise ValueError(
            f"no optimizer named {name!r}; there are {', '.join(OPTIMIZERS)}, or an import path 'package.module:Class'"
        )
    found = load(name, "optimizer")
    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        raise ValueError(f"{name!r} is not an optimizer: it is no subclass of fastdeit.engine.optim.Optimizer")
    return found
