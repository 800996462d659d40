"""fastdeit in Python: a run from start to table, what is refused, and what an import costs."""

import shutil
from pathlib import Path

import pytest
import torch

import fastdeit
from fastdeit import api, cores
from fastdeit.errors import UsageError
from fastdeit.recipe import resolve as recipes
from fastdeit.run import threads

SMALL = {
    "data.source": "folder",
    "data.repeats": 1,
    "train.epochs": 2,
    "train.batch_size": 64,
    "train.eval_every": 1,
    "optim.warmup_epochs": 0,
    "engine.device": "cpu",
    "engine.log_every": 3,
}


@pytest.fixture(scope="module")
def run(few_digits, curves, tmp_path_factory):
    """A run of two epochs of six steps."""
    overrides = SMALL | {"data.root": str(few_digits), "data.mean": (0.5, 0.5, 0.5), "optim.clip_grad": None}
    return api.train("digits_teacher", overrides, run_dir=tmp_path_factory.mktemp("runs") / "<one>")


def test_a_run_tells_what_it_was(run):
    assert (run.state, run.recipe.train.epochs, run.recipe.engine.threads) == ("finished", 2, 1)
    assert (run.recipe.name, run.recipe.data.mean) == ("digits_teacher", (0.5, 0.5, 0.5))
    assert run.summary["steps"] == 12
    assert run.metrics["top1_class"] == run.history[-1]["top1_class"] == run.summary["top1_class"]
    measured = f"top1_class {run.metrics['top1_class']:.4g}, top5_class {run.metrics['top5_class']:.4g}"
    assert repr(run) == f"Run({str(run.path)!r}): finished, step 12, {measured}"


def test_the_history_is_a_table(run):
    assert [(record["step"], record["epoch"]) for record in run.history] == [(6, 1.0), (12, 2.0)]
    assert run.history.columns == ["step", "epoch", "seconds", "images", "bad_images", "top1_class", "top5_class"]
    assert [record["step"] for record in run.training] == [3, 6, 9, 12]
    assert {"loss", "lr", "images_per_second"} <= set(run.training.columns)
    uneven = api.History([{"a": 1, "b": 0.123456789}, {"a": 2, "c": "<x>"}])
    assert uneven._repr_html_() == (
        "<table><tr><th>a</th><th>b</th><th>c</th></tr><tr><td>1</td><td>0.12346</td><td></td></tr>"
        "<tr><td>2</td><td></td><td>&lt;x&gt;</td></tr></table>"
    )


def test_a_notebook_shows_state_metrics_and_curves(run):
    shown = run._repr_html_()
    assert shown.startswith("<b>") and "&lt;one&gt;" in shown  # noqa: PT018
    assert "<td>state</td><td>finished</td>" in shown
    assert "data:image/png;base64,iVBOR" in shown


def test_a_run_goes_on_and_is_not_overwritten(run, few_digits):
    with pytest.raises(UsageError, match="already holds a run"):
        api.train("digits_teacher", run_dir=run.path)
    again = api.train(run.recipe, run_dir=run.path, resume=True)
    assert again.history == run.history


def test_new_runs_get_directories_of_their_own(monkeypatch, tmp_path):
    """Training makes them, in one step, so that two processes cannot choose the same."""
    monkeypatch.setattr(
        api.training, "alone", lambda recipe, path, resume, began: {"run_dir": f"where it is, not {path}"}
    )
    monkeypatch.setattr(api, "Run", str)
    assert api.train("digits", ["train.epochs=3"]) == "where it is, not None"


def test_a_run_that_goes_on_keeps_its_threads(run, monkeypatch):
    monkeypatch.delenv(threads.VARIABLE, raising=False)
    monkeypatch.setattr(cores, "available", lambda: 7)
    given = []
    monkeypatch.setattr(
        api.training, "train", lambda recipe, path, world, resume, began: given.append(recipe) or {"run_dir": str(path)}
    )
    path = Path(shutil.copytree(run.path, run.path.parent / "copy"))
    api.train("digits_teacher", {"engine.threads": None}, run_dir=path, resume=True)
    assert given[0].engine.threads == run.recipe.engine.threads == 1


def test_going_on_needs_a_directory(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="goes on with the run in run_dir; say which"):
        api.train("digits", resume=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("recipe", "overrides", "message"),
    [
        ("digit", {}, "there is no recipe 'digit'; did you mean digits"),
        ("digits", {"train.epochs": -1}, "train.epochs: must be at least 1, got -1"),
        ("digits", ["epochs=3"], "did you mean train.epochs?"),
        ("digits", {"wd": 0.1}, "did you mean optim.weight_decay=0.1?"),
        ("deit_base_384", {"data.source": "synthetic"}, "model.weights: is required"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_anything_is_made(monkeypatch, tmp_path, recipe, overrides, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(recipes.RecipeError) as refused:
        api.train(recipe, overrides)
    assert message in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match="does not exist"):
        api.Run(tmp_path / "x")


def test_overrides_are_written_as_yaml():
    given = {"a.b": None, "c.d": (1, 2), "e.f": "x: #y", "g.h": True, "i.j": 1e-3, "k": Path("/l")}
    assert api.written(given) == ["a.b=null", "c.d=[1, 2]", 'e.f="x: #y"', "g.h=true", "i.j=0.001", 'k="/l"']
    with pytest.raises(UsageError, match=r"optim\.lr: a recipe has no complex such as 1j"):
        api.written({"optim.lr": 1j})


# ---- weights ---------------------------------------------------------------------------------------------------------


def test_a_run_gives_its_network_and_evaluates_it(run):
    images = torch.zeros(2, 3, 32, 32)
    network = run.model("best")
    assert not network.training
    assert torch.equal(network(images), api.load(f"{run.path}@best")(images))
    assert api.load(run.path, num_classes=3)(images).shape == (2, 3)
    assert run.evaluate()["top1_class"] == pytest.approx(run.metrics["top1_class"])
    assert run.evaluate({"data.eval_crop_ratio": 0.5}) != run.evaluate()


# ---- the package -----------------------------------------------------------------------------------------------------


def test_the_front_of_the_package_is_imported_when_it_is_asked_for():
    assert {"train", "load", "Run", "__version__"} <= set(dir(fastdeit))
    assert (fastdeit.train, fastdeit.load, fastdeit.Run) == (api.train, api.load, api.Run)
    with pytest.raises(AttributeError, match="has no attribute 'trian'"):
        fastdeit.trian  # noqa: B018


@pytest.mark.slow
def test_a_notebook_trains_and_shows_a_run(few_digits, tmp_path):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    overrides = SMALL | {"data.root": str(few_digits)}
    cells = [
        "import fastdeit",
        f"run = fastdeit.train('digits_teacher', {overrides!r}, run_dir='one')",
        "run",
        "run.history",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [cell.outputs[-1]["data"]["text/html"] for cell in notebook.cells[2:]]
    assert "<td>finished</td>" in shown[0]
    assert "<th>top1_class</th>" in shown[1]
    assert (tmp_path / "one" / "summary.json").exists()
