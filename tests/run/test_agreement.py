"""All processes go on with the same run, or none does: who sees another run, other versions, or fails alone."""

import os
import shutil
import threading
from concurrent.futures import thread as futures
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastdeit.engine import checkpoint
from fastdeit.engine.checkpoint import CheckpointError
from fastdeit.engine.dist import World
from fastdeit.errors import FastdeitError, Interrupted, UsageError
from fastdeit.recipe import resolve as recipes
from fastdeit.run import agreement, environment
from fastdeit.run.parts import Parts
from fastdeit.training import train
from tests.small_runs import StopAt

CPU = torch.device("cpu")
RECIPE_HERE = recipes.load("deit_tiny")


class Two(World):
    """Process 0 of two; what process 1 has is `theirs(what process 0 has)`."""

    def __init__(self, theirs):
        super().__init__(CPU, 0, 2)
        self.theirs = theirs

    def all(self, value):
        return [value, self.theirs(value)]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def saved(run, *steps, value=1.0):
    for step in steps:
        checkpoint.save(Path(run) / "checkpoints", step, {"model": {"w": torch.full((4,), value)}}, {})
    return Path(run)


def without(run):
    shutil.rmtree(run)


def older(run):
    shutil.rmtree(run / "checkpoints" / "step_00000004")


def another(run):
    shutil.rmtree(run)
    saved(run, 2, 4, value=2.0)


def damaged(run):
    (run / "checkpoints" / "step_00000004" / "manifest.json").write_text("{")


def with_a_teacher(run):
    saved(run / "teacher", 1)


def other_versions(run):
    environment.versions = lambda: {"torch": "1.0"}


SEEN = {
    without: "the checkpoints of run: none there, and 2 ",
    older: "the checkpoints of run: 2 ",
    another: "the checkpoints of run: 2 ",
    damaged: "the checkpoints of run: 2 ",
    with_a_teacher: "the checkpoints of run/teacher: 1 ",
    other_versions: "the versions of what they run: torch 1.0, and fastdeit ",
}


@pytest.mark.parametrize("change", SEEN, ids=lambda change: change.__name__)
def test_a_process_that_sees_another_run_ends_the_start_in_a_sentence(here, monkeypatch, change):
    run = saved("run", 2, 4)
    monkeypatch.setattr(environment, "versions", lambda: {"fastdeit": "1", "torch": "2.0"})

    def theirs(value):
        change(run)
        return "other-host", value[1] | agreement._view(run, None)

    with pytest.raises(UsageError, match=r"process 1 on other-host and process 0 on \S+ differ in ") as error:
        agreement.same_view(Two(theirs), RECIPE_HERE, run, None)
    assert SEEN[change] in str(error.value)
    assert "nothing was loaded, " in str(error.value)
    assert "\n" not in str(error.value)


def test_processes_that_see_the_same_go_on(here):
    agreement.same_view(Two(lambda value: value), RECIPE_HERE, saved("run", 2, 4), None)
    agreement.same_view(Two(lambda value: value), RECIPE_HERE, None, None)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        (
            "data.flip=0.25",
            r"data\.flip: 0\.25, and 0\.5; .*, give all processes the same recipe and the same command$",
        ),
        ("engine.log_every=7", r"engine\.log_every: 7, and "),
        ("method.smoothing=0.3", r"method\.smoothing: 0\.3, and "),
    ],
)
def test_processes_with_other_recipes_do_not_train_together(here, override, told):
    theirs = recipes.fields(recipes.load("deit_tiny", [override]))
    with pytest.raises(UsageError, match=f"^process 1 on there and process 0 on .* differ in {told}"):
        agreement.same_view(Two(lambda mine: ("there", mine[1] | theirs)), RECIPE_HERE, None, None)


def other(what, mine):
    """The view of a process for which `what` is "c"."""
    host, view = mine
    return host, view | {name: "c" for name in view if name.startswith(what)}


def test_the_place_of_the_data_may_differ_and_the_data_may_not(here):
    moved = recipes.fields(recipes.load("deit_tiny", ["data.threads=1", "data.root=elsewhere"]))
    agreement.same_view(Two(lambda mine: ("there", mine[1] | moved)), RECIPE_HERE, None, None)
    ours = {"train": "a", "val": "b", "classes": ["cat"]}
    agreement.same_data(Two(lambda mine: mine), ours)
    for what in ("the training images", "the held-out images", "the names of the classes", "the teacher's cached"):
        with pytest.raises(UsageError, match=f'differ in {what}.*: "c", and .*, all machines must have the same data$'):
            agreement.same_data(Two(partial(other, what)), ours)


def test_other_data_are_told_before_what_follows_from_them_fails_on_one_process_alone():
    """One that has fewer images ended by itself, and the others said that the connection was lost."""
    recipe = recipes.load("deit_tiny", ["data.source=synthetic", "data.synthetic_samples=2", "data.repeats=3"])
    world = Two(lambda mine: other("the training images", mine) if isinstance(mine, tuple) else mine)
    with pytest.raises(UsageError, match="differ in the training images"):
        Parts.of(recipe, world, True, {})


def test_a_fork_begins_with_one_checkpoint(here):
    origin = SimpleNamespace(path=saved("run", 2, 4) / "checkpoints" / "step_00000004")

    def theirs(value):
        another(Path("run"))
        return "other-host", value[1] | agreement._view(None, origin)

    with pytest.raises(UsageError, match="differ in the checkpoint run/checkpoints/step_00000004: "):
        agreement.same_view(Two(theirs), RECIPE_HERE, None, origin)


def test_a_checkpoint_that_one_machine_finds_damaged_is_used_by_none(here):
    root, said = saved("run", 2, 4) / "checkpoints", []
    whys = iter(["hash differs", None])
    assert agreement.newest(Two(lambda why: next(whys)), root, said.append).step == 2
    assert said == ["checkpoint run/checkpoints/step_00000004 is damaged (hash differs); skipped"]
    with pytest.raises(CheckpointError, match="none of the 2 checkpoints in run/checkpoints can be used"):
        agreement.newest(Two(lambda why: "gone"), root, said.append)


@pytest.mark.parametrize("local_rank", [0, 1])
def test_one_process_a_machine_reads_the_files(here, monkeypatch, local_rank):
    root = saved("run", 2, 4) / "checkpoints"
    file = root / "step_00000004" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    two = Two(lambda why: None)
    assert agreement.newest(two, root, lambda text: None).step == (2 if local_rank == 0 else 4)
    assert agreement.newest(World(CPU), root, lambda text: None).step == 2, "a process alone relies on nobody"


def with_a_flipped_bit(run):
    file = run / "checkpoints" / "step_00000004" / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def exchanged(run):
    another(run)
    with_a_flipped_bit(run)


@pytest.mark.parametrize(
    ("before", "after", "step", "hashed"),
    [
        ((), (), 4, []),
        ((with_a_flipped_bit,), (), 2, [4, 2]),
        ((), (exchanged,), 2, [4, 2]),
        ((), (lambda run: saved(run, 6),), 6, [6]),
    ],
    ids=["sound", "damaged", "exchanged", "newer"],
)
def test_what_was_verified_ahead_is_not_read_again(here, monkeypatch, before, after, step, hashed):
    run, read, hash_file = saved("run", 2, 4), [], checkpoint._hash_file
    for change in before:
        change(run)
    ahead = agreement.Ahead(World(CPU), run / "checkpoints")
    ahead.holds(run)  # which waits
    for change in after:
        change(run)
    monkeypatch.setattr(
        checkpoint, "_hash_file", lambda path, form: read.append(int(path.parent.name[5:])) or hash_file(path, form)
    )
    assert agreement.newest(World(CPU), run / "checkpoints", lambda text: None, ahead).step == step
    assert read == hashed


def test_a_start_that_fails_meanwhile_leaves_no_traceback_of_the_thread(here, monkeypatch):
    def shut_down(*of):
        raise RuntimeError("cannot schedule new futures after interpreter shutdown")

    root, told = saved("run", 2) / "checkpoints", []
    monkeypatch.setattr(checkpoint, "_check_hashes", shut_down)
    monkeypatch.setattr(threading, "excepthook", told.append)
    assert not agreement.Ahead(World(CPU), root).holds(checkpoint.path_of(root, 2))
    assert told == []


def test_a_start_that_fails_meanwhile_waits_for_no_hash_at_its_exit(here, monkeypatch):
    """The interpreter joins what is no daemon, and the threads of every executor."""
    root, free, begun = saved("run", 2) / "checkpoints", threading.Event(), threading.Event()
    monkeypatch.setattr(checkpoint, "_hash_file", lambda *of: (begun.set(), free.wait(60)))
    before, pooled = set(threading.enumerate()), set(futures._threads_queues)
    ahead = agreement.Ahead(World(CPU), root)
    assert begun.wait(60)
    hashing = set(threading.enumerate()) - before
    assert len(hashing) > 1
    assert all(thread.daemon for thread in hashing)
    assert set(futures._threads_queues) == pooled
    free.set()
    ahead.holds(checkpoint.path_of(root, 2))  # which waits


@pytest.mark.parametrize("error", [UsageError("no room"), OSError("no room")])
def test_what_fails_on_one_process_fails_on_all(error):
    def fail():
        raise error

    with pytest.raises(type(error), match="no room"):
        agreement.together(Two(lambda told: told), fail)
    named = "no room" if isinstance(error, UsageError) else "OSError: no room"
    with pytest.raises(UsageError, match=f"^process 1: {named}$"):
        agreement.together(Two(lambda told: named), lambda: 3)
    assert agreement.together(Two(lambda told: told), lambda: 3) == 3


# ---- whole runs ------------------------------------------------------------------------------------------------------

RECIPE = """\
model: {name: "tests.small_runs:Tiny", image_size: 32}
method: {use: supervised}
data:
  {source: synthetic, synthetic_samples: 24, synthetic_classes: 4, flip: 0, mixup: 0, cutmix: 0, group_size: 4,
   repeats: 1, mean: [0.3, 0.4, 0.5], std: [0.2, 0.25, 0.3]}
optim: {lr: 1e-3, warmup_epochs: 0}
train: {epochs: 2, batch_size: 8, eval_every: 2}
engine: {device: cpu, precision: fp32, checkpoint_every: 0.6667, log_every: 100, keep_checkpoints: 9}
"""
TOTAL = 6


def go_on(rank, size, recipe, run, changes):
    """Each process has its own copy of the run, of which process 1 has changed its own before it goes on."""
    answers = []
    os.environ["LOCAL_RANK"] = "0"  # as on a machine of its own
    for number, change in enumerate(changes):
        own = Path(f"{run}-{number}-{rank}")
        shutil.copytree(run, own)
        known = environment.versions
        if rank == 1 and change is not None:
            change(own)
        try:
            linked = Path(f"{run}-{number}-{rank}-machine") / "run"
            linked.parent.mkdir()
            linked.symlink_to(own)
            os.chdir(linked.parent)
            train(recipes.load(str(recipe)), Path("run"), World(CPU, rank, size), resume=True)
            answers.append((0, "", checkpoint.steps(own / "checkpoints")))
        except FastdeitError as error:
            answers.append((error.exit_code, str(error), checkpoint.steps(own / "checkpoints")))
        environment.versions = known
    return answers


def flipped(run):
    file = run / "checkpoints" / "step_00000004" / "optim.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.slow
def test_two_processes_go_on_together_or_not_at_all(here, ranks):
    recipe = here / "small.yaml"
    recipe.write_text(RECIPE)
    with pytest.raises(Interrupted):
        train(recipes.load(str(recipe)), here / "run", StopAt(5))
    older = here / "run" / "checkpoints" / "step_00000005"
    shutil.rmtree(older)
    assert checkpoint.steps(here / "run" / "checkpoints") == [2, 4]
    changes = [None, without, damaged, other_versions, flipped]
    first, second = ranks(2, go_on, recipe, here / "run", changes)
    assert [code for code, _, _ in first] == [code for code, _, _ in second] == [0, 2, 2, 2, 0]
    for number in (1, 2, 3):
        assert first[number][1] == second[number][1]
        assert first[number][2] == [2, 4]
    assert first[0][2] == first[4][2] == [2, 4, TOTAL]
