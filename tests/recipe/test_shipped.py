"""The recipes that come with the package: they load, run as their header says, and claim nothing without a source."""

import json
import re
import shlex
from itertools import pairwise

import pytest

from fastdeit import cli, models
from fastdeit.cli import VERBS
from fastdeit.recipe import differences, overlays
from fastdeit.recipe import resolve as recipes
from fastdeit.run.request import Request
from fastdeit.verbs import dry_run
from tests.recipe import headers

IMAGENET = [name for name in recipes.names() if name.startswith("deit_")]
OURS = ["deit_base_24h", "deit_base_160", "deit_base_160_224", "deit_base_fp8", "deit_base_muon"]
"""Made by us of the paper's settings: other lengths, resolutions, products and optimizers."""
GROWING = ["deit_small_progressive"]
"""Ours as well, with a size schedule, of which `fastdeit plan` knows nothing."""
PRETRAINING = [name for name in IMAGENET if not name.endswith("_384") and name not in OURS + GROWING]
DEIT3 = [name for name in recipes.names() if name.startswith("deit3_")]
DISTILLED = [name for name in recipes.names() if recipes.load(name).method.use == "distill"]
LOW_RESOLUTION = {
    name: size
    for kind, sizes in {"": (192, 192, 154), "_cosub": (192, 192, 154)}.items()
    for name, size in zip([f"deit3_{size}{kind}" for size in ("base", "large", "huge")], sizes, strict=True)
} | {"deit3_huge_21k": 126, "deit_base_160": 160, "deit3_base_skip": 192}
"""Recipes that train below the resolution of their model's name."""
every = pytest.mark.parametrize("name", recipes.names())


def test_what_is_shipped():
    """A family is complete: all sizes have what one of them has."""
    deit = [f"deit_{size}" for size in ("tiny", "small", "base")]
    of_deit = ("", "_distilled", "_soft", "_distilled_1000ep")
    deit3 = {
        "": ("small", "medium", "base", "large", "huge"),
        "_cosub": ("small", "medium", "base", "large", "huge"),
        "_skip": ("base",),  # an experiment; the others differ in nothing else
        "_224": ("base", "large", "huge"),  # the others are trained at 224
        "_384": ("small", "base", "large"),
        "_21k": ("small", "base", "large", "huge"),
        "_21k_to_1k": ("small", "base", "large", "huge"),
    }
    assert sorted(IMAGENET) == sorted(
        [
            *(f"{size}{kind}" for size in deit for kind in of_deit),
            "deit_base_384",
            "deit_base_distilled_384",
            *OURS,
            *GROWING,
        ]
    )
    assert sorted(DEIT3) == sorted(f"deit3_{size}{kind}" for kind, sizes in deit3.items() for size in sizes)
    assert set(recipes.names()) - {*IMAGENET, *DEIT3} >= {
        *("digits", "digits_teacher", "finetune", "vit_small_90", "glyphs", "emoji", "cliparts"),
        *(f"vitc_{size}gf" for size in (1, 4, 18, 36)),
        *(f"augreg_{size}" for size in ("tiny", "small", "base")),
        *(f"transfer_{data}" for data in ("cifar10", "cifar100", "flowers", "cars", "inat18", "inat19")),
    }


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
    recipe = recipes.load(name, args.overrides)
    assert recipe.data.root is not None or recipe.data.source == "digits"
    recipes.check_complete(recipe)


@pytest.mark.usefixtures("roomy")
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if place % 4 else []) for place, name in enumerate(recipes.names())],
)
def test_a_dry_run_of_the_command_refuses_nothing(name):
    args = VERBS["train"].parse(shlex.split(recipes.load(name).about.command)[2:])
    recipe = recipes.load(name, args.overrides)
    images = [] if recipe.data.source == "digits" else ["data.source=synthetic", "data.synthetic_samples=20000"]
    begun = recipes.without_weights(recipes.override(recipe, images))
    assert next(dry_run.lines(Request(begun), args.nproc or 1)).startswith(f"recipe    {name}, ")


@every
def test_the_model_exists_and_has_the_heads_its_method_trains(name):
    recipe = recipes.load(name)
    assert recipe.model.name in models.MODELS
    softly = name.endswith("_soft")  # usual distillation, through the class token
    assert ("distilled" in recipe.model.name) == (recipe.method.use == "distill" and not softly)
    resized = recipe.model.name == "convnet_digits" or name in LOW_RESOLUTION
    assert str(recipe.model.image_size) == recipe.model.name.rpartition("_")[2] or resized


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
    epochs = 1000 if name.endswith("_1000ep") else 300
    # The public commands: 4 GPUs of 256 images for Ti and S, 16 of 64 for B.
    group = 64 if "_base" in name else 256
    assert (recipe.train.epochs, recipe.train.batch_size, recipe.data.group_size) == (epochs, 1024, group)
    optim, data = recipe.optim, recipe.data
    assert optim.lr == pytest.approx(5e-4 * recipe.train.batch_size / 512)
    assert (optim.weight_decay, optim.warmup_epochs, optim.warmup_lr, optim.min_lr) == (0.05, 5, 1e-6, 1e-5)
    assert (data.mixup, data.cutmix, data.repeats, data.crop_scale) == (0.8, 1.0, 3, (0.08, 1.0))
    assert (recipe.model.drop_path, recipe.method.smoothing, optim.clip_grad) == (0.1, 0.1, None)
    if name.endswith("_soft"):
        assert (recipe.method.distillation, recipe.method.alpha, recipe.method.tau) == ("soft", 0.1, 3.0)
    elif recipe.method.use == "distill":
        assert (recipe.method.distillation, recipe.method.alpha) == ("hard", 0.5)


@pytest.mark.parametrize("name", ["deit_base_384", "deit_base_distilled_384"])
def test_fine_tuning_at_384(name):
    recipe = recipes.load(name)
    assert recipe.data.group_size == 32  # 16 GPUs of 32 images
    if name == "deit_base_distilled_384":
        assert recipe.method.teacher[0].image_size == 384
    assert (recipe.optim.lr, recipe.optim.min_lr, recipe.optim.weight_decay) == (5e-6, 5e-6, 1e-8)
    assert (recipe.train.epochs, recipe.train.batch_size, recipe.model.image_size) == (30, 512, 384)
    assert (recipe.model.weights, recipe.model.drop_path) == (None, 0.0)


@pytest.mark.parametrize("name", [*IMAGENET, *DEIT3])
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
    for kind in ("", "_distilled", "_soft", "_distilled_1000ep"):
        family = [recipes.load(f"deit_{size}{kind}") for size in ("tiny", "small", "base")]
        for one, other in pairwise(family):
            assert {field for field, *_ in recipes.difference(one, other)} <= {"model.name", "data.group_size"}


@pytest.mark.parametrize("name", DEIT3)
def test_deit_iii_s_settings(name):
    """arXiv:2204.07118, and the commands of the public code."""
    recipe = recipes.load(name)
    pretraining = name not in FINE_TUNING
    assert (recipe.data.eval_crop_ratio, recipe.data.erase) == (1.0, 0.0)
    assert recipe.model.drop_path == 0 or recipe.model.drop_path_mode == "constant"
    assert recipe.model.needs_weights == (not pretraining)
    if "_21k" in name:
        assert (recipe.data.crop, recipe.data.augment, recipe.data.mixup) == ("simple", "three_augment", 0.0)
        assert (recipe.method.loss, recipe.optim.name, recipe.optim.weight_decay) == ("ce", "lamb", 0.02)
    elif pretraining:
        assert (recipe.data.crop, recipe.data.augment) == ("random_resized", "three_augment")
        assert (recipe.optim.name, recipe.optim.weight_decay) == ("lamb", 0.05)
        assert name.endswith("_cosub") or recipe.method.loss == "bce"  # cosub has no other
        assert recipe.optim.lr == (4e-3 if name.startswith("deit3_small") else 3e-3)
        assert (recipe.train.epochs, recipe.train.batch_size, recipe.data.repeats) == (800, 2048, 3)
        assert recipe.method.use == ("cosub" if name.endswith("_cosub") else "supervised")
    else:
        assert (recipe.data.augment, recipe.method.loss) == ("rand-m9-mstd0.5-inc1", "ce")
        assert (recipe.optim.name, recipe.optim.lr, recipe.optim.weight_decay) == ("adamw", 1e-5, 0.1)
        assert (recipe.train.epochs, recipe.train.batch_size, recipe.data.repeats) == (20, 512, 1)


FINE_TUNING = [name for name in DEIT3 if name.endswith(("_224", "_384", "_to_1k"))]


@every
def test_the_header_lists_how_it_differs_from_the_public_code(name):
    """Where this fails after a deliberate change: `python -m tests.recipe.headers --write`."""
    recipe = recipes.load(name)
    of_others = ("deit_", "deit3_", "transfer_", "augreg_", "vitc_", "vit_small_90")
    assert (recipe.about.follows is not None) == name.startswith(of_others)
    before, stated, _ = headers.split(recipes.text(name))
    assert stated == headers.expected(recipe)
    assert not any("iffers from" in line for line in before)  # nothing beside the table


@pytest.mark.parametrize("name", [name for name in recipes.names() if recipes.load(name).about.follows == "deit"])
def test_as_public_code_leaves_no_difference_that_has_a_setting(name):
    laid_over = recipes.load(name, overlays.overrides(name, ["public-code"], []))
    assert [one for one in differences.of(laid_over) if one.field] == []
    assert {one.field for one in differences.of(recipes.load(name))} - {""} == {
        field for field, *_ in recipes.changes(recipes.load(name), laid_over)
    }


@pytest.mark.parametrize("name", OURS)
def test_modelled_hours_are_those_of_plan(name, capsys):
    assert cli.main(["plan", name, "--gpu", "H200", "--count", "1", "--json"]) == 0
    plans = {plan["design"]: plan for plan in json.loads(capsys.readouterr().out)["plans"]}
    stated = re.fullmatch(r"unverified; ([\d.]+) on one H200 .*", recipes.load(name).about.hours)
    assert float(stated[1]) == pytest.approx(plans["fused"]["seconds"]["total"] / 3600, rel=0.05)
