"""Dependencies point down only: every import of the package is read and held against docs/architecture.md."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fastdeit"

# What each part may import of fastdeit, besides itself. A module that is not named here stands beside train: it may
# import anything but what is above train. `fastdeit` is the package's own __init__ (the version).
LAYERS: dict[str, set[str]] = {
    "fastdeit": set(),
    "errors": set(),
    "rng": set(),
    "text": set(),
    "plugins": set(),
    "fields": set(),
    "views": {"fields", "data"},
    "kernels": set(),
    "batch": {"kernels"},
    "models": {"kernels", "fields", "plugins", "text"},
    "methods": {"models", "kernels", "plugins", "fields", "views", "batch"},
    "data": {"rng", "batch", "plugins"},
    "engine": {"rng", "kernels", "batch", "plugins"},
    "agent": {"errors"},
    "launch": {"errors", "agent", "train"},
    "__main__": {"cli"},
}
LOWEST_FLOOR = {"rng", "text", "plugins", "fields", "views", "batch"}
NOT_FOR_CLI = LOWEST_FLOOR | {"models", "methods", "data", "engine", "agent", "__main__"}
ABOVE_TRAIN = {"cli", "launch", "agent", "__main__"}
# numpy only: they run where no torch is wanted, and their arrays are the contract with any executor.
_DATA = ("arrow", "cifar", "datasets", "folder", "hugging_face", "index", "kinds", "order", "packed", "parquet", "plan")
_DATA += ("pixel_ops", "policy", "public", "scan", "shards", "source", "synthetic", "tar", "tfrecord", "tools")
_TOP = ("data_verbs", "errors", "rng", "fields", "views", "cli", "launch")
WITHOUT_TORCH = [f"{name}.py" for name in (*(f"data/{name}" for name in _DATA), *_TOP)]

FILES = sorted(PACKAGE.rglob("*.py"))


def layer(module: str) -> str:
    """`fastdeit.engine.dist` -> `engine`, `fastdeit` -> `fastdeit`."""
    return module.split(".")[1] if "." in module else module


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def exists(module: str) -> bool:
    path = ROOT.joinpath(*module.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def imports(tree: ast.AST, path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, wherever it stands: at the top, in a function, under TYPE_CHECKING, by name."""
    package = module_name(path) if path.name == "__init__.py" else module_name(path).rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*up, *filter(None, [node.module])]) if node.level else node.module
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                # `from fastdeit.recipe import resolve as recipe` names a module whether its file is written yet or not.
                yield node.lineno, whole if exists(whole) or (base == "fastdeit" and alias.name.islower()) else base
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def violations(path: Path, source: str) -> list[str]:
    me = layer(module_name(path))
    found = []
    for line, module in imports(ast.parse(source), path):
        if module.split(".")[0] != "fastdeit":
            continue
        target = layer(module)
        if me == "cli":
            fine = target not in NOT_FOR_CLI
        elif me in LAYERS:
            fine = target == me or target in LAYERS[me]
        else:
            fine = target not in ABOVE_TRAIN
        if not fine:
            found.append(f"{path.relative_to(ROOT)}:{line}: {me} imports {target}")
    return found


def test_there_is_something_to_check():
    assert {"cli", "launch", "train"} <= {layer(module_name(path)) for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_dependencies_point_down(path):
    assert violations(path, path.read_text()) == []


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("engine/x.py", "def f():\n    from fastdeit.models import deit"),
        ("engine/x.py", "from fastdeit import methods"),
        ("engine/x.py", "from .. import errors"),
        ("data/x.py", "from fastdeit.engine.dist import World"),
        ("data/x.py", "import fastdeit.kernels as k"),
        ("methods/x.py", "if TYPE_CHECKING:\n    from fastdeit.data.sources import source"),
        ("models/x.py", "from ..methods.base import Method"),
        ("models/__init__.py", "from ..methods.base import Method"),
        ("kernels/x.py", "from importlib import import_module\nimport_module('fastdeit.rng')"),
        ("kernels/x.py", "from fastdeit import __version__"),
        ("train.py", "from fastdeit.launch import launch"),
        ("recipe.py", "from fastdeit.cli import main"),
        ("launch.py", "from fastdeit.engine import dist"),
        ("cli.py", "from fastdeit.data.sources.source import DataError"),
        ("rng.py", "from fastdeit.data.plan import order"),
    ],
)
def test_an_upward_import_is_seen(name, source):
    """The check is worth what it catches."""
    assert len(violations(PACKAGE / name, source)) == 1


@pytest.mark.parametrize(
    ("name", "source"),
    [
        (
            "train.py",
            "from fastdeit.run import build; from fastdeit.recipe import resolve as recipes; from fastdeit import rng\nfrom fastdeit.errors import UsageError",
        ),
        ("kernels/x.py", "from fastdeit.kernels import _op\nfrom . import attention\nfrom .loss import f"),
        (
            "cli.py",
            "from fastdeit import __version__; from fastdeit.verbs import doctor; from fastdeit.recipe import resolve as recipe; from fastdeit.launch import launch",
        ),
        ("engine/x.py", "from fastdeit import kernels, rng\nimport torch"),
        ("models/x.py", "from ..kernels import attention"),
    ],
)
def test_a_downward_import_is_not(name, source):
    assert violations(PACKAGE / name, source) == []


def imported_by(path: Path) -> set[str]:
    return {module for _, module in imports(ast.parse(path.read_text()), path)}


@pytest.mark.parametrize("name", WITHOUT_TORCH)
def test_no_torch(name):
    assert not {module for module in imported_by(PACKAGE / name) if module.split(".")[0] == "torch"}


def test_data_knows_no_torch_module():
    for path in (PACKAGE / "data").glob("*.py"):
        assert not {module for module in imported_by(path) if module.startswith("torch.nn")}, path


def loaded_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_and_the_command_line_imports_no_torch():
    loaded = loaded_after("import fastdeit, fastdeit.cli, fastdeit.launch.launch, fastdeit.errors")
    assert not {"torch", "numpy", "pydantic", "rich"} & loaded


def test_the_data_verbs_that_need_no_model_load_no_torch():
    assert "torch" not in loaded_after("import fastdeit.verbs.data")


def test_kernels_stand_alone():
    loaded = loaded_after("import fastdeit.kernels")
    others = {name for name in loaded if name.startswith("fastdeit.") and layer(name) != "kernels"}
    assert "fastdeit.kernels" in loaded
    assert others == set()
