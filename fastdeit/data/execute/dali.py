"""DALI as an executor of plans: encoded bytes and boxes in, uint8 images out, and no random operator in between.

One order for training and evaluation: a box of the source is resampled (bicubic with antialiasing, as PIL), a window
cut out where the plan says so, flipped, and the pixel operations applied.

On the CPU, DALI decodes the box, which is what it is fastest at, and `render` does the rest while the next batch is
being decoded: less than half the CPU time of the DALI graph, and nearer to PIL. On the GPU all of it is that graph
(`graph.py`).

A sample is decoded once for all of its views: on the CPU the smallest rectangle that holds the source regions of all,
or somewhat more (`_hull`). DALI decodes the same pixels of a box whether it decodes more around it or not, so that no
view depends on the others.

Rules, each from a failure:

* `peek_image_shape` stands before the decoder, and the decoder's input depends on its result: bytes that are no image
  raise there, where the decoder would end in a segmentation fault (DALI 2.2 to 2.4).
* On the GPU the whole image is decoded: nvImageCodec 0.9 fails or crashes on ordinary regions (NVIDIA/nvImageCodec
  issue 55).
* No EXIF rotation: neither torchvision nor timm apply it, so the published numbers are without.
* A failed batch makes the pipeline invalid. The culprits are those samples that fail alone, in the same stages with the
  same plan. What DALI refuses alone goes to Pillow; what both refuse is replaced. Then everything in flight runs again
  in a new pipeline. A verdict that needs nothing but the sample keeps the stream independent of batches, threads and
  restarts.

What `route` says is not for DALI is decoded by Pillow before the batch is submitted, in threads of the executor. On the
CPU its box joins those that DALI decodes. On the GPU the whole picture goes into the same graph, in a format that DALI
takes bit for bit (`pillow.as_file`).
"""

import io
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastdeit.data.execute import pillow
from fastdeit.data.execute.decode import REFUSED
from fastdeit.data.execute.render import Renderer, RenderError, source_region
from fastdeit.data.execute.route import Encoded, routed
from fastdeit.data.execute.stream import Stream, graphs
from fastdeit.data.plan.operations import Ops
from fastdeit.data.plan.plan import Plan, unaugmented
from fastdeit.data.sources.source import BadImage

IN_FLIGHT = 2
_MOST = 0.7
"""Where a window needs that share of its box, all is decoded: it takes no longer, and spares a copy into an array of
the size of the box."""
Hull = tuple[NDArray[np.int32], NDArray[np.int32]]


@dataclass(frozen=True)
class Work:
    """One batch of B samples to execute: `encoded` B files, and the plan of each view of them, of which erasing
    is left to the kernels. `owner`: whatever the owner wants back with the images."""

    encoded: list[Encoded]
    views: tuple[Plan, ...]
    owner: Any = None

    def take(self, rows: Sequence[int]) -> "Work":
        """The batch of these rows, without an owner."""
        return Work([self.encoded[row] for row in rows], tuple(view.take(rows) for view in self.views))


@dataclass(frozen=True)
class _Task:
    """A batch under way. `drawn`: of the rows that Pillow decodes its pixels, uint8 `[h, w, 3]`: on the CPU those of
    `hull` (corner, extent), which is None on the GPU, where they are the whole picture."""

    work: Work
    hull: Hull | None
    drawn: Mapping[int, NDArray[np.uint8]]

    @property
    def by_dali(self) -> list[int]:
        """The rows that DALI decodes."""
        return [row for row in range(len(self.work.encoded)) if row not in self.drawn]

    def single(self, row: int) -> "_Task":
        """A batch of this row alone."""
        hull = None if self.hull is None else (self.hull[0][[row]], self.hull[1][[row]])
        return _Task(self.work.take([row]), hull, {0: self.drawn[row]} if row in self.drawn else {})


class Executor:
    """Runs `Work` in order, up to `IN_FLIGHT` batches ahead: `submit`, then `collect` in the same order, then `close`.

    sizes: output (height, width) of each view. threads: of DALI, and on the CPU as many again that render a view, and
    as many that wait for what Pillow has to decode. device: "cpu" or a GPU's index. repair(work, {row: reason}) returns
    `work` without the undecodable rows, replaced or removed. All works of an executor have the same form (number of
    operations, window or none). DataError without DALI.
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
        self._graphs = graphs()
        self._pending: deque[_Task] = deque()
        self._pillow = ThreadPoolExecutor(threads, "fastdeit-pillow")
        self._renderers = [Renderer(size, threads) for size in sizes] if device == "cpu" else []
        self._stream: Stream | None = None

    def close(self) -> None:
        """Ends the threads; what is still pending is dropped."""
        self._stream = None
        self._pillow.shutdown()
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
        """Start decoding; returns once Pillow has decoded what DALI does not. Not more than `IN_FLIGHT` batches may
        wait for `collect`."""
        task = self._task(work)
        self._pending.append(task)
        if self._stream is None:
            self._stream = self._open(task.work, self._batch_size, self._threads, IN_FLIGHT)
        self._push(self._stream, task)

    def collect(self) -> tuple[Work, tuple[Any, ...] | None]:
        """The oldest batch, as repaired, and of each view its images, uint8 `[B, H, W, 3]`: on the CPU a torch tensor,
        on the GPU a DALI TensorList; None if no row is left."""
        while True:
            task = self._pending[0]
            if not task.work.encoded:
                return self._pending.popleft().work, None
            try:
                images = self._pop(self._stream, task)
            except RuntimeError as error:
                self._recover(error)
            else:
                return self._pending.popleft().work, images

    def _task(self, work: Work) -> _Task:
        """`work` with what Pillow decodes of it, repaired until it can."""
        while True:
            hull = _hull(work.views, self._sizes) if self._renderers and work.encoded else None
            rows = [row for row, encoded in enumerate(work.encoded) if encoded.route.by_pillow]
            drawn = dict(zip(rows, self._pillow.map(partial(_drawn, work.encoded, hull), rows), strict=True))
            failures = {row: found for row, found in drawn.items() if isinstance(found, str)}
            if not failures:
                return _Task(work, hull, drawn)
            work = self._repaired(work, failures)

    def _repaired(self, work: Work, failures: dict[int, str]) -> Work:
        """`work` after `repair`; what was found to be for Pillow stays so."""
        routes = {id(encoded.data): encoded for encoded in work.encoded}
        work = self._repair(work, failures)
        return replace(work, encoded=[routes.get(id(encoded.data), encoded) for encoded in work.encoded])

    def _recover(self, error: RuntimeError) -> None:
        self._stream = None
        found = False
        for position, task in enumerate(self._pending):
            refused, failures = self._failures(task)
            if refused or failures:
                found = True
                encoded = list(task.work.encoded)
                for row in refused:
                    encoded[row] = encoded[row].by_pillow(REFUSED)
                work = replace(task.work, encoded=encoded)
                self._pending[position] = self._task(self._repaired(work, failures) if failures else work)
        if not found:
            raise error
        self._stream = self._open(self._pending[0].work, self._batch_size, self._threads, IN_FLIGHT)
        for task in self._pending:
            self._push(self._stream, task)

    def _failures(self, task: _Task) -> tuple[list[int], dict[int, str]]:
        """Rows that DALI refuses to decode, and those that fail later, with the reason. A sound image goes first: where
        that fails, the machine is at fault."""
        sound = self._task(_sound(task.work, self._sizes))
        alone = self._open(task.work, 1, 1, 1)
        self._push(alone, sound)
        self._pop(alone, sound)
        refused, failures = [], {}
        for row in range(len(task.work.encoded)):
            single = task.single(row)
            try:
                self._push(alone, single)
                self._pop(alone, single)
            except RenderError as error:
                failures[row] = str(error)
            except RuntimeError as error:
                if row in task.drawn or _operation(error):
                    failures[row] = _fault(error)
                else:
                    refused.append(row)
                alone = self._open(task.work, 1, 1, 1)
        return refused, failures

    def _open(self, like: Work, batch_size: int, threads: int, depth: int) -> Stream:
        options = {"batch_size": batch_size, "num_threads": threads, "prefetch_queue_depth": depth}
        if self._renderers:
            pipe = self._graphs.decoded_box(**options, device_id=None)
        else:
            forms = self._graphs.forms(self._sizes, like.views)
            pipe = self._graphs.whole(forms, gpu=True, **options, device_id=int(self._device))
        pipe.build()
        return Stream(pipe, depth, self._inputs(self._task(_sound(like, self._sizes))))

    def _push(self, stream: Stream, task: _Task) -> None:
        if self._uses(task):
            stream.push(self._inputs(task))

    def _pop(self, stream: Stream, task: _Task) -> tuple[Any, ...]:
        outputs = stream.pop() if self._uses(task) else ((),)
        if task.hull is None:
            return outputs
        decoded = map(np.asarray, outputs[0])
        sources = [task.drawn[row] if row in task.drawn else next(decoded) for row in range(len(task.work.encoded))]
        return self._rendered(sources, task)

    def _rendered(self, sources: list[NDArray[np.uint8]], task: _Task) -> tuple[Any, ...]:
        """The views of a batch, of which `sources` are the decoded boxes."""
        corner, _ = task.hull
        return tuple(
            renderer.batch(sources, corner, view)
            for renderer, view in zip(self._renderers, task.work.views, strict=True)
        )

    def _uses(self, task: _Task) -> bool:
        """Whether DALI has anything to do for `task`."""
        return bool(task.by_dali if self._renderers else task.work.encoded)

    def _inputs(self, task: _Task) -> dict[str, Any]:
        if task.hull is None:
            return {"encoded": files(task.work.encoded, task.drawn)} | self._graphs.inputs(self._sizes, task.work.views)
        rows, (corner, extent) = task.by_dali, task.hull
        return {
            "encoded": [task.work.encoded[row].data for row in rows],
            "corner": corner[rows],
            "extent": extent[rows],
        }


class Decoder(Executor):
    """An executor on the CPU that decodes and renders nothing, to measure the decoder alone. `collect` gives the boxes
    of a batch, uint8 `[h, w, 3]` each, as one view; they are valid until the next `collect`."""

    def _rendered(self, sources: list[NDArray[np.uint8]], task: _Task) -> tuple[Any, ...]:
        return (sources,)


def files(encoded: Sequence[Encoded], drawn: Mapping[int, NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
    """The files that DALI decodes on the GPU: in place of those in `drawn` the pixels that Pillow made of them."""
    return [pillow.as_file(drawn[row]) if row in drawn else one.data for row, one in enumerate(encoded)]


def _drawn(encoded: Sequence[Encoded], hull: Hull | None, row: int) -> NDArray[np.uint8] | str:
    """What Pillow makes of this row, the whole or its hull, or the reason why it makes nothing."""
    box = None if hull is None else (*hull[0][row].tolist(), *hull[1][row].tolist())
    try:
        return pillow.pixels(encoded[row], box)
    except BadImage as error:
        return str(error)


def _hull(views: Sequence[Plan], sizes: Sequence[tuple[int, int]]) -> Hull:
    """(corner, extent), both int32 `[B, 2]` as (y, x), of what is decoded: the smallest rectangle that holds the source
    regions of all views, or their boxes where those are little larger."""
    corner, extent = _around([source_region(view, size) for view, size in zip(views, sizes, strict=True)])
    if any(view.resize is not None for view in views):
        first, whole = _around([view.box for view in views])
        most = (extent.prod(1) >= _MOST * whole.prod(1))[:, None]
        corner, extent = np.where(most, first, corner), np.where(most, whole, extent)
    return corner.astype(np.int32), extent.astype(np.int32)


def _around(parts: Sequence[NDArray[np.int32]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(corner, extent) of the smallest rectangles that hold all `parts`, each int32 `[B, 4]` (y, x, height, width)."""
    corner = np.min([part[:, :2] for part in parts], axis=0).astype(np.int64)
    return corner, np.max([part[:, :2] + part[:, 2:] for part in parts], axis=0) - corner


def _sound(like: Work, sizes: Sequence[tuple[int, int]]) -> Work:
    """A batch of the form of `like`: one image that can be decoded, without operations."""
    views = []
    for view, size in zip(like.views, sizes, strict=True):
        layers, windowed = view.ops.kind.shape[1], view.resize is not None
        still = unaugmented(
            np.array([[0, 0, 16, 16]], np.int32),
            np.array([size], np.int32) if windowed else None,
            np.zeros((1, 2), np.int32) if windowed else None,
        )
        views.append(replace(still, ops=Ops(np.zeros((1, layers), np.uint8), np.zeros((1, layers), np.float32))))
    return Work([_plain()], tuple(views))


@cache
def _plain() -> Encoded:
    """A picture of 16 x 16 pixels that every decoder reads."""
    out = io.BytesIO()
    Image.new("RGB", (16, 16)).save(out, "JPEG")
    return routed(np.frombuffer(out.getvalue(), np.uint8))


def _operation(error: RuntimeError) -> str | None:
    """The operation of DALI's graph that failed, if it was not the decoder."""
    operator = re.search(r"operator `nvidia\.dali\.fn\.([\w.]+)`", str(error))
    decoding = operator is None or operator[1] == "peek_image_shape" or operator[1].startswith("decoders.")
    return None if decoding else operator[1]


def _fault(error: RuntimeError) -> str:
    """What DALI could not do with a file that Pillow decodes."""
    name = _operation(error)
    if name:
        return f"the file is sound, but DALI's operation {name} failed ({_summary(error)})"
    return f"DALI cannot decode it ({_summary(error)})"


def _summary(error: RuntimeError) -> str:
    """What DALI encountered, without the operators and the lines of a program that its messages begin with."""
    lines = [line.strip() for line in str(error).partition("encountered:")[2].splitlines() if line.strip()]
    return lines[0] if lines else "no reason"
