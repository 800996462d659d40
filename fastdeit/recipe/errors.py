"""What pydantic says against a recipe, as sentences with the file and line of the field."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

from fastdeit.engine.options import OPTIMIZERS
from fastdeit.methods.config import METHODS
from fastdeit.recipe import flags
from fastdeit.recipe.yaml import NOWHERE, FieldPath, Item, Problems, format_value, is_written, place_of, plain
from fastdeit.text import did_you_mean

Models = Mapping[str, type[BaseModel] | None]
"""Models of a recipe's sections by name; None where there is none, because the method is not known."""


def validate_section(section: str, root: Item, models: Models, problems: Problems) -> BaseModel | None:
    """The `section` of the recipe `root` as its own model in `models`, or None with its problems recorded."""
    item = root.value.get(section, Item({}, NOWHERE))
    if not isinstance(item.value, dict):
        problems.add(place_of(root, (section,)), (section,), f"must be a mapping, got {item}")
        return None
    try:
        # Strict, so that no value changes its type; from JSON, where a list may stand for a tuple.
        return models[section].model_validate_json(json.dumps(plain(item)), strict=True)
    except ValidationError as error:
        found: dict[FieldPath, list[tuple[str, str]]] = {}
        for detail in error.errors(include_url=False):
            path = _path_of(root, (section, *detail["loc"]))
            written = is_written(root, path)
            # Fields that disagree with one that could not be read, or with one that the base may have.
            doubtful = detail["type"] == "value_error" and problems.has_unreadable(path if written else path[:-1])
            if problems.is_unreadable(path) or doubtful or (problems.incomplete and not written):
                continue
            found.setdefault(path, []).append(_explained(detail, written, models, path))
        for path, reasons in found.items():
            # Several reasons for one value: the alternatives of a union.
            reason = " or ".join(dict.fromkeys(reason for reason, _ in reasons))
            problems.add(place_of(root, path), path, reason.replace(" or must be ", " or ") + reasons[0][1])
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


def _explained(detail: Mapping[str, Any], written: bool, models: Models, path: FieldPath) -> tuple[str, str]:
    """One of pydantic's error details as (what is wrong, the value and perhaps a similar name)."""
    kind, limits, value = detail["type"], detail.get("ctx", {}), detail["input"]
    if kind == "extra_forbidden":
        return unknown_field(value, models, path), ""
    if kind == "missing":
        return ("has too few entries", "") if isinstance(detail["loc"][-1], int) else ("is required", "")
    got = f", got {format_value(value)}" + ("" if written else " by default")
    if kind == "value_error":
        reason = str(limits["error"])
        told = value is None or isinstance(value, dict) or repr(value) in reason
        return reason, "" if told else got
    if kind == "literal_error":
        choices = re.findall("'([^']*)'", limits["expected"])
        one_of = "must be one of " if len(choices) > 1 else "must be "
        return one_of + ", ".join(choices), got + (did_you_mean(value, choices) if isinstance(value, str) else "")
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


def unknown_field(value: Any, models: Models, path: FieldPath) -> str:
    """What to say of a field that no model has: its value, and the section that has a field of that name, or else
    similar names beside it."""
    *parents, key = path
    homes = [section for section, model in models.items() if model is not None and _has(model, key)]
    flag = flags.named(str(key)) if len(path) <= 2 and not isinstance(value, Mapping) else None
    if homes:
        hint = f"; did you mean {homes[0]}.{key}?"
    elif flag is not None and "." in flag.ours and flag.ours != ".".join(map(str, path)):
        instead = flags.written(flag, value if isinstance(value, str) else format_value(value))
        hint = f"; did you mean {instead}?{flag.remark}"
    elif parents == ["optim"] and (owners := [name for name, each in OPTIMIZERS.items() if _has(each.options, key)]):
        hint = f"; it belongs to optim.name {' or '.join(owners)}"
    elif parents == ["method"] and (owners := [use for use, each in METHODS.items() if _has(each.config, key)]):
        hint = f"; it belongs to method.use {' or '.join(owners)}"
    else:
        hint = did_you_mean(str(key), _fields(models, parents) if parents else models)
    return f"unknown field ({format_value(value)}){hint}"


def _has(model: type[BaseModel], field: str | int) -> bool:
    return field in model.model_fields


def in_words(error: ValueError) -> str:
    """An exception that a method raises for its configuration, on one line."""
    if not isinstance(error, ValidationError):
        return str(error)
    explained = ((detail["loc"][0], *_explained(detail, True, {}, detail["loc"])) for detail in error.errors())
    return "; ".join(f"{field} {reason}{value}" for field, reason, value in explained)


def _fields(models: Models, path: Sequence[str | int]) -> Iterable[str]:
    """Field names of the (nested) model at `path`."""
    kind: Any = models.get(str(path[0]))
    for part in path[1:]:
        if isinstance(part, int):
            continue  # an entry of a list has the fields of the others
        if get_origin(kind) is dict:
            kind = get_args(kind)[1]
            continue
        fields = getattr(kind, "model_fields", {})
        kind = next(_models_in(fields[part].annotation), None) if part in fields else None
    return getattr(kind, "model_fields", ())


def _models_in(annotation: Any) -> Iterator[Any]:
    """The models and dictionaries in a field's annotation, such as the one in a tuple of them or None."""
    of = get_origin(annotation) or annotation
    if isinstance(of, type) and issubclass(of, BaseModel | dict):
        yield annotation
    else:
        for inner in get_args(annotation):
            yield from _models_in(inner)
