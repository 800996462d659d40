"""In what a recipe that comes with fastdeit differs from the public code whose settings it has.

One table decides: the header of a recipe lists what it finds (`python -m tests.recipe.headers --write`), a run says the
same when it starts, and `--as public-code` sets what DeiT's public code has. The facts were read in the files that are
named below. Importing this module imports no torch.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from fastdeit.methods.config import DistillConfig
from fastdeit.models.names import CONFIGS

if TYPE_CHECKING:
    from fastdeit.recipe.resolve import Recipe


NO_SETTING = object()
"""The `value` of a difference that no setting takes away."""


class Difference(NamedTuple):
    """One difference, in the words of a table.

    subject       the setting that makes it as there, or else in a word or two what differs
    ours, theirs  what happens here and there
    where         the recipes that it can be a difference of
    value         of the setting there
    """

    subject: str
    ours: str
    theirs: str
    where: "Callable[[Recipe], bool]" = lambda recipe: True
    value: Any = NO_SETTING

    @property
    def field(self) -> str:
        """The setting that makes it as there; "" where there is none."""
        return "" if self.value is NO_SETTING else self.subject

    def is_of(self, recipe: "Recipe") -> bool:
        """Whether the recipe differs in this."""
        return self.where(recipe) and (not self.field or _value(recipe, self.field) != self.value)


class Reference(NamedTuple):
    """Public code: what it is called in a sentence, and the differences from it."""

    title: str
    differences: Sequence[Difference]


def _value(recipe: "Recipe", field: str) -> Any:
    section, _, name = field.partition(".")
    return getattr(getattr(recipe, section), name)


# ---- which recipes ---------------------------------------------------------------------------------------------------


def _has_two_heads(recipe: "Recipe") -> bool:
    name = recipe.model.name
    return CONFIGS[name].distilled if name in CONFIGS else "distilled" in (recipe.model.timm or name or "")


def _fuses(fuse: str) -> "Callable[[Recipe], bool]":
    return lambda recipe: _has_two_heads(recipe) and recipe.method.fuse == fuse


def _distils(recipe: "Recipe") -> bool:
    return isinstance(recipe.method, DistillConfig)


def _distils_softly(recipe: "Recipe") -> bool:
    return _distils(recipe) and recipe.method.distillation == "soft"


def _mixes(recipe: "Recipe") -> bool:
    return recipe.data.mixes


def _repeats(recipe: "Recipe") -> bool:
    return recipe.data.repeats > 1


def _averages(recipe: "Recipe") -> bool:
    return recipe.optim.ema_decay is not None


def _drops_out(recipe: "Recipe") -> bool:
    return recipe.model.dropout > 0


def _of_ours(recipe: "Recipe") -> bool:
    return recipe.model.name in CONFIGS


def _begins_as_deit(recipe: "Recipe") -> bool:
    return _of_ours(recipe) and CONFIGS[recipe.model.name].init == "deit"


def _with(field: str, *values: Any) -> "Callable[[Recipe], bool]":
    return lambda recipe: _value(recipe, field) in values


# ---- the table -------------------------------------------------------------------------------------------------------

# github.com/facebookresearch/deit: main.py, engine.py, losses.py, samplers.py, augment.py, and timm 0.3.2 and apex.
_DEIT = (
    Difference(
        "optim.schedule",
        "changes every step; cosine after the warm-up",
        "every epoch, one late; cosine from epoch 0",
        value="deit-exact",
    ),
    Difference(
        "optim.decay_dist_token",
        "no weight decay of the distillation token",
        "weight decay of it",
        _has_two_heads,
        True,
    ),
    Difference(
        "optim.ema_decay",
        "the weights are not averaged",
        "averaged, but no published result uses that",
        _with("optim.ema_decay", None),
        0.99996,
    ),
    Difference(
        "optim.ema_decay",
        "the average has a decay of its own",
        "0.99996, but no published result uses that",
        _averages,
        0.99996,
    ),
    *(
        Difference("method.fuse", f"two heads: {ours}", "two heads: the mean of their logits", _fuses(fuse), "logit")
        for fuse, ours in (
            ("softmax", "the sum of their softmaxes"),
            ("class", "the class head alone"),
            ("distillation", "the distillation head alone"),
        )
    ),
    Difference(
        "method.reduction",
        "soft loss divided by the batch, as in the paper",
        "by batch times classes: a thousandth of it",
        _distils_softly,
        "numel",
    ),
    *(
        Difference("engine.precision", ours, "fp16 with a scaled loss", _with("engine.precision", precision), "fp16")
        for precision, ours in (("auto", "bf16 on a GPU that has it"), ("bf16", "bf16"), ("fp32", "fp32"))
    ),
    Difference("optimizer", "Muon for hidden matrices, AdamW for the rest", "AdamW", _with("optim.name", "muon")),
    Difference("engine.products", "blocks multiply numbers of 8 bits", "numbers of 16 bits", value="precision"),
    Difference(
        "model.drop_path_skip",
        "a fixed number of each group drops a branch",
        "each sample is drawn by itself",
        value=False,
    ),
    Difference("data.size_schedule", "images change their size", "images have one size", value=()),
    Difference(
        "fine-tuning",
        "with a teacher, too",
        "refused with a teacher",
        lambda recipe: _distils(recipe) and recipe.model.needs_weights,
    ),
    Difference(
        "distillation",
        "one head learns from label and teacher",
        "refused: the model needs two heads",
        lambda recipe: _distils(recipe) and not _has_two_heads(recipe),
    ),
    *(
        Difference(
            "size of images",
            f"{ours} pixels: whole patches of 14",
            f"{theirs} pixels: the last {theirs - ours} are in no patch",
            _with("model.image_size", ours),
        )
        for ours, theirs in ((154, 160), (126, 128))
    ),
    Difference("dropout", "before the heads", "in positions and blocks (DeiT III: an error)", _drops_out),
    Difference("order of images", "depends on train.seed and the epoch", "depends on the epoch alone"),
    Difference("repeated augmentation", "copies go to different groups", "copies go to different processes", _repeats),
    Difference("steps of an epoch", "images // batch", "the same of a multiple of 256 images", _repeats),
    Difference("mixing", "within groups of data.group_size images", "within the batch of a process", _mixes),
    Difference(
        "RandAugment",
        "Posterize keeps at least 1 bit",
        "it may keep none: a black image",
        lambda recipe: recipe.data.augment.startswith("rand-"),
    ),
    Difference("resizing", "width before height", "the same; with Pillow 13 tall images height first"),
    Difference("augmentation on a GPU", "by DALI, in floats", "by Pillow on the CPU, in 8 bits"),
    Difference("unreadable images", "another takes the place", "the run ends"),
    Difference("attention", "logits in float32", "logits in fp16, which can overflow", _of_ours),
    Difference(
        "clipping with LAMB",
        "gradients times limit / (norm + 1e-6)",
        "gradients times limit / norm",
        lambda recipe: recipe.optim.name == "lamb" and recipe.optim.clip_grad is not None,
    ),
    Difference(
        "NaN or infinity",
        "step skipped; 3 in a row (fp16: 24) end the run",
        "a loss ends the run; gradients: step skipped",
    ),
    Difference("skipped steps", "do not move the average", "move the average", _averages),
)
# github.com/google-research/big_vision: configs/vit_i1k.py and vit_s16_i1k.py, models/vit.py, pp/, utils.py.
_BIG_VISION = (
    Difference("training images", "all", "the last 1 % are kept for validation"),
    Difference(
        "sigmoid cross-entropy",
        "mean over classes: a thousandth of the gradient",
        "sum over classes, gradients clipped at 1.0",
        _with("method.loss", "bce"),
    ),
    Difference("bias of the head", "begins at 0", "begins at -6.9", _with("method.loss", "bce")),
    Difference(
        "initial weights",
        "normals of 0.02, as in DeiT",
        "Xavier's; positions of variance 1 / width, head 0",
        _begins_as_deit,
    ),
    Difference("head", "one linear layer", "a layer with tanh before it (rep_size)"),
    Difference("AdamW", "first moment in 32 bits", "in 16 bits", _with("optim.name", "adamw")),
    Difference("mixing", "with the mirror image in the group", "with the neighbour, the larger share its own", _mixes),
    Difference(
        "RandAugment",
        "timm's 15 operations, on ImageNet's mean colour",
        "Cutout besides, on grey",
        lambda recipe: recipe.data.augment.startswith(("augreg-", "rand-")),
    ),
    Difference("crops", "bicubic with antialiasing", "bilinear without it"),
    Difference("images of evaluation", "bicubic with antialiasing", "by areas"),
)
# github.com/facebookresearch/pycls: core/net.py and optimizer.py, datasets/, models/vit.py. It has no file of settings
# for ViT_C; these are the paper's.
_PYCLS = (
    Difference(
        "learning rate",
        "changes every step; cosine after the warm-up",
        "every epoch; cosine from epoch 0",
        _with("optim.schedule", "cosine"),
    ),
    Difference("warm-up", "from optim.warmup_lr", "from a tenth of the rate by default"),
    Difference("weight decay", "not of positions and class token", "of all but norms and biases"),
    Difference("average of the weights", "follows every step", "every 32nd step, after the warm-up", _averages),
    Difference("its decay", "optim.ema_decay; the paper names none", "about 0.99995 a step by default", _averages),
    Difference(
        "initial attention",
        "Xavier's of queries, keys, values, projection",
        "of the first three together, the last PyTorch's",
        _of_ours,
    ),
    Difference("mixing", "with the mirror image in the group", "with any sample of the GPU", _mixes),
    Difference(
        "crops",
        "log-uniform ratios, bicubic with antialiasing",
        "uniform ratios, bilinear without it",
        _with("data.crop", "random_resized"),
    ),
    Difference("AutoAugment", "bicubic, on ImageNet's mean colour", "bilinear, on grey", _with("data.augment", "v0")),
    Difference("colours", "not shifted", "shifted along their principal components, by 0.1"),
)
REFERENCES = {
    "deit": Reference("DeiT's public code", _DEIT),
    "big_vision": Reference("big_vision's public configuration", _BIG_VISION),
    "pycls": Reference("pycls, its authors' code,", _PYCLS),
}
"""By `about.follows`."""


def of(recipe: "Recipe") -> Iterator[Difference]:
    """The differences of a recipe from the code that it follows; none where it follows none."""
    if recipe.about.follows is not None:
        yield from (one for one in REFERENCES[recipe.about.follows].differences if one.is_of(recipe))


def lines(recipe: "Recipe") -> list[str]:
    """The differences as a table for people: a title, and a line for each; nothing of a recipe without any."""
    found = list(of(recipe))
    if not found:
        return []
    follows = recipe.about.follows
    some_are_set = follows == "deit" and any(one.field for one in found)
    settable = ", of which `--as public-code` sets those that are fields" if some_are_set else ""
    rows = [("", "here", "there"), *(one[:3] for one in found)]
    subject, ours, _ = (max(map(len, column)) for column in zip(*rows, strict=True))
    return [
        f"differs from {REFERENCES[follows].title} in {len(found)} point{'s' * (len(found) > 1)}{settable}:",
        *(f"  {row[0]:{subject}}  {row[1]:{ours}}  {row[2]}" for row in rows),
    ]
