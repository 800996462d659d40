"""`engine.capture: auto`: whether a run records its step as a CUDA graph, by the model of `fastdeit plan`.

A graph spares the host the launches of a step. It pays where the GPU could have to wait for them, which is judged to be
so where the GPU's modelled time of a step is less than twice the host's: a host that is busy with the input, or slower
than the model's, then still keeps up or does not matter. With a size schedule the smallest images decide, as a graph
costs the steps of larger ones nothing. Where the model knows nothing the answer is `none`.
"""

from typing import TYPE_CHECKING

import torch

from fastdeit import methods
from fastdeit.engine.dist import World
from fastdeit.engine.options import shipped
from fastdeit.errors import UsageError
from fastdeit.estimate import model as estimate
from fastdeit.estimate.designs import EAGER, FUSED
from fastdeit.estimate.gpus import GPUS
from fastdeit.estimate.options import with_options
from fastdeit.estimate.rows import known_gpu
from fastdeit.estimate.subject import kept_of, network, students, trained_of, work_of
from fastdeit.fields import size_pair

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastdeit.recipe.resolve import Recipe

_WORTH = 2.0
"""A graph is taken where the GPU is busy for less than so many times the host's time."""
_CLASSES = 1000
"""Where the recipe leaves them to the data. The time of a step hardly depends on them."""


def fixed(recipe: "Recipe", world: World, say: "Callable[[str], None]") -> "Recipe":
    """`recipe` with `none` or `graph` in place of `auto` in `engine.capture`, the same on every process, and one line
    that says why. Call it on every process. The run's recipe has the answer, so that whoever goes on with it keeps it.
    """
    if recipe.engine.capture != "auto":
        return recipe
    name = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else None
    capture, why = world.same(chosen(recipe, name, world.size))
    say(f"engine.capture auto: {capture}, {why}")
    return recipe.model_copy(update={"engine": recipe.engine.model_copy(update={"capture": capture})})


def chosen(recipe: "Recipe", card: str | None, processes: int) -> tuple[str, str]:
    """(none or graph, why) for a card that names itself so; None is a CPU."""
    if card is None:
        return "none", "since there are no CUDA graphs on a CPU"
    if recipe.engine.parallel == "fsdp2":
        return "none", "since engine.parallel fsdp2 gathers and frees weights within a step"
    gpu = GPUS.get(known_gpu(card) or "")
    if gpu is None:
        return "none", f"since there is no model of the speed of {card}"
    if recipe.method.use not in methods.METHODS:
        return "none", f"since method {recipe.method.use} is not fastdeit's own; say graph if its steps can be recorded"
    if shipped(recipe.optim.name) is None:
        return "none", f"since {recipe.optim.name} is not fastdeit's own; say graph if its updates can be recorded"
    if recipe.model.timm is not None:
        return "none", "since timm's models draw from torch's generator; say graph if this one draws nothing"
    model, train = recipe.model, recipe.train
    size = size_pair(model.image_size, "model.image_size")
    classes = model.num_classes or _CLASSES
    try:
        student = network(model.name, None, size, classes, model.drop_path)
        trained, kept = trained_of(recipe, classes), () if student.vit is None else kept_of(recipe)
        sized = dict(students(recipe, classes)) or {size: student}
    except UsageError:
        return "none", f"since {model.name} is a network that cannot be modelled"
    size, student = min(sized.items(), key=lambda one: one[1].flops)
    work = work_of(recipe, processes, recipe.engine.precision, trained, kept)
    design = FUSED if student.vit is not None else EAGER
    engine = recipe.engine
    options = {"residual": engine.residual, "products": engine.products}
    design = with_options(design, gpu, keep_activations=engine.keep_activations is True, **options)
    ops = estimate.ops(student, work, design, gpu)
    busy, host = (
        train.accumulate * (step.forward + step.backward) + step.update
        for step in estimate.both(ops, work, design, gpu)
    )
    capture = "graph" if busy < _WORTH * host else "none"
    of_images = f" with images of {size[0]} x {size[1]}" if len(sized) > 1 else ""
    times = f"takes {gpu.name} {1e3 * busy:.3g} ms and the host {1e3 * host:.3g} ms (modelled)"
    return capture, f"since a step{of_images} {times}"
