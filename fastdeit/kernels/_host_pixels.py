"""The backend `host` of `pixels`: on a CPU a sample at a time, in the cache and by one thread.

Where `pip install` found a C++ compiler, the passes over float32 are those of `_host_pixels.cpp`: the same bits."""

import ctypes
import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdeit.kernels import _checks, _op
from fastdeit.kernels.noise import host_normals

_LIBRARY, _SOURCE = (Path(__file__).with_name(name) for name in ("_host_pixels.compiled.so", "_host_pixels.cpp"))


@cache
def _opened() -> ctypes.CDLL | str:
    """The library, or why it is not used."""
    if not _LIBRARY.exists():
        return f"there is no {_LIBRARY.name}, which `pip install` makes where it finds a C++ compiler that works"
    try:
        found = ctypes.CDLL(str(_LIBRARY))
        found.fastdeit_source.restype = ctypes.c_char_p
    except (OSError, AttributeError) as error:  # AttributeError: there is nothing of that name in it
        return f"{_LIBRARY.name} cannot be used: {error}"
    if _SOURCE.exists() and found.fastdeit_source().decode() != hashlib.sha256(_SOURCE.read_bytes()).hexdigest():
        return f"{_LIBRARY.name} was made before {_SOURCE.name} was changed; run `pip install` again"
    pointer, number, value = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
    found.fastdeit_normalise.argtypes = [pointer, number, pointer, *(number,) * 4, pointer, pointer]
    found.fastdeit_mix.argtypes = [pointer, pointer, number, value, value]
    found.fastdeit_normalise.restype = found.fastdeit_mix.restype = None
    return found


def library() -> ctypes.CDLL | None:
    """The compiled passes; None where they are not used."""
    return None if isinstance(_opened(), str) else _opened()


def status() -> str:
    """What makes the passes, in words."""
    return f"numpy: {_opened()}" if library() is None else "C++"


class _Samples:
    """The samples of a batch on a CPU, normalised and erased window by window, with the roundings of the reference."""

    def __init__(
        self,
        images: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        boxes: Tensor | None,
        keys: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        self._images, (_, self._height, self._width, _) = images.numpy(), images.shape
        self.dtype = np.float64 if dtype == torch.float64 else np.float32
        self._scale = np.array([1 / (255 * s) for s in std], self.dtype)[:, None, None]
        self._shift = np.array([m / s for m, s in zip(mean, std, strict=True)], self.dtype)[:, None, None]
        self._boxes = None if boxes is None else _clipped(boxes, self._height, self._width)
        self._keys = [] if keys is None else keys.tolist()
        self._noise: dict[int, NDArray] = {}

    def render(self, i: int, window: tuple[slice, slice], out: NDArray) -> None:
        """Write sample i's pixels inside `window` (rows, columns) to `out` `[3, h, w]`."""
        self._normalise(self._images[i][window], out)
        if self._boxes is None:
            return
        box = self._boxes[i]
        shown = [slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(box, window, strict=True)]
        if all(side.start < side.stop for side in shown):
            rows, columns = (_moved(side, by.start) for side, by in zip(shown, window, strict=True))
            noise_rows, noise_columns = (_moved(side, by.start) for side, by in zip(shown, box, strict=True))
            out[:, rows, columns] = self._noise_of(i)[:, noise_rows, noise_columns]

    def _normalise(self, image: NDArray[np.uint8], out: NDArray) -> None:
        """`image` `[h, w, 3]` to `out` `[3, h, w]`, whose rows are contiguous."""
        if self.dtype != np.float32 or image.strides[1:] != (3, 1) or library() is None:
            np.copyto(out, image.transpose(2, 0, 1))
            out *= self._scale
            out -= self._shift
            return
        plane, row = (stride // out.itemsize for stride in out.strides[:2])
        library().fastdeit_normalise(
            *(image.ctypes.data, image.strides[0], out.ctypes.data, plane, row, *image.shape[:2]),
            *(self._scale.ctypes.data, self._shift.ctypes.data),
        )

    def mix(self, own: NDArray, other: NDArray, weight: NDArray) -> None:
        """own = weight own + (1 - weight) other, both contiguous; `other` may be written to."""
        if self.dtype == np.float32 and library() is not None:
            library().fastdeit_mix(own.ctypes.data, other.ctypes.data, own.size, weight, 1 - weight)
            return
        other *= 1 - weight
        own *= weight
        own += other

    def _noise_of(self, i: int) -> NDArray:
        """The noise of sample i's whole box: needed again where the sample is a partner."""
        if i not in self._noise:
            rows, columns = (np.arange(side.start, side.stop, dtype=np.uint64) for side in self._boxes[i])
            pixel = np.add.outer(rows * np.uint64(self._width), columns)
            self._noise[i] = host_normals(pixel, self._keys[i], self.dtype)
        return self._noise[i]


def _moved(side: slice, by: int) -> slice:
    return slice(side.start - by, side.stop - by)


def _clipped(boxes: Tensor, height: int, width: int) -> list[tuple[slice, slice]]:
    """(rows, columns) of each box inside the image; an empty box has an empty slice."""
    sides = boxes.numpy().clip(0, [height, width, height, width]).tolist()
    return [(slice(y0, y1), slice(x0, x1)) for y0, x0, y1, x1 in sides]


def host_pixels(
    images: Tensor,
    mean: Sequence[float],
    std: Sequence[float],
    partner: Tensor | None,
    lam: Tensor | None,
    box: Tensor | None,
    boxes: Tensor | None,
    keys: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`reference_pixels` of tensors on the CPU: of a partner only what shows, noise only inside the boxes."""
    batch, height, width, channels = images.shape
    samples = _Samples(images, mean, std, boxes, keys, _op.statistics_dtype(dtype))
    # Not torch's: numpy asks the system for huge pages, and touching new memory is a third of all time without them.
    out = np.empty((batch, channels, height, width), samples.dtype)
    everywhere = slice(0, height), slice(0, width)
    if partner is None:
        for i, own in enumerate(out):
            samples.render(i, everywhere, own)
        return torch.from_numpy(out).to(dtype)
    _checks.check_index("partner", partner, batch)
    weights = np.ones(batch, samples.dtype) if lam is None else lam.numpy().astype(samples.dtype)
    windows = _clipped(torch.zeros(batch, 4, dtype=torch.int32) if box is None else box, height, width)
    other = np.empty(out.shape[1:], samples.dtype)
    for i, (own, j, weight, (rows, columns)) in enumerate(zip(out, partner.tolist(), weights, windows, strict=True)):
        samples.render(i, everywhere, own)
        if weight != 1:
            samples.render(j, everywhere, other)
            samples.mix(own, other, weight)
        samples.render(j, (rows, columns), own[:, rows, columns])
    return torch.from_numpy(out).to(dtype)
