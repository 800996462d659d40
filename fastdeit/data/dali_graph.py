"""DALI's graphs: `decoded_box` for the CPU, and the whole plan for the GPU: decode, resize, window and flip, pixel
operations.

`inputs` turns a plan into the operands that the graph takes from outside; the graph itself decides nothing. The
formulas are those of `pixel_ops`, in float32 and truncated, so that the result is Pillow's except where DALI has an
operator of its own: the resize (floats between its passes), the bicubic warp, `equalize` (OpenCV's table), and the
Gaussian instead of Pillow's three box filters. Where arithmetic meets images, operands are moved to the images' device;
named arguments (sizes, regions, matrices) and conditions stay on the CPU.

That graph also runs on DALI's CPU backend, which is how it is tested.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import fn, pipeline_def, types
from nvidia.dali import math as dmath
from nvidia.dali.data_node import DataNode

from fastdeit.data.policy import FILL, KINDS
from fastdeit.data.render import Steps

_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13


class Form(NamedTuple):
    """What the graph of a view depends on: its output `size` (height, width), the number `layers` of its operations,
    and whether it is `windowed`: its box is the whole image, and its plan has `resize` and `start`."""

    size: tuple[int, int]
    layers: int
    windowed: bool


class _Operands(NamedTuple):
    """Of one layer. `value` lives where the images do, `host_value` and `matrix` (of the warp) on the CPU; `inside` is
    0 in the one-pixel border and 1 elsewhere, `smooth` Pillow's SMOOTH filter."""

    value: DataNode
    host_value: DataNode
    matrix: DataNode
    inside: DataNode
    smooth: DataNode


def guarded(encoded: DataNode) -> DataNode:
    """The same bytes, available only once `peek_image_shape` has accepted them (cost: a copy of the encoded bytes)."""
    shape = fn.peek_image_shape(encoded, adjust_orientation=False)
    zero = fn.cast(shape[0:1] * 0, dtype=types.INT32)
    return fn.slice(encoded, start=zero, rel_shape=1.0, axes=(0,))


@pipeline_def
def decoded_box() -> DataNode:
    """A box of each image: inputs `encoded`, `corner` (y, x) and `extent` (height, width)."""
    encoded = guarded(fn.external_source(name="encoded", no_copy=True))
    corner, extent = fn.external_source(name="corner"), fn.external_source(name="extent")
    return fn.decoders.image_slice(encoded, start=corner, shape=extent, axes=(0, 1), adjust_orientation=False)


def forms(sizes: Sequence[tuple[int, int]], views: Sequence[Steps]) -> list[Form]:
    """The form of each view."""
    return [
        Form(size, 0 if view.ops is None else view.ops.kind.shape[1], view.resize is not None)
        for size, view in zip(sizes, views, strict=True)
    ]


@pipeline_def(enable_conditionals=True)
def whole(views: Sequence[Form], gpu: bool) -> tuple[DataNode, ...]:
    """The images of each view, from the `inputs` of the same name; every sample is decoded once."""
    encoded = guarded(fn.external_source(name="encoded", no_copy=True))
    images = fn.decoders.image(
        encoded, device="mixed" if gpu else "cpu", adjust_orientation=False, jpeg_fancy_upsampling=True
    )
    rendered = []
    for view, form in enumerate(views):
        rendered.append(_rendered(images, form, f"{view}_", gpu))
    return tuple(rendered)


def _rendered(images: DataNode, form: Form, prefix: str, gpu: bool) -> DataNode:
    """One view of the decoded images, from the inputs whose names begin with `prefix`."""
    size = form.size
    cubic = {"interp_type": types.INTERP_CUBIC, "antialias": True}
    if form.windowed:
        images = fn.resize(images, size=_input(prefix, "resize"), **cubic)
        images = fn.experimental.warp_perspective(
            images,
            matrix=_input(prefix, "window"),
            size=size,
            border_mode="reflect_101",
            interp_type=types.INTERP_NN,
        )
    else:
        start, end = _input(prefix, "roi_start"), _input(prefix, "roi_end")
        images = fn.resize(images, size=size, roi_start=start, roi_end=end, **cubic)
    device = "gpu" if gpu else "cpu"
    inside = np.zeros((*size, 1), np.float32)
    inside[1:-1, 1:-1] = 1
    inside, smooth = types.Constant(inside, device=device), types.Constant(_SMOOTH, device=device)
    for layer in range(form.layers):
        branch, value = _input(prefix, f"branch{layer}"), _input(prefix, f"value{layer}")
        matrix = _input(prefix, f"matrix{layer}")
        operands = _Operands(value.gpu() if gpu else value, value, matrix, inside, smooth)
        if branch > 0:
            images = _choose(1, len(_BRANCHES) - 1, branch, images, operands)
    return images


def _input(prefix: str, name: str) -> DataNode:
    return fn.external_source(name=prefix + name)


def inputs(sizes: Sequence[tuple[int, int]], views: Sequence[Steps]) -> dict[str, NDArray[Any]]:
    """What `whole` takes beside `encoded`, by name."""
    return {
        f"{view}_{name}": value
        for view, (size, steps) in enumerate(zip(sizes, views, strict=True))
        for name, value in _inputs_of(size, steps).items()
    }


def _inputs_of(size: tuple[int, int], steps: Steps) -> dict[str, NDArray[Any]]:
    flip = steps.flip
    if steps.resize is None:
        corner = steps.box[:, :2].astype(np.float32)
        end = corner + steps.box[:, 2:].astype(np.float32)
        corner[flip, 1], end[flip, 1] = end[flip, 1], corner[flip, 1]
        found = {"roi_start": corner, "roi_end": end}
    else:
        window = np.tile(np.eye(3, dtype=np.float32), (len(flip), 1, 1))
        window[:, :2, 2] = steps.start[:, ::-1]
        window[flip, 0, 0] = -1
        window[flip, 0, 2] += size[1]
        found = {"resize": steps.resize.astype(np.float32), "window": window}
    if steps.ops is not None:
        for layer, (kind, value) in enumerate(zip(steps.ops.kind.T, steps.ops.value.T, strict=True)):
            found |= {
                f"branch{layer}": _BRANCH_OF[kind],
                f"value{layer}": np.ascontiguousarray(value),
                f"matrix{layer}": _matrices(kind, value, size),
            }
    return found


def _matrices(kind: NDArray[np.uint8], value: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    """`[B, 3, 3]` from output to input coordinates, as Pillow defines them; the identity where nothing is warped."""
    matrices = np.tile(np.eye(3, dtype=np.float64), (len(kind), 1, 1))
    for name, i, j in (("shear_x", 0, 1), ("shear_y", 1, 0), ("translate_x", 0, 2), ("translate_y", 1, 2)):
        rows = kind == KINDS.index(name)
        matrices[rows, i, j] = value[rows]
    rows = kind == KINDS.index("rotate")
    angle = -np.radians(value[rows].astype(np.float64))
    cos, sin, middle = np.cos(angle), np.sin(angle), np.array([size[1], size[0]]) / 2
    turn = np.stack((cos, sin, -sin, cos), axis=-1).reshape(-1, 2, 2)
    matrices[rows, :2, :2] = turn
    matrices[rows, :2, 2] = middle - turn @ middle
    return matrices.astype(np.float32)


def _choose(low: int, high: int, branch: DataNode, image: DataNode, operands: _Operands) -> DataNode:
    """Bisection: a batch passes few splits, and each sample one branch."""
    if low == high:
        return _BRANCHES[low](image, operands)
    middle = (low + high) // 2
    if branch <= middle:
        image = _choose(low, middle, branch, image, operands)
    else:
        image = _choose(middle + 1, high, branch, image, operands)
    return image


def _float(image: DataNode) -> DataNode:
    return fn.cast(image, dtype=types.FLOAT)


def _truncated(levels: DataNode) -> DataNode:
    return fn.cast(dmath.floor(dmath.clamp(levels, 0.0, 255.0)), dtype=types.UINT8)


def _blend(base: DataNode | float, image: DataNode, factor: DataNode) -> DataNode:
    return _truncated(base + (_float(image) - base) * factor)


def _channels(image: DataNode) -> list[DataNode]:
    return [fn.cast(image[:, :, c : c + 1], dtype=types.INT32) for c in range(3)]


def _grey(image: DataNode) -> DataNode:
    """Pillow's convert("L"), float `[H, W, 1]`."""
    red, green, blue = _channels(image)
    return _float((red * 19595 + green * 38470 + blue * 7471 + 32768) // 65536)


def _auto_contrast(image: DataNode, _: _Operands) -> DataNode:
    low = _float(fn.reductions.min(image, axes=(0, 1), keep_dims=True))
    high = _float(fn.reductions.max(image, axes=(0, 1), keep_dims=True))
    flat = _float(high == low)
    scale = 255.0 / (high - low + 255.0 * flat)  # 1 in a flat channel, which stays as it is
    return _truncated(_float(image) * scale - low * scale * (1.0 - flat))


def _equalize(image: DataNode, _: _Operands) -> DataNode:
    return fn.equalize(image)


def _invert(image: DataNode, _: _Operands) -> DataNode:
    return image ^ types.Constant(np.uint8(255))


def _posterize(image: DataNode, operands: _Operands) -> DataNode:
    return image & fn.cast(256.0 - dmath.pow(2.0, 8.0 - operands.value), dtype=types.UINT8)


def _solarize(image: DataNode, operands: _Operands) -> DataNode:
    return image ^ fn.cast(image >= operands.value, dtype=types.UINT8) * types.Constant(np.uint8(255))


def _solarize_add(image: DataNode, operands: _Operands) -> DataNode:
    return _truncated(_float(image) + _float(image < 128) * operands.value)


def _color(image: DataNode, operands: _Operands) -> DataNode:
    return _blend(_grey(image), image, operands.value)


def _contrast(image: DataNode, operands: _Operands) -> DataNode:
    mean = dmath.floor(fn.reductions.mean(_grey(image), axes=(0, 1), keep_dims=True) + 0.5)
    return _blend(mean, image, operands.value)


def _brightness(image: DataNode, operands: _Operands) -> DataNode:
    return _truncated(_float(image) * operands.value)


def _sharpness(image: DataNode, operands: _Operands) -> DataNode:
    smooth = dmath.floor(fn.filter(image, operands.smooth, dtype=types.FLOAT) + 0.5)
    smooth = smooth * operands.inside + _float(image) * (1.0 - operands.inside)
    return _blend(smooth, image, operands.value)


def _warp(image: DataNode, operands: _Operands) -> DataNode:
    return fn.experimental.warp_perspective(
        image, matrix=operands.matrix, border_mode="constant", fill_value=FILL, interp_type=types.INTERP_CUBIC
    )


def _grayscale(image: DataNode, _: _Operands) -> DataNode:
    grey = fn.cast(_grey(image), dtype=types.UINT8)
    return fn.cat(grey, grey, grey, axis=2)


def _blur(image: DataNode, operands: _Operands) -> DataNode:
    return fn.gaussian_blur(image, sigma=operands.host_value)


def _hue(image: DataNode, operands: _Operands) -> DataNode:
    """By way of Pillow's 8-bit HSV, in which the hue is moved; see `pixel_ops`."""
    red, green, blue = (_float(channel) for channel in _channels(image))
    value = dmath.max(dmath.max(red, green), blue)
    chroma = value - dmath.min(dmath.min(red, green), blue)
    divisor = dmath.max(chroma, 1.0)
    is_red = _float(red == value)
    is_green = _float(green == value) * (1.0 - is_red)
    sextant = is_red * (green - blue) / divisor
    sextant = sextant + is_green * (2.0 + (blue - red) / divisor)
    sextant = sextant + (1.0 - is_red - is_green) * (4.0 + (red - green) / divisor)
    turns = sextant / 6.0 + 1.0
    hue = dmath.floor((turns - dmath.floor(turns)) * 255.0)
    saturation = dmath.floor(chroma / dmath.max(value, 1.0) * 255.0) / 255.0
    # trunc(255 factor) for either sign
    shift = dmath.floor(operands.value * 255.0) + _float(operands.value < 0.0) * _float(
        dmath.floor(operands.value * 255.0) < operands.value * 255.0
    )
    hue = hue + shift + 256.0
    sextant = (hue - dmath.floor(hue / 256.0) * 256.0) * 6.0 / 255.0
    channels = []
    for centre in (0.0, 2.0, 4.0):
        away = 3.0 - dmath.abs(dmath.abs(sextant - centre) - 3.0)
        share = dmath.clamp(away - 1.0, 0.0, 1.0)
        channels.append(fn.cast(dmath.floor(value * (1.0 - saturation * share) + 0.5), dtype=types.UINT8))
    return fn.cat(*channels, axis=2)


_BRANCHES = (
    None,
    _warp,
    _auto_contrast,
    _equalize,
    _invert,
    _posterize,
    _solarize,
    _solarize_add,
    _color,
    _contrast,
    _brightness,
    _sharpness,
    _grayscale,
    _blur,
    _hue,
)
_NAMED = {branch.__name__[1:]: index for index, branch in enumerate(_BRANCHES) if branch} | {"none": 0}
_BRANCH_OF = np.array([_NAMED.get(name, _NAMED["warp"]) for name in KINDS], np.int32)
