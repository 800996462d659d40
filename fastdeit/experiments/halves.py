"""Half of the classes of an image folder as a data set of its own, for transfer from one half to the other."""

from pathlib import Path

import numpy as np

from fastdeit.data.sources.folder import FileSource, FolderSource
from fastdeit.data.sources.index import Strings
from fastdeit.data.sources.source import DataError

HALVES = ("first", "second")


def open_half(root: Path, split: str) -> FileSource:
    """The images of `ROOT/SPLIT/CLASS/` whose class is in one half of the sorted names.

    split  SPLIT/first or SPLIT/second, such as train/first. Of an odd number of classes the second half has one more

    Raises DataError for another half, and where a half would have less than two classes.
    """
    name, _, half = split.rpartition("/")
    if half not in HALVES:
        raise DataError(f"data split {split!r}: must end in /first or /second, the half of the classes")
    whole = FolderSource(root / name)
    middle = len(whole.classes) // 2
    if middle < 2:
        raise DataError(f"{root / name}: has {len(whole.classes)} classes; halves need at least 4")
    first, stop = (0, middle) if half == "first" else (middle, len(whole.classes))
    labels = np.array([whole.label(index) for index in range(len(whole))])
    kept = np.flatnonzero((labels >= first) & (labels < stop))
    names = Strings.of([whole.name(index) for index in kept])
    return FileSource(root / name, whole.classes[first:stop], names, labels[kept] - first)
