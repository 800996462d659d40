"""`engine.parallel`: how the processes of a run share its networks, and what cannot be split over them."""

import torch

from fastdeit.engine import optimizers, parallel
from fastdeit.engine.dist import World
from fastdeit.engine.parallel import Replicated, ShardError
from fastdeit.errors import UsageError
from fastdeit.methods.base import Method
from fastdeit.recipe.resolve import Recipe
from fastdeit.run.build import Report

OLDEST = 2, 14
"""The first PyTorch whose FSDP2 finds the tensors in the dataclasses that methods take and return."""


def shared(recipe: Recipe, method: Method, world: World, say: Report) -> Replicated:
    """What `engine.parallel` asks for, with the networks of `method` split where it asks for that: then its parameters
    are others than before.

    Raises UsageError for what fsdp2 cannot do, also where there is one process and nothing to split.
    """
    made = parallel.of(recipe.engine.parallel, world, recipe.engine.reduce)
    check(recipe, method)
    if made.total is not None and not parallel.blocks(method):
        say(
            f"engine.parallel fsdp2: {type(method.model).__name__} has no `blocks`, so every process gathers all of "
            "its weights for a step; between steps they are split, like gradients, moments and averages"
        )
    made.spread(method)
    return made


def check(recipe: Recipe, method: Method) -> None:
    """Raise UsageError for what fsdp2 cannot do, where `engine.parallel` asks for it."""
    if recipe.engine.parallel != "fsdp2":
        return
    if not optimizers.find(recipe.optim.name).takes_parts:
        raise _refusal(f"an update of optim.name {recipe.optim.name} needs whole tensors; use adamw, lamb or sgd")
    if recipe.engine.reduce != "fp32" and recipe.train.accumulate > 1:
        raise _refusal(
            f"with engine.reduce {recipe.engine.reduce} it would add up the {recipe.train.accumulate} micro-batches "
            "of train.accumulate in 16 bit; use engine.reduce=fp32"
        )
    if tuple(int(part) for part in torch.__version__.split(".")[:2]) < OLDEST:
        raise _refusal(f"it needs PyTorch {'.'.join(map(str, OLDEST))}, and this is {torch.__version__}")
    try:
        parallel.check(method)
    except ShardError as error:
        raise _refusal(str(error)) from error


def _refusal(why: str) -> UsageError:
    return UsageError(f"engine.parallel fsdp2: {why}, or engine.parallel=ddp")
