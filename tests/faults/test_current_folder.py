"""A folder in which files lie that are called like modules: no command that is started there executes them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastdeit import plugins
from fastdeit.cli import main
from fastdeit.launch import launch

ROOT = Path(__file__).parents[2]
NAMES = ("random", "json", "socket", "pydantic", "ruamel", "numpy", "torch", "argparse", "multiprocessing", "pickle")
TRAP = """
import os
with open(f"{os.environ['FOLDER']}/{__name__}.executed", "w"):
    raise ImportError(__name__)
"""


@pytest.fixture
def folder(tmp_path):
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text(TRAP)
    return tmp_path


def run(folder, command, **env):
    """What the command says, started in the folder; the traps that it executed."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "FOLDER": str(folder), **env}
    env = {name: value for name, value in env.items() if value is not None}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    return done.stdout + done.stderr, sorted(path.stem for path in folder.glob("*.executed"))


def test_the_traps_work(folder):
    assert run(folder, [sys.executable, "-c", "import random"], PYTHONSAFEPATH=None)[1] == ["random"]


CHECKS_A_RECIPE = ["recipes", "show", "digits", "--resolved"]
"""It needs pydantic, ruamel.yaml and much of the standard library."""


@pytest.mark.parametrize("argv", [["--version"], pytest.param(CHECKS_A_RECIPE, marks=pytest.mark.slow)])
@pytest.mark.parametrize("start", ["as a module", "as a worker"])
def test_a_command_executes_nothing_of_the_folder(folder, start, argv):
    commands = {"as a module": [sys.executable, "-m", "fastdeit", *argv], "as a worker": launch.worker_command(argv)}
    said, executed = run(folder, commands[start], PYTHONSAFEPATH=None)
    assert executed == []
    assert "Traceback" not in said


def test_a_package_that_is_not_found_says_where_it_is_looked_for():
    with pytest.raises(ValueError, match="put its folder on the path: PYTHONPATH=FOLDER"):
        plugins.load("no_such_package.of_mine:Method", "method")


def test_a_worker_gets_the_words_of_its_command_and_the_modules_of_its_launcher(monkeypatch):
    monkeypatch.setattr(sys, "path", ["", "/a b", str(ROOT)])
    words = ["train", "x=$HOME", ""]
    command = launch.worker_command(words)
    assert command[3:] == ["2", "/a b", str(ROOT), "fastdeit", *words]
    monkeypatch.setattr(sys, "path", ["/a"])
    assert launch.worker_command([], "other.module")[3:] == ["2", "/a", str(ROOT), "other.module"]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 knows no PYTHONSAFEPATH")
def test_processes_of_libraries_execute_nothing_of_it_either(folder, monkeypatch, capsys):
    """Those of multiprocessing, loky and DALI are `python -c`, which searches the current folder otherwise."""
    monkeypatch.setattr(sys, "argv", ["fastdeit", "--version"])
    monkeypatch.delenv("PYTHONSAFEPATH", raising=False)
    assert main() == 0
    started = os.environ.pop("PYTHONSAFEPATH", None)
    assert run(folder, [sys.executable, "-c", "import random, json, pickle"], PYTHONSAFEPATH=started) == ("", [])
