"""Checkpoints that verify but do not fit: of another version, or with something missing, renamed or of another kind.

`checkpoints/schema_N` has one of every schema. `Tiny` of `tests.small_runs` made it, stopped after 2 of 6 steps.
"""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastdeit.cli import main as cli
from fastdeit.engine import checkpoint, report
from fastdeit.engine.dist import World
from fastdeit.errors import UsageError
from fastdeit.run import directory
from fastdeit.run.saver import present
from fastdeit.run.state import SCHEMA, checked
from fastdeit.training import Parts, train

CPU = World(torch.device("cpu"))
KEPT = Path(__file__).with_name("checkpoints")
TOTAL = 6


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(report, "curves", lambda metrics, out: None)


def run_of(schema):
    """A run whose only checkpoint is the one that is kept of this schema."""
    shutil.copytree(KEPT / f"schema_{schema}", "run/checkpoints")
    return Path("run")


# ---- earlier versions ------------------------------------------------------------------------------------------------


def test_one_checkpoint_of_every_schema_is_kept():
    assert sorted(path.name for path in KEPT.iterdir()) == [f"schema_{number}" for number in range(SCHEMA + 1)]
    newest = checkpoint.load(KEPT / f"schema_{SCHEMA}" / "step_00000002")
    assert newest.state["schema"] == SCHEMA
    assert checked(newest.state, newest.path) == newest.state


@pytest.mark.parametrize("schema", range(SCHEMA + 1))
def test_a_checkpoint_of_every_schema_is_gone_on_with(schema, capsys):
    run = run_of(schema)
    train(directory.recipe_of(run), run, CPU, resume=True)
    assert "resumed at step 2 of 6" in capsys.readouterr().out
    assert checkpoint.newest_state(run / "checkpoints")["schema"] == SCHEMA
    found = checkpoint.load(run / "checkpoints" / "step_00000006").tensors
    assert found["optim"]["step.model.head.weight"].item() == TOTAL
    assert found["engine"]["seen"].item() == (4 if schema == 0 else 6)


# ---- the state -------------------------------------------------------------------------------------------------------


def variants(plain):
    """(what was done, the state): each field of two levels missing, renamed, of another type, and more."""
    fields = [(key,) for key in plain] + [(key, inner) for key in ("identity", "record") for inner in plain[key]]
    for path in fields:
        for how in ("missing", "renamed", "of another type"):
            changed = copy.deepcopy(plain)
            place = changed
            for key in path[:-1]:
                place = place[key]
            value = place.pop(path[-1])
            if how == "renamed":
                place[f"old_{path[-1]}"] = value
            elif how == "of another type":
                place[path[-1]] = {"a": 1} if isinstance(value, list) else [[value]]
            yield f"{'.'.join(path)} {how}", changed
    yield "a schema of the future", plain | {"schema": SCHEMA + 1, "versions": {"fastdeit": "9.9"}}
    yield "a schema that is none", plain | {"schema": -1}
    yield "a phase that is none", plain | {"record": plain["record"] | {"phase": "gone"}}
    recipe = plain["recipe"]
    yield "a field of a recipe renamed", plain | {"recipe": recipe | {"train": recipe["train"] | {"batches": 3}}}
    yield "a model that is gone", plain | {"recipe": recipe | {"model": recipe["model"] | {"name": "gone_vit"}}}
    yield "nothing", {}


def with_state(state):
    """The run whose checkpoint has this state, and is intact."""
    shutil.rmtree("run", ignore_errors=True)
    folder = run_of(SCHEMA) / "checkpoints" / "step_00000002"
    manifest = json.loads((folder / "manifest.json").read_bytes())
    (folder / "manifest.json").write_bytes(checkpoint._encode(manifest | {"state": state}))


OPTIONAL = {"schema", *(f"record.{name}" for name in ("best", "best_by", "metrics", "kernels", "clock", "images"))}
OPTIONAL |= {f"record.{name}" for name in ("evaluated_step", "best_step", "evaluations_since_best", "train_loss")}
OPTIONAL |= {"record.teacher_top1", "record.seconds", "record.waited"}


def test_a_state_that_does_not_fit_ends_in_a_sentence(capfd):
    plain = checkpoint.load(KEPT / f"schema_{SCHEMA}" / "step_00000002", tensors=False).state
    checked_ones = 0
    for what, state in variants(plain):
        name, _, how = what.partition(" ")
        if how == "missing" and name in OPTIONAL:
            continue
        with_state(state)
        for words in (["train", "--resume", "run"], ["train", "--from", "run", "train.epochs=3"], ["eval", "run"]):
            if words[0] == "eval" and what not in EVALUATED:
                continue
            assert cli(words) == 2, (what, words, capfd.readouterr())
            err = capfd.readouterr().err
            assert err.startswith("fastdeit: "), (what, words, err)
            assert "Traceback" not in err, (what, words)
            assert err.count("\n") <= 3, (what, words, err)
        checked_ones += 1
    assert checked_ones > 60


EVALUATED = {"recipe missing", "identity missing", "identity.classes missing", "nothing"}
"""Of these, also `eval` wants something."""


def test_a_schema_of_the_future_names_its_version():
    with pytest.raises(
        UsageError, match=r"run has schema 7, and this version of fastdeit \(\S+\) reads 0 to .*, 9\.9$"
    ):
        checked({"schema": 7, "versions": {"fastdeit": "9.9"}}, Path("run"))


# ---- the tensors -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saver():
    """A saver of the run by which the checkpoints were made."""
    state = checkpoint.load(KEPT / f"schema_{SCHEMA}" / "step_00000002", tensors=False).state
    return Parts.of(directory.checked_recipe(state["recipe"], KEPT), CPU, True, {}).saver


def harmed(tensors):
    """(what was done, which tensor the message has to name, the tensors)."""
    for file, group in tensors.items():
        yield f"no {file}", f"has no {file}.safetensors", {key: value for key, value in tensors.items() if key != file}
        yield f"{file}: one too many", "surplus", tensors | {file: group | {"surplus": torch.ones(1)}}
        for name, tensor in group.items():
            others = {key: value for key, value in group.items() if key != name}
            wide = tensor.expand(2, *tensor.shape).contiguous() if tensor.dim() else tensor.reshape(1)
            forms = {
                "gone": others,
                "renamed": others | {f"old_{name}": tensor},
                "wider": group | {name: wide},
                "a part": group | {name: tensor.flatten()[:1].clone() if tensor.numel() > 1 else tensor.reshape(1, 1)},
                "float64": group | {name: tensor.double()},
                "integer": group | {name: tensor.int()},
            }
            if tensor.dim() == 2:
                forms["a row, which could be broadcast"] = group | {name: tensor[0].clone()}
                forms["turned"] = group | {name: tensor.t().contiguous()}
            if file == "engine" and name.startswith("sum."):
                forms.pop("gone")  # a run that has logged nothing has no sums
            for how, changed in forms.items():
                yield f"{file}.{name} {how}", name, tensors | {file: changed}


@pytest.mark.parametrize("schema", range(SCHEMA + 1))
def test_tensors_that_do_not_fit_are_named_and_nothing_is_broadcast(saver, schema):
    found = present(checkpoint.load(KEPT / f"schema_{schema}" / "step_00000002"))
    saver.load(found)
    cases = list(harmed(found.tensors))
    for what, named, tensors in cases:
        with pytest.raises(UsageError) as error:
            saver.load(replace(found, tensors=tensors))
        assert named in str(error.value), what
        assert str(error.value).startswith(f"{found.path} does not fit, in phase "), what
    assert len(cases) > 150
