"""How a life that had a fault should have ended, and what was lost over all of them."""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastdeit.chaos import compare
from fastdeit.chaos.compare import Seen
from fastdeit.chaos.faults import Fault
from fastdeit.chaos.lives import Life
from fastdeit.errors import FastdeitError, Interrupted
from fastdeit.run import directory


@dataclass
class Outcome:
    """What chaos has measured.

    survived  faults by kind that did what they were to do
    late      faults that came when the run was over
    refused   spoilt checkpoints that were named and not used
    problems  sentences: what was not as it should be
    """

    survived: Counter[str] = field(default_factory=Counter)
    late: int = 0
    refused: list[str] = field(default_factory=list)
    orphans: int = 0
    problems: list[str] = field(default_factory=list)


def named(fault: Fault) -> str:
    """The fault in words."""
    where = "at the start" if fault.step < 0 else f"from step {fault.step} on"
    what = {"disk": f"a disk full at {fault.limit} bytes a file", "launcher": "SIGKILL of the launcher"}
    whom = "" if fault.kind in what else " of all ranks" if fault.rank is None else f" of rank {fault.rank}"
    place = f", at operation {fault.points} on a checkpoint" if fault.points else ""
    return f"{what.get(fault.kind, fault.signal)}{whom} {where}{place}"


def judge(outcome: Outcome, fault: Fault | None, life: Life) -> None:
    """Hold the end of a life against how it should end."""
    outcome.orphans += life.orphans
    codes = set(life.codes.values())
    if life.silent:
        outcome.problems.append(f"the run said nothing any more after {_told(fault)}{end_of(life)}")
    elif life.orphans:
        outcome.problems.append(f"{life.orphans} processes outlived their launcher")
    elif fault is None:
        if codes != {0}:
            outcome.problems.append(f"the run did not come to its end: exit codes {sorted(codes)}{end_of(life)}")
    elif codes == {0}:
        outcome.late += 1
    elif codes in _ends(fault, life):
        outcome.survived[fault.kind] += 1
    else:
        outcome.problems.append(f"after {_told(fault)} the exit codes were {sorted(codes)}{end_of(life)}")


def _ends(fault: Fault, life: Life) -> list[set[int]]:
    """The sets of exit codes with which a life may end that had the fault."""
    saved, failed, alone = Interrupted.exit_code, FastdeitError.exit_code, len(life.codes) == 1
    if fault.kind in ("kill", "launcher"):
        return [{-9}] if alone or fault.rank is None else [{-9, failed}]
    if fault.kind == "hang":
        return [{saved}] if alone else [{-9, failed}]
    if fault.kind == "disk":
        return [{failed}]
    return [{saved}]


def judge_spoilt(outcome: Outcome, spoilt: str, life: Life) -> bool:
    """Whether the life came to look at its checkpoints; then it must have named the spoilt one."""
    named, resumed = "is damaged" in life.text, "resumed at step" in life.text
    if named:
        outcome.refused.append(spoilt)
    elif resumed:
        outcome.problems.append(f"{spoilt} was not noticed{end_of(life)}")
    return named or resumed


def _told(fault: Fault | None) -> str:
    return "the last start" if fault is None else named(fault)


def end_of(life: Life) -> str:
    """The last words of a life, to be put behind a problem."""
    return "; it said last:\n" + "\n".join(life.text.splitlines()[-8:])


def held_against(outcome: Outcome, runs: tuple[Path, Path], seen: dict[Path, Seen]) -> dict[str, Any]:
    """What is said of the outcome and of the difference of `runs`, the disturbed one and the other."""
    disturbed, undisturbed = runs
    found: dict[str, Any] = {
        "survived": dict(outcome.survived),
        "late": outcome.late,
        "bad_inputs_refused": outcome.refused,
        "orphans": outcome.orphans,
        "steps": len(seen[undisturbed].steps),
        "steps_made_again": seen[disturbed].made - len(seen[disturbed].steps),
        "pickle_bytes": seen[disturbed].pickle + seen[undisturbed].pickle,
    }
    problems = list(outcome.problems)
    if not problems:
        lost, repeated = compare.lost_and_repeated(seen[disturbed], seen[undisturbed])
        batches = compare.other_batches(seen[disturbed], seen[undisturbed])
        tensors, differ = compare.other_tensors(disturbed, undisturbed)
        lines, other = compare.other_lines(disturbed, undisturbed)
        left = compare.leftovers(disturbed)
        found |= {
            "samples": seen[undisturbed].samples().total(),
            "samples_lost": lost,
            "samples_repeated": repeated,
            "batches_that_differ": batches,
            "tensors": tensors,
            "tensors_that_differ": differ,
            "metrics": lines,
            "metrics_that_differ": other,
            "leftovers": left,
        }
        problems += [f"{lost} samples were lost and {repeated} repeated"] * bool(lost or repeated)
        problems += [f"the batches of steps {batches[:8]} have other bits"] * bool(batches)
        problems += [f"{name} has other bits" for name in differ]
        problems += [f"lines {other[:8]} of {directory.METRICS} differ"] * bool(other)
        problems += [f"{name} was left behind" for name in left]
    if found["pickle_bytes"]:
        problems.append(f"{found['pickle_bytes']} bytes were unpickled")
    return found | {"problems": problems}
