"""The optimizers that `options.OPTIMIZERS` names. Third parties plug in by import path."""

from collections.abc import Callable
from typing import Any

from fastdeit import kernels
from fastdeit.engine.groups import ParamGroup
from fastdeit.engine.lamb import lamb_update
from fastdeit.engine.muon import muon_update
from fastdeit.engine.optim import Optimizer, Update
from fastdeit.engine.options import AdamWOptions, LambOptions, MuonOptions, SgdOptions, shipped
from fastdeit.plugins import load, load_shipped


def _fused(op: Callable[..., None], lists: Update, **options: Any) -> None:
    """Call the fused update `op` with what all of them take, and with the optimizer's own `options`."""
    counter = [] if lists.step is None else [lists.step]
    op(
        lists.params,
        lists.grads,
        *lists.state,
        *counter,
        lists.lr,
        weight_decay=lists.weight_decay,
        grad_scale=lists.verdict.factor,
        found_inf=lists.verdict.skip,
        ema=lists.ema,
        ema_decay=lists.ema_decay,
        **options,
    )


class AdamW(Optimizer):
    """Adam with decoupled weight decay (Loshchilov & Hutter, ICLR 2019), by `kernels.fused_adamw`."""

    Options = AdamWOptions
    state_names = ("exp_avg", "exp_avg_sq")
    takes_parts = True

    def update(self, lists: Update) -> None:
        _fused(kernels.fused_adamw, lists, betas=self.options.betas, eps=self.options.eps)


class Lamb(Optimizer):
    """LAMB (You et al., ICLR 2020) as in apex's FusedLAMB, which DeiT III is trained with, by `kernels.fused_lamb`.

    Two differences from FusedLAMB: the guard clips, like all gradients, by `clip_grad / (norm + 1e-6)`, where FusedLAMB
    has no 1e-6; and `eps` is 1e-8 by default, which DeiT's command line gives it, where its own is 1e-6. As there, the
    trust ratio applies to parameters with weight decay only.
    """

    Options = LambOptions
    state_names = ("exp_avg", "exp_avg_sq")
    takes_parts = True

    def update(self, lists: Update) -> None:
        if lists.total is not None:
            lamb_update(lists, self.options.betas, self.options.eps)
        else:
            _fused(kernels.fused_lamb, lists, betas=self.options.betas, eps=self.options.eps)


class Sgd(Optimizer):
    """SGD with momentum as in `torch.optim.SGD`, by `kernels.fused_sgd`."""

    Options = SgdOptions
    state_names = ("momentum_buffer",)
    counts = False
    takes_parts = True

    def update(self, lists: Update) -> None:
        options = self.options
        _fused(
            kernels.fused_sgd,
            lists,
            momentum=options.momentum,
            nesterov=options.nesterov,
            decoupled=options.decoupled_decay,
        )


class Muon(AdamW):
    """Muon for the weights of the blocks' linear layers, AdamW for everything else, as its author advises (Keller
    Jordan, "Muon: an optimizer for hidden layers in neural networks", 2024).

    Both have one learning rate and one weight decay: a Muon step is scaled to the size of an AdamW step, as
    `adjust_lr_fn="match_rms_adamw"` of `torch.optim.Muon` does. q, k and v are one matrix, as they are one layer. An
    update needs all of a matrix.
    """

    Options = MuonOptions
    state_names = ("momentum_buffer", "exp_avg", "exp_avg_sq")
    tells_matrices = True
    takes_parts = False

    def states_of(self, group: ParamGroup) -> tuple[str, ...]:
        return self.state_names[:1] if group.matrix else self.state_names[1:]

    def update(self, lists: Update) -> None:
        if lists.matrix:
            muon_update(lists, self.options.momentum)
        else:
            super().update(lists)


def find(name: str) -> type[Optimizer]:
    """The optimizer of a recipe's `optim.name`: a name in `OPTIMIZERS` or an import path `package.module:Class`.

    Raises ValueError naming what was not found or is no optimizer.
    """
    row = shipped(name)
    found = load_shipped(row.path, "optimizer") if row else load(name, "optimizer")
    if not (isinstance(found, type) and issubclass(found, Optimizer)):
        raise ValueError(f"{name!r} is not an optimizer: it is no subclass of fastdeit.engine.optim.Optimizer")
    return found
