"""What products multiply: `engine.precision` and `engine.products`.

`engine.precision`: `auto` is bf16 where the device has products of it, else fp16, whose loss is scaled. A card
without them has no tensor cores for bf16, so that bf16 is refused there. `engine.products: fp8` is refused where a
device has none of 8 bits.
"""

from collections.abc import Callable

import torch

from fastdeit import kernels
from fastdeit.engine.dist import World, pick_device
from fastdeit.errors import UsageError
from fastdeit.recipe.resolve import Recipe

AUTO = "auto"


def fixed(recipe: Recipe, world: World | None = None, say: Callable[[str], None] | None = None) -> Recipe:
    """`recipe` with bf16 or fp16 in place of `auto` in `engine.precision`; with a world the same on every process, and
    then to be called on every process. The run's recipe has the answer, so that whoever goes on with it keeps it.

    say  gets a line where that is fp16, which nobody has asked for

    Raises UsageError where products or the residual stream are to be in bf16, and the device has none, and where
    gradients are to travel in fp16, and the products are in bf16.
    """
    asked = recipe.engine.precision
    if asked not in (AUTO, "bf16"):
        return recipe
    device = pick_device(recipe.engine.device) if world is None else world.device
    without = None if has_bf16(device) else torch.cuda.get_device_name(device)
    without = without if world is None else world.first(without)
    if asked == "bf16":
        if without is not None:
            raise UsageError(
                f"engine.precision is bf16, which {without} does not have; use engine.precision=fp16, or auto, which "
                "is fp16 there"
            )
        return recipe
    precision = "bf16" if without is None else "fp16"
    if precision == "bf16" and recipe.engine.reduce == "fp16":
        raise UsageError(
            "engine.reduce fp16 needs fp16, but engine.precision auto is bf16 here; use engine.reduce=bf16"
        )
    if precision == "fp16":
        if recipe.engine.residual == "bf16":
            raise UsageError(f"engine.residual is bf16, which {without} does not have; use engine.residual=fp32")
        if say is not None:
            say(f"engine.precision auto: fp16 with a scaled loss, since {without} has no products in bf16")
    return recipe.model_copy(update={"engine": recipe.engine.model_copy(update={"precision": precision})})


def check_products(recipe: Recipe, world: World | None = None) -> None:
    """Raise UsageError where a training is to have products that its device, or with a world that of any process, does
    not have. With a world it is to be called on every process. An evaluation has no such products: it is not checked.
    """
    if recipe.engine.products != "fp8":
        return
    device = pick_device(recipe.engine.device) if world is None else world.device
    reason = kernels.fp8_refusal(device)
    reason = reason if world is None else world.first(reason)
    if reason is not None:
        raise UsageError(f"engine.products is fp8, but {reason}; use engine.products=precision")


def has_bf16(device: torch.device) -> bool:
    """Whether products of bf16 run as fast there as those of fp16: on GPUs from the A100 on. A CPU has no fp16 to
    prefer."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= (8, 0)
