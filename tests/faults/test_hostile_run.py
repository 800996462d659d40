"""A run directory that somebody else has made: reading it ends, and going on with it writes nowhere else."""

import json
import os
import shutil
import signal
from functools import reduce
from pathlib import Path

import pytest
import torch

import fastdeit
from fastdeit.cli import main as cli
from fastdeit.data.bad import BadList
from fastdeit.data.sources.source import MachineError
from fastdeit.engine import metrics
from fastdeit.engine.dist import World
from fastdeit.errors import UsageError
from fastdeit.recipe import resolve as recipes
from fastdeit.run import directory, environment, fork, overview
from tests.faults.faulty import in_child

CPU = World(torch.device("cpu"))
ROW = {"kind": "eval", "step": 2, "epoch": 1.0, "seconds": 3.0, "top1_class": 50.0, "lower_is_better": []}
VALUES = [None, "x\ud800", [1], float("nan"), 10**400]
FILES = "metrics.jsonl", "summary.json", "environment.json", "recipe.yaml", "lock.json", "curves.png"
READERS = {
    "list": lambda run: cli(["runs", "list", str(run.parent)]),
    "diff": lambda run: cli(["runs", "diff", str(run), str(run)]),
    "time": lambda run: cli(["runs", "time", str(run), "--metric", "top1_class", "--target", "40"]),
    "curves": lambda run: cli(["runs", "curves", str(run), "--out", str(run.parent / "x.png")]),
    "Run": lambda run: (repr(fastdeit.Run(run)), fastdeit.Run(run)._repr_html_()),
    "environment": lambda run: environment.with_history({}, 3, environment.read(run / "environment.json")),
}


@pytest.fixture
def run(tmp_path):
    """`run(FILE=text, ...)` -> a run directory with these files, besides sound ones."""

    def make(**files):
        folder = tmp_path / "runs" / "run"
        folder.mkdir(parents=True, exist_ok=True)
        sound = {
            "recipe": "train: {epochs: 2}\n",
            "metrics": json.dumps(ROW) + "\n",
            "environment": "{}",
            "summary": "{}",
        }
        for name, text in (sound | files).items():
            (folder / next(file for file in FILES if file.startswith(name))).write_text(text)
        return folder

    return make


def hostile():
    """(which, files) of a run in which one value is of another kind."""
    for name in ROW:
        yield from ((f"{name} {value!r:.20}", {"metrics": json.dumps(ROW | {name: value}) + "\n"}) for value in VALUES)
    for name in ("best", "best_by", "finished", "paused_seconds", "lineage"):
        yield from ((f"{name} {value!r:.20}", {"summary": json.dumps({name: value})}) for value in VALUES)
    for name in ("step", "earlier", "python", "space"):
        yield from ((f"{name} {value!r:.20}", {"environment": json.dumps({name: value})}) for value in VALUES)
    for text in (
        "[1]",
        "train: 5",
        "train: [1]",
        "train: {epochs: [1], steps: x}",
        "model: x",
        "model: {name: [1]}",
        "5",
    ):
        yield text, {"recipe": text}


@pytest.mark.parametrize(
    "reader", ["list", *(pytest.param(name, marks=pytest.mark.slow) for name in ("diff", "time", "Run", "environment"))]
)
def test_values_of_another_kind_end_in_no_traceback(run, capsys, reader):
    for which, files in hostile():
        with_errors_of_ours(READERS[reader], run(**files), which)
        printed = capsys.readouterr()
        assert "Traceback" not in printed.err, (which, printed.err)
        assert (printed.out + printed.err).replace("\n", "").isprintable(), which


def test_aliases_of_aliases_are_not_followed(run):
    """Written out, it would be a list of 10**12 numbers."""
    lists = [f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 10)}]" for n in range(1, 12)]
    folder = run(recipe="\n".join(["x0: &x0 [1]", *lists]))
    assert overview.read(folder).recipe == {}
    assert READERS["diff"](folder) == 0


def with_errors_of_ours(read, folder, which):
    try:
        read(folder)
    except UsageError:
        pass
    except Exception as error:
        raise AssertionError(which) from error


ENDLESS = {
    "pipe": os.mkfifo,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "sparse": lambda path: (path.touch(), os.truncate(path, 1 << 40)),
    "folder": Path.mkdir,
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_what_is_no_file_is_not_waited_for(run, kind):
    folder = run()

    def look():
        signal.alarm(20)  # ends the child if something is waited for
        for file in FILES:
            (folder / file).unlink(missing_ok=True)
            ENDLESS[kind](folder / file)
            for name, read in READERS.items():
                with_errors_of_ours(read, folder, (file, name))

    assert in_child(look) == 0


def test_a_log_of_metrics_without_end_is_refused(run):
    folder = run()
    os.truncate(folder / "metrics.jsonl", 1 << 40)
    with pytest.raises(metrics.MetricsError, match=r"metrics\.jsonl is no log of metrics: it has more than 512 MiB"):
        metrics.read(folder / "metrics.jsonl")
    with pytest.raises(UsageError, match="it has more than 512 MiB; move it away"):
        overview.read(folder)
    with pytest.raises(metrics.MetricsError, match="it has more than 512 MiB; move it away"):
        directory.check_free(folder, resume=True)  # what a dry run asks


def test_a_run_that_cannot_be_read_hides_no_other(run, capsys, caplog):
    folder = run()
    shutil.copytree(folder, folder.parent / "another")
    os.truncate(folder / "metrics.jsonl", 1 << 40)
    assert READERS["list"](folder) == 0
    assert "\nanother " in capsys.readouterr().out
    assert "run/metrics.jsonl is no log of metrics: it has more than 512 MiB" in caplog.text


def test_a_list_of_bad_images_may_be_long_and_is_not_without_end(tmp_path):
    """A hundredth of ImageNet-21k are more than a hundred thousand lines."""
    lines = {"split": "val", "index": 5, "path": "x" * 1000, "reason": "y" * 1000}
    (tmp_path / "bad_images.jsonl").write_text(10_000 * (json.dumps(lines) + "\n"))
    known = BadList("val")
    known.keep_in(tmp_path)
    assert known.entries() == [("x" * 1000, "y" * 1000)]
    os.truncate(tmp_path / "bad_images.jsonl", 1 << 40)
    with pytest.raises(MachineError, match="cannot be kept: it has more than 512 MiB"):
        BadList("train").keep_in(tmp_path)


@pytest.mark.parametrize("field", ["data.root", "train.best_by", "model.weights", "method.teacher.weights"])
def test_a_line_break_in_a_recipe_is_refused_by_whoever_begins_and_by_whoever_reads(tmp_path, field):
    """A start that takes what no resume takes would cost a run."""
    sound = recipes.load("digits", ["data.source=folder", "data.root=x", "method.teacher={timm: resnet18}"])
    plain = sound.model_dump(mode="json")
    *parents, last = field.split(".")
    reduce(dict.get, parents, plain)[last] = "a\nfastdeit: all is well"
    (tmp_path / "my.yaml").write_text(json.dumps({name: part for name, part in plain.items() if name != "name"}))
    told = f"{field}.*has a line break; a text of a recipe is one line"
    with pytest.raises(recipes.RecipeError, match=told) as begun:
        recipes.load(tmp_path / "my.yaml")
    with pytest.raises(UsageError, match=told) as read:
        directory.checked_recipe(plain, tmp_path)
    assert all(str(error.value).isprintable() for error in (begun, read))


def test_line_breaks_in_what_is_of_a_method_of_somebody_else_are_theirs(tmp_path):
    recipe = recipes.load("digits_teacher", ['method={use: "tests.plugins.cached:CachedLogits", store: "a\\nb"}'])
    assert recipe.method.store == "a\nb"
    assert directory.checked_recipe(recipe.model_dump(mode="json"), tmp_path) == recipe


FOLDERS = ["teacher", "teacher_2", "tensorboard", "wandb"]
LINKED = [*sorted(directory._WRITTEN), ".tmp-recipe.yaml", *FOLDERS]


@pytest.mark.parametrize("name", LINKED)
@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_a_run_writes_through_no_link(tmp_path, name, kind):
    outside, run = tmp_path / "outside", tmp_path / "run"
    run.mkdir()
    outside.mkdir() if name in FOLDERS else outside.write_text("mine")
    (run / name).symlink_to(outside) if kind == "link" else os.mkfifo(run / name)
    with (
        pytest.raises(UsageError, match=f"{name} is a link, or not what a run has under this name"),
        directory.claim(run, "x", CPU, print, resume=True),
    ):
        pass
    assert os.listdir(run) == [name]
    assert os.listdir(outside) == [] if outside.is_dir() else outside.read_text() == "mine"


def test_checkpoints_and_what_is_the_users_may_be_links(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("checkpoints", "notes"):
        (tmp_path / f"my_{name}").mkdir()
        (run / name).symlink_to(tmp_path / f"my_{name}")
    with directory.claim(run, "x", CPU, print, resume=True):
        pass


def test_checkpoints_that_lead_nowhere_are_refused(tmp_path):
    """A disk that is not mounted: the run on it would begin anew, and lose its place at its first checkpoint."""
    (tmp_path / "checkpoints").symlink_to(tmp_path / "elsewhere")
    for check in (
        lambda: directory.check_free(tmp_path, resume=True),
        directory.claim(tmp_path, "x", CPU, print, resume=True).__enter__,
    ):
        with pytest.raises(UsageError, match="checkpoints is no folder, or a link that leads to none; mount its disk"):
            check()
    assert os.listdir(tmp_path) == ["checkpoints"]


def test_a_fork_copies_of_a_teacher_what_is_of_its_run(tmp_path):
    teacher = tmp_path / "teacher"
    (tmp_path / "elsewhere" / "step_00000001").mkdir(parents=True)
    teacher.mkdir()
    (teacher / "checkpoints").symlink_to(tmp_path / "elsewhere")
    (teacher / "recipe.yaml").write_text("x")
    (teacher / "secret").symlink_to("/etc/hostname")
    (teacher / "again").symlink_to(".")
    os.mkfifo(teacher / "pipe")
    origin = fork.Origin(tmp_path, tmp_path, 1, {}, None)
    origin.copy_teacher(teacher, tmp_path / "copy", lambda text: None)
    assert sorted(os.listdir(tmp_path / "copy")) == ["checkpoints", "recipe.yaml"]
    assert os.listdir(tmp_path / "copy" / "checkpoints") == ["step_00000001"]
