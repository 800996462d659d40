"""Exact evaluation: every held-out image is counted once, on any number of processes."""

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import nn

from fastdeit.batch import Batch
from fastdeit.data.loader import EvalLoader
from fastdeit.engine.dist import World
from fastdeit.engine.dist import world as join_world
from fastdeit.engine.progress import table
from fastdeit.engine.step import autocast
from fastdeit.errors import UsageError
from fastdeit.methods.evaluators import Evaluation, Evaluator
from fastdeit.methods.teacher import DeferredTeacher, TeacherConfig
from fastdeit.recipe import resolve as recipes
from fastdeit.run import build
from fastdeit.run.weights import open_weights


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
    batches: int | None = None,
) -> Result:
    """Run `evaluators` one after the other on `method`, which is in eval mode. Call it on every process.

    batches  how many batches of each loader are looked at, at most: one tells the metrics' names; None for all

    `training` makes the loader of the training images, which few evaluators ask for. Images that cannot be decoded are
    left out and counted. Raises ValueError if two evaluators have a metric of the same name.
    """

    def moved(loader: EvalLoader) -> Iterator[Batch]:
        for batch in islice(loader.batches(), batches):
            yield batch.to(world.device)

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
        found = evaluator(evaluation)
        if twice := metrics.keys() & found.keys():
            raise ValueError(f"evaluator {name!r} returns the metric {min(twice)!r}, which an earlier one has, too")
        metrics |= found
        lower |= found.keys() if evaluator.lower_is_better else set()
    bad = len(held_out.bad.reasons)
    images, bad = world.sum(torch.tensor([held_out.share - bad, bad], device=world.device)).tolist()
    return Result(images, bad, metrics, frozenset(lower))


def main(args: argparse.Namespace) -> None:
    """`fastdeit eval`: what the method of a run or a checkpoint reaches on the held-out images of its recipe."""

    def report(path: str | Path, reason: str) -> None:
        print(f"{path}: {reason}", file=sys.stderr)

    opened = open_weights(args.path)
    restored = opened.checkpoint
    if restored is None:
        raise UsageError(f"{args.path} is neither a run nor a checkpoint")
    for note in opened.notes:
        print(note, file=sys.stderr)
    recipe = recipes.override(recipes.Recipe.model_validate(restored.state["recipe"]), args.overrides)
    # The checkpoint holds the weights; the file that training started from need not exist any more.
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"weights": None})})
    with join_world(recipe.engine.device) as world:
        train_source, source = build.sources(recipe)
        student = build.model(recipe, len(source.classes), lambda text: None)
        classes, trained = len(source.classes), restored.path.parent.parent / "teacher"

        def teacher(config: TeacherConfig) -> DeferredTeacher:
            options = build.image_size(recipe), classes, trained, recipe.engine.precision
            return DeferredTeacher(lambda: build.teacher(config, *options, classes=source.classes).to(world.device))

        method = build.method(recipe, student, classes, restored.state["steps"], teacher).to(world.device)
        known = {phase.name: phase for phase in method.phases()}
        if restored.state["record"]["phase"] in known:
            # What a method computes may depend on its phase, its own loss above all.
            method.on_phase(known[restored.state["record"]["phase"]])
        loader = build.eval_loader(recipe, source, world, method.noise(), report)
        results = {}
        weights = {"": {f"model.{name}": tensor for name, tensor in restored.tensors["model"].items()}}
        if "ema" in restored.tensors:
            weights["_ema"] = restored.tensors["ema"]
        for kind, tensors in weights.items():
            method.load_state_dict(method.state_dict() | restored.tensors["method"] | tensors)
            method.eval()
            results[kind] = evaluate(
                method,
                method.evaluators(),
                loader,
                lambda: build.eval_loader(recipe, train_source, world, {}, report),
                world,
                recipe.engine.precision,
            )
        if world.main:
            height, width = build.image_size(recipe)
            print(
                f"{restored.path}, step {restored.step}: {results[''].images:,} images ({results[''].bad} unreadable) "
                f"at {height}x{width} pixels, crop ratio {recipe.data.eval_crop_ratio:g}"
            )
            table(metric_rows(recipe, named_metrics(results)))


def named_metrics(results: Mapping[str, Result]) -> dict[str, float]:
    """The metrics of the weights (""), and those of their averages ("_ema") with that at the end of their names."""
    return {f"{name}{kind}": value for kind, result in results.items() for name, value in result.metrics.items()}


def metric_rows(recipe: "recipes.Recipe", metrics: Mapping[str, float]) -> list[tuple[str, str]]:
    """Rows of a table for a person: what was measured, and the value. Accuracy among the first five is left out."""
    fuse = getattr(recipe.method, "fuse", "softmax")
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
