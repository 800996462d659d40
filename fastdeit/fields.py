"""Types of the fields that recipes, views and methods have in common. No torch, no numpy."""

import os
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag


class Section(BaseModel):
    """Base of a recipe's sections and of their parts: frozen, no unknown key, no NaN or infinity.

    Defaults are validated like given values.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


def _ascending(limits: tuple[float, float]) -> tuple[float, float]:
    if limits[0] > limits[1]:
        raise ValueError("must be [smallest, largest]")
    return limits


Text = Annotated[str, Field(min_length=1)]
PathText = Annotated[Text, AfterValidator(os.path.expanduser)]
"""A path or an address that begins with one; `~` stands for the home folder."""
Count = Annotated[int, Field(ge=1)]
Side = Annotated[int, Field(ge=1, le=16_384)]
MOST_THREADS = 1024
"""Of a process. More than any machine has processors: a larger number is a slip, and would take the machine down."""
Threads = Annotated[int, Field(ge=1, le=MOST_THREADS)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Range = Annotated[tuple[Positive, Positive], AfterValidator(_ascending)]

ImageSize = Annotated[
    Annotated[Side, Tag("side")] | Annotated[tuple[Side, Side], Tag("sides")],
    Discriminator(lambda size: "sides" if isinstance(size, list | tuple) else "side"),
]
"""In pixels: the side of a square, or (height, width)."""


def size_pair(size: int | tuple[int, int], name: str) -> tuple[int, int]:
    """(height, width) of an `ImageSize`; ValueError, which calls it `name`, for anything else."""
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise ValueError(f"{name} is {size!r}, but must be a positive int or a pair (height, width) of them")
    return pair
