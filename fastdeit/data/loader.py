"""Loaders: a stream of ready batches, the same for any number of processes, threads, micro-batches or restarts.

Three threads in a row, each at most two batches ahead: one reads files and makes the plan, one keeps DALI busy, and
the consumer takes finished batches. A file that cannot be decoded never stops them: training takes a substitute,
evaluation goes without it, and both report it, until there are so many that the data set itself must be wrong.
"""

import os
import threading
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fastdeit.data import order, plan
from fastdeit.data.dali import Executor, Work
from fastdeit.data.prefetch import Prefetch
from fastdeit.data.source import BadImage, DataError, Source, check, quieten_pillow

OnBad = Callable[[str, str], None]
Read = tuple[NDArray[np.uint8], tuple[int, int]] | str
_AHEAD = 2
_LISTED = 20


@dataclass(frozen=True)
class Samples:
    """B samples of one micro-batch in V views; CPU tensors, `images` on the loader's device.

    images one uint8 `[B, H, W, 3]` per view; y1, y2 int64 `[B]`, lam float32 `[B]`: target = lam * onehot(y1) + (1 -
    lam) * onehot(y2); partner int64 `[B]`, pixel_lam float32 `[B]` as in `plan.Mix`, box int32 `[V, B, 4]` likewise, in
    pixels of each view; erase (erase_box int32 `[B, 4]`, erase_key int64 `[B]`) per view as in `plan.Plan`, or None for
    a view that is never erased; noise float32 `[B, K]` drop-path uniforms; index int64 `[B]` position in the source. In
    evaluation there is one view, and nothing is mixed or erased: y2 = y1, lam = 1, partner = itself, box zero.
    """

    images: tuple[torch.Tensor, ...]
    y1: torch.Tensor
    y2: torch.Tensor
    lam: torch.Tensor
    partner: torch.Tensor
    pixel_lam: torch.Tensor
    box: torch.Tensor
    erase: tuple[tuple[torch.Tensor, torch.Tensor] | None, ...]
    noise: torch.Tensor
    index: torch.Tensor

    def __len__(self) -> int:
        return len(self.index)


class BadImages:
    """Images this process could not use. `count`: how often it met one; `reasons`: path to reason, each path once."""

    def __init__(self, source: Source, max_fraction: float, on_bad: OnBad | None) -> None:
        self.count = 0
        self.reasons: dict[str, str] = {}
        self._source, self._max_fraction = source, max_fraction
        self._on_bad = on_bad or _warn
        self._lock = threading.Lock()

    def add(self, index: int, reason: str) -> None:
        """Count sample `index`; report it if it is new, and raise DataError if that makes too many (or all)."""
        path = self._source.path(index)
        with self._lock:
            self.count += 1
            if path in self.reasons:
                return
            self.reasons[path] = reason
            reasons = list(self.reasons.items())
        self._on_bad(path, reason)
        n = len(self._source)
        if len(reasons) > self._max_fraction * n or len(reasons) == n:
            listed = "".join(f"\n  {path}: {reason}" for path, reason in reasons[:_LISTED])
            more = f"\n  and {len(reasons) - _LISTED} more" if len(reasons) > _LISTED else ""
            raise DataError(
                f"{len(reasons)} of {n} images cannot be used, more than max_bad_fraction {self._max_fraction:g} "
                f"allows; repair or delete the files that are damaged, or raise max_bad_fraction:{listed}{more}"
            )


class TrainLoader:
    """Training batches of process `rank` of `world`, by global step: step s is batch s % steps_per_epoch of epoch
    s // steps_per_epoch.

    views: augmentation of each view, further ones with a `stream` of their own. Mixing is drawn once for all views of a
    sample, in the first, and the cut box scaled to the size of each. batch_size is that of
    all processes and micro-batches together. threads: DALI's CPU threads (default: the machine's cores divided by
    world). device: "cpu" or a GPU's index. on_bad(path, reason) is called once for each file that cannot be
    used (default: a warning); DataError once they are more than `max_bad_fraction` of the data set.
    """

    def __init__(
        self,
        source: Source,
        views: Sequence[plan.Augment],
        mixing: plan.Mixing,
        *,
        seed: int,
        batch_size: int,
        accumulate: int = 1,
        repeats: int = 1,
        rank: int = 0,
        world: int = 1,
        threads: int | None = None,
        device: str | int = "cpu",
        noise_per_sample: int = 0,
        max_bad_fraction: float = 0.001,
        on_bad: OnBad | None = None,
    ) -> None:
        self._groups = order.groups_per_batch(batch_size, mixing.group_size, accumulate, world)
        self._source, self._views, self._mixing, self._seed = source, tuple(views), mixing, seed
        self._batch_size, self._accumulate, self._repeats = batch_size, accumulate, repeats
        self._rank, self._world = rank, world
        self._threads, self._device = threads or _threads(world), device
        self._noise_per_sample = noise_per_sample
        self.steps_per_epoch = order.steps_per_epoch(len(source), batch_size)
        self.bad = BadImages(source, max_bad_fraction, on_bad)

    def batches(self, start_step: int, stop_step: int) -> Generator[list[Samples], None, None]:
        """One list of `accumulate` micro-batches for each step. Threads live until the generator is exhausted or
        closed, and starting them costs a pipeline: iterate a whole run by one call."""
        with closing(_stream(self._works(start_step, stop_step), self._executor, self._device, self._arrays)) as stream:
            for _ in range(start_step, stop_step):
                yield [next(stream) for _ in range(self._accumulate)]

    def _executor(self) -> Executor:
        return Executor(
            [view.size for view in self._views],
            self._batch_size // (self._accumulate * self._world),
            threads=self._threads,
            device=self._device,
            repair=self._repair,
        )

    def _works(self, start_step: int, stop_step: int) -> Generator[Work, None, None]:
        epoch = None
        with _parallel_read(self._source, self._threads) as read:
            for step in range(start_step, stop_step):
                if step // self.steps_per_epoch != epoch:
                    epoch = step // self.steps_per_epoch
                    stream = order.epoch(self._seed, epoch, len(self._source), self._batch_size, self._repeats)
                groups = order.groups(stream, step % self.steps_per_epoch, self._batch_size, self._mixing.group_size)
                for micro in range(self._accumulate):
                    part = order.slice_of(self._groups, micro, self._accumulate, self._rank, self._world)
                    rows = _Rows(epoch, step, part, groups.sample[part].reshape(-1), groups.copy[part].reshape(-1))
                    self._fill(rows, range(len(rows.sample)), read)
                    yield self._work(rows)

    def _fill(self, rows: "_Rows", wanted: Sequence[int], read: Callable[[NDArray[np.int64]], list[Read]]) -> None:
        """Read the samples of rows `wanted`, and substitutes for those that cannot be used."""
        while wanted:
            failed = []
            for row, result in zip(wanted, read(rows.sample[list(wanted)]), strict=True):
                if isinstance(result, str):
                    self._substitute(rows, row, result)
                    failed.append(row)
                else:
                    rows.encoded[row], rows.size[row] = result
            wanted = failed

    def _substitute(self, rows: "_Rows", row: int, reason: str) -> None:
        self.bad.add(int(rows.sample[row]), reason)
        original, attempt = int(rows.original[row]), int(rows.attempt[row])
        rows.sample[row] = order.substitute(self._seed, rows.epoch, original, attempt, len(self._source))
        rows.attempt[row] += 1

    def _work(self, rows: "_Rows") -> Work:
        of = (self._seed, rows.epoch, rows.sample, rows.copy, *rows.size.T)
        return Work(list(rows.encoded), tuple(plan.samples(view, *of) for view in self._views), rows)

    def _repair(self, work: Work, failures: dict[int, str]) -> Work:
        for row, reason in failures.items():
            self._substitute(work.owner, row, reason)
        self._fill(work.owner, list(failures), partial(_read, self._source))
        return self._work(work.owner)

    def _arrays(self, work: Work) -> dict[str, Any]:
        rows: _Rows = work.owner
        first = self._views[0].size
        mix = plan.mix(self._mixing, first, self._seed, rows.step, rows.groups)
        boxes = [plan.scale_boxes(mix.box, first, view.size) for view in self._views]
        # Empty boxes would still cost the noise of every pixel on a GPU.
        erase = [
            (planned.erase_box, planned.erase_key) if view.erase else None
            for view, planned in zip(self._views, work.views, strict=True)
        ]
        size = self._mixing.group_size
        positions = np.arange(rows.groups.start * size, rows.groups.stop * size)
        noise = plan.noise(self._seed, rows.step, positions, self._noise_per_sample)
        return _tensors(self._source, rows.sample, mix, boxes, erase, noise)


class EvalLoader:
    """Evaluation batches of process `rank` of `world`: over all processes every image exactly once, in a batch of at
    most `batch_size`, except those that cannot be decoded, which are left out, counted and reported (see
    `TrainLoader`)."""

    def __init__(
        self,
        source: Source,
        size: tuple[int, int],
        crop_ratio: float,
        *,
        rank: int = 0,
        world: int = 1,
        batch_size: int = 64,
        threads: int | None = None,
        device: str | int = "cpu",
        max_bad_fraction: float = 0.001,
        on_bad: OnBad | None = None,
    ) -> None:
        self._source, self._size, self._crop_ratio, self._batch_size = source, size, crop_ratio, batch_size
        self._threads, self._device = threads or _threads(world), device
        self._index = order.shard(len(source), rank, world)
        self.bad = BadImages(source, max_bad_fraction, on_bad)

    def batches(self) -> Generator[Samples, None, None]:
        """Batches of this process, each without its undecodable images (their sizes vary)."""
        with closing(_stream(self._works(), self._executor, self._device, self._arrays)) as stream:
            yield from stream

    def _executor(self) -> Executor:
        return Executor(
            [self._size],
            self._batch_size,
            threads=self._threads,
            device=self._device,
            repair=self._repair,
        )

    def _works(self) -> Generator[Work, None, None]:
        with _parallel_read(self._source, self._threads) as read:
            for start in range(0, len(self._index), self._batch_size):
                index = self._index[start : start + self._batch_size]
                results = read(index)
                sound = [row for row, result in enumerate(results) if not isinstance(result, str)]
                for row, result in enumerate(results):
                    if isinstance(result, str):
                        self.bad.add(int(index[row]), result)
                if sound:
                    yield self._work(index[sound], [results[row] for row in sound])

    def _work(self, index: NDArray[np.int64], results: list[Read]) -> Work:
        source_size = np.array([size for _, size in results])[:, ::-1]
        resize, start = plan.eval_window(source_size[:, 1], source_size[:, 0], self._size, self._crop_ratio)
        whole = np.concatenate((np.zeros_like(source_size), source_size), axis=1).astype(np.int32)
        return Work([data for data, _ in results], (plan.unaugmented(whole, resize, start),), index)

    def _arrays(self, work: Work) -> dict[str, Any]:
        count = len(work.owner)
        ones = np.ones(count, np.float32)
        nowhere = np.zeros((count, 4), np.int32)
        unmixed = plan.Mix(np.arange(count), ones, nowhere, ones)
        return _tensors(self._source, work.owner, unmixed, [nowhere], [None], np.empty((count, 0), np.float32))

    def _repair(self, work: Work, failures: dict[int, str]) -> Work:
        for row, reason in failures.items():
            self.bad.add(int(work.owner[row]), reason)
        sound = [row for row in range(len(work.owner)) if row not in failures]
        return replace(work.take(sound), owner=work.owner[sound])


class _Rows:
    """The samples of one training micro-batch while it is put together: `sample` differs from `original` where a
    substitute stands in, the `attempt`-th."""

    def __init__(
        self, epoch: int, step: int, groups: slice, sample: NDArray[np.int64], copy: NDArray[np.int64]
    ) -> None:
        self.epoch, self.step, self.groups = epoch, step, groups
        self.original, self.sample, self.copy = sample, sample.copy(), copy
        self.attempt = np.zeros(len(sample), dtype=np.int64)
        self.size = np.zeros((len(sample), 2), dtype=np.int64)
        self.encoded: list[Any] = [None] * len(sample)


def _stream(
    works: Generator[Work, None, None],
    executor: Callable[[], Executor],
    device: str | int,
    arrays: Callable[[Work], dict[str, Any]],
) -> Generator[Samples, None, None]:
    """Decode `works` in background threads; batches of which nothing is left are passed over."""
    quieten_pillow()
    reader = Prefetch(works, _AHEAD, "fastdeit-reader")
    decoder = Prefetch(_decode(reader, executor, arrays), _AHEAD, "fastdeit-decoder")
    handover = _Handover(device)
    try:
        for images, tensors in decoder:
            yield Samples(handover(images), **tensors)
    finally:
        reader.close()
        decoder.close()


def _decode(
    works: Iterable[Work], make_executor: Callable[[], Executor], arrays: Callable[[Work], dict[str, Any]]
) -> Generator[tuple[tuple[Any, ...], dict[str, Any]], None, None]:
    with closing(make_executor().run(works)) as batches:
        for work, images in batches:
            if images is not None:
                yield images, arrays(work)


class _Handover:
    """The executor's images to torch, in the consumer's thread and therefore on its current stream.

    On the CPU they are ready. On the GPU the memory could be decoded into again while kernels that read it are still
    queued, so it is copied (microseconds) and held until the copy is done.
    """

    def __init__(self, device: str | int) -> None:
        self._device = device
        self._held: deque[tuple[torch.cuda.Event, Any]] = deque()

    def __call__(self, images: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
        if self._device == "cpu":
            return images
        while self._held and self._held[0][0].query():
            self._held.popleft()
        with torch.cuda.device(self._device):
            copied = tuple(torch.from_dlpack(view.as_tensor()).clone() for view in images)
            event = torch.cuda.Event()
            event.record()
        self._held.append((event, images))
        return copied


@contextmanager
def _parallel_read(source: Source, threads: int) -> Iterator[Callable[[NDArray[np.int64]], list[Read]]]:
    """`_read` by `threads` threads, one task each: tasks cost more than reads from the page cache do."""
    with ThreadPoolExecutor(threads, "fastdeit-read") as pool:
        yield lambda index: list(chain.from_iterable(pool.map(partial(_read, source), np.array_split(index, threads))))


def _read(source: Source, index: NDArray[np.int64]) -> list[Read]:
    """(bytes, (width, height)) of every sample, or the reason why there are none."""
    results: list[Read] = []
    for i in index.tolist():
        try:
            data = source.read(i)
            results.append((data, check(data)))
        except BadImage as error:
            results.append(str(error))
        except OSError as error:
            results.append(f"the file cannot be read: {error.strerror or error}")
    return results


def _tensors(
    source: Source,
    index: NDArray[np.int64],
    mix: plan.Mix,
    boxes: list[NDArray[np.int32]],
    erase: list[tuple[NDArray[np.int32], NDArray[np.int64]] | None],
    noise: NDArray[np.float32],
) -> dict[str, Any]:
    """The fields of `Samples` besides the images."""
    labels = np.array([source.label(i) for i in index.tolist()], dtype=np.int64)
    arrays = {
        "y1": labels,
        "y2": labels[mix.partner],
        "lam": mix.lam,
        "partner": mix.partner,
        "pixel_lam": mix.pixel_lam,
        "box": np.stack(boxes),
        "noise": noise,
        "index": index,
    }
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    erased = tuple(None if view is None else tuple(map(torch.from_numpy, view)) for view in erase)
    return tensors | {"erase": erased}


def _threads(world: int) -> int:
    return max(1, len(os.sched_getaffinity(0)) // world)


def _warn(path: str, reason: str) -> None:
    warnings.warn(f"{path} is not used: {reason}", stacklevel=2)
