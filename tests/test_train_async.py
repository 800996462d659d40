"""`engine.async_checkpoints`: the same checkpoints as those that are waited for, written beside the training."""

import os
import signal
import threading
import time

import pytest
import torch

from fastdeit.engine import checkpoint
from fastdeit.engine.background import HostCopies, Worker
from fastdeit.engine.checkpoint import CheckpointError
from fastdeit.engine.dist import World
from fastdeit.engine.step import Engine
from fastdeit.errors import FastdeitError, Interrupted
from fastdeit.methods.supervised import Supervised
from fastdeit.recipe import resolve as recipes
from fastdeit.training import train
from tests.small_runs import StopAt, assert_same_weights, logged, train_rank

RECIPE = """\
model: {name: "tests.small_runs:Tiny", image_size: 32}
method: {use: supervised}
data: {source: synthetic, synthetic_samples: 48, synthetic_classes: 2, group_size: 2, mixup: 0, cutmix: 0, repeats: 1}
optim: {lr: 1e-2, warmup_epochs: 0, ema_decay: 0.9}
train: {epochs: 2, batch_size: 8, eval_every: 1}
engine: {device: cpu, log_every: 1, checkpoint_every: 0.3333, keep_checkpoints: 9}
"""
TOTAL, SAVED = 12, [2, 4, 6, 8, 10, 12]
ASYNC = "engine.async_checkpoints=true"


def recipe(folder, *overrides):
    path = folder / "r.yaml"
    path.write_text(RECIPE)
    return recipes.load(str(path), overrides)


def run_of(folder, *overrides, world=None, **options):
    return train(recipe(folder, *overrides), folder / "run", world or World(torch.device("cpu")), **options)


@pytest.fixture(scope="module")
def waited_for(tmp_path_factory):
    folder = tmp_path_factory.mktemp("waited_for")
    run_of(folder)
    return folder / "run"


@pytest.fixture
def slow_disk(monkeypatch):
    """Each write lasts until the training has made two steps more, or is about to wait. What happened, in its order."""
    told, steps, save, step, join = [], [], checkpoint.save, Engine.step, Worker.join
    waiting = threading.Event()

    def count(engine, *args):
        step(engine, *args)
        steps.append(1)

    def late(root, number, *rest):
        before, here = len(steps), threading.current_thread() is not threading.main_thread()
        told.append(("begins", number))
        end = time.monotonic() + 60
        while here and len(steps) < before + 2 and not waiting.is_set():
            assert time.monotonic() < end, "the training does not go on while a checkpoint is written"
            time.sleep(0.001)
        told.append(("written", number, len(steps) - before))
        return save(root, number, *rest)

    def joined(worker):
        waiting.set()
        join(worker)
        waiting.clear()

    monkeypatch.setattr(Engine, "step", count)
    monkeypatch.setattr(checkpoint, "save", late)
    monkeypatch.setattr(Worker, "join", joined)
    return told


def same_run(run, other):
    for step in SAVED:
        assert_same_weights(run, other, step)
    assert logged(run) == logged(other)


def test_training_goes_on_and_the_checkpoints_are_those_of_their_steps(tmp_path, waited_for, slow_disk):
    run_of(tmp_path, ASYNC)
    begun = [event[1] for event in slow_disk if event[0] == "begins"]
    assert begun == SAVED
    # At most one at a time: each is written before the next begins, and steps were made meanwhile, but for the last.
    assert [event[0] for event in slow_disk] == ["begins", "written"] * len(SAVED)
    made = {event[1]: event[2] for event in slow_disk if event[0] == "written"}
    assert [made[step] for step in SAVED] == [2, 2, 2, 2, 2, 0]
    for step in SAVED:
        assert_same_weights(waited_for, tmp_path / "run", step)


def test_everything_else_is_as_with_checkpoints_that_are_waited_for(tmp_path, waited_for):
    run_of(tmp_path, ASYNC, "engine.keep_checkpoints=2")
    assert logged(tmp_path / "run") == logged(waited_for)
    ours, theirs = (checkpoint.newest_state(run / "checkpoints")["record"] for run in (tmp_path / "run", waited_for))
    assert ours["best_step"] == theirs["best_step"]
    kept = {*SAVED[-2:], theirs["best_step"]}
    assert set(checkpoint.steps(tmp_path / "run" / "checkpoints")) == kept


def test_a_run_that_is_stopped_waits_for_what_is_being_written(tmp_path, waited_for, slow_disk):
    with pytest.raises(Interrupted):
        run_of(tmp_path, ASYNC, world=StopAt(5))
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [2, 4, 5]
    assert [event[0] for event in slow_disk] == ["begins", "written"] * 3
    run_of(tmp_path, ASYNC, resume=True)
    for step in (4, *SAVED[2:]):
        assert_same_weights(waited_for, tmp_path / "run", step)


def test_a_second_ctrl_c_waits_for_nothing(tmp_path, monkeypatch):
    """It raises KeyboardInterrupt (`World.stop_on_signals`); here that comes while a checkpoint is being written."""
    save, writers, goes_on = checkpoint.save, [], threading.Event()

    def stuck(root, number, *rest):
        if number == 4:
            writers.append(threading.current_thread())
            os.kill(os.getpid(), signal.SIGINT)
            goes_on.wait(60)
        return save(root, number, *rest)

    monkeypatch.setattr(checkpoint, "save", stuck)
    try:
        with pytest.raises(FastdeitError, match="stopped at once, without saving; go on with"):
            run_of(tmp_path, ASYNC)
        assert [writer.is_alive() for writer in writers] == [True]
        assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [2]
    finally:
        goes_on.set()
        for writer in writers:
            writer.join()


class Fails(Supervised):
    def forward(self, batch):
        if self.training and int(batch.step.number) == 5:
            raise ValueError("no step 5")
        return super().forward(batch)


def test_a_run_that_fails_waits_too(tmp_path, waited_for, slow_disk):
    with pytest.raises(ValueError, match="no step 5"):
        run_of(tmp_path, ASYNC, "method.use=tests.test_train_async:Fails")
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [2, 4]
    checkpoint.load(checkpoint.path_of(tmp_path / "run" / "checkpoints", 4))


def test_what_cannot_be_written_is_said_also_when_the_run_fails(tmp_path, monkeypatch, capsys):
    def refuse(root, step, *rest):
        raise CheckpointError(f"the checkpoint of step {step} was not saved")

    monkeypatch.setattr(checkpoint, "save", refuse)
    with pytest.raises(ValueError, match="no step 5"):
        run_of(
            tmp_path,
            ASYNC,
            "engine.log_every=100",
            "engine.checkpoint_every=0.8",
            "method.use=tests.test_train_async:Fails",
        )
    assert "warning: the checkpoint of step 5 was not saved" in capsys.readouterr().out


@pytest.mark.slow
def test_two_processes_write_the_same(tmp_path, waited_for, ranks):
    recipe(tmp_path)
    ranks(2, train_rank, tmp_path / "r.yaml", (), tmp_path / "plain")
    ranks(2, train_rank, tmp_path / "r.yaml", (ASYNC,), tmp_path / "beside")
    same_run(tmp_path / "beside", tmp_path / "plain")


# ---- the parts -------------------------------------------------------------------------------------------------------


def test_copies_are_dense_and_use_their_memory_again():
    copies, value = HostCopies(), torch.arange(6.0).reshape(2, 3)
    files = {"a": {"x": value.t(), "n": torch.tensor(3)}, "b": {"x": value.bfloat16()}}
    first = copies.of(files)
    assert torch.equal(first["a"]["x"], value.t())
    assert first["a"]["x"].is_contiguous()
    assert first["b"]["x"].dtype == torch.bfloat16
    place = first["a"]["x"].data_ptr()
    value += 1
    assert first["a"]["x"][0, 0] == 0, "the copy follows its source"
    second = copies.of({"a": {"x": value.t(), "n": torch.zeros(2)}})
    assert second["a"]["x"].data_ptr() == place
    assert torch.equal(second["a"]["x"], value.t())
    assert second["a"]["n"].shape == (2,)
    assert copies.of({"a": {"x": "no tensor"}}) == {"a": {"x": "no tensor"}}


def test_an_error_of_the_work_is_told_once_and_work_never_overlaps():
    worker, order = Worker(), []

    def work():
        order.append("begins")
        time.sleep(0.05)
        order.append("ends")

    worker.begin(work)
    assert not worker.done
    worker.begin(work)
    worker.result()
    assert worker.done
    assert order == ["begins", "ends"] * 2

    def fail():
        raise CheckpointError("full")

    worker.begin(fail)
    with pytest.raises(CheckpointError, match="full"):
        worker.result()
    worker.result()
