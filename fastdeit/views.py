"""Views: the augmented renderings of every sample that a method asks the input pipeline for."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from pydantic import BaseModel


@dataclass(frozen=True)
class View:
    """One augmented rendering of every sample that a method asks the input pipeline for.

    What is None is as the recipe says: `size`, the side of a square in pixels, in its model section, the others in its
    data section, whose fields of these names say what they mean. `color_jitter` goes with `augment`: a view that sets
    the latter alone has that policy's own jitter. crop_of: name of an earlier view of which this one takes crop and
    flip; where both also have the same size, they differ in `augment`, `color_jitter` and `erase` alone.

    Random numbers of the first view are those of a method with one view, whatever its name; those of another depend on
    its name, and on no other view.
    """

    name: str = "main"
    size: int | None = None
    crop: Literal["random_resized", "simple"] | None = None
    crop_scale: tuple[float, float] | None = None
    flip: float | None = None
    augment: str | None = None
    color_jitter: float | tuple[float, ...] | None = None
    erase: float | None = None
    crop_of: str | None = None

    def over(self, below: Any) -> "View":
        """This view, and what it leaves open as `below` has it: another view, or a recipe's data section."""
        names = {
            field.name for field in fields(self) if getattr(self, field.name) is None and hasattr(below, field.name)
        }
        if self.augment is not None:
            names.discard("color_jitter")
        return replace(self, **{name: getattr(below, name) for name in names})


def overridden(views: Sequence[View], given: Mapping[str, BaseModel]) -> tuple[View, ...]:
    """`views` with the fields that `given` sets for some of them, by name (a recipe's `data.views`)."""
    return tuple(View(view.name, **dict(given[view.name])).over(view) if view.name in given else view for view in views)


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
        for name in ("crop", "crop_scale", "flip"):
            if view.crop_of is not None and getattr(view, name) is not None:
                yield view.name, name, f"has no place beside crop_of: crop and flip are those of view {view.crop_of}"
        before.append(view.name)
