"""`fastdeit chaos`: run a training undisturbed, run it again through faults, and say what was lost."""

import argparse
import json
import random
import shutil
import statistics
import tempfile
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from fastdeit.chaos import damage
from fastdeit.chaos.compare import Seen
from fastdeit.chaos.faults import Undisturbed, plan
from fastdeit.chaos.judge import Outcome, end_of, held_against, judge, judge_spoilt, named
from fastdeit.chaos.lives import Host
from fastdeit.chaos.report import show
from fastdeit.engine import checkpoint
from fastdeit.errors import FastdeitError
from fastdeit.run import directory

_STEPS_OF_TIMEOUT = 50
"""A process that has said nothing for the time of so many steps hangs, in a run whose hangs are to be seen soon."""


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
        show(found, folder if keep else None)
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
    return held_against(outcome, runs, seen) | {"seed": args.seed, "seconds": time.monotonic() - began}


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
        if spoilt is not None and judge_spoilt(outcome, spoilt, life):
            spoilt = None
        judge(outcome, fault, life)
        (folder / f"life_{number}.txt").write_text(life.text)
        if fault is None or outcome.problems:
            break
        now = None
        if spoilt is None and rng.random() < 0.3:
            now = spoilt = damage.spoil(path / directory.CHECKPOINTS, rng, folder / "canary")
        steps = checkpoint.steps(path / directory.CHECKPOINTS)
        after = f", {now}" if now else ""
        say(f"{number} of {len(faults) - 1}: {named(fault)}; checkpoint {steps[-1] if steps else 'none yet'}{after}")
    if spoilt is not None and not outcome.problems:
        outcome.problems.append(f"{spoilt}: no life came to look at it, so nothing is known of it{end_of(life)}")
    if (folder / "canary").exists():
        outcome.problems.append("a pickle in the place of a checkpoint's file was executed")
    return outcome
