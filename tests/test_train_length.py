"""Runs of a length in steps, evaluations between epochs, runs that end early; each also after an interruption."""

import json

import pytest
import torch

from fastdeit.engine.dist import World
from fastdeit.errors import Interrupted, UsageError
from fastdeit.methods.supervised import Supervised
from fastdeit.recipe import resolve as recipes
from fastdeit.training import train
from tests.small_runs import StopAt, assert_same_weights

RECIPE = """\
model: {name: deit_digits_patch8_32, image_size: 32}
method: {use: "tests.test_train_length:Scripted"}
data: {source: synthetic, synthetic_samples: 64, synthetic_classes: 4, group_size: 4, repeats: 1, threads: 1}
optim: {lr: 1e-3, warmup_epochs: 0, ema_decay: null}
train: {steps: 10, batch_size: 16}
engine: {device: cpu, checkpoint_every: 10}
"""


SCORES = {2: 1.0, 6: 2.0}
"""By step; 0 after any other."""


class Told:
    lower_is_better = False

    def __init__(self, method):
        self.method = method

    def __call__(self, evaluation):
        return {"score": SCORES.get(self.method.step_number.item(), 0.0)}


class Scripted(Supervised):
    """Its scores are known beforehand."""

    def __init__(self, model, config, context):
        super().__init__(model, config, context)
        self.register_buffer("step_number", torch.zeros((), dtype=torch.int64))

    def after_step(self, engine):
        self.step_number.copy_(engine.now.number + 1)

    def evaluators(self):
        return {"told": Told(self)}


class Unjudged(Scripted):
    def evaluators(self):
        return {}


def run(folder, *overrides, world=None, resume=False, name="run"):
    path = folder / "r.yaml"
    path.write_text(RECIPE)
    return train(recipes.load(str(path), overrides), folder / name, world or World(torch.device("cpu")), resume=resume)


def evaluated(folder, name="run"):
    records = map(json.loads, (folder / name / "metrics.jsonl").read_text().splitlines())
    return [record["step"] for record in records if record["kind"] == "eval"]


@pytest.mark.parametrize(
    ("overrides", "steps"), [(["train.steps=5"], [4, 5]), (["train.steps=7", "train.eval_every_steps=3"], [3, 6, 7])]
)
def test_evaluations_of_a_run_in_steps(tmp_path, overrides, steps):
    summary = run(tmp_path, *overrides)
    assert evaluated(tmp_path) == steps
    assert (summary["step"], summary["epochs"]) == (steps[-1], steps[-1] / 4)
    checkpoints = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert checkpoints[-1] == f"step_{steps[-1]:08d}"


def test_a_run_ends_early_without_a_new_best_and_stays_ended(tmp_path, capsys):
    """The best is after step 6: one evaluation before it was no better, and then two."""
    early = "train.steps=12", "train.eval_every_steps=2", "train.stop_after=2"
    summary = run(tmp_path, *early)
    assert evaluated(tmp_path) == [2, 4, 6, 8, 10]
    assert (summary["step"], summary["best_step"]) == (10, 6)
    assert "stopped at step 10: 2 evaluations in a row brought no new best" in capsys.readouterr().out
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step_00000006", "step_00000010"]
    assert run(tmp_path, *early, resume=True)["step"] == 10
    assert evaluated(tmp_path) == [2, 4, 6, 8, 10]


@pytest.mark.slow
def test_the_count_of_evaluations_outlives_an_interruption(tmp_path):
    early = "train.steps=12", "train.eval_every_steps=2", "train.stop_after=2"
    run(tmp_path, *early, name="whole")
    with pytest.raises(Interrupted):
        run(tmp_path, *early, world=StopAt(9))
    run(tmp_path, *early, resume=True)
    assert evaluated(tmp_path) == [2, 4, 6, 8, 10]
    assert_same_weights(tmp_path / "run", tmp_path / "whole", 10)


def test_a_run_that_nothing_judges_cannot_end_early(tmp_path):
    with pytest.raises(UsageError, match=r"train\.stop_after needs a metric, but method .*Unjudged has none"):
        run(tmp_path, "method.use=tests.test_train_length:Unjudged", "train.stop_after=2")


def test_a_warm_up_as_long_as_the_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"optim.warmup_epochs is 3.0, but the run has 10 steps, 2.5 epochs"):
        run(tmp_path, "optim.warmup_epochs=3")
    assert not (tmp_path / "run").exists()
