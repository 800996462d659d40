"""From a recipe to the network that is trained."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastdeit import models, rng
from fastdeit.errors import UsageError, naming
from fastdeit.fields import Section, size_pair
from fastdeit.kernels.dtypes import DTYPES
from fastdeit.models.freeze import freeze_parts
from fastdeit.recipe.resolve import Recipe
from fastdeit.run.building.messages import Report
from fastdeit.run.building.pictures import image_size
from fastdeit.run.weights import load, open_weights


def model(recipe: Recipe, num_classes: int, say: Report, classes: Sequence[str] | None = None) -> nn.Module:
    """The student, initialised from the seed alone and, if the recipe says so, from weights.

    `classes` names the classes of the data in the order of their labels; they are compared with those of the weights.
    """
    config = recipe.model
    if config.num_classes is not None and config.num_classes != num_classes:
        raise UsageError(f"model.num_classes is {config.num_classes}, but the data set has {num_classes} classes")
    torch.manual_seed(rng.key(recipe.train.seed, "init") >> 1)
    options = {"image_size": image_size(recipe), "num_classes": num_classes, "drop_path": config.drop_path}
    # Models take these where they have them. A model of somebody else's need not know them until a recipe asks, and
    # timm's have no mode: a recipe can only say theirs.
    asked = ("drop_path_mode", "dropout") if config.timm is None else ("dropout",)
    options |= {name: getattr(config, name) for name in asked if _is_set(config, name)}
    with naming("model", ValueError):
        built = models.of(config.name, config.timm, **options)
    _set_modes(built, recipe)
    for _, size in recipe.data.size_schedule:
        _check_takes(built, size)
    if config.weights is not None:
        with naming("model.weights"):
            found = open_weights(config.weights)
            notes = load(built, found, purpose="student", classes=classes, grid=config.weights_grid)
        for note in (*found.notes, *notes) or ("all tensors fit",):
            say(f"weights of {found.origin}: {note}")
    with naming("model.freeze", ValueError):
        freeze_parts(built, config.freeze)
    return built


def _is_set(section: Section, name: str) -> bool:
    return getattr(section, name) != type(section).model_fields[name].default


def _set_modes(network: nn.Module, recipe: Recipe) -> None:
    """Have the network skip, keep and multiply what the recipe says, where that is not what it does by itself."""
    engine = recipe.engine
    if recipe.model.drop_path_skip:
        group = recipe.data.group_size
        _set(network, "model.drop_path_skip", "set_drop_path_skip(group)", group, "with groups of data.group_size, ")
    if engine.checkpoint_blocks:
        if recipe.model.timm is not None and engine.capture == "graph":
            raise UsageError(
                "engine.checkpoint_blocks: timm's models bring a generator back to draw the same numbers again, which "
                "engine.capture graph cannot record; use none or compile"
            )
        _set(network, "engine.checkpoint_blocks", "set_grad_checkpointing(enable)", True)
    if engine.keep_activations is True:
        way_out = ": nothing of it is made again in backward, so leave it out"
        _set(network, "engine.keep_activations", "set_keep_activations(enable)", True, way_out=way_out)
    if engine.residual != "fp32":
        field, dtype = f"engine.residual {engine.residual}", DTYPES[engine.residual]
        _set(network, field, "set_residual(dtype)", dtype, way_out="; use fp32")
    if engine.products == "fp8":
        way_out = "; use engine.products=precision"
        _set(network, "engine.products fp8", "set_fp8_products(enable)", True, way_out=way_out)


def _set(network: nn.Module, field: str, setter: str, value: Any, given: str = "", way_out: str = "") -> None:
    """Call the `setter` of the network, as `name(argument)`; UsageError, which names the `field`, where it has none, or
    does not take the value."""
    name = setter.partition("(")[0]
    if not hasattr(network, name):
        raise UsageError(f"{field}: {type(network).__name__} has no {setter}{way_out}")
    try:
        getattr(network, name)(value)
    except ValueError as error:
        raise UsageError(f"{field}: {given}{error}{way_out}") from error


def _check_takes(network: nn.Module, size: int | tuple[int, int]) -> None:
    """Refuse a size of `data.size_schedule` that the network does not take, by the forward of one image, or, of a
    network without storage, as in a dry run, by the count of its operations."""
    height, width = size_pair(size, "data.size_schedule")
    try:
        network.flops((height, width))
        if not any(parameter.is_meta for parameter in network.parameters()):
            with torch.no_grad():
                network.eval()(torch.zeros(1, 3, height, width))
    except (ValueError, RuntimeError, AssertionError) as error:
        raise not_taken((height, width), error) from error
    finally:
        network.train()


def not_taken(size: tuple[int, int], error: Exception) -> UsageError:
    """The refusal of a (height, width) of `data.size_schedule` that the model does not take, which `error` says."""
    return UsageError(f"data.size_schedule: the model does not take images of {size[0]} x {size[1]} pixels: {error}")
