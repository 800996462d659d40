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


def _always(recipe: "Recipe") -> bool:
    return True


class Difference(NamedTuple):
    """One difference.

    ours, theirs  what happens here and there. Where there is a setting, `--as public-code` says `theirs` alone
    where         the recipes that it can be a difference of
    field, value  the setting that makes it theirs; "" where there is none
    """

    ours: str
    theirs: str
    where: "Callable[[Recipe], bool]" = _always
    field: str = ""
    value: Any = None

    def is_of(self, recipe: "Recipe") -> bool:
        """Whether the recipe differs in this."""
        return self.where(recipe) and (not self.field or _value(recipe, self.field) != self.value)

    def sentence(self) -> str:
        """The difference in words, behind the setting's name."""
        ours = f"{self.field}: {self.ours}" if self.field else self.ours[0].upper() + self.ours[1:]
        return f"{ours}; there, {self.theirs}"


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


def _mixes(recipe: "Recipe") -> bool:
    return recipe.data.mix_probability > 0 and (recipe.data.mixup > 0 or recipe.data.cutmix > 0)


def _begins_as_deit(recipe: "Recipe") -> bool:
    return recipe.model.name in CONFIGS and CONFIGS[recipe.model.name].init == "deit"


def _with(field: str, *values: Any) -> "Callable[[Recipe], bool]":
    return lambda recipe: _value(recipe, field) in values


def _has_size(pixels: int) -> "Callable[[Recipe], bool]":
    return lambda recipe: recipe.model.image_size == pixels


# ---- the table -------------------------------------------------------------------------------------------------------

# github.com/facebookresearch/deit: main.py, engine.py, losses.py, samplers.py, augment.py, and timm 0.3.2 and apex.
_DEIT = (
    Difference(
        "the rate changes at every step, and its cosine begins anew after the warm-up",
        "the rate changes once an epoch and one epoch late, and the warm-up cuts into the cosine",
        field="optim.schedule",
        value="deit-exact",
    ),
    Difference(
        "weight decay leaves the distillation token alone, as it does the class token",
        "weight decay shrinks the distillation token",
        _has_two_heads,
        "optim.decay_dist_token",
        True,
    ),
    Difference(
        "the weights are not averaged",
        "the weights are averaged, but no published result uses that",
        _with("optim.ema_decay", None),
        "optim.ema_decay",
        0.99996,
    ),
    Difference(
        "the average of the weights has a decay of its own",
        "the decay is 0.99996, but no published result uses the average",
        lambda recipe: recipe.optim.ema_decay is not None,
        "optim.ema_decay",
        0.99996,
    ),
    *(
        Difference(ours, "two heads answer with the mean of their logits", _fuses(fuse), "method.fuse", "logit")
        for fuse, ours in (
            ("softmax", "two heads answer with the sum of their softmaxes, as in the paper"),
            ("class", "the class head answers alone"),
            ("distillation", "the distillation head answers alone"),
        )
    ),
    Difference(
        "the soft loss is divided by the batch, as in the paper",
        "the soft loss is divided by batch times classes, which leaves a thousandth of it",
        lambda recipe: _distils(recipe) and recipe.method.distillation == "soft",
        "method.reduction",
        "numel",
    ),
    *(
        Difference(
            ours,
            "float16 by autocast, with a scaled loss",
            _with("engine.precision", precision),
            "engine.precision",
            "fp16",
        )
        for precision, ours in (("auto", "bf16 on a GPU that has it"), ("bf16", "bf16"), ("fp32", "fp32"))
    ),
    Difference(
        "the blocks multiply numbers of 8 bits",
        "the blocks multiply float16",
        field="engine.products",
        value="precision",
    ),
    Difference(
        "a fixed number of every group drops a branch, which is not computed for these samples",
        "each sample is drawn by itself, and every branch is computed",
        field="model.drop_path_skip",
        value=False,
    ),
    Difference("the images change their size", "all images have one size", field="data.size_schedule", value=()),
    Difference(
        "the teacher teaches in fine-tuning, too",
        "distillation is refused in fine-tuning",
        lambda recipe: _distils(recipe) and recipe.model.needs_weights,
    ),
    *(
        Difference(
            f"images of {ours} pixels are whole patches of 14",
            f"they have {theirs} pixels, and the patches leave out the last {theirs - ours}",
            _has_size(ours),
        )
        for ours, theirs in ((154, 160), (126, 128))
    ),
    Difference(
        "images are mixed within groups of data.group_size, on any number of processes",
        "they are mixed within the batch of a process",
        _mixes,
    ),
    Difference(
        "copies of an image fall into different groups, and n images are n // batch whole batches an epoch",
        "copies fall to different processes, and n is cut to a multiple of 256 first",
        lambda recipe: recipe.data.repeats > 1,
    ),
    Difference(
        "RandAugment's Posterize keeps at least 1 bit",
        "it may keep none, and the image is black",
        lambda recipe: recipe.data.augment.startswith("rand-"),
    ),
    Difference(
        "a resize changes the width first, as Pillow does up to version 12",
        "Pillow 13 changes the height of a tall image first",
    ),
    Difference("on a GPU, DALI decodes, resizes and augments in floats", "Pillow does in 8 bits"),
)
# github.com/google-research/big_vision: configs/vit_i1k.py and vit_s16_i1k.py, models/vit.py, pp/, utils.py.
_BIG_VISION = (
    Difference("all training images are used", "the last 1 % of them are kept for validation"),
    Difference(
        "the sigmoid cross-entropy is the mean over the classes, so gradients are a thousandth",
        "it is their sum, and gradients are clipped at 1.0",
        lambda recipe: recipe.method.loss == "bce",
    ),
    Difference("the head's bias begins at 0", "it begins at -6.9", lambda recipe: recipe.method.loss == "bce"),
    Difference(
        "weights begin as DeiT's, by normals of 0.02",
        "they begin by Xavier's uniform, positions by a normal of variance 1 / width, heads at 0",
        _begins_as_deit,
    ),
    Difference("the head is one linear layer", "a layer of the model's width with tanh comes before it (rep_size)"),
    Difference("AdamW's first moment has 32 bits", "it has 16", _with("optim.name", "adamw")),
    Difference(
        "a sample is mixed with its mirror image in the group",
        "it is mixed with its neighbour, and keeps the larger share",
        _mixes,
    ),
    Difference(
        "RandAugment has timm's 15 operations, and what they uncover has ImageNet's mean colour",
        "it has Cutout as well, and grey",
        lambda recipe: recipe.data.augment.startswith(("augreg-", "rand-")),
    ),
    Difference(
        "crops are resized bicubically with antialiasing, and so are the images of evaluation",
        "crops are resized bilinearly without it, and images of evaluation by areas",
    ),
)
# github.com/facebookresearch/pycls: core/net.py and optimizer.py, datasets/, models/vit.py. It has no file of settings
# for ViT_C; these are the paper's.
_PYCLS = (
    Difference(
        "the rate changes at every step, and its cosine begins anew after the warm-up",
        "it changes once an epoch, and the warm-up cuts into the cosine and begins at a tenth of the rate by default",
        _with("optim.schedule", "cosine"),
    ),
    Difference("weight decay leaves positions and class token alone", "it leaves norms and biases alone only"),
    Difference(
        "the average of the weights follows at every step, and its decay is optim.ema_decay, as the paper names none",
        "it follows every 32nd step, begins after the warm-up, and its decay is about 0.99995 a step by default",
        lambda recipe: recipe.optim.ema_decay is not None,
    ),
    Difference(
        "the weights of attention begin by Xavier's uniform, queries, keys and values each by themselves",
        "these three begin together by Xavier's uniform, and the projection by PyTorch's default",
        lambda recipe: recipe.model.name in CONFIGS,
    ),
    Difference(
        "a sample is mixed with its mirror image in the group", "it is mixed with any sample of its GPU", _mixes
    ),
    Difference(
        "crops have log-uniform proportions, and are resized bicubically with antialiasing",
        "they have uniform proportions, and are resized bilinearly without it",
        _with("data.crop", "random_resized"),
    ),
    Difference(
        "AutoAugment works bicubically, and what it uncovers has ImageNet's mean colour",
        "it works bilinearly, on grey",
        _with("data.augment", "v0"),
    ),
    Difference("colours are not shifted along their principal components", "they are, by 0.1 by default"),
)
REFERENCES = {
    "deit": Reference("DeiT's public code", _DEIT),
    "big_vision": Reference("the public configuration, big_vision's", _BIG_VISION),
    "pycls": Reference("pycls, the authors' code", _PYCLS),
}
"""By `about.follows`."""


def of(recipe: "Recipe") -> Iterator[Difference]:
    """The differences of a recipe from the code that it follows; none where it follows none."""
    if recipe.about.follows is not None:
        yield from (one for one in REFERENCES[recipe.about.follows].differences if one.is_of(recipe))


def notes(recipe: "Recipe") -> list[str]:
    """What a run says of them at its start: a title, and a line for each."""
    told = [f"* {one.sentence()}" for one in of(recipe)]
    return [f"{title(recipe)}:", *told] if told else []


def title(recipe: "Recipe") -> str:
    """What stands above the differences of a recipe that follows public code."""
    settable = ", where `--as public-code` sets what has a name" if recipe.about.follows == "deit" else ""
    return f"differs from {REFERENCES[recipe.about.follows].title}{settable}"
