"""Stochastic depth (Huang et al., "Deep networks with stochastic depth", ECCV 2016): which samples keep which residual
branches, by uniforms that come with the batch.

There are two ways to draw, and both leave the expectation of every branch as it is:

* each sample for itself, `drawn`: a branch of rate p is kept where its uniform is >= p, and scaled by 1 / (1 - p). The
  branch is computed for all samples;
* a fixed number of every group, `skipping`: of G samples round(p * G) lose the branch, those with the least uniforms,
  and the others are scaled by G / (G - round(p * G)). The branch is computed for the others alone (Oquab et al.,
  "DINOv2", 2023, section 5, "efficient stochastic depth").
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastdeit.models.config import ViTConfig


class Kept(NamedTuple):
    """What stochastic depth leaves of a residual branch.

    factor   float32 `[B']`: what the branch of each sample is multiplied by; None is 1
    samples  distinct int64 `[B']`: the samples whose branch is computed; None is all of them
    places   int32 `[B]`: the place of each sample among these, -1 for the others; None where samples is
    """

    factor: Tensor | None = None
    samples: Tensor | None = None
    places: Tensor | None = None


def drawn(noise: Tensor, config: ViTConfig) -> list[Kept]:
    """Factors of every branch for uniforms `[B, branches]`, drawn for each sample by itself: 0 or 1 / (1 - p)."""
    # Made on the device, every step: a buffer would be broadcast by DDP, a list copied from the host.
    first = 0.0 if config.drop_path_mode == "linear" else config.drop_path
    rates = torch.linspace(first, config.drop_path, config.depth, dtype=torch.float32, device=noise.device)
    rates = rates.repeat_interleave(2 * config.parallel)
    return [Kept(factor) for factor in ((noise >= rates) / (1 - rates)).t().contiguous().unbind(0)]


def dropped_of(config: ViTConfig, group: int) -> tuple[int, ...]:
    """For every branch, how many of a group of that many samples lose it: the rate times `group`, rounded.

    Raises ValueError where that is none of them even at the highest rate, or all of them.
    """
    step = config.drop_path / max(config.depth - 1, 1) if config.drop_path_mode == "linear" else 0.0
    # Where there is one block, its rate is that of the first, as in `drawn`.
    first = 0.0 if config.drop_path_mode == "linear" else config.drop_path
    counts = [int((first + step * block) * group + 0.5) for block in range(config.depth)]
    if not 0 < max(counts) < group:
        loses = "all" if max(counts) else "none"
        raise ValueError(
            f"of {group} samples {loses} would lose a branch at drop_path {config.drop_path}; use larger groups of "
            "samples, or draw for each sample"
        )
    return tuple(count for count in counts for _ in range(2 * config.parallel))


def skipping(noise: Tensor, dropped: Sequence[int], group: int) -> list[Kept]:
    """Samples and factors of every branch for uniforms `[B, branches]`, by groups of `group` samples in a row.

    `dropped` is what `dropped_of` returns. All shapes follow from it and from B, so that a CUDA graph can replay the
    step, and the host waits for nothing. A group's draw depends on the uniforms of that group alone. Raises ValueError
    where B is not a multiple of `group`.
    """
    batch, branches = noise.shape
    groups, rest = divmod(batch, group)
    if rest:
        raise ValueError(f"{batch} samples are no multiple of the groups of {group}, of which samples are dropped")
    order = noise.t().reshape(branches, groups, group).argsort(dim=-1, descending=True, stable=True)
    order = order + group * torch.arange(groups, device=noise.device)[:, None]
    # By rank first, then by group: what a branch keeps of all groups is the beginning of its row.
    order = order.transpose(1, 2).reshape(branches, batch)
    numbers = [branch for branch in range(branches) if dropped[branch]]
    counts = [(group - dropped[branch]) * groups for branch in numbers]
    # One launch for all factors: their numbers travel with it, and not in a copy from the host.
    ones = list(noise.new_ones(sum(counts)).split(counts))
    factors = torch._foreach_mul(ones, [group / (group - dropped[branch]) for branch in numbers])
    places = _places(order, [(group - count) * groups for count in dropped])
    kept = [Kept()] * branches
    for branch, count, factor in zip(numbers, counts, factors, strict=True):
        kept[branch] = Kept(factor, order[branch, :count], places[branch])
    return kept


def _places(order: Tensor, counts: Sequence[int]) -> Tensor:
    """int32 `[branches, B]`: the place of each sample in its row of `order`, a permutation of the samples; -1 for those
    behind the first `counts` of a row."""
    branches, batch = order.shape
    every = torch.arange(batch, dtype=torch.int32, device=order.device).expand(branches, batch)
    places = torch.empty_like(every, memory_format=torch.contiguous_format).scatter_(1, order, every)
    limits = torch.ones_like(places)
    torch._foreach_mul_(list(limits.unbind()), list(counts))
    return torch.where(places < limits, places, -1)
