"""How far a modelled step may be off, since the shares of `gpus.GPUS` are judgements.

`DRAWS` times, each share is drawn anew from a range around its judged value (`RANGES`), and the same operations
are timed again. A draw is one for all designs of a GPU: a faster library product makes ours and the peer's step faster.

The interval is what these ranges make of the model. It knows nothing of what the model leaves out.
"""

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import NamedTuple

from fastdeit.estimate import model as estimate
from fastdeit.estimate.designs import Design
from fastdeit.estimate.gpus import GPU
from fastdeit.estimate.model import Op, Step
from fastdeit.estimate.networks import Network, Work

DRAWS = 64
LOW, HIGH = 0.05, 0.95
RANGES = {
    "products": (0.87, 1.13),
    "pointwise": (0.93, 1.07),
    "reduction": (0.76, 1.24),
    "library": (0.70, 1.30),
    "ours": (0.67, 1.33),
    "epilogue": (0.50, 7.00),
    "gap": (0.57, 1.43),
}
"""Least and largest factor of each share, judged like the shares. Narrowest is what many published measurements bound,
libraries' products and copies. Widest is what nobody has measured: ours, and above all how much a GELU in the epilogue
slows a product down, which may be little, or on Hopper so much that it does not pay."""


class Interval(NamedTuple):
    """The 5th and the 95th percentile."""

    low: float
    high: float


def interval(values: Sequence[float]) -> Interval:
    """Of these values, as many as there are draws."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return Interval(ordered[round(LOW * last)], ordered[round(HIGH * last)])


@cache
def drawn(gpu: GPU) -> tuple[GPU, ...]:
    """The GPU with its shares drawn, the same in every call."""
    source = random.Random(0)

    def draw() -> GPU:
        factor = {name: source.uniform(*ends) for name, ends in RANGES.items()}

        def share(value: float, name: str) -> float:
            return min(1.0, value * factor[name])

        return replace(
            gpu,
            gemm=share(gpu.gemm, "products"),
            narrow=share(gpu.narrow, "products"),
            pointwise=share(gpu.pointwise, "pointwise"),
            reduction=share(gpu.reduction, "reduction"),
            library=tuple(share(value, "library") for value in gpu.library),
            ours=tuple(share(value, "ours") for value in gpu.ours),
            epilogue=gpu.epilogue * factor["epilogue"],
            gap=gpu.gap * factor["gap"],
        )

    return tuple(draw() for _ in range(DRAWS))


@cache
def steps(network: Network, work: Work, design: Design, gpu: GPU) -> tuple[Step, ...]:
    """`model.step` in each draw."""
    fixed = _merged(estimate.ops(network, work, design, gpu))
    return tuple(estimate.time(_slowed(fixed, gpu, card), work, design, card) for card in drawn(gpu))


def _merged(ops: Sequence[Op]) -> list[Op]:
    """The same in fewer operations: equal ones count together, and those that multiply nothing and else differ in bytes
    and launches alone add up."""
    sums: dict[Op, tuple[float, float]] = {}
    counts: dict[Op, float] = {}
    for op in ops:
        if op.flops:
            key = op._replace(count=1.0)
            counts[key] = counts.get(key, 0.0) + op.count
        else:
            key = op._replace(bytes=0.0, launches=0.0, count=1.0)
            moved, launches = sums.get(key, (0.0, 0.0))
            sums[key] = moved + op.count * op.bytes, launches + op.count * op.launches
    added = [key._replace(bytes=moved, launches=launches) for key, (moved, launches) in sums.items()]
    return [key._replace(count=count) for key, count in counts.items()] + added


def _slowed(ops: Sequence[Op], judged: GPU, card: GPU) -> list[Op]:
    """Products with an epilogue by the slowdown of the drawn card. (Padding is that of attention, which has none; those
    of 8 bits have less spent than FLOPs.)"""
    factor = (1 + card.epilogue) / (1 + judged.epilogue)
    return [
        op._replace(spent=op.spent * factor) if op.spent > op.flops and op.kind in ("gemm", "narrow") else op
        for op in ops
    ]
