"""Pixel operations: one table, `PIXEL_OPS`, of what each is called, does on the CPU, does on the GPU, and reads like.

On the CPU an operation takes one image as an array. `equalize`, `rotate`, `grayscale`, `color` and `hue` are Pillow's,
and `blur` has Pillow's pixels (`blur.py`). The others are a few passes of numpy with Pillow's rounding (float32, for
`auto_contrast` float64, then truncated), cheaper where it counts. Where `compiled.py` has an operation, its library
makes the same bytes.

    blend(base, x, f) = trunc(clip(base + f (x - base), 0, 255))
    color: base = grey; contrast: base = mean grey; brightness: base = 0; sharpness: base = smoothed

Where the base is one number, the blend is a table of 256 levels. A picture that has become grey stays one channel for
as long as the operations that follow allow: 3-Augment turns every third picture grey before it jitters its colours.

Shear and translation move every row (or column) along itself by one amount, so that of the 16 taps of Pillow's bicubic
transform 4 are left. With a, b, c, e the pixels at -1, 0, 1, 2 from the position and t the fraction beyond b (this is
the cubic with coefficient -1; Pillow's resize has -1/2):

    shift = trunc(clip(b + t ((c - a) + t ((2a - 2b + c - e) + t (b - a + e - c))), 0, 255))

and FILL where the position lies outside the image. The differences are integers and exact, so that flat areas stay.

On the GPU an operation adds nodes to DALI's graph (`execute/graph.py`): either an expression of its own, or a `Warp`,
which is a matrix for the one bicubic warp that all geometry shares. The formulas are those of the CPU in float32;
`equalize`, the warp and the blur are DALI's operators, and differ from Pillow by what docs/augmentation.md says. This
module imports no DALI: the graph hands in what an operation needs of it (`nodes.Nodes`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageEnhance, ImageOps

from fastdeit.data import compiled
from fastdeit.data.blur import blurred

if TYPE_CHECKING:
    from nvidia.dali.data_node import DataNode

    from fastdeit.data.nodes import Nodes

FILL = (124, 116, 104)
"""What geometry uncovers: 255 times ImageNet's mean, rounded, as timm's `img_mean`."""

Pixels = NDArray[np.uint8]
# Rows or columns at a time: temporaries stay in the cache, and below the size for which malloc maps new pages.
_LINES = 48
# Of a blur: from here on Pillow is the faster one. Both take a millisecond for 224 x 224 pixels.
_LARGE_RADIUS = 8


class OperationError(RuntimeError):
    """An operation failed on one image; the message says which, and how."""


@dataclass(frozen=True)
class Warp:
    """Geometry on the GPU.

    matrix(value, size): float64 `[B, 3, 3]` from output to input coordinates (x, y, 1), as Pillow defines them, for
    values float32 `[B]` and images of `size` (height, width).
    """

    matrix: Callable[[NDArray[np.float32], tuple[int, int]], NDArray[np.float64]]


@dataclass(frozen=True)
class PixelOp:
    """One pixel operation.

    name: as policies and tests call it. cpu(image, value): uint8 `[H, W, 3]` to the same, or to `[H, W, 1]`, which
    stands for three equal channels. gpu(image, nodes): the node of DALI's graph, or a `Warp`. words: how `value` reads
    in a sentence after the name, a format string; empty where the operation has no argument. takes_grey: whether `cpu`
    takes `[H, W, 1]` as well. compiled: makes the bytes of `cpu` faster, where the library of `compiled.py` is there.
    Raises TypeError without a form for the CPU or the GPU: an operation that one executor lacks would do nothing
    there, and nobody would notice.
    """

    name: str
    cpu: Callable[[Pixels, float], Pixels]
    gpu: "Callable[[DataNode, Nodes], DataNode] | Warp"
    words: str = ""
    takes_grey: bool = False
    compiled: Callable[[Pixels, float], Pixels] | None = None

    def __post_init__(self) -> None:
        if not callable(self.cpu):
            raise TypeError(f"pixel operation {self.name!r} has no form for the CPU")
        if not (callable(self.gpu) or isinstance(self.gpu, Warp)):
            raise TypeError(f"pixel operation {self.name!r} has no form for the GPU")

    def run(self, image: Pixels, value: float) -> Pixels:
        """The operation on the CPU. Raises ValueError for a value that is not finite."""
        if not math.isfinite(value):
            raise ValueError(f"its value is {value}, but must be finite")
        made = self.cpu if self.compiled is None or compiled.missing() else self.compiled
        return made(np.ascontiguousarray(image if self.takes_grey else three(image)), value)


# ---- on the CPU ------------------------------------------------------------------------------------------------------


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


def _blend(base: Pixels, image: Pixels, factor: float) -> Pixels:
    out = np.empty_like(image)
    for top in range(0, len(image), _LINES):
        rows = slice(top, top + _LINES)
        out[rows] = _blended(base[rows].astype(np.float32), image[rows], factor)
    return out


def _blend_level(base: int, image: Pixels, factor: float) -> Pixels:
    """`_blend` with the same base everywhere."""
    table = _blended(np.float32(base), np.arange(256), factor).astype(np.uint8).tobytes()
    return np.frombuffer(image.tobytes().translate(table), np.uint8).reshape(image.shape)


def _blended(below: NDArray[np.float32], levels: NDArray[np.integer], factor: float) -> NDArray[np.float32]:
    """The levels from `below` to `levels` and beyond, before they are truncated."""
    result = levels.astype(np.float32)
    result -= below
    result *= np.float32(factor)
    result += below
    return result.clip(0, 255, out=result)


def _grey(image: Pixels) -> Pixels:
    """uint8 `[H, W, 1]`; an image of one channel is its own."""
    return np.asarray(Image.fromarray(image).convert("L"))[..., None] if image.shape[2] == 3 else image


def three(image: Pixels) -> Pixels:
    """`[H, W, 3]`, of one channel as of three."""
    if image.shape[2] == 3:
        return image
    if not compiled.missing():
        return compiled.three(np.ascontiguousarray(image))
    channels = np.empty((*image.shape[:2], 3), np.uint8)
    for channel in range(3):  # to let numpy broadcast the last axis costs far more
        channels[..., channel] = image[..., 0]
    return channels


def _color(image: Pixels, factor: float) -> Pixels:
    # A grey picture lies on its base.
    return np.asarray(ImageEnhance.Color(Image.fromarray(image)).enhance(factor)) if image.shape[2] == 3 else image


def _contrast(image: Pixels, factor: float) -> Pixels:
    grey = _grey(image)
    return _blend_level(int(int(grey.sum()) / grey.size + 0.5), image, factor)


def _brightness(image: Pixels, factor: float) -> Pixels:
    return _blend_level(0, image, factor)


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
    by = _steps(factor, image.shape[1 - axis])
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


def _steps(factor: float, lines: int) -> NDArray[np.float64]:
    """By how much a shear moves each line."""
    return factor * (np.arange(lines) + 0.5)


def _same(pixels: float, lines: int) -> NDArray[np.float64]:
    """By how much a translation moves each line."""
    return np.full(lines, pixels)


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


# ---- on the GPU ------------------------------------------------------------------------------------------------------


def _auto_contrast_gpu(image: "DataNode", nodes: "Nodes") -> "DataNode":
    low = nodes.float(nodes.fn.reductions.min(image, axes=(0, 1), keep_dims=True))
    high = nodes.float(nodes.fn.reductions.max(image, axes=(0, 1), keep_dims=True))
    flat = nodes.float(high == low)
    scale = 255.0 / (high - low + 255.0 * flat)  # 1 in a flat channel, which stays as it is
    return nodes.truncated(nodes.float(image) * scale - low * scale * (1.0 - flat))


def _equalize_gpu(image: "DataNode", nodes: "Nodes") -> "DataNode":
    return nodes.fn.equalize(image)


def _invert_gpu(image: "DataNode", nodes: "Nodes") -> "DataNode":
    return image ^ nodes.all_bits()


def _posterize_gpu(image: "DataNode", nodes: "Nodes") -> "DataNode":
    return image & nodes.byte(256.0 - nodes.math.pow(2.0, 8.0 - nodes.value))


def _solarize_gpu(image: "DataNode", nodes: "Nodes") -> "DataNode":
    return image ^ nodes.byte(image >= nodes.value) * nodes.all_bits()


def _solarize_add_gpu(image: "DataNode", nodes: "Nodes") -> "DataNode":
    return nodes.truncated(nodes.float(image) + nodes.float(image < 128) * nodes.value)


def _color_gpu(image: "DataNode", nodes: "Nodes") -> "DataNode":
    return nodes.blend(nodes.grey(image), image, nodes.value)


def _contrast_gpu(image: "DataNode", nodes: "Nodes") -> "DataNode":
    mean = nodes.math.floor(nodes.fn.reductions.mean(nodes.grey(image), axes=(0, 1), keep_dims=True) + 0.5)
    return nodes.blend(mean, image, nodes.value)


def _brightness_gpu(image: "DataNode", nodes: "Nodes") -> "DataNode":
    return nodes.truncated(nodes.float(image) * nodes.value)


def _sharpness_gpu(image: "DataNode", nodes: "Nodes") -> "DataNode":
    smooth = nodes.math.floor(nodes.fn.filter(image, nodes.smooth, dtype=nodes.types.FLOAT) + 0.5)
    smooth = smooth * nodes.inside + nodes.float(image) * (1.0 - nodes.inside)
    return nodes.blend(smooth, image, nodes.value)


def _grayscale_gpu(image: "DataNode", nodes: "Nodes") -> "DataNode":
    grey = nodes.byte(nodes.grey(image))
    return nodes.fn.cat(grey, grey, grey, axis=2)


def _blur_gpu(image: "DataNode", nodes: "Nodes") -> "DataNode":
    return nodes.fn.gaussian_blur(image, sigma=nodes.host_value)


def _hue_gpu(image: "DataNode", nodes: "Nodes") -> "DataNode":
    """By way of Pillow's 8-bit HSV, in which the hue is moved, as `_hue` does."""
    red, green, blue = (nodes.float(channel) for channel in nodes.channels(image))
    value = nodes.math.max(nodes.math.max(red, green), blue)
    chroma = value - nodes.math.min(nodes.math.min(red, green), blue)
    divisor = nodes.math.max(chroma, 1.0)
    is_red = nodes.float(red == value)
    is_green = nodes.float(green == value) * (1.0 - is_red)
    sextant = is_red * (green - blue) / divisor
    sextant = sextant + is_green * (2.0 + (blue - red) / divisor)
    sextant = sextant + (1.0 - is_red - is_green) * (4.0 + (red - green) / divisor)
    turns = sextant / 6.0 + 1.0
    hue = nodes.math.floor((turns - nodes.math.floor(turns)) * 255.0)
    saturation = nodes.math.floor(chroma / nodes.math.max(value, 1.0) * 255.0) / 255.0
    # trunc(255 factor) for either sign
    moved = nodes.value * 255.0
    whole = nodes.math.floor(moved)
    shift = whole + nodes.float(nodes.value < 0.0) * nodes.float(whole < moved)
    hue = hue + shift + 256.0
    sextant = (hue - nodes.math.floor(hue / 256.0) * 256.0) * 6.0 / 255.0
    channels = []
    for centre in (0.0, 2.0, 4.0):
        away = 3.0 - nodes.math.abs(nodes.math.abs(sextant - centre) - 3.0)
        share = nodes.math.clamp(away - 1.0, 0.0, 1.0)
        channels.append(nodes.byte(nodes.math.floor(value * (1.0 - saturation * share) + 0.5)))
    return nodes.fn.cat(*channels, axis=2)


# ---- the table -------------------------------------------------------------------------------------------------------


def _entry(row: int, column: int) -> Warp:
    """A warp that is the identity but for one element of its matrix, which is the operation's value."""

    def matrix(value: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float64]:
        matrices = _identities(len(value))
        matrices[:, row, column] = value
        return matrices

    return Warp(matrix)


def _rotation(degrees: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float64]:
    matrices = _identities(len(degrees))
    angle = -np.radians(degrees.astype(np.float64))
    cos, sin, middle = np.cos(angle), np.sin(angle), np.array([size[1], size[0]]) / 2
    turn = np.stack((cos, sin, -sin, cos), axis=-1).reshape(-1, 2, 2)
    matrices[:, :2, :2] = turn
    matrices[:, :2, 2] = middle - turn @ middle
    return matrices


def _identities(count: int) -> NDArray[np.float64]:
    return np.tile(np.eye(3), (count, 1, 1))


def _along_lines(
    name: str,
    cpu: Callable[[Pixels, float, int], Pixels],
    by: Callable[[float, int], NDArray[np.float64]],
    gpu: Warp,
    words: str,
    axis: int,
) -> PixelOp:
    """An operation that moves the lines of a picture, rows (axis 1) or columns (axis 0), along themselves: by(value,
    number of lines) pixels."""

    def moved(image: Pixels, value: float) -> Pixels:
        pixels = by(value, image.shape[1 - axis])
        first, last = (limit.astype(np.int64) for limit in _covered(pixels, image.shape[axis]))
        return compiled.moved(image, pixels, first, last, np.array(FILL, np.uint8), axis)

    return PixelOp(name, lambda image, value: cpu(image, value, axis), gpu, words, compiled=moved)


def _blurred(image: Pixels, radius: float) -> Pixels:
    # The library's time and memory grow with the radius, and Pillow's do not.
    return compiled.blurred(image, radius) if abs(radius) <= _LARGE_RADIUS else blurred(image, radius)


# A plan stores an operation as its place here, counted from 1: new ones go to the end. Comments say what `value` is.
PIXEL_OPS: tuple[PixelOp, ...] = (
    PixelOp("auto_contrast", _auto_contrast, _auto_contrast_gpu),  # Pillow's ImageOps.autocontrast, cutoff 0
    PixelOp("equalize", _pillow(lambda image, _: ImageOps.equalize(image)), _equalize_gpu),
    PixelOp("invert", lambda image, _: 255 - image, _invert_gpu, takes_grey=True),
    # degrees counter-clockwise about the centre
    PixelOp("rotate", _pillow(_rotate), Warp(_rotation), "by {:+.1f} degrees"),
    # bits kept, 1 to 8
    PixelOp("posterize", _posterize, _posterize_gpu, "keeping {:.0f} of 8 bits", takes_grey=True),
    # threshold, 0 to 256: pixels at or above it are inverted
    PixelOp("solarize", _solarize, _solarize_gpu, "from level {:.0f}", takes_grey=True),
    # added to pixels below 128, clipped to 255
    PixelOp("solarize_add", _solarize_add, _solarize_add_gpu, "{:+.0f} below level 128", takes_grey=True),
    # factors of Pillow's ImageEnhance
    PixelOp("color", _color, _color_gpu, "x {:.2f}", takes_grey=True, compiled=compiled.color),
    PixelOp("contrast", _contrast, _contrast_gpu, "x {:.2f}", takes_grey=True, compiled=compiled.contrast),
    PixelOp("brightness", _brightness, _brightness_gpu, "x {:.2f}", takes_grey=True, compiled=compiled.brightness),
    PixelOp("sharpness", _sharpness, _sharpness_gpu, "x {:.2f}", compiled=compiled.sharpness),
    # output (x, y) is input (x + value * y, y), and (x, y + value * x)
    _along_lines("shear_x", _shear, _steps, _entry(0, 1), "by {:+.3f}", 1),
    _along_lines("shear_y", _shear, _steps, _entry(1, 0), "by {:+.3f}", 0),
    # output (x, y) is input (x + value, y), and (x, y + value), in output pixels
    _along_lines("translate_x", _translate, _same, _entry(0, 2), "by {:+.1f} pixels", 1),
    _along_lines("translate_y", _translate, _same, _entry(1, 2), "by {:+.1f} pixels", 0),
    PixelOp(
        *("grayscale", lambda image, _: _grey(image), _grayscale_gpu),
        takes_grey=True,
        compiled=lambda image, _: compiled.grey(image),
    ),
    # radius of Pillow's ImageFilter.GaussianBlur
    PixelOp("blur", blurred, _blur_gpu, "with radius {:.2f}", compiled=_blurred),
    # factor of torchvision's adjust_hue, -0.5 to 0.5
    PixelOp("hue", _pillow(_hue), _hue_gpu, "by {:+.3f} turns"),
)
KINDS = ("none", *(op.name for op in PIXEL_OPS))
"""Names of the operations by their code in a plan; 0 does nothing."""


def apply(image: Pixels, kind: NDArray[np.uint8], value: NDArray[np.float32]) -> Pixels:
    """uint8 `[H, W, 3]` after the operations of one row of `operations.Ops`: kind and value `[L]`, first to last.

    `image` is not written to; it is returned itself if nothing is to be done. OperationError where one fails.
    """
    for index, argument in zip(kind.tolist(), value.tolist(), strict=True):
        if index:
            op = PIXEL_OPS[index - 1]
            try:
                image = op.run(image, argument)
            except Exception as error:
                what = f"{KINDS[index]}({argument:g})"
                raise OperationError(f"the operation {what} failed ({type(error).__name__}: {error})") from error
    return three(image)


def described(kind: NDArray[np.uint8], value: NDArray[np.float32]) -> str:
    """The operations of one row of `operations.Ops` in words: kind and value `[L]`, in order; "none" without any."""
    row = zip(kind.tolist(), value.tolist(), strict=True)
    applied = [(PIXEL_OPS[index - 1], argument) for index, argument in row if index]
    return ", then ".join(f"{op.name} {op.words.format(argument)}".rstrip() for op, argument in applied) or "none"
