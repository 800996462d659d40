"""A part of the samples of a source, or the same samples with other class numbers.

`divided` holds a share of one split out; `numbered_by` takes class numbers from a file of names, as timm's class maps
are.
"""

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fastdeit.data.sources.index import digest
from fastdeit.data.sources.names import LeftOut
from fastdeit.data.sources.notices import say
from fastdeit.data.sources.share import share
from fastdeit.data.sources.source import (
    EXTENSIONS,
    DataError,
    NamedSource,
    Source,
    annotations_of,
    lines_of,
    listed,
)

_ANEW = ".png"


class Part:
    """Samples `index` (int64 `[n]`) of `whole`, in that order, with labels (int64 `[n]`) of `classes`."""

    def __init__(
        self,
        whole: NamedSource,
        index: NDArray[np.int64],
        labels: NDArray[np.int64],
        classes: Sequence[str],
        fingerprint: str,
        skipped: Sequence[tuple[str, str]],
    ) -> None:
        self.classes, self.fingerprint, self.skipped = classes, fingerprint, skipped
        self.left_out: LeftOut = getattr(whole, "left_out", LeftOut())
        self._whole, self._index, self._labels = whole, index, labels

    def __len__(self) -> int:
        return len(self._index)

    def read(self, index: int) -> NDArray[np.uint8]:
        """The encoded image `index`, as the whole source gives it: uint8 `[n]`."""
        return self._whole.read(int(self._index[index]))

    def label(self, index: int) -> int:
        """Class number of sample `index`."""
        return int(self._labels[index])

    def path(self, index: int) -> str:
        """Where sample `index` lies."""
        return self._whole.path(int(self._index[index]))

    def name(self, index: int) -> str:
        """Name of sample `index` within the data set."""
        return self._whole.name(int(self._index[index]))

    def annotations(self, index: int) -> Mapping[str, ArrayLike] | None:
        """What the whole source knows of sample `index` besides its class."""
        return annotations_of(self._whole, int(self._index[index]))


def labels_of(source: Source) -> NDArray[np.int64]:
    """The class numbers of all samples, int64 `[n]`."""
    return np.fromiter(map(source.label, range(len(source))), np.int64, len(source))


def divided(source: NamedSource, val: str) -> tuple[Part, Part]:
    """(training, held-out) samples of one split. On which side a sample is follows from its name and the share `val`
    alone, so that it stays there when others are added, and a greater share holds the samples of a smaller one."""
    try:
        part = share(val)
    except ValueError as error:
        raise DataError(f"data.val {error}") from error
    held_out = np.fromiter((place_of(first_name(source.name(i))) < part for i in range(len(source))), bool, len(source))
    if held_out.all() or not held_out.any():
        side = "training" if held_out.all() else "held-out"
        raise DataError(f"data.val={val}: of {len(source)} images no {side} image is left; give another share")
    labels = labels_of(source)
    sides = (("training", ~held_out, source.skipped), ("held out", held_out, ()))
    return tuple(
        Part(
            source,
            np.flatnonzero(mask),
            labels[mask],
            source.classes,
            digest([source.fingerprint, val, side]),
            skipped,
        )
        for side, mask, skipped in sides
    )


def place_of(name: str) -> float:
    """Where between 0 and 1 a sample of this name stands: evenly spread, and the same for ever."""
    return int.from_bytes(blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest(), "big") / 2**64


def first_name(name: str) -> str:
    """What a sample was called before `data pack --normalise` encoded it anew (`renamed`): it keeps its side."""
    before = name.removesuffix(_ANEW)
    return before if before.lower().endswith(EXTENSIONS) else name


def renamed(name: str) -> str:
    """The name of a sample that was encoded anew as PNG. One that tells no format stays."""
    return name + _ANEW if name.lower().endswith(EXTENSIONS) else name


def numbered_by(source: NamedSource, path: str) -> NamedSource:
    """The samples of `source` with class numbers by the file `path`: a class name a line, the first has number 0.

    Samples of classes that it does not name are left out, and a warning says how many; a class of it may have no
    samples. DataError for a file that cannot be read, names a class twice, or none of those of the source.
    """
    names = class_names(path)
    number = {name: at for at, name in enumerate(names)}
    if list(source.classes) == names:
        return source
    if len(source) and annotations_of(source, 0) is not None:
        raise DataError(
            f"{path}: the data set has annotations, whose class numbers are those of its own "
            f"{len(source.classes)} classes, and not of a file; leave data.classes out"
        )
    new = np.array([number.get(name, -1) for name in source.classes], np.int64)
    labels = new[labels_of(source)]
    index = np.flatnonzero(labels >= 0)
    if not len(index):
        raise DataError(
            f"{path}: none of its {len(names)} classes, as {listed(names, 3)}, has an image; the data set has "
            f"{listed(source.classes, 3)}"
        )
    others = [name for name, at in zip(source.classes, new, strict=True) if at < 0]
    if others:
        say(f"{path} does not name {listed(others)}: {len(labels) - len(index):,} images of these classes are left out")
    fingerprint = digest([source.fingerprint], names)
    return Part(source, index, labels[index], names, fingerprint, source.skipped)


def class_names(path: str | Path) -> list[str]:
    """The class names in a file, a line each."""
    path = Path(path).expanduser()
    if path.suffix == ".pkl":
        raise DataError(f"{path}: a pickle is not read, because it may run any program; write its names, a line each")
    names = [line.strip() for line in lines_of(path) if line.strip()]
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise DataError(f"{path}: {listed(twice)} stands there twice; a class has one number")
    if len(names) < 2 or any("\0" in name for name in names):
        raise DataError(f"{path}: no file of class names, a line each: {len(names)} of them; two or more are needed")
    return names
