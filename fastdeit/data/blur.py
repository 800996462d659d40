"""Pillow's Gaussian blur, bit for bit; for small radii in less time.

Pillow approximates a Gaussian by box blurs, three along the rows and three along the columns (Gwosdek et al.,
"Theoretical Foundations of Gaussian Convolution by Extended Box Filtering", 2011). A box reaches by a fraction beyond
its whole pixels. Below a radius of about 1.41 it is the pixel c itself and a share of its neighbours l and r, and the
pixel at the edge is its own neighbour:

    round(c + share (l + r - 2 c)) = c + round(share (l - 2 c + r))

Pillow computes the left side in integers. The right side is cheaper in numpy, and its rounding depends on the second
difference alone, which for bytes is one of 1021 integers. Both sides are compared for all of them. Where one differs,
and for larger radii, Pillow blurs.
"""

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

Pixels = NDArray[np.uint8]
Edge = tuple[NDArray[np.int16], NDArray[np.int16]]
_ONE = 1 << 24  # Pillow's weights are integers, and this is the number that stands for 1
_PASSES = 3
_BENDS = np.arange(-510, 511)
# At a time: the temporaries of half a picture of 224 pixels stay in the cache, and the calls are few.
_VALUES = 76_000


def blurred(image: Pixels, radius: float) -> Pixels:
    """uint8 `[H, W, 3]` after Pillow's `ImageFilter.GaussianBlur(radius)`."""
    share = _share(radius)
    if share is None:
        return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(radius)))
    height, width = len(image), 3 * image.shape[1]
    lines, out = image.reshape(height, width), np.empty((height, width), np.uint8)
    count = max(1, _VALUES // width)
    for top in range(0, height, count):
        rows = lines[top : top + count]
        levels = np.empty((len(rows), width + 6), np.int16)
        levels[:, 3:-3] = rows
        _blur(levels, 3, (levels[:, :3], levels[:, 3:6]), (levels[:, -3:], levels[:, -6:-3]), share)
        out[top : top + count] = levels[:, 3:-3]
    count = max(1, _VALUES // height)
    for left in range(0, width, count):
        columns = out[:, left : left + count]
        levels = np.empty((height + 2, columns.shape[1]), np.int16)
        levels[1:-1] = columns
        _blur(levels, columns.shape[1], (levels[0], levels[1]), (levels[-1], levels[-2]), share)
        columns[:] = levels[1:-1]
    return out.reshape(image.shape)


def _blur(levels: NDArray[np.int16], step: int, first: Edge, last: Edge, share: np.float32) -> None:
    """All passes along one axis, in place. `levels` is contiguous, neighbours are `step` elements apart, and lines have
    an element more at each end: `first` and `last` are (those, what they repeat)."""
    flat = levels.reshape(-1)
    inner = flat[step:-step]
    # Arrays of their own: where input and output overlap, numpy copies.
    slope, bend = np.empty(flat.size - step, np.int16), np.empty_like(inner)
    change = np.empty(inner.size, np.float32)
    for _ in range(_PASSES):
        for edge, repeated in (first, last):
            edge[:] = repeated
        np.subtract(flat[step:], flat[:-step], out=slope)
        np.subtract(slope[step:], slope[:-step], out=bend)
        np.copyto(change, bend)
        change *= share
        np.rint(change, out=change)
        np.copyto(bend, change, casting="unsafe")
        inner += bend


def _share(radius: float) -> np.float32 | None:
    """What a pixel takes of each neighbour in a pass; None where a box reaches further, or rounds otherwise than here.

    The steps and their precision are those of Pillow's BoxBlur.c (`_gaussian_blur_radius` and `ImagingLineBoxBlur32`).
    """
    variance = np.float32(radius) * np.float32(radius) / np.float32(_PASSES)
    if math.sqrt(12 * float(variance) + 1) >= 3:
        return None
    reach = np.float32(-3) * variance / (np.float32(6) * (variance - np.float32(1)))
    own = int(np.float32(_ONE) / (2 * reach + np.float32(1)))
    other = (_ONE - own) // 2
    share = np.float32(other / _ONE)
    here = np.rint(_BENDS.astype(np.float32) * share)
    # The weights add up to 1, or to a trifle less, which takes most from a white pixel.
    for pixel in (0, 255):
        total = pixel * (own + 2 * other - _ONE) + _BENDS * other
        if ((total + _ONE // 2) // _ONE != here).any():
            return None
    return share
