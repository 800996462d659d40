"""The page "Recipes": those that are shipped, and every field with its type, default and meaning.

All is read from the recipes and their pydantic models. A field's type comes from the model's JSON schema, and its
meaning from the docstring below the field.
"""

import ast
import inspect
import json
import textwrap
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import pairwise
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from fastdeit import methods
from fastdeit.engine import optimizers
from fastdeit.recipe import resolve as recipe

INTRODUCTION = """\
# Recipes and their fields

A recipe is a YAML file that says everything about a run. `fastdeit recipes show NAME` prints one that is shipped. A
field is set in the file, or for one run on the command line:

```bash
fastdeit train deit_tiny optim.lr=5e-4 data.flip=0 --data /path/to/imagenet
```

A recipe may start from another one: `base: NAME` at its top takes over the other's fields.

## Shipped recipes

| name | what it trains |
|---|---|
"""
_BOUNDS = {"minimum": "≥ {}", "exclusiveMinimum": "> {}", "maximum": "≤ {}", "exclusiveMaximum": "< {}"}
_WORDS = {"number": "number", "integer": "integer", "boolean": "true or false", "string": "text", "null": "null"}


def page() -> str:
    """The page, in Markdown."""
    shipped = (f"| `{name}` | {summary} |" for name, summary in recipe.summaries())
    return "\n".join([INTRODUCTION.rstrip("\n"), *shipped, *_sections()])


def _sections() -> Iterator[str]:
    for name, field in recipe.Recipe.model_fields.items():
        if name == "method":
            for use in methods.METHODS:
                model = methods.config(use)
                yield from _section("method", model, f"method, with `use: {use}`", methods.find(use).__doc__)
        elif name == "optim":
            yield from _section(name, field.annotation, name, field.annotation.__doc__)
            for use, optimizer in optimizers.OPTIMIZERS.items():
                yield from _section(name, optimizer.Options, f"optim, with `name: {use}`", optimizer.__doc__)
        elif name != "name":  # the stem of the recipe's file, which no recipe has as a field
            yield from _section(name, field.annotation, name, field.annotation.__doc__)


def _section(path: str, model: type[BaseModel], title: str, words: str | None) -> Iterator[str]:
    yield f"\n## {title}\n"
    yield f"{inspect.cleandoc(words or '')}\n"
    yield "| field | type | default | meaning |\n|---|---|---|---|"
    yield from _rows(path, model)


def _rows(path: str, model: type[BaseModel]) -> Iterator[str]:
    """Rows of a table; the fields of a model within the model follow its own row."""
    schema = model.model_json_schema()
    definitions, meanings = schema.get("$defs", {}), field_docstrings(model)
    for name, field in model.model_fields.items():
        inner = _model_within(field.annotation)
        properties = schema["properties"][name]
        type_in_words = words(properties, definitions)
        meaning = _joined(meanings.get(name, "")) or (_joined(inner.__doc__) if inner else "")
        cells = f"`{path}.{name}`", type_in_words, _default(field), meaning
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        if inner:
            named = properties.get("type") == "object"
            yield from _rows(f"{path}.{name}.NAME" if named else f"{path}.{name}", inner)


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
    return f"{size}, each: {kinds[0]}" if len(kinds) == 1 else f"list: {'; '.join(kinds)}"


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
