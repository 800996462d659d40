"""The typed sections of a recipe, except `method:`, whose model belongs to the method (`fastdeit.methods`).

Every section is frozen and knows all its keys. What one section can check alone is checked here; `recipe.py` reads the
YAML, checks what spans sections, and turns pydantic's complaints into sentences with file and line.
"""

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticKnownError

from fastdeit.data import kinds

Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Side = Annotated[int, Field(ge=1, le=65_536)]
Classes = Annotated[int, Field(ge=1, le=100_000_000)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]


def _ascending(limits: tuple[float, float]) -> tuple[float, float]:
    if limits[0] > limits[1]:
        raise ValueError("must be [smallest, largest]")
    return limits


def _inside_the_image(scale: tuple[float, float]) -> tuple[float, float]:
    if scale[1] > 1:
        raise ValueError("must be at most 1: a crop is a part of the image")
    return scale


def _known_policy(augment: str) -> str:
    # Policies import numpy; reading, listing and showing recipes does without.
    from fastdeit.data import policy

    policy.parse(augment)
    return augment


def _fits_the_policy(strength: Any, info: ValidationInfo) -> Any:
    from fastdeit.data import policy

    policy.parse(info.data.get("augment") or "none", color_jitter=strength)
    return strength


def _known_source(source: str) -> str:
    if source not in kinds.names() and ":" not in source:
        choices = *kinds.names(), "an import path package.module:KIND"
        raise PydanticKnownError("literal_error", {"expected": ", ".join(f"'{choice}'" for choice in choices)})
    return source


Range = Annotated[tuple[Positive, Positive], AfterValidator(_ascending)]
Crop = Literal["random_resized", "simple"]
CropScale = Annotated[Range, AfterValidator(_inside_the_image)]
Policy = Annotated[str, AfterValidator(_known_policy)]
Source = Annotated[str, AfterValidator(_known_source)]
Jitter = Annotated[
    Annotated[NonNegative, Tag("one")]
    | Annotated[tuple[NonNegative, ...], Field(min_length=3, max_length=4), Tag("all")],
    Discriminator(lambda strength: "all" if isinstance(strength, list | tuple) else "one"),
    AfterValidator(_fits_the_policy),
]


class Section(BaseModel):
    """Base of the sections: frozen, no unknown key, no NaN or infinity; defaults are validated like given values."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


def _sourced(figure: Any) -> str:
    if not isinstance(figure, str) or ("unverified" not in figure and "source:" not in figure):
        raise ValueError("must name its source, as in '81.8 (source: ...)', or say unverified")
    return figure


Figure = Annotated[str, BeforeValidator(_sourced)]


class About(Section):
    """What to expect of a recipe: for people, read by nothing else."""

    summary: str = ""
    """One line for `fastdeit recipes`."""
    command: str = ""
    """The command that the figures below belong to."""
    hardware: Figure = "unverified"
    hours: Figure = "unverified"
    """Wall-clock time of the whole run."""
    top1: Figure = "unverified"
    """Top-1 accuracy in per cent on the held-out images."""


class ModelConfig(Section):
    """The student."""

    name: Text | None = None
    """A model of `fastdeit.models`; either this or `timm`."""
    timm: Text | None = None
    """A model of timm, trained as it is."""
    image_size: Annotated[
        Annotated[Side, Tag("side")] | Annotated[tuple[Side, Side], Tag("sides")],
        Discriminator(lambda size: "sides" if isinstance(size, list | tuple) else "side"),
    ] = 224
    """Input in pixels: one number, or [height, width]."""
    num_classes: Classes | None = None
    """null: as many as the data set has."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Stochastic depth: drop rate of the last block; the rates of the blocks before rise linearly from 0."""
    weights: Text | None = None
    """Initial weights: a safetensors file, a checkpoint or a run directory. null: random."""

    @field_validator("timm")
    @classmethod
    def _one_model(cls, timm: str | None, info: ValidationInfo) -> str | None:
        name = info.data.get("name")
        if timm is not None and name is not None:
            raise ValueError(f"is one model too many beside model.name {name}; remove one of the two")
        if timm is None and name is None and "name" in info.data:
            raise ValueError("is required where there is no model.name: one of them says which model to train")
        return timm


class ViewConfig(Section):
    """What a recipe changes of one view of its method; null: nothing. Fields not explained here are those of `data`."""

    size: Side | None = None
    """Side of the view in pixels."""
    crop: Crop | None = None
    crop_scale: CropScale | None = None
    flip: Fraction | None = None
    augment: Policy | None = None
    color_jitter: Jitter | None = None
    erase: Fraction | None = None
    crop_of: Text | None = None
    """An earlier view of which crop and flip are taken."""


class DataConfig(Section):
    """Where samples come from and how they are augmented. Defaults are DeiT's, but for `augment` and `erase`."""

    source: Source = "folder"
    """folder: ROOT/SPLIT/CLASS/image; packed: ROOT/SPLIT.pack, made by `fastdeit data pack`; tar: shards in the
    WebDataset layout; tfrecord: TensorFlow's; parquet: files of the Hugging Face hub; arrow: what its `save_to_disk`
    writes; imagenet, cifar10, ... as their authors distribute them; synthetic: noise made on the fly; digits:
    scikit-learn's handwritten digits; package.module:KIND: a reader of your own. See docs/data.md."""
    root: Text | None = None
    """Directory of the data set; synthetic and digits have none."""
    train: Text = "train"
    """Name of the training split under `root`: a folder, or files as docs/data.md says. Public data sets that come
    split need none."""
    val: Text = "val"
    """Name of the held-out split under `root`, likewise."""
    crop: Crop = "random_resized"
    """simple: DeiT III's, resized so that the short side fits, padded by 4 reflected pixels, cut at random."""
    crop_scale: CropScale = (0.08, 1.0)
    """Area of the random resized crop as a fraction of the image: smallest, largest."""
    crop_ratio: Range = (0.75, 1.3333333333)
    """Width over height of the random resized crop: smallest, largest."""
    flip: Fraction = 0.5
    """Probability of a horizontal flip."""
    augment: Policy = "none"
    """Operations on the pixels in timm's notation: rand-m9-mstd0.5-inc1, original, trivial, three_augment, none, ..."""
    color_jitter: Jitter | None = None
    """Strength of brightness, contrast and saturation, or three of them, or four with the hue's; null: that of the
    policy in `augment`, 0.3 for three_augment and none for the others."""
    erase: Fraction = 0.0
    """Probability of random erasing: a rectangle of 2 to 33 % of the image filled with noise."""
    views: dict[str, ViewConfig] = {}
    """Of a method that wants several views of a sample: what differs from the method's own settings, by view."""
    mixup: NonNegative = 0.8
    """Parameter of mixup's Beta distribution; 0 turns mixup off."""
    cutmix: NonNegative = 1.0
    """Parameter of cutmix's Beta distribution; 0 turns cutmix off."""
    mix_probability: Fraction = 1.0
    """Probability that samples are mixed at all."""
    mix_switch: Fraction = 0.5
    """Probability of cutmix instead of mixup, where both are on."""
    group_size: Count = 64
    """Samples that are mixed among themselves (DeiT: the batch of one GPU), whatever the number of processes."""
    mix_mode: Literal["batch", "pair", "element"] = "batch"
    """Samples that share one mixing draw: a whole group, the two partners of a pair, or none."""
    repeats: Count = 3
    """Copies of each sample in an epoch's stream (repeated augmentation); 1 turns it off."""
    mean: tuple[Fraction, Fraction, Fraction] = (0.485, 0.456, 0.406)
    """Mean of the red, green and blue channel, in units of [0, 1] (default: ImageNet)."""
    std: tuple[Positive, Positive, Positive] = (0.229, 0.224, 0.225)
    """Standard deviation of the channels, likewise."""
    eval_crop_ratio: Annotated[float, Field(gt=0, le=1)] = 0.875
    """Side of the central crop in evaluation over the side of the resized image."""
    threads: Count | None = None
    """CPU threads of the input pipeline per process; null: the process's share of the cores."""
    max_bad_fraction: Fraction = 0.001
    """Share of the data set that may be unreadable before the run stops."""
    synthetic_samples: Count = 10_000
    """Size of the training set, for source synthetic."""
    synthetic_classes: Classes = 1000
    """Number of classes, for source synthetic."""

    @field_validator("root")
    @classmethod
    def _root_is_read(cls, root: str | None, info: ValidationInfo) -> str | None:
        source = info.data.get("source", "folder")
        if root is not None and source in kinds.GENERATED:
            raise ValueError(f"has no place beside data.source {source}, which reads no directory of yours")
        return root

    @field_validator("group_size")
    @classmethod
    def _in_pairs(cls, group_size: int, info: ValidationInfo) -> int:
        mixing = info.data.get("mix_probability", 0) and (info.data.get("mixup", 0) or info.data.get("cutmix", 0))
        if mixing and group_size % 2:
            raise ValueError("must be even, because mixup and cutmix pair the samples of a group")
        return group_size


class OptimConfig(Section):
    """AdamW and its schedule. Nothing here is scaled by the batch size or the number of processes."""

    lr: Positive
    """Peak learning rate of the global batch."""
    weight_decay: NonNegative = 0.05
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: Positive = 1e-8
    clip_grad: Positive | None = None
    """Largest norm of the gradient of all parameters; null: no clipping."""
    schedule: Literal["cosine", "deit-exact"] = "cosine"
    """cosine: per step, after a linear warm-up; deit-exact: the public code's, per epoch and one epoch late."""
    warmup_epochs: NonNegative = 5.0
    warmup_lr: NonNegative = 1e-6
    """Learning rate at the first step of the warm-up."""
    min_lr: NonNegative = 1e-5
    """Learning rate at the end of the schedule."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay per step of the running average of the weights, which is evaluated besides them; null: no average."""
    decay_dist_token: bool = False
    """Apply weight decay to the distillation token, as the public code does."""

    @field_validator("min_lr")
    @classmethod
    def _below_peak(cls, min_lr: float, info: ValidationInfo) -> float:
        if min_lr > info.data.get("lr", min_lr):
            raise ValueError(f"must not be above optim.lr ({info.data['lr']:g})")
        return min_lr


class TrainConfig(Section):
    """How much of what."""

    epochs: Count
    batch_size: Count
    """Samples per optimizer step, over all processes and micro-batches."""
    accumulate: Count = 1
    """Micro-batches per optimizer step, to save memory; the result is that of one batch."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """The one seed: initial weights, order, augmentation, mixing, drop-path."""
    eval_every: Count = 1
    """Epochs between evaluations."""


class EngineConfig(Section):
    """How the run is carried out: nothing here is meant to change what is learned."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is a GPU."""
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Type of the matrix products: bf16 needs an A100 or newer, fp16 scales the loss."""
    capture: Literal["none", "compile", "graph"] = "none"
    """none: kernel by kernel; compile: the method's forward by torch.compile; graph: the whole step as a CUDA graph."""
    log_every: Count = 50
    """Steps between two lines of metrics."""
    checkpoint_every: Positive = 1.0
    """Epochs between two checkpoints; fractions are allowed."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    """Newest checkpoints kept. At least two, so that a damaged one costs an interval and not the run."""
    sinks: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where metrics go besides metrics.jsonl."""
