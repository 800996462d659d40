"""Where encoded images come from.

A `Source` is random access: index in, encoded bytes out. Everything that restarts, shards or repeats samples needs no
more.
"""

import codecs
import re
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from fastdeit.data.sources import faults
from fastdeit.text import one_line

EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"),  # torchvision's
    *(".avif", ".gif", ".j2k", ".jfif", ".jp2", ".jpe", ".pbm", ".pnm"),
)
_MAX_CONTENTS = 1 << 32
_NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)(e[+-]\d+)?|[+-]?(nan|inf)", re.ASCII | re.IGNORECASE)
MAX_LABEL = 999_999  # beyond any image data set: a larger one is some other number
NO_FLOATS = (
    "pandas makes floats of whole numbers where one of them is missing; remove the rows without a label and write "
    "whole numbers, as by frame.dropna(subset=[LABEL]).astype({LABEL: int})"
)
"""What to do about labels such as 1.0."""


class DataError(ValueError):
    """The data set cannot be used; the message names the path and what to do.

    The names in it come from the data set: what cannot be printed is escaped. Lines of a list begin with two spaces.
    """

    def __init__(self, message: str) -> None:
        super().__init__("\n  ".join(map(one_line, message.split("\n  "))))


class MachineError(DataError):
    """The machine or its storage fails, and no file is at fault; once it is mended, the same command goes on."""


class BadImage(Exception):
    """One file cannot be decoded; the message is the reason, without the path."""


class Source(Protocol):
    """Labelled encoded images, by index. Equal fingerprints mean equal samples in equal order."""

    classes: Sequence[str]
    fingerprint: str

    def __len__(self) -> int: ...

    def read(self, index: int) -> NDArray[np.uint8]:
        """The encoded image, uint8 `[n]`. Raises OSError or BadImage where there is none."""
        ...

    def label(self, index: int) -> int:
        """The class number, an index into `classes`."""
        ...

    def path(self, index: int) -> str:
        """Where the image lies, for messages."""
        ...


class NamedSource(Source, Protocol):
    """A source that knows what its samples are called wherever the data set lies, and what it had to leave out:
    `skipped`, as (path, reason)."""

    skipped: Sequence[tuple[str, str]]

    def name(self, index: int) -> str:
        """What the sample is called within the data set."""
        ...


class AnnotatedSource(Source, Protocol):
    """A source that knows more of a sample than its class, such as the boxes of the objects in it. `batch.extras` has
    that by name, for training and held-out images, and `batch.boxes` moves boxes as each view was cut and flipped.

    The fingerprint stands for the annotations, too. What the first sample has says what all have. A packed file has no
    annotations, so `data pack` refuses such a source.
    """

    def annotations(self, index: int) -> Mapping[str, ArrayLike] | None:
        """By name an array, of the same shape and dtype for every sample: pad lists of objects to the longest, so that
        all steps have one shape. Class numbers in it are indices into `classes`. None: there are no annotations."""
        ...


def annotations_of(source: Source, index: int) -> Mapping[str, ArrayLike] | None:
    """What the source knows of a sample besides its class; None where it is no `AnnotatedSource`."""
    find = getattr(source, "annotations", None)
    return None if find is None else find(index)


def require_same_classes(root: str | Path, training: tuple[str, Source], held_out: tuple[str, Source]) -> None:
    """DataError unless both (split name, source) pairs have the same classes in the same order: a head has one output
    for each."""
    (train, a), (val, b) = training, held_out
    extra, missing = sorted(set(a.classes) - set(b.classes)), sorted(set(b.classes) - set(a.classes))
    if extra or missing:
        only = [f"only in {part}: {listed(names)}" for part, names in ((train, extra), (val, missing)) if names]
        alike = {unicodedata.normalize("NFC", name) for name in extra}.intersection(
            unicodedata.normalize("NFC", name) for name in missing
        )
        way_out = "some look alike, but one split has them in Unicode's form NFC and the other in NFD: rename those"
        raise DataError(
            f"{root}: the classes of {train} and {val} differ ({'; '.join(only)}); "
            f"{way_out if alike else 'make them the same'}"
        )
    if list(a.classes) != list(b.classes):
        raise DataError(
            f"{root}: the classes of {train} and {val} are the same, but in another order, so that labels "
            "mean different classes; number them alike"
        )


def require_distinct(root: str | Path, classes: Sequence[str]) -> None:
    """DataError where two classes have names that nobody can tell apart: they are one class, written in two ways."""
    seen: dict[str, str] = {}
    for name in classes:
        before = seen.setdefault(" ".join(unicodedata.normalize("NFC", name).split()), name)
        if before != name:
            raise DataError(
                f"{root}: the classes {before!a} and {name!a} look alike, but differ in spaces or in Unicode's form "
                "(NFC or NFD); give both the same name"
            )


def unreadable(error: OSError | MemoryError, path: str | Path) -> str:
    """Why the file at `path` cannot be used, if the file is at fault; MachineError if the machine is (`faults`)."""
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    lacking = faults.answer(error).lacking
    if lacking is not None:
        raise MachineError(f"{path} cannot be read: {reason}: {lacking}; no file is at fault") from error
    return f"the file cannot be read: {reason}"


def contents(path: Path) -> bytes:
    """A file of a data set that is no image: labels, lists. DataError if it cannot be read, or has more than 4 GiB."""
    try:
        size = faults.retried(path.stat).st_size
        if size > _MAX_CONTENTS:
            raise DataError(f"{path}: has {size:,} bytes, and no list of images or labels has; look whether it is one")
        return faults.retried(path.read_bytes)
    except (OSError, MemoryError) as error:
        unreadable(error, path)
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error


def lines_of(path: Path) -> list[str]:
    """The lines of such a file (`text_of`). A line feed, a carriage return or both end one: `str.splitlines` also cuts
    at characters that may stand in a name."""
    return re.split("\r\n|\r|\n", text_of(path))


def text_of(path: Path) -> str:
    """The text in such a file: UTF-8, with or without a byte order mark; other bytes stay as in names of files."""
    data = contents(path)
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{path}: the text is in UTF-16; save it as UTF-8")
    return data.decode("utf-8-sig", errors="surrogateescape")


def is_no_class(label: str) -> bool:
    """Whether a label is a number that is no class number, or "nan" as of a missing one, written as programs write
    these. Python also takes names for numbers, such as 0_2 and 1e5."""
    return not (label.isascii() and label.isdigit()) and _NUMBER.fullmatch(label) is not None


def class_numbers(labels: NDArray[np.int64], root: str | Path) -> list[str]:
    """Class names "0", "1", ... up to the largest label, where a data set has numbers only; DataError if fewer than
    two."""
    count = int(labels.max()) + 1
    if count < 2:
        raise DataError(f"{root}: every label is 0; classification needs two or more classes")
    return [str(number) for number in range(count)]


def quieten_pillow() -> None:
    """Ignore what Pillow warns of in files: their metadata, of which nothing is used, and sizes, which
    `execute/route.py` limits.

    For the process, since `warnings.catch_warnings` is not for threads. Pillow's deprecations are still heard.
    """
    for category in (UserWarning, Image.DecompressionBombWarning):
        warnings.filterwarnings("ignore", category=category, module=r"PIL\.")


def itemised(entries: Sequence[tuple[str, str]], limit: int) -> str:
    """The first `limit` of (path, reason), a line each, for a message, and how many more there are."""
    more = f"\n  and {len(entries) - limit} more" if len(entries) > limit else ""
    return "".join(f"\n  {one_line(path)}: {one_line(reason)}" for path, reason in entries[:limit]) + more


def listed(names: Sequence[str], limit: int = 5) -> str:
    """The first `limit` names, quoted, for a message, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(repr(name) for name in names[:limit]) + more
