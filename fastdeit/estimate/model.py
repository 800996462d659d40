"""How long one training step takes on a GPU that need not be there, from shapes alone.

One roofline for everything: a step is a list of operations, each with its floating-point operations, the bytes it moves
at best, and the kernels it launches. An operation takes

    max(FLOPs / (share * peak), bytes / (share * bandwidth)) + launches * gap

with peaks and bandwidths of the makers' datasheets, and shares that kernels of its kind are expected to reach. Shares
and gaps are the only judgements; they stand in `gpus.GPUS`. A step takes the sum, or the host's time to launch
it all where that is longer. `memory.py` and `communication.py` have what else a step needs, and `rows.py` tells how
far this is from measurements.

Implementations of a step (`Design`) differ in three tables only: the backend of attention, the bytes and launches
between the matrix products, and what a block keeps for backward. Bytes are those that PyTorch's autocast and this
package's kernels read and write, with `a` bytes of an activation (2 in 16 bit) and 4 of the residual stream.

Only the standard library is imported.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from fastdeit.estimate.gpus import GPU, backend

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
        """Tokens of an image, the prefix among them."""
        return self.patches + self.prefix

    @property
    def rows(self) -> list[int]:
        """Tokens that come out of each block."""
        last = self.prefix if self.pruned else self.tokens
        return [self.tokens] * (self.depth - 1) + [last]

    @property
    def flops(self) -> int:
        """Of the forward for one image: matrix products, 2 per multiply-add."""
        embed = self.patches * self.patch_values * self.dim
        return sum(self._of_blocks) + 2 * (embed + self.prefix * self.dim * self.classes)

    @property
    def _of_blocks(self) -> list[int]:
        per_row = 2 * self.dim * self.dim + 2 * self.tokens * self.dim + 2 * self.dim * self.hidden
        return [2 * (rows * per_row + self.tokens * 2 * self.dim * self.dim) for rows in self.rows]

    def skipped_flops(self, kept: Sequence[float]) -> float:
        """FLOPs of the forward, a mean of all images, that are left out where the branches of a block are computed for
        a `kept` share of them; () is all."""
        return sum((1 - share) * flops for share, flops in zip(kept, self._of_blocks, strict=bool(kept)))

    @property
    def parameters(self) -> int:
        """Number of parameters, positions and heads among them."""
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


@dataclass(frozen=True)
class Trained:
    """What of a network is trained, and what a step keeps for that.

    parameters  number of those that are trained
    states      numbers that the optimizer keeps
    still       layers (embedding, blocks, heads) before the first that is trained: nothing goes backward through them
    share       of the parameters from there on, those that are trained: only they have products for their gradients
    recomputed  blocks keep their input alone, and are computed again in backward
    """

    parameters: int
    states: int
    still: int = 0
    share: float = 1.0
    recomputed: bool = False

    @property
    def still_blocks(self) -> int:
        """Blocks through which nothing goes backward."""
        return max(0, self.still - 1)


@dataclass(frozen=True)
class Work:
    """A micro-batch of one process: images, precision (fp32, fp16, bf16), and what else a step has to do.

    `trained` None is everything, by AdamW. kept: for each block the share of the samples whose branches our designs
    compute, where `model.drop_path_skip` leaves out the others; () is all.
    """

    batch: float
    precision: str = "bf16"
    drop_path: bool = True
    ema: bool = False
    trained: Trained | None = None
    kept: tuple[float, ...] = ()

    @property
    def bytes(self) -> int:
        """Of an activation."""
        return 4 if self.precision == "fp32" else 2

    def shares(self, vit: ViT, design: "Design") -> tuple[float, ...]:
        """For each block, the share of the samples whose branches the design computes."""
        return self.kept if self.kept and design.ours else (1.0,) * vit.depth

    def of(self, network: Network) -> Trained:
        """What of the network is trained."""
        return self.trained or Trained(network.parameters, 2 * network.parameters)


class Piece(NamedTuple):
    """Work between the matrix products: `each * a + fixed` bytes for every element of `of`; see `_PIECES`."""

    of: str
    phase: str
    kind: str
    each: float
    fixed: float
    launches: float


# (bytes: each, fixed; launches) of eager, compile and fused. The elements are, in a block, "norm": channels of the
# tokens at both LayerNorms, "cast": the same, in 16 bit alone, "drop": the same, with drop-path, "qkv", "hidden",
# "out": channels of the tokens that it returns, "branch": those of the samples that are kept, "matrices": its weights,
# "copy": its share of all weights, in 16 bit alone; in a step, "ends":
# one in 16 bit, "pixels", "tokens", "logits", "weights" and "states", which are of what is trained, and "average": the
# weights that are trained, where they are averaged.
_PIECES = (
    ("norm", "forward", "pointwise", (1, 16, 4), (2, 8, 2), (2, 8, 2)),  # LayerNorm in float32, residual addition
    ("norm", "backward", "pointwise", (0, 24, 4), (2, 12, 4), (2, 12, 4)),
    ("norm", "backward", "reduction", (0, 8, 4), None, None),
    ("cast", "forward", "pointwise", (1, 4, 2), None, None),
    ("cast", "backward", "pointwise", (2, 8, 4), None, None),
    ("drop", "forward", "pointwise", (2, 0, 6), None, None),
    ("drop", "backward", "pointwise", (2, 0, 2), None, None),
    ("hidden", "forward", "pointwise", (2, 0, 1), (2, 0, 1), (2, 0, 1)),  # GELU
    ("hidden", "backward", "pointwise", (3, 0, 1), (3, 0, 1), (4, 0, 3)),  # ours makes it again instead of keeping it
    ("hidden", "backward", "reduction", (1, 0, 1), (1, 0, 1), None),  # bias gradients
    ("out", "backward", "reduction", (2, 0, 2), (2, 0, 2), None),
    ("qkv", "backward", "reduction", (1, 0, 1), (1, 0, 1), None),
    ("qkv", "backward", "pointwise", (2, 0, 1), (2, 0, 1), None),  # dq, dk and dv packed into one tensor
    ("copy", "forward", "pointwise", (0, 6, 8), (0, 6, 4), (0, 6, 1)),  # autocast's, and of their gradients
    ("copy", "backward", "pointwise", (0, 6, 8), (0, 6, 4), (0, 6, 1)),
    ("ends", "forward", "pointwise", (0, 0, 4), (0, 0, 4), (0, 0, 2)),  # launches of the same for embedding and heads
    ("ends", "backward", "pointwise", (0, 0, 4), (0, 0, 4), (0, 0, 4)),
    ("pixels", "forward", "pointwise", (0, 46, 6), (0, 46, 6), (1, 2, 1)),  # mixed in float32, cast, laid out
    ("tokens", "forward", "pointwise", (1, 8, 2), (1, 8, 1), (1, 4, 2)),
    ("tokens", "backward", "reduction", (1, 8, 4), (1, 8, 2), (2, 20, 6)),  # ours adds the first LayerNorm's apart
    ("logits", "forward", "pointwise", (0, 120, 30), (0, 120, 12), (0, 20, 20)),  # the loss, draws of drop-path
    ("weights", "update", "pointwise", (0, 16, 8), (0, 16, 8), (0, 16, 40)),  # the gradients' norm, guard, optimizer
    ("states", "update", "pointwise", (0, 8, 0), (0, 8, 0), (0, 8, 0)),  # what it keeps, read and written
    ("average", "update", "pointwise", (0, 12, 4), (0, 12, 4), (0, 8, 0)),  # ours in the pass of AdamW
)
_EAGER, _COMPILE, _FUSED = (
    tuple(Piece(*row[:3], *row[3 + column]) for row in _PIECES if row[3 + column]) for column in range(3)
)
FP8_PIECES = (
    Piece("hidden", "forward", "pointwise", 1, 1, 1),  # GELU and the cast of its result
    Piece("hidden", "backward", "pointwise", 4, 1, 3),
    Piece("branch", "forward", "pointwise", 3, 3, 3),  # casts of what qkv, proj and fc1 are given
    Piece("branch", "backward", "pointwise", 2, 2, 2),  # and of the gradients of what proj and fc2 have made
    Piece("qkv", "backward", "pointwise", 1, 1, 1),
    Piece("matrices", "forward", "pointwise", 1, 1, 4),
    Piece("matrices", "backward", "pointwise", 1, 1, 4),
)
"""What a block with products of 8 bits has in place of GELU's pieces: each cast reads a and writes 1 byte."""
_QKV = tuple(piece for piece in _EAGER if piece.of == "qkv")
"""What attention leaves to do in backward where it is not ours."""
_WITHOUT_GELU = tuple(piece for piece in _FUSED if piece.of != "hidden")


class _Attention(NamedTuple):
    """A kernel of attention: so many products of queries and keys, padded to `tile`; bytes of queries, keys and scores,
    where `queries` of (5, 16) means 5 * a + 16 an element."""

    phase: str
    kind: str
    products: int
    tile: tuple[int, int] = (1, 1)
    queries: tuple[float, float] = (0, 0)
    keys: float = 0
    scores: tuple[float, float] = (0, 0)
    launches: float = 1


_OURS_FORWARD = _Attention("forward", "ours", 2, (64, 16), (2, 0), 2)
_ATTENTION = {
    "unfused": (  # softmax in float32 between two products, all of it in memory
        _Attention("forward", "gemm", 2, queries=(4, 0), scores=(2, 0), launches=4),
        _Attention("forward", "pointwise", 0, queries=(2, 0), scores=(2, 16), launches=4),
        _Attention("backward", "gemm", 4, queries=(7, 0), scores=(4, 0), launches=6),
        _Attention("backward", "pointwise", 0, queries=(2, 0), scores=(2, 20), launches=5),
    ),
    "library": (  # FlashAttention-2 (Dao, 2023). Its backward adds dq up in float32, and reads (dout, out) for delta.
        _Attention("forward", "library", 2, (128, 128), (2, 0), 2),
        _Attention("backward", "library", 5, (128, 128), (5, 16), 4, launches=3),
    ),
    # Two kernels in backward, one for dq and one for dk and dv, which both make the scores and their gradients.
    "triton": (_OURS_FORWARD, _Attention("backward", "ours", 7, (64, 64), (6, 0), 6, launches=4)),
    "fused_backward": (_OURS_FORWARD, _Attention("backward", "ours", 5, (32, 16), (4, 0), 4, launches=2)),
    "hopper": (_OURS_FORWARD, _Attention("backward", "ours", 5, (64, 16), (4, 0), 4, launches=2)),
    "native": (  # as "triton", in CUDA C++
        _Attention("forward", "ours", 2, (64, 32), (2, 0), 2),
        _Attention("backward", "ours", 7, (64, 32), (6, 0), 6, launches=3),
    ),
}
_OF_QUERIES = {"fused_backward": "triton", "hopper": "triton", "native": "library"}
"""What the last block's attention is instead, whose queries are fewer than its keys."""

# ---- designs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Design:
    """How a step is implemented.

    pieces     the work between the matrix products
    attention  a row of `_ATTENTION`
    ours       this package's kernels, whose backends the table of choices names for a GPU (`selected`)
    epilogue   GELU and its derivative are inside the products
    launch     seconds of the host for a kernel, autograd and autocast included
    kept       bytes of a block kept for backward, in units of a: per channel of a token, and per hidden channel
    stream     bytes of an element of the residual stream
    peer       timm's code, which computes the last block for all tokens
    fp8        `pieces` of a block that returns all tokens, where its products are of 8 bits; () where they are not
    tried      its backends were found by a trial, so the table of choices is not asked
    """

    name: str
    help: str
    pieces: tuple[Piece, ...]
    attention: str = "library"
    ours: bool = False
    epilogue: bool = False
    launch: float = 6e-6
    kept: tuple[int, int] = (7, 2)
    stream: int = 4
    peer: bool = False
    fp8: tuple[Piece, ...] = ()
    tried: bool = False


EAGER = Design("eager", "PyTorch references of the kernels, one operation after the other", _EAGER)
TIMM = replace(EAGER, name="timm", help="the peer: timm's model in eager mode", pieces=(*_EAGER, _QKV[1]), peer=True)
"""timm's code packs once more."""
_COMPILED_HELP = "the peer: timm's model and loss under torch.compile of torch 2.10 or newer, FlashAttention"
TIMM_COMPILE = Design("timm_compile", _COMPILED_HELP, _COMPILE, launch=3e-6, kept=(6, 2), peer=True)
_FUSED_HELP = "this package's Triton kernels, as train selects them"
FUSED = Design("fused", _FUSED_HELP, _FUSED, attention="triton", ours=True, launch=10e-6, kept=(6, 1))
_EPILOGUE_HELP = "the same, with FASTDEIT_KERNELS=mlp=epilogue"
EPILOGUE = replace(FUSED, name="epilogue", help=_EPILOGUE_HELP, pieces=_WITHOUT_GELU, epilogue=True)
DESIGNS = {design.name: design for design in (EAGER, TIMM, TIMM_COMPILE, FUSED, EPILOGUE)}

# Designs of others, for what they have measured: timm's code with an older PyTorch's attention and an AdamW of many
# passes; an Inductor that takes a second pass for the gradients of LayerNorm's weights.
_FOREACH = tuple(piece._replace(fixed=72, launches=34) if piece.of == "weights" else piece for piece in TIMM.pieces)
UNFUSED = replace(TIMM, name="unfused", pieces=_FOREACH, attention="unfused", launch=7e-6)
_SECOND_PASS = Piece("norm", "backward", "reduction", 1, 4, 4)
COMPILE_2_9 = replace(TIMM_COMPILE, name="compile < 2.10", pieces=(*_COMPILE, _SECOND_PASS))


def designs(gpu: GPU, precision: str, network: Network) -> list[Design]:
    """Those that differ for the network on that GPU."""
    if network.vit is None:
        return [EAGER]
    if not network.own:
        return [TIMM, TIMM_COMPILE]
    if gpu.triton_products and precision != "fp32":
        return [TIMM, TIMM_COMPILE, FUSED, EPILOGUE]
    return [TIMM, TIMM_COMPILE, FUSED]


def computed(network: Network, design: Design) -> Network:
    """The network as the design computes it."""
    if network.vit is None or not design.peer:
        return network
    return replace(network, vit=replace(network.vit, pruned=False))


_FUSED_BACKWARD_TOKENS, _FUSED_BACKWARD_WIDTH = 208, 64
"""The largest that attention's fused backward takes: more tokens or wider heads go to the split backward. `hopper`
takes as many tokens, and heads of that width alone."""
_NATIVE_WIDTHS = 32, 64, 96, 128
"""Of the heads that the native kernels take, in fp16."""


def selected(design: Design, vit: ViT, work: Work, gpu: GPU) -> Design:
    """The design with the backends of attention and of the MLP that are taken for such shapes on that GPU."""
    if not design.ours:
        return design
    attention, mlp = (backend(gpu, *op) for op in (("attention", 3 * vit.dim), ("mlp", vit.dim)))
    if design.tried:
        attention, mlp = design.attention, ""
    if not gpu.triton_products and work.precision == "fp16" and vit.dim // vit.heads in _NATIVE_WIDTHS:
        design = replace(design, attention="native")
    elif attention == "reference" or not gpu.triton_products:
        design = replace(design, attention="library", pieces=(*design.pieces, *_QKV))
    elif attention == "fused_backward" and work.bytes == 2:
        narrow = vit.tokens <= _FUSED_BACKWARD_TOKENS and vit.dim // vit.heads <= _FUSED_BACKWARD_WIDTH
        design = replace(design, attention="fused_backward" if narrow else "triton")
    elif attention == "hopper" and work.bytes == 2:
        fits = vit.tokens <= _FUSED_BACKWARD_TOKENS and vit.dim // vit.heads == _FUSED_BACKWARD_WIDTH
        design = replace(design, attention="hopper" if fits else "triton")
    if mlp == "epilogue" and work.bytes == 2 and gpu.triton_products:
        design = replace(design, pieces=tuple(piece for piece in design.pieces if piece.of != "hidden"), epilogue=True)
    return design


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
    name = design.attention if rows == vit.tokens else _OF_QUERIES.get(design.attention, design.attention)
    a, heads, width = work.bytes, work.batch * vit.heads, vit.dim // vit.heads
    queries, keys = float(work.batch * rows * vit.dim), float(work.batch * vit.tokens * vit.dim)
    scores = float(heads * rows * vit.tokens)
    for kernel in _ATTENTION[name]:
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
        blocks = Counter(zip(vit.rows, learn, work.shares(vit, design), strict=True))
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
