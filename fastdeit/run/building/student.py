"""From a recipe to the network that is trained."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from fastdeit import models, rng
from fastdeit.engine.step import DTYPES
from fastdeit.errors import UsageError
from fastdeit.fields import Section, size_pair
from fastdeit.models.freeze import freeze_parts
from fastdeit.run.building.messages import Report, naming
from fastdeit.run.building.pictures import image_size
from fastdeit.run.weights import load, open_weights

if TYPE_CHECKING:
    from fastdeit.recipe.resolve import Recipe


def model(recipe: "Recipe", num_classes: int, say: Report, classes: Sequence[str] | None = None) -> nn.Module:
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
    try:
        built = models.of(config.name, config.timm, **options)
    except ValueError as error:
        raise UsageError(f"model: {error}") from error
    if config.drop_path_skip:
        _skip_dropped(built, recipe)
    if recipe.engine.checkpoint_blocks:
        _checkpoint_blocks(built, recipe)
    if recipe.engine.keep_activations is True:
        _keep_activations(built)
    if recipe.engine.residual != "fp32":
        _keep_residual(built, recipe)
    if recipe.engine.products == "fp8":
        _fp8_products(built)
    for _, size in recipe.data.size_schedule:
        _check_takes(built, size)
    if config.weights is not None:
        with naming("model.weights"):
            found = open_weights(config.weights)
            notes = load(built, found, purpose="student", classes=classes, grid=config.weights_grid)
        for note in (*found.notes, *notes) or ("all tensors fit",):
            say(f"weights of {found.origin}: {note}")
    try:
        freeze_parts(built, config.freeze)
    except ValueError as error:
        raise UsageError(f"model.freeze: {error}") from error
    return built


def _is_set(section: Section, name: str) -> bool:
    return getattr(section, name) != type(section).model_fields[name].default


def _skip_dropped(network: nn.Module, recipe: "Recipe") -> None:
    if not hasattr(network, "set_drop_path_skip"):
        raise UsageError(f"model.drop_path_skip: {type(network).__name__} has no set_drop_path_skip(group)")
    try:
        network.set_drop_path_skip(recipe.data.group_size)
    except ValueError as error:
        raise UsageError(f"model.drop_path_skip: with groups of data.group_size, {error}") from error


def _checkpoint_blocks(network: nn.Module, recipe: "Recipe") -> None:
    if recipe.model.timm is not None and recipe.engine.capture == "graph":
        raise UsageError(
            "engine.checkpoint_blocks: timm's models bring a generator back to draw the same numbers again, which "
            "engine.capture graph cannot record; use none or compile"
        )
    if not hasattr(network, "set_grad_checkpointing"):
        raise UsageError(f"engine.checkpoint_blocks: {type(network).__name__} has no set_grad_checkpointing(enable)")
    try:
        network.set_grad_checkpointing(True)
    except ValueError as error:
        raise UsageError(f"engine.checkpoint_blocks: {error}") from error


def _keep_activations(network: nn.Module) -> None:
    if not hasattr(network, "set_keep_activations"):
        raise UsageError(
            f"engine.keep_activations: {type(network).__name__} has no set_keep_activations(enable): nothing of it is "
            "made again in backward, so leave it out"
        )
    network.set_keep_activations(True)


def _keep_residual(network: nn.Module, recipe: "Recipe") -> None:
    residual = recipe.engine.residual
    if not hasattr(network, "set_residual"):
        raise UsageError(f"engine.residual {residual}: {type(network).__name__} has no set_residual(dtype); use fp32")
    network.set_residual(DTYPES[residual])


def _fp8_products(network: nn.Module) -> None:
    if not hasattr(network, "set_fp8_products"):
        raise UsageError(
            f"engine.products fp8: {type(network).__name__} has no set_fp8_products(enable); use "
            "engine.products=precision"
        )
    try:
        network.set_fp8_products(True)
    except ValueError as error:
        raise UsageError(f"engine.products fp8: {error}; use engine.products=precision") from error


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
