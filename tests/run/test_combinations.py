"""Settings that work against each other: each is refused or resolved at the start, and none is ignored.

The first six are combinations that DeiT's public code ignores without a word.
"""

import pytest
import torch

from fastdeit import methods, models
from fastdeit.data.plan import order
from fastdeit.data.sources.synthetic import SyntheticSource
from fastdeit.engine.dist import World
from fastdeit.errors import UsageError
from fastdeit.methods.supervised import Supervised
from fastdeit.recipe import resolve as recipes
from fastdeit.run import build
from tests.recipe_texts import GOOD, refusal
from tests.toys import toy_batch, toy_context

CPU = World(torch.device("cpu"))


@pytest.fixture
def path(write):
    return write(GOOD.replace("deit_tiny_patch16_224", "deit_digits_patch8_32"))


def method_of(path, *overrides):
    recipe = recipes.load(path, overrides)
    student = build.model(recipe, 10, lambda text: None)
    return build.method(recipe, student, 10, 1, lambda config: None)


# ---- what the public code ignores ------------------------------------------------------------------------------------


def test_binary_cross_entropy_beside_smoothing_is_refused(path):
    (message,) = refusal(path, ["method.loss=bce"])
    assert "loss bce needs smoothing 0: a smoothed target makes every class positive" in message


def test_binary_cross_entropy_without_mixing_learns_the_label(path):
    """The public code stops there with an error about integers."""
    method = method_of(path, "method.loss=bce", "method.smoothing=0", "data.mixup=0", "data.cutmix=0")
    batch = toy_batch(torch.zeros(2, 64, 64, 3, dtype=torch.uint8), torch.tensor([3, 7]))
    batch = toy_batch(batch.images, batch.targets.y1, noise={"drop_path": torch.zeros(2, 0)})
    logits = method.student(batch)
    hot = torch.nn.functional.one_hot(batch.targets.y1, 10).float()
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, hot)
    torch.testing.assert_close(method(batch).loss, expected)


def test_co_training_beside_a_teacher_is_refused(path):
    (message,) = refusal(path, ["method.use=cosub", "method.teacher=runs/x", "model.drop_path=0.1"])
    assert "method.teacher: unknown field ('runs/x')" in message


def test_repeated_augmentation_is_the_same_on_one_process_as_on_many():
    whole = order.groups(order.epoch(0, 0, 96, 48, repeats=3), 0, 48, 8)
    samples, copies = whole.sample.flatten().tolist(), whole.copy.flatten().tolist()
    assert len(set(samples)) == 16
    assert sorted(zip(samples, copies, strict=True)) == [(i, copy) for i in sorted(set(samples)) for copy in range(3)]
    shares = [order.slice_of(6, 0, 1, rank, 3) for rank in range(3)]
    assert [group.tolist() for share in shares for group in whole.sample[share]] == whole.sample.tolist()


def test_a_distilled_model_without_a_teacher_trains_both_heads(path):
    """The public code leaves the second head as it was, and judges by it."""
    student = models.build("deit_digits_distilled_patch8_32")
    method = Supervised(student, methods.config("supervised")(), toy_context())
    batch = toy_batch(torch.randint(0, 256, (4, 32, 32, 3), dtype=torch.uint8), torch.arange(4))
    batch = toy_batch(batch.images, batch.targets.y1, noise={"drop_path": torch.zeros(4, 0)})
    method(batch).loss.backward()
    assert student.head_dist.bias.grad.abs().max() > 0
    assert torch.equal(student.head.bias.grad, student.head_dist.bias.grad)
    assert student.dist_token.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("given", "limit"), [([], 1.0), (["optim.clip_grad=0.5"], 0.5), (["optim.clip_grad=null"], None)]
)
def test_lamb_clips_once_by_the_number_that_the_recipe_shows(path, given, limit):
    recipe = recipes.load(path, ["optim.name=lamb", "optim.lr=1e-3", *given])
    assert recipe.optim.clip_grad == limit
    assert build.clipping(recipe, models.build("deit_digits_patch8_32")) == {"clip_grad": limit}
    assert f"clip_grad: {'null' if limit is None else limit}" in recipes.dump(recipe)


# ---- how two heads become one answer ---------------------------------------------------------------------------------


def test_every_method_states_how_it_fuses_two_heads():
    fusions = {name: method.config.model_fields["fuse"].default for name, method in methods.METHODS.items()}
    assert fusions == {"supervised": "logit", "distill": "softmax", "cosub": "logit"}


@pytest.mark.parametrize("fuse", [None, "softmax", "class", "distillation"])
def test_the_answer_is_what_was_trained_unless_the_recipe_says_otherwise(fuse):
    config = methods.config("supervised")(**({} if fuse is None else {"fuse": fuse}))
    method = Supervised(models.build("deit_digits_distilled_patch8_32"), config, toy_context()).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        first, second = method.model(x)
        scores = method.predict(x)
    expected = {
        None: (first + second) / 2,
        "softmax": first.softmax(-1) + second.softmax(-1),
        "class": first,
        "distillation": second,
    }[fuse]
    torch.testing.assert_close(next(iter(scores.values())), expected)


def test_a_fusion_of_one_head_is_refused(path):
    with pytest.raises(UsageError, match=r"method\.fuse class: VisionTransformer has one head, and there is nothing"):
        method_of(path, "method.fuse=class")
    assert method_of(path, "method.fuse=softmax", "model.name=deit_digits_distilled_patch8_32").config.fuse == "softmax"


# ---- sizes that do not go together -----------------------------------------------------------------------------------


def test_more_copies_than_images_are_refused(path):
    recipe = recipes.load(path, ["data.repeats=41"])
    with pytest.raises(UsageError, match=r"data\.repeats is 41, but there are 40 training images.*add data\.repeats=1"):
        build.run_length(recipe, 40)
    assert build.run_length(recipes.load(path, ["data.repeats=40"]), 40).total == 10


def test_a_batch_of_more_than_all_images_is_made_and_told(path):
    recipe = recipes.load(path, ["data.repeats=1"])
    source = SyntheticSource(40, seed=0, classes=10, size=(64, 64))
    stream = order.epoch(0, 0, len(source), recipe.train.batch_size)
    assert sorted(set(stream.sample.tolist())) == list(range(40))
    assert len(stream.sample) == 64
    note = "train.batch_size 64 is more than the 40 training images: a batch has some of them repeatedly"
    student = models.build("deit_digits_patch8_32")
    assert build.notes(recipe, 40, student, 1, torch.device("cpu"), anew=True) == [note]
    assert build.notes(recipe, 64, student, 1, torch.device("cpu"), anew=True) == []


def test_a_warm_up_as_long_as_the_run_says_what_to_add(path):
    (message,) = refusal(path, ["optim.warmup_epochs=10"])
    assert message.endswith("got 10.0; add optim.warmup_epochs=0.5, or null, for a twentieth of the run")
    recipe = recipes.load(path, ["train.epochs=null", "train.steps=5"])
    with pytest.raises(UsageError, match=r"add optim\.warmup_epochs=0\.25, or null, for a twentieth of the run"):
        build.run_length(recipe, 64)
    assert recipes.load(path, ["optim.warmup_epochs=null"]).optim.warmup_epochs is None


def test_a_warm_up_that_begins_above_the_peak_is_refused_where_there_is_one(path):
    (message,) = refusal(path, ["optim.lr=1e-7", "optim.min_lr=0"])
    assert "optim.warmup_lr: must not be above optim.lr (1e-07), got 1e-06 by default" in message
    assert recipes.load(path, ["optim.lr=1e-7", "optim.min_lr=0", "optim.warmup_epochs=0"]).optim.warmup_lr == 1e-6


# ---- trials of kernels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "processes", "expected"),
    [
        ([], 1, True),
        ([], 2, True),
        (["engine.parallel=fsdp2"], 1, True),
        (["engine.parallel=fsdp2"], 2, False),
        (["engine.capture=compile"], 1, False),
        (["model.name=null", "model.timm=resnet18"], 1, True),
        (["model.name=tests.small_runs:Tiny"], 1, False),
        (["method.use=tests.test_train_boundaries:Thaws"], 1, False),
    ],
)
def test_a_trial_rehearses_where_a_forward_and_backward_can_be_made_once_more(path, overrides, processes, expected):
    recipe = recipes.load(path, ["engine.autotune=on", *overrides])
    tuning = build.tuning(recipe, World(torch.device("cpu"), 0, processes), lambda text: None)
    assert tuning.rehearses is expected
