"""`fastdeit chaos`: run a training undisturbed, run it again through faults, and say what was lost."""

import argparse
import json
import random
import shutil
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from fastdeit.chaos import compare, damage
from fastdeit.chaos.compare import Seen
from fastdeit.chaos.faults import Fault, Undisturbed, plan
from fastdeit.chaos.lives import Host, Life
from fastdeit.engine import checkpoint
from fastdeit.engine.progress import table
from fastdeit.errors import FastdeitError, Interrupted
from fastdeit.run import directory

_STEPS_OF_TIMEOUT = 50
"""A process that has said nothing for the time of so many steps hangs, in a run whose hangs are to be seen soon."""


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


def main(args: argparse.Namespace) -> int:
    """The verb: returns 0 where nothing was lost, else 1."""
    folder = Path(tempfile.mkdtemp(prefix="fastdeit-chaos-"))
    keep = args.keep
    try:
        found = measured(args, folder)
        keep = keep or bool(found["problems"])
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)
    if args.json:
        print(json.dumps(found | ({"folder": str(folder)} if keep else {}), indent=2))
    else:
        _show(found, folder if keep else None)
    return FastdeitError.exit_code if found["problems"] else 0


def measured(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Both runs, in `folder`, and what they differ in."""
    say = (lambda text: None) if args.json else partial(print, flush=True)
    runs = disturbed, undisturbed = folder / "disturbed", folder / "undisturbed"
    seen = {disturbed: Seen(), undisturbed: Seen()}
    times: list[float] = []
    began = time.monotonic()
    under_way = undisturbed

    def heard(rank: int, record: dict[str, Any]) -> None:
        if rank == 0 and "time" in record:
            times.append(record["time"])
        seen[under_way].add(rank, record)

    host = Host(folder, args.nproc, heard)
    try:
        started = time.monotonic()
        whole = host.live(_command(args, undisturbed))
        if set(whole.codes.values()) != {0}:
            raise FastdeitError(f"the training fails without any fault as well:\n{whole.text.rstrip()}")
        run = _facts(seen[undisturbed], times, started, undisturbed)
        say(f"undisturbed: {run.steps} steps in {time.monotonic() - started:.1f} s")
        under_way = disturbed
        outcome = _through_faults(args, host, run, disturbed, folder, say)
    finally:
        host.close()
    return _held_against(outcome, runs, seen) | {"seed": args.seed, "seconds": time.monotonic() - began}


def _command(args: argparse.Namespace, run: Path, *overrides: str) -> list[str]:
    return ["train", args.recipe, *args.overrides, *overrides, "--run-dir", str(run), "--resume"]


def _facts(seen: Seen, times: list[float], started: float, run: Path) -> Undisturbed:
    steps = [after - before for before, after in pairwise(times)]
    root = run / directory.CHECKPOINTS
    newest = checkpoint.path_of(root, checkpoint.steps(root)[-1])
    return Undisturbed(
        steps=len(seen.steps),
        start_s=times[0] - started,
        step_s=statistics.median(steps) if steps else 0.1,
        largest=max(path.stat().st_size for path in newest.iterdir()),
    )


def _through_faults(
    args: argparse.Namespace, host: Host, run: Undisturbed, path: Path, folder: Path, say: Any
) -> Outcome:
    outcome, rng = Outcome(), random.Random(args.seed)
    patience = max(4.0, _STEPS_OF_TIMEOUT * run.step_s)
    command = _command(args, path, *([f"engine.timeout_s={patience:g}"] if args.nproc > 1 else []))
    spoilt = None
    faults = [*plan(args.seed, args.kills, args.nproc, run), None]
    for number, fault in enumerate(faults, 1):
        life = host.live(command, fault)
        if spoilt is not None and _judge_spoilt(outcome, spoilt, life):
            spoilt = None
        _judge(outcome, fault, life)
        (folder / f"life_{number}.txt").write_text(life.text)
        if fault is None or outcome.problems:
            break
        now = None
        if spoilt is None and rng.random() < 0.3:
            now = spoilt = damage.spoil(path / directory.CHECKPOINTS, rng, folder / "canary")
        steps = checkpoint.steps(path / directory.CHECKPOINTS)
        after = f", {now}" if now else ""
        say(f"{number} of {len(faults) - 1}: {_named(fault)}; checkpoint {steps[-1] if steps else 'none yet'}{after}")
    if spoilt is not None and not outcome.problems:
        outcome.problems.append(f"{spoilt}: no life came to look at it, so nothing is known of it{_end_of(life)}")
    if (folder / "canary").exists():
        outcome.problems.append("a pickle in the place of a checkpoint's file was executed")
    return outcome


def _named(fault: Fault) -> str:
    where = "at the start" if fault.step < 0 else f"from step {fault.step} on"
    what = {"disk": f"a disk full at {fault.limit} bytes a file", "launcher": "SIGKILL of the launcher"}
    whom = "" if fault.kind in what else " of all ranks" if fault.rank is None else f" of rank {fault.rank}"
    place = f", at operation {fault.points} on a checkpoint" if fault.points else ""
    return f"{what.get(fault.kind, fault.signal)}{whom} {where}{place}"


def _judge(outcome: Outcome, fault: Fault | None, life: Life) -> None:
    """Hold the end of a life against how it should end."""
    outcome.orphans += life.orphans
    codes = set(life.codes.values())
    if life.silent:
        outcome.problems.append(f"the run said nothing any more after {_told(fault)}{_end_of(life)}")
    elif life.orphans:
        outcome.problems.append(f"{life.orphans} processes outlived their launcher")
    elif fault is None:
        if codes != {0}:
            outcome.problems.append(f"the run did not come to its end: exit codes {sorted(codes)}{_end_of(life)}")
    elif codes == {0}:
        outcome.late += 1
    elif codes in _ends(fault, life):
        outcome.survived[fault.kind] += 1
    else:
        outcome.problems.append(f"after {_told(fault)} the exit codes were {sorted(codes)}{_end_of(life)}")


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


def _judge_spoilt(outcome: Outcome, spoilt: str, life: Life) -> bool:
    """Whether the life came to look at its checkpoints; then it must have named the spoilt one."""
    named, resumed = "is damaged" in life.text, "resumed at step" in life.text
    if named:
        outcome.refused.append(spoilt)
    elif resumed:
        outcome.problems.append(f"{spoilt} was not noticed{_end_of(life)}")
    return named or resumed


def _told(fault: Fault | None) -> str:
    return "the last start" if fault is None else _named(fault)


def _end_of(life: Life) -> str:
    return "; it said last:\n" + "\n".join(life.text.splitlines()[-8:])


def _held_against(outcome: Outcome, runs: tuple[Path, Path], seen: dict[Path, Seen]) -> dict[str, Any]:
    """What is said of the outcome and of the difference of the two runs."""
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


def summary(found: dict[str, Any]) -> str:
    """The line of the README, of what was measured here."""
    kills = found["survived"].get("kill", 0) + found["survived"].get("launcher", 0)
    return (
        f"{kills} kills survived, {len(found['bad_inputs_refused'])} bad inputs refused, "
        f"{found['samples_lost'] + found['samples_repeated']} samples lost or repeated, {found['pickle_bytes']} bytes "
        "of pickle loaded"
    )


def _show(found: dict[str, Any], kept: Path | None) -> None:
    kinds = {"kill": "kills of a process", "launcher": "kills of the launcher", "hang": "hangs"}
    kinds |= {"signal": "signals to stop", "disk": "full disks"}
    rows = [(name, f"{found['survived'][kind]} survived") for kind, name in kinds.items() if kind in found["survived"]]
    rows.append(("spoilt checkpoints", f"{len(found['bad_inputs_refused'])} refused"))
    if found["late"]:
        rows.append(("faults that came too late", str(found["late"])))
    rows.append(("steps made again", f"{found['steps_made_again']} of {found['steps']}"))
    if "samples" in found:
        rows += [
            ("samples lost", f"{found['samples_lost']} of {found['samples']:,}"),
            ("samples repeated", f"{found['samples_repeated']} of {found['samples']:,}"),
            ("batches with other bits", f"{len(found['batches_that_differ'])} of {found['steps']}"),
        ]
        for file, count in found["tensors"].items():
            other = sum(name.startswith(f"{file}: ") for name in found["tensors_that_differ"])
            rows.append((f"tensors of {file} with other bits", f"{other} of {count}"))
        other = len(found["metrics_that_differ"])
        rows.append((f"lines of {directory.METRICS} that differ", f"{other} of {found['metrics']}"))
    rows += [("processes left behind", str(found["orphans"])), ("bytes of pickle loaded", str(found["pickle_bytes"]))]
    table(rows)
    for problem in found["problems"]:
        print(f"PROBLEM  {problem}")
    if kept is not None:
        print(f"both runs, and what every life said: {kept}")
    if not found["problems"]:
        print(f"seed {found['seed']}, {found['seconds']:.0f} s: {summary(found)}")
