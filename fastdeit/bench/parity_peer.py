"""timm's side of `fastdeit bench parity`: its model, losses, optimizers, schedule and average of the weights.

What timm lacks is restated here from its formula, in plain PyTorch: DeiT's distillation (Touvron et al., ICML 2021,
section 4; the soft term is divided by batch times classes, as in the public code), cosub (Touvron et al.,
arXiv:2212.04884), and drop-path by given uniforms, so that both sides drop the same samples.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.data.mixup import mixup_target
from timm.loss import BinaryCrossEntropy, SoftTargetCrossEntropy
from timm.optim import Lamb, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from fastdeit.recipe.config import OptimConfig
from fastdeit.recipe.resolve import Recipe


class GivenDropPath(nn.Module):
    """Drop-path whose uniforms `[B]` are set from outside before each forward, in place of a generator's."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.uniforms: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """`x` `[B, N, C]`, with whole samples set to 0 and the others scaled up."""
        if not self.training or self.rate == 0:
            return x
        return x * ((self.uniforms >= self.rate) / (1 - self.rate))[:, None, None]


class Peer:
    """timm's model and its training step.

    recipe   whose numbers are the peer's as well: rates, decays, smoothing, size of images and the like
    loss     a key of `LOSSES`
    steps    of the whole run
    weights  of our student, whose names are timm's
    teacher  the network that distils, if one does
    """

    def __init__(
        self, recipe: Recipe, loss: str, steps: int, weights: dict[str, Tensor], teacher: nn.Module | None
    ) -> None:
        self.recipe, optim = recipe, recipe.optim
        options = {"img_size": recipe.model.image_size, "num_classes": recipe.model.num_classes}
        self.model = timm.create_model(recipe.model.name, **options)
        if hasattr(self.model, "set_distilled_training"):
            self.model.set_distilled_training(True)
        self.model.load_state_dict(weights)
        self._drops = list(self._given_drop_path())
        self.teacher = teacher
        self._loss = LOSSES[loss]
        exempt = self.model.no_weight_decay()
        groups = param_groups_weight_decay(self.model, optim.weight_decay, no_weight_decay_list=exempt)
        self.optimizer = OPTIMIZERS[optim.name](groups, optim)
        warmup_steps = round(steps * optim.warmup_epochs / recipe.train.epochs)
        self._schedule = CosineLRScheduler(
            self.optimizer,
            t_initial=steps - warmup_steps,
            lr_min=optim.min_lr,
            warmup_t=warmup_steps,
            warmup_lr_init=optim.warmup_lr,
            warmup_prefix=True,
            t_in_epochs=False,
        )
        self.average = ModelEmaV3(self.model, decay=optim.ema_decay)
        self.model.train()

    def _given_drop_path(self) -> Iterator[GivenDropPath]:
        """Drop-path modules, two a block, in the order in which they are called. timm's rates rise over the depth."""
        count = len(self.model.blocks)
        for number, block in enumerate(self.model.blocks):
            rate = self.recipe.model.drop_path * number / max(count - 1, 1)
            for name in ("drop_path1", "drop_path2"):
                setattr(block, name, GivenDropPath(rate))
                yield getattr(block, name)

    def step(self, number: int, images: Tensor, labels: Any, noise: Sequence[Tensor]) -> float:
        """Update number `number` (from 0) on images `[B, 3, H, W]`; returns the loss.

        labels  (y1, y2, lam) of the mixed samples
        noise   uniforms `[B, two a block]` of each forward: none without drop-path, one, and for cosub two
        """
        self._schedule.step_update(num_updates=number)
        total, parts, limit = 0.0, self.recipe.train.accumulate, self.recipe.optim.clip_grad
        size = len(images) // parts
        for part in range(parts):
            rows = slice(part * size, (part + 1) * size)
            chosen = Rows(images[rows], *(label[rows] for label in labels), [columns[rows] for columns in noise])
            loss = self._loss(self, chosen) / parts
            loss.backward()
            total += loss.item()
        if limit is not None and self.recipe.optim.name != "lamb":
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update(self.model)
        return total

    def logits(self, rows: "Rows", forward: int = 0) -> Any:
        """The model's answer, with drop-path by the uniforms of that forward."""
        if self.recipe.model.drop_path:
            for drop, column in zip(self._drops, rows.noise[forward].unbind(1), strict=True):
                drop.uniforms = column
        return self.model(rows.images)

    def targets(self, rows: "Rows", smoothing: float) -> Tensor:
        """Mixed and smoothed targets `[B, K]`, as timm's `Mixup` makes them of a batch that is mixed with its flip."""
        classes, lam = self.model.num_classes, rows.lam[:, None]
        first, second = (mixup_target(label, classes, smoothing=smoothing) for label in (rows.y1, rows.y2))
        return lam * first + (1 - lam) * second


class Rows(NamedTuple):
    """A micro-batch."""

    images: Tensor
    y1: Tensor
    y2: Tensor
    lam: Tensor
    noise: Sequence[Tensor]


def _supervised(peer: Peer, rows: Rows) -> Tensor:
    return SoftTargetCrossEntropy()(peer.logits(rows), peer.targets(rows, peer.recipe.method.smoothing))


def _bce(peer: Peer, rows: Rows) -> Tensor:
    # Every class with a share in the target counts as one, as in the public code.
    loss = BinaryCrossEntropy(smoothing=0.0, target_threshold=0.0)
    return loss(peer.logits(rows), peer.targets(rows, 0.0))


def _cosub(peer: Peer, rows: Rows) -> Tensor:
    first, second = peer.logits(rows), peer.logits(rows, 1)
    targets = peer.targets(rows, 0.0).gt(0).float()  # as for BCE: DeiT III trains cosub on binarised targets
    each = F.binary_cross_entropy_with_logits
    labels = each(first, targets) + each(second, targets)
    others = each(first, second.detach().sigmoid()) + each(second, first.detach().sigmoid())
    return (labels + others) / 4


def _soft(peer: Peer, rows: Rows) -> Tensor:
    def distance(student: Tensor, teacher: Tensor) -> Tensor:
        tau = peer.recipe.method.tau
        mine, theirs = F.log_softmax(student / tau, 1), F.log_softmax(teacher / tau, 1)
        return F.kl_div(mine, theirs, reduction="sum", log_target=True) * tau**2 / mine.numel()

    return _distilled(peer, rows, distance)


def _hard(peer: Peer, rows: Rows) -> Tensor:
    return _distilled(peer, rows, lambda student, teacher: F.cross_entropy(student, teacher.argmax(1)))


def _distilled(peer: Peer, rows: Rows, distance: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The labels' loss of the class head, and the distance of the distillation head from the teacher."""
    method = peer.recipe.method
    first, second = peer.logits(rows)
    with torch.no_grad():
        judged = peer.teacher(rows.images)
    base = SoftTargetCrossEntropy()(first, peer.targets(rows, method.smoothing))
    return (1 - method.alpha) * base + method.alpha * distance(second, judged)


LOSSES: dict[str, Callable[[Peer, Rows], Tensor]] = {
    "supervised": _supervised,
    "bce": _bce,
    "cosub": _cosub,
    "soft": _soft,
    "hard": _hard,
}
"""By name: the loss of a micro-batch."""


def _adamw(groups: list[dict[str, Any]], optim: OptimConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, lr=optim.lr, betas=(0.9, 0.999), eps=1e-8)


def _lamb(groups: list[dict[str, Any]], optim: OptimConfig) -> torch.optim.Optimizer:
    return Lamb(groups, lr=optim.lr, betas=(0.9, 0.999), eps=1e-8, max_grad_norm=optim.clip_grad)


OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], OptimConfig], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "lamb": _lamb,
}
"""By the name of a recipe's `optim.name`."""
