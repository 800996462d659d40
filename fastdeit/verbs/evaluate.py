"""`fastdeit eval`: what weights reach on held-out images, whoever made them."""

import argparse
import csv
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdeit.data.loader import EvalLoader, OnBad
from fastdeit.data.sources.source import Source
from fastdeit.engine import rendezvous
from fastdeit.engine.dist import World
from fastdeit.engine.dist import world as join_world
from fastdeit.engine.progress import table
from fastdeit.errors import FastdeitError, UsageError
from fastdeit.methods.base import Method
from fastdeit.methods.config import TeacherConfig
from fastdeit.methods.evaluators import Classify, Evaluator
from fastdeit.methods.teacher import DeferredTeacher
from fastdeit.recipe.resolve import Recipe
from fastdeit.run import build, teachers, threads
from fastdeit.run.classification import Classification
from fastdeit.run.evaluate import Result, evaluate, judged_at, metric_rows
from fastdeit.run.settings import doubt, settings
from fastdeit.run.subset import Renumbered, is_subset
from fastdeit.run.weights import Weights, average_of, load, open_weights
from fastdeit.text import for_picture, one_line

_SCORES = {
    "softmax": "both heads (mean of softmaxes)",
    "logit": "both heads (mean of logits)",
    "class": "class head",
    "distillation": "distillation head",
}
_COLUMNS = {"top1": "top-1", "top5": "top-5", "loss": "loss", "ece": "calibration error"}
_MOST_CLASSES_DRAWN = 200


@dataclass(frozen=True)
class Found:
    """What one set of weights reaches.

    averaged  whether it is the average of a run's weights
    result    its metrics
    details   of a method that is judged by the answers of its network; None for another
    """

    averaged: bool
    result: Result
    details: Classification | None


def main(args: argparse.Namespace) -> None:
    """`fastdeit eval ADDRESS`: accuracy, loss and calibration on held-out images, of every head and fusion of heads."""
    _refuse_no_folder(args.classes, args.confusion, args.calibration)
    with rendezvous.before(os.environ):
        weights = open_weights(args.address)
        recipe = settings(weights, args.model, args.overrides, args.data)
    with join_world(recipe.engine.device, recipe.engine.timeout_s) as world:
        source = known_classes(weights, build.held_out(recipe), say=world.main)
        found = judge(weights, recipe, source, world, confusion=args.confusion is not None)
        if not world.main:
            return
        if args.json:
            print(json.dumps(_facts(weights, recipe, found), allow_nan=False))
        else:
            _print(weights, recipe, found)
        _write(args, found[0].details, source.classes)


def known_classes(weights: Weights, source: Source, *, say: bool = False) -> Source:
    """`source` with the classes of the weights, where it has some of them: the network may still answer with any.

    Raises UsageError for classes that the weights do not know.
    """
    theirs, ours = weights.known.classes, source.classes
    if theirs is None or not is_subset(theirs, ours, weights.origin):
        return source
    if say:
        told = f"the data have {len(ours)} of the {len(theirs)} classes; an answer may be any of these"
        print(one_line(f"{weights.origin}: {told}"), file=sys.stderr)
    return Renumbered(source, theirs)


def judge(weights: Weights, recipe: Recipe, source: Source, world: World, *, confusion: bool = False) -> list[Found]:
    """What the weights reach on `source`, and what their average does, where there is one. Call it on every process.

    It computes with the threads that the recipe says, or that `threads.fixed` derives, and not with torch's as they are
    set.
    """
    sets = [each for each in (weights, average_of(weights)) if each is not None]
    said: set[str] = set()

    def unreadable(path: str, reason: str) -> None:
        if path not in said:  # each set of weights sees the images anew
            said.add(path)
            print(f"{path}: {reason}", file=sys.stderr)

    own = threads.fixed(recipe, world).engine.threads  # those of the run, so that its number is met to the last bit
    with threads.computing(own):
        return [_judge(each, recipe, source, world, unreadable, confusion=confusion) for each in sets]


def _judge(
    weights: Weights, recipe: Recipe, source: Source, world: World, unreadable: OnBad, *, confusion: bool
) -> Found:
    """What the evaluators of the method find. A method that is judged by its network's answers is judged in detail."""

    def training() -> EvalLoader:
        return build.eval_loader(recipe, known_classes(weights, build.sources(recipe)[0]), world, {}, unreadable)

    method = _method(weights, recipe, source, world)
    details = None
    evaluators: dict[str, Evaluator] = dict(method.evaluators())
    for name, evaluator in evaluators.items():
        if isinstance(evaluator, Classify) and method.answers_with_logits:
            evaluators[name] = details = Classification(method.model, method.config.fuse, confusion=confusion)
    loader = build.eval_loader(recipe, source, world, method.noise(), unreadable)
    step, checkpoint = None, weights.checkpoint
    if checkpoint is not None:
        step = judged_at(checkpoint.step, checkpoint.state["steps_per_epoch"], checkpoint.state["steps"])
    result = evaluate(method, evaluators, loader, training, world, recipe.engine.precision, step)
    return Found(weights.averaged, result, details)


def _method(weights: Weights, recipe: Recipe, source: Source, world: World) -> Method:
    """The method of a run, or supervised training where nothing tells one, around the network of the weights."""
    classes, checkpoint = len(source.classes), weights.checkpoint

    def say(note: str) -> None:
        if world.main:
            print(one_line(f"{weights.origin}: {note}"), file=sys.stderr)

    student = build.model(recipe, classes, say)
    grid = recipe.model.weights_grid
    for note in (*weights.notes, *load(student, weights, purpose="teacher", classes=source.classes, grid=grid)):
        say(note)
    run, folders = Path() if checkpoint is None else checkpoint.path.parent.parent, teachers.folders(recipe.method)

    def teacher(config: TeacherConfig) -> DeferredTeacher:
        trained = run / folders[config] if config in folders else None
        options = build.image_size(recipe), classes, trained, recipe.engine.precision
        return DeferredTeacher(lambda: build.teacher(config, *options, classes=source.classes).to(world.device))

    steps = 1 if checkpoint is None else checkpoint.state["steps"]
    method = build.method(recipe, student, classes, steps, teacher).to(world.device)
    if checkpoint is not None:
        phases = {phase.name: phase for phase in method.phases()}
        if (phase := phases.get(checkpoint.state["record"]["phase"])) is not None:
            # What a method computes may depend on its phase, its own loss above all.
            method.on_phase(phase)
        try:
            method.load_state_dict(method.state_dict() | weights.method)
        except RuntimeError as error:
            why = "; ".join(line.strip() for line in str(error).splitlines()[1:3])
            raise UsageError(f"{weights.origin}: its method does not fit what the overrides ask for: {why}") from error
    elif (note := doubt(weights)) is not None:
        say(note)
    return method.eval()


def _print(weights: Weights, recipe: Recipe, found: Sequence[Found]) -> None:
    height, width = build.image_size(recipe)
    images, bad = found[0].result.images, found[0].result.bad
    print(
        f"{one_line(weights.origin)}: {images:,} images ({bad} unreadable) at {height}x{width} pixels, crop ratio "
        f"{recipe.data.eval_crop_ratio:g}"
    )
    judged: list[tuple[str, ...]] = []
    others: list[tuple[str, str]] = []
    for each in found:
        metrics = dict(each.result.metrics)
        whose = ", averaged weights" if each.averaged else ""
        for name in () if each.details is None else each.details.names:
            values = {measure: metrics.pop(f"{measure}_{name}") for measure in (*_COLUMNS, "nonfinite")}
            title = _SCORES[name] + whose
            judged.append((title, *_cells(values)))
            if values["nonfinite"]:
                others.append((f"scores not finite, counted as wrong: {title}", f"{values['nonfinite']:.0f} images"))
        others += [(f"{title}{whose}", value) for title, value in metric_rows(recipe, metrics)]
    if judged:
        table(judged, header=("", *_COLUMNS.values()))
    if others:
        table(others)


def _cells(values: Mapping[str, float]) -> tuple[str, ...]:
    return f"{values['top1']:.2f} %", f"{values['top5']:.2f} %", f"{values['loss']:.4f}", f"{values['ece']:.2f} %"


def _facts(weights: Weights, recipe: Recipe, found: Sequence[Found]) -> dict[str, Any]:
    """For `--json`: what was evaluated and how, and the metrics of each set of weights, the answer's first."""
    return {
        "weights": weights.origin,
        "model": recipe.model.name or f"timm:{recipe.model.timm}",
        "image_size": list(build.image_size(recipe)),
        "crop_ratio": recipe.data.eval_crop_ratio,
        "precision": recipe.engine.precision,
        "images": found[0].result.images,
        "unreadable": found[0].result.bad,
        "results": [{"averaged": each.averaged, "metrics": _finite(each.result.metrics)} for each in found],
    }


def _finite(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """`metrics` with null where a number is not finite, which JSON cannot say."""
    return {name: value if isfinite(value) else None for name, value in metrics.items()}


# ---- files -----------------------------------------------------------------------------------------------------------


def _refuse_no_folder(*files: str | None) -> None:
    """Raises FastdeitError for a file whose folder is not there, before an evaluation that may take long."""
    for file in files:
        if file is not None and not Path(file).parent.is_dir():
            raise FastdeitError(f"{file}: cannot be written: there is no folder {Path(file).parent}")


def _write(args: argparse.Namespace, details: Classification | None, classes: Sequence[str]) -> None:
    """The tables that were asked for, of the first set of weights."""
    asked = [name for name in ("classes", "confusion", "calibration") if getattr(args, name) is not None]
    if not asked:
        return
    if details is None:
        raise UsageError(f"--{asked[0]} needs a method that is judged by its network's answers")
    try:
        if args.classes is not None:
            rows = zip(classes, details.per_class.tolist(), strict=True)
            shares = ((name, n, *(f"{100 * k / max(n, 1):.2f}" for k in right)) for name, (n, *right) in rows)
            _write_csv(Path(args.classes), ("class", "images", "top1", "top5"), shares)
        if args.confusion is not None:
            path = Path(args.confusion)
            lines = ((name, *row) for name, row in zip(classes, details.confusion.tolist(), strict=True))
            _write_csv(path.with_suffix(".csv"), ("label / answer", *classes), lines)
            _draw_confusion(details.confusion, classes, path.with_suffix(".png"))
        if args.calibration is not None:
            path = Path(args.calibration)
            rows = enumerate(details.bins.tolist(), 1)
            ends = ((f"{number / len(details.bins):.4f}", int(n), sums) for number, (n, *sums) in rows)
            shares = ((end, n, *(f"{100 * part / max(n, 1):.2f}" for part in sums)) for end, n, sums in ends)
            _write_csv(path.with_suffix(".csv"), ("confidence up to", "images", "top1", "confidence"), shares)
            _draw_calibration(details.bins, path.with_suffix(".png"))
    except OSError as error:
        raise FastdeitError(f"{error.filename or args.confusion}: cannot be written: {error.strerror}") from error


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)


def _draw_confusion(confusion: Tensor, classes: Sequence[str], path: Path) -> None:
    """The confusion matrix as a picture: of each label, the share of its images that got each answer."""
    from matplotlib.figure import Figure

    share = confusion.double() / confusion.sum(1, keepdim=True).clamp(min=1)
    side = min(3 + 0.25 * len(classes), 20)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot()
    shown = axes.imshow(share.numpy(), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(shown, shrink=0.6, label="share of the label's images")
    axes.set(xlabel="answer", ylabel="label")
    if len(classes) <= _MOST_CLASSES_DRAWN:
        axes.set_xticks(range(len(classes)), map(for_picture, classes), rotation=90, fontsize=6)
        axes.set_yticks(range(len(classes)), map(for_picture, classes), fontsize=6)
    figure.savefig(path, dpi=150)


def _draw_calibration(bins: Tensor, path: Path) -> None:
    """A reliability diagram (Guo et al., ICML 2017, figure 1): accuracy by confidence, and how many images have it.

    A network that is as sure as it is right has bars that end on the diagonal.
    """
    from matplotlib.figure import Figure

    images, right, confidence = bins.unbind(1)
    filled = images > 0
    accuracy, mean = (sums[filled] / images[filled] for sums in (right, confidence))
    width = 1 / len(bins)
    middles = ((torch.arange(len(bins)) + 0.5) * width)[filled]
    figure = Figure(figsize=(5, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.bar(middles.tolist(), accuracy.tolist(), width, edgecolor="white", color="#0072b2", label="accuracy")
    upper.plot(mean.tolist(), accuracy.tolist(), "o", color="#d55e00", label="at the mean confidence of the bin")
    upper.plot((0, 1), (0, 1), "--", color="#666666", label="as sure as right")
    upper.set(ylabel="share of right answers", ylim=(0, 1), xlim=(0, 1))
    upper.legend(loc="upper left")
    lower.bar(middles.tolist(), (images / images.sum().clamp(min=1))[filled].tolist(), width, color="#0072b2")
    lower.set(xlabel="confidence", ylabel="share of images")
    figure.savefig(path, dpi=150)
