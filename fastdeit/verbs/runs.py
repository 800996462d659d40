"""`fastdeit runs list`, `runs diff` and `runs curves`: runs side by side."""

import argparse
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastdeit.engine import report
from fastdeit.engine.metrics import MetricsError
from fastdeit.engine.progress import table
from fastdeit.errors import UsageError
from fastdeit.recipe.sections import flat
from fastdeit.run import overview
from fastdeit.run.overview import Overview
from fastdeit.text import one_line

_AGES = (("d", 86_400), ("h", 3600), ("min", 60))


def show_list(args: argparse.Namespace) -> None:
    """Print a table of the runs in `args.folder`."""
    runs = list(overview.all_in(Path(args.folder)))
    if not runs:
        print(one_line(f"there is no run in {args.folder}"))
        return
    table([_row(run) for run in runs], ("run", "model", "epoch", "step", "best", "state", "age"))


def _row(run: Overview) -> tuple[str, ...]:
    return (
        run.path.name,
        run.model,
        f"{run.epoch:.4g} of {run.epochs or '?'}" if run.steps is None else f"{run.epoch:.4g}",
        f"{run.step:,}" if run.steps is None else f"{run.step:,} of {run.steps:,}",
        _best(run),
        run.state,
        age(run.seconds),
    )


def _best(run: Overview) -> str:
    """The best value of the metric that the run is judged by; before its end, of the first one that it measures."""
    if run.best is not None:
        return "{} {:.4g}".format(*run.best)
    name = next(iter(run.metrics), None)
    if name is None:
        return "-"
    return f"{name} {run.metrics[name]:.4g} (last)"


def age(seconds: float) -> str:
    """A time in its largest unit: "3 d", "5 h", "12 min", "now"."""
    return next((f"{seconds // length:.0f} {unit}" for unit, length in _AGES if seconds >= length), "now")


def show_diff(args: argparse.Namespace) -> None:
    """Print where the recipes of two runs differ, and what both have measured."""
    a, b = (overview.read(overview.find(name)) for name in (args.a, args.b))
    names = a.path.name, b.path.name
    fields = list(_different(fields_of(a.recipe), fields_of(b.recipe)))
    if fields:
        table(fields, ("field", *names))
    else:
        print("the recipes are the same")
    print()
    both = dict.fromkeys([*a.metrics, *b.metrics])
    rows = [(name, *(_number(run.metrics.get(name)) for run in (a, b)), _gain(name, a, b)) for name in both]
    rows += [("steps", f"{a.step:,}", f"{b.step:,}", ""), ("state", a.state, b.state, "")]
    table(rows, ("measured last", *names, "difference"))


def fields_of(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """By dotted name the fields of a recipe as its file has it, without `about`."""
    return {field: value for field, value in flat(recipe) if not field.startswith("about.")}


def _different(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """(field, value in a, value in b); `-` where there is no such field."""
    for field in dict.fromkeys([*a, *b]):
        if field not in a or field not in b or a[field] != b[field]:
            yield field, *(_text(recipe[field]) if field in recipe else "-" for recipe in (a, b))


def _text(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.5g}"


def _gain(name: str, a: Overview, b: Overview) -> str:
    values = [run.metrics.get(name) for run in (a, b)]
    return "" if None in values else f"{values[1] - values[0]:+.4g}"


def show_curves(args: argparse.Namespace) -> None:
    """Draw the runs of `args.runs` into one picture, `args.out`."""
    out = Path(args.out)
    if out.suffix != ".png":
        raise UsageError(f"--out {args.out}: the picture is a PNG; give a name that ends in .png")
    if not out.parent.is_dir():
        raise UsageError(f"--out {args.out}: there is no folder {out.parent}")
    paths = [overview.find(name) for name in args.runs]
    names = [path.name for path in paths]
    labels = [str(path) if names.count(path.name) > 1 else path.name for path in paths]
    logs = {label: path / overview.LOG for label, path in zip(labels, paths, strict=True)}
    missing = [label for label, log in logs.items() if not log.is_file()]
    if missing:
        raise UsageError(f"{', '.join(missing)}: there is no {overview.LOG} yet, so there is nothing to draw")
    try:
        report.compare(logs, out)
    except MetricsError as error:
        raise UsageError(str(error)) from error
    print(one_line(f"picture in {out}"))
