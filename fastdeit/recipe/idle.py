"""Settings that change nothing beside the other settings of a recipe. A run says them at its start.

They are told and not refused: a recipe that switches mixup off may keep what its base says of mixing. Only a field that
differs from its default is told, since nobody has asked for the others. Importing this module imports no torch.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from fastdeit.methods.config import METHODS, DistillConfig
from fastdeit.recipe.yaml import format_value
from fastdeit.views import CROP_FIELDS, AugmentSettings, View, overridden, resolved

if TYPE_CHECKING:
    from fastdeit.recipe.resolve import Recipe

_OF_THE_CROP = "crop_scale", "crop_ratio"


class Facts(NamedTuple):
    """What a recipe alone does not tell.

    heads        how many the model has
    dist_token   whether the model has a distillation token, as its `decay_groups` tells
    processes    how many train
    device       the type of the device that they train on: cpu or cuda
    evaluations  how many the run has
    """

    heads: int
    dist_token: bool
    processes: int
    device: str
    evaluations: int


def notes(recipe: "Recipe", facts: Facts) -> list[str]:
    """A sentence for each setting of the recipe that has no effect."""
    told = [
        *_of_views(recipe),
        *_of_mixing(recipe),
        *_of_method(recipe),
        *_of_the_rest(recipe),
        *_by_facts(recipe, facts),
    ]
    return [f"{path}{_value(recipe, path)} has no effect: {why}" for path, why in told if _is_given(recipe, path)]


def _is_given(recipe: "Recipe", path: str) -> bool:
    *_, owner, value = _along(recipe, path)
    return value != type(owner).model_fields[path.rpartition(".")[2]].get_default(call_default_factory=True)


def _value(recipe: "Recipe", path: str) -> str:
    """A field's value behind a space; nothing of one that is a section itself."""
    *_, owner, _ = _along(recipe, path)
    value = owner.model_dump(mode="json")[path.rpartition(".")[2]]
    return "" if isinstance(value, dict) else f" {format_value(value)}"


def _along(recipe: "Recipe", path: str) -> Iterator[Any]:
    """Section, what is within it, ..., and the value at the end of a dotted path."""
    found: Any = recipe
    for name in path.split("."):
        found = found[name] if isinstance(found, Mapping) else getattr(found, name)
        yield found


def _of_views(recipe: "Recipe") -> Iterator[tuple[str, str]]:
    """Of how an image is cropped and augmented, in `data` and in `data.views`."""
    data = recipe.data
    open_views = overridden(recipe.method.views(), data.views)
    crops = {view.name: view.crop for view in resolved(open_views, data, recipe.model.image_size)}
    for field in AugmentSettings.model_fields:
        takers = [view.name for view in open_views if _takes(view, field)]
        if not takers:
            yield f"data.{field}", f"every view of method {recipe.method.use} has its own"
        elif field in _OF_THE_CROP and all(crops[name] == "simple" for name in takers):
            yield f"data.{field}", "it is of crop random_resized, and the crop is simple"
    for name in data.views:
        if crops[name] == "simple":
            for field in _OF_THE_CROP:
                yield f"data.views.{name}.{field}", "it is of crop random_resized, and the crop of the view is simple"


def _takes(view: View, field: str) -> bool:
    """Whether a view leaves a field to the data section."""
    if field in CROP_FIELDS and view.crop_of is not None:
        return False
    if field == "color_jitter" and view.augment is not None:
        return False
    return getattr(view, field) is None


def _of_mixing(recipe: "Recipe") -> Iterator[tuple[str, str]]:
    data = recipe.data
    mixup, cutmix = data.mixup > 0, data.cutmix > 0
    if not mixup and not cutmix:
        for field in ("mix_probability", "mix_switch", "mix_mode"):
            yield f"data.{field}", "data.mixup and data.cutmix are 0"
    elif data.mix_probability == 0:
        for field in ("mixup", "cutmix", "mix_switch", "mix_mode"):
            yield f"data.{field}", "data.mix_probability is 0"
    elif mixup != cutmix:
        yield "data.mix_switch", f"data.{'cutmix' if mixup else 'mixup'} is 0, so there is nothing to choose"
    elif data.mix_switch == 1:
        yield "data.mixup", "data.mix_switch is 1, so that all is cutmix"
    elif data.mix_switch == 0:
        yield "data.cutmix", "data.mix_switch is 0, so that all is mixup"


def _of_method(recipe: "Recipe") -> Iterator[tuple[str, str]]:
    method = recipe.method
    if not isinstance(method, DistillConfig) or method.use not in METHODS:
        return  # a method of somebody else that has the fields of ours may do something else with them
    if method.alpha == 0:
        for field in ("distillation", "tau", "reduction", "teacher", "cached"):
            yield f"method.{field}", "method.alpha is 0, so that nothing is learned from the teacher"
    elif method.distillation == "hard":
        for field in ("tau", "reduction"):
            yield f"method.{field}", "it is of soft distillation, and method.distillation is hard"
    if method.alpha == 1:
        for field in ("loss", "smoothing"):
            yield f"method.{field}", "method.alpha is 1, so that nothing is learned from the label"


def _of_the_rest(recipe: "Recipe") -> Iterator[tuple[str, str]]:
    data, model, optim, train = recipe.data, recipe.model, recipe.optim, recipe.train
    if data.source != "synthetic":
        for field in ("synthetic_samples", "synthetic_classes"):
            yield f"data.{field}", f"it is of source synthetic, and data.source is {data.source}"
    if model.drop_path == 0:
        yield "model.drop_path_mode", "model.drop_path is 0"
    if model.weights is None:
        yield "model.weights_grid", "there are no model.weights"
    if optim.warmup_epochs == 0:
        yield "optim.warmup_lr", "optim.warmup_epochs is 0"
    if optim.weight_decay == 0:
        yield "optim.decay_dist_token", "optim.weight_decay is 0"
        if hasattr(optim, "decoupled_decay"):  # of sgd
            yield "optim.decoupled_decay", "optim.weight_decay is 0"
    if train.eval_every_steps is not None:
        yield "train.eval_every", f"train.eval_every_steps is {train.eval_every_steps}"


def _by_facts(recipe: "Recipe", facts: Facts) -> Iterator[tuple[str, str]]:
    limit = recipe.train.stop_after
    if limit is not None and limit + 1 >= facts.evaluations:  # the first one is a new best, and after the last all ends
        plural = "s" * (facts.evaluations > 1)
        yield "train.stop_after", f"the run has {facts.evaluations} evaluation{plural}, and ends with the last"
    if facts.heads == 1:
        yield "method.fuse", "the model has one head"
    if not facts.dist_token and recipe.optim.weight_decay > 0:
        yield "optim.decay_dist_token", "the model has no distillation token"
    if facts.processes == 1:
        for field in ("parallel", "reduce", "sync_batchnorm", "timeout_s"):
            yield f"engine.{field}", "it is of several processes, and there is one"
    if facts.device == "cpu" and recipe.engine.autotune == "off":
        yield "engine.autotune", "on a CPU, auto tries no kernels out either"
