"""DALI as an executor of plans: encoded bytes and boxes in, uint8 images out, and no random operator in between.

One order for training and evaluation: a box of the source is resampled (bicubic with antialiasing, as PIL), a window
cut out where the plan says so, flipped, and the pixel operations applied.

On the CPU, DALI decodes the box, which is what it is fastest at, and `render` does the rest while the next batch is
being decoded: less than half the CPU time that the same steps take as DALI operators, and nearer to PIL. On the GPU all
of it is one DALI graph (`dali_graph`).

Rules, each from a failure:

* `peek_image_shape` stands before the decoder, and the decoder's input depends on its result: bytes that are no image
  raise there, where the decoder would end in a segmentation fault (DALI 2.2 to 2.4).
* On the GPU the whole image is decoded: nvImageCodec 0.9 fails or crashes on ordinary regions (NVIDIA/nvImageCodec
  issue 55).
* No EXIF rotation: neither torchvision nor timm apply it, so the published numbers are without.
* A failed batch makes the pipeline invalid. The culprits are those samples that fail alone, in the same stages with the
  same plan; they are replaced, and everything in flight runs again in a new pipeline. A verdict that needs nothing but
  the sample keeps the stream independent of batches, threads and restarts.
"""

import io
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from nvidia.dali import Pipeline, fn, pipeline_def
from nvidia.dali.data_node import DataNode
from PIL import Image

from fastdeit.data import dali_graph
from fastdeit.data.policy import Ops
from fastdeit.data.render import Renderer, RenderError
from fastdeit.data.source import undecodable

IN_FLIGHT = 2


@dataclass(frozen=True)
class Work:
    """One batch of B samples to execute: `encoded` B byte arrays, and the fields of `plan.Plan` that concern pixels.

    box int32 `[B, 4]` as (y, x, height, width) in source pixels is resampled to the output size; or, with resize and
    start int32 `[B, 2]`, to `resize` (height, width), of which the output is the window at `start` (y, x). flip bool
    `[B]`. ops: None where there is no operation. `owner`: whatever the owner wants back with the images.
    """

    encoded: list[NDArray[np.uint8]]
    box: NDArray[np.int32]
    flip: NDArray[np.bool_]
    ops: Ops | None = None
    resize: NDArray[np.int32] | None = None
    start: NDArray[np.int32] | None = None
    owner: Any = None

    @property
    def layers(self) -> int:
        """Operations per sample, those that do nothing included."""
        return 0 if self.ops is None else self.ops.kind.shape[1]

    def take(self, rows: Sequence[int]) -> "Work":
        """The batch of these rows, without an owner."""
        rows = list(rows)
        return Work(
            [self.encoded[row] for row in rows],
            self.box[rows],
            self.flip[rows],
            None if self.ops is None else Ops(self.ops.kind[rows], self.ops.value[rows]),
            None if self.resize is None else self.resize[rows],
            None if self.start is None else self.start[rows],
        )


class Executor:
    """Runs `Work` in order, up to `IN_FLIGHT` batches ahead: `submit`, then `collect` in the same order, then `close`.

    size: output (height, width). threads: of DALI, and on the CPU as many again that render. device: "cpu" or a GPU's
    index. repair(work, {row: reason}) returns `work` without the undecodable rows, replaced or removed. All works of
    an executor have the same form (number of operations, window or none).
    """

    def __init__(
        self,
        size: tuple[int, int],
        batch_size: int,
        *,
        threads: int,
        device: str | int,
        repair: Callable[[Work, dict[int, str]], Work],
    ) -> None:
        self._size, self._batch_size, self._threads, self._device = size, batch_size, threads, device
        self._repair = repair
        self._pending: deque[Work] = deque()
        self._renderer = Renderer(size, threads) if device == "cpu" else None
        self._stream: _Stream | None = None

    def close(self) -> None:
        """Ends the threads; what is still pending is dropped."""
        self._stream = None
        if self._renderer:
            self._renderer.close()

    def run(self, works: Iterable[Work]) -> Iterator[tuple[Work, Any]]:
        """Submit and collect all `works`, keeping `IN_FLIGHT` batches under way; closes at the end."""
        try:
            for work in works:
                self.submit(work)
                if len(self._pending) == IN_FLIGHT:
                    yield self.collect()
            while self._pending:
                yield self.collect()
        finally:
            self.close()

    def submit(self, work: Work) -> None:
        """Start decoding; returns at once. Not more than `IN_FLIGHT` batches may wait for `collect`."""
        self._pending.append(work)
        if self._stream is None:
            self._stream = self._open(work, self._batch_size, self._threads, IN_FLIGHT)
        self._push(self._stream, work)

    def collect(self) -> tuple[Work, Any]:
        """The oldest batch, as repaired, and its images, uint8 `[B, H, W, 3]`: on the CPU a torch tensor, on the GPU a
        DALI TensorList; None if no row is left."""
        while True:
            work = self._pending[0]
            if not work.encoded:
                return self._pending.popleft(), None
            try:
                images = self._pop(self._stream, work)
            except RuntimeError as error:
                self._recover(error)
            else:
                return self._pending.popleft(), images

    def _recover(self, error: RuntimeError) -> None:
        self._stream = None
        found = False
        for position, work in enumerate(self._pending):
            failures = self._failures(work)
            if failures:
                found = True
                self._pending[position] = self._repair(work, failures)
        if not found:
            raise error
        self._stream = self._open(self._pending[0], self._batch_size, self._threads, IN_FLIGHT)
        for work in self._pending:
            self._push(self._stream, work)

    def _failures(self, work: Work) -> dict[int, str]:
        """Rows that cannot be executed, with the reason. A sound image goes first: where that fails, the machine is at
        fault."""
        sound = _sound(work, self._size)
        alone = self._open(work, 1, 1, 1)
        self._push(alone, sound)
        self._pop(alone, sound)
        failures = {}
        for row, data in enumerate(work.encoded):
            single = work.take([row])
            try:
                self._push(alone, single)
                self._pop(alone, single)
            except RenderError as error:
                failures[row] = str(error)
            except RuntimeError as error:
                failures[row] = undecodable(data) or f"DALI cannot decode it ({_summary(error)})"
                alone = self._open(work, 1, 1, 1)
        return failures

    def _open(self, like: Work, batch_size: int, threads: int, depth: int) -> "_Stream":
        options = {"batch_size": batch_size, "num_threads": threads, "prefetch_queue_depth": depth}
        if self._renderer:
            pipe = _decode_box(**options, device_id=None)
        else:
            form = {"layers": like.layers, "windowed": like.resize is not None}
            pipe = dali_graph.whole(self._size, **form, gpu=True, **options, device_id=int(self._device))
        pipe.build()
        return _Stream(pipe, depth, self._inputs(_sound(like, self._size)))

    def _push(self, stream: "_Stream", work: Work) -> None:
        if work.encoded:
            stream.push(self._inputs(work))

    def _pop(self, stream: "_Stream", work: Work) -> Any:
        images = stream.pop()
        return self._renderer.batch([np.asarray(image) for image in images], work) if self._renderer else images

    def _inputs(self, work: Work) -> dict[str, Any]:
        if self._renderer:
            corner, extent = work.box.reshape(-1, 2, 2).swapaxes(0, 1).astype(np.int32, order="C")
            steps = {"corner": corner, "extent": extent}
        else:
            steps = dali_graph.inputs(self._size, work)
        return {"encoded": work.encoded} | steps


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


@pipeline_def
def _decode_box() -> DataNode:
    """The box of each image: inputs `encoded`, `corner` (y, x) and `extent` (height, width)."""
    encoded = dali_graph.guarded(fn.external_source(name="encoded", no_copy=True))
    corner, extent = fn.external_source(name="corner"), fn.external_source(name="extent")
    return fn.decoders.image_slice(encoded, start=corner, shape=extent, axes=(0, 1), adjust_orientation=False)


def _sound(like: Work, size: tuple[int, int]) -> Work:
    """A batch of the form of `like`: one image that can be decoded, without operations."""
    out = io.BytesIO()
    Image.new("RGB", (16, 16)).save(out, "JPEG")
    windowed = like.resize is not None
    return Work(
        [np.frombuffer(out.getvalue(), np.uint8)],
        np.array([[0, 0, 16, 16]], np.int32),
        np.zeros(1, bool),
        Ops(np.zeros((1, like.layers), np.uint8), np.zeros((1, like.layers), np.float32)),
        np.array([size], np.int32) if windowed else None,
        np.zeros((1, 2), np.int32) if windowed else None,
    )


def _summary(error: RuntimeError) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next(
        (line for line in lines if "nvImageCodec" in line or "decode" in line.lower()),
        lines[0] if lines else "no reason",
    )
