"""Whether all processes still have the same weights.

Every process keeps a copy of the weights and updates it by itself, so the copies are equal as long as nothing goes
wrong: a bit that flips in the memory of one card, or code that runs on one process alone. Nothing else would ever tell,
since the processes exchange gradients and not weights.

The checksum is a sum of the bits of all weights, in integers, so it depends on no order and misses no change of a
single bit. It travels as a few numbers in the vector that the log sums anyway: no collective of its own. It reads each
weight once, in one launch a tensor, for each line of the log.
"""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

_PIECES, _BITS = 3, 24
"""A float32 holds integers of 24 bits exactly, and three of them the 64 of a checksum."""
_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


class DriftError(RuntimeError):
    """The weights of some processes are not those of the others; `processes` names them, the main one is number 0."""

    def __init__(self, processes: Sequence[int], size: int) -> None:
        self.processes = tuple(processes)
        many = "es" if len(processes) > 1 else ""
        listed = ", ".join(map(str, processes))
        super().__init__(
            f"the {size} processes do not have the same weights any more"
            + (f": those of process{many} {listed} differ from the others'" if processes else "")
        )


def checksum(tensors: Sequence[Tensor]) -> Tensor:
    """int64 scalar on the device of the `tensors`: a weighted sum of their bits, modulo 2**64."""
    sums = [torch.sum(_words(tensor), dtype=torch.int64) for tensor in tensors]
    odd = torch.arange(len(sums), device=sums[0].device) * 2 + 1  # so that two tensors that are swapped are seen
    return (torch.stack(sums) * odd).sum()


def slots(tensors: Sequence[Tensor], rank: int, size: int) -> Tensor:
    """float32 `[size * 3]`: the checksum of this process in its own place and zeros elsewhere, to be summed over all
    processes."""
    total = checksum(tensors)
    pieces = torch.stack([(total >> (_BITS * piece)) & (2**_BITS - 1) for piece in range(_PIECES)])
    row = torch.zeros(size, _PIECES, device=total.device)
    row[rank] = pieces.float()
    return row.flatten()


def check(summed: Tensor) -> None:
    """Raise DriftError unless all processes have the same checksum; `summed` is the sum of their `slots`.

    It names the processes outside the majority, and none where there is no majority. Reads the device.
    """
    found = [tuple(pieces) for pieces in summed.view(-1, _PIECES).tolist()]
    usual, votes = Counter(found).most_common(1)[0]
    if votes == len(found):
        return
    odd = [rank for rank, pieces in enumerate(found) if pieces != usual] if votes > len(found) / 2 else []
    raise DriftError(odd, len(found))


def _words(tensor: Tensor) -> Tensor:
    """The bits as integers, of 64 bits where the tensor consists of such: fewer to add, and none to convert."""
    flat, bytes_each = tensor.detach().contiguous().view(-1), tensor.element_size()
    whole = all(count * bytes_each % 8 == 0 for count in (flat.numel(), flat.storage_offset()))
    return flat.view(torch.int64 if whole else _WORDS[bytes_each])
