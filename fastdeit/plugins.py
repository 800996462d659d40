"""Parts of a run that live in other packages: a recipe names them by import path.

To import a module is to execute it. So an import path is imported only where the user says it: in a recipe or an
override of the command, in a call of Python's, or by `--trust`. A run, a checkpoint and a file of weights name import
paths, too, and may come from somebody else. Whoever reads such a file tells `read_from` what stands in it, and `load`
refuses what only they have named.
"""

from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any


class Untrusted(Exception):
    """An import path that only a file of somebody else names. No ValueError: a validator must not swallow it."""


_theirs: dict[str, str] = {}
"""Texts that stood in a run, a checkpoint or a file of weights, and in which."""
_own: set[str] = set()
"""Texts of the user's recipes and overrides, which may stand in such a file as well."""
_trusts_all = False


def trust(*paths: str) -> None:
    """Let these import paths be imported, whoever names them; without arguments, whatever is named by anybody."""
    global _trusts_all
    _own.update(map(str.strip, paths))
    _trusts_all = _trusts_all or not paths


def said_by_user(value: Any) -> None:
    """Note all texts in `value`, which is made of mappings and sequences: the user has written them."""
    _own.update(texts(value))


def read_from(where: object, value: Any) -> None:
    """Note all texts in `value`, as of `said_by_user`: they stand in the file or run `where`, whoever wrote that."""
    for text in texts(value):
        _theirs.setdefault(text, str(where))


def is_own(text: str) -> bool:
    """Whether `text` may decide what is executed: the user has said it, or no file of somebody else has."""
    text = text.strip()
    return _trusts_all or text in _own or text not in _theirs


def load(path: str, what: str) -> Any:
    """The object at the import path `package.module:name`; after the colon there may be dots (`module:Class.method`).

    `what` says in messages which part of a run it is: "method", "model". Raises ValueError if `path` is no import path,
    if the module cannot be imported, and if it has no such name; Untrusted, before anything is imported, if it only
    stands in a file that `read_from` was told of.
    """
    if not is_own(path):
        raise Untrusted(
            f"{_theirs[path.strip()]} names the {what} {path!r}, which is code that fastdeit would have to execute; if "
            f"you trust whoever made it, add --trust (in Python: fastdeit.plugins.trust({path!r}))"
        )
    return load_shipped(path, what)


def load_shipped(path: str, what: str) -> Any:
    """The same for an import path that stands in a table of fastdeit's own, whoever names the row."""
    module_name, _, name = path.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), *name.split("."))):
        raise ValueError(f"{what} {path!r} is not an import path 'package.module:name'")
    try:
        found = import_module(module_name)
    except ImportError as error:
        raise ValueError(f"{what} {path!r} cannot be imported: {error}{_way_out(error, module_name)}") from error
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError as error:
            raise ValueError(f"{what} {path!r} cannot be imported: {error}") from error
    return found


def _way_out(error: ImportError, module: str) -> str:
    """The current folder is not searched, so that no file that happens to lie there is executed."""
    missing = isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]
    return "; install its package, or put its folder on the path: PYTHONPATH=FOLDER fastdeit ..." if missing else ""


def texts(value: Any) -> Iterator[str]:
    """All texts in `value`, which is made of mappings and sequences, but for their keys; without spaces around them."""
    if isinstance(value, str):
        yield value.strip()
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from texts(inner)
    elif isinstance(value, Sequence):
        for inner in value:
            yield from texts(inner)
