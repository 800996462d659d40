"""Flags of the training scripts of timm and DeiT, and what is written here instead of each.

The one table between their words and ours. An unknown flag or field is answered from it, and `fastdeit explain` and the
page of fields show it from the other side. It imports nothing heavy: an error of the command line is quick.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Flag:
    """Flags that mean what one field of a recipe, or one flag of ours, means.

    ours    a field, such as "optim.lr", or a flag, such as "--data"
    timm    names in timm's train.py, without dashes and with `-` between words
    deit    names in the main.py of facebookresearch/deit, likewise
    also    names that are common elsewhere
    value   what the field has to be where the flag takes no value; None: the flag's value is taken over
    note    where ours means something else: how the values are related
    """

    ours: str
    timm: tuple[str, ...] = ()
    deit: tuple[str, ...] = ()
    value: str | None = None
    note: str = ""
    also: tuple[str, ...] = ()

    @property
    def remark(self) -> str:
        """The note as the end of a sentence; "" where there is none."""
        return f" ({self.note})" if self.note else ""


def _both(ours: str, *names: str, value: str | None = None, note: str = "", also: tuple[str, ...] = ()) -> Flag:
    return Flag(ours, names, names, value, note, also)


_PER_GPU = "theirs is of one GPU, ours of all GPUs and micro-batches together"
_NOT_SCALED = "ours is used as it is: DeiT multiplies its own by the global batch size / 512"

FLAGS: tuple[Flag, ...] = (
    # ---- model
    _both("model.name", "model", note="model.timm=NAME trains a model of timm unchanged"),
    Flag("model.image_size", timm=("img-size",), deit=("input-size",)),
    Flag(
        "model.image_size",
        timm=("input-size",),
        note="theirs is channels, height and width, ours a side or [height, width]",
    ),
    Flag("model.num_classes", timm=("num-classes",), deit=("nb-classes",)),
    _both("model.drop_path", "drop-path"),
    Flag("model.drop_path", timm=("drop-connect",)),
    _both("model.dropout", "drop"),
    Flag("model.weights", timm=("initial-checkpoint", "pretrained-path"), deit=("finetune",)),
    Flag("model.weights", timm=("pretrained",), value="timm:NAME", note="NAME is that of a model of timm"),
    Flag("model.freeze", deit=("attn-only",), value="[all_but_attention]"),
    # ---- method
    _both("method.smoothing", "smoothing"),
    Flag("method.use", deit=("cosub",), value="cosub"),
    _both("method.loss", "bce-loss", value="bce", note="it needs method.smoothing=0"),
    Flag(
        "method.teacher.timm", timm=("kd-model-name",), deit=("teacher-model",), note="it belongs to method.use=distill"
    ),
    Flag("method.teacher.weights", deit=("teacher-path",)),
    Flag("method.distillation", deit=("distillation-type",), note="hard or soft, of method.use=distill"),
    Flag("method.alpha", deit=("distillation-alpha",)),
    Flag("method.tau", timm=("kd-temperature",), deit=("distillation-tau",)),
    # ---- data
    Flag("--data", timm=("data-dir",), deit=("data-path",)),
    Flag(
        "data.source",
        timm=("dataset",),
        deit=("data-set",),
        note="folder, imagenet, cifar10, ...: see fastdeit explain data.source",
    ),
    Flag("data.train", timm=("train-split",)),
    Flag("data.val", timm=("val-split",)),
    Flag("data.image_column", timm=("input-key",)),
    Flag("data.label_column", timm=("target-key",)),
    Flag("data.classes", timm=("class-map",), note="a file of names, a line each; no pickle is read"),
    Flag("data.crop", timm=("train-crop-mode",), note="random_resized is theirs of the name rrc"),
    Flag("data.crop", deit=("src",), value="simple"),
    Flag("data.crop_scale", timm=("scale",), note="[smallest, largest]"),
    Flag("data.crop_ratio", timm=("ratio",), note="[smallest, largest]"),
    Flag("data.flip", timm=("hflip",)),
    _both("data.augment", "aa"),
    Flag("data.augment", deit=("threeaugment",), value="three_augment"),
    Flag(
        "data.augment",
        timm=("no-aug",),
        value="none",
        note="data.crop, data.flip and data.erase are fields of their own",
    ),
    _both("data.color_jitter", "color-jitter"),
    _both("data.erase", "reprob"),
    _both("data.mixup", "mixup"),
    _both("data.cutmix", "cutmix"),
    _both("data.mix_probability", "mixup-prob"),
    _both("data.mix_switch", "mixup-switch-prob"),
    _both("data.mix_mode", "mixup-mode", note="their elem is our element"),
    Flag("data.repeats", timm=("aug-repeats",)),
    Flag("data.repeats", deit=("repeated-aug",), value="3"),
    Flag("data.repeats", deit=("no-repeated-aug",), value="1"),
    Flag("data.mean", timm=("mean",), note="[red, green, blue]"),
    Flag("data.std", timm=("std",), note="[red, green, blue]"),
    Flag("data.eval_crop_ratio", timm=("crop-pct",), deit=("eval-crop-ratio",)),
    Flag("data.threads", timm=("workers",), deit=("num-workers",), note="threads of one process, not processes"),
    # ---- optim
    _both("optim.name", "opt", also=("optimizer",)),
    _both("optim.lr", "lr", note=_NOT_SCALED, also=("learning-rate",)),
    _both("optim.weight_decay", "weight-decay", also=("wd",)),
    _both("optim.clip_grad", "clip-grad"),
    Flag("optim.clip_mode", timm=("clip-mode",), note="norm or agc; there is nothing like their value"),
    Flag("optim.layer_decay", timm=("layer-decay",)),
    _both("optim.momentum", "momentum", note="of optim.name=sgd"),
    _both("optim.betas", "opt-betas", note="[first, second], of adamw and lamb"),
    _both("optim.eps", "opt-eps", note="of adamw and lamb"),
    _both("optim.schedule", "sched"),
    _both("optim.warmup_epochs", "warmup-epochs"),
    _both("optim.warmup_lr", "warmup-lr"),
    _both("optim.min_lr", "min-lr"),
    _both("optim.ema_decay", "model-ema-decay"),
    _both("optim.ema_decay", "model-ema", value="0.99996", note="DeiT's decay"),
    Flag("optim.ema_decay", deit=("no-model-ema",), value="null"),
    # ---- train
    _both("train.epochs", "epochs"),
    _both("train.batch_size", "batch-size", note=_PER_GPU),
    Flag("train.batch_size", timm=("b",), note=_PER_GPU),
    Flag("train.accumulate", timm=("grad-accum-steps",)),
    _both("train.seed", "seed"),
    Flag("train.eval_every", timm=("val-interval",)),
    Flag("train.best_by", timm=("eval-metric",), note="top1_class, top1_fused, ...: as metrics.jsonl names them"),
    # ---- engine
    _both("engine.device", "device"),
    Flag(
        "engine.precision",
        timm=("amp", "native-amp"),
        value="bf16",
        note="fp16 on GPUs before the A100, as DeiT trains",
    ),
    Flag("engine.precision", timm=("amp-dtype",), note="their float16 is our fp16, bfloat16 our bf16"),
    Flag("engine.capture", timm=("torchcompile",), value="compile"),
    Flag("engine.checkpoint_blocks", timm=("grad-checkpointing",), value="true"),
    Flag("engine.sync_batchnorm", timm=("sync-bn",), value="true"),
    Flag("engine.log_every", timm=("log-interval",)),
    Flag("engine.keep_checkpoints", timm=("checkpoint-hist",), note="the best is kept besides"),
    Flag("engine.sinks", timm=("log-wandb",), value="[wandb]"),
    # ---- the command line
    Flag("--run-dir", timm=("output",), deit=("output-dir",), note="theirs holds many runs, ours one"),
    Flag("--nproc", timm=("nproc-per-node",), deit=("nproc-per-node",), note="no torchrun is needed"),
)

_BY_NAME = {name: flag for flag in reversed(FLAGS) for name in (*flag.timm, *flag.deit, *flag.also)}


def named(word: str) -> Flag | None:
    """What stands for their flag or argument `word`: with or without dashes, with `_` or `-`, in any case."""
    return _BY_NAME.get(word.lstrip("-").replace("_", "-").lower())


def typed_instead(word: str, value: str) -> str | None:
    """What to type for an unknown flag `word` with `value` ("" where it has none), as the end of a message.

    None where it is neither a flag of timm's or DeiT's, nor a field with dashes in front of it.
    """
    flag = named(word)
    if flag is not None:
        return f"type {written(flag, value)}{flag.remark}"
    field = word.lstrip("-").replace("-", "_")
    if "." in field:
        return f"fields of a recipe have no dashes: type {field}={value or '...'}"
    return None


def written(flag: Flag, value: str) -> str:
    """The words of our command line that stand for `flag` with `value`; `...` where it has none."""
    if flag.ours.startswith("--"):
        return f"{flag.ours} {value or '...'}"
    return f"{flag.ours}={flag.value or value or '...'}"


def theirs(ours: str) -> list[str]:
    """What timm and DeiT call our field or flag, for people: `timm: --crop-pct`, `deit: --eval-crop-ratio`."""
    said = []
    for flag in FLAGS:
        if flag.ours != ours:
            continue
        value = f" for {flag.value}" if flag.value else ""
        both = [name for name in flag.timm if name in flag.deit]
        alone = {"timm and deit": both, "timm": _without(flag.timm, both), "deit": _without(flag.deit, both)}
        for who, names in alone.items():
            if names:
                said.append(f"{who}: {', '.join(f'--{name}' for name in names)}{value}{flag.remark}")
    return said


def _without(names: tuple[str, ...], taken: list[str]) -> list[str]:
    return [name for name in names if name not in taken]
