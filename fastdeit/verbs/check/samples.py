"""Every sample of a split, read and decoded once as training decodes it: facts in arrays, a row each."""

import io
import multiprocessing
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastdeit import cores
from fastdeit.data.examine import picture
from fastdeit.data.execute.route import file_of
from fastdeit.data.sources.source import BadImage, DataError, NamedSource, quieten_pillow

_CHUNK = 256
_SHOWN = 12
"""Pictures of each kind of oddity that are kept, the first ones."""
_SIDE = 96
_FACTS = np.dtype([("width", np.int32), ("height", np.int32), ("size", np.int64), ("digest", "S16")])


@dataclass(frozen=True)
class Odd:
    """A sample with something odd about it: its number, what that is, how it is read, and for the first ones of a kind
    a JPEG of what training sees, at most 96 pixels a side."""

    index: int
    kinds: tuple[str, ...]
    decoder: str
    jpeg: bytes = b""


@dataclass
class Samples:
    """What was found of the samples of a split. facts: a row each, of which the width is 0 where it cannot be used;
    bad: (number, reason); formats: samples of each format and colour mode; decoders: samples that each decoder reads,
    "DALI" or "Pillow: KIND OF FILE"."""

    facts: NDArray[np.void]
    bad: list[tuple[int, str]] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    decoders: Counter[str] = field(default_factory=Counter)
    odd: list[Odd] = field(default_factory=list)

    @property
    def usable(self) -> NDArray[np.void]:
        """The rows of those that can be used."""
        return self.facts[self.facts["width"] > 0]


def looked_at(
    source: NamedSource, processes: int | None = None, progress: Callable[[int, int], None] | None = None
) -> Samples:
    """Look at every sample of `source` in `processes` processes (default: as many as cores); few in this one.

    progress(done, total) is called a few times a second. DataError where a process was killed, as an image that needs
    more memory than there is does, and without DALI; MachineError where no file is at fault.
    """
    total = len(source)
    chunks = [range(start, min(start + _CHUNK, total)) for start in range(0, total, _CHUNK)]
    found, kept = Samples(np.zeros(total, _FACTS)), Counter[str]()
    for chunk, part in zip(chunks, _parts(source, chunks, processes), strict=True):
        found.facts[chunk.start : chunk.stop] = part.facts
        found.bad += part.bad
        found.formats.update(part.formats)
        found.decoders.update(part.decoders)
        for one in part.odd:
            shown = one.jpeg and any(kept[kind] < _SHOWN for kind in one.kinds)
            kept.update(one.kinds if shown else ())
            found.odd.append(one if shown else Odd(one.index, one.kinds, one.decoder))
        if progress:
            progress(chunk.stop, total)
    return found


def _parts(source: NamedSource, chunks: list[range], processes: int | None) -> Iterator[Samples]:
    """What is found in each of `chunks`; a few chunks per process are under way at a time."""
    if len(chunks) < 2:
        quieten_pillow()
        yield from (_look_at(source, chunk) for chunk in chunks)
        return
    processes = processes or cores.available()
    # Not by fork: the caller may have threads, and a forked child inherits the locks they hold.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, _start, (source,)) as pool:
        waiting = iter(chunks)
        running = [pool.submit(_look, chunk) for chunk in islice(waiting, 3 * processes)]
        try:
            while running:
                yield running.pop(0).result()
                running += [pool.submit(_look, chunk) for chunk in islice(waiting, 1)]
        except BrokenProcessPool as error:
            raise DataError(
                "a process was killed while it decoded images, probably for lack of memory; use fewer processes"
            ) from error


_source: NamedSource


def _start(source: NamedSource) -> None:
    global _source
    _source = source
    quieten_pillow()


def _look(chunk: range) -> Samples:
    return _look_at(_source, chunk)


def _look_at(source: NamedSource, chunk: range) -> Samples:
    found, kept = Samples(np.zeros(len(chunk), _FACTS)), Counter[str]()
    for row, index in zip(found.facts, chunk, strict=True):
        file = file_of(source, index)
        if isinstance(file, str):
            found.bad.append((index, file))
            continue
        encoded = file.data
        try:
            seen = picture(encoded, source.name(index))
        except BadImage as error:
            found.bad.append((index, str(error)))
            continue
        row["digest"], row["size"] = blake2b(encoded, digest_size=16).digest(), len(encoded)
        row["height"], row["width"] = seen.rgb.shape[:2]
        found.formats[seen.format] += 1
        decoder = f"Pillow: {seen.why}" if seen.why else "DALI"
        found.decoders[decoder] += 1
        if seen.odd:
            kinds = tuple(odd.kind for odd in seen.odd)
            shown = any(kept[kind] < _SHOWN for kind in kinds)
            kept.update(kinds)
            found.odd.append(Odd(index, kinds, decoder, _small(seen.rgb) if shown else b""))
    return found


def _small(rgb: NDArray[np.uint8]) -> bytes:
    out, image = io.BytesIO(), Image.fromarray(rgb)
    image.thumbnail((_SIDE, _SIDE))
    image.save(out, "JPEG", quality=85)
    return out.getvalue()
