"""Compute threads: one number for a run, kept in its recipe; the user's environment wins."""

import os
import subprocess
import sys
from contextlib import suppress

import pytest
import torch

from fastdeit import cores
from fastdeit.engine.dist import World
from fastdeit.errors import UsageError
from fastdeit.recipe import resolve as recipes
from fastdeit.run import threads

ALONE = World(torch.device("cpu"))


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """`machine(cores, quota=)`: a machine of so many processors, with or without a quota of its container."""
    monkeypatch.delenv(threads.VARIABLE, raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)

    def make(count, quota="max 100000"):
        (tmp_path / "cpu.max").write_text(quota)
        monkeypatch.setattr(cores, "_QUOTA", tmp_path / "cpu.max")
        monkeypatch.setattr(cores.os, "sched_getaffinity", lambda pid: set(range(count)))

    return make


@pytest.mark.parametrize(
    ("count", "quota", "expected"),
    [(8, "max 100000", 8), (8, "250000 100000", 2), (8, "50000 100000", 1), (2, "800000 100000", 2), (3, "junk", 3)],
)
def test_processors_are_those_of_the_affinity_and_of_the_quota(machine, count, quota, expected):
    machine(count, quota)
    assert cores.available() == expected


def test_processors_where_there_is_no_cgroup(machine, monkeypatch, tmp_path):
    machine(5)
    monkeypatch.setattr(cores, "_QUOTA", tmp_path / "nothing")
    assert cores.available() == 5


def test_a_run_has_a_number_of_threads_and_keeps_it(machine, monkeypatch):
    machine(8)
    recipe = recipes.load("deit_tiny", ["data.source=synthetic"])
    assert recipe.engine.threads is None
    begun = threads.fixed(recipe, ALONE)
    assert begun.engine.threads == 8
    machine(2)
    assert threads.fixed(begun, ALONE).engine.threads == 8, "whoever goes on with the run has the same"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert threads.fixed(recipe, ALONE).engine.threads == 2, "left over from another launch"
    monkeypatch.setenv("RANK", "0")
    assert threads.fixed(recipe, ALONE).engine.threads == 1, "a process's share, and at least one"


def test_the_quick_start_has_one_number_on_every_machine(machine):
    for count in (1, 2, 64):
        machine(count)
        assert threads.fixed(recipes.load("digits"), ALONE).engine.threads == 1
        assert threads.fixed(recipes.load("digits_teacher"), ALONE).engine.threads == 1


@pytest.mark.parametrize(("text", "expected"), [("3", 3), ("4,2", 4), (" 2 ", 2)])
def test_the_environment_of_the_user_wins(machine, monkeypatch, text, expected):
    machine(8)
    monkeypatch.setenv(threads.VARIABLE, text)
    assert threads.fixed(recipes.load("digits"), ALONE).engine.threads == expected


@pytest.mark.parametrize("text", ["", "0", "two", "-1", "1.5"])
def test_an_environment_that_makes_no_sense_is_refused(machine, monkeypatch, text):
    monkeypatch.setenv(threads.VARIABLE, text)
    with pytest.raises(UsageError, match="is not a number of threads"):
        threads.fixed(recipes.load("digits"), ALONE)


def test_torch_computes_with_that_many_for_the_time_of_a_run():
    before = torch.get_num_threads()
    with suppress(KeyError), threads.computing(before + 1):
        assert torch.get_num_threads() == before + 1
        raise KeyError
    assert torch.get_num_threads() == before


START = """
import os, sys

class AtTorch:
    def find_spec(name, path, target=None):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"), flush=True)
            os._exit(0)

sys.meta_path.insert(0, AtTorch)
from fastdeit import cli
cli.main(["train", "digits"])
"""


@pytest.mark.parametrize(("given", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_waiting_threads_sleep_unless_the_user_says_otherwise(given, expected):
    """OpenMP reads the variable when torch is loaded, so it must stand before."""
    env = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    env |= {} if given is None else {"OMP_WAIT_POLICY": given}
    done = subprocess.run([sys.executable, "-c", START], env=env, capture_output=True, text=True)
    assert (done.stdout.splitlines()[-1], done.stderr) == (expected, "")
