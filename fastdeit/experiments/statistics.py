"""Means over seeds with confidence intervals, and what they say of an expectation."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from fastdeit.experiments.experiment import Expectation, Term
from fastdeit.experiments.rows import Row

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """Mean of `count` values and its confidence interval; `low` and `high` are None where there is one value."""

    mean: float
    low: float | None
    high: float | None
    count: int

    @property
    def half(self) -> float | None:
        """Half the width of the interval."""
        return None if self.high is None else self.high - self.mean


def interval(values: Sequence[float]) -> Interval:
    """The mean with its 95 % interval by Student's t: mean +- t(0.975, n - 1) s / sqrt(n), s with n - 1.

    Raises ValueError where there is no value.
    """
    from scipy.stats import t

    count = len(values)
    if count == 0:
        raise ValueError("there are no values to take the mean of")
    mean = math.fsum(values) / count
    if count == 1:
        return Interval(mean, None, None, 1)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    half = float(t.ppf((1 + CONFIDENCE) / 2, count - 1)) * deviation / math.sqrt(count)
    return Interval(mean, mean - half, mean + half, count)


def values(rows: Iterable[Row], term: Term) -> dict[int, float]:
    """The metric by seed; seeds whose row has no such metric are left out."""
    return {
        row.seed: row.metrics[term.metric] for row in rows if row.variant == term.variant and term.metric in row.metrics
    }


Verdict = Literal["shown", "not shown at this scale", "the opposite is shown", "not run"]


@dataclass(frozen=True)
class Finding:
    """What the rows say of an expectation. difference: left - right by seed, None where nothing was run."""

    difference: Interval | None
    verdict: Verdict


def judge(expectation: Expectation, rows: Sequence[Row]) -> Finding:
    """Differences are taken seed by seed, for variants with one seed begin alike. The verdict is of their interval:

    shown                    all of it fulfils the expectation
    the opposite is shown    none of it does
    not shown at this scale  a part of it does, or there is one seed only
    """
    sides = [values(rows, side) if isinstance(side, Term) else None for side in (expectation.left, expectation.right)]
    measured = [side for side in sides if side is not None]
    seeds = sorted(set.intersection(*(set(side) for side in measured)))
    if not seeds:
        return Finding(None, "not run")
    left, right = (
        [given if side is None else side[seed] for seed in seeds]
        for side, given in zip(sides, (expectation.left, expectation.right), strict=True)
    )
    found = interval([a - b for a, b in zip(left, right, strict=True)])
    return Finding(found, _verdict(expectation, found))


def _verdict(expectation: Expectation, found: Interval) -> Verdict:
    if found.low is None or found.high is None:
        return "not shown at this scale"
    if expectation.within is None:
        lowest, highest = -expectation.slack, math.inf
    else:
        lowest, highest = -expectation.within, expectation.within
    if lowest < found.low and found.high < highest:
        return "shown"
    if found.high < lowest or found.low > highest:
        return "the opposite is shown"
    return "not shown at this scale"
