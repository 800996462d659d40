"""The best step of a run: by which metric it is chosen, and that it is on the disk and in the record."""

import pytest
import torch

from fastdeit.cli import main as cli
from fastdeit.engine import checkpoint
from fastdeit.engine.dist import World
from fastdeit.errors import Interrupted, UsageError
from fastdeit.methods.base import Phase
from fastdeit.methods.evaluators import HeldOutLoss
from fastdeit.methods.supervised import Supervised
from fastdeit.recipe import resolve as recipes
from fastdeit.training import train
from tests.small_runs import StopAt

RECIPE = """\
model: {name: deit_digits_patch8_32, image_size: 32}
method: {use: "tests.test_train_best:Scripted"}
data: {source: synthetic, synthetic_samples: 32, synthetic_classes: 4, group_size: 4, repeats: 1, threads: 1}
optim: {lr: 1e-3, warmup_epochs: 0, ema_decay: null}
train: {epochs: 4, batch_size: 16}
engine: {device: cpu, checkpoint_every: 10}
"""
STEPS_PER_EPOCH = 2
NAN = float("nan")
VALUES = {"high": [1.0, 3.0, 2.0, 0.0], "late": [NAN, 1.0, 5.0, NAN]}
LOW = {"low": [4.0, 1.0, 2.0, 3.0]}


class Told:
    """Metrics that are known beforehand: of each a value an epoch."""

    def __init__(self, method, values, lower_is_better):
        self.method, self.values, self.lower_is_better = method, values, lower_is_better

    def __call__(self, evaluation):
        return {name: values[self.method.epoch] for name, values in self.values.items()}


class Scripted(Supervised):
    epoch, steps = 0, 0

    def step(self, batch, engine):
        Scripted.steps += 1
        super().step(batch, engine)

    def on_epoch(self, epoch, engine):
        self.epoch = epoch

    def evaluators(self):
        return {"high": Told(self, VALUES, False), "low": Told(self, LOW, True)}


class Unjudged(Scripted):
    def evaluators(self):
        return {}


class Spare(Scripted):
    def __init__(self, *parts):
        super().__init__(*parts)
        self.spare = torch.nn.Parameter(torch.zeros(3))


class Silent(Scripted):
    """Logs no loss."""

    def step(self, batch, engine):
        with engine.micro():
            engine.backward(engine.run(batch, log=False).loss)


class InTwoPhases(Supervised):
    """Its loss, by which it is judged, is another in the second phase, and grows through the run; of its state a part
    has a row a step."""

    def __init__(self, model, config, context):
        super().__init__(model, config, context)
        self.register_buffer("table", torch.ones(context.steps))

    def phases(self):
        return Phase("first", until=1), Phase("second")

    def on_phase(self, phase):
        self.factor = 10.0 if phase.name == "second" else 1.0

    def forward(self, batch):
        out = super().forward(batch)
        out.loss = self.factor * out.loss * (1 + batch.step.progress)
        out.parts["progress"] = batch.step.progress
        return out

    def evaluators(self):
        return {"loss": HeldOutLoss()}


def run(folder, *overrides, world=None, resume=False):
    path = folder / "best.yaml"
    path.write_text(RECIPE)
    return train(recipes.load(str(path), overrides), folder / "run", world or World(torch.device("cpu")), resume=resume)


EXPECTED = {
    "null": ("high", 3.0, 2),
    "high": ("high", 3.0, 2),
    "low": ("low", 1.0, 2),
    "late": ("late", 5.0, 3),  # nothing would be better than the first value, which is not a number
}


@pytest.mark.parametrize("best_by", EXPECTED)
def test_the_best_step_is_chosen_by_its_metric_and_kept(tmp_path, best_by):
    summary = run(tmp_path, f"train.best_by={best_by}")
    name, value, epoch = EXPECTED[best_by]
    assert (summary["best_by"], summary["best"], summary["best_step"]) == (name, value, epoch * STEPS_PER_EPOCH)
    assert epoch * STEPS_PER_EPOCH in checkpoint.steps(tmp_path / "run" / "checkpoints")


def test_the_best_step_is_that_of_the_whole_run_after_a_resume(tmp_path):
    with pytest.raises(Interrupted):
        run(tmp_path, "train.best_by=low", world=StopAt(3 * STEPS_PER_EPOCH - 1))
    summary = run(tmp_path, "train.best_by=low", resume=True)
    assert (summary["best_by"], summary["best"], summary["best_step"]) == ("low", 1.0, 2 * STEPS_PER_EPOCH)
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [4, 5, 8]


@pytest.mark.parametrize("ema", ["null", "0.5"])
def test_an_average_may_be_what_the_best_is_chosen_by(tmp_path, ema):
    overrides = "train.best_by=low_ema", f"optim.ema_decay={ema}"
    if ema == "null":
        with pytest.raises(UsageError, match=r"best_by low_ema is no metric of this run, which has high, late, low$"):
            run(tmp_path, *overrides)
    else:
        assert run(tmp_path, *overrides)["best_by"] == "low_ema"


@pytest.mark.parametrize(("method", "has"), [("Scripted", "high, late, low$"), ("Unjudged", "none$")])
def test_an_unknown_metric_is_refused_before_the_first_step(tmp_path, method, has):
    Scripted.steps = 0
    with pytest.raises(UsageError, match=f"train.best_by top1_class is no metric of this run, which has {has}"):
        run(tmp_path, "train.best_by=top1_class", f"method.use=tests.test_train_best:{method}")
    assert Scripted.steps == 0


def test_a_method_that_logs_no_loss_is_told_so(tmp_path):
    with pytest.raises(UsageError, match=r"tests.test_train_best:Silent: its step has logged no loss; call engine.run"):
        run(tmp_path, "method.use=tests.test_train_best:Silent", "engine.log_every=1")


def test_a_parameter_that_the_loss_does_not_use_is_a_mistake_of_the_method(tmp_path, capsys):
    (tmp_path / "spare.yaml").write_text(RECIPE.replace("Scripted", "Spare"))
    assert cli(["train", str(tmp_path / "spare.yaml"), "--run-dir", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err.startswith("fastdeit: 1 trained parameters got no gradient, first 'spare': the loss")


def test_a_method_without_metrics_has_no_best_step(tmp_path):
    summary = run(tmp_path, "method.use=tests.test_train_best:Unjudged", "train.epochs=1")
    assert (summary["best_by"], summary["best"], summary["best_step"]) == (None, None, 0)


@pytest.mark.parametrize("ema", [pytest.param("null", marks=pytest.mark.slow), "0.5"])
def test_eval_judges_in_the_phase_of_the_checkpoint(tmp_path, capsys, ema):
    summary = run(tmp_path, "method.use=tests.test_train_best:InTwoPhases", "train.epochs=2", f"optim.ema_decay={ema}")
    capsys.readouterr()
    assert cli(["eval", str(tmp_path / "run")]) == 0
    printed = [line.split()[-1] for line in capsys.readouterr().out.splitlines()[1:]]
    names = [name for name in summary if name.startswith("held_out")]
    assert len(names) == (3 if ema == "null" else 6)
    assert summary["held_out_progress"] == 3 / 4  # the last of four steps, whose schedules hold
    assert printed == [f"{summary[name]:.4g}" for name in names]
