"""From a recipe to how the network is trained: method, judgement, clipping, trials of kernels."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from fastdeit import kernels, methods
from fastdeit.data.sources.source import Source
from fastdeit.engine.clip import UnitClipping
from fastdeit.engine.dist import World
from fastdeit.engine.ema import EmaTeacher
from fastdeit.errors import UsageError, naming
from fastdeit.methods.base import Context, Method, Momentum, scores
from fastdeit.methods.config import MethodConfig, TeacherConfig
from fastdeit.methods.evaluators import Classify, HeldOutLoss, Knn, LinearProbe
from fastdeit.methods.teacher import Teacher
from fastdeit.recipe.resolve import Recipe
from fastdeit.run.building.extent import run_length
from fastdeit.run.building.messages import Report
from fastdeit.run.building.samples import class_counts


def tuning(recipe: Recipe, world: World, say: Report) -> kernels.Tuning:
    """The trials of kernels in the first steps of the run. Whole steps are compared where a forward and backward can
    be made once more: a method or a model of somebody else's may count them, with fsdp2 a gradient is kept that is not
    reduced, and a step that is compiled was compiled for one choice."""
    engine = recipe.engine
    share = {"share": world.same, "main": world.main}
    split = engine.parallel == "fsdp2" and world.size > 1
    ours = recipe.method.use in methods.METHODS and ":" not in (recipe.model.name or "")
    presets = ours and engine.capture != "compile" and not split
    recorded = engine.capture == "graph"
    return kernels.Tuning(engine.autotune, world.device, recorded=recorded, presets=presets, say=say, **share)


def method(
    recipe: Recipe,
    student: nn.Module,
    num_classes: int,
    steps: int,
    teacher: Callable[[TeacherConfig], Teacher],
    source: Source | None = None,
) -> Method:
    """The training method around the student, for a run of so many steps.

    source  the training images; None in an evaluation, where the epochs of a run of `train.steps` are not known and its
            steps stand in for them

    Raises UsageError if the method cannot be built, and if it keeps an averaged teacher where the engine does not find
    it, such as in a list.
    """
    _check_fuse(recipe.method, student)
    kind = methods.find(recipe.method.use)
    averaged: list[EmaTeacher] = []

    def ema_teacher(module: nn.Module, momentum: Momentum) -> EmaTeacher:
        averaged.append(EmaTeacher(module, momentum))
        return averaged[-1]

    epochs = recipe.train.epochs or (steps if source is None else run_length(recipe, len(source)).epochs_begun)
    counts = None if source is None else partial(class_counts, source)
    with naming(f"method {recipe.method.use}", ValueError):
        context = Context(num_classes, epochs, steps, teacher, ema_teacher, counts)
        made = kind(student, recipe.method, context)
    if not set(averaged) <= set(made.modules()):
        raise UsageError(
            f"method {recipe.method.use}: what ema_teacher() returns must be an attribute of the method, or in an "
            "nn.ModuleList or nn.ModuleDict of it; the engine does not find it in a list or dict, and would never "
            "move it"
        )
    _check_evaluators(made, recipe)
    _check_judged(made, recipe)
    made.resizes = bool(recipe.data.size_schedule)
    return made


def _check_fuse(config: MethodConfig, student: nn.Module) -> None:
    """Refuse the choice of one of two heads where there is one. Both means of one head are that head."""
    if config.fuse in ("class", "distillation") and len(student.head_names) < 2:
        raise UsageError(
            f"method.fuse {config.fuse}: {type(student).__name__} has one head, and there is nothing to choose; train "
            "a distilled model, or leave method.fuse out"
        )


def _check_evaluators(made: Method, recipe: Recipe) -> None:
    """Raise UsageError for a method that is judged by its loss and wants of a sample what held-out images have not, and
    for one that is judged by its features and has none."""
    evaluators = made.evaluators().values()
    own_features = type(made).features is not Method.features or hasattr(made.model, "tokens")
    if not own_features and (
        read := [type(each).__name__ for each in evaluators if isinstance(each, Knn | LinearProbe)]
    ):
        raise UsageError(
            f"method {recipe.method.use}: its evaluators have {read[0]}, which reads features, but "
            f"{type(made.model).__name__} has no tokens to take them from; override features(x) in the method, or give "
            "the model tokens()"
        )
    if not any(isinstance(evaluator, HeldOutLoss) for evaluator in evaluators):
        return
    views, stores = recipe.method.views(), type(made).needs(recipe.method)
    if len(views) > 1 or stores:
        what = f"extras ({', '.join(stores)})" if stores else f"{len(views)} views"
        raise UsageError(
            f"method {recipe.method.use}: its evaluators have HeldOutLoss, but its loss wants {what} of a sample, and "
            "held-out images have one view, which is not augmented, and no extras of stores; judge it by Knn or "
            "LinearProbe, or by an evaluator of its own"
        )


def _check_judged(made: Method, recipe: Recipe) -> None:
    """Raise UsageError where the recipe asks for metrics that the method does not have."""
    if recipe.train.stop_after is not None and not made.evaluators():
        raise UsageError(f"train.stop_after needs a metric, but method {recipe.method.use} has none")
    known = known_metrics(made)
    if known is not None:
        check_best_by(recipe, known)


def known_metrics(made: Method) -> list[str] | None:
    """Names of the metrics of a method's evaluations, where its heads tell them; None where only an evaluation does."""
    evaluators = list(made.evaluators().values())
    if not made.model.head_names:  # its logits come from something else than linear layers
        return None
    if not made.answers_with_logits or not all(type(each) is Classify and each.scores is None for each in evaluators):
        return None
    logits = tuple(torch.zeros(1, 1) for _ in made.model.head_names)
    answers = scores(logits if len(logits) > 1 else logits[0], made.config.fuse)
    return [f"{metric}_{answer}" for _ in evaluators for metric in ("top1", "top5") for answer in answers]


def check_best_by(recipe: Recipe, metrics: Sequence[str]) -> None:
    """Raise UsageError where `train.best_by` is none of the metrics, of the weights or of an average that is kept."""
    averaged = [] if recipe.optim.ema_decay is None else [f"{name}_ema" for name in metrics]
    wanted, there_are = recipe.train.best_by, [*metrics, *averaged]
    if wanted is not None and wanted not in there_are:
        raise UsageError(f"train.best_by {wanted} is no metric of this run, which has {', '.join(there_are) or 'none'}")


def clipping(recipe: Recipe, student: nn.Module) -> dict[str, Any]:
    """The arguments of `Engine` for what the recipe says of gradient clipping."""
    limit = recipe.optim.clip_grad
    if recipe.optim.clip_mode == "norm":
        return {"clip_grad": limit}
    return {"clip_units": UnitClipping(limit, [f"model.{head}" for head in student.head_names])}
