"""Lists of tensors in one launch, as the kernels of optimizers need them.

A launch covers tensors of equal dtypes. For each list its kernel gets a row of addresses, int64 on the device, and for
all lists together the sizes and `starts`: tensor i owns the chunks `starts[i]` to `starts[i + 1]`, of `CHUNK` elements
each. A program looks up the tensor of its chunk; which elements it takes depends on the sizes alone, so sums over
programs have the same order on every card.

All numbers of a launch travel in one copy, without waiting for the device, and nothing on the device outlives the
launch: what was allocated inside the memory pool of a CUDA graph, also one that `torch.compile` records, must not be
used beside it. A graph repeats the copy in each replay, from pinned memory that is never written again (`_Reserve`).
"""

from collections.abc import Sequence
from functools import cache
from itertools import accumulate, compress
from math import gcd
from threading import Lock
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdeit.kernels import _triton

CHUNK = 4096
"""Elements of a program: a thousand programs for the smallest DeiT, and little idling at the end of a launch."""
BLOCK, WARPS = 512, 4
"""Elements at a time: one 128-bit access to every float32 list in each thread. More would have 16-bit lists pass
through shared memory, and the nine programs that fit an SM have more bytes in flight than its memory needs as it is."""

_CHUNK = tl.constexpr(CHUNK)
_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}
_RESERVED = 2**15
"""Numbers in a block of the memory that CUDA graphs read: some thirty updates of a DeiT."""


@triton.jit
def chunk(sizes, starts, found_inf, TENSORS: tl.constexpr, ALIGNED: tl.constexpr):
    """(tensor, first element, number of elements) of this program's chunk; no elements where the step is skipped."""
    own = tl.program_id(0)
    tensor = tl.sum((tl.load(starts + tl.arange(0, TENSORS)) <= own).to(tl.int32), 0) - 1
    first = (own - tl.load(starts + tensor)) * _CHUNK
    length = tl.minimum(tl.load(sizes + tensor) - first, _CHUNK).to(tl.int32)
    if found_inf is not None:
        length = tl.where(tl.load(found_inf) != 0, 0, length)
    if ALIGNED:
        length = tl.multiple_of(length, 8)
    return tensor, first, length


@triton.jit
def pointer(row, tensor, first, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointer to element `first` of a tensor, of whose list `row` holds the addresses."""
    start = tl.load(row + tensor).to(tl.pointer_type(TYPE))
    if ALIGNED:
        start = tl.multiple_of(start, 16)
    return start + first


class Lists(NamedTuple):
    """What a kernel takes: `rows` (None for an empty list), `sizes`, `starts`, the number of tensors, of chunks and of
    elements in each list, the dtype of each list and the constants of `chunk` and `pointer`. The caller keeps the
    tensors until it is launched."""

    rows: list[Tensor | None]
    sizes: Tensor
    starts: Tensor
    tensors: int
    chunks: int
    elements: int
    types: list[tl.dtype | None]
    constants: dict[str, int]


def split(*lists: Sequence[Tensor]) -> list[Lists]:
    """The lists, which have tensors of the same sizes or none at all, in parts for one launch each.

    `Unsupported` unless all tensors are contiguous, of 16 or 32 bits, and in memory of their own. A part is aligned
    where all its addresses are multiples of 16 bytes and its sizes multiples of 8 elements, so that 128-bit accesses
    are possible.
    """
    # Hundreds of tensors a step: whole lists through C are several times as fast as tensor by tensor.
    filled = [tensors for tensors in lists if tensors]
    dense = all(all(map(Tensor.is_contiguous, tensors)) for tensors in filled)
    _triton.require(dense, "it does not take tensors that are not contiguous")
    sizes = list(map(Tensor.numel, filled[0]))
    addresses = [list(map(Tensor.data_ptr, tensors)) for tensors in filled]
    device = filled[0][0].device
    if device.type != "meta":
        _triton.require(
            not any(0 in at and any(size and not a for size, a in zip(sizes, at, strict=True)) for at in addresses),
            "it does not take tensors without memory of their own, such as a DTensor",
        )
    aligned = [size % 8 == 0 and gcd(16, *at) == 16 for size, *at in zip(sizes, *addresses, strict=True)]
    kinds = list(zip(aligned, *([tensor.dtype for tensor in tensors] for tensors in filled), strict=True))
    for dtype in {dtype for _, *dtypes in set(kinds) for dtype in dtypes}:
        _triton.require(dtype in _TYPES, f"it does not compute in {dtype}")
    parts = []
    for kind in dict.fromkeys(kinds):
        own = [kind == other for other in kinds]
        columns = [list(compress(column, own)) for column in (sizes, *addresses)]
        slots = iter(range(len(filled)))
        places = [next(slots) if tensors else None for tensors in lists]
        parts.append(_part(kind, columns, places, device))
    return parts


def _part(kind: tuple, columns: Sequence[Sequence[int]], places: Sequence[int | None], device: torch.device) -> Lists:
    """The part of a kind (aligned, dtype of each filled list) with columns sizes and addresses of each filled list;
    `places` has the index of each list among the filled."""
    aligned, *dtypes = kind
    sizes, *addresses = columns
    *starts, chunks = accumulate((-(-size // CHUNK) for size in sizes), initial=0)
    padded = _triton.power_of_two(len(sizes))
    starts += [chunks] * (padded - len(starts))
    size_row, start_row, *rows = _rows([sizes, starts, *addresses], device)
    return Lists(
        [None if place is None else rows[place] for place in places],
        size_row,
        start_row,
        len(sizes),
        chunks,
        sum(sizes),
        [None if place is None else _TYPES[dtypes[place]] for place in places],
        {"TENSORS": padded, "ALIGNED": aligned},
    )


def _rows(values: Sequence[Sequence[int]], device: torch.device) -> list[Tensor]:
    """Each of the sequences as an int64 tensor on the device, in memory aligned to 16 bytes."""
    lengths = [len(numbers) + len(numbers) % 2 for numbers in values]
    numbers = [n for row, length in zip(values, lengths, strict=True) for n in (*row, 0)[:length]]
    rows = _sent(numbers, device).split(lengths)
    return [row[: len(own)] for row, own in zip(rows, values, strict=True)]


def _sent(numbers: list[int], device: torch.device) -> Tensor:
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=torch.int64, device=device)
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            host = _reserve().take(numbers)
        else:
            _reserve().refill()
            host = torch.tensor(numbers, dtype=torch.int64, pin_memory=True)
        return host.to(device, non_blocking=True)


class _Reserve:
    """Pinned memory that graphs read in each replay, and that is therefore never freed: a few kilobytes a capture.

    It is allocated outside of captures, which forbid that.
    """

    def __init__(self) -> None:
        self._blocks: list[Tensor] = []
        self._used = _RESERVED
        self._lock = Lock()

    def refill(self) -> None:
        """Allocate another block where less than half of the last one is left."""
        with self._lock:
            if self._used > _RESERVED // 2:
                self._blocks.append(torch.empty(_RESERVED, dtype=torch.int64, pin_memory=True))
                self._used = 0

    def take(self, numbers: list[int]) -> Tensor:
        """The numbers in memory of their own; RuntimeError where no room is left for them."""
        with self._lock:
            start, end = self._used, self._used + len(numbers)
            if end > _RESERVED:
                raise RuntimeError(
                    f"no pinned memory is left for the {len(numbers)} addresses and sizes of this update, and none can "
                    "be allocated while a CUDA graph is captured: run the update once before the capture"
                )
            self._used = end
            return self._blocks[-1][start:end].copy_(torch.tensor(numbers, dtype=torch.int64))


@cache
def _reserve() -> _Reserve:
    return _Reserve()
