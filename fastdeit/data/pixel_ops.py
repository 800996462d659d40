"""Pixel operations on one image, as the CPU executes them: Pillow's results, on arrays.

`equalize`, `rotate`, `grayscale`, `blur` and `hue` are Pillow's. The others are a few passes of numpy with Pillow's
rounding (float32, for `auto_contrast` float64, then truncated), cheaper where it counts:

    blend(base, x, f) = trunc(clip(base + f (x - base), 0, 255))
    color: base = grey; contrast: base = mean grey; brightness: base = 0; sharpness: base = smoothed

Shear and translation move every row (or column) along itself by one amount, so that of the 16 taps of Pillow's bicubic
transform 4 are left. With a, b, c, e the pixels at -1, 0, 1, 2 from the position and t the fraction beyond b (this is
the cubic with coefficient -1; Pillow's resize has -1/2):

    shift = trunc(clip(b + t ((c - a) + t ((2a - 2b + c - e) + t (b - a + e - c))), 0, 255))

and FILL where the position lies outside the image. The differences are integers and exact, so that flat areas stay.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter, ImageOps

from fastdeit.data.policy import FILL, KINDS

Pixels = NDArray[np.uint8]
# Rows or columns at a time: temporaries stay in the cache, and below the size for which malloc maps new pages.
_LINES = 48


class OperationError(RuntimeError):
    """An operation failed on one image; the message says which, and how."""


def apply(image: Pixels, kind: NDArray[np.uint8], value: NDArray[np.float32]) -> Pixels:
    """uint8 `[H, W, 3]` after the operations of one row of `policy.Ops`: kind and value `[L]`, first to last.

    `image` is not written to; it is returned itself if nothing is to be done. OperationError where one fails.
    """
    for index, argument in zip(kind.tolist(), value.tolist(), strict=True):
        if index:
            try:
                image = _BY_KIND[index](np.ascontiguousarray(image), argument)
            except Exception as error:
                what = f"{KINDS[index]}({argument:g})"
                raise OperationError(f"the operation {what} failed ({type(error).__name__}: {error})") from error
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


def _auto_contrast(image: Pixels, _: float) -> Pixels:
    lines = image.reshape(len(image), -1)
    low, high = (of(of(lines, axis=0).reshape(-1, 3), axis=0).astype(float) for of in (np.min, np.max))
    spread = high - low
    scale = np.where(spread > 0, 255 / np.maximum(spread, 1), 1)  # a channel of one level stays
    offset = np.where(spread > 0, -low * scale, 0)
    scale, offset = np.tile(scale, image.shape[1]), np.tile(offset, image.shape[1])
    out = np.empty_like(lines)
    for top in range(0, len(lines), _LINES):
        levels = lines[top : top + _LINES] * scale
        levels += offset
        out[top : top + _LINES] = levels
    return out.reshape(image.shape)


def _blend(base: Pixels | int, image: Pixels, factor: float) -> Pixels:
    out = np.empty_like(image)
    for top in range(0, len(image), _LINES):
        rows = slice(top, top + _LINES)
        levels = image[rows].astype(np.float32)
        below = np.float32(base) if isinstance(base, int) else base[rows].astype(np.float32)
        levels -= below
        levels *= np.float32(factor)
        levels += below
        out[rows] = levels.clip(0, 255, out=levels)
    return out


def _color(image: Pixels, factor: float) -> Pixels:
    return _blend(np.asarray(Image.fromarray(image).convert("L").convert("RGB")), image, factor)


def _contrast(image: Pixels, factor: float) -> Pixels:
    count = np.array(Image.fromarray(image).convert("L").histogram())
    return _blend(int(count @ np.arange(256) / count.sum() + 0.5), image, factor)


def _sharpness(image: Pixels, factor: float) -> Pixels:
    return _blend(_smooth(image), image, factor)


def _smooth(image: Pixels) -> Pixels:
    """Pillow's SMOOTH: the 3 x 3 pixels around and 4 times the pixel itself, over 13, rounded; the border stays."""
    out = image.copy()
    height, width = len(image), 3 * image.shape[1]
    lines, smooth = image.reshape(height, width), out.reshape(height, width)
    for top in range(1, height - 1, _LINES):
        end = min(top + _LINES, height - 1)
        levels = lines[top - 1 : end + 1].astype(np.uint16).reshape(-1)
        centre = levels[width:-width]
        column = levels[: -2 * width] + centre
        column += levels[2 * width :]
        total = centre * np.uint16(4)
        total += np.uint16(6)
        inner = total[3:-3]  # flat, so that the border mixes with the next line; it is left out below
        for three in (column[:-6], column[3:-3], column[6:]):
            inner += three
        total //= np.uint16(13)
        smooth[top:end, 3:-3] = total.reshape(-1, width)[:, 3:-3]
    return out


def _posterize(image: Pixels, bits: float) -> Pixels:
    return image & np.uint8(256 - (1 << 8 - int(bits)))


def _solarize(image: Pixels, threshold: float) -> Pixels:
    return image ^ (image >= int(threshold)).view(np.uint8) * np.uint8(255)


def _solarize_add(image: Pixels, addend: float) -> Pixels:
    return image + np.minimum((image < 128).view(np.uint8) * np.uint8(addend), 255 - image)


def _translate(image: Pixels, pixels: float, axis: int) -> Pixels:
    """Pixel i of every line is the input's at i + pixels; lines are rows (axis 1) or columns (axis 0)."""
    length, whole = image.shape[axis], math.floor(pixels)
    first, last = (int(limit) for limit in _covered(np.float64(pixels), length))
    out = np.empty_like(image)
    out.reshape(len(image), -1)[:] = _fill(image)
    if first < last:
        start, stop = first + whole - 1, last + whole + 2
        near = [_along(image, 0, 1, axis)] * max(0, -start)
        near += [_along(image, max(0, start), stop, axis)]
        near += [_along(image, length - 1, length, axis)] * max(0, stop - length)
        fraction = np.float32(pixels - whole)
        _interpolate(np.concatenate(near, axis), fraction, axis, _along(out, first, last, axis))
    return out


def _shear(image: Pixels, factor: float, axis: int) -> Pixels:
    """Pixel i of line j is the input's at i + factor * (j + 1/2); lines are rows (axis 1) or columns (axis 0)."""
    by = factor * (np.arange(image.shape[1 - axis]) + 0.5)
    whole = np.floor(by).astype(np.int64)
    near = _near_in_rows(image, whole) if axis == 1 else _near_in_columns(image, whole)
    out = np.empty_like(image)
    _interpolate(near, (by - whole).astype(np.float32), axis, out)

    first, last = _covered(by, image.shape[axis])  # all lines lack pixels at the same end
    position, limit = np.arange(image.shape[axis], dtype=np.int16), (last if factor > 0 else first).astype(np.int16)
    if axis == 1:
        position, limit = position.repeat(3), limit[:, None]
    else:
        position, limit = position[:, None], limit.repeat(3)
    outside = position >= limit if factor > 0 else position < limit
    np.copyto(out.reshape(len(out), -1), _fill(image), where=outside)
    return out


def _covered(by: NDArray[np.float64], length: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(first, last): the positions i, last not included, of which i + by lies in a line of `length` pixels."""
    return np.ceil(-by - 0.5).clip(0, length), np.ceil(length - by - 0.5).clip(0, length)


def _along(image: Pixels, start: int, stop: int, axis: int) -> Pixels:
    return image[start:stop] if axis == 0 else image[:, start:stop]


def _fill(image: Pixels) -> Pixels:
    """A row of FILL, flat: filling pixel by pixel costs more than everything else here."""
    return np.tile(np.array(FILL, np.uint8), image.shape[1])


def _near_in_rows(image: Pixels, whole: NDArray[np.int64]) -> Pixels:
    """`[H, W + 3, 3]`: of row j the pixels from whole[j] - 1 on; the edge goes on for two pixels, then anything."""
    height, width = image.shape[:2]
    rows = np.empty((height + 2, width + 4, 3), np.uint8)  # the first and the last row for windows that reach beyond
    rows[1:-1, 2:-2], rows[1:-1, :2], rows[1:-1, -2:] = image, image[:, :1], image[:, -1:]
    length = 3 * (width + 3)
    windows = np.ndarray((rows.size - length + 1, length), np.uint8, rows, strides=(1, 1))
    start = rows.strides[0] * np.arange(1, height + 1) + 3 * (whole.clip(-width, width) + 1)
    return windows[start].reshape(height, width + 3, 3)


def _near_in_columns(image: Pixels, whole: NDArray[np.int64]) -> Pixels:
    """`[H + 3, W, 3]`: as `_near_in_rows`, of column j."""
    height, width = image.shape[:2]
    columns = np.concatenate((image[:1], image[:1], image, image[-1:], image[-1:]))
    pixel = np.add.outer(np.arange(1, height + 4) * width, whole * width + np.arange(width))
    return columns.reshape(-1, 3).take(pixel, axis=0, mode="clip")


def _interpolate(near: Pixels, t: NDArray[np.float32], axis: int, out: Pixels) -> None:
    """Writes `out` from `near`, which along `axis` begins one pixel earlier and ends two later; t: one fraction, or one
    for each line. Arithmetic is on flat arrays, in which the next pixel of a line is `step` elements on: numpy would
    start anew for every row. What comes out at the ends of the rows (axis 1) is not used."""
    step = near.strides[axis]
    for top in range(0, len(out), _LINES):
        rows = out[top : top + _LINES]
        levels = near[top : top + len(rows) + 3 * (axis == 0)].astype(np.float32)
        result = np.empty_like(levels)
        flat, moved = levels.reshape(-1), result.reshape(-1)[: -3 * step]
        if np.ndim(t) == 0:
            beyond = t
        elif axis == 0:
            beyond = np.tile(t.repeat(3), len(rows))
        else:
            beyond = t[top : top + len(rows)].repeat(near.strides[0])[: -3 * step]
        gap = flat[step:] - flat[:-step]
        a_to_b, b_to_c, c_to_e = gap[: -2 * step], gap[step:-step], gap[2 * step :]
        coefficient = a_to_b + c_to_e
        np.multiply(coefficient, beyond, out=moved)
        coefficient += a_to_b
        moved -= coefficient
        moved *= beyond
        np.add(a_to_b, b_to_c, out=coefficient)
        moved += coefficient
        moved *= beyond
        moved += flat[step : -2 * step]
        moved.clip(0, 255, out=moved)
        rows[:] = result[: len(rows), : rows.shape[1]]


_FUNCTIONS: dict[str, Callable[[Pixels, float], Pixels]] = {
    "auto_contrast": _auto_contrast,
    "equalize": _pillow(lambda image, _: ImageOps.equalize(image)),
    "invert": lambda image, _: 255 - image,
    "rotate": _pillow(_rotate),
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "color": _color,
    "contrast": _contrast,
    "brightness": lambda image, factor: _blend(0, image, factor),
    "sharpness": _sharpness,
    "shear_x": lambda image, factor: _shear(image, factor, 1),
    "shear_y": lambda image, factor: _shear(image, factor, 0),
    "translate_x": lambda image, pixels: _translate(image, pixels, 1),
    "translate_y": lambda image, pixels: _translate(image, pixels, 0),
    "grayscale": _pillow(lambda image, _: image.convert("L").convert("RGB")),
    "blur": _pillow(lambda image, radius: image.filter(ImageFilter.GaussianBlur(radius))),
    "hue": _pillow(_hue),
}
_BY_KIND = [_FUNCTIONS.get(name) for name in KINDS]
