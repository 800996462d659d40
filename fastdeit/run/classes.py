"""Class lists compared in order: what a head's rows mean, and whether the data mean the same by their labels.

A label is the place of its class in the list of the data set, and a row of a head is the place of its class in the list
of the data it was trained on. Two lists of one length that differ give wrong answers without an error.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fastdeit.text import shorten, some

_WORDNET = re.compile(r"n\d{8}")


@dataclass(frozen=True)
class Match:
    """How the classes `theirs` of some weights stand to the classes `ours` of the data.

    kind         equal: the same names in the same order; permuted: in another order; other_count; other_names: as many,
                 but not the same
    permutation  `theirs[permutation[i]] == ours[i]`: row i of the head for our classes is row permutation[i] of theirs;
                 None unless equal or permuted
    """

    kind: Literal["equal", "permuted", "other_count", "other_names"]
    permutation: tuple[int, ...] | None = None


def match(theirs: Sequence[str], ours: Sequence[str]) -> Match:
    """Compare two lists of class names. Names that occur twice in a list tell nothing of their order, so such lists
    are equal or `other_names`."""
    if tuple(theirs) == tuple(ours):
        return Match("equal", tuple(range(len(ours))))
    if len(theirs) != len(ours):
        return Match("other_count")
    place = {name: index for index, name in enumerate(theirs)}
    if len(place) < len(theirs) or place.keys() != set(ours):
        return Match("other_names")
    return Match("permuted", tuple(place[name] for name in ours))


def comparable(theirs: Sequence[str], ours: Sequence[str]) -> bool:
    """False where one list has WordNet ids, as ImageNet's folders (n01440764), and the other has words: the same class
    then has two names, and only their number can be compared."""
    return _are_ids(theirs) == _are_ids(ours)


def _are_ids(names: Sequence[str]) -> bool:
    return all(_WORDNET.fullmatch(name) for name in names)


def difference(theirs: Sequence[str], ours: Sequence[str]) -> str:
    """The first differing names of two lists of one length, for a message."""
    index = next(index for index, (one, other) in enumerate(zip(theirs, ours, strict=True)) if one != other)
    unknown = sorted(set(ours) - set(theirs))
    more = f"; they do not know {some(unknown)}" if unknown else ""
    one, other = (shorten(repr(names[index]), 100) for names in (theirs, ours))
    return f"class {index} is {one} of the weights and {other} of the data{more}"
