"""What one promise of fastdeit's reliability is made of."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Target:
    """One promise. With tests and without `why_not` it is held, with both in part, with `why_not` alone not at all."""

    number: int
    what: str
    tests: tuple[str, ...]
    """Node ids of pytest, without parameters."""
    why_not: str = ""
    """What no test shows, or why there is none."""

    @property
    def held(self) -> str:
        """The state in a word or two."""
        if not self.tests:
            return "no"
        return "in part" if self.why_not else "yes"
