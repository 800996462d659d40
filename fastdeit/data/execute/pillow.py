"""Pictures as Pillow decodes them, and 16-bit greys as they are meant."""

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.ExifTags import Base as Tag

from fastdeit.data.execute.route import DAMAGED, Encoded, formats
from fastdeit.data.sources.source import BadImage

Box = tuple[int, int, int, int]
_PIXELS_AT_ONCE = 1 << 22
"""Of a conversion, whose copies would else take twice the memory of the largest pictures."""


def pixels(encoded: Encoded, box: Box | None = None) -> NDArray[np.uint8]:
    """The picture in RGB, uint8 `[height, width, 3]`, or the `box` (y, x, height, width) of it in source pixels.

    The pixels are those of `Image.convert("RGB")`, with one exception: Pillow clips greys of more than 8 bits to 255,
    and here they are scaled, as DALI does. BadImage if Pillow cannot decode the file.
    """
    route = encoded.route
    y, x, height, width = box or (0, 0, route.height, route.width)
    if min(y, x) < 0 or y + height > route.height or x + width > route.width:
        raise BadImage(f"the box {box} lies outside the picture, which has {route.width} x {route.height} pixels")
    try:
        with Image.open(io.BytesIO(memoryview(encoded.data)), formats=formats()) as image:
            image.load()
            found, ends = image.size, _ends(image)
            rgb = np.empty((height, width, 3), np.uint8)
            rows = max(1, _PIXELS_AT_ONCE // max(1, width))
            for top in range(0, height, rows):
                strip = rgb[top : top + rows]
                part = image.crop((x, y + top, x + width, y + top + len(strip)))
                strip[:] = np.asarray(part.convert("RGB")) if ends is None else _scaled(np.asarray(part), *ends)
    except UnidentifiedImageError:
        raise BadImage(DAMAGED) from None
    except Exception as error:
        # As in `route`, whatever the decoder of a format trips over.
        raise BadImage(str(error) or type(error).__name__) from error
    if found != (route.width, route.height):
        raise BadImage(
            f"the header says {route.width} x {route.height} pixels, but the picture has {found[0]} x {found[1]}"
        )
    return rgb


def as_file(rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Pixels, uint8 `[height, width, 3]`, as a PPM file, uint8 `[n]`, of which DALI makes the same pixels."""
    height, width = rgb.shape[:2]
    head = np.frombuffer(b"P6\n%d %d\n255\n" % (width, height), np.uint8)
    return np.concatenate((head, rgb.reshape(-1)))


def _ends(image: Image.Image) -> tuple[int, int] | None:
    """The levels that are black and white in a picture of greys of more than 8 bits, and None for any other."""
    if image.mode.startswith("I;16"):
        tags = image.tag_v2 if image.format == "TIFF" else {}
        most = (1 << tags.get(Tag.BitsPerSample, (16,))[0]) - 1
        # Pillow turns the levels of 8 bits round where 0 is white, and leaves those of 16.
        return (most, 0) if tags.get(Tag.PhotometricInterpretation) == 0 else (0, most)
    # Of a PGM with such a maximum, Pillow makes 32-bit integers up to 65535.
    return (0, 65535) if (image.format, image.mode) == ("PPM", "I") else None


def _scaled(grey: NDArray[np.generic], black: int, white: int) -> NDArray[np.uint8]:
    span = abs(white - black)
    levels = (np.abs(grey.astype(np.int32) - black) * 255 + span // 2) // span
    return np.repeat(levels.astype(np.uint8)[..., None], 3, axis=2)
