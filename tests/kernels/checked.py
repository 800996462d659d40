"""Kernels in a checked interpreter: besides what it always checks (`fastdeit.kernels.lint.interpreter`), the order.

    race          two programs touch one address, one of them writes, and nothing orders them: what comes out depends on
                  which is first. The same of two lanes of one store with different values
    no barrier    a program reads what it has written itself before all of its threads have come to a barrier

Programs run one after the other, in an order to be chosen, so that a result that depends on the order shows as another
result, too.

What orders programs is an addition with acquire and release semantics to one address: a program sees what the programs
before it at that address had written before their last barrier. That is how `_loss.is_last` lets the last program read
the sums of all others, and the only way in which a program may read what another one wrote.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from triton.runtime.interpreter import _interpreter

from fastdeit.kernels import _triton
from fastdeit.kernels.lint import interpreter
from fastdeit.kernels.lint.interpreter import Extent, Memory, Places
from fastdeit.kernels.optimizer import _multi_tensor
from tests.kernels.proof import poisoned

ORDERS = "forward", "reverse", "shuffled"
NOBODY, MANY, ATOMIC = -1, -2, -3


class _Bytes:
    """Who touched each granule of a storage last, and at which time of his: NOBODY, a program, or MANY programs."""

    def __init__(self, start: int, size: int, granule: int) -> None:
        self.start, self.granule = start, granule
        count = -(-size // granule)
        self.writer, self.reader = (np.full(count, NOBODY, np.int32) for _ in range(2))
        self.written, self.read = (np.zeros(count, np.int32) for _ in range(2))

    def touched(self, places: Places) -> NDArray:
        """Indices of granules."""
        first = (places.addresses.astype(np.int64) - self.start) // self.granule
        if places.size <= self.granule:
            return first
        return (first[:, None] + np.arange(places.size // self.granule)).reshape(-1)


class Watched(Memory):
    """The tensors' own memory, and what each program of a launch did to it."""

    def begin(self, label: str, grid: tuple[int, int, int], arguments: dict[str, Any]) -> None:
        """A launch begins: launches of one stream follow one another, so all earlier ones are forgotten."""
        super().begin(label, grid, arguments)
        self._grid, self._bytes = grid, {}
        self._time: dict[int, int] = {}
        self._at_barrier: dict[int, int] = {}
        self._sees: dict[int, NDArray] = {}
        self._released: dict[int, NDArray] = {}
        tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
        spans = [(tensor.untyped_storage(), tensor.element_size()) for tensor in tensors]
        self._spans = [(storage.data_ptr(), storage.nbytes(), size) for storage, size in spans]
        self._spans += [(extent.start, extent.end, extent.itemsize) for extent in self._known]

    @property
    def _own(self) -> int:
        x, y, z = self.program
        return (x * self._grid[1] + y) * self._grid[2] + z

    def load(self, places: Places, dtype: np.dtype) -> NDArray:
        """The values; `Fault` if another program's store might come before or after."""
        own = self._own
        for part in _split(places):
            touched, granules = self._granules(part)
            writer = touched.writer[granules]
            foreign = (writer != NOBODY) & (writer != own)
            if foreign.any() and (late := foreign & ~self._ordered(writer, touched.written[granules])).any():
                raise self.fault("race", f"load from {part.extents[0].name} of what {_who(writer[late][0])} wrote")
            if (writer == own).any():
                since = touched.written[granules] > self._at_barrier.get(own, 0)
                if (since & (writer == own)).any():
                    raise self.fault("no barrier", f"load from {part.extents[0].name} of what the program itself wrote")
            reader = touched.reader[granules]
            touched.reader[granules] = np.where((reader == NOBODY) | (reader == own), own, MANY)
            touched.read[granules] = self._now(own)
        nothing = np.zeros(len(places.offset), dtype)
        return _interpreter.load(places.addresses, np.ones(len(nothing), bool), nothing, dtype)

    def store(self, places: Places, values: NDArray) -> None:
        """Write; `Fault` if another program's access might come before or after."""
        own = self._own
        for part in _split(places):
            touched, granules = self._granules(part)
            for access, who, when in (
                ("wrote", touched.writer[granules], touched.written[granules]),
                ("reads", touched.reader[granules], touched.read[granules]),
            ):
                foreign = (who != NOBODY) & (who != own)
                if foreign.any() and (late := foreign & ~self._ordered(who, when)).any():
                    raise self.fault("race", f"store to {part.extents[0].name}, which {_who(who[late][0])} {access}")
            touched.writer[granules], touched.written[granules] = own, self._now(own)
        addresses = places.addresses
        if len(addresses) > 1:
            _, first, again = np.unique(addresses, return_index=True, return_inverse=True)
            if len(first) < len(addresses) and (values.view(np.uint8) != values[first][again].view(np.uint8)).any():
                raise self.fault("race", f"two values for one element of {places.extents[0].name} in one store")
        _interpreter.store(addresses, np.ascontiguousarray(values), np.ones(len(values), bool))

    def atomic(self, places: Places, values: NDArray, semantic: str) -> NDArray:
        """Add; with acquire and release, what others released before is seen, and what is behind a barrier released."""
        own, (address,) = self._own, places.addresses
        touched, granules = self._granules(places)
        if not np.isin(touched.writer[granules], (NOBODY, ATOMIC)).all():
            raise self.fault("race", f"atomic addition to {places.extents[0].name}, which a program also writes")
        touched.writer[granules] = ATOMIC
        count = int(np.prod(self._grid))
        released = self._released.setdefault(int(address), np.full(count, -1, np.int32))
        sees = self._sees.setdefault(own, np.full(count, -1, np.int32))
        if semantic in ("ACQUIRE", "ACQUIRE_RELEASE"):
            np.maximum(sees, released, out=sees)
        if semantic in ("RELEASE", "ACQUIRE_RELEASE"):
            np.maximum(released, sees, out=released)
            released[own] = max(released[own], self._at_barrier.get(own, -1))
        word = np.ctypeslib.as_ctypes_type(values.dtype).from_address(int(address))
        old = word.value
        word.value = old + int(values[0])
        return np.array([old])

    def barrier(self) -> None:
        """What the program wrote can be released, and read by all of its threads."""
        self._at_barrier[self._own] = self._time.get(self._own, 0)

    def _now(self, own: int) -> int:
        self._time[own] = self._time.get(own, 0) + 1
        return self._time[own]

    def _ordered(self, who: NDArray, when: NDArray) -> NDArray:
        """Which accesses of other programs the running one comes after, whatever the order of programs."""
        sees = self._sees.get(self._own)
        if sees is None:
            return np.zeros(who.shape, bool)
        return (who >= 0) & (when <= sees[np.maximum(who, 0)])

    def _granules(self, places: Places) -> tuple[_Bytes, NDArray]:
        address = int(places.addresses[0])
        start, size, granule = next(span for span in self._spans if span[0] <= address < span[0] + span[1])
        touched = self._bytes.get(start)
        if touched is None:
            touched = self._bytes[start] = _Bytes(start, size, granule)
        return touched, touched.touched(places)


def _split(places: Places) -> Iterator[Places]:
    """Accesses tensor by tensor."""
    if len(places.extents) == 1:
        yield places
        return
    for number, extent in enumerate(places.extents):
        own = places.owner == number
        yield Places([extent], np.zeros(own.sum(), np.int64), places.offset[own], places.size)


def _who(program: int) -> str:
    return {MANY: "more than one program", ATOMIC: "an atomic addition"}.get(int(program), f"program number {program}")


@contextmanager
def checked(order: str = "forward", seed: int = 0) -> Iterator[list[str]]:
    """Inside, all launches of the package are checked, their programs in this order, and memory that was never written
    is NaN. Gives the list of the kernels that were launched."""
    memory, launched = Watched(), []

    def launch(kernel: Any, grid: tuple[int, ...], *args: Any, warps: int, stages: int = 1, **constants: Any) -> None:
        if 0 in grid:
            return
        launched.append(interpreter.title(kernel.fn))
        arguments = dict(zip(kernel.arg_names, args, strict=False)) | constants
        interpreter.run(kernel, grid, arguments, memory, programs(grid, order, seed))

    with (
        interpreter.session(),
        poisoned(),
        mock.patch.object(_triton, "launch", launch),
        knowing_lists(memory),
    ):
        yield launched


@contextmanager
def knowing_lists(memory: Memory) -> Iterator[None]:
    """Inside, kernels may go to the tensors of the lists that were split last, whose addresses are in tables."""

    def split(*lists: Any) -> list[Any]:
        memory.known = [
            Extent.of(f"tensor {i} of list {number}", tensor)
            for number, tensors in enumerate(lists)
            for i, tensor in enumerate(tensors)
            if tensor.numel()
        ]
        return original(*lists)

    original = _multi_tensor.split
    with mock.patch.object(_multi_tensor, "split", split):
        yield


def programs(grid: tuple[int, ...], order: str, seed: int) -> list[tuple[int, int, int]]:
    """The programs of a grid in one of `ORDERS`."""
    every = list(product(*map(range, (*grid, *(1,) * (3 - len(grid))))))
    if order == "reverse":
        return every[::-1]
    if order == "shuffled":
        generator = torch.Generator().manual_seed(seed)
        return [every[i] for i in torch.randperm(len(every), generator=generator)]
    return every
