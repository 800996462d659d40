"""How long one training step takes on a GPU that need not be there, from shapes alone.

One roofline for everything: a step is a list of operations, each with its floating-point operations, the bytes it moves
at best, and the kernels it launches. An operation takes

    max(FLOPs / (share * peak), bytes / (share * bandwidth)) + launches * gap

with peaks and bandwidths of the makers' datasheets, and shares that kernels of its kind are expected to reach. Shares
and gaps are the only judgements; they stand in `gpus.GPUS`. A step takes the sum, or the host's time to launch
it all where that is longer. `networks.py` has the shapes, and `designs.py` how a step is implemented. `memory.py` and
`communication.py` have what else a step needs, and `rows.py` tells how far this is from measurements.

Only the standard library is imported.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

from fastdeit.estimate.designs import ATTENTION, OF_QUERIES, Design, computed, selected
from fastdeit.estimate.gpus import GPU
from fastdeit.estimate.networks import CONVNET_FLOPS_PER_BYTE, Network, ViT, Work

# ---- operations ------------------------------------------------------------------------------------------------------


class Op(NamedTuple):
    """`count` equal operations of a micro-batch or of an update; FLOPs, bytes and launches are of one.

    kind    which shares of `GPU` it reaches
    phase   "forward", "backward" or "update"
    spent   FLOPs of 16 bit that the time goes by, where padding or an epilogue makes them more than `flops`, or
            operands of 8 bits fewer; 0 for as many
    again   whether it is an operation of the forward that backward repeats, for `engine.checkpoint_blocks`
    """

    kind: str
    phase: str
    flops: float = 0.0
    bytes: float = 0.0
    launches: float = 1.0
    count: float = 1.0
    spent: float = 0.0
    again: bool = False


# ---- a step as operations --------------------------------------------------------------------------------------------


def _padded(length: int, tile: int) -> int:
    return -(-length // tile) * tile


def _products(vit: ViT, work: Work, design: Design, gpu: GPU, rows: int, share: float = 1.0) -> Iterator[Op]:
    """Linear layers of a block that returns `rows` tokens: a product forward, two backward, of which the second is of
    the weights: of a `share` of them."""
    all_tokens, out, dim, hidden = work.batch * vit.tokens, work.batch * rows, vit.dim, vit.hidden
    slow = 1 + gpu.epilogue
    hidden_bytes = work.bytes * out * hidden * design.epilogue
    qkv = [(all_tokens, 3 * dim)] if rows == vit.tokens else [(all_tokens, 2 * dim), (out, dim)]
    plain = [(m, n, dim, 0, 0) for m, n in [*qkv, (out, dim)]]
    mlp = [(out, hidden, dim, hidden_bytes, 0), (out, dim, hidden, 0, hidden_bytes)]
    for m, n, k, forward, backward in [*plain, *mlp]:
        flops, moved = 2.0 * m * n * k, work.bytes * float(m * k + n * k + m * n)
        if design.fp8:
            for phase, operands, result in (("forward", m * k + n * k, m * n), ("backward", m * n + n * k, m * k)):
                yield Op(_kind(vit), phase, flops, float(operands + work.bytes * result), spent=flops / gpu.fp8)
            yield Op(_kind(vit), "backward", flops, moved, count=share)
            continue
        yield Op(_kind(vit), "forward", flops, moved + forward, spent=flops * slow if forward else 0)
        # Read is what comes in front of GELU; written is its result, where that is not kept.
        backward *= 1 + (design.kept[1] == 1)
        yield Op(_kind(vit), "backward", flops, moved + backward, spent=flops * slow if backward else 0)
        yield Op(_kind(vit), "backward", flops, moved, count=share)


def _kind(vit: ViT) -> str:
    return "gemm" if vit.dim >= 768 else "narrow"


def _attention(vit: ViT, work: Work, design: Design, rows: int) -> Iterator[Op]:
    name = design.attention if rows == vit.tokens else OF_QUERIES.get(design.attention, design.attention)
    a, heads, width = work.bytes, work.batch * vit.heads, vit.dim // vit.heads
    queries, keys = float(work.batch * rows * vit.dim), float(work.batch * vit.tokens * vit.dim)
    scores = float(heads * rows * vit.tokens)
    for kernel in ATTENTION[name]:
        moved = sum(
            (each * a + fixed) * of for (each, fixed), of in ((kernel.queries, queries), (kernel.scores, scores))
        )
        padded = heads * _padded(rows, kernel.tile[0]) * _padded(vit.tokens, kernel.tile[1])
        flops, spent = (2.0 * kernel.products * width * of for of in (scores, padded))
        yield Op(kernel.kind, kernel.phase, flops, moved + kernel.keys * a * keys, kernel.launches, spent=spent)


def _between(design: Design, elements: dict[str, float], a: int, kept: float = 1.0) -> Iterator[Op]:
    """The pieces of a design whose elements these are. LayerNorms read and write the branches of the samples that are
    `kept`, and the stream of all."""
    for piece in design.pieces:
        if of := elements.get(piece.of):
            moved = (piece.each * a * (kept if piece.of == "norm" else 1.0) + piece.fixed) * of
            yield Op(piece.kind, piece.phase, bytes=moved, launches=piece.launches)


def _block(
    vit: ViT, work: Work, design: Design, gpu: GPU, rows: int, share: float = 1.0, kept: float = 1.0
) -> Iterator[Op]:
    """Forward and backward of a block that returns `rows` tokens; a `share` of its weights is trained, and its branches
    are computed for the samples that are `kept`."""
    fp8 = design.fp8 if rows == vit.tokens else ()
    design = replace(design, pieces=fp8, epilogue=False) if fp8 else replace(design, fp8=())
    branch = replace(work, batch=kept * work.batch)
    out = float(work.batch * rows * vit.dim)
    norm = out + work.batch * vit.tokens * vit.dim
    elements = {"norm": norm, "cast": norm * (work.bytes < 4), "drop": norm * work.drop_path, "out": out}
    elements |= {"qkv": kept * (2 * norm - out), "hidden": float(branch.batch * rows * vit.hidden)}
    elements |= {"branch": kept * out, "matrices": float(4 * vit.dim**2 + 2 * vit.dim * vit.hidden)}
    yield from _products(vit, branch, design, gpu, rows, share)
    yield from _attention(vit, branch, design, rows)
    yield from _between(design, elements, work.bytes, kept)


def _embedding_and_heads(vit: ViT, work: Work, still: int) -> Iterator[Op]:
    """The products at both ends. Nobody asks for the gradient of the pixels, nor for one before `still` layers."""
    pixels, tokens, prefix = (work.batch * count for count in (vit.patches * vit.patch_values, vit.patches, vit.prefix))
    embed = pixels + vit.patch_values * vit.dim + tokens * vit.dim
    heads = prefix * vit.dim + vit.prefix * vit.dim * vit.classes + prefix * vit.classes
    for flops, moved, gradients in (
        (2.0 * pixels * vit.dim, embed, 0 if still else 1),
        (2.0 * prefix * vit.dim * vit.classes, heads, 1 if still > vit.depth else 2),
    ):
        yield Op(_kind(vit), "forward", flops, float(work.bytes * moved))
        yield Op(_kind(vit), "backward", flops, float(work.bytes * moved), count=gradients)


def ops(network: Network, work: Work, design: Design, gpu: GPU) -> list[Op]:
    """Forward and backward of a micro-batch, and the update of a step."""
    vit, batch, weights = computed(network, design).vit, work.batch, float(network.parameters)
    trained = work.of(network)
    depth = vit.depth if vit else 1
    elements = {"weights": float(trained.parameters), "states": float(trained.states), "ends": float(work.bytes < 4)}
    elements |= {"average": elements["weights"] * work.ema}
    if vit is None:
        flops = float(batch * network.flops)
        moved = flops / CONVNET_FLOPS_PER_BYTE * work.bytes / 2
        passes = ("forward", 1.0), ("backward", 1.0), ("backward", trained.share)
        found = [Op("convnet", phase, flops, moved, network.layers, count) for phase, count in passes]
    else:
        design = selected(design, vit, work, gpu)
        pixels, tokens = batch * vit.patches * vit.patch_values, batch * vit.tokens * vit.dim
        elements |= {"pixels": pixels, "tokens": tokens, "logits": batch * vit.prefix * vit.classes}
        learn = [place >= trained.still_blocks for place in range(vit.depth)]
        blocks = Counter(zip(vit.rows, learn, design.shares(vit, work), strict=True))
        found = []
        for (rows, learns, kept), count in blocks.items():
            made = _block(vit, work, design, gpu, rows, trained.share, kept)
            both = [op._replace(count=op.count * count) for op in made]
            forward = [op for op in both if op.phase == "forward"]
            found += both if learns else forward
            if learns and trained.recomputed:
                found += (op._replace(phase="backward", again=True) for op in forward)
        found += _embedding_and_heads(vit, work, trained.still)
    copies = _between(design, {"copy": weights / depth * (work.bytes < 4)}, work.bytes)
    return [*found, *(op._replace(count=depth) for op in copies), *_between(design, elements, work.bytes)]


def useful_flops(network: Network, work: Work) -> float:
    """Of a step for one image, as MFU counts them: the forward, as many again for the gradients of what the blocks
    passed on, and as many for those of the weights; of these two only the parts that training needs."""
    trained = work.of(network)
    learns = 1.0 if network.vit is None else 1 - trained.still_blocks / network.vit.depth
    skipped = network.vit.skipped_flops(work.kept) if network.vit is not None else 0.0
    return (network.flops - skipped) * (1 + learns * (1 + trained.share))


def seconds(op: Op, gpu: GPU, precision: str) -> float:
    """Of all `op.count` operations, on a busy stream: the roofline."""
    backward = op.phase == "backward" and not op.again
    math, memory = {
        "gemm": (gpu.gemm, gpu.pointwise),
        "narrow": (gpu.narrow, gpu.pointwise),
        "convnet": (gpu.narrow, 1.0),
        "library": (gpu.library[backward], 0.93 * gpu.pointwise),
        "ours": (gpu.ours[backward], 0.93 * gpu.pointwise),
        "pointwise": (1.0, gpu.pointwise),
        "reduction": (1.0, gpu.reduction),
    }[op.kind]
    peak = gpu.flops
    if precision == "fp32":
        peak = gpu.fp32 if op.kind == "ours" else gpu.tf32
    busy = max((op.spent or op.flops) / (peak * math), op.bytes / (gpu.bandwidth * memory))
    return op.count * (busy + op.launches * gpu.gap)


class Step(NamedTuple):
    """Seconds of a micro-batch (forward, backward) and of an update."""

    forward: float
    backward: float
    update: float

    def scaled(self, factor: float) -> "Step":
        """The step with all its times multiplied by `factor`."""
        return Step(*(factor * phase for phase in self))


def step(network: Network, work: Work, design: Design, gpu: GPU) -> Step:
    """Time of a training step on one GPU, its input ready there, without communication: the GPU's time, or the host's
    where launching it all takes longer."""
    return time(ops(network, work, design, gpu), work, design, gpu)


def time(found: Iterable[Op], work: Work, design: Design, gpu: GPU) -> Step:
    """`step` of these operations."""
    busy, host = both(found, work, design, gpu)
    return busy if sum(busy) >= sum(host) else host


def both(found: Iterable[Op], work: Work, design: Design, gpu: GPU) -> tuple[Step, Step]:
    """The time that a step of these operations takes the GPU, and that of the host to launch them."""
    busy, host = (
        Step(*(sum(of(op) for op in found if op.phase == phase) for phase in Step._fields))
        for of in (lambda op: seconds(op, gpu, work.precision), lambda op: op.count * op.launches * design.launch)
    )
    return busy, host
