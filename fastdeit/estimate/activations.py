"""`engine.keep_activations: auto`: whether a run keeps the activations of its MLPs, by the model of `fastdeit plan`.

To keep them spares backward a pass, and takes memory. They are kept where the modelled peak of a step leaves a fifth of
the card free: the model is not held to any card, and a run must not end for want of memory that nobody asked it to use.
Where the model knows nothing they are made again. Of a method that is not fastdeit's it does not know the memory.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch

from fastdeit import methods
from fastdeit.engine.dist import World
from fastdeit.errors import UsageError
from fastdeit.estimate import memory
from fastdeit.estimate.designs import FUSED
from fastdeit.estimate.gpus import GPU, GPUS
from fastdeit.estimate.memory import GIB
from fastdeit.estimate.options import with_options
from fastdeit.estimate.rows import known_gpu
from fastdeit.estimate.subject import Subject, subject, work_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastdeit.recipe.resolve import Recipe

SHARE = 0.8
"""Of a card's memory, which a step with kept activations may take."""


class Card(Protocol):
    """What `torch.cuda.get_device_properties` tells of a GPU; total_memory is in bytes."""

    name: str
    total_memory: int


def fixed(recipe: "Recipe", world: World, say: "Callable[[str], None]") -> "Recipe":
    """`recipe` with true or false in place of `auto` in `engine.keep_activations`, the same on every process, and one
    line that says why where there is a card. Call it on every process, with a precision that is not `auto`. The run's
    recipe has the answer, so that whoever goes on with it keeps it."""
    if recipe.engine.keep_activations != "auto":
        return recipe
    card = torch.cuda.get_device_properties(world.device) if world.device.type == "cuda" else None
    keep, why = world.same(chosen(recipe, card, world.size))
    if card is not None:
        say(f"engine.keep_activations auto: {str(keep).lower()}, {why}")
    return recipe.model_copy(update={"engine": recipe.engine.model_copy(update={"keep_activations": keep})})


def chosen(recipe: "Recipe", card: "Card | None", processes: int) -> tuple[bool, str]:
    """(whether to keep them, why) on a card; None is a CPU."""
    if card is None:
        return False, "since a CPU runs PyTorch's operations, which keep them in any case"
    gpu = GPUS.get(known_gpu(card.name) or "")
    if gpu is None:
        return False, f"since a step on {card.name} cannot be modelled"
    gpu = replace(gpu, memory=min(gpu.memory, card.total_memory))  # an A100 may have 40 GB, and a V100 16 GB
    if recipe.model.timm is not None:
        return False, "since timm's models run operations that keep them in any case"
    try:
        found = subject(recipe)
    except UsageError as error:
        return False, f"since the memory of a step cannot be modelled: {error}"
    return fits(found, gpu, processes, recipe.engine.precision)


def fits(found: Subject, gpu: GPU, processes: int, precision: str) -> tuple[bool, str]:
    """`chosen` of a recipe as the estimate sees it, in `precision`, which is not `auto`."""
    found = found.largest
    recipe, engine = found.recipe, found.recipe.engine
    if engine.checkpoint_blocks:
        return False, "since engine.checkpoint_blocks makes them again"
    if engine.products == "fp8" and gpu.fp8:
        return False, "since engine.products fp8 makes them again"
    if recipe.method.use not in methods.METHODS:
        return False, f"since the memory of method {recipe.method.use} is not known; say true if there is enough"
    if found.student.vit is None or not found.student.own:
        return False, f"since of {found.student.name} nothing is made again"
    work = work_of(recipe, processes, precision, found.trained, found.kept)
    design = with_options(FUSED, gpu, keep_activations=True, residual=engine.residual, products="precision")
    options = {"world": processes, "parallel": engine.parallel, "accumulate": recipe.train.accumulate}
    needed = memory.total(memory.peak(found.student, work, design, teachers=found.teachers, **options))
    words = f"since a step with them takes {needed / GIB:.3g} of {gpu.memory / GIB:.3g} GiB (modelled)"
    return needed <= SHARE * gpu.memory, words
