"""Pictures of packages as the sets want them: in RGB, on white, square."""

import struct
from pathlib import Path

from PIL import Image, ImageChops

from fastdeit.errors import UsageError


def on_white(path: Path, side: int, *, trim: bool = False) -> Image.Image:
    """The picture in the file `path`, laid on white, scaled to fit into a white square of `side` pixels, as RGB.

    trim  cut off the margins that are transparent or white, before it is scaled

    Pillow's resampling of 8-bit pixels computes with integers, so every machine makes the same pixels. The picture is
    laid on white before it is scaled: the colour of transparent pixels means nothing.

    Raises UsageError if the file is damaged.
    """
    try:
        with Image.open(path) as image:
            picture = image.convert("RGBA")
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise _damaged(path, error) from error
    white = Image.new("RGBA", picture.size, "white")
    flat = Image.alpha_composite(white, picture).convert("RGB")
    if trim:
        flat = flat.crop(ImageChops.difference(flat, Image.new("RGB", flat.size, "white")).getbbox())
    longest = max(flat.size)
    width, height = (max(1, round(length * side / longest)) for length in flat.size)
    square = Image.new("RGB", (side, side), "white")
    square.paste(flat.resize((width, height), Image.Resampling.BICUBIC), ((side - width) // 2, (side - height) // 2))
    return square


def png_pixels(path: Path) -> int:
    """Width times height of a PNG file by its header, without Pillow's warning of large ones; 0 if it has no header.

    Raises UsageError if the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            header = file.read(24)  # the signature, then length and name of the first part, then width and height
    except OSError as error:
        raise _damaged(path, error) from error
    width, height = struct.unpack(">II", header[16:]) if len(header) == 24 else (0, 0)
    return int(width * height)


def _damaged(path: Path, error: Exception) -> UsageError:
    return UsageError(f"{path}: this picture cannot be read ({error}); install its package again")
