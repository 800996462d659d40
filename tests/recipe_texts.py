"""Recipes that tests change, and what the reader says of them."""

import pytest

from fastdeit.recipe import resolve as recipes
from fastdeit.recipe.resolve import RecipeError

GOOD = """\
about:
  summary: a recipe for tests
model:
  name: deit_tiny_patch16_224
  image_size: 64
method:
  use: supervised
data:
  source: synthetic
  group_size: 16
optim:
  lr: 1e-3
train:
  epochs: 10
  batch_size: 64
"""
DISTILL = GOOD.replace(
    "use: supervised", "use: distill\n  tau: 2.0\n  teacher: {timm: resnet18, weights: w.safetensors}"
)


def refusal(path, overrides=()):
    """Lines of the message with which the recipe is refused."""
    with pytest.raises(RecipeError) as caught:
        recipes.load(path, overrides)
    return str(caught.value).splitlines()


def edited(field, value):
    """(GOOD with `section.field` set to `value`, the line where it stands)"""
    section, _, key = field.partition(".")
    lines = GOOD.splitlines()
    if f"{section}:" not in lines:
        lines.append(f"{section}:")
    start = lines.index(f"{section}:") + 1
    end = next((number for number in range(start, len(lines)) if not lines[number].startswith(" ")), len(lines))
    same = [number for number in range(start, end) if lines[number].startswith(f"  {key}: ")]
    if same:
        lines[same[0]] = f"  {key}: {value}"
    else:
        lines.insert(start, f"  {key}: {value}")
    return "\n".join(lines) + "\n", (same[0] if same else start) + 1
