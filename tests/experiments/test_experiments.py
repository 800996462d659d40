"""The table of claims and experiments, and an experiment in small: trained, resumed, written down."""

import json
import math
import re
from dataclasses import replace
from itertools import chain
from pathlib import Path

import pytest

from fastdeit import cli, training
from fastdeit.data.sources import digits
from fastdeit.data.sources.source import DataError
from fastdeit.errors import Interrupted, UsageError
from fastdeit.experiments import command, page, probes, rows, runner
from fastdeit.experiments.claims import CLAIMS
from fastdeit.experiments.experiment import Expectation, Experiment, Term, Variant
from fastdeit.experiments.halves import open_half
from fastdeit.experiments.table import EXPERIMENTS
from fastdeit.recipe.resolve import RecipeError
from fastdeit.run import directory

ROOT = Path(__file__).parent.parent.parent
PAGES = ROOT / "docs" / "experiments"
NUMBERS = {4, 5, 8, 9, 10, *range(12, 23), 26, 28}


# ---- tables ----------------------------------------------------------------------------------------------------------


def test_every_claim_is_there_once_and_checked():
    assert [claim.number for claim in CLAIMS] == sorted(NUMBERS)
    tried = set(chain.from_iterable(experiment.claims for experiment in EXPERIMENTS.values()))
    assert tried <= NUMBERS
    assert {claim.number for claim in CLAIMS if claim.tests} | tried == NUMBERS


@pytest.mark.parametrize("test", sorted(set(chain.from_iterable(claim.tests for claim in CLAIMS))))
def test_a_test_that_a_claim_names_exists(test):
    path, _, name = test.partition("::")
    assert f"\ndef {name}(" in (ROOT / path).read_text()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_resolves(name, monkeypatch, tmp_path):
    """Every recipe loads with its overrides; what is referred to stands before; what is expected is measured."""
    monkeypatch.setattr(digits, "prepare", lambda: tmp_path)
    experiment, before = EXPERIMENTS[name], {}
    assert experiment.name == name
    for variant in experiment.variants:
        assert set(variant.needs) <= {*before, "digits"}, variant.name
        assert set(variant.probes) <= probes.PROBES.keys()
        runner.recipe_of(variant, [], 3, before)
        before[variant.name] = tmp_path / variant.name
    assert len(before) == len(experiment.variants)
    for term in chain.from_iterable(each.terms for each in experiment.expectations):
        assert term.variant in before
        assert term.metric in experiment.metrics


def test_a_variant_needs_the_runs_that_it_names_and_the_teacher_that_is_asked():
    variant = Variant("a", "", "digits", ("model.weights=$start", "method={teacher: $other, x: $start}"), ("shifts",))
    assert variant.needs == ("start", "other")
    assert replace(variant, probes=("teacher",)).needs == ("start", "other", "teacher")
    assert variant.words({"start": "/a", "other": "/b"})[1] == "method={teacher: /b, x: /a}"


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_an_experiment_runs_from_end_to_end(name, few_digits, tmp_path):
    """On few images of a folder, with one epoch: every variant trains, and everything that is expected is measured."""
    experiment = EXPERIMENTS[name]
    data = [] if name == "transfer" else ["data.source=folder", "data.repeats=1"]  # halves are a source of their own
    words = [f"data.root={few_digits}", "train.epochs=1", "optim.warmup_epochs=0", "engine.device=cpu", *data]
    found = runner.run(experiment, 1, tmp_path, words)
    assert [row.variant for row in found] == [variant.name for variant in experiment.variants]
    metrics = {row.variant: row.metrics for row in found}
    for expectation in experiment.expectations:
        assert all(math.isfinite(metrics[term.variant][term.metric]) for term in expectation.terms)
    if name == "resolution":
        start = metrics["start"]
        assert 1 > start["norm_bicubic"] > start["norm_bilinear"] > 0
        said = {each: (tmp_path / name / f"{each}-seed0.log").read_text() for each in ("teacher_32", "teacher_48")}
        assert "sees 32x32 pixels, the student 48x48 pixels" in said["teacher_32"]
        assert "sees" not in said["teacher_48"]
    if name == "transfer":
        assert {row.facts["training_images"] for row in found} == {200}
        assert "the heads were trained on other classes" in (tmp_path / name / "transfer-seed0.log").read_text()


@pytest.mark.parametrize(("split", "classes"), [("train/first", "01234"), ("val/second", "56789")])
def test_half_of_the_classes_is_a_data_set(few_digits, split, classes):
    half = open_half(few_digits, split)
    assert half.classes == list(classes)
    name, count = split.split("/")[0], 40 if split.startswith("train") else 10
    assert [half.label(index) for index in range(len(half))] == [label for label in range(5) for _ in range(count)]
    for index in (0, len(half) - 1):
        assert Path(half.path(index)).parent == few_digits / name / classes[half.label(index)]
        assert bytes(half.read(index)) == Path(half.path(index)).read_bytes()
    assert half.fingerprint != open_half(few_digits, f"{name}/{'second' if 'first' in split else 'first'}").fingerprint


def test_a_half_that_is_none_is_refused(few_digits, tmp_path):
    with pytest.raises(DataError, match="'train/third': must end in /first or /second"):
        open_half(few_digits, "train/third")
    for name in "abc":
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "x.jpg").touch()
    with pytest.raises(DataError, match="has 3 classes; halves need at least 4"):
        open_half(tmp_path, "train/first")


# ---- what is in docs/experiments -------------------------------------------------------------------------------------


def test_the_pages_are_what_the_rows_say():
    """Nobody has typed a number, and nobody has changed an experiment without running it again."""
    found = page.read(PAGES)
    assert found
    for name, each in found.items():
        rows.check(PAGES / f"{name}.jsonl", each, EXPERIMENTS[name], page.given(EXPERIMENTS[name], each))
        assert (PAGES / f"{name}.md").read_text() == page.page(EXPERIMENTS[name], each)
        assert (PAGES / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert (PAGES / page.INDEX).read_text() == page.index(found)
    assert {path.stem for path in PAGES.glob("*.md")} == {*found, "index"}


# ---- an experiment in small ------------------------------------------------------------------------------------------

RECIPE = """\
model: {{name: "tests.small_runs:Tiny", image_size: 8}}
method: {{use: supervised}}
data: {{source: folder, root: "{root}", repeats: 1, mixup: 0, cutmix: 0, group_size: 8, threads: 1}}
optim: {{lr: 0.1, warmup_epochs: 0}}
train: {{epochs: 1, batch_size: 200}}
engine: {{device: cpu, threads: 1}}
"""


@pytest.fixture(scope="module")
def small(few_digits, tmp_path_factory):
    """Two variants of a recipe on few digits, the second of which goes on from the first."""
    recipe = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    recipe.write_text(RECIPE.format(root=few_digits))
    return Experiment(
        name="small",
        question="Is the second better?",
        source="nowhere",
        variants=(
            Variant("first", "one epoch", str(recipe)),
            Variant("second", "one more", str(recipe), ("model.weights=$first", "method.smoothing=0.2")),
        ),
        metrics={"top1": "top-1, %", "top1_distillation": "other head, %"},
        expectations=(Expectation(10, "more is better", Term("second", "top1"), Term("first", "top1")),),
    )


@pytest.fixture(scope="module")
def done(small, tmp_path_factory):
    """The folder of the experiment after two seeds, and its rows."""
    out = tmp_path_factory.mktemp("out")
    return out, runner.run(small, 2, out)


@pytest.fixture
def trained(monkeypatch):
    """Names of the runs that are trained from now on."""
    names, alone = [], training.alone
    monkeypatch.setattr(
        training, "alone", lambda recipe, path, resume: names.append(path.name) or alone(recipe, path, resume=resume)
    )
    return names


def test_a_row_has_what_the_run_measured(small, done):
    out, found = done
    assert rows.read(out / "small.jsonl") == found
    assert [(row.variant, row.seed) for row in found] == [("first", 0), ("second", 0), ("first", 1), ("second", 1)]
    for row in found:
        run = out / "small" / f"{row.variant}-seed{row.seed}"
        assert directory.written_recipe(run).train.seed == row.seed
        summary = json.loads((run / "summary.json").read_text())
        assert row.metrics["top1"] == row.metrics["top1_fused"] == summary["top1_fused"]
        assert row.metrics["top1_distillation"] == summary["top1_distillation"]
        assert row.facts["steps"] == 2
        assert (row.facts["training_images"], row.facts["held_out_images"]) == (400, 100)
    assert found[1].overrides == small.variants[1].overrides
    assert "weights of" in (out / "small" / "second-seed0.log").read_text()


def test_what_has_a_row_is_not_trained_again(small, done, tmp_path, trained):
    out, found = copied(done, tmp_path)
    assert runner.run(small, 2, out) == found
    assert trained == []


def test_what_has_no_row_is_trained_and_nothing_else(small, done, tmp_path, trained):
    out, found = copied(done, tmp_path)
    lines = (out / "small.jsonl").read_text().splitlines(keepends=True)
    (out / "small.jsonl").write_text("".join(lines[:3]) + lines[3][:40] + 1000 * "x")  # killed in the fourth
    again = runner.run(small, 2, out)
    assert again == found
    assert (out / "small.jsonl").read_text() == "".join(lines)
    assert trained == ["first-seed1", "second-seed1"]  # the run of the first is not in the copy, and is needed


def test_a_run_that_is_there_is_not_trained_for_the_next(small, done, trained):
    out, found = done
    text = (out / "small.jsonl").read_text()
    try:
        (out / "small.jsonl").write_text("".join(text.splitlines(keepends=True)[:3]))
        assert runner.run(small, 2, out) == found
    finally:
        (out / "small.jsonl").write_text(text)
    assert trained == ["second-seed1"]


def copied(done, folder):
    """The rows in a folder of their own, without the runs."""
    out, found = done
    (folder / "small.jsonl").write_text((out / "small.jsonl").read_text())
    return folder, list(found)


def test_rows_of_other_settings_are_refused(small, done, tmp_path):
    out, _ = copied(done, tmp_path)
    message = "variant first, seed 0 was trained with ; now it would be train.epochs=2. Give another --out"
    with pytest.raises(UsageError, match=message):
        runner.run(small, 2, out, ["train.epochs=2"])
    with pytest.raises(UsageError, match="there is no such variant now"):
        runner.run(replace(small, variants=small.variants[:1]), 2, out)
    (out / "small.jsonl").write_text('{"variant": 1}\n')
    with pytest.raises(UsageError, match="is no file of rows"):
        runner.run(small, 2, out)


def test_overrides_are_checked_before_anything_is_trained(small, tmp_path, trained):
    with pytest.raises(RecipeError, match=r"train\.epoch"):
        runner.run(small, 1, tmp_path, ["train.epoch=2"])
    assert trained == []
    assert list(tmp_path.iterdir()) == []


def test_a_stop_says_how_to_go_on(small, tmp_path, monkeypatch):
    def stop(recipe, path, resume):
        raise Interrupted("go on with something else")

    monkeypatch.setattr(training, "alone", stop)
    again = f"`fastdeit experiments run small --seeds 1 --out {tmp_path} 'method={{use: supervised}}'`"
    with pytest.raises(Interrupted, match=re.escape(again)):
        runner.run(small, 1, tmp_path, ["method={use: supervised}"])


def test_the_page_has_means_and_intervals(small, done, tmp_path):
    """n = 2: mean +- t(0.975, 1) s / sqrt(2), and s / sqrt(2) is half of the difference."""
    out, found = copied(done, tmp_path)
    command.write(small, found, out)
    text = (out / "small.md").read_text()
    by_variant = {name: [row.metrics["top1"] for row in found if row.variant == name] for name in ("first", "second")}
    for name, (a, b) in by_variant.items():
        assert f"| {name} | {small.variants[name == 'second'].says} | {shown(a, b)} |" in text
    first, second = by_variant["first"], by_variant["second"]
    a, b = second[0] - first[0], second[1] - first[1]
    mean, half = (a + b) / 2, 12.706205 * abs(a - b) / 2
    assert f"| {mean:+.4g} | {mean - half:+.4g} to {mean + half:+.4g} | not shown at this scale |" in text
    assert "400 + 100 | 2 | 200 |" in text
    png = (out / "small.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    assert len(png) > 5000


def shown(a, b):
    return f"{(a + b) / 2:.2f} ± {12.706205 * abs(a - b) / 2:.2f}"


# ---- the verbs -------------------------------------------------------------------------------------------------------


def test_the_command_runs_and_writes_its_pages(small, done, tmp_path, monkeypatch, capsys):
    out, _ = copied(done, tmp_path)
    monkeypatch.setitem(EXPERIMENTS, "small", small)
    assert cli.main(["experiments", "run", "small", "--seeds", "2", "--out", str(out)]) == 0
    assert f"page in {out}/small.md" in capsys.readouterr().out
    text = (out / "index.md").read_text()
    assert "| small | 10 | 2 | [2 seeds](small.md) |" in text
    assert "more is better: not shown at this scale" in text
    assert "| tokens | 14, 15 | 4 | no: `fastdeit experiments run tokens` |" in text
    assert cli.main(["experiments", "list", str(out)]) == 0
    said = capsys.readouterr().out
    assert "claims 10; 2 trainings for each seed; seeds run: 2" in said
    assert "(tests, experiment resolution)" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["distilation"], "there is no experiment 'distilation' (experiments: distillation, tokens, crops"),
        ([], "name an experiment: fastdeit experiments run NAME"),
        (["tokens", "crops"], "expected one experiment"),
        (["tokens", "--seeds", "0"], "0 is not a positive number"),
    ],
)
def test_what_cannot_be_run_is_refused(words, message, capsys):
    assert cli.main(["experiments", "run", *words]) == 2
    assert message in capsys.readouterr().err
