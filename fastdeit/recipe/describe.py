"""Every field of a recipe in words: its type, its default, what it means.

All is read from the pydantic models of the sections. A field's type comes from the model's JSON schema, and its meaning
from the docstring below the field. `fastdeit explain` and the page of fields in the documentation print it.
"""

import ast
import inspect
import json
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fastdeit.engine.options import OPTIMIZERS
from fastdeit.methods import METHODS
from fastdeit.recipe import resolve

SECTIONS = tuple(name for name in resolve.Recipe.model_fields if name != "name")
"""Of a recipe, in order."""

_BOUNDS = {"minimum": "≥ {}", "exclusiveMinimum": "> {}", "maximum": "≤ {}", "exclusiveMaximum": "< {}"}
_WORDS = {"number": "number", "integer": "integer", "boolean": "true or false", "string": "text", "null": "null"}


@dataclass(frozen=True)
class Field:
    """One field. `path` is dotted; NAME in it stands for any name. `type` and `default` are Markdown."""

    path: str
    type: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Table:
    """The fields of a section, or of the part of it that goes with one method or one optimizer.

    choice   the field and value that the part goes with, "use: distill"; "" for a section of all recipes
    meaning  what the section is, in one line or several paragraphs
    """

    choice: str
    meaning: str
    fields: tuple[Field, ...]


def tables(section: str) -> Iterator[Table]:
    """The tables of a section: one for `data` and most others, one for each method of `method`; of `optim` what all
    optimizers have, then each optimizer's own."""
    if section == "method":
        for use, method in METHODS.items():
            yield _table(section, method.config, f"use: {use}")
        return
    model = resolve.Recipe.model_fields[section].annotation
    yield _table(section, model)
    if section == "optim":
        for name, optimizer in OPTIMIZERS.items():
            yield _table(section, optimizer.options, f"name: {name}")


def _table(section: str, model: type[BaseModel], choice: str = "") -> Table:
    return Table(choice, inspect.cleandoc(model.__doc__ or ""), tuple(_fields(section, model)))


def _fields(path: str, model: type[BaseModel]) -> Iterator[Field]:
    """The fields of a model within the model follow its own field."""
    schema = model.model_json_schema()
    definitions, meanings = schema.get("$defs", {}), field_docstrings(model)
    for name, field in model.model_fields.items():
        inner = _model_within(field.annotation)
        properties = schema["properties"][name]
        meaning = _joined(meanings.get(name, "")) or (_joined(inner.__doc__) if inner else "")
        yield Field(f"{path}.{name}", words(properties, definitions), _default(field), meaning)
        if inner:
            named = properties.get("type") == "object"
            yield from _fields(f"{path}.{name}.NAME" if named else f"{path}.{name}", inner)


@cache
def field_docstrings(model: type[BaseModel]) -> Mapping[str, str]:
    """The docstrings below the fields of `model` and of its bases, by field."""
    found: dict[str, str] = {}
    for base in reversed(model.__mro__):
        if base is BaseModel or not issubclass(base, BaseModel):
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        body = definition.body
        for field, below in pairwise(body):
            is_text = isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant)
            if isinstance(field, ast.AnnAssign) and is_text and isinstance(below.value.value, str):
                found[field.target.id] = inspect.cleandoc(below.value.value)
    return found


def words(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    """A type of a JSON schema in words, such as "number > 0, or null"."""
    if "$ref" in schema:
        return words(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    for key in ("anyOf", "oneOf"):
        if key in schema:
            return ", or ".join(words(option, definitions) for option in schema[key])
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    kind = schema.get("type", "any value")
    if kind == "array":
        return _list_in_words(schema, definitions)
    if kind == "object":
        return "fields by name" if schema.get("additionalProperties") else "fields"
    bounds = [
        form.format(_number(schema[key])) for key, form in _BOUNDS.items() if key in schema and schema[key] < 2**53
    ]
    return " ".join([_WORDS.get(kind, kind), " and ".join(bounds)]).strip()


def _list_in_words(schema: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    least, most = schema.get("minItems"), schema.get("maxItems")
    items = schema.get("prefixItems") or [schema["items"]]
    kinds = list(dict.fromkeys(words(item, definitions) for item in items))
    count = str(least) if least == most else f"{least} to {most}"
    size = f"list of {count}" if most else "list"
    return f"{size}, each: {kinds[0]}" if len(kinds) == 1 else f"{size}: {'; '.join(kinds)}"


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _default(field: FieldInfo) -> str:
    """The default as a recipe has it."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return f"`{value}`" if isinstance(value, str) and value else f"`{json.dumps(value)}`"


def _model_within(annotation: Any) -> type[BaseModel] | None:
    """The model in an annotation such as `dict[str, Model]` or `Model | None`."""
    if isinstance(annotation, type) and not get_args(annotation):
        return annotation if issubclass(annotation, BaseModel) else None
    return next(filter(None, map(_model_within, get_args(annotation))), None)


def _joined(text: str | None) -> str:
    """A text of several lines in one, as a cell of a table has it."""
    return " ".join((text or "").split())
