"""Runs and weights of somebody else: no code that they name is executed unless the user says so."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

import fastdeit
from fastdeit import plugins
from fastdeit.cli import main as cli
from fastdeit.errors import UsageError
from fastdeit.recipe import resolve as recipes
from fastdeit.recipe import sections
from fastdeit.run import directory
from fastdeit.run.settings import doubt
from fastdeit.run.weights import KNOWN, open_weights
from tests.faults.test_hostile import rewrite_manifest
from tests.painted_runs import RECIPE, refused

CODE = """
from pathlib import Path
Path(__file__).with_name("executed").touch()
def thing(root, split): raise ValueError("the code of the run")
"""
PATH = "downloaded_code:thing"
HOSTILE = {
    "model": lambda recipe: recipe["model"].update(name=PATH),
    "method": lambda recipe: recipe["method"].update(use=PATH),
    "optimizer": lambda recipe: recipe["optim"].update(name=PATH),
    "reader": lambda recipe: recipe["data"].update(source=PATH),
    "spaces around it": lambda recipe: recipe["method"].update(use=f" {PATH}"),
}


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    """As in a process of its own: nothing was said, read or trusted yet."""
    for name, value in (("_own", set()), ("_theirs", {}), ("_trusts_all", False)):
        monkeypatch.setattr(plugins, name, value)
    monkeypatch.delitem(sys.modules, "downloaded_code", raising=False)
    sections.optim_config.cache_clear()


@pytest.fixture
def downloaded(run, tmp_path, monkeypatch):
    """`downloaded(change)` -> a run with a module beside it that Python finds, and `change` made to its recipe."""
    (tmp_path / "downloaded_code.py").write_text(CODE)
    monkeypatch.syspath_prepend(tmp_path)

    def make(change):
        path = tmp_path / "run"
        shutil.copytree(run, path)
        for each in (path / "checkpoints").iterdir():
            rewrite_manifest(each, lambda manifest: change(manifest["state"]["recipe"]))
        return path

    return make


def executed(run):
    return run.with_name("executed").exists()


VERBS = {
    "eval": lambda run: ("eval", run),
    "eval of a checkpoint": lambda run: ("eval", next((run / "checkpoints").iterdir())),
    "eval of the average": lambda run: ("eval", f"{run}@ema"),
    "predict": lambda run: ("predict", run, run.parent / "x.png"),
    "attention": lambda run: ("show", "attention", run, run.parent / "x.png", "--out", run.parent / "out.png"),
    "export": lambda run: ("export", run, run.parent / "out.safetensors"),
    "data show": lambda run: ("data", "show", run, "--sample", "1", "--out", run.parent / "out.png"),
    "resume": lambda run: ("train", "--resume", run),
    "resume, dry": lambda run: ("train", "--resume", run, "--dry-run"),
    "fork": lambda run: ("train", "--from", run, "--run-dir", run.parent / "new"),
}
NOT_NEEDED = {("data show", "model"), *((verb, "reader") for verb in ("predict", "attention", "export"))}
DEFAULT = {*((verb, "method") for verb in VERBS), *(("eval", field) for field in HOSTILE), ("resume", "reader")}
CELLS = [
    pytest.param(verb, field, marks=[] if (verb, field) in DEFAULT else [pytest.mark.slow])
    for verb in VERBS
    for field in HOSTILE
]


@pytest.mark.parametrize(("verb", "field"), CELLS)
def test_code_that_a_run_names_is_not_executed(downloaded, capsys, verb, field):
    run = downloaded(HOSTILE[field])
    code = cli([str(word) for word in VERBS[verb](run)])
    error = capsys.readouterr().err
    assert not executed(run)
    assert "Traceback" not in error
    if (verb, field) not in NOT_NEEDED:
        assert code == 2
        assert all(part in error for part in (str(run), "names the", PATH, "add --trust"))


@pytest.mark.parametrize("field", [field for field in HOSTILE if field != "spaces around it"])
def test_with_trust_it_is(downloaded, data, capsys, field):
    """The canary sings, so the tests above prove something."""
    run = downloaded(HOSTILE[field])
    cli(["eval", str(run), f"data.root={data}", "--trust"])
    assert executed(run)
    assert "add --trust" not in capsys.readouterr().err


def with_header(run, **known):
    """A file of weights whose header says what is `known` of them."""
    path = run.parent / "weights.safetensors"
    (newest,) = (run / "checkpoints").glob("step_00000002")
    save_file(load_file(newest / "model.safetensors"), path, {KNOWN: json.dumps(known)})
    return path


def test_a_file_of_weights_is_no_better(downloaded, data, capsys):
    run = downloaded(lambda recipe: None)
    path = with_header(run, name=PATH, num_classes=3, classes=["a", "b", "c"], image_size=[16, 32])
    for verb in (["eval", path, "--data", data], ["predict", path, data / "val" / "red" / "0.png"]):
        assert f"{path} names the model '{PATH}'" in refused(capsys, *verb)
    with pytest.raises(plugins.Untrusted, match="names the model"):
        fastdeit.load(path)
    path = with_header(run, name="deit_digits_distilled_patch8_32", method=PATH)
    assert "whose code is not asked without --trust" in doubt(open_weights(str(path)))
    assert not executed(run)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda state: state["identity"].update(classes=[1, 2, 3]), "classes.0, classes.1, classes.2"),
        (lambda state: state["recipe"]["data"].update(mean=["x", 1, 2]), "mean.0"),
    ],
    ids=["classes", "mean"],
)
def test_what_a_checkpoint_says_of_its_network_is_of_the_right_kind(run, tmp_path, change, field):
    path = shutil.copytree(run, tmp_path / "run")
    for each in (path / "checkpoints").iterdir():
        rewrite_manifest(each, lambda manifest: change(manifest["state"]))
    with pytest.raises(UsageError, match=f"says of its network is damaged: {field}$"):
        open_weights(str(path))


def test_neither_is_a_teacher(downloaded, data, write, capsys):
    run = downloaded(HOSTILE["model"])
    own = write(RECIPE.replace("supervised}", f"distill, teacher: '{run}'}}"))
    for verb in (["train", own, "--run-dir", run.parent / "new"], ["cache", own], ["plan", own]):
        assert f"names the model '{PATH}'" in refused(capsys, *verb, f"data.root={data}")
    assert not executed(run)


def test_nor_the_recipe_of_a_teacher_that_a_run_names(downloaded, data, write, capsys):
    recipe = write(RECIPE.replace("supervised", f"'{PATH}'"), "teacher.yaml")
    teacher = {"use": "distill", "teacher": {"recipe": recipe}}
    run = downloaded(lambda plain: plain.update(method=teacher))
    assert f"teacher.yaml names the method '{PATH}'" in refused(capsys, "train", "--from", run, f"data.root={data}")
    assert not executed(run)


def test_the_recipe_beside_a_run_is_of_the_run(downloaded, capsys):
    run = downloaded(lambda recipe: None)
    (run / "recipe.yaml").write_text(RECIPE.replace("supervised", f"'{PATH}'"))
    with pytest.raises(plugins.Untrusted, match=r"recipe\.yaml names the method"):
        _ = fastdeit.Run(run).recipe
    shutil.move(run / "checkpoints", run / "teacher")
    (run / "teacher" / "checkpoints").mkdir()
    for each in run.glob("teacher/step_*"):
        shutil.move(each, run / "teacher" / "checkpoints")
    assert "recipe.yaml names the method" in refused(capsys, "train", "--resume", run)
    assert cli(["runs", "list", str(run.parent)]) == 0
    assert not executed(run)


def test_what_the_users_own_recipe_names_is_executed(downloaded, write, data, capsys):
    run = downloaded(HOSTILE["method"])
    own = write(RECIPE.replace("supervised", f"'{PATH}'"))
    assert "is not a method" in refused(capsys, "train", own, "--run-dir", run, "--resume", f"data.root={data}")
    assert executed(run)


def test_the_command_that_goes_on_says_trust(write):
    plain = recipes.load(write(RECIPE))
    assert "--trust" not in directory.command(Path("x"), trust=directory.names_code(plain))
    own = recipes.override(plain, ["model.name=tests.small_runs:Tiny"])
    assert directory.command(Path("x"), trust=directory.names_code(own)) == "`fastdeit train --resume x --trust`"
    teacher = write(RECIPE, "teacher.yaml")
    for name, expected in (("digits", False), (teacher, True)):
        distilled = ["method.use=distill", f"method.teacher={{recipe: {name}}}"]
        assert directory.names_code(recipes.override(plain, distilled)) is expected
