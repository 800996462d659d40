"""DALI as an executor of plans: encoded bytes and boxes in, uint8 images out, and no random operator in between.

One order for training and evaluation: a box of the source is resampled (bicubic with antialiasing, as PIL), a window
cut out where the plan says so, flipped, and the pixel operations applied.

On the CPU, DALI decodes the box, which is what it is fastest at, and `render` does the rest while the next batch is
being decoded: less than half the CPU time of the DALI graph, and nearer to PIL. On the GPU all of it is that graph
(`graph.py`).

A sample is decoded once for all of its views: on the CPU the smallest rectangle that holds the source
regions of all. DALI decodes the same pixels of a box whether it decodes more around it or not, so that no view depends
on the others.

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

import atexit
import io
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastdeit.data.execute.prefetch import close_all
from fastdeit.data.execute.render import Renderer, RenderError, source_region
from fastdeit.data.plan.operations import Ops
from fastdeit.data.plan.plan import Plan, unaugmented
from fastdeit.data.sources.source import DataError, undecodable

if TYPE_CHECKING:
    from nvidia.dali import Pipeline

IN_FLIGHT = 2


@dataclass(frozen=True)
class Work:
    """One batch of B samples to execute: `encoded` B byte arrays, and the plan of each view of them, of which erasing
    is left to the kernels. `owner`: whatever the owner wants back with the images."""

    encoded: list[NDArray[np.uint8]]
    views: tuple[Plan, ...]
    owner: Any = None

    def take(self, rows: Sequence[int]) -> "Work":
        """The batch of these rows, without an owner."""
        return Work([self.encoded[row] for row in rows], tuple(view.take(rows) for view in self.views))


class Executor:
    """Runs `Work` in order, up to `IN_FLIGHT` batches ahead: `submit`, then `collect` in the same order, then `close`.

    sizes: output (height, width) of each view. threads: of DALI, and on the CPU as many again that render a view.
    device: "cpu" or a GPU's index. repair(work, {row: reason}) returns `work` without the undecodable rows, replaced or
    removed. All works of an executor have the same form (number of operations, window or none). DataError without DALI.
    """

    def __init__(
        self,
        sizes: Sequence[tuple[int, int]],
        batch_size: int,
        *,
        threads: int,
        device: str | int,
        repair: Callable[[Work, dict[int, str]], Work],
    ) -> None:
        self._sizes, self._batch_size, self._threads, self._device = sizes, batch_size, threads, device
        self._repair = repair
        self._graphs = _graphs()
        self._pending: deque[Work] = deque()
        self._renderers = [Renderer(size, threads) for size in sizes] if device == "cpu" else []
        self._stream: _Stream | None = None

    def close(self) -> None:
        """Ends the threads; what is still pending is dropped."""
        self._stream = None
        for renderer in self._renderers:
            renderer.close()

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

    def collect(self) -> tuple[Work, tuple[Any, ...] | None]:
        """The oldest batch, as repaired, and of each view its images, uint8 `[B, H, W, 3]`: on the CPU a torch tensor,
        on the GPU a DALI TensorList; None if no row is left."""
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
        sound = _sound(work, self._sizes)
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
                failures[row] = undecodable(data) or _fault(error)
                alone = self._open(work, 1, 1, 1)
        return failures

    def _open(self, like: Work, batch_size: int, threads: int, depth: int) -> "_Stream":
        options = {"batch_size": batch_size, "num_threads": threads, "prefetch_queue_depth": depth}
        if self._renderers:
            pipe = self._graphs.decoded_box(**options, device_id=None)
        else:
            forms = self._graphs.forms(self._sizes, like.views)
            pipe = self._graphs.whole(forms, gpu=True, **options, device_id=int(self._device))
        pipe.build()
        return _Stream(pipe, depth, self._inputs(_sound(like, self._sizes)))

    def _push(self, stream: "_Stream", work: Work) -> None:
        if work.encoded:
            stream.push(self._inputs(work))

    def _pop(self, stream: "_Stream", work: Work) -> tuple[Any, ...]:
        outputs = stream.pop()
        if not self._renderers:
            return outputs
        decoded = [np.asarray(image) for image in outputs[0]]
        corner, _ = _hull(work.views, self._sizes)
        return tuple(
            renderer.batch(decoded, corner, view) for renderer, view in zip(self._renderers, work.views, strict=True)
        )

    def _inputs(self, work: Work) -> dict[str, Any]:
        if self._renderers:
            corner, extent = _hull(work.views, self._sizes)
            steps = {"corner": corner, "extent": extent}
        else:
            steps = self._graphs.inputs(self._sizes, work.views)
        return {"encoded": work.encoded} | steps


class _Stream:
    """A DALI pipeline as a queue: batches come out in the order in which they went in.

    DALI's first `schedule_run` starts as many runs as the pipeline is deep, which keeps its threads busy from one batch
    to the next. It is therefore held back until that many batches were fed, and if they never come, `filler` takes
    their place and its images are dropped.
    """

    def __init__(self, pipe: "Pipeline", depth: int, filler: dict[str, Any]) -> None:
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

    def pop(self) -> tuple[Any, ...]:
        """The images of the oldest batch; raises RuntimeError if DALI could not make them."""
        while self._missing > 0:
            self.push(self._filler, wanted=False)
        while True:
            images = self._pipe.outputs()
            if self._wanted.popleft():
                return images


@cache
def _graphs() -> ModuleType:
    """The module of DALI's graphs, imported by whom images are decoded: all that decodes none does without DALI."""
    # What DALI's copy of OpenCV would print for each damaged file is in our reports; read when it is loaded.
    os.environ.setdefault("OPENCV_LOG_LEVEL", "FATAL")
    try:
        module = import_module("fastdeit.data.execute.graph")
    except ModuleNotFoundError as error:
        if error.name not in ("nvidia", "nvidia.dali"):
            raise
        raise DataError(
            "images are decoded by NVIDIA DALI, which is not installed: pip install nvidia-dali-cuda120"
        ) from error
    # What DALI does when the interpreter exits aborts the process where a thread still decodes, so that they are ended
    # before. Handlers run in the reverse of the order in which they come: this one has to come after DALI's.
    atexit.register(close_all)
    return module


def _hull(views: Sequence[Plan], sizes: Sequence[tuple[int, int]]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """(corner, extent), both int32 `[B, 2]` as (y, x), of the smallest rectangle that holds the source regions of all
    views."""
    parts = [source_region(view, size) for view, size in zip(views, sizes, strict=True)]
    corner = np.min([part[:, :2] for part in parts], axis=0)
    end = np.max([part[:, :2] + part[:, 2:] for part in parts], axis=0)
    return corner.astype(np.int32), (end - corner).astype(np.int32)


def _sound(like: Work, sizes: Sequence[tuple[int, int]]) -> Work:
    """A batch of the form of `like`: one image that can be decoded, without operations."""
    out = io.BytesIO()
    Image.new("RGB", (16, 16)).save(out, "JPEG")
    views = []
    for view, size in zip(like.views, sizes, strict=True):
        layers, windowed = view.ops.kind.shape[1], view.resize is not None
        still = unaugmented(
            np.array([[0, 0, 16, 16]], np.int32),
            np.array([size], np.int32) if windowed else None,
            np.zeros((1, 2), np.int32) if windowed else None,
        )
        views.append(replace(still, ops=Ops(np.zeros((1, layers), np.uint8), np.zeros((1, layers), np.float32))))
    return Work([np.frombuffer(out.getvalue(), np.uint8)], tuple(views))


def _fault(error: RuntimeError) -> str:
    """What DALI could not do with a file that Pillow decodes."""
    operator = re.search(r"operator `nvidia\.dali\.fn\.([\w.]+)`", str(error))
    if operator and operator[1] != "peek_image_shape" and not operator[1].startswith("decoders."):
        return f"the file is sound, but DALI's operation {operator[1]} failed ({_summary(error)})"
    return f"DALI cannot decode it ({_summary(error)})"


def _summary(error: RuntimeError) -> str:
    """What DALI encountered, without the operators and the lines of a program that its messages begin with."""
    lines = [line.strip() for line in str(error).partition("encountered:")[2].splitlines() if line.strip()]
    return lines[0] if lines else "no reason"
