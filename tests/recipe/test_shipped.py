"""The recipes that come with the package: they load, run as their header says, and claim nothing without a source."""

import shlex
from itertools import pairwise

import pytest

from fastdeit import models
from fastdeit.cli import VERBS
from fastdeit.recipe import resolve as recipes

IMAGENET = [name for name in recipes.names() if name.startswith("deit_")]
PRETRAINING = [name for name in IMAGENET if not name.endswith("_384")]
DISTILLED = [name for name in recipes.names() if recipes.load(name).method.use == "distill"]
every = pytest.mark.parametrize("name", recipes.names())


def test_what_is_shipped():
    sizes = [f"deit_{size}{kind}" for size in ("tiny", "small", "base") for kind in ("", "_distilled")]
    made = ["glyphs", "emoji", "cliparts"]
    assert recipes.names() == sorted(["digits", "digits_teacher", "deit_base_384", "finetune", *made, *sizes])
    assert sorted(["digits", *(name for name in sizes if name.endswith("_distilled"))]) == DISTILLED


@every
def test_a_dump_loads_as_the_same_recipe(tmp_path, name):
    recipe = recipes.load(name)
    file = tmp_path / f"{name}.yaml"
    file.write_text(recipes.dump(recipe), encoding="utf-8")
    again = recipes.load(str(file))
    assert again == recipe
    assert recipes.dump(again) == recipes.dump(recipe)
    assert recipes.difference(recipe, again) == []


@every
def test_a_copy_of_its_source_is_the_same_recipe(tmp_path, name):
    """So a user's recipe can start as `fastdeit recipes show NAME > mine.yaml`."""
    file = tmp_path / f"{name}.yaml"
    file.write_text(recipes.text(name), encoding="utf-8")
    assert recipes.load(str(file)) == recipes.load(name)


@every
def test_the_header_is_complete_and_sourced(name):
    about = recipes.load(name).about
    assert 10 < len(about.summary) < 100
    for figure in (about.hardware, about.hours, about.top1):
        assert figure.startswith("unverified") or "(source: " in figure
        # A figure of somebody else's under "unverified" has its source too.
        assert not any(character.isdigit() for character in figure) or "(source: " in figure


def test_summaries_are_those_of_the_headers():
    assert recipes.summaries() == [(name, recipes.load(name).about.summary) for name in recipes.names()]


@every
def test_the_command_runs_this_recipe(name):
    program, verb, *words = shlex.split(recipes.load(name).about.command)
    assert (program, verb) == ("fastdeit", "train")
    args = VERBS["train"].parse(words)
    assert args.words == [name]
    data = recipes.load(name, args.overrides).data
    assert data.root is not None or data.source == "digits"


@every
def test_the_model_exists_and_has_the_heads_its_method_trains(name):
    recipe = recipes.load(name)
    assert recipe.model.name in models.MODELS
    assert ("distilled" in recipe.model.name) == (recipe.method.use == "distill")
    assert str(recipe.model.image_size) == recipe.model.name.rpartition("_")[2] or recipe.model.name == "convnet_digits"


def test_teachers_exist():
    teachers = {name: recipes.load(name).method.teacher[0] for name in DISTILLED}
    assert recipes.load(teachers.pop("digits").recipe).model.name == "convnet_digits"
    from timm.models import get_pretrained_cfg

    for teacher in teachers.values():
        # A bare `regnety_160` is another network of timm's, pretrained on ImageNet-12k.
        assert get_pretrained_cfg(teacher.timm).url.endswith("regnety_160-a5fe301d.pth")
        assert teacher.weights is None


def test_a_teacher_sees_what_its_student_sees():
    student, teacher = recipes.load("digits"), recipes.load("digits_teacher")
    for field in ("source", "mean", "std", "eval_crop_ratio"):
        assert getattr(student.data, field) == getattr(teacher.data, field)
    assert student.model.image_size == teacher.model.image_size


@pytest.mark.parametrize("name", PRETRAINING)
def test_the_paper_s_settings(name):
    """arXiv:2012.12877, table 9: what the defaults must not drift away from."""
    recipe = recipes.load(name)
    assert (recipe.train.epochs, recipe.train.batch_size, recipe.data.group_size) == (300, 1024, 64)
    optim, data = recipe.optim, recipe.data
    assert optim.lr == pytest.approx(5e-4 * recipe.train.batch_size / 512)
    assert (optim.weight_decay, optim.warmup_epochs, optim.warmup_lr, optim.min_lr) == (0.05, 5, 1e-6, 1e-5)
    assert (data.mixup, data.cutmix, data.repeats, data.crop_scale) == (0.8, 1.0, 3, (0.08, 1.0))
    assert (recipe.model.drop_path, recipe.method.smoothing, optim.clip_grad) == (0.1, 0.1, None)
    if recipe.method.use == "distill":
        assert (recipe.method.distillation, recipe.method.alpha) == ("hard", 0.5)


def test_fine_tuning_at_384():
    recipe = recipes.load("deit_base_384")
    assert (recipe.optim.lr, recipe.optim.min_lr, recipe.optim.weight_decay) == (5e-6, 5e-6, 1e-8)
    assert (recipe.train.epochs, recipe.train.batch_size, recipe.model.image_size) == (30, 512, 384)
    assert (recipe.model.weights, recipe.model.drop_path) == (None, 0.0)


@pytest.mark.parametrize("name", IMAGENET)
def test_figures_of_the_paper_are_not_claimed(name):
    assert recipes.load(name).about.top1.startswith("unverified")


@pytest.mark.parametrize("name", IMAGENET)
def test_the_paper_s_augmentation(name):
    data = recipes.load(name).data
    assert (data.crop, data.augment, data.color_jitter, data.erase) == (
        "random_resized",
        "rand-m9-mstd0.5-inc1",
        None,
        0.25,
    )
    assert data.mix_mode == "batch"


def test_digits_are_not_augmented_beyond_crop_and_mixup():
    for name in ("digits", "digits_teacher"):
        data = recipes.load(name).data
        assert (data.augment, data.color_jitter, data.erase) == ("none", None, 0.0)


def test_sizes_differ_in_the_model_alone():
    for kind in ("", "_distilled"):
        family = [recipes.load(f"deit_{size}{kind}") for size in ("tiny", "small", "base")]
        for one, other in pairwise(family):
            assert [field for field, *_ in recipes.difference(one, other)] == ["model.name"]
