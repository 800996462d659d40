"""What is in a data set, and what is wrong with it: every sample is read, checked and decoded once.

Training needs none of this: it replaces what it cannot decode. `check` finds all of that beforehand, together with
images that occur twice (equal bytes), which make a held-out score too good when they are in both splits.
"""

import io
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastdeit import cores
from fastdeit.data.sources.source import BadImage, DataError, NamedSource, quieten_pillow
from fastdeit.text import one_line

_CHUNK = 256
_LISTED = 20
_FACTS = np.dtype([("side", np.int32), ("size", np.int64), ("digest", "S16")])

Decode = Callable[[NDArray[np.uint8]], NDArray[np.uint8]]
_Result = tuple[NDArray[np.void], list[str], list[tuple[str, str]]]


@dataclass
class Report:
    """What `check` found.

    samples: their number; bad: (path, reason) of those that cannot be used, and of what the source left out;
    duplicates: groups of paths with equal bytes; formats: samples of each format and colour mode; side, size, per_class
    as (smallest, median, largest): shorter side in pixels and encoded size in bytes of the usable samples, number of
    samples of a class; classes: the first and the last of them, which tell classes counted from 0 and from 1 apart;
    empty: classes without a sample.
    """

    samples: int
    bad: list[tuple[str, str]]
    duplicates: list[list[str]]
    formats: dict[str, int]
    side: tuple[int, int, int]
    size: tuple[int, int, int]
    per_class: tuple[int, int, int]
    classes: tuple[str, str]
    empty: list[str]

    @property
    def ok(self) -> bool:
        """Whether every sample can be used. Duplicates and empty classes are no faults of the files."""
        return not self.bad

    def __str__(self) -> str:
        formats = ", ".join(f"{count} {name}" for name, count in self.formats.items())
        lines = [
            f"{self.samples} samples: {formats or 'none usable'}",
            "shorter side {0} to {2} pixels, median {1}".format(*self.side),
            "encoded size {0} to {2} bytes, median {1}".format(*self.size),
            "samples of a class {0} to {2}, median {1}; classes {3!r} to {4!r}".format(*self.per_class, *self.classes),
        ]
        lines += _listed("classes without a sample", self.empty)
        lines += _listed("images occur more than once", [" = ".join(group) for group in self.duplicates])
        lines += _listed("cannot be used", [f"{path}: {reason}" for path, reason in self.bad], None)
        return "\n".join(lines)


def check(
    source: NamedSource,
    decode: Decode,
    processes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Read and decode every sample of `source` in `processes` processes (default: as many as cores).

    decode: bytes of a file, uint8 `[n]`, to pixels `[height, width, 3]`, or BadImage; a function of a module.
    progress(done, total) is called a few times a second. Files that fail are in the report; DataError only where a
    process was killed, as an image that needs more memory than there is does.
    """
    total = len(source)
    chunks = [range(start, min(start + _CHUNK, total)) for start in range(0, total, _CHUNK)]
    facts = np.zeros(total, _FACTS)
    bad, formats = list(source.skipped), Counter()
    for chunk, (rows, names, failures) in zip(chunks, _results(source, decode, chunks, processes), strict=True):
        facts[chunk.start : chunk.stop] = rows
        formats.update(names)
        bad += failures
        if progress:
            progress(chunk.stop, total)
    usable = facts[facts["side"] > 0]
    labels = np.fromiter(map(source.label, range(total)), np.int64, total)
    per_class = np.bincount(labels, minlength=len(source.classes))
    return Report(
        samples=total,
        bad=bad,
        duplicates=[[source.path(i) for i in group] for group in _equal(facts)],
        formats=dict(formats.most_common()),
        side=_summary(usable["side"]),
        size=_summary(usable["size"]),
        per_class=_summary(per_class),
        classes=(source.classes[0], source.classes[-1]),
        empty=[name for name, count in zip(source.classes, per_class, strict=True) if not count],
    )


def _results(source: NamedSource, decode: Decode, chunks: list[range], processes: int | None) -> Iterator[_Result]:
    """Results in the order of `chunks`; a few chunks per process are under way at a time."""
    processes = processes or cores.available()
    # Not by fork: the caller may have threads, and a forked child inherits the locks they hold.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _start, (source, decode)) as pool:
        waiting = iter(chunks)
        running = [pool.submit(_examine, chunk) for chunk in islice(waiting, 3 * processes)]
        try:
            while running:
                yield running.pop(0).result()
                running += [pool.submit(_examine, chunk) for chunk in islice(waiting, 1)]
        except BrokenProcessPool as error:
            raise DataError(
                "a process was killed while it decoded images, probably for lack of memory; use fewer processes"
            ) from error


_source: NamedSource
_decode: Decode


def _start(source: NamedSource, decode: Decode) -> None:
    global _source, _decode
    _source, _decode = source, decode
    quieten_pillow()


def _examine(chunk: range) -> _Result:
    rows, formats, failures = np.zeros(len(chunk), _FACTS), [], []
    for row, index in zip(rows, chunk, strict=True):
        try:
            data = _source.read(index)
            row["digest"] = blake2b(data, digest_size=16).digest()
            height, width, _ = _decode(data).shape
        except BadImage as error:
            failures.append((_source.path(index), str(error)))
        except OSError as error:
            failures.append((_source.path(index), f"the file cannot be read: {error.strerror or error}"))
        else:
            row["side"], row["size"] = min(width, height), len(data)
            with Image.open(io.BytesIO(memoryview(data))) as image:
                formats.append(f"{image.format} {image.mode}")
    return rows, formats, failures


def _equal(facts: NDArray[np.void]) -> list[NDArray[np.int64]]:
    """Groups of indices of usable samples with equal digests, in order of their first member."""
    usable = np.flatnonzero(facts["side"] > 0)
    _, group, counts = np.unique(facts["digest"][usable], return_inverse=True, return_counts=True)
    order = np.argsort(group, kind="stable")
    groups = np.split(usable[order], np.cumsum(counts)[:-1])
    return sorted((members for members in groups if len(members) > 1), key=lambda members: members[0])


def _summary(values: NDArray[np.generic]) -> tuple[int, int, int]:
    if not len(values):
        return 0, 0, 0
    return int(values.min()), int(np.median(values)), int(values.max())


def _listed(what: str, entries: list[str], limit: int | None = _LISTED) -> list[str]:
    if not entries:
        return []
    shown = [f"  {one_line(entry)}" for entry in entries[:limit]]
    more = [f"  and {len(entries) - len(shown)} more"] if len(shown) < len(entries) else []
    return [f"{len(entries)} {what}:", *shown, *more]
