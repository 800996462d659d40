"""`fastdeit bench report`: what the rows of the benchmarks say, as Markdown tables and one picture.

Of several rows of the same cell on the same device the newest counts. Everything shown is computed from the seconds of
the rounds; nothing is known here of any result.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fastdeit.bench import cells as bench_cells
from fastdeit.bench import data, train
from fastdeit.bench.measure import median
from fastdeit.engine.report import write_png
from fastdeit.errors import UsageError
from fastdeit.estimate import rows as estimate_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, Any]

PICTURE = "benchmarks.png"
_NEEDED = {
    "step": ("model", "batch"),
    "forward": ("model", "batch", "image_size"),
    "train": ("model", "batch", "recipe"),
    "data": ("recipe", "batch", "work"),
    "kernel": ("op", "model", "batch", "dtype", "bytes", "copy_bytes"),
    "calibrate": ("part", "model", "batch", "flops", "bytes"),
}
"""Fields of each kind of row, beside those of all: without them it is older than the report can read."""
_OF_ALL = ("seconds", "device", "environment")
_DRAWN = ("step", "forward", "train", "data")
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_MARKERS = "osD^v"


class Comparison(NamedTuple):
    """How many times as fast our side was as the peer: by medians, and in the worst and best round."""

    ours: str
    peer: str
    ratio: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.ratio:.2f} ({self.low:.2f} to {self.high:.2f})"


def main(files: Sequence[str] | None, folder: str) -> None:
    """Print the tables of these files, by default of all in benchmarks/results, and draw the picture in `folder`."""
    paths = [Path(name) for name in files] if files else sorted(estimate_rows.RESULTS.glob("*.jsonl"))
    if not paths:
        raise UsageError(f"there are no rows in {estimate_rows.RESULTS}; name files with --results FILE")
    rows, skipped = read(paths)
    print("\n".join(tables(rows)))
    for why, count in skipped.items():
        print(f"\n{count} rows left out: {why}")
    if any(row["what"] in _DRAWN and comparisons(row) for row in rows):
        picture = Path(folder) / PICTURE
        draw(rows, picture)
        print(f"\npicture in {picture}")


# ---- rows ------------------------------------------------------------------------------------------------------------


def read(paths: Sequence[Path]) -> tuple[list[Row], Counter[str]]:
    """(the newest row of each cell and device, how many others were left out and why). UsageError for what is no file
    of rows."""
    newest: dict[tuple[str, str, str], Row] = {}
    skipped: Counter[str] = Counter()
    for path in paths:
        for row in estimate_rows.lines(path):
            why = _unreadable(row)
            if why is not None:
                skipped[why] += 1
                continue
            key = device(row), row["what"], cell(row)
            older = newest.get(key)
            if older is not None:
                skipped["a newer row of the same cell is there"] += 1
            if older is None or row["environment"].get("time", "") >= older["environment"].get("time", ""):
                newest[key] = row
    return list(newest.values()), skipped


def _unreadable(row: Row) -> str | None:
    what = row.get("what")
    if what not in _NEEDED:
        return f"rows of {what!r} are not known"
    missing = [name for name in (*_OF_ALL, *_NEEDED[what]) if name not in row]
    if missing:
        return f"older rows of {what}, without {', '.join(missing)}"
    return None if estimate_rows.sound(row) else f"damaged rows of {what}"


def device(row: Row) -> str:
    """The card, or the processor with its cores."""
    found = row["environment"]
    if row["device"] == "cuda":
        return found["gpus"][0]["name"]
    processor = found.get("processor", {})
    return f"CPU ({processor.get('model') or 'unknown'}, {processor.get('cores', '?')} cores)"


def cell(row: Row) -> str:
    """What was measured, in words; what an older row does not say is left out."""
    if row["what"] == "calibrate":
        return f"{row['part']}, {row['model']}, batch {row['batch']}, {row['precision']}"
    if row["what"] == "kernel":
        return f"{row['op']}, {row['model']}, batch {row['batch']}, {row['dtype']}"
    if row["what"] == "data":
        return f"{data.input_of(row)}, batch {row['batch']}, {row.get('threads', '?')} threads"
    words = [row["model"], *bench_cells.conditions(row)]
    if row["device"] == "cpu" and "threads" in row:
        words.append("1 thread" if row["threads"] == 1 else f"{row['threads']} threads")
    return ", ".join(words)


def comparisons(row: Row, of: str = "seconds") -> list[Comparison]:
    """Every side of ours against every peer that did the same, by the clock or by `cpu_seconds`; the least flattering
    first."""
    sides = [name for name in row["seconds"] if row["what"] != "train" or not name.endswith(train.RESIDENT)]
    ours = [name for name in sides if name.startswith("fastdeit")]
    found = []
    for peer in (name for name in sides if name not in ours):
        mine = [bench_cells.compared_to(peer, row)] if row["what"] == "data" else ours
        for own in mine:
            if own in sides:
                ratio = median(row, peer, of) / median(row, own, of)
                found.append(Comparison(own, peer, ratio, *bench_cells.by_round(row, peer, own, of)))
    return sorted(found, key=lambda item: item.ratio)


# ---- tables ----------------------------------------------------------------------------------------------------------


def tables(rows: Sequence[Row]) -> Iterator[str]:
    """Lines of Markdown: a table for each device and kind of row, and what could not run."""
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[device(row), row["what"]].append(row)
    for (where, what), group in sorted(groups.items()):
        yield f"\n## {what} on {where}\n"
        if group[0]["device"] == "cpu":
            yield f"{bench_cells.CPU_NOTE}\n"
        columns = _COLUMNS[what]
        yield f"| cell | side | {' | '.join(columns)} | slowest / fastest round | code |"
        yield "|---" * (len(columns) + 4) + "|"
        for row in sorted(group, key=cell):
            for name in bench_cells.told(row):
                seconds = row["seconds"][name]
                cells = [cell(row), name, *(tell(row, name) for tell in columns.values())]
                cells += [f"{max(seconds) / min(seconds):.2f}", row["environment"]["fastdeit"]["code"] or "?"]
                yield f"| {' | '.join(cells)} |"
        reasons = Counter((name, why) for row in group for name, why in row.get("failed", {}).items())
        yield from (f"\n{name} cannot run in {count} of these cells: {why}" for (name, why), count in reasons.items())


def _images(row: Row, name: str, of: str = "seconds") -> str:
    return f"{row['images'] / median(row, name, of):.1f}" if of in row else ""


def _against(row: Row, name: str, of: str = "seconds") -> str:
    """Of a peer's line: how many times as fast each of ours was."""
    found = [item for item in comparisons(row, of) if item.peer == name]
    return "; ".join(f"{item}" if len(found) == 1 else f"{item.ours} {item}" for item in found)


def _in_cpu_time(row: Row, name: str) -> str:
    """The same in CPU time, which a busy machine disturbs least. Beside a GPU it is that of the host alone."""
    return _against(row, name, "cpu_seconds") if row["device"] == "cpu" and "cpu_seconds" in row else ""


def _decoders_share(row: Row, name: str) -> str:
    """Of the CPU time of our side; older rows do not say it."""
    share = row.get("decoder_cpu_share", {}).get(name)
    return "" if share is None else f"{share:.1%}"


def _share(row: Row, name: str) -> str:
    share = bench_cells.mfu(row, name)
    return "" if share is None else f"{share:.1%}"


def _without_input(row: Row, name: str) -> str:
    still = train.resident_of(name, row)
    return "" if still is None else f"{median(row, still) / median(row, name):.1%}"


def _peak(row: Row, name: str) -> str:
    peak = row.get("peak_bytes", {}).get(name)
    return "" if peak is None else f"{peak / 2**30:.2f}"


def _rate(row: Row, name: str, of: str, unit: float) -> str:
    amount = row[of].get(name)
    return "" if amount is None else f"{amount / median(row, name) / unit:.4g}"


def _micro(row: Row, name: str) -> str:
    return f"{1e6 * median(row, name):.1f}"


def _of_copy(row: Row, name: str) -> str:
    """Share of the bandwidth of the copy in the same rounds."""
    if name == "copy" or "copy" not in row["seconds"]:
        return ""
    return f"{row['bytes'] / median(row, name) / (row['copy_bytes'] / median(row, 'copy')):.1%}"


Tell = Callable[[Row, str], str]
_STEP: dict[str, Tell] = {
    "images/s": _images,
    "ours is so many times as fast": _against,
    "in CPU time": _in_cpu_time,
    "MFU": _share,
    "peak GiB": _peak,
}
_COLUMNS: dict[str, dict[str, Tell]] = {
    "step": _STEP,
    "forward": _STEP,
    "train": {
        "images/s": _images,
        "of its speed without input": _without_input,
        "ours is so many times as fast": _against,
        "in CPU time": _in_cpu_time,
    },
    "data": {
        "images/s": _images,
        "ours is so many times as fast": _against,
        "images per CPU-second": lambda row, name: _images(row, name, "cpu_seconds"),
        "of its CPU time the decoder": _decoders_share,
    },
    "kernel": {"us": _micro, "of a copy": _of_copy},
    "calibrate": {
        "us": _micro,
        "TFLOP/s": lambda row, name: _rate(row, name, "flops", 1e12),
        "GB/s": lambda row, name: _rate(row, name, "bytes", 1e9),
    },
}


# ---- the picture -----------------------------------------------------------------------------------------------------


def draw(rows: Sequence[Row], path: Path) -> None:
    """A PNG with a panel for each device and kind: our speed as a multiple of each peer's, the rounds as a range."""
    from matplotlib.figure import Figure

    panels: dict[tuple[str, str], dict[str, list[Comparison]]] = defaultdict(dict)
    for row in sorted(rows, key=cell):
        if row["what"] in _DRAWN and (found := comparisons(row)):
            panels[device(row), row["what"]][cell(row)] = found
    heights = [1.2 + 0.28 * sum(len(found) + 1 for found in cells.values()) for cells in panels.values()]
    figure = Figure(figsize=(11, sum(heights)), dpi=110, layout="constrained")
    all_axes = figure.subplots(len(panels), squeeze=False, height_ratios=heights)[:, 0]
    for axes, ((where, what), cells) in zip(all_axes, sorted(panels.items()), strict=True):
        _panel(axes, cells)
        note = f"\n{bench_cells.CPU_NOTE}" if where.startswith("CPU") else ""
        axes.set_title(f"{what} on {where}{note}", fontsize=10, loc="left")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_png(figure, path)
    except OSError as error:
        raise UsageError(f"--report {path.parent} cannot be written: {error.strerror}") from error


def _panel(axes: "Axes", cells: dict[str, list[Comparison]]) -> None:
    found = [item for items in cells.values() for item in items]
    peers = list(dict.fromkeys(item.peer for item in found))
    ours = list(dict.fromkeys(item.ours for item in found))
    heights, labels, height = [], [], 0.0
    for name, items in cells.items():
        heights.append(height)
        labels.append(name)
        for item in items:
            height -= 1
            colour = _COLOURS[peers.index(item.peer) % len(_COLOURS)]
            axes.plot([item.low, item.high], [height, height], color=colour, linewidth=1.5, alpha=0.6)
            marker = _MARKERS[ours.index(item.ours) % len(_MARKERS)]
            label = f"{item.ours} against {item.peer}"
            axes.plot(item.ratio, height, marker, color=colour, markersize=6, linestyle="", label=label)
            heights.append(height)
            labels.append(f"against {item.peer}")
        height -= 1
    axes.axvline(1.0, color="#444444", linewidth=1)
    axes.set_yticks(heights, labels, fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(height + 0.5, 0.8)
    axes.set_xlabel("our speed as a multiple of the peer's (median; line: rounds)", fontsize=8)
    axes.grid(axis="x", color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    if len(ours) > 1:
        unique = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        axes.legend(unique.values(), unique.keys(), loc="best", fontsize=7, frameon=False)
