"""Training on labels alone: cross-entropy with smoothing and mixed targets, or DeiT III's binary cross-entropy."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdeit import kernels
from fastdeit.batch import Batch, Labels
from fastdeit.methods.base import Context, Method, Out
from fastdeit.methods.config import SupervisedConfig


class Supervised(Method):
    """`loss(f(x), y)`. A model with two heads is trained on the mean of their logits, as DeiT's fine-tuning does."""

    Config = SupervisedConfig

    def __init__(self, model: nn.Module, config: SupervisedConfig, context: Context) -> None:
        super().__init__(model, config, context)
        given = getattr(config, "class_weights", None)  # a subclass may have a Config without them
        # Part of the state: an evaluation has no training images to count.
        self.register_buffer("class_weights", None if given is None else _class_weights(given, context))
        self._weights_are_known = given is not None and (given != "balanced" or context.class_counts is not None)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """torch's own, but for class weights that recipe and data say: those of a fork are not its parent's."""
        if self._weights_are_known:
            state_dict[f"{prefix}class_weights"] = self.class_weights
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(self, batch: Batch) -> Out:
        logits = self.student(batch)
        if isinstance(logits, tuple):
            logits = (logits[0] + logits[1]) / 2
        if self.class_weights is not None:
            loss = weighted_cross_entropy(logits, batch.targets, self.class_weights, self.config.smoothing)
            return Out(loss, logits, {"base": loss.detach()})
        loss = kernels.distillation_loss(
            logits, None, batch.targets, smoothing=self.config.smoothing, base=self.config.loss
        )
        return Out(loss.total, logits, {"base": loss.base})


def weighted_cross_entropy(logits: Tensor, labels: Labels, weights: Tensor, smoothing: float) -> Tensor:
    """Cross-entropy of `[B, K]` logits in which class c counts `weights[c]` times, a float32 scalar.

        t = (1 - smoothing) (lam onehot(y1) + (1 - lam) onehot(y2)) + smoothing / K
        loss = -1/B sum over samples and classes of weights[c] t[c] log softmax(logits)[c]

    It is `torch.nn.functional.cross_entropy(logits, t, weight=weights)`, so a mixed sample counts each of its classes
    by their share and weight. With hard labels torch would divide by the sum of the weights of a batch; dividing by B
    as well there keeps the result independent of micro-batches and processes.
    """
    count = logits.shape[1]
    first, second = (F.one_hot(labels_of, count).float() for labels_of in (labels.y1, labels.y2))
    mixed = torch.lerp(second, first, labels.lam.float()[:, None])
    return F.cross_entropy(logits.float(), (1 - smoothing) * mixed + smoothing / count, weight=weights)


def _class_weights(given: Literal["balanced"] | Sequence[float], context: Context) -> Tensor:
    """float32 `[K]`; ones where they are to be balanced but there are no training images, as in an evaluation."""
    classes = context.num_classes
    if given == "balanced":
        if context.class_counts is None:
            return torch.ones(classes)
        counts = torch.tensor(context.class_counts(), dtype=torch.float64)
        empty = (counts == 0).nonzero().flatten().tolist()
        if empty:
            raise ValueError(
                f"class_weights balanced: class number {empty[0]} has no training image, so it has no finite weight"
            )
        return (counts.sum() / (classes * counts)).float()
    if len(given) != classes:
        raise ValueError(f"class_weights has {len(given)} numbers, but the data set has {classes} classes")
    if not any(given):
        raise ValueError("class_weights are all 0, so nothing would be learned")
    return torch.tensor(given)
