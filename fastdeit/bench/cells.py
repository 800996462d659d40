"""A row of a comparison: who takes part in it, how the sides compare, and what it says in words.

The single comparison, the suite and `fastdeit bench report` share this. benchmarks/README.md says what a row
means.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastdeit.bench import data, measure, step, train, watching
from fastdeit.bench.measure import median
from fastdeit.bench.names import STEP_PEERS

CPU_NOTE = "These are figures of a CPU: they say nothing of a GPU."

# ---- who takes part --------------------------------------------------------------------------------------------------


def builders(
    captures: Sequence[str], peers: Sequence[str]
) -> dict[str, Callable[[step.Cell, torch.device], step.Side]]:
    """Sides by name: ours in these ways of capturing a step, then the peers. Recorded graphs keep their memory, and
    therefore come last."""
    from fastdeit.bench.peers import PEERS  # imports timm, which takes a second

    ours = {step.name_of(capture): capture for capture in captures}
    direct = [name for name, capture in ours.items() if capture != "graph"]
    recorded = [name for name, capture in ours.items() if capture == "graph"]
    return {name: (step.OURS | PEERS)[name] for name in [*direct, *peers, *recorded]}


def peers(args: argparse.Namespace) -> list[str]:
    """The peers that `--peer` asks for, in the order of `STEP_PEERS`: by default timm, or all of the suite."""
    asked = args.peer or (["all"] if args.what == "suite" else ["timm"])
    return [name for name in STEP_PEERS if name in asked or "all" in asked]


# ---- how they compare ------------------------------------------------------------------------------------------------


def finish(row: dict[str, Any], out: str | None) -> None:
    """Complete a row with its ratios and environment, print it, and append it to the file `out`."""
    for ratio, of in (("ratio", "seconds"), ("cpu_ratio", "cpu_seconds")):
        peers = [name for name in row[of] if not name.startswith("fastdeit") and compared_to(name, row)]
        row[ratio] = {name: median(row, name, of) / median(row, compared_to(name, row), of) for name in peers}
    if row["what"] == "data":
        row["decoder_share"] = data.decoder_shares(row, "seconds")
        row["decoder_cpu_share"] = data.decoder_shares(row, "cpu_seconds")
    row["environment"] = measure.environment()
    print(sentence(row), flush=True)
    measure.append(row, out)


def compared_to(peer: str, row: dict[str, Any]) -> str | None:
    """Our side that a peer of the row is compared with: in `data` the one that ends at the same place, else the first
    that ran; None where there is none."""
    if row["what"] == "data":
        return data.compared_to(peer, row["seconds"])
    return next((name for name in row["seconds"] if name.startswith("fastdeit")), None)


def told(row: dict[str, Any]) -> list[str]:
    """The sides of a row in the order in which they are told: ours as they ran, then the peers, the fastest first, so
    that the least flattering ratio is read before the others. Rows without a side of ours keep their order."""
    names = list(row["seconds"])
    ours = [name for name in names if name.startswith("fastdeit")]
    if not ours:
        return names
    return [*ours, *sorted((name for name in names if name not in ours), key=lambda name: median(row, name))]


# ---- what it says ----------------------------------------------------------------------------------------------------


def sentence(row: dict[str, Any]) -> str:
    """A row in words: what and where, each side's speed, and how the peers compare."""
    lines = [f"{_title(row)}, {row['rounds']} interleaved rounds, medians"]
    width = max(map(len, [*row["seconds"], *row.get("failed", {})]), default=0)
    lines += [f"  {name:{width}}  {_speed(row, name)}" for name in told(row)]
    lines += [f"  {name:{width}}  cannot run: {why}" for name, why in row.get("failed", {}).items()]
    if watched := row.get("watching_seconds"):
        lines.append(f"  {watching.told(watched, median(row, step.name_of('none')))}")
    return "\n".join(lines)


def _title(row: dict[str, Any]) -> str:
    if row["what"] == "data":
        return f"data of {data.input_of(row)} on {row['device']}, batch {row['batch']}"
    return ", ".join([f"{row['what']} of {row['model']} on {row['device']}", *conditions(row)])


def conditions(row: dict[str, Any]) -> list[str]:
    """What a row of a step, forward or training was measured with, besides the model; older rows leave some out."""
    words = [f"batch {row['batch']}"]
    words += [f"{row['image_size']} px"] if "image_size" in row else []
    words += [row.get("precision", "fp32")]
    words += [f"teacher {row['teacher']}"] if row.get("teacher") else []
    words += ["EMA"] if row.get("ema") else []
    return words + ([f"input of {data.input_of(row)}"] if row["what"] == "train" else [])


def _speed(row: dict[str, Any], name: str) -> str:
    text = f"{row['images'] / median(row, name):10.2f} images/s"
    if row["what"] == "data":
        text += f" ({row['images'] / median(row, name, 'cpu_seconds'):.2f} per CPU-second)"
    if row["what"] == "data" and name in row["decoder_share"]:
        share, of_cpu = row["decoder_share"][name], row["decoder_cpu_share"][name]
        text += f"; the decoder alone takes {share:.1%} of its time ({of_cpu:.1%} of its CPU time)"
    if (still := train.resident_of(name, row)) is not None:
        share, (low, high) = median(row, still) / median(row, name), by_round(row, still, name)
        text += f", {share:.1%} of its speed without input (by round {low:.1%} to {high:.1%})"
    if (share := mfu(row, name)) is not None:
        text += f", {share:.1%} of the matrix rate"
    if (peak := row.get("peak_bytes", {}).get(name)) is not None:
        text += f", {peak / 2**30:.2f} GiB"
    if name in row["ratio"]:
        ours = compared_to(name, row)
        low, high = by_round(row, name, ours)
        text += f"; {ours} is {row['ratio'][name]:.3f} times as fast (by round {low:.3f} to {high:.3f}"
        text += f", in CPU time {row['cpu_ratio'][name]:.3f})" if row["device"] == "cpu" else ")"
    return text


def mfu(row: dict[str, Any], name: str) -> float | None:
    """FLOPs of the side's own count over its median time, as a share of the matrix rate of the same rounds."""
    rate = row.get("matrix_flops_per_s")
    return row["flops"][name] / median(row, name) / rate if rate else None


def by_round(row: dict[str, Any], name: str, other: str, of: str = "seconds") -> tuple[float, float]:
    """Least and largest ratio of the times of `name` and `other` in a round."""
    ratios = [theirs / mine for mine, theirs in zip(row[of][other], row[of][name], strict=True)]
    return min(ratios), max(ratios)
