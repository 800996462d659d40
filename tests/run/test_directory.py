"""Run directories: two starts in one second, two resumes at once, what a failed start leaves, which run is found."""

import os
import re
import shlex
import signal
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastdeit.cli.train import TRAIN
from fastdeit.engine import checkpoint
from fastdeit.engine.dist import World
from fastdeit.errors import UsageError
from fastdeit.recipe import resolve as recipes
from fastdeit.run import directory, request
from tests.small_runs import run_state

CPU = World(torch.device("cpu"))
PROCESSES = 6


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


class Frozen(datetime):
    """A clock that stands still."""

    @classmethod
    def now(cls):
        return cls(2026, 1, 2, 3, 4, 5)


def at_once(action):
    """What `action(number)` returns as text in each of several processes that begin together and end together."""
    begin, go = os.pipe()
    end, stop = os.pipe()
    answers = []
    for number in range(PROCESSES):
        told, tell = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(go)
            os.close(stop)
            os.read(begin, 1)  # until the parent closes its end
            for text in action(number):
                os.write(tell, text.encode())
                os.close(tell)
                os.read(end, 1)
            os._exit(0)
        os.close(tell)
        answers.append((child, told))
    os.close(go)
    texts = [os.read(told, 1000).decode() for _, told in answers]
    os.close(stop)
    for child, told in answers:
        os.waitpid(child, 0)
        os.close(told)
    os.close(begin)
    os.close(end)
    return texts


def claimed(given, resume=False):
    """A generator of the one directory that it holds, or of the reason why it holds none."""
    try:
        with directory.claim(given, "digits", CPU, lambda text: None, resume=resume) as path:
            (path / "metrics.jsonl").write_text('{"step": 1}\n')
            yield str(path)
    except UsageError as error:
        yield f"refused: {error}"


def test_starts_in_the_same_second_get_directories_of_their_own(monkeypatch):
    monkeypatch.setattr(directory, "datetime", Frozen)
    found = at_once(lambda number: claimed(None))
    assert sorted(found) == sorted(
        ["runs/2026-01-02_030405_digits", *(f"runs/2026-01-02_030405-{n}_digits" for n in range(2, PROCESSES + 1))]
    )


@pytest.mark.parametrize("resume", [False, True])
def test_of_several_in_one_directory_one_trains(resume):
    if resume:
        saved(Path("run"), 3)
    found = at_once(lambda number: claimed(Path("run"), resume))
    assert found.count("run") == 1
    for text in found:
        assert text == "run" or text.startswith("refused: run is being trained by "), text
    assert not Path("run/lock.json").exists()


def test_a_run_that_was_killed_is_taken_over_with_a_word(capsys):
    child = os.fork()
    if child == 0:
        for _ in claimed(Path("run")):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    with directory.claim(Path("run"), "digits", CPU, print, resume=True):
        assert f"process {child} on" in capsys.readouterr().out


# ---- failed starts ---------------------------------------------------------------------------------------------------


def fail(given, fill):
    def start():
        with directory.claim(given, "digits", CPU, print) as path:
            (path / "recipe.yaml").write_text("")
            (path / "tensorboard").mkdir()
            fill(path)
            raise KeyError

    with pytest.raises(KeyError):
        start()


@pytest.mark.parametrize("given", [None, Path("a/b/run")])
def test_a_start_that_fails_leaves_nothing(given, tmp_path):
    fail(given, lambda path: (path / "metrics.jsonl").write_text('{"step": 0, "kind": "teacher"}\n'))
    assert os.listdir(tmp_path) == []


def test_a_start_that_fails_leaves_what_was_there():
    run = Path("run")
    run.mkdir()
    (run / "slurm.out").write_text("mine")
    fail(run, lambda path: None)
    assert os.listdir(run) == ["slurm.out"]
    fail(run, lambda path: None)  # and it is no run


@pytest.mark.parametrize("worth", ["metrics", "checkpoint", "teacher"])
def test_a_run_that_fails_later_is_kept(worth):
    def fill(path):
        if worth == "metrics":
            (path / "metrics.jsonl").write_text('{"step": 1}\n')
        else:
            saved(path if worth == "checkpoint" else path / "teacher", 1)

    fail(Path("run"), fill)
    assert {"recipe.yaml", "tensorboard", "checkpoints"} <= set(os.listdir("run"))


def test_nothing_of_a_run_goes_when_it_cannot_be_resumed():
    run = Path("run")
    run.mkdir()
    (run / "metrics.jsonl").write_text("")

    def start():
        with directory.claim(run, "digits", CPU, print, resume=True):
            (run / "metrics.jsonl").rename(run / "metrics-1.jsonl")
            raise KeyError

    with pytest.raises(KeyError):
        start()
    assert (run / "metrics-1.jsonl").exists()


# ---- found again -----------------------------------------------------------------------------------------------------


def saved(run, step, recipe="digits"):
    tensors = {"model": {"w": torch.zeros(1)}}
    return checkpoint.save(run / "checkpoints", step, tensors, run_state(recipes.load(recipe)))


def test_the_newest_run_is_the_newest_with_a_checkpoint():
    names = ["2026-01-01_000000_digits", "2026-01-01_000001_digits", "2026-01-01_000001-9_digits"]
    names += ["2026-01-01_000001-10_digits"]
    for name in [*names, "2026-02-01_000000_my_digits", "zzzz_digits"]:
        saved(Path("runs") / name, 1)
    (Path("runs") / "2026-03-01_000000_digits" / "checkpoints").mkdir(parents=True)
    for name in reversed(names):
        assert directory.newest("digits").name == name
        (Path("runs") / name).rename(Path("runs") / f"old_{name}")
    with pytest.raises(UsageError, match="no run of recipe digits with a checkpoint under runs/; name it"):
        directory.newest("digits")


def test_the_recipe_of_a_run_is_that_of_its_newest_sound_checkpoint():
    run = Path("run")
    saved(run, 1)
    newest = saved(run, 2, "digits_teacher")
    (run / "recipe.yaml").write_text("what somebody has written there")
    assert directory.recipe_of(run) == recipes.load("digits_teacher")
    (newest / "manifest.json").write_text("{}")
    assert directory.recipe_of(run) == recipes.load("digits")


def test_while_the_teacher_is_trained_it_is_the_one_in_its_file():
    run, recipe = Path("run"), recipes.load("digits", ["train.epochs=7"])
    run.mkdir()
    directory.write_recipe(run, recipe)
    with pytest.raises(UsageError, match="run has no checkpoint to go on from") as error:
        directory.recipe_of(run)
    again = shlex.split(re.search("`fastdeit train (.*)`", str(error.value))[1])
    args = TRAIN.parse(again)
    args.named = args.recipe = args.words[0]
    asked = request.read(args, print)
    assert (asked.recipe.name, asked.run_dir) == ("digits", run), "it begins again under its name"
    saved(run / "teacher", 1, "digits_teacher")
    assert directory.recipe_of(run).model_dump(exclude={"about"}) == recipe.model_dump(exclude={"about"})


def test_a_recipe_of_another_version_is_named():
    state = run_state(recipes.load("digits")) | {"recipe": {"name": "x"}}
    checkpoint.save(Path("run/checkpoints"), 1, {"model": {"w": torch.zeros(1)}}, state)
    named = r"the recipe in run/checkpoints is not one of this version of fastdeit: \w+: .*; go on with"
    with pytest.raises(UsageError, match=named):
        directory.recipe_of(Path("run"))


def test_the_command_that_goes_on_with_a_run(monkeypatch):
    two = World(torch.device("cpu"), size=2)
    assert directory.command(Path("runs/a b"), "x.y=[1, 2]") == "`fastdeit train --resume 'runs/a b' 'x.y=[1, 2]'`"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert directory.command(Path("r"), world=two) == "`fastdeit train --resume r --nproc 2`"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert directory.command(Path("r"), world=two) == "`fastdeit train --resume r` under the launcher of this run"


def test_a_file_is_set_aside_under_the_next_free_name():
    log = Path("metrics.jsonl")
    assert directory.set_aside(log) is None
    for number in (1, 2):
        log.write_text(str(number))
        assert directory.set_aside(log).name == f"metrics-{number}.jsonl"
    assert Path("metrics-1.jsonl").read_text() == "1"
    log.write_text("")
    assert directory.set_aside(log) is None


def test_a_disk_without_room_is_refused_before_a_directory_is_made(tmp_path, monkeypatch):
    usage = SimpleNamespace(free=4999)
    monkeypatch.setattr(directory.shutil, "disk_usage", lambda path: usage)
    directory.check_space(Path("a/b"), 1000, CPU, keep=2)
    with pytest.raises(UsageError, match=rf"^{tmp_path} has 5e-06 GB free, and 5 checkpoints of this run need"):
        directory.check_space(Path("a/b"), 1000, CPU, keep=3)
    for step in (1, 2):
        (tmp_path / "there" / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
    directory.check_space(Path("there"), 1000, CPU, keep=4)
