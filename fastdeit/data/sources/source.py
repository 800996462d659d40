"""Where encoded images come from, and what is wrong with them before a decoder sees them.

A `Source` is random access: index in, encoded bytes out. Everything that restarts, shards or repeats samples needs no
more. `header` is the gate in front of the decoder: DALI 2.2 to 2.4 ends in a segmentation fault on bytes that are no
image at all (empty, text, HTML), so it only ever gets bytes that passed here.
"""

import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.ExifTags import Base as Tag

from fastdeit.data.sources import faults

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_DECODABLE = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "JPEG2000")
# (format, Pillow's mode) of which DALI 2.4 makes other pixels, or none.
_MISREAD = {*(("TIFF", mode) for mode in ("1", "F", "I", "LA", "LAB")), ("PPM", "F"), ("JPEG2000", "LA")}
Checked = tuple[NDArray[np.uint8], tuple[int, int]]
MAX_LABEL = 999_999  # beyond any image data set: a larger one is some other number
_TAIL = 64
_MAX_PIXELS = 2 * 89_478_485  # where Pillow's decompression bomb check raises


class DataError(ValueError):
    """The data set cannot be used; the message names the path and what to do."""


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


def require_same_classes(root: str | Path, training: tuple[str, Source], held_out: tuple[str, Source]) -> None:
    """DataError unless both (split name, source) pairs have the same classes in the same order: a head has one output
    for each."""
    (train, a), (val, b) = training, held_out
    extra, missing = sorted(set(a.classes) - set(b.classes)), sorted(set(b.classes) - set(a.classes))
    if extra or missing:
        only = [f"only in {part}: {listed(names)}" for part, names in ((train, extra), (val, missing)) if names]
        raise DataError(f"{root}: the classes of {train} and {val} differ ({'; '.join(only)}); make them the same")
    if list(a.classes) != list(b.classes):
        raise DataError(
            f"{root}: the classes of {train} and {val} are the same, but in another order, so that labels "
            "mean different classes; number them alike"
        )


def unreadable(error: OSError | MemoryError, path: str | Path) -> str:
    """Why the file at `path` cannot be used, if the file is at fault; MachineError if the machine is (`faults`)."""
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    lacking = faults.answer(error).lacking
    if lacking is not None:
        raise MachineError(f"{path} cannot be read: {reason}: {lacking}; no file is at fault") from error
    return f"the file cannot be read: {reason}"


def contents(path: Path) -> bytes:
    """A file of a data set that is no image: labels, lists. DataError if it cannot be read."""
    try:
        return faults.retried(path.read_bytes)
    except OSError as error:
        unreadable(error, path)
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def class_numbers(labels: NDArray[np.int64], root: str | Path) -> list[str]:
    """Class names "0", "1", ... up to the largest label, where a data set has numbers only; DataError if fewer than
    two."""
    count = int(labels.max()) + 1
    if count < 2:
        raise DataError(f"{root}: every label is 0; classification needs two or more classes")
    return [str(number) for number in range(count)]


def header(data: NDArray[np.uint8]) -> tuple[int, int]:
    """(width, height) of an encoded image, in microseconds for JPEG and PNG; BadImage if it is none that DALI
    decodes, or larger than Pillow decodes: a header of a few bytes may ask for gigabytes of pixels."""
    width, height = _size(memoryview(data))
    if width < 1 or height < 1:
        raise BadImage(f"the header is damaged: it says {width} x {height} pixels")
    if width * height > _MAX_PIXELS:
        raise BadImage(f"the header says {width} x {height} pixels; more than {_MAX_PIXELS} are not decoded")
    return width, height


def _size(view: memoryview) -> tuple[int, int]:
    if len(view) == 0:
        raise BadImage("the file is empty")
    if view[:2] == b"\xff\xd8":
        return _jpeg_size(view)
    if view[:16] == b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" and len(view) >= 33:
        return int.from_bytes(view[16:20], "big"), int.from_bytes(view[20:24], "big")
    try:
        with Image.open(io.BytesIO(view), formats=_DECODABLE) as image:
            kind, size = (image.format, image.mode), image.size
            if kind[0] == "TIFF":
                # Alone of a TIFF Pillow gives the size after the rotation that its orientation asks for.
                size = int(image.tag_v2[Tag.ImageWidth]), int(image.tag_v2[Tag.ImageLength])
    except UnidentifiedImageError:
        raise BadImage(f"not a JPEG, PNG, WebP, BMP, TIFF or PPM image: it starts with {bytes(view[:16])!r}") from None
    except Exception as error:
        raise BadImage(f"the header cannot be read: {error or type(error).__name__}") from error
    if kind in _MISREAD:
        raise BadImage("a {} image of mode {} cannot be decoded as Pillow does; convert it to RGB".format(*kind))
    return size


def check(data: NDArray[np.uint8]) -> tuple[int, int]:
    """`header`, and a full decode of a JPEG or PNG that lacks its end marker: files cut short are found here, whatever
    part of them a crop needs, and not by a failed batch."""
    size = header(data)
    start, tail = data[:2].tobytes(), data[-_TAIL:].tobytes()
    cut = (start == b"\xff\xd8" and b"\xff\xd9" not in tail) or (start == b"\x89P" and b"IEND" not in tail)
    reason = undecodable(data) if cut else None
    if reason:
        raise BadImage(reason)
    return size


def checked(source: Source, index: int) -> Checked | str:
    """A sample's bytes and (width, height), or the reason why it cannot be used. MachineError where no file is at
    fault."""
    try:
        data = source.read(index)
        return data, check(data)
    except BadImage as error:
        return str(error)
    except (OSError, MemoryError) as error:
        return unreadable(error, source.path(index))


def undecodable(data: NDArray[np.uint8]) -> str | None:
    """Why PIL cannot decode `data` completely, or None if it can."""
    try:
        with Image.open(io.BytesIO(memoryview(data))) as image:
            image.convert("RGB")
    except UnidentifiedImageError:
        return "the header is damaged"
    except Exception as error:
        # Whatever the parser of a format trips over: besides OSError, ValueError and SyntaxError also struct.error,
        # EOFError, TypeError, KeyError, zlib.error, MemoryError.
        return str(error) or type(error).__name__
    return None


def quieten_pillow() -> None:
    """Ignore what Pillow warns of in files: their metadata, of which nothing is used, and sizes, which `header` limits.

    For the process, since `warnings.catch_warnings` is not for threads. Pillow's deprecations are still heard.
    """
    for category in (UserWarning, Image.DecompressionBombWarning):
        warnings.filterwarnings("ignore", category=category, module=r"PIL\.")


def _jpeg_size(view: memoryview) -> tuple[int, int]:
    at, end = 2, len(view)
    while at + 4 <= end:
        if view[at] != 0xFF:
            break
        marker = view[at + 1]
        if marker == 0xFF:
            at += 1
            continue
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if at + 9 > end:
                break
            height, width = int.from_bytes(view[at + 5 : at + 7], "big"), int.from_bytes(view[at + 7 : at + 9], "big")
            if height == 0 or width == 0:
                break
            return width, height
        at += 2 if marker == 0x01 or 0xD0 <= marker <= 0xD7 else 2 + int.from_bytes(view[at + 2 : at + 4], "big")
    raise BadImage("the JPEG header is cut off or damaged")


def listed(names: Sequence[str], limit: int = 5) -> str:
    """The first `limit` names, quoted, for a message, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(repr(name) for name in names[:limit]) + more
