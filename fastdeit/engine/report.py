"""Pictures of runs: loss, held-out accuracy and learning rate over the epochs, drawn from metrics.jsonl."""

import itertools
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastdeit import jsons
from fastdeit.engine import _fault, metrics
from fastdeit.text import for_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TEACHER = "teacher_top1"
_SMOOTH_FROM = 50
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_GREY = "#767676"

Series = tuple[list[float], list[float]]


def curves(metrics_path: Path, out_path: Path) -> None:
    """Draw `out_path` (PNG) from `metrics_path`: a panel each for training loss, top-1 and learning rate.

    Reads `loss` and `lr` of records of kind "train" and every `top1_*` (percent) of kind "eval", against `epoch`, and
    the last `teacher_top1` of any record, which becomes a level beside the heads. What no record holds gets no panel or
    line. Of several records of a step the last counts.
    Raises metrics.MetricsError if nothing can be drawn.
    """
    records = metrics.read(Path(metrics_path))
    train, evaluations = _of_kind(records, "train"), _of_kind(records, "eval")
    heads = dict.fromkeys(key for record in evaluations for key in record if key.startswith("top1_"))
    accuracy = {head: series for head in heads if (series := _series(evaluations, head))}
    levels = [record[_TEACHER] for record in records if _is_finite(record.get(_TEACHER))]
    loss, rate = _series(train, "loss"), _series(train, "lr")
    panels = (
        (1.0, loss, _draw_loss),
        (1.0, accuracy, partial(_draw_accuracy, teacher=levels[-1] if levels else None)),
        (0.55, rate, _draw_rate),
    )
    if not (loss or accuracy or rate):
        raise metrics.MetricsError(f"{metrics_path} holds no loss, top1_* or lr to draw")
    _draw(panels, max(record["epoch"] for record in (*train, *evaluations)), Path(out_path))


def compare(logs: Mapping[str, Path], out_path: Path) -> None:
    """Draw `out_path` (PNG) from the metrics.jsonl of several runs, by the names they have in the legend.

    A panel each for training loss, the first metric of the evaluations, and learning rate, with a line for each run
    that has it. Raises metrics.MetricsError if nothing can be drawn.
    """
    loss, judged, rate = {}, {}, {}
    names: dict[str, None] = {}
    span = 0.0
    for run, path in logs.items():
        records = metrics.read(Path(path))
        train, evaluations = _of_kind(records, "train"), _of_kind(records, "eval")
        span = max([span, *(record["epoch"] for record in (*train, *evaluations))])
        name = next((key for record in evaluations for key in record if key not in metrics.NOT_MEASURED), "")
        found = (loss, _series(train, "loss")), (judged, _series(evaluations, name)), (rate, _series(train, "lr"))
        for lines, series in found:
            if series is not None:
                lines[run] = series
        if run in judged:
            names[name] = None
    panels = (
        (1.0, loss, partial(_draw_runs, title="training loss")),
        (1.0, judged, partial(_draw_runs, title="held-out " + " or ".join(map(for_picture, names)))),
        (0.55, rate, partial(_draw_runs, title="learning rate")),
    )
    if not (loss or judged or rate):
        raise metrics.MetricsError(f"{', '.join(logs)}: there is no loss, evaluation or lr to draw yet")
    _draw(panels, span, Path(out_path))


def _draw(panels: Iterable[tuple[float, Any, Callable[["Axes", Any], None]]], span: float, out_path: Path) -> None:
    """Write a PNG of panels, from the top, over `span` epochs. A panel is its relative height, its data, and what draws
    them; one without data is left out."""
    from matplotlib.figure import Figure

    panels = [panel for panel in panels if panel[1]]
    heights = [height for height, _, _ in panels]
    figure = Figure(figsize=(9, 0.6 + 2.7 * sum(heights)), dpi=130, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
    all_axes = figure.subplots(len(panels), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (_, data, draw) in zip(all_axes, panels, strict=True):
        draw(axes, data)
        axes.grid(color="#e5e5e5", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0, frameon=False)
    all_axes[-1].set_xlim(-0.02 * (span or 1), 1.02 * (span or 1))
    all_axes[-1].set_xlabel("epoch")
    figure.align_ylabels()
    write_png(figure, out_path)


def write_png(figure: "Figure", path: Path, **options: Any) -> None:
    """Write a picture in one step: who opens the file meanwhile has the old or the new one, whole. Raises OSError.

    options  of matplotlib's `print_png`
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    temporary = path.with_name(f".tmp-{path.name}")
    _fault.point(f"write {path.name}")
    FigureCanvasAgg(figure).print_png(temporary, **options)
    os.replace(temporary, path)


def _of_kind(records: Sequence[Mapping[str, Any]], kind: str) -> list[Mapping[str, Any]]:
    """Records of one kind by ascending step; a log that was not cut on resume holds some steps twice."""
    by_step = {record["step"]: record for record in records if record.get("kind") == kind and "epoch" in record}
    return [by_step[step] for step in sorted(by_step)]


def _series(records: Sequence[Mapping[str, Any]], key: str) -> Series | None:
    """(epochs, values) of the records that hold a finite number under `key`."""
    points = [(record["epoch"], record[key]) for record in records if _is_finite(record.get(key))]
    return ([x for x, _ in points], [y for _, y in points]) if points else None


def _is_finite(value: Any) -> bool:
    return jsons.is_number(value) and math.isfinite(value)


def _draw_loss(axes: "Axes", data: Series) -> None:
    epochs, values = data
    label = f"training loss\nlast {values[-1]:.4f}"
    if len(values) < _SMOOTH_FROM:
        axes.plot(epochs, values, color=_COLOURS[0], label=label, **_marks(values))
    else:
        means = _smooth(values)
        axes.plot(epochs, values, color=_COLOURS[0], alpha=0.3, linewidth=0.8, label="training loss")
        axes.plot(epochs, means, color=_COLOURS[0], label=f"smoothed\nlast {means[-1]:.4f}")
    axes.set_ylabel("training loss")


def _draw_accuracy(axes: "Axes", data: Mapping[str, Series], teacher: float | None) -> None:
    for index, (head, (epochs, values)) in enumerate(data.items()):
        label = f"{for_picture(head.removeprefix('top1_'))}\nbest {max(values):.2f}, last {values[-1]:.2f}"
        # The first head is the method's answer: it lies on top.
        style = {"color": _COLOURS[index % len(_COLOURS)], "zorder": 3 - index / len(data)}
        axes.plot(epochs, values, label=label, **style, **_marks(values))
    if teacher is not None:
        axes.axhline(teacher, color=_GREY, linestyle="--", linewidth=1.2, label=f"teacher\n{teacher:.2f}")
    axes.set_ylabel("held-out top-1 (%)")


def _draw_rate(axes: "Axes", data: Series) -> None:
    epochs, values = data
    axes.plot(epochs, values, color=_GREY, label=f"learning rate\npeak {max(values):.2e}", **_marks(values))
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    axes.set_ylabel("learning rate")


def _draw_runs(axes: "Axes", lines: Mapping[str, Series], title: str) -> None:
    for index, (run, (epochs, values)) in enumerate(lines.items()):
        smooth = _smooth(values) if len(values) >= _SMOOTH_FROM else values
        label = f"{for_picture(run)}\nlast {smooth[-1]:.4g}"
        axes.plot(epochs, smooth, color=_COLOURS[index % len(_COLOURS)], label=label, **_marks(values))
    axes.set_ylabel(title)


def _marks(values: Sequence[float]) -> dict[str, Any]:
    """Markers where there are few points: a single one would not show as a line."""
    return {"linewidth": 1.6, "marker": "o" if len(values) <= 30 else "", "markersize": 4}


def _smooth(values: Sequence[float]) -> list[float]:
    """Mean over about 2 % of the points around each (at least 11), over as many as there are near the ends."""
    half = max(5, len(values) // 100)
    sums = [0.0, *itertools.accumulate(values)]
    bounds = [(max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values))]
    return [(sums[stop] - sums[start]) / (stop - start) for start, stop in bounds]
