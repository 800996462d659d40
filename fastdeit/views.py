"""Views: the augmented renderings of every sample that a method asks the input pipeline for.

A field of a view is set in one of three places. The recipe's `data.views.NAME` wins over the view that the method asks
for, and that over the recipe's `data` section (`model.image_size`, for the size). `resolved` puts the three together.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Discriminator, Field, Tag, ValidationInfo

from fastdeit.data.plan import policy
from fastdeit.fields import Fraction, ImageSize, NonNegative, Range, Section, Text, size_pair


def _within_the_image(scale: tuple[float, float]) -> tuple[float, float]:
    if scale[1] > 1:
        raise ValueError("must be at most 1: a crop is a part of the image")
    return scale


def parse_policy(
    augment: str, size: tuple[int, int] = (224, 224), color_jitter: float | tuple[float, ...] | None = None
) -> policy.Policy:
    """The operations that `augment` and `color_jitter` name, for outputs of `size` (see `policy.parse`); ValueError
    where there are no such operations."""
    return policy.parse(augment, size, color_jitter)


def _known_policy(augment: str) -> str:
    parse_policy(augment)
    return augment


def _goes_with_the_policy(strength: Any, info: ValidationInfo) -> Any:
    parse_policy(info.data.get("augment") or "none", color_jitter=strength)
    return strength


def _from_the_first_epoch(schedule: tuple[tuple[int, Any], ...]) -> tuple[tuple[int, Any], ...]:
    epochs = [epoch for epoch, _ in schedule]
    if epochs and (epochs[0] != 0 or sorted(set(epochs)) != epochs):
        raise ValueError(f"must begin with epoch 0, and each entry with a later epoch than the one before: {epochs}")
    return schedule


def size_at(schedule: Sequence[tuple[int, Any]], epoch: int, image_size: Any) -> Any:
    """The size that a `SizeSchedule` has in an epoch; `image_size` where there is no schedule."""
    return next((size for begin, size in reversed(schedule) if begin <= epoch), image_size)


Crop = Literal["random_resized", "simple"]
CropScale = Annotated[Range, AfterValidator(_within_the_image)]
PolicyText = Annotated[str, AfterValidator(_known_policy)]
Jitter = Annotated[
    Annotated[NonNegative, Tag("one")]
    | Annotated[tuple[NonNegative, ...], Field(min_length=3, max_length=4), Tag("all")],
    Discriminator(lambda strength: "all" if isinstance(strength, list | tuple) else "one"),
    AfterValidator(_goes_with_the_policy),
]
SizeSchedule = Annotated[
    tuple[tuple[Annotated[int, Field(ge=0, le=100_000_000)], ImageSize], ...], AfterValidator(_from_the_first_epoch)
]
"""(epoch, size) pairs: from that epoch on, images have that size."""
CROP_FIELDS = ("crop", "crop_scale", "crop_ratio", "flip")
"""What a view shares with the view that its `crop_of` names."""


class AugmentSettings(Section):
    """How an image is augmented. None leaves a field to what is below: the method's view, or the recipe's `data`."""

    crop: Crop | None = None
    """random_resized: torchvision's RandomResizedCrop; simple: DeiT III's, resized so that the short side fits, padded
    by 4 reflected pixels, cut at random."""
    crop_scale: CropScale | None = None
    """Area of the random resized crop as a fraction of the image: smallest, largest."""
    crop_ratio: Range | None = None
    """Width over height of the random resized crop: smallest, largest."""
    flip: Fraction | None = None
    """Probability of a horizontal flip."""
    augment: PolicyText | None = None
    """Operations on the pixels in timm's notation: rand-m9-mstd0.5-inc1, original, trivial, three_augment, none, ..."""
    color_jitter: Jitter | None = None
    """Strength of brightness, contrast and saturation, or three of them, or four with the hue's; null: that of the
    policy in `augment`, 0.3 for three_augment and none for the others."""
    erase: Fraction | None = None
    """Probability of random erasing: a rectangle of 2 to 33 % of the image filled with noise."""


class ViewSettings(AugmentSettings):
    """What a method says of a view, and what a recipe changes of it under `data.views.NAME`."""

    size: ImageSize | None = None
    """In pixels: the side of a square, or [height, width]; null: `model.image_size`."""
    crop_of: Text | None = None
    """Name of an earlier view of which this one takes crop and flip. Where both also have the same size, they differ in
    `augment`, `color_jitter` and `erase` alone."""


class View(ViewSettings):
    """One augmented rendering of every sample that a method asks the input pipeline for: `View("local_0", size=96)`.

    Random numbers of the first view are those of a method with one view, whatever its name; those of another depend on
    its name, and on no other view.
    """

    name: str = "main"

    def __init__(self, name: str = "main", **settings: Any) -> None:
        """Raises pydantic's ValidationError, a ValueError, for settings that cannot be."""
        super().__init__(name=name, **settings)

    def over(self, below: AugmentSettings) -> "View":
        """This view, with what it leaves open taken from `below`.

        `color_jitter` goes with `augment`: a view that sets the latter alone has the jitter of its own policy.
        """
        mine = {field: value for field, value in self if value is not None}
        if self.augment is not None:
            mine["color_jitter"] = self.color_jitter
        theirs = {field: value for field, value in below if field in ViewSettings.model_fields}
        return self.model_copy(update=theirs | mine)


def overridden(views: Sequence[View], given: Mapping[str, ViewSettings]) -> tuple[View, ...]:
    """`views` with the fields that `given` sets for some of them, by name (a recipe's `data.views`)."""
    return tuple(View(view.name, **dict(given[view.name])).over(view) if view.name in given else view for view in views)


def resolved(views: Sequence[View], data: AugmentSettings, image_size: int | tuple[int, int]) -> tuple[View, ...]:
    """`views` with nothing left open but `color_jitter`: what they do not say is as in `data`, a recipe's data section,
    and in `image_size`. Sizes are pairs (height, width); a view with `crop_of` has the crop and flip of that one.
    """
    complete: dict[str, View] = {}
    for view in views:
        changes: dict[str, Any] = {"size": size_pair(view.size or image_size, "size")}
        if view.crop_of is not None:
            changes |= {field: getattr(complete[view.crop_of], field) for field in CROP_FIELDS}
        complete[view.name] = view.over(data).model_copy(update=changes)
    return tuple(complete.values())


def view_problems(views: Sequence[View]) -> Iterator[tuple[str, str, str]]:
    """(view, field, problem) wherever `views` of one method do not go together."""
    before: list[str] = []
    for view in views:
        if not view.name.isidentifier():
            yield view.name, "name", "must consist of letters, digits and _, as in data.views.NAME.size=96"
        if view.name in before:
            yield view.name, "name", "is that of an earlier view"
        if view.crop_of is not None and view.crop_of not in before:
            earlier = f"({', '.join(before)})" if before else "(it is the first)"
            yield view.name, "crop_of", f"must name a view before {view.name} {earlier}, got {view.crop_of!r}"
        for field in CROP_FIELDS:
            if view.crop_of is not None and getattr(view, field) is not None:
                yield view.name, field, f"does not go with crop_of: crop and flip are those of view {view.crop_of}"
        before.append(view.name)


def resolution_problems(
    views: Sequence[View], data: AugmentSettings, image_size: int | tuple[int, int]
) -> Iterator[tuple[str, str, str]]:
    """(view, field, problem) wherever `views`, in which `view_problems` finds nothing, do not go with what `resolved`
    takes from `data` and `image_size`."""
    whole = {view.name: view for view in resolved(views, data, image_size)}
    for view in whole.values():
        try:
            parse_policy(view.augment, view.size, view.color_jitter)
        except ValueError as error:
            yield view.name, "color_jitter", f"{error}, or give the view an augment of its own"
        shared = whole.get(view.crop_of)
        if shared and shared.crop == "simple" and shared.size != view.size:
            yield (
                view.name,
                "crop_of",
                f"gives a view of {_pixels(view.size)} pixels the crop of view {shared.name}, a simple crop to "
                f"{_pixels(shared.size)}: give both the same size, or view {shared.name} crop random_resized",
            )


def _pixels(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
