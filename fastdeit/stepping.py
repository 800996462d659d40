"""The training steps of a recipe on batches of your own: no data set, no run directory, no loop.

    steps = Stepper(recipes.load("deit_tiny", ["model.num_classes=10"]), steps=50)
    for images, labels in mine:
        print(steps.step(images, labels)["loss"])

A step is the engine's own: precision, accumulation, guard, clipping, optimizer and average are those of a run of the
recipe. So another trainer that is given the same batches can be compared with it, which `fastdeit bench parity` does.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastdeit import methods
from fastdeit.batch import Batch, Labels, Step
from fastdeit.data.plan import plan
from fastdeit.engine.dist import World, pick_device
from fastdeit.engine.schedule import learning_rate
from fastdeit.errors import UsageError
from fastdeit.estimate import activations, capture
from fastdeit.recipe import resolve as recipes
from fastdeit.recipe.resolve import Recipe
from fastdeit.run import build, precision, teachers
from fastdeit.run.parts import Parts
from fastdeit.training import decay_of, schedule_of, seed_torch


class Stepper:
    """Makes the steps of a run of `steps` steps by `recipe`, on the batches that it is given.

    recipe   as of a run; its `data:` section says the normalisation and, epoch by epoch, the size of the images, and
             nothing else, and `model.num_classes` the classes (1,000 where it is null). Of train, batch_size and
             accumulate are used, and `epochs` for the schedules and the phases of the method: an epoch is the
             `epochs`-th part of the steps
    steps    of the whole run, which the schedule is made for

    `number` counts the steps made so far. On a CPU it computes with torch's threads as they are set, whatever
    `engine.threads` says. Raises UsageError and RecipeError as a run does, and UsageError for a method that needs a
    data set.
    """

    def __init__(self, recipe: Recipe, *, steps: int) -> None:
        _refuse_what_needs_data(recipe)
        epochs = recipe.train.epochs or 1
        if steps < 1 or steps % epochs:
            raise ValueError(f"steps is {steps}, but must be a multiple of train.epochs ({epochs}), and at least 1")
        classes = recipe.model.num_classes or 1000
        self.recipe = recipes.override(
            recipe,
            [
                "data.source=synthetic",
                f"data.synthetic_classes={classes}",
                f"data.synthetic_samples={recipe.train.batch_size * steps // epochs}",
                "data.repeats=1",
                *([] if recipe.data.root is None else ["data.root=null"]),
                *([] if recipe.train.epochs else ["train.epochs=1", "train.steps=null"]),
            ],
        )
        world = World(pick_device(recipe.engine.device))
        precision.check_products(self.recipe)
        for fixed in precision.fixed, activations.fixed, capture.fixed:
            self.recipe = fixed(self.recipe, world, print)
        self._parts = Parts.of(self.recipe, world, True, {})
        self._rates = schedule_of(self._parts.recipe, self._parts.length)
        self.number, self._size = 0, self._size_in(0)
        self.method.train()

    @property
    def method(self) -> nn.Module:
        """The method, which owns the student."""
        return self._parts.method

    @property
    def model(self) -> nn.Module:
        """The student."""
        return self._parts.method.model

    @property
    def engine(self) -> Any:
        """The engine, with its optimizer and the average of the weights."""
        return self._parts.engine

    @property
    def average(self) -> dict[str, Tensor]:
        """The averages of the student's weights, by their names there; empty without `optim.ema_decay`."""
        kept = {} if self.engine.ema is None else self.engine.ema.average
        return {name.removeprefix("model."): tensor for name, tensor in kept.items() if name.startswith("model.")}

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Begin with these weights of the student. Raises RuntimeError where they do not fit it."""
        self.model.load_state_dict(weights)
        if self.engine.ema is not None:
            self.engine.ema.restart()

    @property
    def rate(self) -> float:
        """The learning rate of the next step."""
        return learning_rate(self.number, **self._rates)

    def noise(self) -> dict[str, Tensor]:
        """By name the uniforms `[batch_size, columns]` that the next step draws, for drop-path and the like."""
        train, positions = self.recipe.train, range(self.recipe.train.batch_size)
        return {
            name: torch.from_numpy(plan.noise(train.seed, self.number, positions, columns, name))
            for name, columns in self.method.noise().items()
        }

    def step(
        self, images: Tensor, labels: Tensor | Labels, noise: Mapping[str, Tensor] | None = None
    ) -> dict[str, float]:
        """One update. Returns `loss`, its parts and `grad_norm`.

        images  float `[batch_size, 3, H, W]` in the recipe's normalisation, erased and mixed already; H and W are those
                of the step's epoch
        labels  int64 `[batch_size]`, or the two labels of each mixed sample with their share
        noise   by name uniforms `[batch_size, columns]`; None: those of `noise()`
        """
        parts, length, batch_size = self._parts, self._parts.length, self.recipe.train.batch_size
        if self.number == length.total:
            raise ValueError(f"all {length.total} steps of the run are made; its schedule has none behind them")
        epoch, within = divmod(self.number, length.steps_per_epoch)
        size = self._size_in(epoch)
        expected = [batch_size, 3, *size]
        if list(images.shape) != expected:
            raise ValueError(
                f"images has shape {list(images.shape)}, but must be [train.batch_size, 3, H, W] = {expected} in epoch "
                f"{epoch}, as model.image_size or data.size_schedule says"
            )
        targets = labels if isinstance(labels, Labels) else Labels(labels, labels, torch.ones(batch_size))
        batch = Batch.ready(
            images,
            targets,
            Step.at(self.number, length.steps_per_epoch, length.total),
            mean=self.recipe.data.mean,
            std=self.recipe.data.std,
            noise=self.noise() if noise is None else noise,
        )
        if within == 0:
            parts.schedule.enter(epoch, self.engine)
            if size != self._size:
                self._size = size
                self.engine.resized()
            self.method.on_epoch(epoch, self.engine)
        seed_torch(self.recipe.train.seed, self.number, 0)
        micro_batches = batch.split(self.recipe.train.accumulate)
        decay = decay_of(parts.recipe, length, self.number)
        self.engine.step([one.to(self.engine.world.device) for one in micro_batches], self.rate, decay)
        self.number += 1
        return self.engine.means()

    def _size_in(self, epoch: int) -> tuple[int, int]:
        """(height, width) of the images of an epoch."""
        return build.views(self.recipe, epoch)[0].size


def _refuse_what_needs_data(recipe: Recipe) -> None:
    """Raise UsageError for a method that asks for more than the images and labels of a batch."""
    if why := next(_needs(recipe), None):
        raise UsageError(f"recipe {recipe.name}: a stepper has no data set, and {why}")


def _needs(recipe: Recipe) -> Iterator[str]:
    method = recipe.method
    if teachers.to_train(recipe):
        yield (
            "the teacher has a recipe of its own and would have to be trained first; train it, and give "
            "method.teacher=RUN"
        )
    if stores := methods.find(method.use).needs(method):
        yield (
            f"method {method.use} reads what is stored of each image ({', '.join(stores)}); where that is a teacher's "
            "answers (method.cached), give method.teacher=RUN"
        )
    if method.needs_boxes:
        yield f"method {method.use} asks where things lie in the pictures, which a step is not told"
    if len(views := method.views()) > 1:
        yield f"method {method.use} wants {len(views)} views of each image, but a step is given one"
    if getattr(method, "class_weights", None) == "balanced":
        yield "method.class_weights balanced counts the images of each class; give the weights as a list"
