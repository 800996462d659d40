"""Recipes: YAML in, one frozen `Recipe` out, or one message with everything that is wrong.

A recipe file has the sections of `Recipe` and optionally `base:`, the name or path of one other recipe whose fields it
starts from. Overrides `section.field=value` come last. Every value keeps its file and line through merging
(`yaml.py`, `merge.py`), so that each error of validation (`sections.py`, `config.py`) names them (`errors.py`).

The `method:` section is validated by the method's own model, and `optim:` by one that has the options of the optimizer;
both are looked up when a recipe is validated. Importing this module imports no torch, and neither does a recipe whose
method and optimizer are among those that fastdeit brings.
"""

import io
import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, SerializeAsAny, field_validator, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.events import ScalarEvent
from ruamel.yaml.nodes import SequenceNode
from ruamel.yaml.representer import SafeRepresenter

from fastdeit import methods, plugins
from fastdeit.methods.config import MethodConfig
from fastdeit.recipe.config import About, DataConfig, EngineConfig, ModelConfig, OptimConfig, TrainConfig
from fastdeit.recipe.errors import unknown_field, validate_section
from fastdeit.recipe.merge import insert, merged
from fastdeit.recipe.sections import ADAMW, SECTIONS, conflicts, flat, method_model, optim_config, optim_model
from fastdeit.recipe.yaml import MAX_DEPTH, NOWHERE, FieldPath, Item, Place, Problems, Reader, as_item, place_of, plain
from fastdeit.text import did_you_mean, shorten

SHIPPED = Path(__file__).parents[1] / "recipes"
MAX_BYTES = 256 * 1024
_SUFFIXES = (".yaml", ".yml")
MAX_OVERRIDE = 200
"""Characters of an override that are told."""


class RecipeError(Exception):
    """A recipe cannot be used. `str(error)` is complete: one line per problem, `file:line: section.field: problem`."""


class Recipe(BaseModel):
    """A resolved recipe. `name` is the stem of the file it was read from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    about: About
    model: ModelConfig
    method: SerializeAsAny[MethodConfig]
    data: DataConfig
    optim: SerializeAsAny[OptimConfig]
    train: TrainConfig
    engine: EngineConfig

    @field_validator("optim", mode="before")
    @classmethod
    def _with_options_of_the_optimizer(cls, optim: Any) -> Any:
        if not isinstance(optim, Mapping):
            return optim
        name = optim.get("name", ADAMW)
        if not isinstance(name, str):
            raise ValueError("optim.name must name an optimizer")
        return optim_config(name).model_validate(optim)

    @field_validator("method", mode="before")
    @classmethod
    def _by_its_own_model(cls, method: Any) -> Any:
        if not isinstance(method, Mapping):
            return method
        if not isinstance(method.get("use"), str):
            raise ValueError("method.use must name a method")
        return methods.config(method["use"]).model_validate(method)

    @model_validator(mode="after")
    def _sections_agree(self) -> "Recipe":
        found = [f"{'.'.join(path)} {problem}" for path, problem in conflicts(dict(self))]
        if found:
            raise ValueError("; ".join(found))
        return self


# ---- public functions ------------------------------------------------------------------------------------------------


def load(name_or_path: str, overrides: Sequence[str] = (), *, own: bool = True) -> Recipe:
    """The shipped recipe of that name, or the one in that file, with overrides `section.field=value` applied.

    own  whether the user has named it; else what it names is not imported (`plugins.read_from`)

    Raises RecipeError with every problem of the file, its base and the overrides; `plugins.Untrusted`.
    """
    problems = Problems()
    path = _find(str(name_or_path), Path())
    root = _with_base(path, problems)
    changes = _parse_overrides(overrides, problems)
    if root is not None:
        plugins.said_by_user(plain(root)) if own else plugins.read_from(path, plain(root))
    plugins.said_by_user(plain(changes))
    if root is None:
        raise RecipeError(problems.text())
    return _validated(path.stem, merged(root, changes), problems)


def override(recipe: Recipe, overrides: Sequence[str]) -> Recipe:
    """`recipe` with overrides applied; raises RecipeError as `load` does."""
    problems = Problems()
    changes = _parse_overrides(overrides, problems)
    plugins.said_by_user(plain(changes))
    root = as_item(recipe.model_dump(mode="json", exclude={"name"}), Place(f"recipe {recipe.name}"))
    return _validated(recipe.name, merged(root, changes), problems)


def without_weights(recipe: Recipe) -> Recipe:
    """`recipe` with a student that begins at random, or with weights that are not those of a file."""
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"weights": None})})


def to_evaluate(recipe: Recipe) -> Recipe:
    """The recipe of a run as an evaluation takes it: nothing is recorded there, so that `engine.capture: graph` of a
    run on a GPU excludes no CPU."""
    return recipe.model_copy(update={"engine": recipe.engine.model_copy(update={"capture": "none"})})


def check_complete(recipe: Recipe) -> None:
    """Raise RecipeError where a run lacks what the recipe leaves to its user: trained weights to go on from.

    A recipe without them can still be shown and planned.
    """
    if recipe.model.needs_weights and recipe.model.weights is None:
        raise RecipeError(
            f"recipe {recipe.name}: model.weights: is required, because it goes on from a trained network: give "
            "model.weights=RUN or model.weights=FILE (model.needs_weights=false trains from nothing)"
        )


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
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer, yaml.default_flow_style, yaml.width = _Representer, False, 2**16
    yaml.sort_base_mapping_type_on_output = False
    stream = io.StringIO()
    yaml.dump(recipe.model_dump(mode="json", exclude={"name"}), stream)
    return stream.getvalue()


def difference(a: Recipe, b: Recipe) -> list[tuple[str, Any, Any]]:
    """(dotted field, value in a, value in b) wherever a and b would train differently; an absent field counts as None.

    Not compared: `about`, `name`, `engine`, and from where and by how many threads the data are read.
    """
    sections = {"model", "method", "data", "optim", "train"}
    return differing(*(dict(flat(recipe.model_dump(include=sections, exclude=_PLACES))) for recipe in (a, b)))


def changes(a: Recipe, b: Recipe) -> list[tuple[str, Any, Any]]:
    """(dotted field, value in a, value in b) of all fields but `about` and `name` that differ, as JSON has them."""
    return differing(*(dict(flat(recipe.model_dump(mode="json", exclude={"about", "name"}))) for recipe in (a, b)))


def differing(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(field, value in a, value in b) wherever recipes with dotted fields differ; an absent one counts as None."""
    return [(field, a.get(field), b.get(field)) for field in dict.fromkeys([*a, *b]) if a.get(field) != b.get(field)]


def fields(recipe: Recipe) -> dict[str, Any]:
    """By dotted name every field but `about`, `name` and those that say where the data are, as JSON has it."""
    return dict(flat(recipe.model_dump(mode="json", exclude={"about": True, "name": True} | _PLACES)))


# A packed copy of a folder is the same data. The fingerprints in a checkpoint say whether two sources hold the same.
_PLACES = {
    "data": {"source", "root", "train", "val", "image_column", "label_column", "classes", "threads"},
    "method": {"cached"},
}


class _Representer(SafeRepresenter):
    """Writes a list on one line."""

    def represent_list(self, data: list[Any]) -> SequenceNode:
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)


_Representer.add_representer(list, _Representer.represent_list)


def _summary(name: str) -> str:
    # Lazily: the parser stops behind the header.
    scalars = (event.value for event in YAML(typ="safe", pure=True).parse(text(name)) if isinstance(event, ScalarEvent))
    return next(value for key, value in pairwise(scalars) if key == "summary")


# ---- files, bases, overrides -----------------------------------------------------------------------------------------


def _no_recipe(name: str) -> str:
    return f"there is no recipe {name!r}{did_you_mean(name, names()) or '; there are ' + ', '.join(names())}"


def _find(word: str, folder: Path) -> Path:
    """File of the recipe `word`: a path, relative to `folder`, when it looks like one, else a shipped name."""
    word = os.path.expanduser(word)
    run = folder / word
    if os.path.isfile(run / "recipe.yaml") and word not in names():
        raise RecipeError(
            f"{run} is a run and not a recipe: go on with it by `fastdeit train --resume {run}`, or begin a new run "
            f"where it stands by `fastdeit train --from {run}`; its recipe is {run / 'recipe.yaml'}"
        )
    if "/" not in word and not word.endswith(_SUFFIXES):
        if word not in names():
            raise RecipeError(_no_recipe(word))
        return SHIPPED / f"{word}.yaml"
    path = folder / word
    if not os.path.isfile(path):
        why = "is not a file" if os.path.exists(path) else "does not exist"
        raise RecipeError(f"{path} {why}{did_you_mean(path.stem, names(), cutoff=0.9)}")
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
    got = "nothing" if root.value is None else root
    problems.add(root.place, (), f"a recipe is a mapping of the sections {', '.join(SECTIONS)}; this is {got}")
    return None


def _with_base(path: Path, problems: Problems) -> Item | None:
    """The recipe in `path`, laid over its base if it names one."""
    root = _read(path, problems)
    if root is None or "base" not in root.value:
        return root
    named = root.value["base"]
    base = _base(named, path, problems)
    if base is None:
        problems.incomplete = True
        return root.without("base")
    # What a recipe is measured to reach says nothing of one that changes it.
    return merged(base.without("about"), root.without("base"))


def _base(named: Item, child: Path, problems: Problems) -> Item | None:
    if not isinstance(named.value, str) or not named.value:
        problems.add(named.place, ("base",), f"must be the name or path of a recipe, got {named}")
        return None
    if "/" in named.value and not named.value.endswith(_SUFFIXES):
        problems.add(named.place, ("base",), f"must be the name of a recipe, or the path of a .yaml file, got {named}")
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
        problem = f"{path} has a base itself; only one level is allowed, so name {base.value['base']}"
        problems.add(named.place, ("base",), problem)
        return None
    return base


def _parse_overrides(overrides: Sequence[str], problems: Problems) -> Item:
    """All overrides as one tree of the sections they name."""
    root = Item({}, NOWHERE)
    given: dict[FieldPath, str] = {}
    around: dict[FieldPath, str] = {}  # the sections of what is given, and one override of each
    for text in overrides:
        place = Place(f"override {shorten(text, MAX_OVERRIDE)!r}")
        key, equals, value = text.partition("=")
        path = tuple(key.split("."))
        outer = [path[:length] for length in range(1, min(len(path), MAX_DEPTH))]
        clash = next((given[each] for each in (path, *outer) if each in given), around.get(path))
        if not equals or not all(path):
            problems.add(place, (), "must look like section.field=value")
        elif len(path) > MAX_DEPTH:
            problems.add(place, (), f"is nested deeper than {MAX_DEPTH} levels")
        elif path[0] == "base":
            problems.add(place, path, "cannot be overridden; name the recipe to start from instead")
        elif clash is not None:
            problems.add(place, path, f"is given twice, also by {clash!r}")
        else:
            given[path] = text
            around |= dict.fromkeys(outer, text)
            item = Reader(value, place.source, problems, line_numbers=False, path=path).document()
            insert(root, path, item)
    return root


# ---- validation ------------------------------------------------------------------------------------------------------


def _validated(name: str, root: Item, problems: Problems) -> Recipe:
    """The recipe that the tree describes; raises everything that is wrong with it and that `problems` already holds."""
    models = {**SECTIONS, "method": method_model(root, problems), "optim": optim_model(root, problems)}
    for key, item in root.value.items():
        if key not in models:
            problems.add(place_of(root, (key,)), (key,), unknown_field(plain(item), models, (key,)))
    parts: dict[str, Any] = {}
    for section, model in models.items():
        if model is not None and not problems.is_unreadable((section,)):
            part = validate_section(section, root, models, problems)
            if part is not None:
                parts[section] = part
    if not problems.incomplete:
        for path, problem in conflicts(parts):
            if not problems.is_unreadable(path):
                problems.add(place_of(root, path), path, problem)
    if problems.found:
        raise RecipeError(problems.text())
    return Recipe(name=name, **parts)
