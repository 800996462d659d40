"""Steps of a recipe on batches from outside are those of a run."""

from contextlib import closing

import pytest
import torch

import fastdeit
from fastdeit import models
from fastdeit.batch import Batch, Labels, Step
from fastdeit.engine import checkpoint
from fastdeit.engine.dist import World
from fastdeit.engine.schedule import learning_rate
from fastdeit.errors import UsageError
from fastdeit.methods.base import Phase
from fastdeit.methods.config import SupervisedConfig
from fastdeit.methods.supervised import Supervised
from fastdeit.recipe import resolve as recipes
from fastdeit.run.building import teachers
from fastdeit.run.parts import Parts
from fastdeit.stepping import Stepper
from fastdeit.training import decay_of, schedule_of, seed_torch
from fastdeit.views import View

SETTINGS = [
    *("method.use=supervised", "model.name=deit_digits_patch8_32", "model.num_classes=10", "model.drop_path=0.3"),
    *("train.epochs=2", "train.batch_size=8", "train.accumulate=2", "data.group_size=4", "optim.warmup_epochs=1"),
    *("data.source=synthetic", "data.synthetic_classes=10", "data.synthetic_samples=16", "optim.ema_decay=0.9"),
    *("engine.device=cpu", "data.erase=0.5", "optim.weight_decay_end=0.4"),
]
DETECTION = 'use: "tests.plugins.detection:Detection", window: 2, whole: [3]'


class HeadFirst(Supervised):
    """The head alone for an epoch, then everything."""

    def __init__(self, *parts):
        super().__init__(*parts)
        self.epochs = []

    def phases(self):
        return Phase("head", until=1, trains=["model.head"]), Phase("all")

    def on_epoch(self, epoch, engine):
        self.epochs.append(epoch)


class TwoViewsConfig(SupervisedConfig):
    def views(self):
        return View(), View("second")


class TwoViews(Supervised):
    Config = TwoViewsConfig


@pytest.fixture(scope="module")
def settings():
    return recipes.load("digits", SETTINGS)


def test_the_steps_of_a_run_s_own_batches(settings):
    """Losses, weights and averages, bit for bit, with mixing, erasing, drop-path and accumulation."""
    parts = Parts.of(settings, World(torch.device("cpu")), True, {})
    parts.method.train()
    steps = fastdeit.stepper(settings, steps=4)
    rates = schedule_of(parts.recipe, parts.length)
    with closing(parts.loader.batches(0, 4)) as batches:
        for number, micro_batches in enumerate(batches):
            images = torch.cat([batch.pixels() for batch in micro_batches])
            labels = Labels(*(torch.cat(columns) for columns in zip(*(b.targets for b in micro_batches), strict=True)))
            seed_torch(settings.train.seed, number, 0)
            assert steps.rate == learning_rate(number, **rates)
            decay = decay_of(parts.recipe, parts.length, number)
            parts.engine.step(micro_batches, learning_rate(number, **rates), decay)
            assert steps.step(images, labels) == parts.engine.means()
    assert steps.number == 4
    for name, parameter in parts.method.model.named_parameters():
        assert torch.equal(steps.model.get_parameter(name), parameter), name
    for name, average in steps.average.items():
        assert torch.equal(average, parts.engine.ema.average[f"model.{name}"]), name


def test_begins_with_given_weights(settings):
    steps = Stepper(settings, steps=4)
    weights = {name: torch.full_like(tensor, 0.25) for name, tensor in steps.model.state_dict().items()}
    steps.load(weights)
    for state in (dict(steps.model.named_parameters()), steps.average):
        assert state
        assert all((tensor == 0.25).all() for tensor in state.values())


def test_a_teacher_is_not_trained():
    with pytest.raises(UsageError, match=r"the teacher has a recipe of its own .* give method.teacher=RUN"):
        fastdeit.stepper("digits", steps=30)


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (["method={use: distill, cached: x}"], r"method distill reads what is stored of each image \(teacher\)"),
        (["method.class_weights=balanced"], "method.class_weights balanced counts the images of each class"),
        (
            [f"method={{{DETECTION}}}", "data.mixup=0", "data.cutmix=0"],
            "method .*Detection asks where things lie in the",
        ),
        (["method.use=tests.test_stepping:TwoViews"], "method .*TwoViews wants 2 views of each image"),
    ],
)
def test_what_needs_a_data_set_is_refused(settings, overrides, why):
    with pytest.raises(UsageError, match=f"a stepper has no data set, and {why}"):
        fastdeit.stepper(settings, overrides, steps=4)


def test_the_phases_of_a_method_and_its_epochs(settings):
    """They begin where the epoch does, and what a phase does not train stands still."""
    steps = fastdeit.stepper(settings, ["method.use=tests.test_stepping:HeadFirst"], steps=4)
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    moved = []
    for _ in range(4):
        before = steps.model.pos_embed.detach().clone()
        steps.step(images, labels)
        moved.append(not torch.equal(before, steps.model.pos_embed))
    assert moved == [False, False, True, True]
    assert steps.method.epochs == [0, 1]
    with pytest.raises(ValueError, match="all 4 steps of the run are made"):
        steps.step(images, labels)


def test_a_run_on_other_classes_can_teach(settings, tmp_path, monkeypatch):
    """The labels of batches from outside have no names that could be compared with those of the teacher's data."""
    monkeypatch.setattr(teachers, "freeze", lambda network, size, dtype: network)  # makes it faster, and takes a second
    classes = [f"digit {number}" for number in range(10)]
    checkpoint.save(
        tmp_path / "run" / "checkpoints",
        1,
        {"model": models.build("deit_digits_patch8_32").state_dict()},
        {"recipe": settings.model_dump(mode="json"), "identity": {"classes": classes}},
    )
    words = [f"method={{use: distill, teacher: {tmp_path / 'run'}}}"]
    parts = fastdeit.stepper(settings, words, steps=4).step(torch.zeros(8, 3, 32, 32), torch.arange(8))
    assert parts["distill"] > 0


def test_other_numbers_are_refused(settings):
    for steps in (5, 0):
        with pytest.raises(ValueError, match=rf"steps is {steps}, but must be a multiple of train.epochs \(2\)"):
            Stepper(settings, steps=steps)
    steps, labels = Stepper(settings, steps=4), torch.zeros(8, dtype=torch.int64)
    for shape in ([3, 3, 32, 32], [8, 3, 64, 32], [8, 32, 32, 3]):
        with pytest.raises(ValueError, match=r"images has shape .* but must be .* = \[8, 3, 32, 32\]"):
            steps.step(torch.zeros(shape), labels)
    batch = Batch.ready(torch.zeros(8, 3, 32, 32), labels, Step.at(0, 1, 1), mean=(0,) * 3, std=(1,) * 3)
    with pytest.raises(ValueError, match="8 samples cannot be split into 3 equal micro-batches"):
        batch.split(3)


def test_images_have_the_size_of_their_epoch(settings, monkeypatch):
    steps = fastdeit.stepper(settings, ["data.size_schedule=[[0, 16], [1, 32]]"], steps=4)
    resized, labels = [], torch.arange(8)
    monkeypatch.setattr(steps.engine, "resized", lambda: resized.append(steps.number))
    for size in (16, 16, 32, 32):
        with pytest.raises(ValueError, match=rf"must be .* = \[8, 3, {size}, {size}\] in epoch {size // 32}"):
            steps.step(torch.zeros(8, 3, 48 - size, 48 - size), labels)
        assert steps.step(torch.zeros(8, 3, size, size), labels)["loss"] > 0
    assert resized == [2]
