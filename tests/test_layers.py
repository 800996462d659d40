"""Dependencies point down only: every import of the package is read and held against docs/architecture.md."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "fastdeit"

# What each room of the package may import of fastdeit besides itself, lowest floor first: a row names earlier rows
# alone. A room is a package or a module. "data" stands for every room below it as well, and a file belongs to the
# longest name that fits. `fastdeit` is the package's own __init__, which imports the front when it is asked for it.
_OPS = {"kernels._example", "kernels._op", "kernels._triton"}
LAYERS: dict[str, set[str]] = {
    # ---- they import nothing of fastdeit
    "version": set(),
    "cores": set(),
    "errors": set(),
    "rng": set(),
    "text": set(),
    "files": set(),
    "cache_folder": set(),
    "signals": set(),
    "plugins": set(),
    "fields": set(),
    "jsons": {"files"},
    # ---- fused ops: they import nothing outside kernels
    "kernels._checks": set(),
    "kernels._hooks": set(),
    "kernels._table": set(),
    "kernels.dtypes": set(),
    "kernels._example": {"kernels.dtypes"},
    "kernels._derivatives": set(),
    "kernels._tried": set(),
    "kernels._asked": set(),
    "kernels._op": {
        "kernels._asked",
        "kernels._checks",
        "kernels._derivatives",
        "kernels._example",
        "kernels._table",
        "kernels._tried",
    },
    "kernels._triton": {"kernels._op"},
    "kernels._loss": {"kernels._checks", "kernels._triton"},
    "kernels.noise": set(),
    "kernels._host_pixels": {"kernels._checks", "kernels._op", "kernels.noise"},
    "kernels.input": _OPS | {"kernels._checks", "kernels._host_pixels", "kernels.noise"},
    "kernels._rows": {"kernels._op", "kernels._triton"},
    "kernels.layer_norm": _OPS | {"kernels._checks", "kernels._derivatives", "kernels._rows"},
    "kernels.rms_norm": _OPS | {"kernels._checks", "kernels._rows"},
    "kernels.qk_norm_rope": _OPS | {"kernels._checks", "kernels._rows"},
    "kernels.swiglu": _OPS | {"kernels._checks"},
    "kernels.native": {"kernels._op"},
    "kernels.attention": _OPS
    | {"kernels._asked", "kernels._checks", "kernels._derivatives", "kernels.dtypes", "kernels.native"},
    "kernels.mlp": _OPS | {"kernels._checks", "kernels.dtypes", "kernels.layer_norm"},
    "kernels.fp8": _OPS | {"kernels._asked", "kernels._checks", "kernels._derivatives", "kernels._rows", "kernels.mlp"},
    "kernels.losses": _OPS | {"kernels._checks", "kernels._loss"},
    "kernels.cosub": _OPS | {"kernels._loss"},
    "kernels.optimizer": _OPS | {"kernels._checks"},
    "kernels.lint": _OPS | {"kernels.dtypes", "kernels._table", "kernels.mlp", "kernels.optimizer"},
    "kernels.trial": {"kernels._op", "kernels._tried", "kernels.native"},
    "kernels.positions": set(),
    "kernels.casts": {"kernels._derivatives", "kernels._op"},
    "kernels.linear": {"kernels._checks", "kernels._derivatives", "kernels._op"},
    "kernels.nn": {
        *(
            "kernels._hooks",
            "kernels._op",
            "kernels._rows",
            "kernels.attention",
            "kernels.layer_norm",
            "kernels.mlp",
            "kernels.positions",
        ),
        *("kernels.qk_norm_rope", "kernels.rms_norm", "kernels.swiglu"),
    },
    "kernels.accelerate": {
        "kernels._asked",
        "kernels._hooks",
        "kernels._op",
        "kernels._table",
        "kernels.attention",
        "kernels.layer_norm",
        "kernels.mlp",
        "kernels.nn",
    },
    "kernels": {
        *("kernels._asked", "kernels._op", "kernels.accelerate", "kernels.attention", "kernels.cosub", "kernels.input"),
        *("kernels.layer_norm", "kernels.losses", "kernels.mlp", "kernels.nn", "kernels.optimizer", "kernels.trial"),
        *("kernels.qk_norm_rope", "kernels.rms_norm", "kernels.swiglu", "kernels.native"),
        *("kernels._derivatives", "kernels.casts", "kernels.fp8", "kernels.linear"),
    },
    # ---- what a batch is, and where it comes from
    "batch": {"kernels"},
    "data.nodes": set(),
    "data.blur": set(),
    "data.compiled": set(),
    "data.pixel_ops": {"data.nodes", "data.blur", "data.compiled"},
    "data.plan": {"rng", "data.pixel_ops"},
    "data.sources": {"rng", "plugins", "text", "jsons", "cache_folder"},
    "data.execute": {"data.plan", "data.sources", "data.nodes", "data.compiled", "data.pixel_ops"},
    "data.logits": {"jsons", "data.sources"},
    "data.bad": {"text", "jsons", "data.sources"},
    "data.examine": {"data.sources", "data.execute"},
    "data.loader": {"cores", "batch", "data.bad", "data.plan", "data.sources", "data.execute"},
    "data": set(),
    "views": {"fields", "data.plan"},
    # ---- networks, losses, steps; none of them knows a data set
    "models": {"kernels", "kernels._hooks", "fields", "plugins", "text"},
    "methods": {"models", "kernels", "batch", "data.logits", "views", "fields", "plugins"},
    "engine": {"kernels", "batch", "plugins", "signals", "text", "files", "jsons"},
    # ---- a run
    "recipe": {"plugins", "models", "methods", "engine", "data.sources", "views", "fields", "text"},
    "run": {
        "plugins",
        *("version", "cores", "errors", "rng", "text", "fields", "kernels", "batch", "views", "models", "methods"),
        *("files", "jsons", "engine", "recipe"),
        *("data.bad", "data.compiled", "data.examine", "data.plan", "data.sources", "data.loader", "data.logits"),
    },
    "estimate": {
        *("plugins", "errors", "text", "jsons", "fields", "kernels", "data.plan", "models", "methods", "engine"),
        *("recipe", "run"),
    },
    "training": {
        *("errors", "text", "rng", "kernels", "batch", "methods", "engine", "recipe", "run", "estimate"),
    },
    "stepping": {"batch", "errors", "data.plan", "methods", "engine", "recipe", "run", "estimate", "training"},
    "feed": {"batch", "errors", "engine", "recipe", "run"},
    # ---- what the command line calls
    "launch": {"errors", "signals"},
    "chaos": {"batch", "errors", "data.loader", "engine", "launch", "run"},
    "bench": {
        *("errors", "rng", "fields", "kernels", "batch", "views", "models", "methods", "engine", "recipe", "run"),
        *(
            "estimate",
            "feed",
            "stepping",
            "data.compiled",
            "data.logits",
            "data.pixel_ops",
            "data.plan",
            "data.sources",
        ),
    },
    "verbs": {
        *("version", "cores", "errors", "text", "jsons", "kernels", "batch", "models", "methods", "engine", "recipe"),
        *(
            "run",
            "estimate",
            "data.examine",
            "data.execute",
            "data.pixel_ops",
            "data.plan",
            "data.sources",
            "data.loader",
        ),
        *("data.bad", "data.logits"),
    },
    "experiments": {
        *("errors", "rng", "text", "jsons", "kernels", "batch", "methods", "engine", "recipe", "run", "training"),
        *("data.sources",),
    },
    "api": {"errors", "files", "engine", "feed", "recipe", "run", "stepping", "training", "verbs"},
    "cli": {
        "version",
        "errors",
        "text",
        "plugins",
        "kernels",
        "recipe",
        "run",
        "training",
        "estimate",
        "bench",
        "verbs",
        "chaos",
        "experiments",
        "launch",
    },
    "fastdeit": {"version", "api"},
    "__main__": {"cli"},
}
# They run where no torch is wanted, and the arrays of the plan are the contract with any executor.
WITHOUT_TORCH = [
    *(
        "version.py",
        "cores.py",
        "errors.py",
        "rng.py",
        "text.py",
        "jsons.py",
        "cache_folder.py",
        "plugins.py",
        "fields.py",
        "views.py",
        "models/names.py",
        "methods/config.py",
        "engine/options.py",
        "launch/launch.py",
    ),
    *("data/nodes.py", "data/compiled.py", "data/pixel_ops.py", "verbs/data.py"),
    *("run/address.py", "run/classes.py", "run/chosen.py", "run/directory.py", "run/fork.py", "run/identity.py"),
    *("run/bare.py", "run/places.py", "run/request.py", "estimate/machines.py", "verbs/formats.py"),
    *(
        str(path.relative_to(PACKAGE))
        for room in ("data/plan", "data/sources", "recipe", "cli", "verbs/make")
        for path in sorted((PACKAGE / room).glob("*.py"))
    ),
]

FILES = sorted(PACKAGE.rglob("*.py"))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def below(name: str, room: str) -> bool:
    return name == room or name.startswith(f"{room}.")


def room_of(module: str) -> str | None:
    """`fastdeit.data.plan.order` -> `data.plan`, `fastdeit` -> `fastdeit`; None for a module in no row of the table."""
    name = module.removeprefix("fastdeit.")
    return max((room for room in LAYERS if below(name, room)), key=len, default=None)


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
                yield node.lineno, whole if exists(whole) else base
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


@cache
def own_imports(path: Path, source: str) -> tuple[tuple[int, str], ...]:
    """Those of `imports` that name fastdeit."""
    return tuple((line, module) for line, module in imports(ast.parse(source), path) if below(module, "fastdeit"))


def violations(path: Path, source: str) -> list[str]:
    me = room_of(module_name(path))
    found = [] if me else [f"{path.relative_to(ROOT)} is in no row of LAYERS"]
    for line, module in own_imports(path, source):
        target = room_of(module)
        if target != me and not any(below(target or module, allowed) for allowed in LAYERS.get(me, ())):
            found.append(f"{path.relative_to(ROOT)}:{line}: {me} imports {target or module}")
    return found


def circle(sources: Mapping[Path, str]) -> list[str] | None:
    """Names of modules of which each imports the next, the last being the first; None if no file is in a circle."""
    files = {module_name(path) for path in sources}
    graph: dict[str, set[str]] = {}
    for path, source in sources.items():
        me = module_name(path)
        graph[me] = {module for _, module in own_imports(path, source) if module in files and module != me}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1][::-1]
    return None


def test_there_is_something_to_check():
    assert {"cli", "launch", "training"} <= {room_of(module_name(path)) for path in FILES}


def test_a_floor_stands_on_lower_floors_alone():
    rooms = list(LAYERS)
    for place, (room, allowed) in enumerate(LAYERS.items()):
        for name in allowed:
            covered = [other for other in rooms if below(other, name)]
            assert covered, f"{room} may import {name}, which is no room"
            assert all(rooms.index(other) < place for other in covered), f"{room} stands below {name}"


def test_the_picture_in_the_documentation_has_the_same_floors():
    page = (ROOT / "docs" / "architecture.md").read_text()
    floors: dict[str, int] = {}
    for number, line in re.findall(r"^ {0,2}(\d+)  (\S.*)$", page, re.MULTILINE):
        for name in re.findall(r"[a-z_/]+(?:/|\.py)(?= |$)", line):
            floors[name.removesuffix(".py").strip("/").replace("/", ".")] = int(number)
    assert {room.partition(".")[0] for room in LAYERS} - {"fastdeit"} == {name.partition(".")[0] for name in floors}

    def floor(room: str) -> int:
        return floors[max((name for name in floors if below(room, name)), key=len)]

    for room, allowed in LAYERS.items():
        for other in allowed if room != "fastdeit" else ():
            inside = below(room, "kernels") and below(other, "kernels")
            assert inside or floor(other) < floor(room), f"{room} imports {other}, which the picture has above it"


def test_every_row_is_used():
    """A row, or a name in one, that no file needs would allow what nobody decided."""
    used: dict[str, set[str]] = {}
    for path in FILES:
        me = room_of(module_name(path))
        used.setdefault(me, set()).update(room_of(module) for _, module in own_imports(path, path.read_text()))
    assert used.keys() == LAYERS.keys()
    for room, allowed in LAYERS.items():
        idle = {name for name in allowed if not any(below(target, name) for target in used[room])}
        assert not idle, f"{room} imports nothing of {', '.join(sorted(idle))}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_dependencies_point_down(path):
    assert violations(path, path.read_text()) == []


def test_no_file_is_in_a_circle():
    assert circle({path: path.read_text() for path in FILES}) is None


@pytest.mark.parametrize(
    ("name", "source", "back"),
    [
        ("methods/evaluators.py", "from fastdeit.methods.base import Method", "fastdeit.methods.base"),
        ("rng.py", "def f():\n    from fastdeit.data.plan import order", "fastdeit.data.plan.order"),
        ("kernels/attention/tiles.py", "from .op import attention", "fastdeit.kernels.attention.op"),
        ("engine/guard.py", "if TYPE_CHECKING:\n    from fastdeit.engine.step import Engine", "fastdeit.engine.step"),
    ],
)
def test_a_circle_is_seen(name, source, back):
    sources = {path: path.read_text() for path in FILES}
    found = circle(sources | {PACKAGE / name: source})
    assert found[0] == found[-1]
    assert {module_name(PACKAGE / name), back} <= set(found)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("engine/x.py", "def f():\n    from fastdeit.models import deit"),
        ("engine/x.py", "from fastdeit import methods"),
        ("engine/x.py", "from .. import errors"),
        ("data/loader.py", "from fastdeit.engine.dist import World"),
        ("data/loader.py", "import fastdeit.kernels as k"),
        ("data/plan/x.py", "from fastdeit.data.execute import dali"),
        ("data/plan/x.py", "from fastdeit.data.sources.source import Source"),
        ("data/sources/x.py", "from ..plan import order"),
        ("data/execute/x.py", "from fastdeit.data.loader import TrainLoader"),
        ("methods/x.py", "if TYPE_CHECKING:\n    from fastdeit.data.sources import source"),
        ("models/x.py", "from ..methods.base import Method"),
        ("models/__init__.py", "from ..methods.base import Method"),
        ("kernels/attention/x.py", "from importlib import import_module\nimport_module('fastdeit.rng')"),
        ("kernels/attention/x.py", "from fastdeit import kernels"),
        ("kernels/nn.py", "from fastdeit.kernels.accelerate import patch"),
        ("kernels/_op.py", "from fastdeit import __version__"),
        ("recipe/x.py", "from fastdeit.run import build"),
        ("run/x.py", "from fastdeit import training"),
        ("training.py", "from fastdeit import launch"),
        ("recipe/x.py", "from fastdeit.cli import main"),
        ("launch/x.py", "from fastdeit.engine import dist"),
        ("cli/train.py", "from fastdeit.data.sources.source import DataError"),
        ("rng.py", "from fastdeit.data.plan import order"),
        ("x.py", ""),
    ],
)
def test_an_upward_import_is_seen(name, source):
    """The check is worth what it catches."""
    assert len(violations(PACKAGE / name, source)) == 1


@pytest.mark.parametrize(
    ("name", "source"),
    [
        (
            "training.py",
            "from fastdeit import rng\nfrom fastdeit.run import build\nfrom fastdeit.errors import UsageError",
        ),
        ("kernels/attention/x.py", "from fastdeit.kernels import _op\nfrom . import tiles\nfrom .._triton import f"),
        ("cli/train.py", "from fastdeit import kernels\nfrom fastdeit.verbs import doctor"),
        ("engine/x.py", "from fastdeit import kernels\nimport torch"),
        ("models/x.py", "from ..kernels import attention"),
        ("data/loader.py", "from fastdeit.data.execute import dali"),
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
    for path in (PACKAGE / "data").rglob("*.py"):
        assert not {module for module in imported_by(path) if module.startswith("torch.nn")}, path


def loaded_after(statement: str) -> set[str]:
    code = f"import sys\n{statement}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_and_the_command_line_imports_no_torch():
    loaded = loaded_after("import fastdeit, fastdeit.cli, fastdeit.launch.launch, fastdeit.errors")
    assert not {"torch", "numpy", "pydantic", "rich"} & loaded


def test_the_data_verbs_recipes_and_the_list_of_experiments_load_no_torch():
    modules = "verbs.data", "recipe.resolve", "recipe.describe", "experiments.command"
    assert "torch" not in loaded_after(f"import {', '.join(f'fastdeit.{each}' for each in modules)}")


def test_kernels_stand_alone():
    loaded = {name for name in loaded_after("import fastdeit.kernels") if below(name, "fastdeit")}
    assert "fastdeit.kernels" in loaded
    assert {name for name in loaded if not below(name, "fastdeit.kernels")} == {"fastdeit", "fastdeit.version"}
