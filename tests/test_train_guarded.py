"""Runs that go wrong: nothing that is not finite, and nothing that the processes do not share, is ever saved."""

import json
import math
from pathlib import Path

import pytest
import torch

from fastdeit.engine import checkpoint, guard
from fastdeit.engine.dist import World
from fastdeit.errors import FastdeitError, Interrupted, NonFiniteError
from fastdeit.methods.supervised import Supervised
from fastdeit.recipe import resolve as recipes
from fastdeit.training import train
from tests.small_runs import StopAt, assert_same_weights, logged, stored, train_rank

RECIPE = """\
model: {name: "tests.small_runs:Tiny", image_size: 32}
method: {use: "tests.test_train_guarded:Faulty"}
data:
  {source: synthetic, synthetic_samples: 48, synthetic_classes: 4, flip: 0, mixup: 0, cutmix: 0, group_size: 4,
   repeats: 1, mean: [0.3, 0.4, 0.5], std: [0.2, 0.25, 0.3]}
optim: {lr: 1e-3, warmup_epochs: 0, ema_decay: 0.9}
train: {epochs: 2, batch_size: 4, eval_every: 2}
engine: {device: cpu, precision: fp32, checkpoint_every: 0.3333, log_every: 4, keep_checkpoints: 30}
"""
TOTAL, SAVE_EVERY = 24, 4
CPU = torch.device("cpu")


class Faulty(Supervised):
    """After the update of a step, counted from 1, it does `harm[step](method, engine)`; `grow[step]` multiplies the
    loss of a step."""

    harm, grow = {}, {}

    def forward(self, batch):
        out = super().forward(batch)
        if self.training:
            out.loss = out.loss * self.grow.get(int(batch.step.number) + 1, 1.0)
        return out

    def after_step(self, engine):
        self.harm.get(int(engine.now.number) + 1, lambda *_: None)(self, engine)


@pytest.fixture(autouse=True)
def sound(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Faulty, "harm", {})
    monkeypatch.setattr(Faulty, "grow", {})


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipes") / "small.yaml"
    path.write_text(RECIPE)
    return path


def go(path, run, *overrides, world=None, resume=False):
    return train(recipes.load(str(path), overrides), Path(run), world or World(CPU), resume=resume)


def saved_steps(run):
    return checkpoint.steps(Path(run) / "checkpoints")


def assert_all_finite(run):
    for step in saved_steps(run):
        for file, tensors in stored(Path(run), step).items():
            for name, tensor in tensors.items():
                assert tensor.isfinite().all(), f"step {step}: {name} of {file}"


# ---- what is not finite is not saved ---------------------------------------------------------------------------------


def poison(where):
    """Put a value that is not finite into one number of the weights, the average or the optimizer's state."""

    def harm(method, engine):
        value = math.nan if where in ("weights", "average") else math.inf
        tensor = {
            "weights": method.model.head.weight,
            "average": engine.ema.average["model.head.weight"],
            "moment": engine.optimizer.state["exp_avg_sq"]["model.head.weight"],
        }[where].data
        tensor.view(-1)[0] = value

    return harm


HOWS = "as it is stopped", "between two lines of the log", "at its end"
HARMS = [(where, how) for where in ("weights", "average", "moment") for how in HOWS]


@pytest.mark.parametrize(
    ("where", "how"), [HARMS[0], *(pytest.param(*harm, marks=pytest.mark.slow) for harm in HARMS[1:])]
)
def test_what_is_not_finite_is_never_saved_and_the_run_goes_on_from_before(path, monkeypatch, where, how):
    bad = {"between two lines of the log": 8, "as it is stopped": 7, "at its end": TOTAL}[how]
    overrides = ["engine.log_every=100"] if how != "at its end" else []
    monkeypatch.setattr(Faulty, "harm", {bad: poison(where)})
    world = StopAt(bad) if how == "as it is stopped" else None
    with pytest.raises(NonFiniteError) as stop:
        go(path, "run", *overrides, world=world)
    last = (bad - 1) // SAVE_EVERY * SAVE_EVERY
    assert f"stopped at step {bad}: " in str(stop.value)
    assert "head.weight" in str(stop.value)
    assert f"back at its checkpoint of step {last}; go on from there with `fastdeit train --resume run --trust`" in str(
        stop.value
    )
    assert saved_steps("run")[-1] == last
    assert_all_finite("run")
    monkeypatch.setattr(Faulty, "harm", {})
    go(path, "run", *overrides, resume=True)
    assert saved_steps("run")[-1] == TOTAL


@pytest.mark.slow
def test_a_mask_of_minus_infinity_is_no_harm(path, monkeypatch):
    """A buffer that was not finite when the run began, and stays so."""
    plain = Faulty.__init__

    def masked(self, *args, **options):
        plain(self, *args, **options)
        self.model.register_buffer("mask", torch.tensor([0.0, -math.inf]))
        self.register_buffer("best", torch.tensor(math.inf))

    monkeypatch.setattr(Faulty, "__init__", masked)
    with pytest.raises(Interrupted):
        go(path, "run", world=StopAt(2))
    assert saved_steps("run") == [2]


def test_the_loss_scale_of_a_run_in_fp16_comes_down_and_recovers(path, monkeypatch):
    """A loss of a million overflows the gradients of 16 bit, and no weight follows it."""
    monkeypatch.setattr(guard, "_GROW_AFTER", 6)
    monkeypatch.setattr(Faulty, "grow", {2: 1e6, 4: 1e6})
    go(path, "run", "engine.precision=fp16", "engine.checkpoint_every=0.0833")
    first = guard.Guard("fp16", None, CPU).scale.item()
    found = [stored(Path("run"), step)["engine.safetensors"] for step in (1, 3, 5, 9, 10, 16)]
    assert [each["scale"].item() / first for each in found] == [1, 1 / 2, 1 / 4, 1 / 4, 1 / 2, 1]
    assert [each["skipped"].item() for each in found] == [0, 1, 2, 2, 2, 2]
    assert_all_finite("run")


# ---- the log ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("log_every", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_a_skipped_step_is_not_in_the_logged_loss(path, monkeypatch, log_every):
    monkeypatch.setattr(Faulty, "grow", {3: math.nan, 7: math.inf})
    go(path, "run", f"engine.log_every={log_every}")
    lines = [line for line in logged(Path("run")) if line["kind"] == "train"]
    assert lines[-1]["skipped_steps"] == 2
    for line in lines:
        assert ("loss" not in line) == (log_every == 1 and line["step"] in (3, 7))
        assert all(math.isfinite(line.get(key, 0.0)) for key in ("loss", "grad_norm"))
    assert json.loads(Path("run/summary.json").read_text())["train_loss"] == lines[-1]["loss"]


# ---- spikes ----------------------------------------------------------------------------------------------------------

SPIKE_AT = 14


def test_a_spike_is_said_and_kept_skipped_or_taken_back(path, monkeypatch, capsys):
    go(path, "quiet")
    capsys.readouterr()
    monkeypatch.setattr(Faulty, "grow", {SPIKE_AT: 1000.0})
    found, last = {}, {}
    for policy in ("warn", "skip", "rollback"):
        go(path, policy, f"engine.on_spike={policy}")
        found[policy] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("spike")]
        last[policy] = [line for line in logged(Path(policy)) if line["kind"] == "train"][-1]
    text = f"spike: the gradients of step {SPIKE_AT} had a norm of more than 10 times the usual one; "
    assert found == {
        "warn": [f"{text}the update was made (engine.on_spike=skip leaves it out)"],
        "skip": [f"{text}the update was left out"],
        "rollback": [f"{text}the update was left out, and the run goes on from the weights of step 12"],
    }
    assert [line["spikes"] for line in last.values()] == [1, 1, 1]
    assert [line["skipped_steps"] for line in last.values()] == [0, 1, 1]
    # After the rollback the weights of step 16 are those of step 12.
    assert_models_equal(stored(Path("rollback"), 16), stored(Path("rollback"), 12))
    assert_models_equal(stored(Path("skip"), 12), stored(Path("quiet"), 12))


def assert_models_equal(mine, theirs):
    for file in ("model.safetensors", "ema.safetensors", "optim.safetensors"):
        assert all(torch.equal(tensor, theirs[file][name]) for name, tensor in mine[file].items()), file


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_run_with_a_spike_resumes_exactly(path, monkeypatch, policy):
    monkeypatch.setattr(Faulty, "grow", {SPIKE_AT: 1000.0})
    go(path, "whole", f"engine.on_spike={policy}")
    for stop in (SPIKE_AT - 1, SPIKE_AT, SPIKE_AT + 1):
        run = Path(f"stopped-{stop}")
        with pytest.raises(Interrupted):
            go(path, run, f"engine.on_spike={policy}", world=StopAt(stop))
        go(path, run, f"engine.on_spike={policy}", resume=True)
        if policy == "skip":  # a rollback is made before the next checkpoint, whenever that is
            assert_same_weights(run, Path("whole"), TOTAL)
            assert logged(run) == logged(Path("whole"))


@pytest.mark.slow
def test_a_rollback_without_a_checkpoint_leaves_the_step_out(path, monkeypatch, capsys):
    monkeypatch.setattr(Faulty, "grow", {10: 1000.0})
    go(path, "run", "engine.on_spike=rollback", "engine.checkpoint_every=9")
    assert "the update was left out, there is no checkpoint yet to go back to" in capsys.readouterr().out


# ---- replicas --------------------------------------------------------------------------------------------------------


def drift(rank, size, path, step, run):
    Faulty.harm = {step: lambda method, engine: method.model.head.bias.data.mul_(3.0).add_(1.0)} if rank == 1 else {}
    try:
        train_rank(rank, size, path, ["data.group_size=2"], Path(run))
    except FastdeitError as error:
        return error.exit_code, str(error), saved_steps(run)


@pytest.mark.slow
def test_weights_that_drift_apart_stop_the_run_on_every_process(path, ranks):
    for answer in ranks(2, drift, path, 6, Path("run").absolute()):
        code, text, steps = answer
        assert code == 1
        assert "stopped at step 8: the 2 processes do not have the same weights any more" in text
        assert "back at its checkpoint of step 4" in text
        assert steps == [4]
