"""Exact evaluation: every held-out image is counted once, on any number of processes."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import nn

from fastdeit.batch import Batch, Step
from fastdeit.data.loader import EvalLoader
from fastdeit.engine import buffers
from fastdeit.engine.dist import World
from fastdeit.engine.step import autocast
from fastdeit.methods.evaluators import Evaluation, Evaluator
from fastdeit.recipe import resolve as recipes


@dataclass(frozen=True)
class Result:
    """What the evaluators of a method found.

    images, bad  held-out images that were used, and that could not be read
    metrics      by name, in the order of the evaluators
    lower        names of the metrics of which the lower is the better
    """

    images: int
    bad: int
    metrics: dict[str, float]
    lower: frozenset[str]


@torch.no_grad()
def evaluate(
    method: nn.Module,
    evaluators: Mapping[str, Evaluator],
    held_out: EvalLoader,
    training: Callable[[], EvalLoader],
    world: World,
    precision: str,
    step: Step | None = None,
    batches: int | None = None,
) -> Result:
    """Run `evaluators` one after the other on `method`, which is in eval mode. Call it on every process.

    step     where the weights stand in their run (`judged_at`); None where they are of none: the first step of a run
    batches  how many batches of each loader are looked at, at most: one tells the metrics' names; None for all

    `training` makes the loader of the training images, which few evaluators ask for. Images that cannot be decoded are
    left out and counted; DataError where all processes together met too many. Raises ValueError if two evaluators have
    a metric of the same name.
    """

    def moved(loader: EvalLoader) -> Iterator[Batch]:
        for batch in islice(loader.batches(), batches):
            world.at("an evaluation", patient=True)
            yield (batch if step is None else replace(batch, step=step)).to(world.device)

    evaluation = Evaluation(
        method,
        held_out=lambda: moved(held_out),
        training=lambda: moved(training()),
        autocast=lambda: autocast(world.device, precision),
        processes=world,
    )
    metrics: dict[str, float] = {}
    lower: set[str] = set()
    for name, evaluator in evaluators.items():
        with buffers.kept(method):  # a method's forward may move its own, which training goes on with
            found = evaluator(evaluation)
        if twice := metrics.keys() & found.keys():
            raise ValueError(f"evaluator {name!r} returns the metric {min(twice)!r}, which an earlier one has, too")
        metrics |= found
        lower |= found.keys() if evaluator.lower_is_better else set()
    bad = len(held_out.bad.reasons)
    images, bad = world.sum(torch.tensor([held_out.share - bad, bad], device=world.device)).tolist()
    held_out.bad.check(bad)  # where the processes have no list in common, each has counted its own share alone
    return Result(images, bad, metrics, frozenset(lower))


def judged_at(step: int, steps_per_epoch: int, total: int) -> Step:
    """The step whose schedules an evaluation after `step` steps of a run is judged by: the last that was made."""
    return Step.at(max(step - 1, 0), steps_per_epoch, total)


def named_metrics(results: Mapping[str, Result]) -> dict[str, float]:
    """The metrics of the weights (""), and those of their averages ("_ema") with that at the end of their names."""
    return {f"{name}{kind}": value for kind, result in results.items() for name, value in result.metrics.items()}


def metric_rows(recipe: recipes.Recipe, metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """Rows of a table for a person: what was measured, and the value. Accuracy among the first five is left out."""
    fuse = recipe.method.fuse
    fused = {"softmax": "sum of softmaxes", "logit": "mean of logits"}.get(fuse, f"{fuse} head alone")
    titles = {"fused": f"fused heads ({fused})", "class": "class head", "distillation": "distillation head"}
    rows = []
    for key, value in metrics.items():
        name = key.removesuffix("_ema")
        averaged = ", averaged weights" if key.endswith("_ema") else ""
        if name.startswith("top1_"):
            head = name.removeprefix("top1_")
            rows.append((f"top-1 {titles.get(head, head)}{averaged}", f"{value:.2f} %"))
        elif name.endswith("_top1"):
            rows.append((f"{name.removesuffix('_top1')} top-1{averaged}", f"{value:.2f} %"))
        elif not name.startswith("top5_"):
            rows.append((f"{name.replace('_', ' ')}{averaged}", f"{value:.4g}"))
    return rows
