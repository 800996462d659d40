"""Teachers: frozen networks that see exactly the augmented images of the student."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, model_validator
from torch import Tensor, nn

from fastdeit.batch import Batch


class TeacherConfig(BaseModel):
    """Where a teacher comes from; exactly one of `recipe`, `timm` and `model`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recipe: str | None = None
    """Recipe of a teacher that is trained first, into RUN/teacher."""
    timm: str | None = None
    """Name of a timm model; `weights: null` takes timm's pretrained weights."""
    model: str | None = None
    """Name of a fastdeit model; needs `weights`."""
    weights: str | None = None
    """safetensors file, checkpoint or run directory."""
    image_size: int | None = None
    """Resolution in pixels (a square); null is the one it was trained at for `recipe`, else the student's."""
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    """Normalisation; null is the one it was trained with for `recipe` and `timm`, the student's for `model`."""

    @model_validator(mode="after")
    def _one_origin(self) -> "TeacherConfig":
        if sum(origin is not None for origin in (self.recipe, self.timm, self.model)) != 1:
            raise ValueError("a teacher is given by exactly one of recipe, timm and model")
        if self.model is not None and self.weights is None:
            raise ValueError("a teacher given by model needs weights: an untrained network has nothing to teach")
        if (self.mean is None) != (self.std is None):
            raise ValueError("give mean and std together, or neither")
        return self


class Teacher:
    """A frozen network in eval mode, outside the method's `parameters()` and `state_dict()`.

    It renders its own input from the batch, with its own normalisation and resolution, so that it judges the very image
    (crop, flip, mixing) that the student is given.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        image_size: int | Sequence[int] | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.size = None if image_size is None else _pair(image_size)
        self.mean, self.std = mean, std

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Tensor:
        """Logits `[B, K]`; a teacher with two heads answers with the mean of their logits."""
        return self.logits(batch.pixels(mean=self.mean, std=self.std))

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """Logits `[B, K]` of images `[B, 3, H, W]` in the teacher's normalisation, resized to its resolution."""
        if self.size is not None and tuple(x.shape[-2:]) != self.size:
            # In float32: on a CPU there is no antialiasing in 16 bit.
            x = F.interpolate(x.float(), size=self.size, mode="bicubic", antialias=True)
        out: Any = self.model(x)
        return (out[0] + out[1]) / 2 if isinstance(out, tuple) else out


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
