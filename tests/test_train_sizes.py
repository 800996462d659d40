"""Runs whose images grow (`data.size_schedule`): what a step sees is a function of its epoch alone."""

import contextlib
import io

import pytest
import torch

from fastdeit import cli
from fastdeit.engine.dist import World
from fastdeit.errors import Interrupted, UsageError
from fastdeit.methods.supervised import Supervised
from fastdeit.recipe import resolve as recipes
from fastdeit.recipe.resolve import RecipeError
from fastdeit.run import build, cached
from fastdeit.training import train
from tests.small_runs import StopAt, assert_close_weights, assert_same_weights, train_rank

RECIPE = """\
model: {name: deit_digits_patch8_32, image_size: 32}
method: {use: supervised}
data:
  {source: synthetic, synthetic_samples: 16, synthetic_classes: 4, group_size: 4, repeats: 1, threads: 1,
   size_schedule: [[0, 16], [1, [16, 24]], [2, 32]]}
optim: {name: sgd, lr: 1e-2, warmup_epochs: 0}
train: {epochs: 3, batch_size: 8, eval_every: 3}
engine: {device: cpu, log_every: 2}
"""
SIZES, TOTAL = [(16, 16), (16, 24), (32, 32)], 6
CPU = World(torch.device("cpu"))


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipe") / "sizes.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture(scope="module")
def whole(path, tmp_path_factory):
    """A run, the sizes of the images that its model was given in training, step by step, and what it printed."""
    run, seen, said = tmp_path_factory.mktemp("whole") / "run", [], io.StringIO()

    def watched(self, batch):
        seen.append((batch.images[0].shape[1:3], self.student_input(batch).shape[2:]))
        return original(self, batch)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        original = Supervised.forward
        patch.setattr(Supervised, "forward", watched)
        train(recipes.load(str(path)), run, CPU)
    return run, seen, said.getvalue()


def test_each_epoch_has_its_size(whole):
    _, seen, _ = whole
    assert [decoded for decoded, _ in seen] == [taken for _, taken in seen]
    assert [tuple(taken) for _, taken in seen] == [size for size in SIZES for _ in range(2)]


def test_the_run_says_so(whole):
    said = [f"epoch {epoch}: images of {height} x {width} pixels" for epoch, (height, width) in enumerate(SIZES)]
    assert [line for line in whole[2].splitlines() if line in said] == said


@pytest.mark.parametrize("stop", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_run_resumes_exactly(stop, path, whole, tmp_path):
    """At the step before another size, and in the middle of one."""
    with pytest.raises(Interrupted):
        train(recipes.load(str(path)), tmp_path / "run", StopAt(stop))
    train(recipes.load(str(path)), tmp_path / "run", CPU, resume=True)
    assert_same_weights(tmp_path / "run", whole[0], TOTAL)


@pytest.mark.slow
def test_processes_and_micro_batches_reach_the_result_of_one(path, whole, ranks, tmp_path):
    train(recipes.load(str(path), ["train.accumulate=2"]), tmp_path / "parts", CPU)
    ranks(2, train_rank, path, [], tmp_path / "shared")
    for run in ("parts", "shared"):
        assert_close_weights(tmp_path / run, whole[0], TOTAL)


def test_the_stream_of_a_size_is_that_of_a_recipe_of_this_size(path):
    """The same samples, crops and mixing: only the resolution is another."""
    source = build.sources(recipes.load(str(path)))[0]

    def batches(*overrides):
        return build.train_loader(recipes.load(str(path), overrides), source, CPU, {}, print).batches(2, 4)

    theirs = batches("model.image_size=[16, 24]", "data.size_schedule=[]")
    for (one,), (other,) in zip(batches(), theirs, strict=True):
        assert torch.equal(one.images[0], other.images[0])
        assert torch.equal(one.index, other.index)


@pytest.mark.parametrize(
    ("schedule", "problem"),
    [
        ("[[1, 16]]", r"must begin with epoch 0, and each entry with a later epoch than the one before: \[1\]"),
        ("[[0, 16], [2, 24], [2, 32]]", r"than the one before: \[0, 2, 2\]"),
        ("[[0, 0]]", r"size_schedule\[0\]\[1\]: must be at least 1"),
        ("[[0]]", "size_schedule"),
        ("16", "size_schedule"),
    ],
)
def test_a_schedule_that_is_none_is_refused(schedule, problem, path):
    with pytest.raises(RecipeError, match=problem):
        recipes.load(str(path), [f"data.size_schedule={schedule}"])


def test_a_size_that_the_model_does_not_take_is_refused_before_the_run(path, tmp_path):
    with pytest.raises(UsageError, match=r"data\.size_schedule: the model does not take images of 20 x 20 pixels"):
        train(recipes.load(str(path), ["data.size_schedule=[[0, 20]]"]), tmp_path / "run", CPU)
    assert not (tmp_path / "run").exists()


def test_a_size_after_the_end_of_the_run_is_refused(path, tmp_path):
    with pytest.raises(UsageError, match="changes the size in epoch 2, but the run has 2 epochs"):
        train(recipes.load(str(path), ["train.epochs=2"]), tmp_path / "run", CPU)


@pytest.mark.parametrize(("size", "code"), [(16, 0), (20, 2)])
def test_a_dry_run_knows_it_too(size, code, path, capsys):
    assert cli.main(["train", str(path), "--dry-run", f"data.size_schedule=[[0, {size}]]"]) == code
    assert (f"images of {size} x {size} pixels" in capsys.readouterr().err) == bool(code)


def test_a_cache_of_logits_is_of_a_schedule(path):
    plain, sized = (
        cached.images_of(recipe, build.sources(recipe)[0])
        for recipe in (recipes.load(str(path), ["data.size_schedule=[]"]), recipes.load(str(path)))
    )
    name, schedule = "data.size_schedule", [[0, 16], [1, [16, 24]], [2, 32]]
    assert cached.differences(sized, plain) == [(name, schedule, [])]
    assert cached.differences(plain, sized) == [(name, [], schedule)]
    older = {field: value for field, value in plain.items() if field != name}  # made before there were schedules
    assert cached.differences(older, sized) == [(name, [], schedule)]
    assert cached.differences(older, plain) == []


@pytest.mark.parametrize(
    ("one", "other", "named"),
    [
        (["data.views={main: {size: 24}}"], ["data.views={main: {size: 24}}", "data.size_schedule=[]"], []),
        (["data.size_schedule=[[0, 32]]"], ["data.size_schedule=[]"], []),
        (["data.size_schedule=[[0, 16], [1, 24]]"], ["data.size_schedule=[[0, 16], [1, 24], [2, 24]]"], []),
        (["data.size_schedule=[[0, 16], [1, 24]]"], ["data.size_schedule=[[0, [16, 16]], [1, [24, 24]]]"], []),
        (["data.size_schedule=[[0, 16], [1, 24]]"], ["data.size_schedule=[[0, 16], [2, 24]]"], ["data.size_schedule"]),
        (["data.size_schedule=[[0, 16]]"], ["data.size_schedule=[[0, 24]]"], ["model.image_size"]),
    ],
)
def test_a_cache_is_of_the_sizes_that_the_images_have(path, one, other, named):
    """However the recipe says them."""
    found = []
    for words in (one, other):
        recipe = recipes.load(str(path), words)
        found.append(cached.images_of(recipe, build.sources(recipe)[0]))
    assert [name for name, *_ in cached.differences(*found)] == named


def test_a_size_where_two_views_do_not_go_together_is_refused(path):
    """A simple crop is shared by views of one size, and the schedule changes that of one alone."""
    overrides = ["method={use: tests.run.test_build:MultiCrop}", "data.crop=simple", "data.views.local_1.size=32"]
    recipes.load(str(path), [*overrides, "data.size_schedule=[]"])
    with pytest.raises(RecipeError, match="a simple crop to"):
        recipes.load(str(path), overrides)
