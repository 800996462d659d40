"""The `method:` section of a recipe: what all methods have, a teacher's part, and the methods that fastdeit brings.

Importing this module imports no torch, so that a recipe is refused in tenths of a second. The methods themselves are in
files of their own, which `METHODS` names.
"""

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PositiveInt,
    SerializerFunctionWrapHandler,
    Tag,
    ValidationInfo,
    WithJsonSchema,
    WrapSerializer,
    field_validator,
    model_validator,
)

from fastdeit.fields import ImageSize, PathText
from fastdeit.models import names
from fastdeit.views import View

Fuse = Literal["softmax", "logit", "class", "distillation"]


class MethodConfig(BaseModel):
    """Base of every `method:` section: frozen, and no key it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    needs_drop_path: ClassVar[bool] = False
    """Whether the method learns nothing where the model has no stochastic depth: such a recipe is refused."""
    needs_boxes: ClassVar[bool] = False
    """Whether the method asks `batch.boxes` where things lie: a recipe that mixes pictures is then refused, and so are
    data without annotations."""
    passes: ClassVar[int] = 1
    """How often each image goes through the student in a step, which `fastdeit plan` reckons with."""

    use: str
    """Name of the method, or an import path `package.module:Class`."""
    fuse: Fuse = "softmax"
    """How the two heads of a distilled model become one answer. softmax: the sum of their softmaxes, as in the DeiT
    paper; logit: the mean of their logits, as in DeiT's public code; class, distillation: one head alone."""

    def views(self) -> Sequence[View]:
        """The views of every sample that the method wants; `batch.images` has them in this order. Asked whenever a
        recipe is validated, without a model."""
        return (View(),)

    def teachers(self) -> tuple["TeacherConfig", ...]:
        """The teachers that the field `teacher` names, in order; none where there is no such field."""
        given = getattr(self, "teacher", None)
        if given is None:
            return ()
        return given if isinstance(given, tuple) else (given,)


class LabelConfig(MethodConfig):
    """Shared by methods that learn from labels: the loss of the (mixed) label and its smoothing."""

    loss: Literal["ce", "bce"] = "ce"
    """ce: cross-entropy with the mixed target; bce: binary cross-entropy of every class, as DeiT III has it."""
    smoothing: float = Field(0.1, ge=0, lt=1)
    """Share of the target that all classes have in common (label smoothing)."""

    @model_validator(mode="after")
    def _smoothing_fits_loss(self) -> "LabelConfig":
        if self.loss == "bce" and self.smoothing > 0:
            raise ValueError("loss bce needs smoothing 0: a smoothed target makes every class positive")
        return self


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
    model: Annotated[str, AfterValidator(names.check)] | None = None
    """Name of a fastdeit model; needs `weights`."""
    weights: PathText | None = None
    """Address of its weights, as that of model.weights. A run and timm:NAME also tell which network it is."""
    weights_grid: tuple[PositiveInt, PositiveInt] | None = None
    """[height, width] in patches of the positional embedding of `weights`, as model.weights_grid."""
    image_size: ImageSize | None = None
    """Resolution in pixels: the side of a square, or [height, width]; null is the one it was trained at for a run, else
    the student's. Positions of a transformer are interpolated to it."""
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
        if self.recipe is not None and self.weights is not None:
            raise ValueError(
                "a teacher with a recipe is trained here, and takes no weights; to take weights instead, name them "
                "alone: method.teacher=ADDRESS"
            )
        if self.model is not None and self.weights is None:
            raise ValueError("a teacher given by model needs weights: an untrained network has nothing to teach")
        if self.weights_grid is not None and self.weights is None:
            raise ValueError("weights_grid describes weights, and none are given; leave it out")
        if (self.mean is None) != (self.std is None):
            raise ValueError("give mean and std together, or neither")
        return self


class FeatureTeacherConfig(TeacherConfig):
    """A teacher that the method asks for tokens and q/k/v alone: its head, if it has one, may be of any classes."""

    classifies: ClassVar[bool] = False


def _as_tuple(given: Any) -> Any:
    return tuple(given) if isinstance(given, list | tuple) else (given,)


def _different(teachers: tuple[TeacherConfig, ...]) -> tuple[TeacherConfig, ...]:
    if not teachers:
        raise ValueError("names no teacher")
    if len(set(teachers)) < len(teachers):
        raise ValueError("names the same teacher twice")
    return teachers


def _as_written(teachers: tuple[TeacherConfig, ...], dump: SerializerFunctionWrapHandler) -> Any:
    dumped = dump(teachers)
    return dumped[0] if len(dumped) == 1 else dumped


Teachers = Annotated[
    tuple[TeacherConfig, ...],
    BeforeValidator(_as_tuple),
    AfterValidator(_different),
    WrapSerializer(_as_written),
    WithJsonSchema({"anyOf": [{"type": "object"}, {"type": "array", "items": {"type": "object"}}]}),
]
"""One teacher or a list of several; a recipe has the fields of one where others have the list."""


# ---- the methods that fastdeit brings --------------------------------------------------------------------------------


ClassWeights = Annotated[
    Annotated[Literal["balanced"], Tag("word")] | Annotated[tuple[Annotated[float, Field(ge=0)], ...], Tag("list")],
    Discriminator(lambda weights: "word" if isinstance(weights, str) else "list"),
]


class SupervisedConfig(LabelConfig):
    """Training on labels alone. A model with two heads is trained on the mean of their logits, as DeiT's fine-tuning
    does."""

    use: str = "supervised"
    fuse: Fuse = "logit"
    """How two heads become one answer: by default the mean of their logits, which is what is trained."""
    class_weights: ClassWeights | None = None
    """Weight of each class in the loss: a list in the order of the classes, or balanced: images / (classes * images
    of the class), so that all classes weigh the same; null: each image weighs the same."""

    @field_validator("class_weights")
    @classmethod
    def _only_of_cross_entropy(cls, weights: Any, info: ValidationInfo) -> Any:
        if weights is not None and info.data.get("loss") == "bce":
            raise ValueError("does not go with method.loss bce, which has no term of a single class")
        return weights


class DistillConfig(LabelConfig):
    """The class head learns the label, the distillation head the teacher; a model with one head learns both with it."""

    use: str = "distill"
    distillation: Literal["hard", "soft"] = "hard"
    """hard: the student learns the teacher's answer; soft: the teacher's distribution over all classes."""
    alpha: float = Field(0.5, ge=0, le=1)
    """Share of the teacher in the loss."""
    tau: float = Field(1.0, gt=0)
    """Temperature of the soft distributions."""
    reduction: Literal["numel", "batchmean"] = "numel"
    """What divides the soft term: batch times classes, as in the public code, or the batch alone."""
    cached: PathText | None = None
    """Folder that `fastdeit cache` has filled with the teacher's logits, in place of `teacher`: see docs/cache.md."""
    teacher: Teachers | None = Field(None, validate_default=True)
    """Where the teacher comes from; either this or `cached`. A list names several, whose probabilities are averaged
    (docs/distillation.md)."""

    @field_validator("teacher")
    @classmethod
    def _one_source(cls, teacher: Any, info: ValidationInfo) -> Any:
        cached = info.data.get("cached")
        if teacher is not None and cached is not None:
            raise ValueError(f"is one teacher too many beside method.cached {cached}; remove one of the two")
        if teacher is None and cached is None and "cached" in info.data:
            raise ValueError("is required where there is no method.cached: one of them says who teaches")
        return teacher


class CosubConfig(MethodConfig):
    """Co-training of two submodels: each image goes twice through the model, whose stochastic depth makes two submodels
    of it, and each learns the label and the other's answer. It doubles the compute of a step, and needs
    model.drop_path."""

    needs_drop_path: ClassVar[bool] = True
    passes: ClassVar[int] = 2

    use: str = "cosub"
    fuse: Fuse = "logit"
    """How two heads become one answer: by default the mean of their logits, which is what is trained."""
    binarise: bool = True
    """Whether each label of a mixed image counts in full, as in DeiT III; false: by its share of the image."""
    smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target that all classes have in common (label smoothing); it needs binarise: false."""

    @field_validator("smoothing")
    @classmethod
    def _smoothing_fits_target(cls, smoothing: float, info: ValidationInfo) -> float:
        if smoothing > 0 and info.data.get("binarise"):
            raise ValueError("must be 0 beside binarise true: a smoothed target makes every class positive")
        return smoothing


class Shipped(NamedTuple):
    """A method that fastdeit brings: the import path of its class, and the class's `Config`."""

    path: str
    config: type[MethodConfig]


METHODS = {
    "supervised": Shipped("fastdeit.methods.supervised:Supervised", SupervisedConfig),
    "distill": Shipped("fastdeit.methods.distill:Distill", DistillConfig),
    "cosub": Shipped("fastdeit.methods.cosub:Cosub", CosubConfig),
}
"""By the name that a recipe's `method.use` has for it."""
