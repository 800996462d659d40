"""Faults planted into the kernels, one at a time, to see that the proofs find them.

They are in `mutants.diff`, a block for each:

    # what the fault is
    @ kind | file under fastdeit/kernels | op or op/backend whose cases run it | part of the names of cases to try first
     a line of the file, found there once, with
    -the line that the fault takes away
    +the line that it puts there

The kind is mask, bound, stride, offset, program, accumulator, order, loop, type or value. In place of a case stands
"huge" where the fault shows only in tensors of more than 2**31 elements, and "compiler" where the interpreter does not
mind it.
"""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Mutant:
    """A fault: what it is, its kind, the text `old` of a file that `new` replaces, and where it is sought."""

    name: str
    kind: str
    file: str
    cases: str
    hint: str
    old: str
    new: str


def _parsed(block: str) -> Mutant:
    title, place, *lines = block.splitlines()
    kind, file, cases, hint = (*place.removeprefix("@ ").split(" | "), "few")[:4]
    old, new = ("".join(f"{line[1:]}\n" for line in lines if line[:1] in (" ", sign)) for sign in "-+")
    return Mutant(title.removeprefix("# "), kind, file, cases, hint, old, new)


def mutants_in(file: Path) -> tuple[Mutant, ...]:
    """Those of a file of such blocks."""
    return tuple(_parsed(block) for block in file.read_text().rstrip("\n").split("\n\n# "))


MUTANTS = mutants_in(Path(__file__).with_suffix(".diff"))
