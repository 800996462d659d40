"""From decoded regions to a batch, as the CPU executes the plan: resize, window, flip, pixel operations.

A thread takes one sample through all stages while it is in the cache. The resize is the torch operator behind
`interpolate` for uint8: Pillow's method in 16-bit fixed point, a few levels apart at most, at a seventh of its time.
That operator makes whole pictures only. Where a window shows a small part of a long one, Pillow makes that part.
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from fastdeit.data import compiled, pixel_ops
from fastdeit.data.plan.plan import Plan

Pixels = NDArray[np.uint8]
_SERIAL = 32767  # at::internal::GRAIN_SIZE - 1
_LONG = 16
"""How many times the pixels of its window a picture is resized to as a whole; a ratio of sides of about 12."""


class RenderError(RuntimeError):
    """One sample cannot be rendered; the message is the reason, without the path."""


class Renderer:
    """Renders to `size` (height, width) in `threads` threads, until `close`."""

    def __init__(self, size: tuple[int, int], threads: int) -> None:
        self._size, self._threads = size, threads
        self._pool = ThreadPoolExecutor(threads, "fastdeit-render")

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def batch(self, sources: Sequence[Pixels], corner: NDArray[np.int32], view: Plan) -> torch.Tensor:
        """uint8 `[B, H, W, 3]` in memory of its own; RenderError if a sample fails.

        sources: what was decoded of each image, from `corner` int32 `[B, 2]` (y, x) on, `source_region` at least.
        """
        out = np.empty((len(sources), *self._size, 3), np.uint8)
        parts = source_region(view, self._size)
        rows = iter(range(len(sources)))  # shared: a thread that is free takes the next row

        def run(_: int) -> None:
            for row in rows:
                try:
                    out[row] = self._image(sources[row], corner[row], parts[row], view, row)
                except pixel_ops.OperationError as error:
                    raise RenderError(f"the file is sound, but {error}") from error
                except Exception as error:
                    failed = f"cutting and resizing it failed ({type(error).__name__}: {error})"
                    raise RenderError(f"the file is sound, but {failed}") from error

        for _ in self._pool.map(run, range(self._threads)):
            pass
        return torch.from_numpy(out)

    def _image(
        self, source: Pixels, corner: NDArray[np.int32], part: NDArray[np.int32], view: Plan, row: int
    ) -> Pixels:
        if view.resize is None:
            image = resized(_pixels(source, corner, part), self._size)
        elif math.prod(view.resize[row].tolist()) > _LONG * math.prod(self._size):
            image = window(*_shown(_pixels(source, corner, part), part, view, row, self._size), self._size)
        else:
            whole = _whole(source, corner, part, view.box[row])
            image = window(resized(whole, view.resize[row].tolist()), view.start[row], self._size)
        if view.flip[row]:
            image = flipped(image)
        return pixel_ops.apply(image, view.ops.kind[row], view.ops.value[row])


def shown(
    resize: NDArray[np.int32], begin: NDArray[np.int32], size: tuple[int, int]
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """(first, last), both `[B, 2]` as (y, x): the pixels of pictures of the sizes `resize` that a window of `size` from
    `begin` shows, those that it shows by reflection among them."""
    end = resize - 1
    finish = begin + np.asarray(size) - 1
    low, high = np.maximum(begin, 0), np.minimum(finish, end)
    # Reflected at one end or the other.
    low = np.where(finish > end, np.minimum(low, 2 * end - finish), low).clip(0, end)
    high = np.where(begin < 0, np.maximum(high, -begin), high).clip(0, end)
    return low, high


def source_region(view: Plan, size: tuple[int, int]) -> NDArray[np.int32]:
    """int32 `[B, 4]` (y, x, height, width) in source pixels: of each box the part that the output depends on.

    That is all of it but for a window: output pixel i of a resize by the factor 1 / s lies at s (i + 1/2) of the input,
    and its cubic reaches 2 max(s, 1) pixels to either side.
    """
    if view.resize is None:
        return view.box
    top, extent = view.box[:, :2], view.box[:, 2:]
    low, high = shown(view.resize, view.start, size)
    scale = extent / view.resize
    reach = 2 * np.maximum(scale, 1) + 1  # a pixel more for rounding
    begin = np.floor(scale * (low + 0.5) - reach).clip(0, extent)
    end = np.ceil(scale * (high + 0.5) + reach).clip(0, extent)
    return np.concatenate((top + begin, end - begin), axis=1).astype(np.int32)


def _pixels(source: Pixels, corner: NDArray[np.int32], part: NDArray[np.int32]) -> Pixels:
    """`part` of the image of which `source` holds the pixels from `corner` on."""
    y, x, height, width = part.tolist()
    top, left = y - int(corner[0]), x - int(corner[1])
    return source[top : top + height, left : left + width]


def _whole(source: Pixels, corner: NDArray[np.int32], part: NDArray[np.int32], box: NDArray[np.int32]) -> Pixels:
    """`box` of an image of which `source` holds `part` at least; what it lacks is anything."""
    if (box[:2] >= corner).all() and (box[:2] + box[2:] <= corner + source.shape[:2]).all():
        return _pixels(source, corner, box)
    pixels = _pixels(source, corner, part)
    region = np.empty((*box[2:].tolist(), 3), np.uint8)
    (y, x), (height, width) = (part[:2] - box[:2]).tolist(), pixels.shape[:2]
    region[y : y + height, x : x + width] = pixels
    return region


def _shown(
    pixels: Pixels, part: NDArray[np.int32], view: Plan, row: int, size: tuple[int, int]
) -> tuple[Pixels, NDArray[np.int64]]:
    """Of the resized picture what the window shows, and where the window starts in it."""
    (low,), (high,) = shown(view.resize[[row]], view.start[[row]], size)
    scale, offset = view.box[row, 2:] / view.resize[row], part[:2] - view.box[row, :2]
    (top, left), (bottom, right) = (scale * edge - offset for edge in (low, high + 1))
    height, width = (high - low + 1).tolist()
    # Pillow looks beyond the box where the filter reaches there.
    box = (left, top, min(right, pixels.shape[1]), min(bottom, pixels.shape[0]))
    image = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC, box)
    return np.array(image), view.start[row] - low


def resized(image: Pixels, size: Sequence[int]) -> Pixels:
    """uint8 `[h, w, 3]` to `[H, W, 3]`, `size` = (H, W): bicubic (coefficient -1/2), with antialiasing."""
    channels_last = torch.from_numpy(image)[None].permute(0, 3, 1, 2)
    out = torch.ops.aten._upsample_bicubic2d_aa(channels_last, list(size), False)
    return out.permute(0, 2, 3, 1)[0].numpy()


def flipped(image: Pixels) -> Pixels:
    """Left to right. numpy would reverse pixel by pixel, 15 times slower; of more elements than `_SERIAL` at a time
    torch would wake threads of its own, which costs more than they save."""
    if not compiled.missing():
        return compiled.flipped(np.ascontiguousarray(image))
    out = np.empty_like(image)
    lines = max(1, _SERIAL // image[0].size)
    for top in range(0, len(image), lines):
        out[top : top + lines] = torch.from_numpy(image[top : top + lines]).flip(1).numpy()
    return out


def window(image: Pixels, start: NDArray[np.int32], size: tuple[int, int]) -> Pixels:
    """`size` (height, width) pixels from `start` (y, x), reflected where they lie outside, the edge not repeated."""
    # Columns first: to take them one by one costs far more than a slice or than rows, and few windows reach outside.
    for axis in (1, 0):
        first, stop, length = int(start[axis]), int(start[axis]) + size[axis], image.shape[axis]
        if first >= 0 and stop <= length:
            image = image[first:stop] if axis == 0 else image[:, first:stop]
        else:
            index = np.abs(np.arange(first, stop))
            image = image.take(length - 1 - np.abs(length - 1 - index), axis=axis)
    return image
