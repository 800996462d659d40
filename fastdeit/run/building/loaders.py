"""From a recipe to its streams of batches."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from fastdeit import methods
from fastdeit.data.bad import BadList, OnBad
from fastdeit.data.loader import EvalLoader, TrainLoader
from fastdeit.data.sources.source import Source
from fastdeit.engine.dist import World
from fastdeit.run.building.extent import check_batch, run_length
from fastdeit.run.building.pictures import augmentations, image_size, mixing

if TYPE_CHECKING:
    from fastdeit.recipe.resolve import Recipe


def loader_device(device: torch.device) -> str | int:
    """The device as the loaders name it: "cpu" or the index of a GPU."""
    return "cpu" if device.type == "cpu" else device.index or 0


def train_loader(
    recipe: "Recipe",
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
        rank=world.rank,
        world=world.size,
        threads=data.threads,
        device=loader_device(world.device),
        noise=noise,
        stores=methods.find(recipe.method.use).needs(recipe.method),
        mean=data.mean,
        std=data.std,
        total_steps=run_length(recipe, len(source)).total,
        max_bad_fraction=data.max_bad_fraction,
        on_bad=on_bad,
        bad_list=bad_list,
    )


def eval_loader(
    recipe: "Recipe",
    source: Source,
    world: World,
    noise: Mapping[str, int],
    on_bad: OnBad,
    bad_list: BadList | None = None,
) -> EvalLoader:
    """Images of `source` as evaluation sees them, each exactly once over all processes."""
    data = recipe.data
    per_process = recipe.train.batch_size // (recipe.train.accumulate * world.size)
    return EvalLoader(
        source,
        size=image_size(recipe),
        crop_ratio=data.eval_crop_ratio,
        rank=world.rank,
        world=world.size,
        batch_size=max(per_process, 1),
        threads=data.threads,
        device=loader_device(world.device),
        noise=noise,
        mean=data.mean,
        std=data.std,
        max_bad_fraction=data.max_bad_fraction,
        on_bad=on_bad,
        bad_list=bad_list,
    )
