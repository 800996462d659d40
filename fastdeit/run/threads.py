"""The compute threads of a run on the CPU. They are a part of its identity: sums of several threads round differently.

`engine.threads` says how many. Where it is null, the number is derived when the run begins, and written into the recipe
of the run, so that whoever goes on with it has the same. `OMP_NUM_THREADS`, set by the user, wins over both.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastdeit import cores
from fastdeit.engine.dist import World
from fastdeit.errors import UsageError
from fastdeit.fields import MOST_THREADS
from fastdeit.recipe.resolve import Recipe

VARIABLE = "OMP_NUM_THREADS"


def fixed(recipe: Recipe, world: World) -> Recipe:
    """`recipe` with a number in `engine.threads`, the same on every process. Call it on every process.

    By default that is a process's share of the processors that it may run on.
    """
    threads = _asked() or recipe.engine.threads
    if threads is None:
        # Without a rank the variable is left over from another launch.
        sharing = int(os.environ.get("LOCAL_WORLD_SIZE", world.size)) if "RANK" in os.environ else world.size
        threads = max(1, cores.available() // sharing)
    threads = world.same(threads)
    return recipe.model_copy(update={"engine": recipe.engine.model_copy(update={"threads": threads})})


def _asked() -> int | None:
    """What the user's environment says; a list, as OpenMP has for nested regions, by its first number."""
    text = os.environ.get(VARIABLE)
    if text is None:
        return None
    first = text.partition(",")[0].strip()
    if not re.fullmatch("[0-9]{1,4}", first) or not 1 <= int(first) <= MOST_THREADS:
        raise UsageError(
            f"{VARIABLE}={text[:40]!r} is not a number of threads from 1 to {MOST_THREADS}; set engine.threads "
            "instead, or neither"
        )
    return int(first)


@contextmanager
def computing(threads: int) -> Iterator[None]:
    """torch computes with so many threads for the time of the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
