"""A method in two phases through the whole loop: what is trained when, and that it resumes and shares out exactly."""

from dataclasses import replace

import pytest
import torch

from fastdeit.engine.dist import World
from fastdeit.errors import Interrupted, UsageError
from fastdeit.methods.base import Phase
from fastdeit.methods.supervised import Supervised
from fastdeit.recipe import resolve as recipes
from fastdeit.run import build
from fastdeit.training import train
from tests.small_runs import StopAt, assert_same_weights, logged, stored, train_rank

RECIPE = """\
model: {name: deit_digits_patch8_32, image_size: 32}
method: {use: "tests.test_train_phases:HeadFirst"}
data:
  {source: folder, flip: 0.0, group_size: 16, repeats: 1, eval_crop_ratio: 1.0, threads: 1,
   mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}
optim: {lr: 1e-3, warmup_epochs: 0.5, min_lr: 1e-5, ema_decay: 0.9}
train: {epochs: 2, batch_size: 64, eval_every: 2}
engine: {device: cpu, log_every: 2}
"""
STEPS_PER_EPOCH, TOTAL = 6, 12


class HeadFirst(Supervised):
    """The head alone for an epoch, then everything."""

    def __init__(self, model, config, context):
        super().__init__(model, config, context)
        self.begun = []

    def phases(self):
        return Phase("head", until=1, trains=["model.head"]), Phase("all")

    def on_phase(self, phase):
        self.begun.append(phase.name)


class OwnPart(HeadFirst):
    """Each phase has a part of the loss that the other has not: twice the loss, under the name of the phase."""

    def forward(self, batch):
        out = super().forward(batch)
        return replace(out, parts={self.begun[-1]: 2 * out.loss})


class TooLong(HeadFirst):
    def phases(self):
        return Phase("head", until=2, trains=["model.head"]), Phase("all")


@pytest.fixture(scope="module")
def path(few_digits, tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "phases.yaml"
    path.write_text(RECIPE.replace("source: folder", f'source: folder, root: "{few_digits}"'))
    return path


@pytest.fixture(scope="module")
def load(path):
    return lambda *overrides: recipes.load(str(path), overrides)


@pytest.fixture(scope="module")
def whole(load, tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    train(load(), run, World(torch.device("cpu")), resume=False)
    return run


def test_a_phase_trains_its_own_and_leaves_the_rest(load, whole, tmp_path):
    with pytest.raises(Interrupted):
        train(load(), tmp_path / "run", StopAt(STEPS_PER_EPOCH), resume=False)
    after_first, at_end = stored(tmp_path / "run", STEPS_PER_EPOCH), stored(whole, TOTAL)
    initial = build.model(load(), 10, print).state_dict()
    for name, tensor in after_first["model.safetensors"].items():
        assert torch.equal(tensor, initial[name]) is not name.startswith("head."), name
        assert not torch.equal(at_end["model.safetensors"][name], tensor), name
    assert {n for n in after_first["optim.safetensors"] if n.startswith("exp_avg.")} == {
        "exp_avg.model.head.weight",
        "exp_avg.model.head.bias",
    }


@pytest.mark.parametrize(
    "stop",
    [
        pytest.param(3, marks=pytest.mark.slow),
        STEPS_PER_EPOCH,
        pytest.param(STEPS_PER_EPOCH + 2, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_goes_on_in_its_phase(load, whole, tmp_path, stop):
    with pytest.raises(Interrupted):
        train(load(), tmp_path / "run", StopAt(stop), resume=False)
    train(load(), tmp_path / "run", World(torch.device("cpu")), resume=True)
    assert_same_weights(whole, tmp_path / "run", TOTAL)
    assert logged(whole) == logged(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("stop", [STEPS_PER_EPOCH, None, 7])
def test_a_line_of_the_log_has_the_parts_of_its_phase_alone(load, tmp_path, stop):
    """Also where the phase ends between two lines, and where the run is interrupted there."""
    asked = load("method.use=tests.test_train_phases:OwnPart", "engine.log_every=4")
    if stop is not None:
        with pytest.raises(Interrupted):
            train(asked, tmp_path / "run", StopAt(stop), resume=False)
    train(asked, tmp_path / "run", World(torch.device("cpu")), resume=stop is not None)
    lines = [line for line in logged(tmp_path / "run") if line["kind"] == "train"]
    assert [line["step"] for line in lines] == [4, 6, 8, 12]
    for line, (own, other) in zip(lines, [("head", "all")] * 2 + [("all", "head")] * 2, strict=True):
        assert other not in line
        assert line[own] == pytest.approx(2 * line["loss"], rel=1e-6)


@pytest.mark.slow
def test_two_processes_reach_the_result_of_one(path, whole, ranks, tmp_path):
    ranks(2, train_rank, path, [], tmp_path / "run")
    one, two = (stored(run, TOTAL)["model.safetensors"] for run in (whole, tmp_path / "run"))
    difference = sum((one[n] - two[n]).abs().sum() for n in one) / sum(t.numel() for t in one.values())
    assert difference < 2e-4


def test_phases_that_do_not_fit_the_run_are_refused(load, tmp_path):
    with pytest.raises(UsageError, match=r"TooLong: phase 'head' ends at epoch 2, but must end .* before the end"):
        train(
            load("method.use=tests.test_train_phases:TooLong"),
            tmp_path / "run",
            World(torch.device("cpu")),
            resume=False,
        )
