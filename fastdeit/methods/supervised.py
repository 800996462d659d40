"""Training on labels alone: cross-entropy with smoothing and mixed targets, or DeiT III's binary cross-entropy."""

from fastdeit import kernels
from fastdeit.batch import Batch
from fastdeit.methods.base import LabelConfig, Method, Out


class Supervised(Method):
    """`loss(f(x), y)`. A model with two heads is trained on the mean of their logits, as DeiT's fine-tuning does."""

    class Config(LabelConfig):
        """The recipe's `method:` section."""

        use: str = "supervised"

    def forward(self, batch: Batch) -> Out:
        logits = self.student(batch)
        if isinstance(logits, tuple):
            logits = (logits[0] + logits[1]) / 2
        loss = kernels.distillation_loss(
            logits, None, batch.targets, smoothing=self.config.smoothing, base=self.config.loss
        )
        return Out(loss.total, logits, {"base": loss.base})
