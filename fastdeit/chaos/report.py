"""What `fastdeit chaos` prints at its end."""

from pathlib import Path
from typing import Any

from fastdeit.engine.progress import table
from fastdeit.run import directory


def summary(found: dict[str, Any]) -> str:
    """The line of the README, of what was measured here."""
    kills = found["survived"].get("kill", 0) + found["survived"].get("launcher", 0)
    return (
        f"{kills} kills survived, {len(found['bad_inputs_refused'])} bad inputs refused, "
        f"{found['samples_lost'] + found['samples_repeated']} samples lost or repeated, {found['pickle_bytes']} bytes "
        "of pickle loaded"
    )


def show(found: dict[str, Any], kept: Path | None) -> None:
    """Print what was measured; `kept` is the folder of both runs, if it is left."""
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
