"""What a step computes, as shapes: a network, what of it is trained, and a micro-batch.

Only the standard library is imported.
"""

from collections.abc import Sequence
from dataclasses import dataclass


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

    def of(self, network: Network) -> Trained:
        """What of the network is trained."""
        return self.trained or Trained(network.parameters, 2 * network.parameters)
