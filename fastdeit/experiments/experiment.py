"""What an experiment is: variants that are trained with the same seeds, and what a claim expects of their metrics."""

from collections.abc import Mapping
from dataclasses import dataclass
from string import Template


@dataclass(frozen=True)
class Variant:
    """One way of training, repeated for every seed.

    name       in rows, tables and paths
    says       what it is, in a few words
    recipe     a shipped recipe or a path
    overrides  `section.field=value`. `$NAME` stands for the run of the variant NAME with the same seed, and `$digits`
               for the folder of the digits
    probes     names in `probes.PROBES`: what is measured of the trained network besides the recipe's own metrics
    """

    name: str
    says: str
    recipe: str
    overrides: tuple[str, ...] = ()
    probes: tuple[str, ...] = ()

    @property
    def needs(self) -> tuple[str, ...]:
        """The names behind `$` in the overrides, each once, and `teacher` where the probe of that name asks it."""
        found = [match["named"] for word in self.overrides for match in Template.pattern.finditer(word)]
        return tuple(dict.fromkeys([*found, *(["teacher"] if "teacher" in self.probes else [])]))

    def words(self, values: Mapping[str, str]) -> list[str]:
        """The overrides with `values` in the place of the names behind `$`. Raises KeyError for one that is missing."""
        return [Template(word).substitute(values) for word in self.overrides]


@dataclass(frozen=True)
class Term:
    """A metric of a variant."""

    variant: str
    metric: str

    def __str__(self) -> str:
        return f"{self.metric} of {self.variant}"


@dataclass(frozen=True)
class Expectation:
    """What a claim lets one expect: `left > right - slack`, or with `within`: `|left - right| < within`.

    claim  its number in `claims.CLAIMS`
    says   the same in words
    """

    claim: int
    says: str
    left: Term | float
    right: Term | float
    slack: float = 0.0
    within: float | None = None

    @property
    def terms(self) -> tuple[Term, ...]:
        """The sides that are measured."""
        return tuple(side for side in (self.left, self.right) if isinstance(side, Term))

    @property
    def formula(self) -> str:
        """The condition as it is tested."""
        if self.within is not None:
            return f"{self.left} within {self.within:g} of {self.right}"
        return f"{self.left} > {self.right}{f' - {self.slack:g}' if self.slack else ''}"


@dataclass(frozen=True)
class Experiment:
    """Variants, what is shown of them, and what is expected.

    question  what it asks, one sentence
    source    section and table of the paper, and the numbers there
    variants  in an order in which each stands behind those that it needs
    metrics   what page and picture show: name of the metric to its title
    """

    name: str
    question: str
    source: str
    variants: tuple[Variant, ...]
    metrics: Mapping[str, str]
    expectations: tuple[Expectation, ...]

    @property
    def claims(self) -> tuple[int, ...]:
        """Numbers of the claims that it is about, in order."""
        return tuple(sorted({each.claim for each in self.expectations}))
