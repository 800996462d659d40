"""How a step is implemented: the designs that the estimate compares.

Designs differ in three tables only: the backend of attention, the bytes and launches between the matrix products, and
what a block keeps for backward. Bytes are those that PyTorch's autocast and this package's kernels read and write, with
`a` bytes of an activation (2 in 16 bit) and 4 of the residual stream.

Only the standard library is imported.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

from fastdeit.estimate.gpus import GPU, backend
from fastdeit.estimate.networks import Network, ViT, Work

# ---- the tables ------------------------------------------------------------------------------------------------------


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
ATTENTION = {
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
OF_QUERIES = {"fused_backward": "triton", "hopper": "triton", "native": "library"}
"""What the last block's attention is instead, whose queries are fewer than its keys."""

# ---- designs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Design:
    """How a step is implemented.

    pieces     the work between the matrix products
    attention  a row of `ATTENTION`
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

    def shares(self, vit: ViT, work: Work) -> tuple[float, ...]:
        """For each block, the share of the samples whose branches the design computes."""
        return work.kept if work.kept and self.ours else (1.0,) * vit.depth


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


def compared(gpu: GPU, precision: str, network: Network) -> list[Design]:
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
    asked, mlp = design.attention, ""
    if not design.tried:
        asked, mlp = backend(gpu, "attention", 3 * vit.dim), backend(gpu, "mlp", vit.dim)
    attention = _attention(asked, vit, work, gpu)
    if attention == "library":
        design = replace(design, pieces=(*design.pieces, *_QKV))
    if mlp == "epilogue" and work.bytes == 2 and gpu.triton_products:
        design = replace(design, pieces=tuple(piece for piece in design.pieces if piece.of != "hidden"), epilogue=True)
    return replace(design, attention=attention)


def _attention(asked: str, vit: ViT, work: Work, gpu: GPU) -> str:
    """The row of `ATTENTION` that is taken where this backend is asked first."""
    width = vit.dim // vit.heads
    if not gpu.triton_products:
        return "native" if work.precision == "fp16" and width in _NATIVE_WIDTHS else "library"
    if asked == "reference":
        return "library"
    widths = {"fused_backward": range(_FUSED_BACKWARD_WIDTH + 1), "hopper": [_FUSED_BACKWARD_WIDTH]}.get(asked, ())
    fits = work.bytes == 2 and vit.tokens <= _FUSED_BACKWARD_TOKENS and width in widths
    return asked if fits else "triton"
