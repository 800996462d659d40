"""Whole runs in small: what is written, exact resume, several processes, signals, wrong resumes, bad images."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fastdeit.cli import main as cli
from fastdeit.data.sources import digits
from fastdeit.engine.dist import World
from fastdeit.errors import FastdeitError, Interrupted, NonFiniteError, UsageError
from fastdeit.methods.config import TeacherConfig
from fastdeit.methods.evaluators import Classify, images
from fastdeit.methods.supervised import Supervised
from fastdeit.recipe import resolve as recipes
from fastdeit.recipe.config import DataSplits
from fastdeit.run import build, directory, teachers
from fastdeit.run.evaluate import evaluate
from fastdeit.run.weights import open_weights
from fastdeit.training import train

RECIPE = """\
model: {name: deit_digits_distilled_patch8_32, image_size: 32, drop_path: 0.1}
method:
  use: distill
  teacher: {recipe: TEACHER}
data:
  {source: folder, flip: 0.0, group_size: 16, repeats: 2, eval_crop_ratio: 1.0,
   mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}
optim: {lr: 1e-3, warmup_epochs: 0.5, min_lr: 1e-5, ema_decay: 0.9}
train: {epochs: 2, batch_size: 64}
engine: {device: cpu, precision: fp32, log_every: 5}
"""
TEACHER = """\
model: {name: convnet_digits, image_size: 32}
method: {use: supervised}
data:
  {source: folder, flip: 0.0, mixup: 0, cutmix: 0, group_size: 16, repeats: 1, eval_crop_ratio: 1.0,
   mean: [0.5, 0.5, 0.5], std: [0.5, 0.5, 0.5]}
optim: {lr: 2e-3, warmup_epochs: 0.5, min_lr: 1e-5}
train: {epochs: 1, batch_size: 64}
engine: {device: cpu, precision: fp32}
"""
STEPS_PER_EPOCH, TOTAL = 6, 12


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of 400 training and 100 held-out digits."""
    os.environ.setdefault("FASTDEIT_CACHE", str(tmp_path_factory.mktemp("cache")))
    root, full = tmp_path_factory.mktemp("data"), Path(digits.prepare())
    for split, count in (("train", 40), ("val", 10)):
        for folder in sorted((full / split).iterdir()):
            (root / split / folder.name).mkdir(parents=True)
            for file in sorted(folder.iterdir())[:count]:
                shutil.copy(file, root / split / folder.name)
    return root


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    (folder / "teacher.yaml").write_text(TEACHER)
    (folder / "student.yaml").write_text(RECIPE.replace("TEACHER", str(folder / "teacher.yaml")))
    return folder / "student.yaml"


@pytest.fixture(scope="module")
def load(data, recipe_file):
    return lambda *overrides, root=data: recipes.load(str(recipe_file), [f"data.root={root}", *overrides])


@pytest.fixture(scope="module")
def whole(load, tmp_path_factory):
    """The run that is never interrupted."""
    run = tmp_path_factory.mktemp("whole") / "run"
    summary = train(load(), run, World(torch.device("cpu")), resume=False)
    return run, summary


def tensors(run, step=TOTAL):
    folder = run / "checkpoints" / f"step_{step:08d}"
    return {file.name: load_file(file) for file in sorted(folder.glob("*.safetensors"))}


def assert_same_weights(run, other, step=TOTAL):
    mine, theirs = tensors(run, step), tensors(other, step)
    assert mine.keys() == theirs.keys()
    for file in mine:
        assert mine[file].keys() == theirs[file].keys()
        for name, tensor in mine[file].items():
            assert torch.equal(tensor, theirs[file][name]), f"{file} {name}"


def logged(run):
    """What was measured, and at which step: the losses of training and the accuracies of evaluation."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    keep = ("step", "kind", "loss", "top1_fused", "top1_distillation", "top1_class_ema", "teacher_top1")
    return [{key: record[key] for key in keep if key in record} for record in records]


class StopAt(World):
    """A world in which somebody asks to stop once `step` steps of the student are done."""

    def __init__(self, *steps):
        super().__init__(torch.device("cpu"))
        self.steps, self.asked = set(steps), 0

    def stop_requested(self):
        self.asked += 1
        return self.asked in self.steps


def test_run_directory(whole):
    run, summary = whole
    files = {path.name for path in run.iterdir()}
    assert files == {
        "recipe.yaml",
        "environment.json",
        "metrics.jsonl",
        "checkpoints",
        "summary.json",
        "teacher",
    }
    assert {"run_dir": str(run), **json.loads((run / "summary.json").read_text())} == summary
    assert summary["epochs"] == 2
    assert summary["steps"] == TOTAL
    for name in ("top1_fused", "top1_class", "top1_distillation", "teacher_top1", "top1_fused_ema"):
        assert 0 <= summary[name] <= 100
    assert 0 < summary["train_loss"] < 3
    assert summary["images_per_second"] > 0
    assert 0 <= summary["data_wait_percent"] <= 100
    environment = json.loads((run / "environment.json").read_text())
    assert environment["torch"]["version"] == torch.__version__
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["kind"] == "train"] == [5, 10, 12]
    assert [r["images"] for r in records if r["kind"] == "eval"] == [100, 100]
    assert recipes.load(str(run / "recipe.yaml")).model_dump(exclude={"name"})["train"]["batch_size"] == 64
    # What the student's recipe leaves to the machine is answered for a teacher of ours as well.
    assert directory.recipe_of(run / "teacher").engine.keep_activations is False


def test_retention_keeps_two_and_the_best(whole):
    steps = sorted(int(path.name.removeprefix("step_")) for path in (whole[0] / "checkpoints").iterdir())
    assert steps == [6, 12]


@pytest.mark.parametrize(
    "stop",
    [
        3,
        *(pytest.param(step, marks=pytest.mark.slow) for step in (STEPS_PER_EPOCH, STEPS_PER_EPOCH + 1, TOTAL - 1)),
    ],
)
def test_interrupted_and_resumed_run_ends_with_the_same_weights(load, whole, tmp_path, stop):
    shutil.copytree(whole[0] / "teacher", tmp_path / "run" / "teacher")
    with pytest.raises(Interrupted, match=f"step {stop} of {TOTAL}"):
        train(load(), tmp_path / "run", StopAt(stop), resume=False)
    summary = train(load(), tmp_path / "run", World(torch.device("cpu")), resume=True)
    assert_same_weights(whole[0], tmp_path / "run")
    assert {k: v for k, v in summary.items() if k.startswith("top1")} == {
        k: v for k, v in whole[1].items() if k.startswith("top1")
    }
    assert logged(whole[0]) == logged(tmp_path / "run")


@pytest.mark.slow
def test_interrupted_teacher_is_resumed_too(load, whole, tmp_path):
    with pytest.raises(Interrupted, match=r"step 2 of 6.*teacher"):
        train(load(), tmp_path / "run", StopAt(2), resume=False)
    train(load(), tmp_path / "run", World(torch.device("cpu")), resume=True)
    assert_same_weights(whole[0], tmp_path / "run")


def test_a_damaged_newest_checkpoint_costs_one_interval(load, whole, tmp_path, capsys):
    run = shutil.copytree(whole[0], tmp_path / "run")
    victim = run / "checkpoints" / f"step_{TOTAL:08d}" / "optim.safetensors"
    content = bytearray(victim.read_bytes())
    content[-7] ^= 1
    victim.write_bytes(content)
    train(load(), run, World(torch.device("cpu")), resume=True)
    assert f"step_{TOTAL:08d} is damaged" in capsys.readouterr().out
    assert_same_weights(whole[0], run)


def test_a_run_directory_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"file/run: the run directory cannot be made .*: Not a directory; .*choose"):
        directory.claim(tmp_path / "file" / "run", "x", World(torch.device("cpu")), print).__enter__()


def test_used_run_directory_is_refused(load, whole):
    with pytest.raises(UsageError, match="already holds a run; go on with `fastdeit train --resume "):
        train(load(), whole[0], World(torch.device("cpu")), resume=False)


@pytest.mark.parametrize(
    ("override", "field", "values"),
    [
        ("train.batch_size=32", "train.batch_size", ("64", "32")),
        ("model.drop_path=0.2", "model.drop_path", ("0.1", "0.2")),
        ("optim.lr=2e-3", "optim.lr", ("0.001", "0.002")),
        ("train.seed=1", "train.seed", ("0", "1")),
    ],
)
def test_wrong_resume_names_field_and_values(load, whole, override, field, values):
    with pytest.raises(UsageError) as error:
        train(load(override), whole[0], World(torch.device("cpu")), resume=True)
    assert f"{field}: the run has {values[0]}, asked for {values[1]}" in str(error.value)


def test_resume_on_other_data_is_refused(load, whole, data, tmp_path):
    other = shutil.copytree(data, tmp_path / "other")
    victim = next(file for file in sorted((other / "train").rglob("*.jpg")))
    victim.rename(victim.with_name("renamed.jpg"))
    shutil.copytree(whole[0], tmp_path / "run", ignore=shutil.ignore_patterns("teacher"))
    with pytest.raises(UsageError, match="training images"):
        train(load(root=other), tmp_path / "run", World(torch.device("cpu")), resume=True)


def test_bad_images_are_replaced_counted_and_named(load, data, tmp_path, capsys):
    broken = shutil.copytree(data, tmp_path / "broken")
    files = sorted((broken / "train").rglob("*.jpg"))
    files[10].write_bytes(b"")
    files[200].write_bytes(files[200].read_bytes()[:200])
    plain = ["method.use=supervised", "train.epochs=1", "data.repeats=1"]
    with pytest.raises(FastdeitError, match=r"max_bad_fraction") as error:
        train(
            load(*plain, "data.max_bad_fraction=0", root=broken),
            tmp_path / "strict",
            World(torch.device("cpu")),
            resume=False,
        )
    assert str(files[10]) in str(error.value) or str(files[200]) in str(error.value)
    capsys.readouterr()
    recipe, run, world = load(*plain, root=broken), tmp_path / "run", World(torch.device("cpu"))
    summary = train(recipe, run, world, resume=False)  # a thousandth of these images is one
    assert summary["bad_images"] == 2
    assert summary["steps"] == STEPS_PER_EPOCH
    out = capsys.readouterr().out
    for file in (files[10], files[200]):
        assert out.count(str(file)) == 1
    shutil.copy(files[11], files[10])
    assert train(recipe, run, world, resume=True)["bad_images"] == 1
    out = capsys.readouterr().out
    assert f"images that were not used, and are sound now: '{files[10]}'" in out
    assert str(files[200]) not in out
    assert str(files[10]) not in (run / "bad_images.jsonl").read_text()


def test_persistent_nan_stops_with_its_own_exit_code(load, tmp_path):
    plain = [
        "method.use=supervised",
        "optim.lr=1e30",
        "optim.schedule=cosine",
        "optim.warmup_epochs=0",
        "optim.ema_decay=null",
    ]
    with pytest.raises(NonFiniteError, match=r"optim\.lr"):
        train(load(*plain), tmp_path / "run", World(torch.device("cpu")), resume=False)


def fastdeit(*arguments, **options):
    command = [sys.executable, "-m", "fastdeit", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


@pytest.mark.slow
def test_ctrl_c_then_resume_on_the_command_line(recipe_file, data, whole, tmp_path, capsys):
    run = tmp_path / "run"
    arguments = ["train", recipe_file, "--data", data, "--run-dir", run, "--resume"]
    shutil.copytree(whole[0] / "teacher", run / "teacher")
    process = fastdeit(*arguments, "engine.log_every=1")
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "step 2/12" in line:
            process.send_signal(signal.SIGINT)
            break
    rest = process.stdout.read()
    assert process.wait(60) == 75, "".join(lines) + rest
    assert "Traceback" not in rest
    assert f"go on with `fastdeit train --resume {run} --trust`" in rest
    assert cli([*map(str, arguments), "engine.log_every=1"]) == 0
    assert "resumed at step" in capsys.readouterr().out
    assert_same_weights(whole[0], run)


@pytest.mark.slow
def test_two_processes_reach_the_result_of_one(recipe_file, data, whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole[0] / "teacher", run / "teacher")
    process = fastdeit("train", recipe_file, "--data", data, "--run-dir", run, "--nproc", "2")
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out
    assert out.count("held-out top") == 3  # one of the teacher, two of the student: one process speaks
    summary = json.loads((run / "summary.json").read_text())
    assert summary["train_loss"] == pytest.approx(whole[1]["train_loss"], rel=2e-3)
    one, two = tensors(whole[0])["model.safetensors"], tensors(run)["model.safetensors"]
    # Adam moves a weight by up to the learning rate a step whatever the size of its gradient, so rounding of tiny
    # gradients may cost some weights a few steps' worth (12 x 1e-3); on average the difference must stay far below
    # that.
    difference = sum((one[n] - two[n]).abs().sum() for n in one) / sum(t.numel() for t in one.values())
    assert difference < 2e-4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "deit_small"], "add --data ROOT"),
        (["train", "deit_small", "--data", "/nowhere/at/all"], "/nowhere/at/all"),
        (["train", "digits", "model.drop_pth=0.1"], "drop_path"),
        (["eval", "/nowhere/at/all"], "/nowhere/at/all"),
        pytest.param(
            ["train", "digits", "engine.device=cuda"],
            "engine.device is cuda",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_refusals_are_one_message_and_exit_code_2(arguments, message, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli(arguments) == 2
    err = capfd.readouterr().err
    assert message in err
    assert "Traceback" not in err


def test_eval_repeats_the_result_of_the_run(whole, data, capsys):
    run, summary = whole
    assert cli(["eval", str(run)]) == 0
    out = capsys.readouterr().out
    for name in ("top1_fused", "top1_class", "top1_distillation", "top1_fused_ema"):
        assert f"{summary[name]:.2f}" in out
    assert cli(["eval", str(run / "checkpoints" / f"step_{TOTAL:08d}"), "--data", str(data), "method.fuse=logit"]) == 0
    assert "mean of logits" in capsys.readouterr().out


def test_the_quick_start_in_small(recipe_file, tmp_path, capsys):
    """Its verbs and its data, with a teacher of one epoch and a student of four steps."""
    run, teacher = tmp_path / "run", recipe_file.with_name("teacher.yaml")
    overrides = [f"method.teacher.recipe={teacher}", "train.epochs=2", "train.batch_size=480", "optim.warmup_epochs=0"]
    assert cli(["train", "--run-dir", str(run), *overrides]) == 0
    assert "no recipe named" in capsys.readouterr().out
    summary = json.loads((run / "summary.json").read_text())
    assert summary["steps"] == 4
    assert summary["teacher_top1"] == json.loads((run / "teacher" / "summary.json").read_text())["top1_class"]
    assert cli(["eval", str(run)]) == 0
    assert f"{summary['top1_fused']:.2f}" in capsys.readouterr().out


@pytest.mark.slow
def test_quick_start_reaches_95_percent(tmp_path):
    """`fastdeit train`, with nothing named, on this machine: the promise of the README."""
    process = fastdeit("train", "--run-dir", tmp_path / "run", env={**os.environ, "FASTDEIT_CACHE": str(tmp_path)})
    began = time.monotonic()
    out, _ = process.communicate(timeout=600)
    assert process.returncode == 0, out
    assert "no recipe named" in out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["top1_fused"] >= 95.0
    assert summary["teacher_top1"] >= 95.0
    print(f"quick start: {time.monotonic() - began:.0f} s, top-1 {summary['top1_fused']:.2f} %")


def test_a_batch_that_the_processes_cannot_share_is_refused(load, tmp_path):
    world = World(torch.device("cpu"))
    world.size = 3
    recipe = load("method.use=supervised")
    with pytest.raises(UsageError, match=r"batch size 64 .*nproc 3"):
        build.train_loader(recipe, build.sources(recipe)[0], world, {}, print)


PACKED = ("data.source=packed", "data.root=/b", "data.train=a.pack", "data.val=b.pack", "data.classes=/names.txt")
PARQUET = ("data.source=parquet", "data.root=/b", "data.image_column=img", "data.label_column=fine", "data.val=10%")
SYNTHETIC = ("data.source=synthetic", "data.synthetic_classes=7", "data.synthetic_samples=70")


@pytest.mark.parametrize("overrides", [PACKED, PARQUET, SYNTHETIC], ids=["packed", "parquet", "synthetic"])
def test_a_teacher_trained_here_reads_the_students_data(tmp_path, overrides):
    """And what is written in its run can be read again, to go on by it."""
    theirs = "{source: parquet, root: /c, image_column: i, label_column: l, classes: /c.txt, flip: 0.3}"
    (tmp_path / "teacher.yaml").write_text(f"base: digits_teacher\ndata: {theirs}\n")
    recipe = recipes.load("digits", [f"method.teacher.recipe={tmp_path}/teacher.yaml", "data.flip=0.1", *overrides])
    (own,) = teachers.to_train(recipe).values()
    for name in (*DataSplits.model_fields, "synthetic_classes", "synthetic_samples"):
        assert getattr(own.data, name) == getattr(recipe.data, name)
    assert own.data.flip == 0.3  # how it is augmented is the teacher's own
    (tmp_path / "recipe.yaml").write_text(recipes.dump(own))
    assert recipes.load(str(tmp_path / "recipe.yaml")).data == own.data


def test_a_teacher_trained_here_is_computed_as_its_own_recipe_says():
    """The digits' teacher is a convolutional network, which has neither blocks nor a residual stream."""
    student = ["engine.checkpoint_blocks=true", "engine.precision=bf16", "engine.residual=bf16", "engine.log_every=7"]
    (own,) = teachers.to_train(recipes.load("digits", [*student, "engine.products=fp8"])).values()
    assert (own.engine.checkpoint_blocks, own.engine.residual) == (False, "fp32")
    assert own.engine.products == "precision"
    assert (own.engine.precision, own.engine.log_every) == ("bf16", 7)
    build.model(own, 10, print)
    (own,) = teachers.to_train(recipes.load("digits", ["engine.keep_activations=true"])).values()
    build.model(own, 10, print)


def test_a_teacher_sees_the_resolution_and_normalisation_it_was_trained_at(load, whole):
    recipe = load("model.image_size=64", "data.mean=[0.4, 0.4, 0.4]")
    teacher = build.teacher(*recipe.method.teachers(), (64, 64), 10, whole[0] / "teacher")
    assert (teacher.size, teacher.mean, teacher.std) == ((32, 32), (0.5,) * 3, (0.5,) * 3)


def test_a_run_as_a_teacher_beside_the_name_of_another_network_is_refused(load, whole):
    """`method.teacher.weights=RUN` leaves the name of the teacher that the recipe had."""
    config = TeacherConfig(timm="regnety_160", weights=str(whole[0] / "teacher"))
    with pytest.raises(UsageError, match=r"is of convnet_digits, but .*timm says timm:regnety_160; .*timm=null"):
        build.teacher(config, (32, 32), 10, None)


@pytest.mark.parametrize("weights", ["teacher", "metrics.jsonl", "nothing/there"])
def test_weights_that_do_not_fit_are_refused(load, whole, weights):
    recipe = load(f"model.weights={whole[0] / weights}")
    with pytest.raises(UsageError, match=weights):
        build.model(recipe, 10, print)


@pytest.mark.slow
def test_a_timm_model_is_trained_resumed_and_can_teach(load, whole, tmp_path):
    overrides = ["method.use=supervised", "model.timm=vit_tiny_patch16_224", "train.epochs=1", "data.repeats=1"]
    recipe, run = load(*overrides), tmp_path / "run" / "teacher"
    with pytest.raises(Interrupted):
        train(recipe, run, StopAt(2), resume=False)
    summary = train(recipe, run, World(torch.device("cpu")), resume=True)
    student = load("model.image_size=48")
    teacher = build.teacher(*student.method.teachers(), (48, 48), 10, run)
    world = World(torch.device("cpu"))
    held_out = build.eval_loader(recipe, build.sources(recipe)[1], world, {}, print)
    classify = {"teacher": Classify(lambda batch: {"class": teacher.logits(images(batch))})}
    found = evaluate(teacher.model, classify, held_out, None, world, "fp32")
    assert found.metrics["top1_class"] == pytest.approx(summary["top1_class"])


def test_micro_batches_change_nothing_but_rounding(load, whole, tmp_path):
    shutil.copytree(whole[0] / "teacher", tmp_path / "run" / "teacher")
    summary = train(load("train.accumulate=2"), tmp_path / "run", World(torch.device("cpu")), resume=False)
    assert summary["train_loss"] == pytest.approx(whole[1]["train_loss"], rel=2e-3)


class Shifted(Supervised):
    """A method with a buffer of its own, on which its answer depends."""

    def __init__(self, model, config, context):
        super().__init__(model, config, context)
        self.register_buffer("shift", torch.zeros(10))

    def after_step(self, engine):
        self.shift[3] = 1e6

    def predict(self, x):
        return {"class": super().predict(x)["class"] + self.shift}


def test_state_of_a_method_is_evaluated_with_it_and_the_best_is_on_disk(load, tmp_path, capsys):
    run = tmp_path / "run"
    shifted = load("method.use=tests.test_train:Shifted", "engine.checkpoint_every=2", "optim.ema_decay=null")
    summary = train(shifted, run, World(torch.device("cpu")), resume=False)
    # Always the same answer: a tenth is right, from the first evaluation on, which therefore stays the best.
    assert (summary["top1_class"], summary["best_step"]) == (10.0, STEPS_PER_EPOCH)
    assert (run / "checkpoints" / f"step_{STEPS_PER_EPOCH:08d}").is_dir()
    capsys.readouterr()
    assert cli(["eval", str(run)]) == 0
    assert "10.00 %" in capsys.readouterr().out


def test_a_damaged_checkpoint_of_weights_is_named(whole, tmp_path):
    run = shutil.copytree(whole[0], tmp_path / "run")
    (run / "checkpoints" / f"step_{TOTAL:08d}" / "model.safetensors").write_bytes(b"")
    (note,) = open_weights(str(run)).notes
    assert f"step_{TOTAL:08d}, which is damaged" in note


@pytest.mark.parametrize(("name", "lr", "state"), [("sgd", 0.05, "momentum_buffer"), ("lamb", 5e-3, "exp_avg")])
def test_another_optimizer_resumes_exactly(recipe_file, data, tmp_path, name, lr, state):
    """On the ConvNet that is the teacher elsewhere, with the optimizer's own defaults."""
    changes = [f"data.root={data}", f"optim.name={name}", f"optim.lr={lr}", "optim.ema_decay=0.9"]
    recipe = recipes.load(str(recipe_file.with_name("teacher.yaml")), changes)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(recipe, whole, World(torch.device("cpu")), resume=False)
    with pytest.raises(Interrupted):
        train(recipe, parts, StopAt(3), resume=False)
    train(recipe, parts, World(torch.device("cpu")), resume=True)
    assert_same_weights(whole, parts, STEPS_PER_EPOCH)
    assert any(key.startswith(f"{state}.") for key in tensors(whole, STEPS_PER_EPOCH)["optim.safetensors"])
