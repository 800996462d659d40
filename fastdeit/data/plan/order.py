"""Which sample stands where: the order of an epoch, its mixing groups, and every process's share.

All of it is a function of (seed, epoch, number of samples, batch size, repeats); the number of processes only decides
who takes which part of a global batch, never what is in it.

Repeated augmentation follows DeiT's `RASampler`: a permutation with each sample `repeats` times in a row, dealt out in
turn, and an epoch as long as without repeats. ImageNet with batches of 256 and 3 repeats: 1,281,024 samples an epoch,
which are 427,008 distinct images three times each. Two differences, both deliberate. The public code keeps `floor(n //
256 * 256 / world)` samples a process whatever the batch size, hence none at all for n < 256; here an epoch is `max(1,
n // batch_size)` whole batches, so the last n % batch_size stream entries are dropped. And the public code deals the
copies of a sample to consecutive processes (they sit next to each other in one process); here they are dealt to
consecutive mixing groups, so that one process trains on the same groups as eight.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastdeit import rng


class Order(NamedTuple):
    """Stream of an epoch: `sample` and `copy`, both int64 `[steps * batch_size]`.

    `copy` counts a sample's appearances in the epoch, so (sample, copy) is unique and keys the augmentation.
    """

    sample: NDArray[np.int64]
    copy: NDArray[np.int64]


def steps_per_epoch(n: int, batch_size: int) -> int:
    """Whole batches in an epoch over `n` samples; at least one."""
    return max(1, n // batch_size)


def epoch(seed: int, epoch: int, n: int, batch_size: int, repeats: int = 1) -> Order:
    """The stream of one epoch: permutations of `range(n)`, each sample `repeats` times in a row, cut to whole batches.

    One permutation is enough unless `batch_size > n * repeats`; then further, independent permutations follow it.
    """
    if n < 1 or batch_size < 1 or repeats < 1:
        raise ValueError(f"n, batch_size and repeats must be at least 1, got {n}, {batch_size} and {repeats}")
    length = steps_per_epoch(n, batch_size) * batch_size
    distinct = -(-length // repeats)
    turns = [rng.permutation(rng.key(seed, "order", epoch, turn), n) for turn in range(-(-distinct // n))]
    entry = np.arange(length)
    return Order(
        sample=np.repeat(np.concatenate(turns)[:distinct], repeats)[:length],
        copy=entry // (n * repeats) * repeats + entry % repeats,
    )


def groups(order: Order, step: int, batch_size: int, group_size: int) -> Order:
    """Batch `step` of the epoch as `[groups, group_size]` arrays: stream entry k is slot `k // groups` of group `k %
    groups`."""
    _check_groups(batch_size, group_size, 1, 1)
    entries = slice(step * batch_size, (step + 1) * batch_size)
    return Order(*(array[entries].reshape(group_size, -1).T for array in order))


def groups_per_batch(batch_size: int, group_size: int, accumulate: int = 1, world: int = 1) -> int:
    """Mixing groups in a global batch; ValueError unless they divide evenly among micro-batches and processes."""
    _check_groups(batch_size, group_size, accumulate, world)
    return batch_size // group_size


def slice_of(groups_per_batch: int, micro: int, accumulate: int, rank: int, world: int) -> slice:
    """The contiguous groups of the global batch that process `rank` of `world` trains on in micro-batch `micro`."""
    parts = accumulate * world
    if groups_per_batch % parts:
        raise ValueError(
            f"{groups_per_batch} mixing groups per batch (batch size / group size) cannot be shared evenly by "
            f"accumulate {accumulate} x nproc {world} = {parts}; change the batch size, the group size, accumulate or "
            "nproc"
        )
    share = groups_per_batch // parts
    start = (micro * world + rank) * share
    return slice(start, start + share)


def substitute(seed: int, epoch: int, sample: int, attempt: int, n: int) -> int:
    """The sample that stands in for an undecodable `sample`: uniform over the n - 1 others (itself only when n is
    1)."""
    if n == 1:
        return 0
    draw = rng.uniform(rng.key(seed, "substitute", epoch, attempt), sample, 1)[0, 0]
    return (sample + 1 + int(draw * (n - 1))) % n


def shard(n: int, rank: int, world: int) -> NDArray[np.int64]:
    """Samples that process `rank` evaluates: every one of `range(n)` exactly once over all processes, sizes within
    one."""
    return np.arange(rank, n, world, dtype=np.int64)


def _check_groups(batch_size: int, group_size: int, accumulate: int, world: int) -> None:
    multiple = group_size * accumulate * world
    if batch_size % multiple == 0:
        return
    size = max(1, batch_size // (accumulate * world))
    advice = f"use a batch size that is a multiple of {multiple}"
    if batch_size % (accumulate * world) == 0:
        advice += f", or a group size that divides {size}"
    advice += ", or change accumulate or nproc" if accumulate * world > 1 else ""
    raise ValueError(
        f"batch size {batch_size} cannot be split into groups of {group_size} shared evenly by accumulate "
        f"{accumulate} x nproc {world} (it must be a multiple of {group_size} x {accumulate} x {world} = {multiple}): "
        f"{advice}"
    )
