"""Distillation from logits that a teacher gave before (Wu et al., "TinyViT: fast pretraining distillation", ECCV 2022).

The teacher's logits of every augmented image are computed once and stored by (epoch, sample, copy). Since augmentation
is a function of these, the student later meets the very images that the teacher judged, and the teacher need not run.
Mixing is a function of the step instead, so that the recipe turns it off.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from fastdeit import kernels
from fastdeit.batch import Batch
from fastdeit.data.loader import TrainLoader
from fastdeit.methods.base import Method, Out
from fastdeit.methods.config import LabelConfig


class LogitStore:
    """Logits float32 `[samples, copies, K]` of each epoch in a file FOLDER/epoch_N.npy."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._open = cache(lambda epoch: np.load(self.folder / f"epoch_{epoch}.npy", mmap_mode="r"))

    def read(
        self, epoch: int, index: NDArray[np.int64], copy: NDArray[np.int64], place: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Logits `[B, K]`; KeyError for a sample that no teacher has judged in this epoch."""
        logits = self._open(epoch)[index, copy]
        if np.isnan(logits).any():
            raise KeyError(f"{self.folder} has no logits of some of the samples {index.tolist()} in epoch {epoch}")
        return logits

    @torch.no_grad()
    def write(self, loader: TrainLoader, samples: int, copies: int, epochs: int, teacher: Callable[[Batch], Tensor]):
        """Ask the teacher about every batch of `epochs` epochs; what the loader does not show stays unknown."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for epoch in range(epochs):
            first = epoch * loader.steps_per_epoch
            known = None
            for micro_batches in loader.batches(first, first + loader.steps_per_epoch):
                for batch in micro_batches:
                    logits = teacher(batch).float().numpy()
                    if known is None:
                        known = np.full((samples, copies, logits.shape[1]), np.nan, np.float32)
                    known[batch.index.numpy(), batch.copy.numpy()] = logits
            np.save(self.folder / f"epoch_{epoch}.npy", known)


class CachedLogits(Method):
    """L = (1 - alpha) * CE(label) + alpha * tau^2 * KL(stored || student), as `distill` with soft labels has it."""

    class Config(LabelConfig):
        """The recipe's `method:` section; `store` is the folder of the logits."""

        use: str
        store: str
        alpha: float = Field(0.5, ge=0, le=1)
        tau: float = Field(1.0, gt=0)

    @classmethod
    def needs(cls, config: Config):
        return {"teacher": LogitStore(Path(config.store))}

    def forward(self, batch: Batch) -> Out:
        logits, config = self.student(batch), self.config
        options = {"smoothing": config.smoothing, "distillation": "soft", "alpha": config.alpha, "tau": config.tau}
        loss = kernels.distillation_loss(
            logits, logits, batch.targets, batch.extras["teacher"], reduction="batchmean", **options
        )
        return Out(loss.total, logits, {"base": loss.base, "distill": loss.distill})
