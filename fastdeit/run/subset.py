"""Data that have some of the classes of a network: their labels become the places of these classes in its head."""

from collections.abc import Sequence

import numpy as np

from fastdeit.data.sources.parts import Part, labels_of
from fastdeit.data.sources.source import NamedSource, annotations_of
from fastdeit.errors import UsageError
from fastdeit.run import classes as class_lists
from fastdeit.text import some


class Renumbered(Part):
    """`source` with the class list `classes`, in which each of its own classes has another place."""

    def __init__(self, source: NamedSource, classes: Sequence[str]) -> None:
        if len(source) and annotations_of(source, 0) is not None:
            raise UsageError(
                "the data set has annotations, whose class numbers are those of its own classes: it cannot be judged "
                f"by weights of {len(classes)} classes, only by those of all of its own"
            )
        places = {name: place for place, name in enumerate(classes)}
        labels = np.array([places[name] for name in source.classes])[labels_of(source)]
        super().__init__(source, np.arange(len(source)), labels, list(classes), source.fingerprint, source.skipped)


def is_subset(theirs: Sequence[str] | None, ours: Sequence[str], origin: str) -> bool:
    """Whether the data's classes `ours` are fewer than `theirs`, of weights, and all among them.

    False where nothing can be said: names that cannot be compared, or as many, or more. Raises UsageError where they
    are fewer and some are not among them; `origin` names the weights.
    """
    if theirs is None or len(ours) >= len(theirs) or len(set(theirs)) < len(theirs):
        return False
    if not class_lists.comparable(theirs, ours):
        return False
    if unknown := sorted(set(ours) - set(theirs)):
        raise UsageError(
            f"{origin}: the weights do not know {some(unknown)}, of the {len(ours)} classes of the data; images of the "
            f"{len(theirs)} classes that they know can be judged, or of some of these"
        )
    return True
