"""The method contract: a small `nn.Module` that owns the student and says what the loss of one micro-batch is.

A method knows nothing of DDP, AMP, EMA, checkpoints or logging; the engine wraps `forward` with all of them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from fastdeit import kernels
from fastdeit.views import View

if TYPE_CHECKING:
    from fastdeit.methods.teacher import Teacher

Fuse = Literal["softmax", "logit", "class", "distillation"]


class MethodConfig(BaseModel):
    """Base of every `method:` section: frozen, and no key it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    use: str


class LabelConfig(MethodConfig):
    """Shared by methods that learn from labels: the loss of the (mixed) label and its smoothing."""

    loss: Literal["ce", "bce"] = "ce"
    smoothing: float = Field(0.1, ge=0, lt=1)

    @model_validator(mode="after")
    def _smoothing_fits_loss(self) -> "LabelConfig":
        if self.loss == "bce" and self.smoothing > 0:
            raise ValueError("loss bce needs smoothing 0: a smoothed target makes every class positive")
        return self


@dataclass(frozen=True)
class Batch:
    """One micro-batch on the device: raw images and the plan of what is still to be done to them.

    images       one uint8 `[B, H, W, 3]` for each of V views
    y1, y2, lam  int64 `[B]` twice, float32 `[B]`: the target is `lam * onehot(y1) + (1 - lam) * onehot(y2)`
    partner      int64 `[B]`: the sample of this micro-batch each is mixed with
    pixel_lam    float32 `[B]`: weight of the own pixel outside `box`
    box          int32 `[V, B, 4]` (y0, x0, y1, x1): the cutmix window in each view, empty when y1 <= y0
    noise        float32 `[B, noise_per_sample]` uniforms in [0, 1), a function of the place in the global batch
    index        int64 `[B]`: the samples' numbers in the data set
    mean, std    normalisation of the student, in units of [0, 1]
    erase        for each view (boxes int32 `[B, 4]` like `box`, keys int64 `[B]`): what noise replaces, and its key;
                 None, for a view or for all: nothing
    """

    images: tuple[Tensor, ...]
    y1: Tensor
    y2: Tensor
    lam: Tensor
    partner: Tensor
    pixel_lam: Tensor
    box: Tensor
    noise: Tensor
    index: Tensor
    mean: Sequence[float]
    std: Sequence[float]
    erase: tuple[tuple[Tensor, Tensor] | None, ...] | None = None

    @property
    def targets(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.y1, self.y2, self.lam

    def pixels(self, view: int = 0, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> Tensor:
        """Normalised, erased and mixed images `[B, 3, H, W]` in the autocast dtype (float32 without autocast)."""
        return kernels.pixels(self.images[view], **self._rendering(view, mean, std))

    def patches(self, patch_size: int, view: int = 0) -> Tensor:
        """The same pixels as `[B, patches, 3 * patch_size**2]`, the layout of a patch convolution's weight."""
        return kernels.patchify(self.images[view], patch_size=patch_size, **self._rendering(view, None, None))

    def _rendering(self, view: int, mean: Sequence[float] | None, std: Sequence[float] | None) -> dict[str, Any]:
        device = self.images[view].device.type
        return {
            "mean": self.mean if mean is None else mean,
            "std": self.std if std is None else std,
            "partner": self.partner,
            "lam": self.pixel_lam,
            "box": self.box[view],
            "erase": None if self.erase is None else self.erase[view],
            "dtype": torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32,
        }


@dataclass
class Out:
    """What a forward returns: a scalar loss, optionally logits `[B, K]`, and detached scalar parts for the log."""

    loss: Tensor
    logits: Tensor | None = None
    parts: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Context:
    """What a method may know of the run it is built for."""

    num_classes: int
    epochs: int
    steps: int
    teacher: "Callable[[Any], Teacher]"


class Method(nn.Module):
    """Base class of training methods. Override `forward`, and anything else only when the method differs there."""

    Config: ClassVar[type[MethodConfig]]
    teacher: "Teacher | None" = None

    @classmethod
    def views(cls, config: MethodConfig) -> Sequence[View]:
        """The views of every sample that the method wants under `config`, an instance of `Config`; `batch.images` has
        them in this order. Called without a model, whenever a recipe is validated."""
        return (View(),)

    def __init__(self, model: nn.Module, config: MethodConfig, context: Context) -> None:
        super().__init__()
        self.model = model
        self.config = config

    @property
    def noise_per_sample(self) -> int:
        """Uniforms each sample needs per step (drop-path draws of the model)."""
        return self.model.noise_per_sample

    def forward(self, batch: Batch) -> Out:
        """Loss of one micro-batch. No `.item()`, no collectives: this is what DDP and compilers wrap."""
        raise NotImplementedError

    def student(self, batch: Batch) -> Tensor | tuple[Tensor, Tensor]:
        """The student's logits, fed patches where the model takes them and images otherwise."""
        patch_size = getattr(self.model, "patch_size", None)
        x = batch.pixels() if patch_size is None else batch.patches(patch_size)
        return self.model(x, noise=batch.noise)

    def step(self, batch: Batch, engine: Any) -> None:
        """Gradients of one micro-batch: one forward, one backward. Inner loops override this and call `engine.run`."""
        with engine.micro():
            engine.backward(engine.run(batch).loss)

    def after_step(self, engine: Any) -> None:
        """After the optimizer's update: EMA teachers, centres."""

    def on_epoch(self, epoch: int, engine: Any) -> None:
        """Before the first step of an epoch."""

    def param_groups(self, base: list) -> list:
        """Optimizer groups; `base` is decayed and undecayed parameters (`engine.optim.ParamGroup`)."""
        return base

    def predict(self, x: Tensor) -> dict[str, Tensor]:
        """Named scores `[B, K]` for normalised images `[B, 3, H, W]`; the first is the method's answer."""
        return scores(self.model(x), "softmax")

    def export(self) -> nn.Module:
        """The deployable student."""
        return self.model


def scores(logits: Tensor | tuple[Tensor, Tensor], fuse: Fuse) -> dict[str, Tensor]:
    """Scores of a model with one or two heads.

    Two heads are fused by the sum of softmaxes (DeiT paper, section 4), the mean of logits (the public code), or by
    reading one head alone.
    """
    if isinstance(logits, Tensor):
        return {"class": logits.float()}
    first, second = (head.float() for head in logits)
    fused = {
        "softmax": lambda: first.softmax(-1) + second.softmax(-1),
        "logit": lambda: (first + second) / 2,
        "class": lambda: first,
        "distillation": lambda: second,
    }[fuse]()
    return {"fused": fused, "class": first, "distillation": second}
