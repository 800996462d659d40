"""The machines of a plan: what `fastdeit plan` asks for them. No torch is imported, so a mistake is said at once."""

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastdeit.data.plan import order
from fastdeit.errors import UsageError
from fastdeit.estimate.gpus import DEFAULT_GPUS, GPU, GPUS, GPUS_PER_NODE
from fastdeit.text import did_you_mean

if TYPE_CHECKING:
    from fastdeit.recipe.resolve import Recipe

_HIGHEST_PRICE = 1_000_000


@dataclass(frozen=True)
class Machine:
    """`count` GPUs in all, the same number in each of `nodes`."""

    gpu: GPU
    count: int
    nodes: int


def machines(recipe: "Recipe", args: argparse.Namespace) -> list[Machine]:
    """Those that `--gpu`, `--count` and `--nodes` name. Raises UsageError where they cannot share the batch."""
    gpus = [_gpu(name) for name in args.gpu or DEFAULT_GPUS]
    # Unless asked for: one GPU, and a node of eight where the batch can be shared by it.
    counts = args.count or [count for count in (1, GPUS_PER_NODE) if count == 1 or unshared(recipe, count) is None]
    machines = []
    for count in counts:
        nodes = args.nodes or -(-count // GPUS_PER_NODE)
        if count % nodes or count // nodes > GPUS_PER_NODE:
            raise UsageError(
                f"--count {count} --nodes {nodes}: every node has the same number of GPUs, at most {GPUS_PER_NODE}"
            )
        if (problem := unshared(recipe, count)) is not None:
            raise UsageError(f"recipe {recipe.name} on {count} GPUs: {problem}")
        machines += [Machine(gpu, count, nodes) for gpu in gpus]
    return machines


def _gpu(name: str) -> GPU:
    if name.upper() not in GPUS:
        raise UsageError(f"--gpu {name}: known are {', '.join(GPUS)}{did_you_mean(name.upper(), GPUS)}")
    return GPUS[name.upper()]


def prices(args: argparse.Namespace) -> dict[str, float]:
    """USD an hour, by GPU, of `--price`. Raises UsageError unless there is one for each `--gpu`."""
    if not args.price:
        return {}
    named = [_gpu(name).name for name in args.gpu or ()]
    if not all(0 < price <= _HIGHEST_PRICE for price in args.price):
        given = " ".join(f"{price:g}" for price in args.price)
        raise UsageError(f"--price {given}: a price is a positive number of USD an hour, at most {_HIGHEST_PRICE:,}")
    if len(named) != len(args.price):
        raise UsageError(f"--price has {len(args.price)} numbers for {len(named)} --gpu; give one for each, in order")
    return dict(zip(named, args.price, strict=True))


def unshared(recipe: "Recipe", world: int) -> str | None:
    """Why the recipe's batch cannot be shared by so many processes."""
    train = recipe.train
    try:
        order.groups_per_batch(train.batch_size, recipe.data.group_size, train.accumulate, world)
    except ValueError as error:
        return str(error)
    return None
