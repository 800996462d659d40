"""The recipe of weights that are of no run: what an evaluation needs, with the rest left at its defaults.

Importing this module imports no torch, so that overrides for a bare file are checked before that.
"""

from collections.abc import Mapping
from typing import Any

from fastdeit.fields import ImageSize
from fastdeit.models.names import MODELS, check
from fastdeit.recipe import resolve as recipes

IMAGENET_SIZE = 224


def recipe(
    name: str | None, timm: str | None, *, size: ImageSize = IMAGENET_SIZE, data: Mapping[str, Any] | None = None
) -> recipes.Recipe:
    """A recipe of one of our models or of timm's, with fields of `data:`. Nothing is trained by it, so length and
    learning rate mean nothing. Raises pydantic's ValidationError for values that make no recipe."""
    return recipes.Recipe.model_validate(
        {
            "name": "evaluation",
            "about": {},
            "model": {"name": name, "timm": timm, "image_size": size},
            "method": {"use": "supervised"},
            "data": {"repeats": 1} | dict(data or {}),
            "optim": {"lr": 1.0, "warmup_epochs": 0},
            "train": {"epochs": 1, "batch_size": 64},
            "engine": {},
        }
    )


def stand_in() -> recipes.Recipe:
    """A recipe by which overrides can be checked while it is not known which model the weights are of."""
    return recipe(MODELS[0], None)


def split(model: str) -> tuple[str | None, str | None]:
    """(one of our models, one of timm's) for what `--model` says. Raises ValueError where we have no such model."""
    if model.startswith("timm:"):
        return None, model.removeprefix("timm:")
    return check(model), None
