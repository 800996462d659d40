"""Whole runs of a student with BatchNorm: the number that is printed is the number of the checkpoint."""

import json
from contextlib import redirect_stdout
from io import StringIO

import pytest
import torch

from fastdeit.cli import main as cli
from fastdeit.engine.dist import World
from fastdeit.errors import Interrupted
from fastdeit.methods.evaluators import Classify, HeldOutLoss
from fastdeit.methods.supervised import Supervised
from fastdeit.recipe import resolve as recipes
from fastdeit.training import train
from tests.small_runs import StopAt, assert_same_weights, logged, stored, train_rank

RECIPE = """\
model: {name: "tests.toys:batch_norm_convnet", image_size: 32}
method: {use: "tests.test_train_batchnorm:Judged"}
data:
  {source: folder, flip: 0.0, mixup: 0, cutmix: 0, group_size: 16, repeats: 1, eval_crop_ratio: 1.0,
   mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}
optim: {lr: 1e-2, warmup_epochs: 0, min_lr: 1e-5, ema_decay: 0.5}
train: {epochs: 2, batch_size: 128}
engine: {device: cpu, precision: fp32, log_every: 3}
"""
STEPS_PER_EPOCH, TOTAL = 3, 6


class Judged(Supervised):
    """Is judged by its loss as well, which shows differences of the statistics that change no answer."""

    def evaluators(self):
        return {"classify": Classify(), "loss": HeldOutLoss()}


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipes") / "batchnorm.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def load(recipe_file, few_digits):
    return lambda *overrides: recipes.load(str(recipe_file), [f"data.root={few_digits}", *overrides])


@pytest.fixture(scope="module")
def whole(load, tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    return run, train(load(), run, World(torch.device("cpu")), resume=False)


def evaluated(run, capsys, *overrides):
    """Accuracy and loss of the weights and of their average, as `fastdeit eval` prints them."""
    capsys.readouterr()
    assert cli(["eval", str(run), "--json", *overrides]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    return [(each["metrics"]["top1_class"], each["metrics"]["held_out_loss"]) for each in results]


def printed(summary):
    """The same from the summary of a run. The loss is a sum over processes, which may round in another order."""
    kinds = "", "_ema"
    return [(summary[f"top1_class{kind}"], pytest.approx(summary[f"held_out_loss{kind}"], rel=1e-5)) for kind in kinds]


@pytest.mark.slow
def test_the_number_of_the_run_is_the_number_of_its_checkpoint(whole, capsys):
    run, summary = whole
    assert evaluated(run, capsys) == printed(summary)
    tensors = stored(run, TOTAL)
    statistics = [name for name in tensors["ema.safetensors"] if "running" in name]
    assert len(statistics) == 8
    own = tensors["model.safetensors"]
    assert not any(torch.equal(tensors["ema.safetensors"][n], own[n.removeprefix("model.")]) for n in statistics)


@pytest.mark.parametrize("stop", [STEPS_PER_EPOCH, pytest.param(STEPS_PER_EPOCH + 1, marks=pytest.mark.slow)])
def test_an_interrupted_run_ends_with_the_same_statistics(load, whole, tmp_path, stop):
    with pytest.raises(Interrupted):
        train(load(), tmp_path / "run", StopAt(stop), resume=False)
    train(load(), tmp_path / "run", World(torch.device("cpu")), resume=True)
    assert_same_weights(whole[0], tmp_path / "run", TOTAL)
    assert logged(whole[0]) == logged(tmp_path / "run")


@pytest.mark.slow
def test_two_processes_print_the_number_of_their_checkpoint(ranks, recipe_file, few_digits, tmp_path, capsys):
    run = tmp_path / "run"
    ranks(2, train_rank, str(recipe_file), [f"data.root={few_digits}", "train.epochs=1"], run)
    assert evaluated(run, capsys) == printed(json.loads((run / "summary.json").read_text()))


class StopTogether(World):
    """One of several processes of a run that somebody asks to stop after its first epoch."""

    asked = 0

    def stop_requested(self):
        self.asked += 1
        return self.asked == STEPS_PER_EPOCH


def two_runs(rank, size, path, overrides, folder):
    """A run that goes through and one that is interrupted, on several processes."""
    recipe = recipes.load(path, overrides)
    train(recipe, folder / "whole", World(torch.device("cpu"), rank, size), resume=False)
    with pytest.raises(Interrupted):
        train(recipe, folder / "parts", StopTogether(torch.device("cpu"), rank, size), resume=False)
    train(recipe, folder / "parts", World(torch.device("cpu"), rank, size), resume=True)


@pytest.mark.slow
@pytest.mark.parametrize("synchronised", ["false", "true"])
def test_two_processes_resume_with_the_same_statistics(ranks, recipe_file, few_digits, tmp_path, capsys, synchronised):
    overrides = [f"data.root={few_digits}", f"engine.sync_batchnorm={synchronised}"]
    ranks(2, two_runs, str(recipe_file), overrides, tmp_path)
    runs = tmp_path / "whole", tmp_path / "parts"
    assert_same_weights(*runs, TOTAL)
    whole, parts = ([record for record in logged(run) if record["kind"] == "eval"] for run in runs)
    assert whole == parts
    assert evaluated(runs[1], capsys) == printed(json.loads((runs[0] / "summary.json").read_text()))


def said_by_rank(*arguments):
    with redirect_stdout(StringIO()) as said:
        train_rank(*arguments)
    return said.getvalue()


@pytest.mark.slow
def test_a_model_without_batchnorm_says_so_and_trains(ranks, recipe_file, few_digits, tmp_path):
    overrides = [f"data.root={few_digits}", "model.name=convnet_digits", "engine.sync_batchnorm=true", "train.epochs=1"]
    said = "".join(ranks(2, said_by_rank, str(recipe_file), overrides, tmp_path / "run"))
    assert (tmp_path / "run" / "summary.json").exists()
    assert said.count("engine.sync_batchnorm changes nothing: this model has no BatchNorm") == 1
