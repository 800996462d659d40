"""Forks: what is carried over from another run, what may differ, what is refused, and what the new run remembers."""

import json
import os
import re
import shutil

import pytest
import torch

from fastdeit.cli import main as cli
from fastdeit.engine import checkpoint
from fastdeit.engine.dist import World
from fastdeit.errors import Interrupted, UsageError
from fastdeit.recipe import resolve as recipes
from fastdeit.run import directory, fork
from fastdeit.run.saver import Saver
from fastdeit.training import train
from tests.small_runs import StopAt, assert_same_weights, logged

RECIPE = """\
model: {name: "tests.small_runs:Tiny", image_size: 32}
method: {use: supervised}
data:
  {source: synthetic, synthetic_samples: 24, synthetic_classes: 4, flip: 0, mixup: 0, cutmix: 0, group_size: 4,
   repeats: 1, mean: [0.3, 0.4, 0.5], std: [0.2, 0.25, 0.3]}
optim: {lr: 1e-3, warmup_epochs: 0, ema_decay: 0.9}
train: {epochs: 2, batch_size: 8}
engine: {device: cpu, precision: fp32, checkpoint_every: 0.3333, keep_checkpoints: 9, log_every: 1}
"""
STEPS_PER_EPOCH, TOTAL = 3, 6
CPU = World(torch.device("cpu"))


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    """A finished run; nothing writes there."""
    folder = tmp_path_factory.mktemp("parent")
    (folder / "small.yaml").write_text(RECIPE)
    train(recipes.load(str(folder / "small.yaml")), folder / "run", CPU)
    return folder / "run"


def forked(address, run, *overrides, world=CPU):
    """Train a fork into `run`; its summary."""
    origin = fork.opened(str(address), print)
    return train(recipes.override(origin.recipe, overrides), run, world, origin=origin)


def loaded(run, step):
    return checkpoint.load(run / "checkpoints" / f"step_{step:08d}")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(tensor, b[name]) for name, tensor in a.items())


def test_a_fork_with_the_same_settings_ends_as_its_parent(parent, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in parent.rglob("*")}
    summary = forked(f"{parent}@step=4", tmp_path / "fork")
    assert_same_weights(parent, tmp_path / "fork", TOTAL)
    keep = [record for record in logged(parent) if record["step"] > 4]
    assert logged(tmp_path / "fork") == keep, "what the parent measured stays with the parent"
    assert summary["lineage"] == [{"run": str(parent), "step": 4, "differences": {}}]
    assert {path: path.stat().st_mtime_ns for path in parent.rglob("*")} == before


def test_a_fork_that_is_killed_before_its_first_checkpoint_is_no_run_yet(parent, tmp_path, monkeypatch):
    """Its recipe alone would begin from the start: the run is told neither to go on nor to begin again by it. The same
    command makes the fork, in the same directory."""
    save, killed, later = Saver.save, tmp_path / "killed", tmp_path / "later"

    def kept(saver, run_dir, step, record, **options):
        first = not killed.exists()
        if first:
            shutil.copytree(run_dir, killed)
        save(saver, run_dir, step, record, **options)
        if first:
            shutil.copytree(run_dir, later)

    monkeypatch.setattr(Saver, "save", kept)
    forked(f"{parent}@step=5", tmp_path / "fork")
    with pytest.raises(UsageError, match=r"has no checkpoint to go on from$"):
        directory.recipe_of(killed)
    forked(f"{parent}@step=5", killed)
    train(directory.recipe_of(later), later, CPU, resume=True)
    for run in (killed, later):
        assert_same_weights(parent, run, TOTAL)


def test_a_fork_that_is_stopped_while_it_trains_its_teacher_does_not_go_on_without_its_origin(parent, tmp_path):
    teacher, run = tmp_path / "teacher.yaml", tmp_path / "fork"
    teacher.write_text(RECIPE.replace("epochs: 2", "epochs: 1"))
    distill = "method.use=distill", f"method.teacher.recipe={teacher}"
    with pytest.raises(Interrupted):
        forked(f"{parent}@step=5", run, *distill, world=StopAt(1))
    with pytest.raises(UsageError, match=r"no checkpoint .*; it is a fork .*: give its first command again"):
        directory.recipe_of(run)


CARRIED = {
    "optim.lr=5e-4": {"optim.lr": [0.001, 0.0005]},
    "train.epochs=3": {"train.epochs": [2, 3]},
    "train.accumulate=2": {"train.accumulate": [1, 2]},
    "engine.precision=bf16": {"engine.precision": ["fp32", "bf16"]},
    "engine.precision=fp16": {"engine.precision": ["fp32", "fp16"]},
    "model.drop_path=0.1": {"model.drop_path": [0.0, 0.1]},
    "optim.ema_decay=null": {"optim.ema_decay": [0.9, None]},
    "train.seed=3": {"train.seed": [0, 3]},
}


@pytest.mark.parametrize("change", CARRIED)
def test_what_may_differ_and_what_is_carried_over(parent, tmp_path, change):
    run = tmp_path / "fork"
    with pytest.raises(Interrupted):
        forked(f"{parent}@step=3", run, change, world=StopAt(1))
    theirs, first, second = loaded(parent, 3), loaded(run, 3), loaded(run, 4)
    for file in {"model", "optim", "method", "ema"} & first.tensors.keys():
        assert same(first.tensors[file], theirs.tensors[file]), file
    assert ("ema" in first.tensors) is (change != "optim.ema_decay=null")
    if change == "engine.precision=fp16":
        assert first.tensors["engine"]["scale"].item() == 2.0**16
    assert not same(second.tensors["model"], loaded(parent, 3).tensors["model"])
    assert second.state["lineage"] == [{"run": str(parent), "step": 3, "differences": CARRIED[change]}]
    assert logged(run)[0] | {"kind": "eval", "step": 3} == logged(run)[0], "its first best is where it begins"
    assert second.state["record"]["images"] == 8, "what the parent did counts there"
    key = change.partition("=")[0]
    section, field = key.split(".")
    assert second.state["recipe"][section][field] == CARRIED[change][key][1]


def test_an_average_begins_with_the_weights_where_the_parent_has_none(parent, tmp_path, capsys):
    with pytest.raises(Interrupted):
        forked(f"{parent}@step=3", tmp_path / "one", "optim.ema_decay=null", world=StopAt(1))
    with pytest.raises(Interrupted):
        forked(tmp_path / "one", tmp_path / "two", "optim.ema_decay=0.5", world=StopAt(1))
    began = loaded(tmp_path / "two", 4).tensors
    weights = {f"model.{name}": tensor for name, tensor in began["model"].items()}
    assert same(began["ema"], weights)
    assert "the average of the weights begins with the weights" in capsys.readouterr().out
    assert [entry["step"] for entry in loaded(tmp_path / "two", 5).state["lineage"]] == [3, 4]


def test_epochs_of_another_number_of_steps_begin_at_the_same_epoch(parent, tmp_path):
    summary = forked(f"{parent}@step=3", tmp_path / "fork", "train.batch_size=4")
    assert summary["steps"] == 12
    assert checkpoint.steps(tmp_path / "fork" / "checkpoints")[0] == 6
    assert logged(tmp_path / "fork")[0]["step"] == 6, "evaluated where it begins: its first best"


@pytest.mark.parametrize("address", ["RUN", "RUN@best", "RUN@step=6", "RUN/checkpoints/step_00000006"])
def test_where_a_fork_begins(parent, address):
    origin = fork.opened(address.replace("RUN", str(parent)), print)
    best = loaded(parent, TOTAL).state["record"]["best_step"]
    assert (origin.run, origin.step) == (parent, best if address == "RUN@best" else TOTAL)


def test_a_fork_that_is_interrupted_goes_on_as_a_run(parent, tmp_path, capsys):
    run = tmp_path / "fork"
    with pytest.raises(Interrupted):
        forked(f"{parent}@step=4", run, "optim.lr=5e-4", world=StopAt(1))
    assert cli(["train", "--resume", str(run)]) == 0
    forked(f"{parent}@step=4", tmp_path / "whole", "optim.lr=5e-4")
    assert_same_weights(run, tmp_path / "whole", TOTAL)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["lineage"][0]["differences"] == {"optim.lr": [0.001, 0.0005]}


def test_a_fork_may_freeze_and_unfreeze(parent, tmp_path, capsys):
    """What is frozen keeps its weights; what is trained again begins with an optimizer's state of zero."""
    forked(f"{parent}@step=4", tmp_path / "frozen", "model.freeze=[head,rows]")
    said = capsys.readouterr().out
    assert "frozen now are model.head.bias, model.head.weight, model.rows, at their weights" in said
    start, end = loaded(parent, 4).tensors, loaded(tmp_path / "frozen", TOTAL).tensors
    for name, tensor in start["model"].items():
        assert torch.equal(tensor, end["model"][name]) == (not name.startswith("head_dist")), name
    assert set(end["ema"]) == {"model.head_dist.weight", "model.head_dist.bias"}
    assert {name.rpartition(".")[0] for name in end["optim"]} == {
        f"{kind}.model.head_dist" for kind in ("step", "exp_avg", "exp_avg_sq")
    }

    forked(f"{tmp_path}/frozen@step=5", tmp_path / "thawed", "model.freeze=[]")
    assert "trained now, and not there, are model.head.bias, model.head.weight, model.rows" in capsys.readouterr().out
    begun = loaded(tmp_path / "thawed", 5).tensors
    held = loaded(tmp_path / "frozen", 5).tensors
    for name, tensor in begun["optim"].items():
        kept = held["optim"].get(name)
        assert torch.equal(tensor, torch.zeros_like(tensor) if kept is None else kept), name
    assert torch.equal(begun["ema"]["model.rows"], held["model"]["rows"])
    assert torch.equal(begun["ema"]["model.head_dist.weight"], held["ema"]["model.head_dist.weight"])
    last = loaded(tmp_path / "thawed", TOTAL).tensors
    assert last["optim"]["step.model.rows"] == 1
    assert last["optim"]["step.model.head_dist.bias"] == TOTAL
    assert not torch.equal(last["model"]["rows"], begun["model"]["rows"])


REFUSED = {
    "RUN": "stands at epoch 2, and the fork has 2: nothing is left to train; give it more with train.epochs=N",
    "RUN@step=4 train.batch_size=4": "is in the middle of an epoch, and the fork's epochs have 6 steps instead of 3",
    "RUN@step=4 model.name=convnet_digits": r"convs.0.weight: in the checkpoint there is none, here it has the shape "
    r"\[32, 3, 3, 3\] \(changed: model.name\)",
    "RUN@step=4 model.image_size=64": r"of model, rows: in the checkpoint it has the shape \[32\], here it has "
    r"the shape \[64\] \(changed: model.image_size\)",
    "RUN@step=4 optim.name=lamb optim.lr=1e-3": "optim.name is adamw there and lamb here, and one optimizer cannot",
    "RUN@step=4 data.synthetic_classes=5": "the data there has 4 classes, and other ones than the 5 here",
    "RUN@step=4 model.weights=RUN": "model.weights says what a run begins with",
    "RUN@ema": "--from RUN@ema has weights alone, .*`fastdeit train RECIPE model.weights=RUN@ema`",
    "timm:deit_tiny_patch16_224": "has weights alone",
    "RUN@step=7": "there is no checkpoint of step 7; there are those of the steps 1, 2, 3, 4, 5, 6",
    "nowhere": "there is no nowhere",
    "RUN@step=4 optim.lr=-1": "optim.lr",
}


def test_what_cannot_be_carried_over_is_refused_in_a_sentence_and_nothing_is_made(parent, tmp_path, capfd):
    for form, expected in REFUSED.items():
        assert cli(["train", "--from", *form.replace("RUN", str(parent)).split()]) == 2, form
        err = capfd.readouterr().err
        assert re.search(expected.replace("RUN", re.escape(str(parent))), err), (form, err)
        assert "Traceback" not in err
        assert os.listdir(tmp_path) == [], form


def test_a_fork_takes_its_parents_teacher(parent, tmp_path, capsys):
    teacher = tmp_path / "teacher.yaml"
    teacher.write_text(RECIPE.replace("epochs: 2", "epochs: 1"))
    student = tmp_path / "student.yaml"
    student.write_text(RECIPE.replace("{use: supervised}", f"{{use: distill, teacher: {{recipe: {teacher}}}}}"))
    with pytest.raises(Interrupted):
        train(recipes.load(str(student), ["engine.checkpoint_every=9"]), tmp_path / "run", StopAt(STEPS_PER_EPOCH + 1))
    trained = shutil.copytree(tmp_path / "run" / "teacher", tmp_path / "kept")
    teacher.unlink()
    capsys.readouterr()
    with pytest.raises(Interrupted):
        forked(tmp_path / "run", tmp_path / "fork", "optim.lr=5e-4", world=StopAt(1))
    assert f"the teacher is that of {tmp_path / 'run'}" in capsys.readouterr().out
    assert_same_weights(trained, tmp_path / "fork" / "teacher", STEPS_PER_EPOCH)


@pytest.mark.slow
def test_a_fork_trains_a_teacher_of_its_own_where_its_recipe_is_another(tmp_path, capsys):
    teacher, student = tmp_path / "teacher.yaml", tmp_path / "student.yaml"
    teacher.write_text(RECIPE.replace("epochs: 2", "epochs: 1"))
    student.write_text(RECIPE.replace("{use: supervised}", f"{{use: distill, teacher: {{recipe: {teacher}}}}}"))
    with pytest.raises(Interrupted):
        train(recipes.load(str(student)), tmp_path / "run", StopAt(STEPS_PER_EPOCH + 1))
    other = tmp_path / "other.yaml"
    other.write_text(RECIPE.replace("epochs: 2", "epochs: 1").replace("lr: 1e-3", "lr: 2e-3"))
    for steps in (1, STEPS_PER_EPOCH + 1):  # the same command goes on with a teacher that is under way
        with pytest.raises(Interrupted):
            forked(tmp_path / "run", tmp_path / "fork", f"method.teacher.recipe={other}", world=StopAt(steps))
    assert "the teacher is that of" not in capsys.readouterr().out
    with pytest.raises(AssertionError, match="safetensors model"):
        assert_same_weights(tmp_path / "run" / "teacher", tmp_path / "fork" / "teacher", STEPS_PER_EPOCH)


def test_a_run_whose_teacher_was_under_way_goes_on_by_its_name(tmp_path, capsys):
    teacher, student = tmp_path / "teacher.yaml", tmp_path / "student.yaml"
    teacher.write_text(RECIPE.replace("epochs: 2", "epochs: 1"))
    student.write_text(RECIPE.replace("{use: supervised}", f"{{use: distill, teacher: {{recipe: {teacher}}}}}"))
    run = tmp_path / "run"
    with pytest.raises(Interrupted, match=f"go on with `fastdeit train --resume {run} --trust`$"):
        train(recipes.load(str(student)), run, StopAt(2))
    student.unlink()
    teacher.unlink()
    assert cli(["train", "--resume", str(run), "--trust"]) == 0
    out = capsys.readouterr().out
    assert f"recipe student, run directory {run}" in out
    assert "resumed at step 2 of 3" in out
    assert json.loads((run / "summary.json").read_text())["recipe"] == "student"


def test_a_damaged_origin_is_refused(parent, tmp_path):
    run = shutil.copytree(parent, tmp_path / "run")
    (run / "checkpoints" / "step_00000004" / "optim.safetensors").write_bytes(b"")
    with pytest.raises(UsageError, match="step_00000004"):
        fork.opened(f"{run}@step=4", print)
