"""Two runs by one recipe, bit for bit: tensors, record, log, samples."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdeit.engine import checkpoint, metrics
from fastdeit.run import directory

CLOCKS = frozenset({"seconds", "waited", "clock", "images_per_second", "data_wait_percent"})
"""What depends on the time of day and not on the training."""


@dataclass
class Seen:
    """What the processes of a run have seen: `steps[step][rank]` is the newest record of a step on a rank.

    made    how many steps were computed, those that a fault took back included
    pickle  bytes that were unpickled
    """

    steps: dict[int, dict[int, dict[str, Any]]] = field(default_factory=dict)
    made: int = 0
    pickle: int = 0

    def add(self, rank: int, record: Mapping[str, Any]) -> None:
        """Take a line of `victim` into account."""
        self.pickle += record.get("pickle", 0)
        if "step" in record:
            self.steps.setdefault(record["step"], {})[rank] = dict(record)
            self.made += rank == 0

    def samples(self) -> Counter[tuple[int, ...]]:
        """How often each (epoch, index, copy) was a part of the steps that the weights come from."""
        return Counter(
            tuple(sample) for ranks in self.steps.values() for record in ranks.values() for sample in record["samples"]
        )


def lost_and_repeated(disturbed: Seen, undisturbed: Seen) -> tuple[int, int]:
    """Samples that the undisturbed run has seen and the other has not, and samples that it has seen once too often."""
    ours, theirs = disturbed.samples(), undisturbed.samples()
    return (theirs - ours).total(), (ours - theirs).total()


def other_batches(disturbed: Seen, undisturbed: Seen) -> list[int]:
    """The steps whose pixels, targets or noise have other bits, on any process."""

    def digests(seen: Seen, step: int) -> dict[int, str]:
        return {rank: record["digest"] for rank, record in seen.steps.get(step, {}).items()}

    steps = sorted({*disturbed.steps, *undisturbed.steps})
    return [step for step in steps if digests(disturbed, step) != digests(undisturbed, step)]


def other_tensors(run: Path, other: Path) -> tuple[dict[str, int], list[str]]:
    """({file: how many tensors it has}, names of those that differ) of the newest checkpoints of two runs."""
    ours, theirs = (_newest(path) for path in (run, other))
    differ = [] if ours.step == theirs.step else [f"step {ours.step} instead of {theirs.step}"]
    for file in sorted({*ours.tensors, *theirs.tensors}):
        mine, its = ours.tensors.get(file, {}), theirs.tensors.get(file, {})
        differ += [f"{file}: {name}" for name in sorted({*mine, *its}) if not _same(mine.get(name), its.get(name))]
    mine, its = (_timeless(found.state["record"]) for found in (ours, theirs))
    differ += [f"record: {name}" for name in sorted({*mine, *its}) if mine.get(name) != its.get(name)]
    return {file: len(group) for file, group in theirs.tensors.items()}, differ


def other_lines(run: Path, other: Path) -> tuple[int, list[int]]:
    """(lines, numbers of those that differ) of the metrics of two runs."""
    ours, theirs = (
        [json.dumps(_timeless(record)) for record in metrics.read(path / directory.METRICS)] for path in (run, other)
    )
    longest = max(len(ours), len(theirs))
    return len(theirs), [number + 1 for number in range(longest) if ours[number:][:1] != theirs[number:][:1]]


def leftovers(run: Path) -> list[str]:
    """Names of what a fault has left behind in the run directory."""
    found: Iterable[Path] = (*run.iterdir(), *(run / directory.CHECKPOINTS).iterdir())
    return sorted(path.name for path in found if path.name.startswith(".tmp-"))


def _newest(run: Path) -> checkpoint.Checkpoint:
    root = run / directory.CHECKPOINTS
    return checkpoint.load(checkpoint.path_of(root, checkpoint.steps(root)[-1]))


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None or one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def _timeless(record: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in record.items() if name not in CLOCKS}
