"""What training makes of a file: its pixels, by the executors' own decoders, and what is odd about it.

`fastdeit data check` and `data pack --normalise` ask about every file, and a resumed run
about those that it could not use before.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.ExifTags import Base as Tag

from fastdeit.data.execute import pillow
from fastdeit.data.execute.decode import decoded, pixels
from fastdeit.data.execute.route import file_of, formats, routed
from fastdeit.data.sources.source import BadImage, Source

PLAIN = "JPEG", "PNG", "WEBP"
_TRANSPARENT = "transparency, which is dropped"
_MODES = {
    "1": "black and white, read as 0 and 255",
    "P": "a palette, read as the colours of its entries",
    "PA": "a palette, read as the colours of its entries",
    "LA": _TRANSPARENT,
    "La": _TRANSPARENT,
    "RGBA": _TRANSPARENT,
    "RGBa": _TRANSPARENT,
    "CMYK": "CMYK, converted to RGB",
    "LAB": "L*a*b*, converted to RGB",
    "HSV": "HSV, converted to RGB",
    "F": "floats, converted to 8 bits",
}
_DEEP = "more than 8 bits a channel, read as 8"
_SUFFIXES = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".bmp": "BMP", ".tif": "TIFF"}
_SUFFIXES |= {".tiff": "TIFF", ".ppm": "PPM", ".pgm": "PPM", ".gif": "GIF"}


@dataclass(frozen=True)
class Odd:
    """One thing that is odd about a file. kind: what, in words that do not depend on the file; rewritten: whether a
    plain file with the same pixels would be without it."""

    kind: str
    rewritten: bool = False


_PILLOW_REFUSES = Odd("file that Pillow refuses, and other programs may refuse too", rewritten=True)


@dataclass(frozen=True)
class Picture:
    """A file that training can use. format: Pillow's name of it, with its mode; why: what kind of file it is that
    Pillow decodes it, empty where DALI does (`Route.why`); odd: what is odd about it; rgb: its pixels as training cuts
    boxes of them, uint8 `[height, width, 3]`."""

    format: str
    why: str
    odd: tuple[Odd, ...]
    rgb: NDArray[np.uint8]


def picture(data: NDArray[np.uint8], name: str) -> Picture:
    """What training has of the file with these bytes, uint8 `[n]`, and this name; BadImage if it cannot use it."""
    rgb, route = decoded(data)
    try:
        with Image.open(io.BytesIO(memoryview(data)), formats=formats()) as image:
            kind, odd = f"{image.format} {image.mode}", list(_odd(image, name))
    except Exception:  # whatever the parser of a format trips over; DALI has read it all the same
        kind, odd = f"{route.format} RGB", [_PILLOW_REFUSES]
    if route.why and not any(one.rewritten for one in odd):
        odd.append(Odd(route.why, rewritten=True))
    return Picture(kind, route.why, tuple(odd), rgb)


def read_by_both(data: NDArray[np.uint8], name: str) -> Picture:
    """As `picture`, for twice the time: Pillow, too, decodes the file, so that what it refuses behind the header is
    known to be odd."""
    found = picture(data, name)
    if not found.why and _PILLOW_REFUSES not in found.odd:
        try:
            pillow.pixels(routed(data))
        except BadImage:
            return replace(found, odd=(*found.odd, _PILLOW_REFUSES))
    return found


def fault(source: Source, index: int) -> str | None:
    """Why training cannot use a sample; None if it can. MachineError where no file is at fault."""
    found = file_of(source, index)
    if isinstance(found, str):
        return found
    try:
        pixels(found.data)
    except BadImage as error:
        return str(error)
    return None


def _odd(image: Image.Image, name: str) -> Iterator[Odd]:
    if image.format not in PLAIN:
        yield Odd(f"{image.format} instead of JPEG, PNG or WebP", rewritten=True)
    if image.mode in _MODES:
        yield Odd(_MODES[image.mode], rewritten=True)
    elif image.mode.startswith("I"):
        yield Odd(_DEEP, rewritten=True)
    elif "transparency" in image.info:
        yield Odd(_TRANSPARENT, rewritten=True)
    if getattr(image, "is_animated", False):
        yield Odd("several frames, of which the first is read", rewritten=True)
    if _orientation(image) not in (0, 1):
        yield Odd("to be shown rotated or mirrored, which training does not do")
    said = _SUFFIXES.get(PurePosixPath(name).suffix.lower())
    if said is not None and said != image.format:
        yield Odd(f"a {image.format} file that is called {said}")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(Tag.Orientation, 1))
    except Exception:  # whatever a damaged EXIF block makes Pillow trip over; no pixel depends on it
        return 1
