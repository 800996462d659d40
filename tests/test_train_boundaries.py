"""Boundaries of phases under averaged weights, micro-batches, two processes and a resume; a phase that thaws again."""

import pytest
import torch

from fastdeit.engine.dist import World
from fastdeit.errors import Interrupted, UsageError
from fastdeit.methods.base import Phase
from fastdeit.methods.supervised import Supervised
from fastdeit.recipe import resolve as recipes
from fastdeit.training import train
from tests.small_runs import StopAt, assert_same_weights, logged, stored, train_rank

RECIPE = """\
model: {name: convnet_digits, image_size: 32}
method: {use: "tests.test_train_boundaries:Thaws"}
data: {source: synthetic, synthetic_samples: 48, synthetic_classes: 4, group_size: 4, repeats: 1, threads: 1}
optim: {lr: 1e-2, warmup_epochs: 0, ema_decay: 0.5}
train: {epochs: 3, batch_size: 16, accumulate: 2}
engine: {device: cpu, log_every: 1, checkpoint_every: 1}
"""
STEPS_PER_EPOCH, TOTAL = 3, 9


class Thaws(Supervised):
    """Everything for an epoch, the head alone for an epoch, everything again."""

    def __init__(self, model, config, context):
        super().__init__(model, config, context)
        self.calls = []
        Thaws.last = self

    def phases(self):
        return Phase("all", 1), Phase("head", 2, ["model.head"]), Phase("all again")

    def on_phase(self, phase):
        self.calls.append(phase.name)

    def on_epoch(self, epoch, engine):
        self.calls.append(epoch)

    def predict(self, x):
        if self.calls[-1] != "evaluated":
            self.calls.append("evaluated")
        return super().predict(x)


class Renamed(Thaws):
    def phases(self):
        return Phase("all", 1), Phase("top", 2, ["model.head"]), Phase("all again")


class Wider(Thaws):
    """Trains more in a phase of the same name."""

    def phases(self):
        return Phase("all", 1), Phase("head", 2), Phase("all again")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "boundaries.yaml"
    path.write_text(RECIPE)
    return path


def run(path, folder, world=None, resume=False, *overrides):
    train(recipes.load(str(path), overrides), folder, world or World(torch.device("cpu")), resume=resume)
    return Thaws.last


@pytest.fixture(scope="module")
def whole(path, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, run(path, folder).calls


def test_a_phase_begins_after_the_evaluation_and_before_the_epoch(whole):
    epochs = ["all", 0, "evaluated"], ["head", 1, "evaluated"], ["all again", 2, "evaluated"]
    assert whole[1] == [call for epoch in epochs for call in epoch]


@pytest.mark.slow
@pytest.mark.parametrize("stop", [STEPS_PER_EPOCH, STEPS_PER_EPOCH + 1, 2 * STEPS_PER_EPOCH])
def test_a_run_resumes_exactly_around_boundaries(path, whole, tmp_path, stop):
    with pytest.raises(Interrupted):
        run(path, tmp_path / "run", StopAt(stop))
    run(path, tmp_path / "run", None, True)
    assert_same_weights(whole[0], tmp_path / "run", TOTAL)
    assert logged(whole[0]) == logged(tmp_path / "run")


@pytest.mark.slow
def test_what_stands_still_does_so_with_its_average_and_starts_anew(path, tmp_path):
    folder = tmp_path / "run"
    run(path, folder, None, False, "engine.keep_checkpoints=9")
    first, second, third = (stored(folder, number * STEPS_PER_EPOCH) for number in (1, 2, 3))
    for kind in ("model.safetensors", "ema.safetensors"):
        for name, tensor in first[kind].items():
            if name.endswith(("weight", "bias")):
                assert torch.equal(tensor, second[kind][name]) is ("head" not in name), (kind, name)
                assert not torch.equal(tensor, third[kind][name]), (kind, name)
    counts = {name: tensor.item() for name, tensor in third["optim.safetensors"].items() if name.startswith("step.")}
    assert {"head" in name: count for name, count in counts.items()} == {True: TOTAL, False: STEPS_PER_EPOCH}


@pytest.mark.slow
def test_two_processes_equal_one_over_boundaries(path, whole, ranks, tmp_path):
    ranks(2, train_rank, path, [], tmp_path / "run")
    for kind in ("model.safetensors", "ema.safetensors"):
        one, two = (stored(folder, TOTAL)[kind] for folder in (whole[0], tmp_path / "run"))
        difference = sum((one[n] - two[n]).abs().sum() for n in one) / sum(t.numel() for t in one.values())
        assert difference < 1e-3, kind


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("Renamed", "the checkpoint was saved in phase 'head', but the method has no phase of that name"),
        (
            "Wider",
            r"step_00000004 does not fit, in phase 'head': of optim, ",
        ),
    ],
)
def test_other_phases_than_the_run_began_with_are_refused(path, tmp_path, monkeypatch, method, words):
    with pytest.raises(Interrupted):
        run(path, tmp_path / "run", StopAt(STEPS_PER_EPOCH + 1))
    monkeypatch.setattr(Thaws, "phases", globals()[method].phases)
    with pytest.raises(UsageError, match=words):
        run(path, tmp_path / "run", None, True)
