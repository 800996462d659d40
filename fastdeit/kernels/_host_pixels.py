"""The backend `host` of `pixels`: on a CPU a sample at a time, in the cache and by one thread."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdeit.kernels import _checks, _op
from fastdeit.kernels.noise import host_normals


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
        np.copyto(out, self._images[i][window].transpose(2, 0, 1))
        out *= self._scale
        out -= self._shift
        if self._boxes is None:
            return
        box = self._boxes[i]
        shown = [slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(box, window, strict=True)]
        if all(side.start < side.stop for side in shown):
            rows, columns = (_moved(side, by.start) for side, by in zip(shown, window, strict=True))
            noise_rows, noise_columns = (_moved(side, by.start) for side, by in zip(shown, box, strict=True))
            out[:, rows, columns] = self._noise_of(i)[:, noise_rows, noise_columns]

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
            other *= 1 - weight
            own *= weight
            own += other
        samples.render(j, (rows, columns), own[:, rows, columns])
    return torch.from_numpy(out).to(dtype)
