"""The losses of every method and optimizer must not change by one bit without somebody saying so."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.golden.golden_losses import FOLDER, PORTABLE, RUNS, STEPS

HERE = Path(__file__).parent


QUICK = ("supervised",)


@cache
def results(names):
    """What `golden_losses.py` prints of these runs."""
    # The variables must be set before torch is loaded, hence the process.
    command = [sys.executable, str(HERE / "golden_losses.py"), *names]
    done = subprocess.run(command, env={**os.environ, **PORTABLE}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def recorded(name):
    """{release of torch as a tuple of its numbers: the losses that it gave}"""
    return {
        tuple(map(int, file.parent.name.removeprefix("torch-").split("."))): exact(file.read_text().splitlines())
        for file in FOLDER.glob(f"torch-*/{name}.txt")
    }


def exact(lines):
    return [float.fromhex(line) for line in lines]


def release(version):
    """The numbers of `2.14.1`; () of a development version such as `2.15.0a0`, which is no release."""
    return tuple(map(int, version.split("."))) if version.replace(".", "").isdigit() else ()


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in RUNS])
def test_losses(name):
    # Those of a tier in one process, which costs seconds to start.
    found = results(QUICK if name in QUICK else tuple(n for n in RUNS if n not in QUICK))
    expected, losses = recorded(name), exact(found["losses"][name])
    assert len(losses) == STEPS
    version = release(found["torch"])
    if version in expected:
        assert losses == expected[version]
    else:
        # Another torch may sum in another order; 30 steps amplify that, but not to a per mille.
        assert losses == pytest.approx(expected[max(expected)], rel=1e-3)


@pytest.mark.parametrize("name", RUNS)
def test_golden_run_learns(name):
    """A golden file of a run that does not train would guard nothing."""
    for losses in recorded(name).values():
        assert sum(losses[-5:]) < 0.97 * sum(losses[:5])
