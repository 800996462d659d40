"""Logits that a teacher gave before, on disk: one record for each image of each epoch, found by arithmetic.

    DIR/cache.json                  what the records are of: `Layout`, fingerprint, origin; written first
    DIR/epoch_00012/0003.logits     a shard: the records of up to 32 consecutive steps, a block for each step, and then
                                    the checksum of each block, uint32

A record stands where its image stands in the epoch's stream: step * batch_size + place in the global batch. That place
is a function of the recipe (`data/plan/order.py`), whatever the number of processes and micro-batches, and unlike
(sample, copy) it is unique where a substitute stands in for a picture that cannot be decoded. Mixing is a function of
the step, so the place also tells what the image was mixed with.

    exact   uint32 sample, float32 logits [K]                       as the teacher gave them, bit for bit
    top k   uint32 sample, float16 rest, float16 value [k], uint16 (uint32 above 65,536 classes) index [k]

With p = softmax(logits / tau), `value` is log p of the k likeliest classes, the likeliest first, and `rest` the log of
what all others have together, which is spread evenly over them (Wu et al., "TinyViT", ECCV 2022, section 3.2).

A shard is written aside and renamed, so a file that has its name is whole. The checksum of a block begins with the
fingerprint, epoch and step, so that a block is not taken for another.
"""

import json
import os
import uuid
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdeit import jsons
from fastdeit.data.sources.index import sync
from fastdeit.data.sources.source import DataError

FORMAT = 1
MANIFEST = "cache.json"
_SHARD_STEPS, _SHARD_BYTES = 32, 16 << 20
"""A shard is what is lost when a writer is killed, and what is in memory while it is made."""
_LEAST = float(np.finfo(np.float16).min)
_REPAIR = "the same `fastdeit cache` command makes it anew"


@dataclass(frozen=True)
class Layout:
    """Which record lies where.

    classes          K, those of the data set
    top_k            how many of them a record has; `classes`: the logits themselves
    tau              temperature of the softmax that a record with fewer has; 1 where the logits are stored
    batch_size       images of a step
    steps_per_epoch  steps of an epoch
    """

    classes: int
    top_k: int
    tau: float
    batch_size: int
    steps_per_epoch: int

    @property
    def exact(self) -> bool:
        """Whether a record holds the logits of all classes in float32."""
        return self.top_k == self.classes

    @cached_property
    def record(self) -> np.dtype:
        """The dtype of a record, without padding."""
        if self.exact:
            return np.dtype([("sample", "<u4"), ("logits", "<f4", (self.classes,))])
        index = "<u2" if self.classes <= 1 << 16 else "<u4"
        k = (self.top_k,)
        return np.dtype([("sample", "<u4"), ("rest", "<f2"), ("value", "<f2", k), ("index", index, k)])

    @property
    def block_bytes(self) -> int:
        """Bytes of the records of a step."""
        return self.batch_size * self.record.itemsize

    @property
    def shard_steps(self) -> int:
        """Steps of a shard; the last one of an epoch may have fewer."""
        return max(1, min(_SHARD_STEPS, self.steps_per_epoch, _SHARD_BYTES // self.block_bytes))

    def shards(self, epochs: range) -> list["Shard"]:
        """The shards of these epochs, in order."""
        starts = range(0, self.steps_per_epoch, self.shard_steps)
        return [Shard(self, epoch, number) for epoch in epochs for number in range(len(starts))]

    def shard_of(self, epoch: int, step: int) -> "Shard":
        """The shard that holds `step` of `epoch`, counted from the epoch's beginning."""
        return Shard(self, epoch, step // self.shard_steps)

    def encode(self, sample: NDArray[np.int64], logits: Tensor) -> NDArray:
        """Records `[B]` of the samples with these numbers and these logits, floating `[B, K]` on any device.

        Raises ValueError where a logit is not finite.
        """
        finite = logits.isfinite().all(1).cpu().numpy()
        if not finite.all():
            raise ValueError(f"the teacher's answer to sample {sample[~finite][0]} is not finite")
        made = np.empty(len(sample), self.record)
        made["sample"] = sample
        if self.exact:
            made["logits"] = logits.float().cpu().numpy()
            return made
        # A stable order: of equal logits the first class comes first, as `argmax` has it.
        best = logits.sort(dim=1, descending=True, stable=True).indices[:, : self.top_k]
        sure = (logits.double() / self.tau).log_softmax(1)
        made["index"] = best.cpu().numpy()
        made["value"] = sure.gather(1, best).clamp(min=_LEAST).cpu().numpy()
        made["rest"] = sure.scatter(1, best, -torch.inf).logsumexp(1).clamp(min=_LEAST).cpu().numpy()
        return made

    def decode(self, records: NDArray) -> NDArray[np.float32]:
        """Logits `[B, K]` of such records; for temperature `tau`, where they are not exact. The first of the largest is
        the teacher's, whatever was rounded."""
        if self.exact:
            return np.ascontiguousarray(records["logits"])
        tau = np.float32(self.tau)
        value = records["value"].astype(np.float32) * tau
        others = (records["rest"].astype(np.float32) - np.float32(log(self.classes - self.top_k))) * tau
        below = np.nextafter(value[:, 0], np.float32(-np.inf))
        logits = np.repeat(np.minimum(others, below)[:, None], self.classes, 1)
        value[:, 1:] = np.minimum(value[:, 1:], below[:, None])
        np.put_along_axis(logits, records["index"].astype(np.int64), value, 1)
        return logits


@dataclass(frozen=True)
class Shard:
    """One file of a cache: shard `number` of `epoch`."""

    layout: Layout
    epoch: int
    number: int

    @property
    def steps(self) -> range:
        """Its steps, counted from the epoch's beginning."""
        start = self.number * self.layout.shard_steps
        return range(start, min(start + self.layout.shard_steps, self.layout.steps_per_epoch))

    @property
    def following(self) -> "Shard":
        """The shard of the steps after these."""
        if self.steps.stop < self.layout.steps_per_epoch:
            return Shard(self.layout, self.epoch, self.number + 1)
        return Shard(self.layout, self.epoch + 1, 0)

    @property
    def bytes(self) -> int:
        """Size of the file."""
        return len(self.steps) * (self.layout.block_bytes + 4)

    @property
    def path(self) -> Path:
        """Of the file, in the folder of the cache."""
        return Path(f"epoch_{self.epoch:05d}") / f"{self.number:04d}.logits"


@dataclass(frozen=True)
class Cache:
    """A cache of logits.

    fingerprint  what the records depend on, by name: fields of the recipe, the data, the teacher
    origin       by what it was made, for people to read
    """

    folder: Path
    layout: Layout
    fingerprint: Mapping[str, Any]
    origin: Mapping[str, Any]

    @classmethod
    def open(cls, folder: Path) -> "Cache":
        """The cache in `folder`. Raises DataError where there is none, or none that this version can read."""
        path = folder / MANIFEST
        try:
            found = jsons.read(path)
            if found["format"] != FORMAT:
                raise DataError(f"{path} has format {found['format']}, and this version of fastdeit reads {FORMAT}")
            layout = Layout(**{field.name: found["layout"][field.name] for field in fields(Layout)})
            return cls(folder, layout, found["fingerprint"], found["origin"])
        except OSError as error:
            why = f"{error.strerror or error}; `fastdeit cache --teacher ADDRESS RECIPE --out {folder}` makes one"
            raise DataError(f"{folder} holds no cache of logits: {path}: {why}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path} is damaged: {error!r}") from error

    def create(self) -> None:
        """Write the manifest."""
        self.folder.mkdir(parents=True, exist_ok=True)
        text = {"format": FORMAT, "layout": asdict(self.layout), "fingerprint": self.fingerprint, "origin": self.origin}
        _write(self.folder / MANIFEST, [(json.dumps(text, indent=1) + "\n").encode()])

    def write(self, shard: Shard, blocks: Sequence[NDArray]) -> None:
        """Write a shard of these records, an array for each step. It is there when this returns, or not at all."""
        path = self.folder / shard.path
        path.parent.mkdir(exist_ok=True)
        data = [block.tobytes() for block in blocks]
        sums = [self._checksum(shard.epoch, step, block) for step, block in zip(shard.steps, data, strict=True)]
        _write(path, [*data, np.array(sums, "<u4").tobytes()])

    def is_there(self, shard: Shard) -> bool:
        """Whether the file of the shard is there and has its size."""
        try:
            return (self.folder / shard.path).stat().st_size == shard.bytes
        except OSError:
            return False

    def is_sound(self, shard: Shard) -> bool:
        """Whether the shard is there and all its blocks have their checksums. Reads the file."""
        try:
            for step in shard.steps if self.is_there(shard) else ():
                self.block(shard.epoch, step)
        except DataError:
            return False
        return self.is_there(shard)

    def block(self, epoch: int, step: int) -> NDArray:
        """Records `[batch_size]` of `step` of `epoch`, counted from its beginning; DataError, which names file and
        step, where they are missing or damaged."""
        shard, size = self.layout.shard_of(epoch, step), self.layout.block_bytes
        path, at = self.folder / shard.path, shard.steps.index(step)
        try:
            with path.open("rb") as file:
                data = os.pread(file.fileno(), size, at * size)
                known = os.pread(file.fileno(), 4, len(shard.steps) * size + 4 * at)
        except OSError as error:
            raise DataError(f"{path}: {error.strerror or error}; {_REPAIR}") from error
        if known != self._checksum(epoch, step, data).to_bytes(4, "little"):
            raise DataError(f"{path}: the records of step {step} of epoch {epoch} are damaged; {_REPAIR}")
        return np.frombuffer(data, self.layout.record)

    def _checksum(self, epoch: int, step: int, block: bytes) -> int:
        return zlib.crc32(block, zlib.crc32(f"{self._seal} {epoch} {step}".encode()))

    @cached_property
    def _seal(self) -> str:
        return json.dumps([asdict(self.layout), self.fingerprint], sort_keys=True)


class CachedLogits:
    """What the loader reads of the cache in `folder` (`data.loader.Store`). It is opened at the first read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._last: tuple[tuple[int, int], NDArray] | None = None

    def read(
        self, epoch: int, index: NDArray[np.int64], copy: NDArray[np.int64], place: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        """Logits `[B, K]` of images of one step. Raises DataError for records that are missing, damaged or of other
        samples."""
        steps, rows = np.divmod(place, self._cache.layout.batch_size)
        records = self._block(epoch, int(steps[0]))[rows]
        other = records["sample"] != index
        if other.any():
            wrong = f"sample {records['sample'][other][0]} where this run has sample {index[other][0]}"
            raise DataError(
                f"{self.folder}: in step {steps[0]} of epoch {epoch} the teacher saw {wrong}: one of the two is a "
                "substitute for a picture that could not be read; make the cache again from the data as they are now"
            )
        return self._cache.layout.decode(records)

    def _block(self, epoch: int, step: int) -> NDArray:
        """The block of a step, which all micro-batches of the step ask for."""
        if self._last is None or self._last[0] != (epoch, step):
            self._last = (epoch, step), self._cache.block(epoch, step)
        return self._last[1]

    @cached_property
    def _cache(self) -> Cache:
        return Cache.open(self.folder)


def _write(path: Path, parts: Sequence[bytes]) -> None:
    """Write a file in one step, so that it survives a kill and a power cut, or is not there.

    What writers that were killed have left beside it goes. A second writer of the same file, whose own work that may
    be, has nothing left to do: the bytes are the same.
    """
    temporary = path.with_name(f".tmp-{path.name}-{uuid.uuid4().hex}")
    with temporary.open("wb") as file:
        file.writelines(parts)
        file.flush()
        os.fsync(file.fileno())
    with suppress(FileNotFoundError):
        os.replace(temporary, path)
    sync(path.parent)
    for left in path.parent.glob(f".tmp-{path.name}-*"):
        left.unlink(missing_ok=True)
