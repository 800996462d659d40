"""Recipes: YAML in, one frozen `Recipe` out, or one message with everything that is wrong.

A recipe file has the sections of `Recipe` and optionally `base:`, the name or path of one other recipe whose fields it
starts from. Overrides `section.field=value` come last. Values keep their places (`recipe_yaml.py`) through merging, so
that pydantic's verdict on the result (`config.py`) can be told with file and line.

The `method:` section is validated by the method's own model, and `optim:` by one that has the options of the optimizer;
both are looked up when a recipe is validated. Importing this module imports no torch.
"""

import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin

from pydantic import (
    BaseModel,
    ConfigDict,
    SerializeAsAny,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)
from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedSeq
from ruamel.yaml.events import ScalarEvent
from ruamel.yaml.representer import RoundTripRepresenter

from fastdeit.config import About, DataConfig, EngineConfig, ModelConfig, OptimConfig, Section, TrainConfig
from fastdeit.recipe_yaml import NOWHERE, FieldPath, Item, Place, Problems, Reader, as_item, meant, plain, shown

SHIPPED = Path(__file__).parent / "recipes"
MAX_BYTES = 256 * 1024

_SECTIONS: dict[str, type[Section] | None] = {
    "about": About,
    "model": ModelConfig,
    "method": None,
    "data": DataConfig,
    "optim": OptimConfig,
    "train": TrainConfig,
    "engine": EngineConfig,
}


_ADAMW = OptimConfig.model_fields["name"].default


class RecipeError(Exception):
    """A recipe cannot be used. `str(error)` is complete: one line per problem, `file:line: section.field: problem`."""


class Recipe(BaseModel):
    """A resolved recipe. `name` is the stem of the file it was read from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    about: About
    model: ModelConfig
    method: SerializeAsAny[BaseModel]
    data: DataConfig
    optim: SerializeAsAny[OptimConfig]
    train: TrainConfig
    engine: EngineConfig

    @field_validator("optim", mode="before")
    @classmethod
    def _with_options_of_the_optimizer(cls, optim: Any) -> Any:
        if not isinstance(optim, Mapping):
            return optim
        return _optim_config(optim.get("name", _ADAMW)).model_validate(optim)

    @field_validator("method", mode="before")
    @classmethod
    def _by_its_own_model(cls, method: Any) -> Any:
        if not isinstance(method, Mapping):
            return method
        if not isinstance(method.get("use"), str):
            raise ValueError("method.use must name a method")
        return _method_config(method["use"]).model_validate(method)

    @model_validator(mode="after")
    def _sections_agree(self) -> "Recipe":
        found = [f"{'.'.join(path)} {problem}" for path, problem in _conflicts(dict(self))]
        if found:
            raise ValueError("; ".join(found))
        return self


# ---- public functions ------------------------------------------------------------------------------------------------


def load(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """The shipped recipe of that name, or the one in that file, with overrides `section.field=value` applied.

    Raises RecipeError with every problem of the file, its base and the overrides.
    """
    problems = Problems()
    path = _find(str(name_or_path), Path())
    root = _with_base(path, problems)
    changes = _parse_overrides(overrides, problems)
    if root is None:
        raise RecipeError(problems.text())
    return _validated(path.stem, _merged(root, changes), problems)


def override(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """`recipe` with overrides applied; raises RecipeError as `load` does."""
    problems = Problems()
    changes = _parse_overrides(overrides, problems)
    root = as_item(recipe.model_dump(mode="json", exclude={"name"}), Place(f"recipe {recipe.name}"))
    return _validated(recipe.name, _merged(root, changes), problems)


def names() -> list[str]:
    """Names of the shipped recipes, sorted."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def summaries() -> list[tuple[str, str]]:
    """(name, `about.summary`) of the shipped recipes, without validating them."""
    return [(name, _summary(name)) for name in names()]


def text(name: str) -> str:
    """YAML source of a shipped recipe, comments included. Raises RecipeError when there is none of that name."""
    if name not in names():
        raise RecipeError(_no_recipe(name))
    return (SHIPPED / f"{name}.yaml").read_text(encoding="utf-8")


def dump(recipe: Recipe) -> str:
    """`recipe` as YAML with every field written out; a file of that text and the same stem loads as an equal recipe."""
    yaml = YAML()
    yaml.Representer = _Representer
    yaml.width = 2**16
    stream = io.StringIO()
    yaml.dump(_for_people(recipe.model_dump(mode="json", exclude={"name"})), stream)
    return stream.getvalue()


def difference(a: Recipe, b: Recipe) -> list[tuple[str, Any, Any]]:
    """(dotted field, value in a, value in b) wherever a and b would train differently; an absent field counts as None.

    Not compared: `about`, `name`, `engine`, and from where and by how many threads the data are read.
    """
    mine, theirs = (
        dict(_flat(recipe.model_dump(include={"model", "method", "data", "optim", "train"}, exclude={"data": _PLACES})))
        for recipe in (a, b)
    )
    fields = dict.fromkeys([*mine, *theirs])
    return [(field, mine.get(field), theirs.get(field)) for field in fields if mine.get(field) != theirs.get(field)]


# A packed copy of a folder is the same data: what they hold is told by the fingerprints in a checkpoint.
_PLACES = {"source", "root", "train", "val", "threads"}


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner


class _Representer(RoundTripRepresenter):
    """Writes `null` where ruamel.yaml leaves an empty space."""


_Representer.add_representer(
    type(None), lambda representer, _: representer.represent_scalar("tag:yaml.org,2002:null", "null")
)


def _for_people(value: Any) -> Any:
    """Lists of plain values go on one line."""
    if isinstance(value, dict):
        return {key: _for_people(inner) for key, inner in value.items()}
    if isinstance(value, list):
        line = CommentedSeq(value)
        line.fa.set_flow_style()
        return line
    return value


def _summary(name: str) -> str:
    # Lazily: the parser stops behind the header.
    scalars = (event.value for event in YAML(typ="safe", pure=True).parse(text(name)) if isinstance(event, ScalarEvent))
    return next(value for key, value in pairwise(scalars) if key == "summary")


# ---- files, bases, overrides -----------------------------------------------------------------------------------------


def _no_recipe(name: str) -> str:
    return f"there is no recipe {name!r}{meant(name, names()) or '; there are ' + ', '.join(names())}"


def _find(word: str, folder: Path) -> Path:
    """File of the recipe `word`: a path, relative to `folder`, when it looks like one, else a shipped name."""
    if "/" not in word and not word.endswith((".yaml", ".yml")):
        if word not in names():
            raise RecipeError(_no_recipe(word))
        return SHIPPED / f"{word}.yaml"
    path = folder / word
    if not path.is_file():
        why = "is not a file" if path.exists() else "does not exist"
        raise RecipeError(f"{path} {why}{meant(path.stem, names(), cutoff=0.9)}")
    return path


def _read(path: Path, problems: Problems) -> Item | None:
    """The file's top-level mapping, or None (recorded among the problems)."""
    source = str(path)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        problems.add(Place(source), (), f"cannot be read: {error.strerror}")
        return None
    if len(data) > MAX_BYTES:
        problems.add(Place(source), (), f"is larger than {MAX_BYTES // 1024} KiB, which no recipe needs")
        return None
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        problems.add(Place(source, line), (), f"is not UTF-8 text (byte 0x{data[error.start]:02x})")
        return None
    root = Reader(text, source, problems).document()
    if root is None or isinstance(root.value, dict):
        return root
    got = "nothing" if root.value is None else shown(plain(root))
    problems.add(root.place, (), f"a recipe is a mapping of the sections {', '.join(_SECTIONS)}; this is {got}")
    return None


def _with_base(path: Path, problems: Problems) -> Item | None:
    """The recipe in `path`, laid over its base if it names one."""
    root = _read(path, problems)
    if root is None or "base" not in root.value:
        return root
    named = root.value["base"]
    mine = Item({key: item for key, item in root.value.items() if key != "base"}, root.place)
    base = _base(named, path, problems)
    if base is None:
        problems.incomplete = True
        return mine
    # What a recipe is measured to reach says nothing of one that changes it.
    return _merged(Item({key: item for key, item in base.value.items() if key != "about"}, base.place), mine)


def _base(named: Item, child: Path, problems: Problems) -> Item | None:
    if not isinstance(named.value, str) or not named.value:
        problems.add(named.place, ("base",), f"must be the name or path of a recipe, got {shown(plain(named))}")
        return None
    try:
        path = _find(named.value, child.parent)
    except RecipeError as error:
        problems.add(named.place, ("base",), str(error))
        return None
    if path.resolve() == child.resolve():
        problems.add(named.place, ("base",), "a recipe cannot be its own base")
        return None
    base = _read(path, problems)
    if base is not None and "base" in base.value:
        problem = f"{path} has a base itself; only one level is allowed, so name {shown(plain(base.value['base']))}"
        problems.add(named.place, ("base",), problem)
        return None
    return base


def _parse_overrides(overrides: Sequence[str], problems: Problems) -> Item:
    """All overrides as one tree of the sections they name."""
    root = Item({}, NOWHERE)
    given: dict[FieldPath, str] = {}
    for text in overrides:
        place = Place(f"override {text!r}")
        key, equals, value = text.partition("=")
        path = tuple(key.split("."))
        clash = next((other for old, other in given.items() if old[: len(path)] == path[: len(old)]), None)
        if not equals or not all(path):
            problems.add(place, (), "must look like section.field=value")
        elif path[0] == "base":
            problems.add(place, path, "cannot be overridden; name the recipe to start from instead")
        elif clash is not None:
            problems.add(place, path, f"is given twice, also by {clash!r}")
        else:
            given[path] = text
            item = Reader(value, place.source, problems, line_numbers=False, path=path).document()
            _insert(root, path, item)
    return root


def _insert(root: Item, path: FieldPath, item: Item | None) -> None:
    for part in path[:-1]:
        root = root.value.setdefault(part, Item({}, NOWHERE))
    if item is not None:
        root.value[path[-1]] = item


class _Choice(NamedTuple):
    """Fields that decide what a section is about, and those of a base that mean nothing once the decision changes."""

    deciding: tuple[str, ...]
    stale: tuple[str, ...] | None = None
    """None: the whole section but for `shared`."""
    shared: tuple[str, ...] = ()
    default: Any = None


_CHOICES: dict[FieldPath, _Choice] = {
    ("model",): _Choice(("name", "timm"), stale=("name", "timm")),
    ("method",): _Choice(("use",)),
    ("method", "teacher"): _Choice(("recipe", "timm", "model")),
    # Rates, decay and clipping of one optimizer say nothing of another's; the schedule and the average are for all.
    ("optim",): _Choice(
        ("name",),
        shared=("schedule", "warmup_epochs", "warmup_lr", "min_lr", "ema_decay", "decay_dist_token"),
        default=_ADAMW,
    ),
    ("data",): _Choice(
        ("source",), stale=("root", "train", "val", "synthetic_samples", "synthetic_classes"), default="folder"
    ),
}


def _merged(base: Item, child: Item, path: FieldPath = ()) -> Item:
    """`child` laid over `base`: mappings field by field, anything else replaced."""
    if not isinstance(base.value, dict) or not isinstance(child.value, dict):
        return child
    kept = dict(base.value)
    if not path and _changes_method(base, child):
        kept["data"] = _without_views(kept.get("data", Item({}, NOWHERE)))
    choice = _CHOICES.get(path)
    if choice is not None and _decides_anew(choice, base.value, child.value):
        if choice.stale is None:
            shared = {key: item for key, item in kept.items() if key in choice.shared}
            return Item(shared | child.value, _written_at(child))
        kept = {key: item for key, item in kept.items() if key not in choice.stale}
    for key, item in child.value.items():
        kept[key] = _merged(kept[key], item, (*path, key)) if key in kept else item
    return Item(kept, child.place if child.place != NOWHERE else base.place)


def _changes_method(base: Item, child: Item) -> bool:
    old, new = (root.value["method"].value if "method" in root.value else None for root in (base, child))
    return isinstance(old, dict) and isinstance(new, dict) and _decides_anew(_CHOICES["method",], old, new)


def _without_views(data: Item) -> Item:
    """The data section without what it says of the views of a method that is not trained."""
    if not isinstance(data.value, dict):
        return data
    return Item({key: item for key, item in data.value.items() if key != "views"}, data.place)


def _written_at(item: Item) -> Place:
    """Place of the item, or that of the first field inside for a section that only overrides made."""
    while item.place == NOWHERE and isinstance(item.value, dict) and item.value:
        item = next(iter(item.value.values()))
    return item.place


def _decides_anew(choice: _Choice, base: Mapping[str, Item], child: Mapping[str, Item]) -> bool:
    return any(
        key in child and child[key].value not in (None, base[key].value if key in base else choice.default)
        for key in choice.deciding
    )


# ---- validation ------------------------------------------------------------------------------------------------------


def _validated(name: str, root: Item, problems: Problems) -> Recipe:
    """The recipe that the tree describes; raises everything that is wrong with it and that `problems` already holds."""
    models = {**_SECTIONS, "method": _method_model(root, problems), "optim": _optim_model(root, problems)}
    for key, item in root.value.items():
        if key not in models:
            problems.add(
                _place_of(root, (key,)), (key,), f"unknown field ({shown(plain(item))}){_hint(models, (key,))}"
            )
    parts = {
        section: _section(model, root, section, models, problems)
        for section, model in models.items()
        if model is not None and not problems.skips((section,))
    }
    parts = {section: part for section, part in parts.items() if part is not None}
    if not problems.incomplete:
        for path, problem in _conflicts(parts):
            problems.add(_place_of(root, path), path, problem)
    if problems.found:
        raise RecipeError(problems.text())
    return Recipe(name=name, **parts)


def _conflicts(parts: Mapping[str, Any]) -> Iterator[tuple[FieldPath, str]]:
    """What valid sections have against each other; of sections that are missing in `parts` nothing is said."""
    data, optim, train = (parts.get(section) for section in ("data", "optim", "train"))
    if data and "method" in parts:
        yield from _view_conflicts(parts["method"].use, data)
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
    if optim and train and optim.warmup_epochs >= train.epochs:
        yield (
            ("optim", "warmup_epochs"),
            f"must be less than train.epochs ({train.epochs}), got {shown(optim.warmup_epochs)}",
        )


def _view_conflicts(use: str, data: DataConfig) -> Iterator[tuple[FieldPath, str]]:
    """What the views of the method have against what the recipe makes of them."""
    # Methods import torch, policies numpy.
    from fastdeit import methods
    from fastdeit.data import policy
    from fastdeit.views import overridden, view_problems

    own = getattr(methods.find(use), "views", ())
    known = [view.name for view in own]
    for name in data.views:
        if name not in known:
            problem = f"is no view of method {use}, which has {', '.join(known)}{meant(name, known)}"
            yield ("data", "views", name), problem
    views = overridden(own, data.views)
    for name, field, problem in view_problems(views):
        yield ("data", "views", name, field), problem
    for view in views:
        said = view.over(data)
        try:
            policy.parse(said.augment, color_jitter=said.color_jitter)
        except ValueError as error:
            yield ("data", "views", view.name, "color_jitter"), f"{error}, or give the view an augment of its own"


def _method_config(use: str) -> type[BaseModel]:
    """Model of the `method:` section; raises ValueError for a method that does not exist."""
    # Methods import torch; reading, listing and showing recipes does without.
    from fastdeit import methods

    module, colon, _ = use.partition(":")
    if colon and not all(part.isidentifier() for part in (*module.split("."), *use[len(module) + 1 :].split("."))):
        raise ValueError(f"{use!r} is not an import path 'package.module:Class'")
    config = getattr(methods.find(use), "Config", None)
    if not (isinstance(config, type) and issubclass(config, BaseModel)):
        raise ValueError(f"{use!r} is not a method: it has no pydantic model named Config")
    return config


def _method_model(root: Item, problems: Problems) -> type[BaseModel] | None:
    section = root.value.get("method", Item({}, root.place))
    path: FieldPath = ("method", "use")
    if not isinstance(section.value, dict):
        problems.add(_place_of(root, ("method",)), ("method",), f"must be a mapping, got {shown(plain(section))}")
    elif problems.skips(path) or ("use" not in section.value and problems.incomplete):
        return None
    elif "use" not in section.value:
        problems.add(_place_of(root, path), path, "is required; it names the training method, as in use: supervised")
    elif not isinstance(use := section.value["use"].value, str):
        got = shown(plain(section.value["use"]))
        problems.add(_place_of(root, path), path, f"must be the name of a method, got {got}")
    else:
        try:
            return _method_config(use)
        except ValueError as error:
            from fastdeit import methods

            problems.add(_place_of(root, path), path, f"{error}{meant(use, methods.METHODS)}")
    return None


@cache  # recipes are equal only where their sections have one type
def _optim_config(name: str) -> type[OptimConfig]:
    """Model of the `optim:` section; raises ValueError for an optimizer that does not exist."""
    # Optimizers import torch, as methods do.
    from fastdeit.engine import optimizers

    return create_model(OptimConfig.__name__, __base__=(optimizers.find(name).Options, OptimConfig))


def _optim_model(root: Item, problems: Problems) -> type[OptimConfig] | None:
    """Model of the `optim:` section; None, with the problem recorded, where its name is that of no optimizer."""
    section = root.value.get("optim", Item({}, root.place))
    path: FieldPath = ("optim", "name")
    if not isinstance(section.value, dict) or problems.skips(path):
        return OptimConfig  # what is wrong with it is said elsewhere
    name = section.value["name"].value if "name" in section.value else _ADAMW
    if not isinstance(name, str):
        got = shown(plain(section.value["name"]))
        problems.add(_place_of(root, path), path, f"must be the name of an optimizer, got {got}")
        return None
    try:
        return _optim_config(name)
    except ValueError as error:
        from fastdeit.engine.optimizers import OPTIMIZERS

        problems.add(_place_of(root, path), path, f"{error}{meant(name, OPTIMIZERS)}")
        return None


def _section(
    model: type[BaseModel], root: Item, section: str, models: Mapping[str, Any], problems: Problems
) -> BaseModel | None:
    """The section, or None with its problems recorded."""
    item = root.value.get(section, Item({}, NOWHERE))
    if not isinstance(item.value, dict):
        problems.add(_place_of(root, (section,)), (section,), f"must be a mapping, got {shown(plain(item))}")
        return None
    try:
        # Strict, so that no value changes its type; from JSON, where a list may stand for a tuple.
        return model.model_validate_json(json.dumps(plain(item)), strict=True)
    except ValidationError as error:
        found: dict[FieldPath, list[tuple[str, str]]] = {}
        for detail in error.errors(include_url=False):
            path = _path_of(root, (section, *detail["loc"]))
            written = _written(root, path)
            # Fields that disagree with one that could not be read, or with one that the base may have.
            doubtful = detail["type"] == "value_error" and problems.skips_within(path if written else path[:-1])
            if problems.skips(path) or doubtful or (problems.incomplete and not written):
                continue
            found.setdefault(path, []).append(_explained(detail, written, models, path))
        for path, reasons in found.items():
            # Several reasons for one value: the alternatives of a union.
            reason = " or ".join(dict.fromkeys(reason for reason, _ in reasons))
            problems.add(_place_of(root, path), path, reason.replace(" or must be ", " or ") + reasons[0][1])
        return None


def _path_of(root: Item, loc: Iterable[str | int]) -> FieldPath:
    """pydantic's location as a path into the tree: no names of union members, no entry that a list does not have."""
    path: FieldPath = ()
    item: Item | None = root
    for part in loc:
        value = item.value if item is not None else {}
        if isinstance(value, dict) and isinstance(part, str):
            path, item = (*path, part), value.get(part)
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            path, item = (*path, part), value[part]
    return path


def _written(root: Item, path: FieldPath) -> bool:
    for part in path:
        if isinstance(part, str) and (not isinstance(root.value, dict) or part not in root.value):
            return False
        root = root.value[part]
    return True


def _place_of(root: Item, path: FieldPath) -> Place:
    """Where the value at `path` stands, or else the innermost section around it that is written somewhere."""
    place = root.place
    for part in path:
        if isinstance(root.value, dict) and part not in root.value:
            return place
        root = root.value[part]
        place = root.place if root.place != NOWHERE else place
    inside = _written_at(root)
    return place if inside == NOWHERE else inside


def _explained(detail: Mapping[str, Any], written: bool, models: Mapping[str, Any], path: FieldPath) -> tuple[str, str]:
    """One of pydantic's error details as (what is wrong, the value and a guess at what was meant)."""
    kind, limits, value = detail["type"], detail.get("ctx", {}), detail["input"]
    if kind == "extra_forbidden":
        return "unknown field", f" ({shown(value)}){_hint(models, path)}"
    if kind == "missing":
        return ("has too few entries", "") if isinstance(detail["loc"][-1], int) else ("is required", "")
    got = f", got {shown(value)}" + ("" if written else " by default")
    if kind == "value_error":
        return str(limits["error"]), "" if value is None or isinstance(value, dict) else got
    if kind == "literal_error":
        choices = re.findall("'([^']*)'", limits["expected"])
        one_of = "must be one of " if len(choices) > 1 else "must be "
        return one_of + ", ".join(choices), got + (meant(value, choices) if isinstance(value, str) else "")
    words = _WORDS.get(kind)
    bounds = {name: str(bound).removesuffix(".0") for name, bound in limits.items()}
    return (words.format_map(bounds) if words else detail["msg"]), got


_WORDS = {
    "bool_type": "must be true or false",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_type": "must be a number",
    "string_type": "must be text",
    "tuple_type": "must be a list",
    "list_type": "must be a list",
    "dict_type": "must be a mapping",
    "model_type": "must be a mapping",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "finite_number": "must be a finite number",
    "string_too_short": "must not be empty",
    "too_short": "must have at least {min_length} entries",
    "too_long": "must have at most {max_length} entries",
}


def _hint(models: Mapping[str, type[BaseModel] | None], path: FieldPath) -> str:
    """A guess at what the unknown field at `path` was meant to be: the same name in another section, or a neighbour."""
    *parents, key = path
    homes = [section for section, model in models.items() if model is not None and key in model.model_fields]
    if homes:
        return f"; did you mean '{homes[0]}.{key}'?"
    if parents == ["optim"]:
        from fastdeit.engine.optimizers import OPTIMIZERS

        owners = [name for name, optimizer in OPTIMIZERS.items() if key in optimizer.Options.model_fields]
        if owners:
            return f"; it belongs to optim.name {' or '.join(owners)}"
    return meant(str(key), _fields(models, parents) if parents else models)


def _fields(models: Mapping[str, type[BaseModel] | None], path: Sequence[str | int]) -> Iterable[str]:
    """Field names of the (nested) model at `path`."""
    kind: Any = models.get(str(path[0]))
    for part in path[1:]:
        if get_origin(kind) is dict:
            kind = get_args(kind)[1]
            continue
        fields = getattr(kind, "model_fields", {})
        annotation = fields[part].annotation if part in fields else None
        inner = [(inner, get_origin(inner) or inner) for inner in (annotation, *get_args(annotation))]
        kind = next((kind for kind, of in inner if isinstance(of, type) and issubclass(of, BaseModel | dict)), None)
    return getattr(kind, "model_fields", ())
