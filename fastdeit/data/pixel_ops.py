"""Pixel operations on one image, as the CPU executes them: Pillow's results, on arrays.

`auto_contrast`, `equalize`, `rotate`, `sharpness`, `grayscale`, `blur` and `hue` are Pillow's. The others are a few
passes of numpy with Pillow's rounding (float32, then truncated), cheaper where it counts:

    blend(base, x, f) = trunc(clip(base + f (x - base), 0, 255))
    color: base = grey; contrast: base = mean grey; brightness: base = 0

Shear and translation move every row (or column) along itself by one amount, so that of the 16 taps of Pillow's bicubic
transform 4 are left. With a, b, c, e the pixels at -1, 0, 1, 2 from the position and t the fraction beyond b (this is
the cubic with coefficient -1; Pillow's resize has -1/2):

    shift = trunc(clip(b + t ((c - a) + t ((2a - 2b + c - e) + t (b - a + e - c))), 0, 255))

and FILL where the position lies outside the image. The differences are integers and exact, so that flat areas stay.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps
from PIL.ImageEnhance import Sharpness

from fastdeit.data.policy import FILL, KINDS

Pixels = NDArray[np.uint8]
# Rows or columns at a time: temporaries stay in the cache, and below the size for which malloc maps new pages.
_LINES = 48


def apply(image: Pixels, kind: NDArray[np.uint8], value: NDArray[np.float32]) -> Pixels:
    """uint8 `[H, W, 3]` after the operations of one row of `policy.Ops`: kind and value `[L]`, first to last.

    `image` is not written to; it is returned itself if nothing is to be done.
    """
    for index, argument in zip(kind.tolist(), value.tolist(), strict=True):
        if index:
            image = _BY_KIND[index](image, argument)
    return image


def _pillow(run: Callable[[Image.Image, float], Image.Image]) -> Callable[[Pixels, float], Pixels]:
    return lambda image, value: np.asarray(run(Image.fromarray(image), value))


def _rotate(image: Image.Image, degrees: float) -> Image.Image:
    return image.rotate(degrees, Image.Resampling.BICUBIC, fillcolor=FILL)


def _hue(image: Image.Image, factor: float) -> Image.Image:
    """torchvision's adjust_hue: the 8-bit hue moves by trunc(255 factor), modulo 256."""
    hue, saturation, value = image.convert("HSV").split()
    moved = hue.point([(level + int(factor * 255)) % 256 for level in range(256)])
    return Image.merge("HSV", (moved, saturation, value)).convert("RGB")


def _blend(base: Pixels | int, image: Pixels, factor: float) -> Pixels:
    out = np.empty_like(image)
    for top in range(0, len(image), _LINES):
        rows = slice(top, top + _LINES)
        below = np.asarray(base if isinstance(base, int) else base[rows], np.float32)
        levels = image[rows] - below
        levels *= np.float32(factor)
        levels += below
        out[rows] = _truncated(levels)
    return out


def _color(image: Pixels, factor: float) -> Pixels:
    return _blend(np.asarray(Image.fromarray(image).convert("L").convert("RGB")), image, factor)


def _contrast(image: Pixels, factor: float) -> Pixels:
    return _blend(int(np.asarray(Image.fromarray(image).convert("L")).mean() + 0.5), image, factor)


def _posterize(image: Pixels, bits: float) -> Pixels:
    return image & np.uint8(256 - (1 << 8 - int(bits)))


def _solarize(image: Pixels, threshold: float) -> Pixels:
    return image ^ (image >= int(threshold)).view(np.uint8) * np.uint8(255)


def _solarize_add(image: Pixels, addend: float) -> Pixels:
    return image + np.minimum((image < 128).view(np.uint8) * np.uint8(addend), 255 - image)


def _shear(image: Pixels, factor: float, axis: int) -> Pixels:
    return _shift(image, factor * (np.arange(image.shape[1 - axis]) + 0.5), axis)


def _translate(image: Pixels, pixels: float, axis: int) -> Pixels:
    return _shift(image, np.full(image.shape[1 - axis], pixels), axis)


def _shift(image: Pixels, by: NDArray[np.float64], axis: int) -> Pixels:
    """Pixel i of line j is the input's at i + by[j]; lines are rows (axis 1) or columns (axis 0)."""
    out = np.empty_like(image)
    for first in range(0, len(by), _LINES):
        lines = slice(first, first + _LINES)
        part = lines if axis == 1 else (slice(None), lines)
        out[part] = _shifted_lines(image[part], by[lines], axis)
    return out


def _shifted_lines(image: Pixels, by: NDArray[np.float64], axis: int) -> Pixels:
    height, width = image.shape[:2]
    length = image.shape[axis]
    whole = np.floor(by)
    t = (by - whole).astype(np.float32)
    taps = np.add.outer(whole.astype(np.int64), np.arange(-1, length + 2)).clip(0, length - 1)
    centre = np.add.outer(by, np.arange(length) + 0.5)
    outside = (centre < 0) | (centre >= length)
    if axis == 1:
        index, t = taps + np.arange(height)[:, None] * width, t[:, None]
    else:
        index, t, outside = taps.T * width + np.arange(width), t.repeat(3), outside.T
    near = image.reshape(-1, 3).take(index, axis=0).reshape(len(index), -1).astype(np.int16)
    a, b, c, e = (near[i : i + length] if axis == 0 else near[:, 3 * i : 3 * (i + length)] for i in range(4))

    cubed = (b - a) + (e - c)
    out = cubed * t
    for coefficient in ((a - b) - cubed, c - a):
        out += coefficient
        out *= t
    out += b
    shifted = _truncated(out).reshape(image.shape)
    shifted[outside] = FILL
    return shifted


def _truncated(levels: NDArray[np.float32]) -> Pixels:
    return levels.clip(0, 255, out=levels).astype(np.uint8)


_FUNCTIONS: dict[str, Callable[[Pixels, float], Pixels]] = {
    "auto_contrast": _pillow(lambda image, _: ImageOps.autocontrast(image)),
    "equalize": _pillow(lambda image, _: ImageOps.equalize(image)),
    "invert": lambda image, _: 255 - image,
    "rotate": _pillow(_rotate),
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "color": _color,
    "contrast": _contrast,
    "brightness": lambda image, factor: _blend(0, image, factor),
    "sharpness": _pillow(lambda image, factor: Sharpness(image).enhance(factor)),
    "shear_x": lambda image, factor: _shear(image, factor, 1),
    "shear_y": lambda image, factor: _shear(image, factor, 0),
    "translate_x": lambda image, pixels: _translate(image, pixels, 1),
    "translate_y": lambda image, pixels: _translate(image, pixels, 0),
    "grayscale": _pillow(lambda image, _: image.convert("L").convert("RGB")),
    "blur": _pillow(lambda image, radius: image.filter(ImageFilter.GaussianBlur(radius))),
    "hue": _pillow(_hue),
}
_BY_KIND = [_FUNCTIONS.get(name) for name in KINDS]
