"""DALI as an executor of plans: encoded bytes and boxes in, uint8 images out, and no random operator in between.

One graph serves training and evaluation. A box in source pixels is resampled to the output size (bicubic with
antialiasing, as PIL); a flip swaps the two ends of the region, which costs nothing. An evaluation box has fractional
edges: resampling it equals resize and centre crop to one level of 255, at half the CPU time, and never builds the
resized image.

Rules, each from a failure:

* `peek_image_shape` stands before the decoder, and the decoder's input depends on its result: bytes that are no image
  raise there, where the decoder would end in a segmentation fault (DALI 2.2 to 2.4).
* On the CPU only the box is decoded. On the GPU the whole image is: nvImageCodec 0.9 fails or crashes on ordinary
  regions (NVIDIA/nvImageCodec issue 55).
* No EXIF rotation: neither torchvision nor timm apply it, so the published numbers are without.
* A failed batch makes the pipeline invalid. The culprits are those samples that fail alone in the same graph with the
  same box; they are replaced, and everything in flight runs again in a new pipeline. A verdict that needs nothing but
  the sample keeps the stream independent of batches, threads and restarts.
"""

import io
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, types
from nvidia.dali.data_node import DataNode
from PIL import Image

from fastdeit.data.source import undecodable

IN_FLIGHT = 2


@dataclass(frozen=True)
class Work:
    """One batch for DALI: `encoded` B byte arrays, `box` float32 or int32 `[B, 4]` (y, x, height, width) in source
    pixels, `flip` bool `[B]`, and whatever the owner wants back with the images."""

    encoded: list[NDArray[np.uint8]]
    box: NDArray[Any]
    flip: NDArray[np.bool_]
    owner: Any = None

    def row(self, index: int) -> "Work":
        """The batch of sample `index` alone."""
        rows = slice(index, index + 1)
        return Work(self.encoded[rows], self.box[rows], self.flip[rows])


class Executor:
    """Runs `Work` in order, up to `IN_FLIGHT` batches ahead: `submit`, then `collect` in the same order.

    size: output (height, width). device: "cpu" or a GPU's index. decode_box: decode only the box (CPU, integer boxes).
    repair(work, {row: reason}) returns `work` without the undecodable rows, replaced or removed.
    """

    def __init__(
        self,
        size: tuple[int, int],
        batch_size: int,
        *,
        threads: int,
        device: str | int,
        decode_box: bool,
        repair: Callable[[Work, dict[int, str]], Work],
    ) -> None:
        self._size, self._batch_size, self._threads, self._device = size, batch_size, threads, device
        self._decode_box = decode_box and device == "cpu"
        self._repair = repair
        self._pending: deque[Work] = deque()
        self._stream = self._open(batch_size, threads, IN_FLIGHT)

    def run(self, works: Iterable[Work]) -> Iterator[tuple[Work, Any]]:
        """Submit and collect all `works`, keeping `IN_FLIGHT` batches under way."""
        for work in works:
            self.submit(work)
            if len(self._pending) == IN_FLIGHT:
                yield self.collect()
        while self._pending:
            yield self.collect()

    def submit(self, work: Work) -> None:
        """Start decoding; returns at once. Not more than `IN_FLIGHT` batches may wait for `collect`."""
        self._pending.append(work)
        self._push(self._stream, work)

    def collect(self) -> tuple[Work, Any]:
        """The oldest batch, as repaired, and its images: a DALI TensorList uint8 `[B, H, W, 3]`, None if no row is
        left."""
        while True:
            if not self._pending[0].encoded:
                return self._pending.popleft(), None
            try:
                images = self._stream.pop()
            except RuntimeError as error:
                self._recover(error)
            else:
                return self._pending.popleft(), images

    def _recover(self, error: RuntimeError) -> None:
        del self._stream
        found = False
        for position, work in enumerate(self._pending):
            failures = self._failures(work)
            if failures:
                found = True
                self._pending[position] = self._repair(work, failures)
        if not found:
            raise error
        self._stream = self._open(self._batch_size, self._threads, IN_FLIGHT)
        for work in self._pending:
            self._push(self._stream, work)

    def _failures(self, work: Work) -> dict[int, str]:
        """Rows that DALI cannot decode, with the reason. A sound image goes first: where that fails, the machine is at
        fault."""
        alone = self._open(1, 1, 1)
        self._push(alone, _sound())
        alone.pop()
        failures = {}
        for row, data in enumerate(work.encoded):
            try:
                self._push(alone, work.row(row))
                alone.pop()
            except RuntimeError as error:
                failures[row] = undecodable(data) or f"DALI cannot decode it ({_summary(error)})"
                alone = self._open(1, 1, 1)
        return failures

    def _open(self, batch_size: int, threads: int, depth: int) -> "_Stream":
        pipe = Pipeline(
            batch_size=batch_size,
            num_threads=threads,
            device_id=None if self._device == "cpu" else int(self._device),
            prefetch_queue_depth=depth,
        )
        with pipe:
            pipe.set_outputs(_graph(self._size, cpu=self._device == "cpu", decode_box=self._decode_box))
        pipe.build()
        return _Stream(pipe, depth, self._inputs(_sound()))

    def _push(self, stream: "_Stream", work: Work) -> None:
        if work.encoded:
            stream.push(self._inputs(work))

    def _inputs(self, work: Work) -> dict[str, Any]:
        corner, extent = work.box[:, :2], work.box[:, 2:]
        start, end = corner.astype(np.float32), (corner + extent).astype(np.float32)
        inputs: dict[str, Any] = {"encoded": work.encoded}
        if self._decode_box:
            inputs |= {"corner": corner.astype(np.int32), "extent": extent.astype(np.int32)}
            start, end = start - start, end - start
        start[work.flip, 1], end[work.flip, 1] = end[work.flip, 1], start[work.flip, 1]
        return inputs | {"start": start, "end": end}


class _Stream:
    """A DALI pipeline as a queue: batches come out in the order in which they went in.

    DALI's first `schedule_run` starts as many runs as the pipeline is deep, which keeps its threads busy from one batch
    to the next. It is therefore held back until that many batches were fed, and if they never come, `filler` takes
    their place and its images are dropped.
    """

    def __init__(self, pipe: Pipeline, depth: int, filler: dict[str, Any]) -> None:
        self._pipe, self._filler = pipe, filler
        self._missing = depth
        self._wanted: deque[bool] = deque()

    def push(self, inputs: dict[str, Any], wanted: bool = True) -> None:
        for name, value in inputs.items():
            self._pipe.feed_input(name, value)
        self._wanted.append(wanted)
        self._missing -= 1
        if self._missing <= 0:
            self._pipe.schedule_run()

    def pop(self) -> Any:
        """The images of the oldest batch; raises RuntimeError if DALI could not make them."""
        while self._missing > 0:
            self.push(self._filler, wanted=False)
        while True:
            (images,) = self._pipe.outputs()
            if self._wanted.popleft():
                return images


def _graph(size: tuple[int, int], *, cpu: bool, decode_box: bool) -> DataNode:
    """Inputs by name: `encoded`, `start` and `end` of the region in pixels of the decoded image, and with `decode_box`
    the `corner` and `extent` to decode."""
    encoded = _guarded(fn.external_source(name="encoded", no_copy=True))
    if decode_box:
        corner, extent = fn.external_source(name="corner"), fn.external_source(name="extent")
        images = fn.decoders.image_slice(encoded, start=corner, shape=extent, axes=(0, 1), adjust_orientation=False)
    elif cpu:
        images = fn.decoders.image(encoded, adjust_orientation=False)
    else:
        images = fn.decoders.image(encoded, device="mixed", adjust_orientation=False, jpeg_fancy_upsampling=True)
    return fn.resize(
        images,
        size=size,
        roi_start=fn.external_source(name="start"),
        roi_end=fn.external_source(name="end"),
        interp_type=types.INTERP_CUBIC,
        antialias=True,
    )


def _guarded(encoded: DataNode) -> DataNode:
    """The same bytes, available only once `peek_image_shape` has accepted them (cost: a copy of the encoded bytes)."""
    shape = fn.peek_image_shape(encoded, adjust_orientation=False)
    zero = fn.cast(shape[0:1] * 0, dtype=types.INT32)
    return fn.slice(encoded, start=zero, rel_shape=1.0, axes=(0,))


def _sound() -> Work:
    out = io.BytesIO()
    Image.new("RGB", (16, 16)).save(out, "JPEG")
    return Work([np.frombuffer(out.getvalue(), np.uint8)], np.array([[0, 0, 16, 16]]), np.zeros(1, bool))


def _summary(error: RuntimeError) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next(
        (line for line in lines if "nvImageCodec" in line or "decode" in line.lower()),
        lines[0] if lines else "no reason",
    )
