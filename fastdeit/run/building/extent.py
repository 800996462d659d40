"""How long a recipe's run is, how large its batches are, and what a user should know of both."""

import torch
from torch import nn

from fastdeit import cores
from fastdeit.data.plan import order
from fastdeit.engine.checkpoint import MAX_STEP
from fastdeit.errors import UsageError, naming
from fastdeit.recipe import differences, idle
from fastdeit.recipe.length import Length, LengthError, length
from fastdeit.recipe.resolve import Recipe
from fastdeit.run.building.pictures import views


def run_length(recipe: Recipe, images: int) -> Length:
    """The length of the recipe's run on so many training images.

    Raises UsageError where the warm-up does not fit, for more copies of an image than there are images, and for more
    steps than checkpoints have names.
    """
    if recipe.data.repeats > images:
        raise UsageError(
            f"recipe {recipe.name}: data.repeats is {recipe.data.repeats}, but there are {images} training images, so "
            "an epoch would show copies of one image alone; add data.repeats=1"
        )
    with naming(f"recipe {recipe.name}", LengthError):
        found = length(recipe, images, order.steps_per_epoch(images, recipe.train.batch_size))
    if found.total > MAX_STEP:
        given = "epochs" if recipe.train.steps is None else "steps"
        raise UsageError(
            f"recipe {recipe.name}: train.{given} makes {found.total:,} steps, and a run has at most {MAX_STEP:,}, "
            "since checkpoints are named by their step"
        )
    return found


def check_batch(recipe: Recipe, processes: int) -> None:
    """Raise UsageError for a batch that does not divide into groups for so many processes, and for one whose pixels
    alone do not fit the memory of this machine, before any of it is taken."""
    train = recipe.train
    with naming(f"recipe {recipe.name} on {processes} processes", ValueError):
        order.groups_per_batch(train.batch_size, recipe.data.group_size, train.accumulate, processes)
    samples, there = train.batch_size // train.accumulate // processes, cores.memory()
    epochs = [epoch for epoch, _ in recipe.data.size_schedule] or [None]
    needed = samples * max(sum(3 * view.size[0] * view.size[1] for view in views(recipe, epoch)) for epoch in epochs)
    if needed > there:
        raise UsageError(
            f"recipe {recipe.name}: the images of a micro-batch, {samples:,} in a process, have "
            f"{needed / 2**30:,.1f} GiB, and there are {there / 2**30:,.1f} GiB of memory; lower train.batch_size, or "
            "raise train.accumulate"
        )


def notes(
    recipe: Recipe, images: int, student: nn.Module, processes: int, device: torch.device, *, anew: bool
) -> list[str]:
    """What a user should know of a run on so many training images, processes and such devices, though it can be done.

    anew  whether the run begins: one that goes on has said already how it differs from public code
    """
    has_token = student.decay_groups(True) != student.decay_groups(False)
    evaluations = run_length(recipe, images).evaluations
    facts = idle.Facts(len(student.head_names), has_token, processes, device.type, evaluations)
    found, batch = idle.notes(recipe, facts), recipe.train.batch_size
    if batch > images:
        says = f"train.batch_size {batch} is more than the {images} training images"
        found.append(f"{says}: a batch has some of them repeatedly")
    # Last: the list is long, and what is wrong with the run comes before.
    return found + (differences.lines(recipe) if anew else [])
