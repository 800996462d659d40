"""The picture of an experiment: a panel for each metric, in it a mean with its interval for each variant, and a dot for
each seed."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastdeit.engine.report import write_png
from fastdeit.experiments.experiment import Experiment, Term
from fastdeit.experiments.rows import Row
from fastdeit.experiments.statistics import interval, values

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLOUR, _SEED_COLOUR = "#0072b2", "#d55e00"
_ACROSS = 2


def draw(experiment: Experiment, rows: Sequence[Row], path: Path) -> None:
    """Write the PNG to `path`, in one step."""
    from matplotlib.figure import Figure

    measured = {
        name: title
        for name, title in experiment.metrics.items()
        if any(values(rows, Term(variant.name, name)) for variant in experiment.variants)
    }
    down = -(-len(measured) // _ACROSS)
    height = 0.9 + 0.32 * len(experiment.variants)
    figure = Figure(figsize=(10, height * down), dpi=110, layout="constrained")
    all_axes = list(figure.subplots(down, _ACROSS, squeeze=False).flat)
    for axes, (metric, title) in zip(all_axes, measured.items(), strict=False):
        panel(axes, experiment, rows, metric)
        axes.set_title(title, fontsize=9, loc="left")
    for axes in all_axes[len(measured) :]:
        axes.set_visible(False)
    write_png(figure, path, metadata={"Software": None})


def panel(axes: "Axes", experiment: Experiment, rows: Sequence[Row], metric: str) -> None:
    """One metric: the variants that have it, the first at the top."""
    found = {variant.name: values(rows, Term(variant.name, metric)) for variant in experiment.variants}
    found = {name: by_seed for name, by_seed in found.items() if by_seed}
    for height, by_seed in enumerate(found.values()):
        mean = interval(list(by_seed.values()))
        if mean.low is not None and mean.high is not None:
            axes.plot([mean.low, mean.high], [-height, -height], color=_COLOUR, linewidth=2, alpha=0.6)
        axes.plot(list(by_seed.values()), [-height] * len(by_seed), ".", color=_SEED_COLOUR, markersize=5)
        axes.plot(mean.mean, -height, "o", color=_COLOUR, markersize=6)
    axes.set_yticks([-height for height in range(len(found))], list(found), fontsize=8)
    axes.set_ylim(-len(found) + 0.4, 0.6)
    axes.tick_params(axis="x", labelsize=7)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color="#e5e5e5", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
