"""Exact evaluation: every held-out image is counted once, on any number of processes."""

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastdeit import build, kernels
from fastdeit import recipe as recipes
from fastdeit.data.loader import EvalLoader
from fastdeit.engine.dist import World
from fastdeit.engine.dist import world as join_world
from fastdeit.engine.progress import table
from fastdeit.engine.step import autocast

Predict = Callable[[Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Accuracy:
    """Per cent of `images` whose label is the first (`top1`) or among the first five (`top5`) of each named score."""

    images: int
    bad: int
    top1: dict[str, float]
    top5: dict[str, float]


@torch.no_grad()
def evaluate(
    predict: Predict,
    loader: EvalLoader,
    world: World,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    autocast: AbstractContextManager,
) -> Accuracy:
    """Accuracy of `predict` (normalised images `[B, 3, H, W]` -> named scores `[B, K]`) over all images of the loader.

    Images that cannot be decoded are left out and counted in `bad`. Counts, not rates, are summed over processes.
    """
    counts: dict[str, Tensor] = {}
    seen = torch.zeros((), dtype=torch.float64, device=world.device)
    for batch in loader.batches():
        images, labels = batch.images[0].to(world.device), batch.y1.to(world.device)
        with autocast:
            scores = predict(kernels.pixels(images, mean=mean, std=std))
        seen += len(labels)
        for name, score in scores.items():
            best = score.topk(min(5, score.shape[-1])).indices == labels[:, None]
            hits = torch.stack((best[:, 0].sum(), best.sum())).double()
            counts[name] = counts[name] + hits if name in counts else hits
    return _collect(counts, seen, loader, world)


def _collect(counts: dict[str, Tensor], seen: Tensor, loader: EvalLoader, world: World) -> Accuracy:
    names = world.same(list(counts))
    zero = torch.zeros(2, dtype=torch.float64, device=world.device)
    bad = torch.tensor(float(len(loader.bad.reasons)), dtype=torch.float64, device=world.device)
    table = torch.stack([seen, bad, *torch.stack([counts.get(name, zero) for name in names]).flatten()])
    images, bad_images, *hits = world.sum(table).tolist()
    share = 100.0 / max(images, 1.0)
    return Accuracy(
        int(images),
        int(bad_images),
        {name: hits[2 * i] * share for i, name in enumerate(names)},
        {name: hits[2 * i + 1] * share for i, name in enumerate(names)},
    )


def main(args: argparse.Namespace) -> None:
    """`fastdeit eval`: accuracy of a run or a checkpoint on the held-out images of its recipe."""

    def report(path: str | Path, reason: str) -> None:
        print(f"{path}: {reason}", file=sys.stderr)

    restored = build.open_checkpoint(Path(args.path), report)
    recipe = recipes.override(recipes.Recipe.model_validate(restored.state["recipe"]), args.overrides)
    # The checkpoint holds the weights; the file that training started from need not exist any more.
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"weights": None})})
    with join_world(recipe.engine.device) as world:
        _, source = build.sources(recipe)
        student = build.model(recipe, len(source.classes), lambda text: None)
        method = build.method(recipe, student, len(source.classes), 1, teacher=lambda config: None).to(world.device)
        loader = build.eval_loader(recipe, source, world, report)
        results = {}
        weights = {"": {f"model.{name}": tensor for name, tensor in restored.tensors["model"].items()}}
        if "ema" in restored.tensors:
            weights["_ema"] = restored.tensors["ema"]
        for kind, tensors in weights.items():
            method.load_state_dict(method.state_dict() | restored.tensors["method"] | tensors)
            method.eval()
            accuracy = evaluate(
                method.predict,
                loader,
                world,
                mean=recipe.data.mean,
                std=recipe.data.std,
                autocast=autocast(world.device, recipe.engine.precision),
            )
            results[kind] = accuracy
        if world.main:
            height, width = build.image_size(recipe)
            print(
                f"{restored.path}, step {restored.step}: {accuracy.images:,} images ({accuracy.bad} unreadable) at "
                f"{height}x{width} pixels, crop ratio {recipe.data.eval_crop_ratio:g}"
            )
            table(accuracy_rows(recipe, named_top1(results)))


def named_top1(results: dict[str, Accuracy]) -> dict[str, float]:
    """`top1_NAME` of the weights ("") and `top1_NAME_ema` of their averages ("_ema"), in per cent."""
    return {f"top1_{name}{kind}": value for kind, accuracy in results.items() for name, value in accuracy.top1.items()}


def accuracy_rows(recipe: "recipes.Recipe", top1: dict[str, float]) -> list[tuple[str, str]]:
    """Rows of a table for a person: what was measured, and the per cent."""
    fuse = getattr(recipe.method, "fuse", "softmax")
    fused = {"softmax": "sum of softmaxes", "logit": "mean of logits"}.get(fuse, f"{fuse} head alone")
    titles = {"fused": f"fused heads ({fused})", "class": "class head", "distillation": "distillation head"}
    rows = []
    for key, value in top1.items():
        name = key.removeprefix("top1_").removesuffix("_ema")
        averaged = ", averaged weights" if key.endswith("_ema") else ""
        rows.append((f"top-1 {titles.get(name, name)}{averaged}", f"{value:.2f} %"))
    return rows
