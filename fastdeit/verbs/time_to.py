"""`fastdeit runs time`: how long a run took until an evaluation reached a target (docs/time_to_accuracy.md)."""

import argparse
import json
from collections.abc import Mapping, Sequence
from typing import Any

from fastdeit import jsons
from fastdeit.errors import UsageError
from fastdeit.recipe import resolve as recipes
from fastdeit.run import overview
from fastdeit.run.overview import Overview
from fastdeit.text import did_you_mean
from fastdeit.verbs.runs import fields_of

REFERENCE = "vit_small_90"
"""The recipe of the protocol, which a row's recipe is compared with."""


def main(args: argparse.Namespace) -> None:
    """Print the row of the run `args.run` as one line of JSON."""
    print(json.dumps(row(overview.read(overview.find(args.run)), args.metric, args.target)))


def row(run: Overview, metric: str, target: float) -> dict[str, Any]:
    """The row of a run: its first evaluation whose `metric` is at least `target`, or at most, for a loss.

    `seconds`, `reached`, `epoch` and `step` are None where no evaluation has reached it. Raises UsageError where the
    run has no evaluation yet, or none of that metric.
    """
    evaluations = [record for record in run.records if record.get("kind") == "eval"]
    if not evaluations:
        raise UsageError(f"{run.path} has no evaluation yet, so there is nothing that could have reached a target")
    name = _named(metric, list(run.metrics), run)
    if "seconds" not in evaluations[0]:
        raise UsageError(f"{run.path}: its evaluations have no `seconds`; another version of fastdeit has written them")
    lower = name.removesuffix("_ema") in evaluations[-1].get("lower_is_better", ())
    judged = [record for record in evaluations if jsons.is_number(record.get(name))]
    hit = next((each for each in judged if (each[name] <= target if lower else each[name] >= target)), {})
    return {
        "run": str(run.path),
        "seconds": hit.get("seconds"),
        "metric": name,
        "target": target,
        "reached": hit.get(name),
        "epoch": hit.get("epoch"),
        "step": hit.get("step"),
        "paused_seconds": run.summary.get("paused_seconds"),
        "images_per_second": run.summary.get("images_per_second"),
        "data_wait_percent": run.summary.get("data_wait_percent"),
        "recipe": _differences(run.recipe),
        "lineage": run.summary.get("lineage", []),
        "environment": _without_paths(run.environment),
    }


def _named(metric: str, names: Sequence[str], run: Overview) -> str:
    """The metric that is meant: top1 and top5, with or without _ema, are those of the method's answer, the first."""
    answer = next(iter(names), "").partition("_")[2].removesuffix("_ema")
    wanted = {f"{kind}{ema}": f"{kind}_{answer}{ema}" for kind in ("top1", "top5") for ema in ("", "_ema")}
    known = {word: name for word, name in wanted.items() if name in names} | {name: name for name in names}
    if metric not in known:
        there = ", ".join(names) or "none"
        raise UsageError(f"{run.path} has no metric {metric}{did_you_mean(metric, known)}; it has {there}")
    return known[metric]


def _differences(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a run's recipe that are not as in `REFERENCE`; None for one that the run does not have."""
    theirs = fields_of(recipes.load(REFERENCE).model_dump(mode="json", exclude={"name"}))
    ours = {field: value for field, value in fields_of(recipe).items() if field != "name"}
    return {field: mine for field, _, mine in recipes.differing(theirs, ours)}


def _without_paths(environment: Mapping[str, Any]) -> dict[str, Any]:
    """The environment as it may be sent to others: no paths of this machine, and not what its disk has free."""
    told = {name: value for name, value in environment.items() if name != "space"}
    if isinstance(told.get("python"), dict):
        told["python"] = {name: value for name, value in told["python"].items() if name != "executable"}
    return told
