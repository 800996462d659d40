"""Teachers: frozen networks that see exactly the augmented images of the student."""

from collections.abc import Callable, Collection, Sequence
from functools import cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, PositiveInt, model_validator
from torch import Tensor, nn

from fastdeit.batch import Batch
from fastdeit.fields import PathText, size_pair
from fastdeit.models.contract import ImageSize, Tokens
from fastdeit.models.tokens import Taps, taps


class TeacherConfig(BaseModel):
    """Where a teacher comes from: one of `recipe`, `timm` and `model`, or `weights` that tell it themselves.

    A text in the place of the fields is the address of such weights: `teacher: runs/x@best`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    classifies: ClassVar[bool] = True
    """Whether the method reads logits: the teacher then needs a head for the classes of the data set, and is scored
    before the first step."""

    recipe: PathText | None = None
    """Recipe of a teacher that is trained first, into RUN/teacher."""
    timm: str | None = None
    """Name of a timm model; `weights: null` takes timm's pretrained weights."""
    model: str | None = None
    """Name of a fastdeit model; needs `weights`."""
    weights: PathText | None = None
    """Address of its weights, as that of model.weights. A run and timm:NAME also tell which network it is."""
    weights_grid: tuple[PositiveInt, PositiveInt] | None = None
    """[height, width] in patches of the positional embedding of `weights`, as model.weights_grid."""
    image_size: int | None = None
    """Resolution in pixels (a square); null is the one it was trained at for a run, else the student's."""
    mean: tuple[float, float, float] | None = None
    """Mean of the normalisation; null is as for `std`."""
    std: tuple[float, float, float] | None = None
    """Normalisation; null is the one it was trained with for a run and for timm, else the student's."""

    @model_validator(mode="before")
    @classmethod
    def _an_address(cls, given: Any) -> Any:
        if isinstance(given, str):
            return {"weights": given}
        if not isinstance(given, dict):
            return given
        # Behind a validator of this mode the lists of JSON are Python's, and a strict tuple takes none of those.
        return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}

    @model_validator(mode="after")
    def _one_origin(self) -> "TeacherConfig":
        origins = sum(origin is not None for origin in (self.recipe, self.timm, self.model))
        if origins > 1 or (origins == 0 and self.weights is None):
            raise ValueError("a teacher is given by one of recipe, timm and model, or by weights alone")
        if self.model is not None and self.weights is None:
            raise ValueError("a teacher given by model needs weights: an untrained network has nothing to teach")
        if (self.mean is None) != (self.std is None):
            raise ValueError("give mean and std together, or neither")
        return self


class FeatureTeacherConfig(TeacherConfig):
    """A teacher that the method asks for tokens and q/k/v alone: its head, if it has one, may be of any classes."""

    classifies: ClassVar[bool] = False


class Teacher:
    """A frozen network in eval mode, outside the method's `parameters()` and `state_dict()`.

    It renders its own input from the batch, with its own normalisation and resolution, so that it judges the very image
    (crop, flip, mixing) that the student is given. Everything it answers is without gradient. `tokens` and `taps` need
    a transformer (`contract.Tokens`), and raise ValueError for any other network.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        image_size: ImageSize | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.size = None if image_size is None else size_pair(image_size, "image_size")
        self.mean, self.std = mean, std

    def to(self, device: torch.device) -> "Teacher":
        """The teacher itself, its network moved to `device`."""
        self.model.to(device)
        return self

    def __call__(self, batch: Batch) -> Tensor:
        """Logits `[B, K]`; a teacher with two heads answers with the mean of their logits."""
        return self.logits(self.pixels(batch))

    def pixels(self, batch: Batch, view: int = 0) -> Tensor:
        """A view of the batch as images `[B, 3, H, W]` in the teacher's normalisation."""
        return batch.pixels(view, mean=self.mean, std=self.std)

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """Logits `[B, K]` of images `[B, 3, H, W]` in the teacher's normalisation, resized to its resolution."""
        out: Any = self.model(self._sized(x))
        return (out[0] + out[1]) / 2 if isinstance(out, tuple) else out

    @torch.no_grad()
    def tokens(self, x: Tensor, *, stop: int | None = None, keep: Tensor | None = None) -> Tensor:
        """Tokens `[B, N, dim]` of images as in `logits`: after `stop` blocks without the final norm, or after all with
        it; `keep` as in `contract.Tokens.tokens`."""
        return self._transformer().tokens(self._sized(x), stop=stop, keep=keep)

    @torch.no_grad()
    def taps(
        self, x: Tensor, *, blocks: Collection[int] = (), qkv: Collection[int] = (), keep: Tensor | None = None
    ) -> Taps:
        """Tokens after `blocks` and q/k/v of the blocks `qkv` (`models.tokens.taps`) of images as in `logits`."""
        return taps(self._transformer(), self._sized(x), blocks=blocks, qkv=qkv, keep=keep)

    def _transformer(self) -> Tokens:
        if not isinstance(self.model, Tokens):
            raise ValueError(
                f"the teacher is a {type(self.model).__name__}, which has no tokens; a method that reads tokens needs "
                "a vision transformer of fastdeit or of timm"
            )
        return self.model

    def _sized(self, x: Tensor) -> Tensor:
        if self.size is None or tuple(x.shape[-2:]) == self.size:
            return x
        # In float32: on a CPU there is no antialiasing in 16 bit.
        return F.interpolate(x.float(), size=self.size, mode="bicubic", antialias=True)


class DeferredTeacher:
    """A teacher that is built when it is first asked: most evaluations need none, and its weights may be elsewhere."""

    def __init__(self, make: Callable[[], Teacher]) -> None:
        self._teacher = cache(make)

    def __call__(self, batch: Batch) -> Tensor:
        return self._teacher()(batch)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # copy and pickle ask for such names
            raise AttributeError(name)
        return getattr(self._teacher(), name)
