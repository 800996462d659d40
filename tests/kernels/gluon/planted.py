"""Modules of Gluon kernels with a line changed, in place of those that are imported."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import util
from pathlib import Path
from types import ModuleType


def module_from(path: Path, name: str) -> ModuleType:
    """A new module of this name from a file. Triton reads the source of a kernel, so there has to be one."""
    spec = util.spec_from_file_location(name, path)
    sys.modules[name] = module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def changed(text: str, old: str, new: str) -> str:
    """The text with the one place that is `old` changed; ValueError unless there is one."""
    if text.count(old) != 1:
        raise ValueError(f"{old!r} is there {text.count(old)} times")
    return text.replace(old, new)


@contextmanager
def planted(modules: Sequence[ModuleType], file: str, old: str, new: str, folder: Path) -> Iterator[None]:
    """Inside, importing these modules, which import one another in this order, gives new ones, and that of `file` has
    the change."""
    try:
        for module in modules:
            path = Path(module.__file__)
            if path.name == file:
                text = changed(path.read_text(), old, new)
                path = folder / file
                path.write_text(text)
            module_from(path, module.__name__)
        yield
    finally:  # these alone: what else was imported meanwhile stays
        sys.modules.update((module.__name__, module) for module in modules)
