"""Loaders: a stream of ready batches, the same for any number of processes, threads, micro-batches or restarts.

Three threads in a row, each at most two batches ahead: one reads files and makes the plan, one keeps DALI busy, and
the consumer takes finished batches. A file that cannot be decoded never stops them: training takes a substitute,
evaluation goes without it, and both report it, until there are so many that the data set itself must be wrong.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from fastdeit import cores
from fastdeit.batch import Batch, Labels, Step
from fastdeit.data.bad import BadImages, BadList, OnBad
from fastdeit.data.execute.dali import Decoder, Executor, Work
from fastdeit.data.execute.prefetch import Prefetch
from fastdeit.data.execute.route import Encoded, file_of
from fastdeit.data.plan import order, plan
from fastdeit.data.plan.geometry import geometry
from fastdeit.data.sources.source import DataError, Source, annotations_of, quieten_pillow

Read = Callable[[NDArray[np.int64]], list[Encoded | str]]
_AHEAD = 2
_ALIKE = "give it the same shape and dtype for every sample, padded to the longest"
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Store(Protocol):
    """Something that was computed for every training sample before, such as a teacher's logits."""

    def read(self, epoch: int, index: NDArray[np.int64], copy: NDArray[np.int64], place: NDArray[np.int64]) -> NDArray:
        """Values `[B, ...]` of the samples with number `index` `[B]` in their appearance `copy` `[B]` in `epoch`.

        place  `[B]`: where each stands in the epoch, step * batch_size + its place in the global batch. It tells what
               the sample is mixed with, and it is unique where a substitute stands in for a sample

        A thread of the loader calls this, so that it may wait for a disk. Raises KeyError for what it does not hold;
        that and an OSError end the run as a DataError that names the store.
        """
        ...


class TrainLoader:
    """Training batches of process `rank` of `world`, by global step: step s is batch s % steps_per_epoch of epoch
    s // steps_per_epoch.

    views: augmentation of each view, further ones with a `stream` of their own. later: what takes the place of `views`,
    such as larger ones, by the epoch from which it holds. Mixing is drawn once for all views of a sample, in the first,
    and the cut box scaled to the size of each. batch_size is that of all processes and micro-batches together. threads:
    DALI's CPU threads (default: the machine's cores divided by world). device: "cpu" or a GPU's index. noise: columns
    of uniforms by name, stores: what comes with every sample, by name; both are what a method asks for. mean, std: the
    student's normalisation. total_steps: of the whole run (default: an epoch's), which `Step.progress` is a share of.
    on_bad(path, reason) is called once for each file that cannot be used (default: a warning); DataError once they are
    more than `max_bad_fraction` allows (`bad.allowed`), and MachineError where no file is at fault (`sources.faults`).
    bad_list: that of all who read the same samples.
    """

    def __init__(
        self,
        source: Source,
        views: Sequence[plan.Augment],
        mixing: plan.Mixing,
        *,
        later: Mapping[int, Sequence[plan.Augment]] | None = None,
        seed: int,
        batch_size: int,
        accumulate: int = 1,
        repeats: int = 1,
        rank: int = 0,
        world: int = 1,
        threads: int | None = None,
        device: str | int = "cpu",
        noise: Mapping[str, int] | None = None,
        stores: Mapping[str, Store] | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        total_steps: int | None = None,
        max_bad_fraction: float = 0.001,
        on_bad: OnBad | None = None,
        bad_list: BadList | None = None,
    ) -> None:
        self._groups = order.groups_per_batch(batch_size, mixing.group_size, accumulate, world)
        self._source, self._mixing, self._seed = source, mixing, seed
        self._views = sorted({0: tuple(views), **(later or {})}.items())
        self._batch_size, self._accumulate, self._repeats = batch_size, accumulate, repeats
        self._rank, self._world = rank, world
        self._threads, self._device = threads or _threads(world), device
        self._noise, self._stores = noise or {}, stores or {}
        self._mean, self._std = tuple(mean), tuple(std)
        self.steps_per_epoch = order.steps_per_epoch(len(source), batch_size)
        self._total_steps = total_steps or self.steps_per_epoch
        self.bad = BadImages(source, max_bad_fraction, on_bad, bad_list)

    def batches(self, start_step: int, stop_step: int) -> Generator[list[Batch], None, None]:
        """One list of `accumulate` micro-batches for each step, on the host but for the images, which are on the
        loader's device. Threads live until the generator is exhausted or closed, and starting them costs a pipeline:
        iterate a whole run by one call. They start anew where `later` views take the place of the others."""
        for first, end, views in self._parts(start_step, stop_step):
            works, executor = self._works(first, end, views), partial(self._executor, views)
            with closing(_stream(works, executor, self._device, self._fields)) as stream:
                for _ in range(first, end):
                    yield [next(stream) for _ in range(self._accumulate)]

    def _parts(self, start_step: int, stop_step: int) -> Iterator[tuple[int, int, Sequence[plan.Augment]]]:
        """(first step, step after the last, views) of the parts of a run that have the same views."""
        begins = [epoch * self.steps_per_epoch for epoch, _ in self._views]
        for (_, views), begin, end in zip(self._views, begins, [*begins[1:], stop_step], strict=True):
            first, end = max(begin, start_step), min(end, stop_step)
            if first < end:
                yield first, end, views

    def works(self, start_step: int, stop_step: int) -> Generator[Work, None, None]:
        """What is executed of each micro-batch: the files, read, and their plans."""
        for part in self._parts(start_step, stop_step):
            yield from self._works(*part)

    def decoded(self, works: Iterable[Work]) -> Generator[list[NDArray[np.uint8]], None, None]:
        """Of each of `works` the decoded boxes, uint8 `[h, w, 3]`, and nothing made of them: what the decoder alone
        does, on a CPU, for works of the first views. They are valid until the next are asked for."""
        _, views = self._views[0]
        return _decoded(self._executor(views, Decoder), works)

    def _executor(self, views: Sequence[plan.Augment], kind: type[Executor] = Executor) -> Executor:
        return kind(
            [view.size for view in views],
            self._batch_size // (self._accumulate * self._world),
            threads=self._threads,
            device=self._device,
            repair=self._repair,
        )

    def _works(self, start_step: int, stop_step: int, views: Sequence[plan.Augment]) -> Generator[Work, None, None]:
        epoch = None
        with _parallel_read(self._source, self._threads) as read:
            for step in range(start_step, stop_step):
                if step // self.steps_per_epoch != epoch:
                    epoch = step // self.steps_per_epoch
                    stream = order.epoch(self._seed, epoch, len(self._source), self._batch_size, self._repeats)
                groups = order.groups(stream, step % self.steps_per_epoch, self._batch_size, self._mixing.group_size)
                for micro in range(self._accumulate):
                    part = order.slice_of(self._groups, micro, self._accumulate, self._rank, self._world)
                    samples = groups.sample[part].reshape(-1), groups.copy[part].reshape(-1)
                    rows = _Rows(views, epoch, step, part, *samples)
                    self._fill(rows, range(len(rows.sample)), read)
                    yield self._work(rows)

    def _fill(self, rows: "_Rows", wanted: Sequence[int], read: Read) -> None:
        """Read the samples of rows `wanted`, and substitutes for those that cannot be used."""
        while wanted:
            failed = []
            for row, result in zip(wanted, read(rows.sample[list(wanted)]), strict=True):
                if isinstance(result, str):
                    self._substitute(rows, row, result)
                    failed.append(row)
                else:
                    rows.encoded[row] = result
                    rows.size[row] = result.route.width, result.route.height
            wanted = failed

    def _substitute(self, rows: "_Rows", row: int, reason: str) -> None:
        self.bad.add(int(rows.sample[row]), reason)
        original, attempt = int(rows.original[row]), int(rows.attempt[row])
        rows.sample[row] = order.substitute(self._seed, rows.epoch, original, attempt, len(self._source))
        rows.attempt[row] += 1

    def _work(self, rows: "_Rows") -> Work:
        of = (self._seed, rows.epoch, rows.sample, rows.copy, *rows.size.T)
        return Work(list(rows.encoded), tuple(plan.samples(view, *of) for view in rows.views), rows)

    def _repair(self, work: Work, failures: dict[int, str]) -> Work:
        for row, reason in failures.items():
            self._substitute(work.owner, row, reason)
        self._fill(work.owner, list(failures), partial(_read, self._source))
        return self._work(work.owner)

    def _fields(self, work: Work) -> dict[str, Any]:
        """What a batch holds besides its images."""
        rows: _Rows = work.owner
        first = rows.views[0].size
        mix = plan.mix(self._mixing, first, self._seed, rows.step, rows.groups)
        boxes = [plan.scale_boxes(mix.box, first, view.size) for view in rows.views]
        labels = _labels(self._source, rows.sample)
        positions = np.arange(len(rows.sample)) + rows.groups.start * self._mixing.group_size
        place = rows.step % self.steps_per_epoch * self._batch_size + positions
        return {
            "targets": Labels(labels, labels[mix.partner], torch.from_numpy(mix.lam)),
            "partner": torch.from_numpy(mix.partner),
            "pixel_lam": torch.from_numpy(mix.pixel_lam),
            "box": torch.from_numpy(np.stack(boxes)),
            "index": torch.from_numpy(rows.sample),
            "copy": torch.from_numpy(rows.copy),
            "step": Step.at(rows.step, self.steps_per_epoch, self._total_steps),
            "mean": self._mean,
            "std": self._std,
            "noise": _noise(self._noise, self._seed, rows.step, positions),
            # Empty boxes would still cost the noise of every pixel on a GPU.
            "erase": tuple(
                (torch.from_numpy(planned.erase_box), torch.from_numpy(planned.erase_key)) if view.erase else None
                for view, planned in zip(rows.views, work.views, strict=True)
            ),
        } | _known(
            self._source,
            rows.sample,
            zip(work.views, (view.size for view in rows.views), strict=True),
            {name: _read_store(name, store, rows, place) for name, store in self._stores.items()},
            mixed=self._mixing.mixes,
        )


class EvalLoader:
    """Evaluation batches of process `rank` of `world`: over all processes every image exactly once, in a batch of at
    most `batch_size`, except those that cannot be decoded, which are left out, counted and reported (see
    `TrainLoader`). The one view is not augmented, nothing is mixed or erased, and `noise` of a sample is a function of
    its number alone."""

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
        noise: Mapping[str, int] | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        max_bad_fraction: float = 0.001,
        on_bad: OnBad | None = None,
        bad_list: BadList | None = None,
    ) -> None:
        self._source, self._size, self._crop_ratio, self._batch_size = source, size, crop_ratio, batch_size
        self._noise, self._mean, self._std = noise or {}, tuple(mean), tuple(std)
        self._threads, self._device = threads or _threads(world), device
        self._index = order.shard(len(source), rank, world)
        self.share = len(self._index)
        self.bad = BadImages(source, max_bad_fraction, on_bad, bad_list)

    def batches(self) -> Generator[Batch, None, None]:
        """Batches of this process, each without its undecodable images (their sizes vary)."""
        with closing(_stream(self.works(), self._executor, self._device, self._fields)) as stream:
            yield from stream

    def decoded(self, works: Iterable[Work]) -> Generator[list[NDArray[np.uint8]], None, None]:
        """As `TrainLoader.decoded`."""
        return _decoded(self._executor(Decoder), works)

    def _executor(self, kind: type[Executor] = Executor) -> Executor:
        return kind(
            [self._size],
            self._batch_size,
            threads=self._threads,
            device=self._device,
            repair=self._repair,
        )

    def works(self) -> Generator[Work, None, None]:
        """What is executed of each batch: the files, read, and their plans."""
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

    def _work(self, index: NDArray[np.int64], encoded: list[Encoded]) -> Work:
        source_size = np.array([(one.route.height, one.route.width) for one in encoded])
        resize, start = plan.eval_window(source_size[:, 1], source_size[:, 0], self._size, self._crop_ratio)
        whole = np.concatenate((np.zeros_like(source_size), source_size), axis=1).astype(np.int32)
        return Work(encoded, (plan.unaugmented(whole, resize, start),), index)

    def _fields(self, work: Work) -> dict[str, Any]:
        """What a batch holds besides its images."""
        index: NDArray[np.int64] = work.owner
        labels, ones = _labels(self._source, index), torch.ones(len(index))
        return {
            "targets": Labels(labels, labels, ones),
            "partner": torch.arange(len(index)),
            "pixel_lam": ones,
            "box": torch.zeros(1, len(index), 4, dtype=torch.int32),
            "index": torch.from_numpy(index),
            "copy": torch.zeros(len(index), dtype=torch.int64),
            "step": Step.at(0, 1, 1),
            "mean": self._mean,
            "std": self._std,
            "noise": _noise(self._noise, 0, 0, index),
            "erase": (None,),
        } | _known(self._source, index, [(*work.views, self._size)], {}, mixed=False)

    def _repair(self, work: Work, failures: dict[int, str]) -> Work:
        for row, reason in failures.items():
            self.bad.add(int(work.owner[row]), reason)
        sound = [row for row in range(len(work.owner)) if row not in failures]
        return replace(work.take(sound), owner=work.owner[sound])


def _decoded(executor: Executor, works: Iterable[Work]) -> Generator[list[NDArray[np.uint8]], None, None]:
    with closing(executor.run(works)) as batches:
        for _, images in batches:
            if images is not None:
                yield images[0]


class _Rows:
    """The samples of one training micro-batch while it is put together: `sample` differs from `original` where a
    substitute stands in, the `attempt`-th."""

    def __init__(
        self,
        views: Sequence[plan.Augment],
        epoch: int,
        step: int,
        groups: slice,
        sample: NDArray[np.int64],
        copy: NDArray[np.int64],
    ) -> None:
        self.views, self.epoch, self.step, self.groups = views, epoch, step, groups
        self.original, self.sample, self.copy = sample, sample.copy(), copy
        self.attempt = np.zeros(len(sample), dtype=np.int64)
        self.size = np.zeros((len(sample), 2), dtype=np.int64)
        self.encoded: list[Any] = [None] * len(sample)


def _read_store(name: str, store: Store, rows: _Rows, place: NDArray[np.int64]) -> torch.Tensor:
    try:
        values = torch.as_tensor(store.read(rows.epoch, rows.sample, rows.copy, place))
    except (KeyError, OSError) as error:
        reason = error.args[0] if isinstance(error, KeyError) and error.args else error
        raise DataError(
            f"store {name!r} cannot give what step {rows.step} of epoch {rows.epoch} needs: {reason}; it must hold "
            "every sample, copy and epoch of the run, computed with the recipe's seed, augmentation and batch size"
        ) from error
    if values.shape[:1] != rows.sample.shape:
        raise DataError(
            f"store {name!r} returned a tensor of shape {list(values.shape)} for {len(rows.sample)} samples; its first "
            "dimension must be that of the samples"
        )
    return values


def _known(
    source: Source,
    index: NDArray[np.int64],
    views: Iterable[tuple[plan.Plan, tuple[int, int]]],
    stored: dict[str, torch.Tensor],
    *,
    mixed: bool,
) -> dict[str, Any]:
    """The fields `extras` and `geometry` of a batch: of samples with annotations in views of these plans and sizes.

    What the source knows of its first sample says what it knows of all: names, shapes and dtypes.
    """
    pattern = annotations_of(source, 0) if len(index) else None
    if pattern is None:
        if len(index) and annotations_of(source, int(index[0])) is not None:
            raise DataError(f"{source.path(int(index[0]))}: annotations are there, and missing for {source.path(0)}")
        return {"extras": stored}
    known = [(source.path(i), annotations_of(source, i) or {}) for i in index.tolist()]
    if twice := pattern.keys() & stored.keys():
        raise DataError(f"{min(twice)!r} is the name of a store of the method and of an annotation of the source")
    for path, each in known:
        if more := each.keys() - pattern.keys():
            raise DataError(f"{path}: annotation {min(more)!r} is there, and missing for {source.path(0)}; {_ALIKE}")
    extras = {name: _annotation(source.path(0), name, np.asarray(value), known) for name, value in pattern.items()}
    if mixed:  # a view shows two pictures, which lie in it differently
        return {"extras": stored | extras}
    placed = np.stack([geometry(planned, size) for planned, size in views])
    return {"extras": stored | extras, "geometry": torch.from_numpy(placed)}


def _annotation(
    first: str, name: str, pattern: NDArray[Any], known: Sequence[tuple[str, Mapping[str, ArrayLike]]]
) -> torch.Tensor:
    """An annotation `[B, ...]` of the samples `known`, each of the shape and dtype of `pattern`, that of `first`."""
    if pattern.dtype.kind not in "biuf":
        raise DataError(f"{first}: annotation {name!r} has dtype {pattern.dtype}, not one of numbers")
    arrays = [np.asarray(each[name]) if name in each else None for _, each in known]
    for array, (path, _) in zip(arrays, known, strict=True):
        if array is None or (array.shape, array.dtype) != (pattern.shape, pattern.dtype):
            found = "missing" if array is None else f"{array.dtype} {list(array.shape)}"
            wanted = f"{pattern.dtype} {list(pattern.shape)}"
            raise DataError(f"{path}: annotation {name!r} is {found}, and {wanted} for {first}; {_ALIKE}")
    return torch.from_numpy(np.stack(arrays))


def _stream(
    works: Generator[Work, None, None],
    executor: Callable[[], Executor],
    device: str | int,
    fields: Callable[[Work], dict[str, Any]],
) -> Generator[Batch, None, None]:
    """Decode `works` in background threads; batches of which nothing is left are passed over."""
    quieten_pillow()
    reader = Prefetch(works, _AHEAD, "fastdeit-reader")
    decoder = Prefetch(_decode(reader, executor, fields), _AHEAD, "fastdeit-decoder")
    handover = _Handover(device)
    try:
        for images, others in decoder:
            yield Batch(handover(images), **others)
    finally:
        reader.close()
        decoder.close()


def _decode(
    works: Iterable[Work], make_executor: Callable[[], Executor], fields: Callable[[Work], dict[str, Any]]
) -> Generator[tuple[tuple[Any, ...], dict[str, Any]], None, None]:
    with closing(make_executor().run(works)) as batches:
        for work, images in batches:
            if images is not None:
                yield images, fields(work)


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
def _parallel_read(source: Source, threads: int) -> Iterator[Read]:
    """`_read` by `threads` threads, one task each: tasks cost more than reads from the page cache do."""
    with ThreadPoolExecutor(threads, "fastdeit-read") as pool:
        yield lambda index: list(chain.from_iterable(pool.map(partial(_read, source), np.array_split(index, threads))))


def _read(source: Source, index: NDArray[np.int64]) -> list[Encoded | str]:
    """The file of every sample, or the reason why it cannot be used."""
    return [file_of(source, i) for i in index.tolist()]


def _labels(source: Source, index: NDArray[np.int64]) -> torch.Tensor:
    return torch.tensor([source.label(i) for i in index.tolist()], dtype=torch.int64)


def _noise(columns: Mapping[str, int], seed: int, step: int, positions: NDArray[np.int64]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(plan.noise(seed, step, positions, count, name)) for name, count in columns.items()}


def _threads(world: int) -> int:
    return max(1, cores.available() // world)
