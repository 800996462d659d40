"""Two class tokens: the comparison by which the DeiT paper shows that the distillation token is more than a second one.

L = 1/2 CE(first head, y) + 1/2 CE(second head, y), with y the smoothed and mixed label of the batch.
"""

from typing import Literal

from fastdeit import kernels
from fastdeit.batch import Batch
from fastdeit.methods.base import Method, Out
from fastdeit.methods.config import LabelConfig


class TwoTokensConfig(LabelConfig):
    """Both heads of a distilled model learn the label, each by itself."""

    use: str = "fastdeit.experiments.two_tokens:TwoClassTokens"
    loss: Literal["ce"] = "ce"


class TwoClassTokens(Method):
    """A distilled model whose distillation token is a second class token. It has no teacher."""

    Config = TwoTokensConfig

    def forward(self, batch: Batch) -> Out:
        """The mean of both heads' cross-entropies. Raises ValueError for a model with one head."""
        logits = self.student(batch)
        if not isinstance(logits, tuple):
            raise ValueError("two class tokens need a model with two heads, such as deit_digits_distilled_patch8_32")
        first, second = (
            kernels.distillation_loss(head, None, batch.targets, smoothing=self.config.smoothing).total
            for head in logits
        )
        return Out((first + second) / 2, logits[0], {"first": first.detach(), "second": second.detach()})
