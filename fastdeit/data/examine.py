"""What training makes of a file: its pixels, by the executors' own decoders, and what is odd about it.

`fastdeit data check` asks about every file, `data pack --normalise` about those that it encodes anew, and a resumed run
about those that it could not use before.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.ExifTags import Base as Tag

from fastdeit.data.execute.decode import decoded, pixels
from fastdeit.data.execute.route import file_of, formats
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
_PILLOW_REFUSES = "file that Pillow refuses, and other programs may refuse too"
_DEEP = "more than 8 bits a channel, read as 8"
_SUFFIXES = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG", ".webp": "WEBP", ".bmp": "BMP", ".tif": "TIFF"}
_SUFFIXES |= {".tiff": "TIFF", ".ppm": "PPM", ".pgm": "PPM", ".gif": "GIF"}


@dataclass(frozen=True)
class Odd:
    """One thing that is odd about a file. kind: what, in words that do not depend on the file; rewritten: whether the
    same pixels in a plain file would be read without it."""

    kind: str
    rewritten: bool = False


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
            odd = tuple(_odd(image, name)) or ((Odd(route.why),) if route.why else ())
            return Picture(f"{image.format} {image.mode}", route.why, odd, rgb)
    except Exception:  # as in `oddities`; DALI has read it all the same
        return Picture(f"{route.format} RGB", route.why, (Odd(_PILLOW_REFUSES),), rgb)


def oddities(data: NDArray[np.uint8], name: str) -> tuple[Odd, ...]:
    """What the header of a file tells that is odd about it; nothing of a file that Pillow does not know."""
    try:
        with Image.open(io.BytesIO(memoryview(data)), formats=formats()) as image:
            return tuple(_odd(image, name))
    except Exception:  # whatever the parser of a format trips over; what is wrong is for the decoder to say
        return ()


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
