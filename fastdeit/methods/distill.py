"""DeiT's distillation through attention, and usual distillation (Touvron et al., ICML 2021, section 4).

hard  L = (1 - alpha) * base(class, y) + alpha * CE(distillation, argmax teacher)
soft  L = (1 - alpha) * base(class, y) + alpha * tau**2 * KL(softmax(teacher / tau) || softmax(distillation / tau))

Several teachers answer with the mean p of their softmaxes: `argmax teacher` is argmax p, and the logits `teacher` are
log p.

The soft term is divided by B*K ("numel", the public code: a thousandth of the other on ImageNet) or by B ("batchmean").

The teacher's logits are those of a network that runs along, or of a cache that it has filled before (docs/cache.md).
"""

from collections.abc import Mapping
from pathlib import Path

from fastdeit import kernels
from fastdeit.batch import Batch
from fastdeit.data.logits import CachedLogits
from fastdeit.methods.base import Context, Method, Out
from fastdeit.methods.config import DistillConfig
from fastdeit.methods.teacher import together


class Distill(Method):
    """The class head learns the label, the distillation head the teacher; a model with one head learns both with it."""

    Config = DistillConfig

    def __init__(self, model, config: DistillConfig, context: Context) -> None:
        super().__init__(model, config, context)
        self.teacher = together([context.teacher(each) for each in config.teachers()])

    @classmethod
    def needs(cls, config: DistillConfig) -> Mapping[str, CachedLogits]:
        return {} if config.cached is None else {"teacher": CachedLogits(Path(config.cached))}

    def forward(self, batch: Batch) -> Out:
        # First the teacher: what it needs is free again before the student's activations are kept for backward.
        judged = batch.extras["teacher"] if self.teacher is None else self.teacher(batch)
        logits = self.student(batch)
        first, second = logits if isinstance(logits, tuple) else (logits, logits)
        config = self.config
        loss = kernels.distillation_loss(
            first,
            second,
            batch.targets,
            judged,
            smoothing=config.smoothing,
            base=config.loss,
            distillation=config.distillation,
            alpha=config.alpha,
            tau=config.tau,
            reduction=config.reduction,
        )
        return Out(loss.total, first, {"base": loss.base, "distill": loss.distill})
