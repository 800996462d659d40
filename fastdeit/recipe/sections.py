"""The sections of a recipe: by which model each is validated, and what valid ones have against each other."""

from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from pydantic import BaseModel, create_model

from fastdeit import methods
from fastdeit.engine import options
from fastdeit.fields import Section
from fastdeit.recipe.config import About, DataConfig, EngineConfig, ModelConfig, OptimConfig, TrainConfig
from fastdeit.recipe.errors import in_words
from fastdeit.recipe.yaml import FieldPath, Item, Problems, format_value, place_of
from fastdeit.text import did_you_mean
from fastdeit.views import overridden, resolution_problems, view_problems

SECTIONS: dict[str, type[Section] | None] = {
    "about": About,
    "model": ModelConfig,
    "method": None,
    "data": DataConfig,
    "optim": OptimConfig,
    "train": TrainConfig,
    "engine": EngineConfig,
}
"""By name; None: that of the method."""
ADAMW = OptimConfig.model_fields["name"].default
"""The optimizer of a recipe that names none."""


def flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every field below `value` that is no mapping: (its name with dots, its value)."""
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            yield from flat(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner


def conflicts(parts: Mapping[str, Any]) -> Iterator[tuple[FieldPath, str]]:
    """What valid sections have against each other; of sections that are missing in `parts` nothing is said."""
    sections = {name: parts[name] for name in SECTIONS if parts.get(name)}
    yield from ((path, "has a line break; a text of a recipe is one line") for path in _broken_texts(sections))
    model, method, data, optim, train = (parts.get(name) for name in ("model", "method", "data", "optim", "train"))
    if method and data:
        yield from _view_conflicts(method, data, model.image_size if model else None)
    if data and train:
        groups, rest = divmod(train.batch_size, data.group_size)
        if rest:
            yield (
                ("train", "batch_size"),
                f"must be a multiple of data.group_size ({data.group_size}), got {train.batch_size}",
            )
        elif groups % train.accumulate:
            yield (
                ("train", "accumulate"),
                f"must divide train.batch_size / data.group_size ({groups} groups), got {train.accumulate}",
            )
    if method and model and method.needs_drop_path and model.drop_path == 0:
        yield (
            ("model", "drop_path"),
            f"must be above 0 for method {method.use}, which learns from the submodels that stochastic depth makes; "
            "add model.drop_path=0.1",
        )
    if method and data and method.needs_boxes and data.mixes:
        for field in ("mixup", "cutmix"):
            if getattr(data, field) > 0:
                yield (
                    ("data", field),
                    f"must be 0 for method {method.use}, which asks where things lie, and a mixed picture shows those "
                    f"of two; add data.{field}=0",
                )
    if train and model and train.epochs is None and train.steps is None and model.weights is None:
        yield (
            ("train", "epochs"),
            "is required, or train.steps; only a run that starts from model.weights may leave both out, and its length "
            "then follows the size of the data set",
        )
    if optim and train and None not in (train.epochs, optim.warmup_epochs) and optim.warmup_epochs >= train.epochs:
        yield (
            ("optim", "warmup_epochs"),
            f"must be less than train.epochs ({train.epochs}), got {format_value(optim.warmup_epochs)}; add "
            f"optim.warmup_epochs={train.epochs / 20:g}, or null, for a twentieth of the run",
        )
    if optim and optim.weight_decay_end is not None:
        yield from _decay_conflicts(optim)


def _decay_conflicts(optim: Any) -> Iterator[tuple[FieldPath, str]]:
    """What keeps the weight decay from following a schedule."""
    if optim.weight_decay == 0:
        yield (
            ("optim", "weight_decay_end"),
            "needs an optim.weight_decay above 0, to begin with; give a small one, such as 1e-6",
        )
    if not optim.decoupled:
        sgd = "; for sgd add optim.decoupled_decay=true" if isinstance(optim, options.SgdOptions) else ""
        yield (
            ("optim", "weight_decay_end"),
            f"needs an optimizer with decoupled weight decay, such as adamw or muon, and {optim.name} has not{sgd}",
        )


def _broken_texts(parts: Mapping[str, Any]) -> Iterator[FieldPath]:
    """The fields whose texts have several lines: a message that quotes such a text could say what fastdeit does not.
    The options of a method or an optimizer of somebody else are theirs, and so is what is quoted of them."""
    for section, part in parts.items():
        theirs = ":" in (part.use if section == "method" else part.name if section == "optim" else "")
        if section != "about" and not theirs:
            for field, value in flat(part.model_dump()):
                if _has_break(value):
                    yield section, *field.split(".")


def _has_break(value: Any) -> bool:
    if isinstance(value, str):
        return "\n" in value
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return any(map(_has_break, inner))


def _view_conflicts(
    method: Any, data: DataConfig, image_size: int | tuple[int, int] | None
) -> Iterator[tuple[FieldPath, str]]:
    """What is wrong with the views that the method asks for, and with what the recipe makes of them."""
    try:
        own = method.views()
    except ValueError as error:
        yield ("method",), f"asks for a view that cannot be: {in_words(error)}"
        return
    found = [f"view {name!r} of method {method.use}: {field} {problem}" for name, field, problem in view_problems(own)]
    if found:
        yield from ((("method",), problem) for problem in found)
        return
    known = [view.name for view in own]
    for name in data.views:
        if name not in known:
            problem = f"is no view of method {method.use}, which has {', '.join(known)}{did_you_mean(name, known)}"
            yield ("data", "views", name), problem
    views = overridden(own, data.views)
    problems = list(view_problems(views))
    if not problems and image_size is not None:
        sizes = [image_size, *(size for _, size in data.size_schedule)]
        problems = dict.fromkeys(problem for size in sizes for problem in resolution_problems(views, data, size))
    for name, field, problem in problems:
        yield ("data", "views", name, field), problem


@cache  # recipes are equal only where their sections have one type
def optim_config(name: str) -> type[OptimConfig]:
    """Model of the `optim:` section; raises ValueError for an optimizer that does not exist."""
    shipped = options.shipped(name)
    if shipped is None:
        # Whoever brings the optimizer imports torch, too.
        from fastdeit.engine import optimizers

        own = optimizers.find(name).Options
    else:
        own = shipped.options
    return create_model(OptimConfig.__name__, __base__=(own, OptimConfig))


def optim_model(root: Item, problems: Problems) -> type[OptimConfig] | None:
    """Model of the `optim:` section; None, with the problem recorded, where its name is that of no optimizer."""
    section = root.value.get("optim", Item({}, root.place))
    path: FieldPath = ("optim", "name")
    if not isinstance(section.value, dict) or problems.is_unreadable(path):
        return OptimConfig  # what is wrong with it is said elsewhere
    name = section.value["name"].value if "name" in section.value else ADAMW
    if not isinstance(name, str):
        problems.add(place_of(root, path), path, f"must be the name of an optimizer, got {section.value['name']}")
        return None
    try:
        return optim_config(name)
    except ValueError as error:
        problems.add(place_of(root, path), path, f"{error}{did_you_mean(name, options.OPTIMIZERS)}")
        return None


def method_model(root: Item, problems: Problems) -> type[BaseModel] | None:
    """Model of the `method:` section; None, with the problem recorded, where there is no such method."""
    section = root.value.get("method", Item({}, root.place))
    path: FieldPath = ("method", "use")
    if not isinstance(section.value, dict):
        problems.add(place_of(root, ("method",)), ("method",), f"must be a mapping, got {section}")
    elif problems.is_unreadable(path) or ("use" not in section.value and problems.incomplete):
        return None
    elif "use" not in section.value:
        problems.add(place_of(root, path), path, "is required; it names the training method, as in use: supervised")
    elif not isinstance(use := section.value["use"].value, str):
        problems.add(place_of(root, path), path, f"must be the name of a method, got {section.value['use']}")
    else:
        try:
            return methods.config(use)
        except ValueError as error:
            problems.add(place_of(root, path), path, f"{error}{did_you_mean(use, methods.METHODS)}")
    return None
