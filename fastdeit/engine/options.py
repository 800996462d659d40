"""What a recipe's `optim:` section says to an optimizer, and the table of those that fastdeit brings.

Importing this module imports no torch, so that a recipe is refused in tenths of a second. The optimizers themselves are
in `optimizers.py`.
"""

from typing import Annotated, ClassVar, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

_Beta = Annotated[float, Field(ge=0, lt=1)]
_Positive = Annotated[float, Field(gt=0)]


class OptimizerOptions(BaseModel):
    """An optimizer's own fields of a recipe's `optim:` section: frozen, no unknown key, every field with a default.

    A field that all optimizers have, such as `weight_decay`, may be declared again to give it another default.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    decoupled: ClassVar[bool] = False
    """Whether weight decay multiplies a parameter by 1 - lr * weight_decay and does nothing else, so that it may follow
    a schedule (`optim.weight_decay_end`)."""


class AdamWOptions(OptimizerOptions):
    """Adam with decoupled weight decay (Loshchilov & Hutter, ICLR 2019).

    The defaults are those of DeiT's command line.
    """

    betas: tuple[_Beta, _Beta] = (0.9, 0.999)
    """Decay per update of the running averages of the gradient and of its square."""
    eps: _Positive = 1e-8
    """Added to the root of the averaged square."""

    decoupled: ClassVar[bool] = True


class LambOptions(AdamWOptions):
    """LAMB (You et al., ICLR 2020) as in apex's FusedLAMB, which DeiT III is trained with.

    It clips gradients by default, as `max_grad_norm=1.0` of apex's FusedLAMB and of timm's Lamb does. `eps` is 1e-8 by
    default, which DeiT's command line gives it, where its own is 1e-6.
    """

    clip_grad: _Positive | None = 1.0
    """Largest norm of the gradient of all parameters; null: no clipping."""
    decoupled: ClassVar[bool] = False  # the trust ratio has the decay in it


class SgdOptions(OptimizerOptions):
    """SGD with momentum as in `torch.optim.SGD`. The defaults are timm's `sgd`, and the weight decay that DeiT
    fine-tunes with by SGD."""

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

    @property
    def decoupled(self) -> bool:
        """As of `OptimizerOptions`."""
        return self.decoupled_decay


class MuonOptions(AdamWOptions):
    """Muon for the weights of the blocks' linear layers, AdamW for everything else, as its author advises (Keller
    Jordan, "Muon: an optimizer for hidden layers in neural networks", 2024).

    Both have one learning rate and one weight decay: a Muon step is scaled to the size of an AdamW step. `betas` and
    `eps` are AdamW's, for what is no matrix. The momentum is that of `torch.optim.Muon`.
    """

    momentum: _Beta = 0.95
    """Of the matrices: share of the running average of gradients that stays in each update."""


class Shipped(NamedTuple):
    """An optimizer that fastdeit brings: the import path of its class, and the class's `Options`."""

    path: str
    options: type[OptimizerOptions]


OPTIMIZERS = {
    "adamw": Shipped("fastdeit.engine.optimizers:AdamW", AdamWOptions),
    "lamb": Shipped("fastdeit.engine.optimizers:Lamb", LambOptions),
    "sgd": Shipped("fastdeit.engine.optimizers:Sgd", SgdOptions),
    "muon": Shipped("fastdeit.engine.optimizers:Muon", MuonOptions),
}
"""By the name that a recipe's `optim.name` has for it."""


def shipped(name: str) -> Shipped | None:
    """The row of `OPTIMIZERS` for a recipe's `optim.name`; None for an import path `package.module:Class`.

    Raises ValueError for anything else.
    """
    if name not in OPTIMIZERS and ":" not in name:
        raise ValueError(
            f"no optimizer named {name!r}; there are {', '.join(OPTIMIZERS)}, or an import path 'package.module:Class'"
        )
    return OPTIMIZERS.get(name)
