"""From a recipe to what is made of a picture: sizes, views and augmentations."""

from dataclasses import fields

from fastdeit.data.plan.plan import Augment, Mixing
from fastdeit.fields import size_pair
from fastdeit.recipe.resolve import Recipe
from fastdeit.views import View, overridden, parse_policy, resolved, size_at


def image_size(recipe: Recipe) -> tuple[int, int]:
    """(height, width) in pixels of the model's input."""
    return size_pair(recipe.model.image_size, "model.image_size")


def scheduled_size(recipe: Recipe, epoch: int) -> tuple[int, int] | None:
    """(height, width) that `data.size_schedule` has in an epoch; None where there is no schedule."""
    size = size_at(recipe.data.size_schedule, epoch, None)
    return None if size is None else size_pair(size, "data.size_schedule")


def augmentations(recipe: Recipe, epoch: int | None = None) -> tuple[Augment, ...]:
    """What the plan of a training sample is drawn from: one for each view that the method wants; `epoch` as of
    `views`."""
    made: dict[str, Augment] = {}
    for view in views(recipe, epoch):
        stream = view.name if made else ""
        made[view.name] = Augment(
            size=view.size,
            crop=view.crop,
            crop_scale=view.crop_scale,
            crop_ratio=view.crop_ratio,
            flip=view.flip,
            policy=parse_policy(view.augment, view.size, view.color_jitter),
            erase=view.erase,
            stream=stream,
            crop_stream=stream if view.crop_of is None else made[view.crop_of].crop_stream,
        )
    return tuple(made.values())


def views(recipe: Recipe, epoch: int | None = None) -> tuple[View, ...]:
    """The views of every training sample, with every setting that method, recipe and data section give them, in an
    epoch; None: as if `data.size_schedule` were empty."""
    own, size = recipe.method.views(), recipe.model.image_size
    if epoch is not None:
        size = size_at(recipe.data.size_schedule, epoch, size)
    return resolved(overridden(own, recipe.data.views), recipe.data, size)


def mixing(recipe: Recipe) -> Mixing:
    """How the recipe mixes samples."""
    return Mixing(**{field.name: getattr(recipe.data, field.name) for field in fields(Mixing)})
