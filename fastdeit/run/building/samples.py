"""From a recipe to its samples: training and held-out ones, and their classes."""

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from fastdeit.data.sources import digits
from fastdeit.data.sources.datasets import advice, kinds_at, layout, open_held_out, open_pair
from fastdeit.data.sources.kinds import GENERATED, Columns
from fastdeit.data.sources.parts import labels_of
from fastdeit.data.sources.source import DataError, MachineError, Source, annotations_of
from fastdeit.data.sources.synthetic import SyntheticSource
from fastdeit.errors import UsageError
from fastdeit.recipe.resolve import Recipe
from fastdeit.run.building.pictures import image_size
from fastdeit.run.places import check_root

Opened = TypeVar("Opened")


def sources(recipe: Recipe) -> tuple[Source, Source]:
    """(training, held-out) samples. Raises DataError or UsageError with the field, the path and the way out."""
    found = _sources(recipe)
    for source in found:
        _check_annotations(recipe, source)
    return found


def _sources(recipe: Recipe) -> tuple[Source, Source]:
    data = recipe.data
    if data.source == "synthetic":
        shape = {"classes": data.synthetic_classes, "size": image_size(recipe)}
        train = SyntheticSource(data.synthetic_samples, seed=recipe.train.seed, **shape)
        held_out = max(data.synthetic_samples // 10, 1)
        return train, SyntheticSource(held_out, seed=recipe.train.seed + 1, **shape)
    if data.source == "digits":
        return open_pair("folder", digits.prepare())
    return _opened(recipe, open_pair)


def held_out(recipe: Recipe) -> Source:
    """The held-out samples alone, where the training split need not be there. Raises as `sources`."""
    if recipe.data.source in GENERATED:
        return sources(recipe)[1]
    source = _opened(recipe, open_held_out)
    _check_annotations(recipe, source)
    return source


def _check_annotations(recipe: Recipe, source: Source) -> None:
    """Raise UsageError where the method asks where things lie and the source does not know it."""
    if recipe.method.needs_boxes and len(source) and annotations_of(source, 0) is None:
        raise UsageError(
            f"method {recipe.method.use} asks where things lie in the pictures, and data.source {recipe.data.source} "
            "has no annotations; name a source that has them, such as a reader of your own by import path"
        )


def _opened(recipe: Recipe, opened: Callable[..., Opened]) -> Opened:
    """What `opened` makes of the recipe's kind, root and splits, with errors that say what to do."""
    check_root(recipe)
    data = recipe.data
    splits = data.train, data.val
    try:
        columns = Columns(data.image_column, data.label_column)
        return opened(data.source, data.root, *splits, columns=columns, classes=data.classes)
    except MachineError:
        raise
    except DataError as error:
        raise DataError(
            f"data.source {data.source}: {error}{_expected(error, data.source, data.root, *splits)}"
        ) from error


def _expected(error: DataError, kind: str, root: str, train: str, val: str) -> str:
    """What to add to `error`, the reason why `root` is no data set of that kind."""
    found = kinds_at(root, train, val)
    if kind in found:
        return ""
    if found:
        return f"; it looks like {' or '.join(found)}: add data.source={found[0]}"
    known = advice(root, train, val)
    if known:
        return f"; {known}"
    expected = layout(kind, train, val)
    return "" if expected in str(error) else f"; expected are {expected}"


def compared_classes(recipe: Recipe, source: Source) -> Sequence[str] | None:
    """Names of the classes of `source` in the order of their labels, with which those of weights are compared; None for
    synthetic images, whose classes have no names."""
    return None if recipe.data.source == "synthetic" else source.classes


def class_counts(source: Source) -> list[int]:
    """How many images each class has."""
    return np.bincount(labels_of(source), minlength=len(source.classes)).tolist()
