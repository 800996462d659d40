"""What options of a recipe change of a design, and how much of the branches a step computes.

Only the standard library is imported.
"""

from collections.abc import Sequence
from dataclasses import replace

from fastdeit.estimate.designs import FP8_PIECES, Design
from fastdeit.estimate.gpus import GPU


def with_options(design: Design, gpu: GPU, *, keep_activations: bool, residual: str, products: str) -> Design:
    """The design with these of `engine` on a GPU. What is not ours has none, and products of 8 bits are left out of a
    GPU that has none."""
    design = keeping(design) if keep_activations else design
    design = design if residual == "fp32" else narrowed(design)
    return eight_bit(design) if products == "fp8" and gpu.fp8 else design


def keeping(design: Design) -> Design:
    """The design with `engine.keep_activations`: backward reads GELU's result instead of making it again."""
    if not design.ours:
        return design
    pieces = tuple(
        piece._replace(each=piece.each - 1) if (piece.of, piece.phase) == ("hidden", "backward") else piece
        for piece in design.pieces
    )
    channels, hidden = design.kept
    return replace(design, pieces=pieces, kept=(channels, hidden + 1))


def narrowed(design: Design) -> Design:
    """The design with `engine.residual` of 16 bit: the stream and its gradient have half of the bytes."""
    if not design.ours:
        return design
    pieces = tuple(
        piece._replace(fixed=piece.fixed / 2) if piece.of in ("norm", "tokens") else piece for piece in design.pieces
    )
    return replace(design, pieces=pieces, stream=2)


def eight_bit(design: Design) -> Design:
    """The design with `engine.products: fp8`: casts of every operand, which GELU makes of its own."""
    if not design.ours:
        return design
    others = (piece for piece in design.pieces if piece.of != "hidden")
    return replace(design, fp8=(*others, *FP8_PIECES))


def kept(dropped: Sequence[int], group: int) -> tuple[float, ...]:
    """`Work.kept`, where of every `group` samples `dropped` lose a branch: two branches a block, of one rate."""
    return tuple(1 - count / group for count in dropped[::2])
