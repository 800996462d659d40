"""DeiT's distillation through attention, and usual distillation (Touvron et al., ICML 2021, section 4).

hard  L = (1 - alpha) * base(class, y) + alpha * CE(distillation, argmax teacher)
soft  L = (1 - alpha) * base(class, y) + alpha * tau**2 * KL(softmax(teacher / tau) || softmax(distillation / tau))

The soft term is divided by B*K ("numel", the public code: a thousandth of the other on ImageNet) or by B ("batchmean").
"""

from typing import Literal

from pydantic import Field

from fastdeit import kernels
from fastdeit.batch import Batch
from fastdeit.methods.base import Context, Fuse, LabelConfig, Method, Out
from fastdeit.methods.teacher import TeacherConfig


class Distill(Method):
    """The class head learns the label, the distillation head the teacher; a model with one head learns both with it."""

    class Config(LabelConfig):
        """The recipe's `method:` section."""

        use: str = "distill"
        distillation: Literal["hard", "soft"] = "hard"
        """hard: the student learns the teacher's answer; soft: the teacher's distribution over all classes."""
        alpha: float = Field(0.5, ge=0, le=1)
        """Share of the teacher in the loss."""
        tau: float = Field(1.0, gt=0)
        """Temperature of the soft distributions."""
        reduction: Literal["numel", "batchmean"] = "numel"
        """What divides the soft term: batch times classes, as in the public code, or the batch alone."""
        fuse: Fuse = "softmax"
        """How two heads become one answer: the sum of their softmaxes, the mean of their logits, or one head alone."""
        teacher: TeacherConfig

    def __init__(self, model, config: Config, context: Context) -> None:
        super().__init__(model, config, context)
        self.teacher = context.teacher(config.teacher)
        self.fuse = config.fuse

    def forward(self, batch: Batch) -> Out:
        # First the teacher: what it needs is free again before the student's activations are kept for backward.
        judged = self.teacher(batch)
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
