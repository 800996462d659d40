"""Numbers that no run can have, for every field that there is: refused in a sentence, before they take anything.

The fields are those of the models of pydantic, so a new one is in the table without being written here.
"""

import json
import os
import tracemalloc
from contextlib import contextmanager
from typing import get_args

import pytest
from annotated_types import Le, Lt

from fastdeit import cores, methods
from fastdeit.cli import main as cli
from fastdeit.engine.options import OPTIMIZERS
from fastdeit.errors import UsageError
from fastdeit.methods.config import METHODS
from fastdeit.recipe import resolve as recipes
from fastdeit.recipe import sections, yaml
from fastdeit.recipe.resolve import RecipeError
from fastdeit.run import build

RECIPE = """\
model: {name: deit_digits_patch8_32, image_size: 32}
method: {use: supervised}
data: {source: synthetic, synthetic_samples: 64, synthetic_classes: 4, group_size: 8, repeats: 1, threads: 1}
optim: {lr: 1e-3, warmup_epochs: 0}
train: {steps: 2, batch_size: 16}
engine: {device: cpu, threads: 1}
"""
VALUES = "-1", "1000000000000", "1e300", "1e-300", ".nan", "-.inf"
UNBOUNDED = {
    "train.epochs": "`build.run_length` refuses more steps than checkpoints have names",
    "train.steps": "the same",
    "train.accumulate": "divides the groups of a batch",
    "train.eval_every_steps": "later than the end of the run is at its end",
    "train.stop_after": "more evaluations than there are never come",
    "engine.log_every": "as train.eval_every_steps",
    "engine.keep_checkpoints": "no more are kept than there are",
    "data.group_size": "divides the batch",
    "data.repeats": "`build.run_length` refuses more than there are images",
}
"""Integers whose model says no largest value, and what holds them instead."""


def numeric(annotation):
    """The types of numbers in an annotation: int, float, both or none."""
    inner = {kind for part in get_args(annotation) for kind in numeric(part)}
    return inner | ({annotation} & {int, float})


def limits(metadata):
    """The largest values that metadata of a field, or of a type in `Annotated`, names."""
    return [each for item in metadata for each in (item, *getattr(item, "metadata", ())) if isinstance(each, Le | Lt)]


def bounded(annotation, metadata=()):
    """Whether every integer in an annotation has a largest value."""
    if limits(metadata) or limits(getattr(annotation, "__metadata__", ())):
        return True
    return annotation is not int and all(bounded(part) for part in get_args(annotation) if numeric(part))


def fields():
    """(path, the model's field, overrides that make the section have it) of every field with numbers."""
    models = [(name, model, ()) for name, model in sections.SECTIONS.items() if name not in ("method", "optim")]
    models += [("optim", sections.optim_config(name), (f"optim.name={name}",)) for name in OPTIMIZERS]
    models += [("method", methods.config(name), (f"method.use={name}",)) for name in METHODS]
    found = {}
    for section, model, others in models:
        for name, field in model.model_fields.items():
            if numeric(field.annotation):
                found.setdefault(f"{section}.{name}", (field, others))
    return found


FIELDS = fields()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    path = tmp_path_factory.mktemp("absurd") / "r.yaml"
    path.write_text(RECIPE)
    return str(path)


@pytest.mark.parametrize("value", VALUES)
def test_every_number_is_taken_or_refused_in_a_sentence(recipe, value):
    said = {}
    for path, (_, others) in FIELDS.items():
        with suppress_but_keep(said, path):
            recipes.load(recipe, [*others, f"{path}={value}"])
    assert len(said) > len(FIELDS) / 4
    for path, text in said.items():
        assert path.split(".")[0] in text
        assert len(text) < 1000


@contextmanager
def suppress_but_keep(said, path):
    """What a RecipeError of the block says goes to `said[path]`; any other error is raised."""
    try:
        yield
    except RecipeError as error:
        said[path] = str(error)


def test_every_integer_has_a_largest_value_or_a_reason_why_not():
    without = {path for path, (field, _) in FIELDS.items() if int in numeric(field.annotation)}
    without -= {path for path, (field, _) in FIELDS.items() if bounded(field.annotation, field.metadata)}
    assert without == set(UNBOUNDED)


ABSURD = {
    "data.threads=100000": "data.threads: must be at most 1024, got 100000",
    "engine.threads=100000": "engine.threads: must be at most 1024, got 100000",
    "data.synthetic_samples=1000000000000": "data.synthetic_samples: must be at most 20000000, got 1000000000000",
    "data.synthetic_classes=100000000": "data.synthetic_classes: must be at most 1000000, got 100000000",
    "model.num_classes=1000000": "model.num_classes is 1000000, but the data set has 4 classes",
    "model.image_size=100000": "model.image_size: must be at most 16384, got 100000",
    "data.eval_crop_ratio=1e-300": "data.eval_crop_ratio: must be at least 0.01, got 1e-300",
    "data.repeats=1000000000000": "data.repeats is 1000000000000, but there are 64 training images",
    "train.batch_size=1000000000000": "train.batch_size: must be at most 16777216, got 1000000000000",
    "train.batch_size=16777216": "the images of a micro-batch, 16,777,216 in a process, have 48.0 GiB, and",
    "train.steps=1000000000000": "train.steps makes 1,000,000,000,000 steps, and a run has at most 99,999,999, since",
    "data.group_size=1000000000000": "train.batch_size: must be a multiple of data.group_size (1000000000000), got 16",
}
"""Numbers that would take memory, threads or years, and what is said of them."""


@pytest.mark.parametrize("verb", ["train", "dry run"])
@pytest.mark.parametrize("words", ABSURD)
def test_nothing_is_taken_for_what_is_refused(recipe, monkeypatch, tmp_path, capsys, words, verb):
    monkeypatch.setattr(cores, "memory", lambda: 16 * 2**30)
    tracemalloc.start()
    try:
        options = ["--dry-run"] if verb == "dry run" else ["--run-dir", str(tmp_path / "run")]
        assert cli(["train", recipe, words, *options]) == 2
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    said = capsys.readouterr().err
    assert ABSURD[words] in said
    assert "Traceback" not in said
    assert len(said.splitlines()) == 1
    assert peak < 64 * 2**20
    assert not (tmp_path / "run").exists()


def test_a_micro_batch_is_what_has_to_fit_the_memory(recipe, monkeypatch):
    monkeypatch.setattr(cores, "memory", lambda: 3 * 32 * 32 * 8)
    found = recipes.load(recipe)
    with pytest.raises(Exception, match="16 in a process"):
        build.check_batch(found, 1)
    build.check_batch(found, 2)
    build.check_batch(recipes.load(recipe, ["train.accumulate=2"]), 1)
    build.check_batch(recipes.load(recipe, ["data.size_schedule=[[0, 16]]"]), 1)
    with pytest.raises(UsageError, match="8 in a process"):
        build.check_batch(recipes.load(recipe, ["data.size_schedule=[[0, 16], [1, 64]]"]), 2)


# ---- texts -----------------------------------------------------------------------------------------------------------

MANY = yaml.MAX_VALUES + 1
TEXTS = {
    "a flow list of 200 KB": (RECIPE + "about: [" + "1," * 100_000 + "1]\n", "has more than 25000 names and values"),
    "a list in a field": (
        RECIPE.replace("data: {", "data: {mean: [" + "1," * MANY + "], "),
        "has more than 25000 names",
    ),
    "15,000 unknown fields": (
        RECIPE + "".join(f"k{i}: 1\n" for i in range(15_000)),
        "has more than 25000 names and values",
    ),
    "2,000 unknown fields": (RECIPE + "".join(f"k{i}: 1\n" for i in range(2000)), "and 1950 more problems"),
    "2,000 anchors": (RECIPE + "".join(f"k{i}: &k{i} 1\n" for i in range(2000)), "and 3950 more problems"),
    "a name of 200 KB": (RECIPE.replace("supervised", "x" * 200_000), "method.use: no method named 'xxx"),
    "an import path of 200 KB": (RECIPE.replace("supervised", f"{'x' * 200_000}:y"), "method.use: method 'xxx"),
}


LONG = "a flow list of 200 KB", "a list in a field", "15,000 unknown fields"
"""It takes seconds to read these."""


@pytest.mark.parametrize("case", [pytest.param(case, marks=[pytest.mark.slow] * (case in LONG)) for case in TEXTS])
def test_long_texts_are_refused_in_few_words(tmp_path, case):
    text, words = TEXTS[case]
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(RecipeError) as raised:
        recipes.load(str(tmp_path / "r.yaml"))
    assert words in str(raised.value)
    assert len(str(raised.value)) < 60 * (yaml.MAX_TOLD if "name" in words or "import" in case else 150)
    assert len(str(raised.value).splitlines()) <= yaml.MAX_SHOWN + 1


def test_weights_of_as_many_classes_as_imagenet_21k_has_are_read(tmp_path):
    """Text that a run writes as its recipe.yaml is read again, too."""
    weights = ", ".join(["0.12345"] * 21_841)
    (tmp_path / "r.yaml").write_text(RECIPE.replace("supervised", f"supervised, class_weights: [{weights}]"))
    found = recipes.load(str(tmp_path / "r.yaml"))
    assert found.method.class_weights == (0.12345,) * 21_841
    assert len(recipes.dump(found)) < recipes.MAX_BYTES


def test_long_overrides_are_refused_in_few_words(recipe):
    for words in ("optim.lr=" + "[" * 100_000, ".".join(["a"] * 50_000) + "=1", "x" * 100_000, "a." * 100_000 + "=1"):
        with pytest.raises(RecipeError) as raised:
            recipes.load(recipe, [words])
        assert len(str(raised.value)) < 600


def test_overrides_that_clash_are_found_whichever_comes_first(recipe):
    for words in (
        ("optim.lr=1", "optim.lr=2"),
        ("data.views.a.flip=1", "data.views.a={}"),
        ("data.views={}", "data.views.a=1"),
    ):
        with pytest.raises(RecipeError, match="is given twice, also by"):
            recipes.load(recipe, words)


# ---- bases -----------------------------------------------------------------------------------------------------------

BASES = {
    "/etc/passwd": "must be the name of a recipe, or the path of a .yaml file",
    "../../etc/passwd": "must be the name of a recipe, or the path of a .yaml file",
    "/dev/zero": "must be the name of a recipe, or the path of a .yaml file",
    "..": "there is no recipe '..'",
    "./pipe.yaml": "is not a file",
    "./folder.yaml": "is not a file",
    "./r.yaml": "a recipe cannot be its own base",
    "../NAME/r.yaml": "a recipe cannot be its own base",
    "./other.yaml": "has a base itself; only one level is allowed",
    "./link.yaml": "a recipe cannot be its own base",
    "a/" * 500 + "x.yaml": "does not exist",
    "./nul\0.yaml": "must be Unicode text",
}


@pytest.mark.parametrize("base", BASES)
def test_what_a_base_cannot_be(tmp_path, base):
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "other.yaml").write_text("base: ./r.yaml\n")
    (tmp_path / "link.yaml").symlink_to("r.yaml")
    (tmp_path / "r.yaml").write_text(f"base: {json.dumps(base.replace('NAME', tmp_path.name))}\n{RECIPE}")
    with pytest.raises(RecipeError) as raised:
        recipes.load(str(tmp_path / "r.yaml"))
    assert BASES[base] in str(raised.value)


def test_a_base_may_lie_in_another_folder(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "base.yaml").write_text(RECIPE)
    for base in ("../base.yaml", str(tmp_path / "base.yaml")):
        (tmp_path / "mine" / "r.yaml").write_text(f"base: {base}\n")
        assert recipes.load(str(tmp_path / "mine" / "r.yaml")).train.steps == 2
