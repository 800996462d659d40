"""Steps of a recipe on batches from outside are those of a run."""

from contextlib import closing

import pytest
import torch

import fastdeit
from fastdeit.batch import Batch, Labels, Step
from fastdeit.engine.dist import World
from fastdeit.engine.schedule import learning_rate
from fastdeit.errors import UsageError
from fastdeit.recipe import resolve as recipes
from fastdeit.stepping import Stepper
from fastdeit.training import Parts, schedule_of, seed_torch

SETTINGS = [
    *("method.use=supervised", "model.name=deit_digits_patch8_32", "model.num_classes=10", "model.drop_path=0.3"),
    *("train.epochs=2", "train.batch_size=8", "train.accumulate=2", "data.group_size=4", "optim.warmup_epochs=1"),
    *("data.source=synthetic", "data.synthetic_classes=10", "data.synthetic_samples=16", "optim.ema_decay=0.9"),
    *("engine.device=cpu", "data.erase=0.5"),
]


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
            parts.engine.step(micro_batches, learning_rate(number, **rates))
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
    with pytest.raises(UsageError, match=r"its teacher has a recipe of its own .* give method.teacher=RUN"):
        fastdeit.stepper("digits", steps=30)


def test_other_numbers_are_refused(settings):
    with pytest.raises(ValueError, match=r"steps is 5, but must be a multiple of train.epochs \(2\)"):
        Stepper(settings, steps=5)
    steps = Stepper(settings, steps=4)
    with pytest.raises(ValueError, match=r"images has 3 samples, but must have train.batch_size \(8\)"):
        steps.step(torch.zeros(3, 3, 32, 32), torch.zeros(3, dtype=torch.int64))
    labels = torch.zeros(8, dtype=torch.int64)
    batch = Batch.ready(torch.zeros(8, 3, 32, 32), labels, Step.at(0, 1, 1), mean=(0,) * 3, std=(1,) * 3)
    with pytest.raises(ValueError, match="8 samples cannot be split into 3 equal micro-batches"):
        batch.split(3)
