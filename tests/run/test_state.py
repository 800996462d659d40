"""Checkpoints that verify but do not fit: of another version, or with something missing, renamed or of another kind.

`checkpoints/schema_N` has one of every schema. `Tiny` of `tests.small_runs` made it, stopped after 2 of 6 steps.
"""

import copy
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastdeit import plugins
from fastdeit.cli import main as cli
from fastdeit.engine import checkpoint
from fastdeit.engine.dist import World
from fastdeit.errors import Interrupted, UsageError
from fastdeit.recipe import resolve as recipes
from fastdeit.run import directory, environment
from fastdeit.run.saver import present
from fastdeit.run.state import SCHEMA, checked
from fastdeit.training import Parts, train
from tests.small_runs import StopAt

CPU = World(torch.device("cpu"))
KEPT = Path(__file__).with_name("checkpoints")
TOTAL = 6


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plugins.trust("tests.small_runs:Tiny")


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


def test_a_run_from_before_a_field_goes_on_as_it_began():
    """What rounds otherwise than the default of today."""
    plain = checkpoint.load(KEPT / f"schema_{SCHEMA}" / "step_00000002", tensors=False).state
    for name in ("autotune", "keep_activations"):
        del plain["recipe"]["engine"][name]
    with_state(plain)
    engine = directory.recipe_of(Path("run")).engine
    assert (engine.autotune, engine.keep_activations) == ("off", False)


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
    clock = plain["record"]["clock"]
    for name in clock:
        without = {key: value for key, value in clock.items() if key != name}
        for how, changed in (("missing", without), ("not finite", clock | {name: math.nan})):
            yield f"clock {name} {how}", plain | {"record": plain["record"] | {"clock": changed}}
    yield "seconds that are not finite", plain | {"record": plain["record"] | {"seconds": math.inf}}
    yield "other steps", plain | {"steps": 7}
    yield "other steps an epoch", plain | {"steps_per_epoch": 2}
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


EVALUATED = {"recipe missing", "identity missing", "identity.classes missing", "nothing"}
"""Of these, also `eval` wants something."""


def unfit():
    """The variants that do not fit; those whose recipe or phase does not fit are found further on."""
    plain = checkpoint.load(KEPT / f"schema_{SCHEMA}" / "step_00000002", tensors=False).state
    found = {what: state for what, state in variants(plain) if what.removesuffix(" missing") not in OPTIONAL}
    assert len(found) > 60
    return found


LATER = {"a phase that is none", "a field of a recipe renamed", "a model that is gone"}
GOING_ON = {"other steps", "other steps an epoch"}
"""A fork may have other steps."""


def test_a_state_that_does_not_fit_is_refused_in_a_sentence():
    for what, state in unfit().items():
        if what not in LATER | GOING_ON:
            with pytest.raises(UsageError, match=r"^run (is intact, but not|has schema) [^\n]*$"):
                checked(state, Path("run"))


@pytest.mark.parametrize(
    "some",
    [
        pytest.param(LATER | EVALUATED | {"other steps"}, id="some"),
        pytest.param(None, id="all", marks=pytest.mark.slow),
    ],
)
def test_a_state_that_does_not_fit_ends_a_command_in_a_sentence(capfd, some):
    for what, state in unfit().items():
        if some is None or what in some:
            with_state(state)
            commands = [["train", "--resume", "run"], ["train", "--from", "run", "train.epochs=3"]]
            commands = commands[:1] if what in GOING_ON else commands
            for words in [*commands, *([["eval", "run"]] if what in EVALUATED else [])]:
                assert cli(words) == 2, (what, words, capfd.readouterr())
                err = capfd.readouterr().err
                assert err.startswith("fastdeit: "), (what, words, err)
                assert "Traceback" not in err, (what, words)
                assert err.count("\n") <= 3, (what, words, err)


def test_a_schema_of_the_future_names_its_version():
    with pytest.raises(
        UsageError, match=r"run has schema 7, and this version of fastdeit \(\S+\) reads 0 to .*, 9\.9$"
    ):
        checked({"schema": 7, "versions": {"fastdeit": "9.9"}}, Path("run"))


# ---- the tensors -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saver():
    """A saver of the run by which the checkpoints were made."""
    plugins.trust("tests.small_runs:Tiny")  # a fixture of a module is made before `here`
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
                if name != "sum.steps":  # without which the others are no means
                    forms.pop("gone")  # a run that has logged nothing has no sums
                forms.pop("wider")  # the sums of two processes
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


def test_a_checkpoint_of_a_step_beyond_the_run_is_refused(capfd):
    """As one of a longer run that was moved here."""
    folder = run_of(SCHEMA) / "checkpoints" / "step_00000002"
    manifest = json.loads((folder / "manifest.json").read_bytes())
    (folder / "manifest.json").write_bytes(checkpoint._encode(manifest | {"step": 1000}))
    folder.rename(folder.with_name("step_00001000"))
    assert cli(["train", "--resume", "run"]) == 2
    assert re.search(
        r"^fastdeit: \S+/step_00001000 was saved at step 1000 of 6, 3 an epoch, but this", capfd.readouterr().err
    )


def poisoned(tensors):
    """(what was done, which tensor the message has to name, the tensors): each with one number that is not finite."""
    for file, group in tensors.items():
        for name, tensor in group.items():
            if file != "engine":
                changed = tensor.clone()
                changed.view(-1)[-1] = math.nan
                yield f"{name} of {file}", tensors | {file: group | {name: changed}}


def test_a_checkpoint_with_a_number_that_is_not_finite_is_refused_by_name(saver, capfd):
    """The first versions saved such."""
    found = present(checkpoint.load(KEPT / f"schema_{SCHEMA}" / "step_00000002"))
    cases = list(poisoned(found.tensors))
    for named, tensors in cases:
        saver.load(replace(found, tensors=tensors))
        with pytest.raises(UsageError, match=f"step_00000002 cannot be gone on with: {re.escape(named)} has numbers"):
            saver.check_finite(found)
    assert len(cases) > 20
    root, (_, tensors) = run_of(SCHEMA) / "checkpoints", cases[0]
    shutil.rmtree(root / "step_00000002")
    checkpoint.save(root, 2, tensors, found.state)
    for words in (["--resume", "run"], ["--from", "run", "train.epochs=3"]):
        assert cli(["train", *words]) == 2
        assert "Move it away, and the run goes on from the checkpoint before it" in capfd.readouterr().err
    assert checkpoint.steps(root) == [2]


# ---- other settings, processes and versions --------------------------------------------------------------------------

CHANGED = {
    "engine.precision=bf16": {"engine.precision": ["fp32", "bf16"]},
    "engine.precision=fp16": {"engine.precision": ["fp32", "fp16"]},
    "engine.threads=2": {"engine.threads": [1, 2]},
    "engine.capture=compile": {"engine.capture": ["none", "compile"]},
    "engine.autotune=off": {"engine.autotune": ["auto", "off"]},
    "engine.log_every=1": {},
    "engine.keep_checkpoints=3": {},
}


def restored(recipe, run, world=CPU):
    """(what was said, the saver) of a run that goes on by this recipe."""
    said, saver = [], Parts.of(recipe, world, True, {}).saver
    step, record = saver.restore(run, said.append)
    assert (step, record.phase) == (2, "train")
    return said, saver


@pytest.mark.parametrize(
    "override", [pytest.param(name, marks=[pytest.mark.slow] * ("compile" in name)) for name in CHANGED]
)
def test_what_changes_the_numbers_of_a_run_is_said_and_remembered(override):
    run = run_of(SCHEMA)
    with_state(checkpoint.newest_state(run / "checkpoints") | {"versions": environment.versions()})
    said, saver = restored(recipes.override(directory.recipe_of(run), [override]), run)
    (fields,) = [change["fields"] for change in saver.changes] or [{}]
    assert fields == CHANGED[override]
    for name, (old, new) in fields.items():
        assert said[0].startswith("from step 2 on the numbers of this run may differ, if only by rounding: ")
        assert f"{name} {new} (before: {old})" in said[0]
    fresh = ["fp16 begins with a fresh loss scale of 65536"] if override.endswith("fp16") else []
    assert said[len(fields) :] == fresh


def test_other_versions_and_another_number_of_processes_are_said():
    run = run_of(SCHEMA)
    there = environment.versions() | {"torch": "1.13"}
    with_state(checkpoint.newest_state(run / "checkpoints") | {"versions": there, "world": 4})
    said, saver = restored(directory.recipe_of(run), run)
    versions = {"torch": ["1.13", environment.versions()["torch"]]}
    assert saver.changes == [{"step": 2, "fields": versions | {"processes": [4, 1]}}]
    assert "processes 1 (before: 4)" in said[0]


def test_changes_and_environments_stay_known_through_all_resumes():
    run = run_of(SCHEMA)
    recipe = directory.recipe_of(run)
    for step, precision in ((3, "bf16"), (4, "fp16"), (5, "fp16")):
        with pytest.raises(Interrupted):
            train(recipes.override(recipe, [f"engine.precision={precision}"]), run, StopAt(1), resume=True)
        assert checkpoint.steps(run / "checkpoints")[-1] == step
    state = checkpoint.newest_state(run / "checkpoints")
    named = [(change["step"], change["fields"].get("engine.precision")) for change in state["changes"]]
    assert [(step, change) for step, change in named if change] == [(2, ["fp32", "bf16"]), (3, ["bf16", "fp16"])]
    assert state["world"] == 1
    assert state["versions"] == environment.versions()
    found = json.loads((run / "environment.json").read_text())
    assert [found["step"], *(each["step"] for each in found["earlier"])] == [4, 2, 3]
    assert all(each["torch"] == found["torch"] and "earlier" not in each for each in found["earlier"])


def test_the_history_of_environments_is_that_of_the_steps_that_are_left():
    first = environment.with_history({"torch": "1"}, 0, None)
    second = environment.with_history({"torch": "2"}, 8, first)
    again = environment.with_history({"torch": "2", "kernels": 1}, 8, second)
    assert again == {"torch": "2", "kernels": 1, "step": 8, "earlier": [{"torch": "1", "step": 0}]}
    back = environment.with_history({"torch": "3"}, 4, again)
    assert back == {"torch": "3", "step": 4, "earlier": [{"torch": "1", "step": 0}]}
    assert environment.with_history({}, 3, {"torch": "of an earlier version"})["earlier"] == [
        {"torch": "of an earlier version"}
    ]
