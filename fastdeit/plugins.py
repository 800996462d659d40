"""Parts of a run that live in other packages: a recipe names them by import path."""

from importlib import import_module
from typing import Any


def load(path: str, what: str) -> Any:
    """The object at the import path `package.module:name`; after the colon there may be dots (`module:Class.method`).

    `what` says in messages which part of a run it is: "method", "model". Raises ValueError if `path` is no import path,
    if the module cannot be imported, and if it has no such name.
    """
    module_name, _, name = path.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), *name.split("."))):
        raise ValueError(f"{what} {path!r} is not an import path 'package.module:name'")
    try:
        found = import_module(module_name)
    except ImportError as error:
        raise ValueError(f"{what} {path!r} cannot be imported: {error}") from error
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError as error:
            raise ValueError(f"{what} {path!r} cannot be imported: {error}") from error
    return found
