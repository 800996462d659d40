"""The typed sections of a recipe, except `method:`, whose model belongs to the method (`fastdeit.methods`).

Every section is frozen and refuses unknown keys. A section checks here what it can check alone. `resolve.py` reads the
YAML and checks sections against each other; `errors.py` makes pydantic's errors sentences with file and line.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, ValidationInfo, field_validator
from pydantic_core import PydanticKnownError

from fastdeit.data.sources import kinds
from fastdeit.data.sources.share import is_share, share
from fastdeit.fields import (
    Count,
    Fraction,
    ImageSize,
    NonNegative,
    PathText,
    Positive,
    Range,
    Section,
    Side,
    Text,
    Threads,
)
from fastdeit.models import names
from fastdeit.views import AugmentSettings, Crop, CropScale, Jitter, PolicyText, SizeSchedule, ViewSettings

Classes = Annotated[int, Field(ge=1, le=1_000_000)]


def _known_source(source: str) -> str:
    if source not in kinds.names() and ":" not in source:
        choices = *kinds.names(), "an import path package.module:KIND"
        raise PydanticKnownError("literal_error", {"expected": ", ".join(f"'{choice}'" for choice in choices)})
    return source


Source = Annotated[str, AfterValidator(_known_source)]
ModelName = Annotated[Text, AfterValidator(names.check)]


def _sourced(figure: Any) -> str:
    if not isinstance(figure, str) or ("unverified" not in figure and "source:" not in figure):
        raise ValueError("must name its source, as in '81.8 (source: ...)', or say unverified")
    return figure


Figure = Annotated[str, BeforeValidator(_sourced)]


class About(Section):
    """What a reader can expect of a recipe. No training depends on it."""

    summary: str = ""
    """One line for `fastdeit recipes`."""
    command: str = ""
    """The command that the figures below belong to."""
    hardware: Figure = "unverified"
    """What the run needs or was made on."""
    hours: Figure = "unverified"
    """Wall-clock time of the whole run."""
    top1: Figure = "unverified"
    """Top-1 accuracy in per cent on the held-out images."""
    follows: Literal["deit", "big_vision", "pycls"] | None = None
    """Whose public code has these settings: a run then says at its start in what it differs from that. null: nobody's,
    or the recipe does not say it."""


class ModelConfig(Section):
    """The student."""

    name: ModelName | None = None
    """A model of `fastdeit.models`; either this or `timm`."""
    timm: Text | None = None
    """A model of timm, which is trained unchanged."""
    image_size: ImageSize = 224
    """Input in pixels: the side of a square, or [height, width]."""
    num_classes: Classes | None = None
    """null: as many as the data set has."""
    drop_path: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Stochastic depth: drop rate of the last block."""
    drop_path_mode: Literal["linear", "constant"] | None = None
    """linear: the rates of the blocks rise from 0 to drop_path, as in DeiT; constant: all are drop_path (DeiT III);
    null: the one of the two that the model's authors use."""
    drop_path_skip: bool = False
    """Compute no branch of a sample that drops it: less work, but another draw. Of every data.group_size samples a
    fixed number drop a branch, the rate rounded to whole samples. false: each sample is drawn by itself."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Rate at which features in front of the heads are zeroed in training (timm: drop_rate)."""
    weights: PathText | None = None
    """Address of the initial weights: a run (RUN, RUN@best, RUN@ema), a checkpoint, a safetensors or .pth file, or
    timm:NAME. null: random. See docs/weights.md."""
    weights_grid: tuple[Side, Side] | None = None
    """[height, width] in patches of the positional embedding of `weights`, needed of a file whose grid is no square;
    null: what the run says, or a square."""
    needs_weights: bool = False
    """The recipe goes on from trained weights: a run of it is refused where `weights` are missing."""

    freeze: tuple[Text, ...] = ()
    """Parts that are not trained: names of parameters and modules, as in [patch_embed, blocks.0-5, blocks.*.mlp], and
    the words embedding, attention, all_but_head (a linear probe) and all_but_attention (DeiT's attention-only
    fine-tuning: heads and positions are trained, too). Frozen BatchNorm keeps its statistics. Default: none."""

    @field_validator("timm")
    @classmethod
    def _one_model(cls, timm: str | None, info: ValidationInfo) -> str | None:
        name = info.data.get("name")
        if timm is not None and name is not None:
            raise ValueError(f"is one model too many beside model.name {name}; remove one of the two")
        if timm is None and name is None and "name" in info.data:
            raise ValueError("is required where there is no model.name: one of them says which model to train")
        return timm

    @field_validator("drop_path_mode")
    @classmethod
    def _ours_alone(cls, mode: str | None, info: ValidationInfo) -> str | None:
        if mode == "constant" and info.data.get("timm") is not None:
            raise ValueError("must be linear beside model.timm: timm's models have no other drop-path")
        return mode

    @field_validator("drop_path_skip")
    @classmethod
    def _something_to_skip(cls, skip: bool, info: ValidationInfo) -> bool:
        if skip and info.data.get("drop_path") == 0:
            raise ValueError("skips what model.drop_path drops, which is 0 here; set model.drop_path, or leave it out")
        if skip and info.data.get("timm") is not None:
            raise ValueError("must be false beside model.timm: timm's models compute what they drop")
        return skip


class DataSplits(Section):
    """Where samples come from."""

    source: Source = "folder"
    """folder: ROOT/SPLIT/CLASS/image; packed: ROOT/SPLIT.pack, made by `fastdeit data pack`; tar: shards in the
    WebDataset layout; tfrecord: TensorFlow's; parquet: files of the Hugging Face hub; arrow: what its `save_to_disk`
    writes; imagenet, cifar10, ... as their authors distribute them; synthetic: noise made on the fly; digits:
    scikit-learn's handwritten digits; package.module:KIND: a reader of your own. See docs/data.md."""
    root: PathText | None = None
    """Directory of the data set; synthetic and digits have none."""
    train: Text = "train"
    """Name of the training split under `root`: a folder, or files as docs/data.md says. Public data sets that come
    split need none."""
    val: Text = "val"
    """Name of the held-out split under `root`, likewise. Where nothing is called val, the one of valid, validation,
    test and dev that there is. A share such as 10% is held out of the training split, by the names of the images."""
    image_column: Text | None = None
    """What the column of the images is called, of source parquet and arrow, or that of their paths, of list; null:
    image, or as docs/data.md says."""
    label_column: Text | None = None
    """What the column of the labels is called, likewise; of source tar the field of KEY.json; null: label."""
    classes: PathText | None = None
    """File of class names, a line each: the first has label 0, and images of classes that it does not name are left
    out. null: classes are numbered as the data set has them."""

    @field_validator("val")
    @classmethod
    def _share_is_a_share(cls, val: str) -> str:
        if is_share(val):
            share(val)
        return val

    @field_validator("root")
    @classmethod
    def _root_is_read(cls, root: str | None, info: ValidationInfo) -> str | None:
        source = info.data.get("source", "folder")
        if root is not None and source in kinds.GENERATED:
            raise ValueError(f"does not go with data.source {source}, which reads no directory of yours")
        return root

    @field_validator("train", "val", "image_column", "label_column", "classes")
    @classmethod
    def _is_read(cls, value: str | None, info: ValidationInfo) -> str | None:
        source = info.data.get("source", "folder")
        if source in kinds.GENERATED and value != cls.model_fields[info.field_name].default:
            raise ValueError(f"does not go with data.source {source}, whose images are made here; leave it out")
        return value


class DataConfig(AugmentSettings, DataSplits):
    """The input of training and evaluation. Fields that stand here with their default alone are those of
    `AugmentSettings`; the defaults are DeiT's, but for `augment` and `erase`."""

    crop: Crop = "random_resized"
    crop_scale: CropScale = (0.08, 1.0)
    crop_ratio: Range = (0.75, 1.3333333333)
    flip: Fraction = 0.5
    augment: PolicyText = "none"
    color_jitter: Jitter | None = None
    erase: Fraction = 0.0
    size_schedule: SizeSchedule = ()
    """Progressive resizing: pairs [epoch, size], such as [[0, 128], [100, 160], [200, 224]]. From that epoch on,
    training images have that size in place of `model.image_size`, but for views with a size of their own. Evaluation
    has `model.image_size`. []: one size throughout."""
    views: dict[str, ViewSettings] = Field(default_factory=dict)
    """By name of a view that the method asks for: what is changed of the method's own settings."""
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
    eval_crop_ratio: Annotated[float, Field(ge=0.01, le=1)] = 0.875
    """Side of the central crop in evaluation over the side of the resized image."""
    threads: Threads | None = None
    """CPU threads of the input pipeline per process; null: the process's share of the cores."""
    max_bad_fraction: Fraction = 0.001
    """Share of the data set that may be unreadable before the run stops; of a small set up to five images, but a tenth.
    With 0 the first one stops it."""
    synthetic_samples: Annotated[int, Field(ge=1, le=20_000_000)] = 10_000
    """Size of the training set, for source synthetic."""
    synthetic_classes: Classes = 1000
    """Number of classes, for source synthetic."""

    @property
    def mixes(self) -> bool:
        """Whether training images are mixed in pairs."""
        return self.mix_probability > 0 and (self.mixup > 0 or self.cutmix > 0)

    @field_validator("group_size")
    @classmethod
    def _in_pairs(cls, group_size: int, info: ValidationInfo) -> int:
        mixing = info.data.get("mix_probability", 0) and (info.data.get("mixup", 0) or info.data.get("cutmix", 0))
        if mixing and group_size % 2:
            raise ValueError("must be even, because mixup and cutmix pair the samples of a group")
        return group_size


class OptimConfig(Section):
    """What all optimizers have, and the schedule. Nothing here is scaled by the batch size or the number of processes.

    A recipe's section has its optimizer's own fields besides (`fastdeit.engine.optimizers`): adamw and lamb have betas
    and eps, muon these and momentum; sgd has momentum, nesterov and decoupled_decay.
    """

    name: Text = "adamw"
    """adamw, lamb, sgd, muon, or an import path `package.module:Class`."""
    lr: Positive
    """Peak learning rate of the global batch."""
    weight_decay: NonNegative = 0.05
    """Share of the weights that an update takes away, times the learning rate. Of sgd 1e-4 by default."""
    weight_decay_end: NonNegative | None = None
    """Weight decay at the end of the run, to which it goes from weight_decay by a half cosine, step by step and without
    a warm-up, as in DINO; null: weight_decay throughout. A method's own groups keep their ratio to it."""
    clip_grad: Positive | None = None
    """Limit of gradient clipping; null: no clipping. Of lamb 1.0 by default."""
    clip_mode: Literal["norm", "agc"] = "norm"
    """What clip_grad limits. norm: the norm of the gradient of all parameters; agc (adaptive gradient clipping): the
    ratio of the norms of gradient and weights of each unit, such as a row of a matrix; 0.01 is usual, and the heads are
    not clipped."""
    schedule: Literal["cosine", "deit-exact"] = "cosine"
    """cosine: per step, begun anew after a linear warm-up; deit-exact: the public code's, per epoch and one epoch late,
    into which the warm-up cuts. Over 300 epochs with 5 of warm-up, the rates of cosine add up to 1.7 % more."""
    warmup_epochs: NonNegative | None = 5.0
    """Epochs in which the learning rate rises from `warmup_lr` to `lr`; fractions are allowed; null: a twentieth of the
    run."""
    warmup_lr: NonNegative = 1e-6
    """Learning rate at the first step of the warm-up."""
    min_lr: NonNegative = 1e-5
    """Learning rate at the end of the schedule."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay per step of the running average of the weights, which is evaluated besides them; null: no average."""
    layer_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    """Factor on the learning rate from each layer to the one before it: the heads have `lr`, the last block
    layer_decay * lr, the embedding layer_decay ** (blocks + 1) * lr; null: one rate for all."""
    decay_dist_token: bool = False
    """Apply weight decay to the distillation token, as the public code does."""

    @field_validator("clip_mode")
    @classmethod
    def _limit_is_a_ratio(cls, clip_mode: str, info: ValidationInfo) -> str:
        limit = info.data.get("clip_grad", 0)
        if clip_mode == "agc" and (limit is None or limit >= 1):
            known = "null" if limit is None else f"{limit:g}"
            raise ValueError(f"agc needs an optim.clip_grad below 1, such as 0.01; it is {known}")
        return clip_mode

    @field_validator("warmup_lr", "min_lr")
    @classmethod
    def _below_peak(cls, rate: float, info: ValidationInfo) -> float:
        unused = info.field_name == "warmup_lr" and info.data.get("warmup_epochs") == 0
        if not unused and rate > info.data.get("lr", rate):
            raise ValueError(f"must not be above optim.lr ({info.data['lr']:g})")
        return rate


class TrainConfig(Section):
    """Length of the run, batch size, seed, evaluation."""

    epochs: Count | None = None
    """Passes over the training set; either this or `steps`. A run that starts from model.weights may leave out both:
    its epochs then follow the size of the data set (docs/finetune.md)."""
    steps: Count | None = None
    """Steps of the optimizer, in place of `epochs`."""
    batch_size: Annotated[int, Field(ge=1, le=2**24)]
    """Samples per optimizer step, over all processes and micro-batches."""
    accumulate: Count = 1
    """Micro-batches per optimizer step, to save memory; the result is that of one batch."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    """The only seed: of the initial weights, order, augmentation, mixing and drop-path."""
    eval_every: Positive = 1.0
    """Epochs between evaluations; fractions are allowed."""
    eval_every_steps: Count | None = None
    """Steps between evaluations, in place of `eval_every`."""
    stop_after: Count | None = None
    """Evaluations in a row without a new best after which the run ends early; null: never."""
    best_by: Text | None = None
    """Metric by which the best checkpoint is chosen; null: the first of the method's first evaluator."""

    @field_validator("steps")
    @classmethod
    def _one_length(cls, steps: int | None, info: ValidationInfo) -> int | None:
        epochs = info.data.get("epochs")
        if steps is not None and epochs is not None:
            raise ValueError(f"is one length too many beside train.epochs {epochs}; remove one of the two")
        return steps


class EngineConfig(Section):
    """How the run is carried out. Nothing here changes what is learned, except by rounding."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: cuda where there is a GPU."""
    threads: Threads | None = None
    """Threads of a process that compute on the CPU. With another number sums round differently. null: the process's
    share of the processors; the run keeps that number. OMP_NUM_THREADS wins."""
    precision: Literal["fp32", "fp16", "bf16", "auto"] = "fp32"
    """Type of the matrix products: bf16 needs an A100 or newer, other GPUs refuse it; fp16 scales the loss. auto:
    bf16 where the device has it, else fp16, as on a V100. The run keeps the answer."""
    capture: Literal["none", "compile", "graph", "auto"] = "none"
    """none: kernel by kernel; compile: the method's forward by torch.compile; graph: the whole step as a CUDA graph;
    auto: graph where the modelled time of a step on the GPU is below twice the host's, else none. The run keeps the
    answer."""
    autotune: Literal["auto", "on", "off"] = "auto"
    """auto: the first steps on a GPU without measurements try kernels out, alone and in a whole step, and keep the
    fastest that are right; on: on any device, whatever was measured."""
    checkpoint_blocks: bool = False
    """Compute the activations of each block again in backward instead of keeping them: less memory, more time."""
    keep_activations: bool | Literal["auto"] = "auto"
    """Keep the activations of the MLPs for backward instead of making them again: a tenth to a fifth more memory, fewer
    bytes moved. `fastdeit plan` says how much of both. false: fastdeit's kernels make them again. auto: true where a
    step with them is modelled to take at most four fifths of a GPU's memory, else false. The run keeps the answer."""
    products: Literal["precision", "fp8"] = "precision"
    """Numbers that the blocks' linear layers multiply in training. precision: those of `precision`; fp8: 8 bits with a
    scale for each token and channel, forward and for the gradients of their inputs; those of the weights stay in bf16.
    That rounds much more, and no card has measured it yet. It needs precision bf16, or auto on a device that has it,
    and a GPU from the RTX 40 or H100 on; a CPU only imitates it."""
    residual: Literal["fp32", "bf16"] = "fp32"
    """Type of the residual stream between the blocks and of its gradient. bf16 moves fewer bytes and rounds them in
    every block; it needs precision bf16, or auto on a device that has it."""
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    """What each of several processes keeps. ddp: all of the network; fsdp2: a share of its weights, gradients, moments
    and averages. It then gathers the weights of a block whenever it computes the block. That is for networks that do
    not fit otherwise. The result is the same but for rounding, and a run may go on with the other."""
    reduce: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type in which gradients travel between processes. 16 bit halve the traffic and round every gradient twice; fp16
    needs precision fp16, or auto where that is fp16: its loss scale keeps small gradients from vanishing."""
    sync_batchnorm: bool = False
    """Normalise over the batches of all processes (SyncBatchNorm), so that several learn what one does; false: each
    process normalises its own, which is quicker."""
    log_every: Count = 50
    """Steps between two lines of metrics."""
    checkpoint_every: Positive = 1.0
    """Epochs between two checkpoints; fractions are allowed."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    """Newest checkpoints kept. At least two, so that a damaged one costs an interval and not the run."""
    async_checkpoints: bool = False
    """Write checkpoints beside the training, which waits only while its state is copied into host memory, as much as a
    checkpoint is large. One is written at a time, and the last one of a run is waited for."""
    on_save_error: Literal["stop", "warn"] = "stop"
    """What a file of the run that cannot be written does, as on a full disk. stop: the run ends, and says how to go on;
    warn: it says so, goes on, and tries the next time again. The last checkpoint is never given up silently."""
    on_spike: Literal["warn", "skip", "rollback"] = "warn"
    """What becomes of a step whose gradients have a norm of more than 10 times the usual one. warn: it is said; skip:
    the update is left out; rollback: the run goes on from the weights of its newest checkpoint as well."""
    timeout_s: Positive = 600.0
    """Seconds without progress after which one of several processes counts as hung: the run says which, and ends. The
    first step, evaluations and checkpoints may take an hour, or this if it is longer."""
    sinks: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where metrics go besides metrics.jsonl."""

    @field_validator("capture")
    @classmethod
    def _of_a_gpu(cls, capture: str, info: ValidationInfo) -> str:
        if capture == "graph" and info.data.get("device") == "cpu":
            raise ValueError("graph needs a GPU, and engine.device is cpu; use none or compile")
        return capture

    @field_validator("keep_activations")
    @classmethod
    def _kept_or_made_again(cls, keep: bool | str, info: ValidationInfo) -> bool | str:
        if keep is True and info.data.get("checkpoint_blocks"):
            raise ValueError(
                "has no effect beside engine.checkpoint_blocks, which computes all activations of a block again; use "
                "false for one of the two"
            )
        return keep

    @field_validator("parallel")
    @classmethod
    def _not_captured(cls, parallel: str, info: ValidationInfo) -> str:
        if parallel == "fsdp2" and (capture := info.data.get("capture", "none")) in ("compile", "graph"):
            raise ValueError(
                f"fsdp2 gathers and frees weights between the blocks of a step, which engine.capture {capture} cannot "
                "follow; use engine.capture=none, or engine.parallel=ddp"
            )
        return parallel

    @field_validator("reduce")
    @classmethod
    def _scaled(cls, reduce: str, info: ValidationInfo) -> str:
        if reduce == "fp16" and (precision := info.data.get("precision", reduce)) not in ("fp16", "auto"):
            raise ValueError(
                f"fp16 needs engine.precision fp16, not {precision}: without a loss scale small gradients would become "
                "0; bf16 keeps them"
            )
        return reduce

    @field_validator("products")
    @classmethod
    def _of_bf16(cls, products: str, info: ValidationInfo) -> str:
        precision = info.data.get("precision", "bf16")
        if products == "fp8" and precision not in ("bf16", "auto"):
            raise ValueError(
                f"fp8 rounds the operands of products in bf16: it needs engine.precision bf16, not {precision}"
            )
        if products == "fp8" and info.data.get("keep_activations") is True:
            raise ValueError("fp8 makes the activations of the MLPs again; use engine.keep_activations=false")
        return products

    @field_validator("residual")
    @classmethod
    def _as_the_products(cls, residual: str, info: ValidationInfo) -> str:
        if residual not in ("fp32", precision := info.data.get("precision", residual)) and precision != "auto":
            raise ValueError(f"{residual} needs engine.precision {residual}, not {precision}")
        return residual
