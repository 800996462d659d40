"""What a training step keeps in the memory of a GPU, and how large a batch fits, from shapes alone.

Only the standard library is imported.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from fastdeit.estimate.designs import Design, computed
from fastdeit.estimate.gpus import GPU
from fastdeit.estimate.networks import Network, Trained, ViT, Work

GIB = 2**30

_USABLE = 0.95
"""Of the memory; the rest is lost between the allocator's blocks."""
_CONTEXT = 1.0 * GIB
"""CUDA context, workspaces of cuBLAS, buffers of NCCL."""


def blocks_saved(vit: ViT, work: Work, design: Design) -> list[float]:
    """Bytes that each block keeps for backward.

    For all tokens the input of the first LayerNorm, its result, keys and values; for the tokens that come out the rest:
    `Design.kept`. Besides, statistics of the LayerNorms and of the softmax. The stream is that of all samples.
    """
    a = work.bytes
    channels, hidden = design.kept
    of_input = 3 * a * vit.dim + 8
    of_output = (channels - 3) * a * vit.dim + hidden * a * vit.hidden + 4 * vit.heads + 8
    return [
        float(
            work.batch
            * (design.stream * vit.dim * (vit.tokens + rows) + share * (vit.tokens * of_input + rows * of_output))
        )
        for rows, share in zip(vit.rows, design.shares(vit, work), strict=True)
    ]


def peak(
    network: Network,
    work: Work,
    design: Design,
    *,
    world: int,
    parallel: str,
    accumulate: int = 1,
    teachers: Sequence[Network] = (),
) -> dict[str, float | list[float]]:
    """Bytes of a process at the peak, by what they are for; `blocks` has one entry a block.

    The peak is that of a step, the begin of backward, and `evaluation` is what an evaluation needs beyond it: with
    fsdp2 it gathers the whole float32 weights.
    """
    step = _step(network, work, design, world=world, parallel=parallel, accumulate=accumulate, teachers=teachers)
    evaluation = 0.0
    if _split(world, parallel):
        evaluation = max(0.0, _evaluation(step, network, work, teachers) - total(step))
    return step | {"evaluation": evaluation}


def _split(world: int, parallel: str) -> bool:
    """Whether each process keeps a share of every tensor alone."""
    return parallel == "fsdp2" and world > 1


def _evaluation(
    step: dict[str, float | list[float]], network: Network, work: Work, teachers: Sequence[Network]
) -> float:
    """Bytes of a process in an evaluation with fsdp2, with the batch of a step, of which these are the parts.

    Weights are whole, and autocast's copies those of one block. There are no gradients, and teachers are not asked.
    """
    a, vit = work.bytes, network.vit
    stays = sum(step[part] for part in ("weights", "moments", "ema", "input", "logits", "context"))
    stays += 4.0 * sum(teacher.parameters for teacher in teachers)
    whole = (4 + a * (a < 4) / (vit.depth if vit else 1)) * network.parameters
    return stays + whole + work.batch * (_forward_peak(network, a) + a * network.values * (vit is not None))


def _step(
    network: Network,
    work: Work,
    design: Design,
    *,
    world: int,
    parallel: str,
    accumulate: int = 1,
    teachers: Sequence[Network] = (),
) -> dict[str, float | list[float]]:
    """The parts of `peak` at the begin of backward of a step.

    gradients: with fsdp2, those of several micro-batches are whole until the last of them. casts: autocast's copies of
    the weights, which backward reads; of one block, where fsdp2 computes it again. gathered: with fsdp2, the float32
    weights of two blocks and the gradients of two, one on their way. workspace: the gradients of a block's activations.
    recomputed: of the block that is computed again. input: a uint8 batch, two more that are prefetched, and the
    rendered images (a ViT's are those that `embedding` keeps).
    """
    a, vit, batch = work.bytes, computed(network, design).vit, work.batch
    trained, split = work.of(network), _split(world, parallel)
    shards, unit = world if split else 1, 1 / vit.depth if vit else 1.0
    parts: dict[str, float | list[float]] = {
        "weights": 4 * network.parameters / shards,
        "gradients": 4 * trained.parameters / (shards if accumulate == 1 else 1),
        "moments": 4 * trained.states / shards,
        "ema": 4 * trained.parameters / shards * work.ema,
        "casts": a * network.parameters * (a < 4) * (unit if split and trained.recomputed else 1),
        "gathered": 16 * network.parameters * unit * split,
        "teacher": 0.0,
        "input": 3.0 * batch * network.values + (0 if vit else a * batch * network.values),
        "logits": float((8 + a) * batch * network.outputs),
        "context": _CONTEXT,
    }
    if teachers:
        # They answer one after the other.
        most = max(a * batch * teacher.values + batch * _forward_peak(teacher, a) for teacher in teachers)
        parts["teacher"] = 4.0 * sum(teacher.parameters for teacher in teachers) + most
    if vit is None:
        parts |= {"blocks": [network.saved * a / 4 * batch], "workspace": float(network.widest * a / 4 * batch)}
        return parts
    wide = (2 + (design.kept[1] == 1)) * a * vit.hidden  # the gradients on both sides of GELU, and its result
    return parts | {
        "embedding": float(a * batch * vit.patches * vit.patch_values) * (trained.still == 0),
        **_kept(vit, work, design, trained),
        "workspace": float(batch * vit.tokens * (wide + (design.stream + 2 * a) * vit.dim)),
    }


def _kept(vit: ViT, work: Work, design: Design, trained: Trained) -> dict[str, float | list[float]]:
    """What the blocks keep for backward: nothing where nothing goes backward, and their input alone where they are
    computed again, which then takes the whole of one block at a time."""
    learn = [place >= trained.still_blocks for place in range(vit.depth)]
    whole = [saved * learns for saved, learns in zip(blocks_saved(vit, work, design), learn, strict=True)]
    if not trained.recomputed:
        return {"blocks": whole}
    inputs = [float(design.stream) * work.batch * vit.tokens * vit.dim * learns for learns in learn]
    return {"blocks": inputs, "recomputed": max(whole)}


def _forward_peak(network: Network, a: int) -> float:
    """Activation bytes of the widest place of a forward for one image: in a ViT the MLP, with the residual stream."""
    vit = network.vit
    if vit is None:
        return network.widest * a / 4
    return float(vit.tokens * (2 * a * vit.hidden + (4 + a) * vit.dim))


def total(parts: dict[str, float | list[float]]) -> float:
    """Bytes of all parts of `peak`."""
    return sum(sum(part) if isinstance(part, list) else part for part in parts.values())


def largest_batch(network: Network, work: Work, design: Design, gpu: GPU, multiple: int, **options: Any) -> int:
    """Images of the largest micro-batch of a process that fits, a multiple of `multiple`; 0 where none does."""

    def most(needed: Callable[[float], float]) -> int:
        fixed = needed(0)
        return max(0, int((_USABLE * gpu.memory - fixed) // (needed(multiple) - fixed))) * multiple

    def step(batch: float) -> dict[str, float | list[float]]:
        return _step(network, replace(work, batch=batch), design, **options)

    def evaluation(batch: float) -> float:
        return _evaluation(step(batch), network, replace(work, batch=batch), options.get("teachers", ()))

    found = most(lambda batch: total(step(batch)))
    return min(found, most(evaluation)) if _split(options["world"], options["parallel"]) else found
