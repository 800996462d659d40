"""What one training step costs on a GPU that need not be there: time, memory and communication, from shapes alone.

A step is a list of operations, each with its floating-point operations, the bytes it moves at best, and the kernels it
launches. An operation takes

    max(FLOPs / (share * peak), bytes / (share * bandwidth)) + launches * gap

with peaks and bandwidths of the makers' datasheets, and shares that kernels of its kind are expected to reach. Shares
and gaps are the only judgements; they stand in `estimate_gpus.GPUS`. A step takes the sum, or the host's time to launch
it all where that is longer. Of communication counts what no computation hides. How far this is from measurements is
told by `estimate_rows.py`.

Bytes of an operation are what PyTorch's autocast and this package's kernels read and write, with `a` bytes of an
activation (2 in 16 bit) and 4 of the residual stream. Attention's are those of FlashAttention-2 (Dao, 2023), padding to
its tiles included, for a library, and of `fastdeit.kernels.attention` for ours, whose backend is the one that its table
of choices has for the GPU.

Only the standard library is imported.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from fastdeit.estimate_gpus import GPU, backend

GIB = 2**30

_COLLECTIVE_SHARE = 0.8
"""Of a link, in NCCL's rings with large messages."""
_USABLE_MEMORY = 0.95
"""The rest is lost between the allocator's blocks."""
_CONTEXT = 1.0 * GIB
"""CUDA context, workspaces of cuBLAS, buffers of NCCL."""

# ---- networks --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ViT:
    """Shape of a vision transformer. `prefix` tokens come before `patches`; each has a head.

    pruned  the last block computes queries, projection and MLP for the prefix alone, as fastdeit's models do
    """

    patches: int
    prefix: int
    patch_values: int
    dim: int
    depth: int
    heads: int
    hidden: int
    classes: int
    pruned: bool = True

    @property
    def tokens(self) -> int:
        return self.patches + self.prefix

    @property
    def rows(self) -> list[int]:
        """Tokens that come out of each block."""
        last = self.prefix if self.pruned else self.tokens
        return [self.tokens] * (self.depth - 1) + [last]

    @property
    def flops(self) -> int:
        """Of the forward for one image: matrix products, 2 per multiply-add."""
        per_row = 2 * self.dim * self.dim + 2 * self.tokens * self.dim + 2 * self.dim * self.hidden
        blocks = sum(self.rows) * per_row + self.depth * self.tokens * 2 * self.dim * self.dim
        embed = self.patches * self.patch_values * self.dim
        return 2 * (embed + blocks + self.prefix * self.dim * self.classes)

    @property
    def parameters(self) -> int:
        dim, hidden = self.dim, self.hidden
        block = 4 * dim * dim + 2 * dim * hidden + 4 * dim + hidden + dim + 4 * dim
        embed = self.patch_values * dim + dim + (self.tokens + self.prefix) * dim
        return self.depth * block + embed + 2 * dim + self.prefix * (dim + 1) * self.classes


@dataclass(frozen=True)
class Network:
    """A network as the estimate sees it.

    parameters, flops  number of parameters; FLOPs of the forward for one image
    values             of the input image: channels * height * width
    outputs            logits of an image, over all heads
    own                whether it is one of `fastdeit.models`, whose blocks run this package's kernels
    vit                its shape, where it is a vision transformer; of others only the FLOPs are used for the time
    layers             of other networks, which are launched one by one
    saved, widest      float32 bytes for one image that other networks keep for backward, and of their widest layer
    """

    name: str
    parameters: int
    flops: int
    values: int
    outputs: int
    own: bool = True
    vit: ViT | None = None
    layers: int = 1
    saved: int = 0
    widest: int = 0


# RegNetY-16GF, forward, 16-bit autocast, channels first, eager: images/s and the card's bytes/s. Source: timm,
# results/benchmark-infer-amp-nchw-*.csv, RTX 4090 and RTX PRO 6000 Max-Q. Convolutional networks of this kind are bound
# by memory, so that the bytes that a FLOP costs are carried over to other cards.
_CONVNET_FLOPS = 2 * 15.96e9
_CONVNET_ROWS = (1584, 1.008e12), (2377, 1.792e12)
CONVNET_FLOPS_PER_BYTE = sum(speed * _CONVNET_FLOPS / bandwidth for speed, bandwidth in _CONVNET_ROWS) / 2

# ---- designs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Design:
    """How the operations between the matrix products are made.

    fused            residual addition, drop-path, LayerNorm and casts in one kernel (Inductor's or ours)
    ours             kernels of this package: attention (where Triton has products), GELU's backward, loss, input
    epilogue         GELU and its derivative inside the products
    attention        "unfused" (scores in memory), "library" or "ours"
    fused_backward   ours has one kernel for attention's backward, where all tokens are queries
    packing          copies of dq, dk and dv into one tensor
    two_pass         the gradients of LayerNorm's weight and bias take a pass of their own (Inductor of torch < 2.10)
    optimizer        "foreach", "torch" (its fused AdamW) or "ours" (with the average of weights in the same pass)
    launch           seconds of the host for a kernel, autograd and autocast included
    kept             bytes of a block kept for backward, in units of a: per channel of a token, and per hidden channel
    """

    name: str
    help: str
    fused: bool = False
    ours: bool = False
    epilogue: bool = False
    attention: str = "library"
    fused_backward: bool = False
    packing: int = 1
    two_pass: bool = False
    optimizer: str = "torch"
    launch: float = 6e-6
    kept: tuple[int, int] = (7, 2)


EAGER = Design("eager", "PyTorch references of the kernels, one operation after the other")
COMPILE = Design(
    "compile",
    "the references under torch.compile >= 2.10, for comparison: train compiles around its kernels",
    fused=True,
    launch=3e-6,
    kept=(6, 2),
)
FUSED = Design(
    "fused",
    "this package's Triton kernels, as train selects them",
    fused=True,
    ours=True,
    attention="ours",
    packing=0,
    optimizer="ours",
    launch=10e-6,
    kept=(6, 1),
)
EPILOGUE = replace(FUSED, name="epilogue", help="the same, with FASTDEIT_KERNELS=mlp=epilogue", epilogue=True)
DESIGNS = {design.name: design for design in (EAGER, COMPILE, FUSED, EPILOGUE)}


def designs(gpu: GPU, precision: str, network: Network) -> list[Design]:
    """Those that differ for the network on that GPU."""
    if network.vit is None:
        return [EAGER]
    if not network.own:
        return [replace(EAGER, packing=2), COMPILE]
    if gpu.triton_products and precision != "fp32":
        return list(DESIGNS.values())
    return [EAGER, COMPILE, FUSED]


# ---- operations ------------------------------------------------------------------------------------------------------


class Op(NamedTuple):
    """`count` equal operations of a micro-batch or of an update; FLOPs, bytes and launches are of one.

    kind       which shares of `GPU` it reaches
    phase      "forward", "backward" or "update"
    padded     FLOPs with the padding of tiles, where they are more
    slowdown   of the FLOPs' time, as a fraction
    """

    kind: str
    phase: str
    flops: float = 0.0
    bytes: float = 0.0
    launches: float = 1.0
    count: float = 1.0
    padded: float = 0.0
    slowdown: float = 0.0


@dataclass(frozen=True)
class Work:
    """A micro-batch of one process: images, precision (fp32, fp16, bf16), and what else a step has to do."""

    batch: int
    precision: str = "bf16"
    drop_path: bool = True
    ema: bool = False

    @property
    def bytes(self) -> int:
        """Of an activation."""
        return 4 if self.precision == "fp32" else 2


def _padded(length: int, tile: int) -> int:
    return -(-length // tile) * tile


def _products(vit: ViT, work: Work, design: Design, gpu: GPU, rows: int) -> Iterator[Op]:
    """Linear layers of a block that returns `rows` tokens: a product forward, two backward."""
    all_tokens, out, dim, hidden = work.batch * vit.tokens, work.batch * rows, vit.dim, vit.hidden
    kind, slow = ("gemm" if dim >= 768 else "narrow"), gpu.epilogue * design.epilogue
    hidden_bytes = work.bytes * out * hidden * design.epilogue
    qkv = [(all_tokens, 3 * dim)] if rows == vit.tokens else [(all_tokens, 2 * dim), (out, dim)]
    plain = [(m, n, dim, 0, 0) for m, n in [*qkv, (out, dim)]]
    mlp = [(out, hidden, dim, hidden_bytes, 0), (out, dim, hidden, 0, hidden_bytes)]
    for m, n, k, forward, backward in [*plain, *mlp]:
        flops, moved = 2.0 * m * n * k, work.bytes * float(m * k + n * k + m * n)
        yield Op(kind, "forward", flops, moved + forward, slowdown=slow * bool(forward))
        yield Op(kind, "backward", flops, moved + 2 * backward, slowdown=slow * bool(backward))
        yield Op(kind, "backward", flops, moved)


def _attention(vit: ViT, work: Work, design: Design, rows: int) -> Iterator[Op]:
    a, heads, tokens, width = work.bytes, work.batch * vit.heads, vit.tokens, vit.dim // vit.heads
    queries, keys = float(work.batch * rows * vit.dim), float(work.batch * tokens * vit.dim)
    scores = float(heads * rows * tokens)
    one = 2 * scores * width
    if design.attention == "unfused":  # softmax in float32 between two products, all of it in memory
        yield Op("gemm", "forward", 2 * one, 4 * a * queries + 2 * a * scores, 4)
        yield Op("pointwise", "forward", bytes=(2 * a + 16) * scores + 2 * a * queries, launches=4)
        yield Op("gemm", "backward", 4 * one, 7 * a * queries + 4 * a * scores, 6)
        yield Op("pointwise", "backward", bytes=(2 * a + 20) * scores + 2 * a * queries, launches=5)
    elif design.attention == "library":
        tile = 2.0 * heads * _padded(rows, 128) * _padded(tokens, 128) * width
        yield Op("library", "forward", 2 * one, 2 * a * (queries + keys), padded=2 * tile)
        # Beside q, k, v and four gradients: delta from (dout, out), and dq added up in float32 and converted.
        yield Op("library", "backward", 5 * one, (5 * a + 16) * queries + 4 * a * keys, 3, padded=5 * tile)
    else:
        tile = 2.0 * heads * _padded(rows, 64) * _padded(tokens, 16) * width
        yield Op("ours", "forward", 2 * one, 2 * a * (queries + keys), padded=2 * tile)
        if design.fused_backward and rows == tokens:
            tile = 2.0 * heads * _padded(rows, 32) * _padded(tokens, 16) * width
            yield Op("ours", "backward", 5 * one, 4 * a * (queries + keys), 2, padded=5 * tile)
        else:  # two kernels, one for dq and one for dk and dv, both of which make the scores and their gradients
            tile = 2.0 * heads * _padded(rows, 64) * _padded(tokens, 64) * width
            yield Op("ours", "backward", 7 * one, 6 * a * (queries + keys), 3, padded=7 * tile)
    if design.packing:
        yield Op("pointwise", "backward", bytes=2 * a * (queries + 2 * keys), count=design.packing)
    if design.attention != "ours":
        yield Op("reduction", "backward", bytes=a * (queries + 2 * keys))


def _norm(elements: float, work: Work, design: Design) -> Iterator[Op]:
    """A residual addition with drop-path, and its LayerNorm."""
    a, cast = work.bytes, (work.bytes + 4) * (work.bytes < 4)
    if design.fused:
        yield Op("pointwise", "forward", bytes=(8 + 2 * a) * elements)
        yield Op("pointwise", "backward", bytes=(12 + 2 * a) * elements, launches=2)
        if design.two_pass:
            yield Op("reduction", "backward", bytes=(4 + a) * elements, launches=2)
        return
    for phase, width, launches in (
        ("forward", 8, 1),  # LayerNorm in float32
        ("forward", cast, 1),
        ("forward", 2 * a * work.drop_path, 3),
        ("forward", 8 + a, 1),  # residual addition
        ("backward", cast, 1),
        ("backward", 2 * a * work.drop_path, 1),
        ("backward", cast, 1),
        ("backward", 12, 1),  # LayerNorm's input
        ("backward", 12, 1),  # sum of the two gradients of the residual stream
    ):
        if width:
            yield Op("pointwise", phase, bytes=width * elements, launches=launches)
    yield Op("reduction", "backward", bytes=8 * elements, launches=2)


def _block(vit: ViT, work: Work, design: Design, gpu: GPU, rows: int) -> Iterator[Op]:
    a, out = work.bytes, float(work.batch * rows)
    yield from _products(vit, work, design, gpu, rows)
    yield from _attention(vit, work, design, rows)
    yield from _norm(float(work.batch * vit.tokens * vit.dim), work, design)
    yield from _norm(out * vit.dim, work, design)
    if not design.epilogue:
        yield Op("pointwise", "forward", bytes=2 * a * out * vit.hidden)
        # Ours makes the activation again, instead of keeping it, and the bias gradient with it.
        yield Op("pointwise", "backward", bytes=(4 if design.ours else 3) * a * out * vit.hidden)
    if not design.ours:
        yield Op("reduction", "backward", bytes=a * out * vit.hidden)
        yield Op("reduction", "backward", bytes=a * out * vit.dim)
    yield Op("reduction", "backward", bytes=a * out * vit.dim)


def _ends(vit: ViT, work: Work, design: Design) -> Iterator[Op]:
    """Input, embedding, heads and loss."""
    a, batch, dim = work.bytes, work.batch, vit.dim
    pixels = float(batch * vit.patches * vit.patch_values)
    kind = "gemm" if dim >= 768 else "narrow"
    if design.ours:
        yield Op("pointwise", "forward", bytes=(2 + a) * pixels)
    else:
        yield Op("pointwise", "forward", bytes=46 * pixels, launches=6)  # mixing in float32, then cast and layout
    embed = 2.0 * pixels * dim
    moved = a * (pixels + vit.patch_values * dim + batch * vit.patches * dim)
    yield Op(kind, "forward", embed, moved)
    yield Op(kind, "backward", embed, moved)
    tokens = float(batch * vit.tokens * dim)
    yield Op("pointwise", "forward", bytes=(8 + a) * tokens, launches=1 if design.fused else 2)
    yield Op("reduction", "backward", bytes=(8 + a) * tokens, launches=2 if design.fused else 4)
    logits = float(batch * vit.prefix * vit.classes)
    head = a * (batch * vit.prefix * dim + vit.prefix * dim * vit.classes + logits)
    yield Op(kind, "forward", 2 * logits * dim, head)
    yield Op(kind, "backward", 2 * logits * dim, head, count=2)
    passes, launches = (5, 1) if design.ours else (30, 12 if design.fused else 30)
    yield Op("pointwise", "forward", bytes=4 * passes * logits, launches=launches)


def _update(parameters: float, work: Work, design: Design, depth: int) -> Iterator[Op]:
    """Casts of weights and gradients around autocast, the gradients' norm, AdamW, and the average of the weights."""
    if work.bytes < 4:
        launches = depth * (4 if design.name == "compile" else 8) + 4
        yield Op("pointwise", "forward", bytes=6 * parameters, launches=launches)
        yield Op("pointwise", "backward", bytes=6 * parameters, launches=launches)
    yield Op("pointwise", "update", bytes=4 * parameters, launches=4)
    if design.optimizer == "ours":
        yield Op("pointwise", "update", bytes=(36 if work.ema else 28) * parameters, launches=2)
        return
    foreach = design.optimizer == "foreach"
    yield Op("pointwise", "update", bytes=(84 if foreach else 28) * parameters, launches=30 if foreach else 4)
    if work.ema:
        yield Op("pointwise", "update", bytes=12 * parameters, launches=4)


_FUSED_BACKWARD_TOKENS, _FUSED_BACKWARD_WIDTH = 208, 64
"""The largest that `kernels.attention_fused_backward` takes: more tokens or wider heads go to the split backward."""


def selected(design: Design, vit: ViT, work: Work, gpu: GPU) -> Design:
    """The design with the backends of attention and of the MLP that are taken for such shapes on that GPU."""
    if not design.ours or not gpu.triton_products:
        return replace(design, attention="library", packing=1) if design.ours else design
    narrow = vit.tokens <= _FUSED_BACKWARD_TOKENS and vit.dim // vit.heads <= _FUSED_BACKWARD_WIDTH
    attention, mlp = backend(gpu, "attention", 3 * vit.dim), backend(gpu, "mlp", vit.dim)
    if attention == "reference":
        design = replace(design, attention="library", packing=1)
    elif attention == "fused_backward" and narrow and work.bytes == 2:
        design = replace(design, fused_backward=True)
    return replace(design, epilogue=True) if mlp == "epilogue" and work.bytes == 2 else design


def ops(network: Network, work: Work, design: Design, gpu: GPU) -> list[Op]:
    """Forward and backward of a micro-batch, and the update of a step."""
    vit = network.vit
    if vit is None:
        flops = float(work.batch * network.flops)
        moved = flops / CONVNET_FLOPS_PER_BYTE * work.bytes / 2
        both = [Op("convnet", phase, flops, moved, network.layers) for phase in ("forward", "backward", "backward")]
        return [*both, *_update(network.parameters, work, design, 1)]
    design = selected(design, vit, work, gpu)
    full, last = vit.rows[0], vit.rows[-1]
    blocks = [op._replace(count=op.count * (vit.depth - 1)) for op in _block(vit, work, design, gpu, full)]
    return [
        *(op for op in blocks if op.count),
        *_block(vit, work, design, gpu, last),
        *_ends(vit, work, design),
        *_update(network.parameters, work, design, vit.depth),
    ]


def seconds(op: Op, gpu: GPU, precision: str) -> float:
    """Of all `op.count` operations, on a busy stream."""
    backward = op.phase == "backward"
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
    busy = max((op.padded or op.flops) * (1 + op.slowdown) / (peak * math), op.bytes / (gpu.bandwidth * memory))
    return op.count * (busy + op.launches * gpu.gap)


class Step(NamedTuple):
    """Seconds of a micro-batch (forward, backward) and of an update."""

    forward: float
    backward: float
    update: float

    def scaled(self, factor: float) -> "Step":
        return Step(*(factor * phase for phase in self))


def step(network: Network, work: Work, design: Design, gpu: GPU) -> Step:
    """Time of a training step on one GPU, its input ready there, without communication: the GPU's time, or the host's
    where launching it all takes longer."""
    found = ops(network, work, design, gpu)
    busy, host = (
        Step(*(sum(of(op) for op in found if op.phase == phase) for phase in Step._fields))
        for of in (lambda op: seconds(op, gpu, work.precision), lambda op: op.count * op.launches * design.launch)
    )
    return busy if sum(busy) >= sum(host) else host


# ---- communication ---------------------------------------------------------------------------------------------------


class Communication(NamedTuple):
    """Bytes that a process sends in a step, the seconds that takes, and those that computation does not hide."""

    bytes: float
    seconds: float
    exposed: float


_BUCKET = 25 * 2**20
"""Bytes of gradients that DistributedDataParallel sends at once."""


def bus(gpu: GPU, world: int, nodes: int) -> float:
    """Bytes/s at which rings through all GPUs run; a ring enters and leaves a node by each adapter, one a GPU."""
    link = gpu.link if nodes == 1 else min(gpu.link, gpu.network * (world // nodes))
    return _COLLECTIVE_SHARE * link


def communication(
    network: Network, time: Step, gpu: GPU, *, world: int, nodes: int, sharding: str, accumulate: int, width: int
) -> Communication:
    """Of a step; `time` is that of a micro-batch, `width` the bytes of a gathered weight.

    ddp   a ring all-reduce of float32 gradients: 2 (W - 1) / W of their bytes, hidden behind the backward of the last
          micro-batch but for the last bucket
    fsdp  every micro-batch gathers the weights in forward and in backward, (W - 1) / W of their bytes each, and
          scatters float32 gradients, (W - 1) / W of theirs; a block is sent while its neighbour computes, but for the
          first of each direction

    The latency of a collective, tens of microseconds, is left out.
    """
    share, rate = (world - 1) / world, bus(gpu, world, nodes)
    gradients = 4.0 * network.parameters * share
    if sharding == "ddp":
        spent = 2 * gradients / rate
        last = spent * min(1.0, _BUCKET / (4 * network.parameters))
        return Communication(2 * gradients, spent, max(spent - time.backward, last))
    weights = width * network.parameters * share
    unit = 1 / network.vit.depth if network.vit else 1.0
    exposed = sum(
        max(sent / rate - busy, sent / rate * unit)
        for sent, busy in ((weights, time.forward), (weights + gradients, time.backward))
    )
    sent = 2 * weights + gradients
    return Communication(accumulate * sent, accumulate * sent / rate, accumulate * exposed)


# ---- memory ----------------------------------------------------------------------------------------------------------


def blocks_saved(vit: ViT, work: Work, design: Design) -> list[float]:
    """Bytes that each block keeps for backward.

    For all tokens the input of the first LayerNorm in float32, its result, keys and values; for the tokens that come
    out the rest: `Design.kept`. Besides, statistics of the LayerNorms and of the softmax.
    """
    a = work.bytes
    channels, hidden = design.kept
    of_input = (4 + 3 * a) * vit.dim + 8
    of_output = (4 + (channels - 3) * a) * vit.dim + hidden * a * vit.hidden + 4 * vit.heads + 8
    return [float(work.batch * (vit.tokens * of_input + rows * of_output)) for rows in vit.rows]


def memory(
    network: Network, work: Work, design: Design, *, world: int, sharding: str, teacher: Network | None = None
) -> dict[str, float | list[float]]:
    """Bytes of a process at the peak, the begin of backward, by what they are for; `blocks` has one entry a block.

    casts: autocast's copies of the weights, or fsdp's two gathered blocks and a block of gradients. workspace: the
    gradients of a block's activations. input: a uint8 batch, two more that are prefetched, and the rendered images
    (a ViT's are those that `embedding` keeps).
    """
    a, vit, batch = work.bytes, network.vit, work.batch
    own = network.parameters / (world if sharding == "fsdp" else 1)
    depth = vit.depth if vit else 1
    sharded = (2 * a + 4) * network.parameters / depth
    parts: dict[str, float | list[float]] = {
        "weights": 4 * own,
        "gradients": 4 * own,
        "moments": 8 * own,
        "ema": 4 * own * work.ema,
        "casts": sharded if sharding == "fsdp" else a * network.parameters * (a < 4),
        "teacher": 0.0,
        "input": 3.0 * batch * network.values + (0 if vit else a * batch * network.values),
        "logits": float((8 + a) * batch * network.outputs),
        "context": _CONTEXT,
    }
    if teacher is not None:
        parts["teacher"] = 4.0 * teacher.parameters + a * batch * teacher.values + batch * _forward_peak(teacher, a)
    if vit is None:
        parts |= {"blocks": [network.saved * a / 4 * batch], "workspace": float(network.widest * a / 4 * batch)}
        return parts
    wide = (3 if design.ours else 2) * a * vit.hidden
    return parts | {
        "embedding": float(a * batch * vit.patches * vit.patch_values),
        "blocks": blocks_saved(vit, work, design),
        "workspace": float(batch * vit.tokens * (wide + (4 + 2 * a) * vit.dim)),
    }


def _forward_peak(network: Network, a: int) -> float:
    """Activation bytes of the widest place of a forward for one image: in a ViT the MLP, with the residual stream."""
    vit = network.vit
    if vit is None:
        return network.widest * a / 4
    return float(vit.tokens * (2 * a * vit.hidden + (4 + a) * vit.dim))


def total(parts: dict[str, float | list[float]]) -> float:
    return sum(sum(part) if isinstance(part, list) else part for part in parts.values())


def largest_batch(network: Network, work: Work, design: Design, gpu: GPU, multiple: int, **options: object) -> int:
    """Images of the largest micro-batch of a process that fits, a multiple of `multiple`; 0 where none does."""
    fixed = total(memory(network, replace(work, batch=0), design, **options))
    each = total(memory(network, replace(work, batch=multiple), design, **options)) - fixed
    return max(0, int((_USABLE_MEMORY * gpu.memory - fixed) // each)) * multiple
