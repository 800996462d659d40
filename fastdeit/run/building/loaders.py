"""From a recipe to its streams of batches."""

from collections.abc import Mapping
from typing import Any

import torch

from fastdeit import methods
from fastdeit.data.bad import BadList, OnBad
from fastdeit.data.loader import EvalLoader, TrainLoader
from fastdeit.data.sources.source import Source
from fastdeit.engine.dist import World
from fastdeit.recipe.resolve import Recipe
from fastdeit.run.building.extent import check_batch, run_length
from fastdeit.run.building.pictures import augmentations, image_size, mixing


def loader_device(device: torch.device) -> str | int:
    """The device as the loaders name it: "cpu" or the index of a GPU."""
    return "cpu" if device.type == "cpu" else device.index or 0


def _shared(recipe: Recipe, world: World) -> dict[str, Any]:
    """What the loaders of training and of evaluation have in common."""
    data = recipe.data
    return {
        "rank": world.rank,
        "world": world.size,
        "threads": data.threads,
        "device": loader_device(world.device),
        "mean": data.mean,
        "std": data.std,
        "max_bad_fraction": data.max_bad_fraction,
    }


def train_loader(
    recipe: Recipe,
    source: Source,
    world: World,
    noise: Mapping[str, int],
    on_bad: OnBad,
    bad_list: BadList | None = None,
) -> TrainLoader:
    """The stream of training batches that this process works on; `noise` is what `Method.noise` says, `bad_list` the
    run's own."""
    data = recipe.data
    check_batch(recipe, world.size)
    later = {epoch: augmentations(recipe, epoch) for epoch, _ in data.size_schedule[1:]}
    return TrainLoader(
        source,
        augmentations(recipe, 0),
        mixing(recipe),
        later=later,
        seed=recipe.train.seed,
        batch_size=recipe.train.batch_size,
        accumulate=recipe.train.accumulate,
        repeats=data.repeats,
        noise=noise,
        stores=methods.find(recipe.method.use).needs(recipe.method),
        total_steps=run_length(recipe, len(source)).total,
        on_bad=on_bad,
        bad_list=bad_list,
        **_shared(recipe, world),
    )


def eval_loader(
    recipe: Recipe,
    source: Source,
    world: World,
    noise: Mapping[str, int],
    on_bad: OnBad,
    bad_list: BadList | None = None,
) -> EvalLoader:
    """Images of `source` as evaluation sees them, each exactly once over all processes."""
    per_process = recipe.train.batch_size // (recipe.train.accumulate * world.size)
    return EvalLoader(
        source,
        size=image_size(recipe),
        crop_ratio=recipe.data.eval_crop_ratio,
        batch_size=max(per_process, 1),
        noise=noise,
        on_bad=on_bad,
        bad_list=bad_list,
        **_shared(recipe, world),
    )
