"""How the kernels are launched through the driver: names, grids, blocks and shared memory, as the table of
`kernels/launch.h` has them. A test holds both tables against each other."""

from dataclasses import dataclass

HEAD_DIMS = 32, 64, 96, 128
ROWS = 64
"""Tokens of a block."""
MOST_BLOCKS = 2**31 - 1 - ROWS
"""Of the one dimension that all grids have: blocks, and what they divide, are counted in 32 bits."""

FORWARD, QUERY_GRADIENT, KEY_GRADIENT, BIAS_GRADIENT = "forward", "query_gradient", "key_gradient", "bias_gradient"
KERNELS = FORWARD, QUERY_GRADIENT, KEY_GRADIENT, BIAS_GRADIENT

_COLUMNS = 32  # tokens of a step of a block's loop
_PADDING = 8  # 16-bit numbers behind a row of a tile
_STRIP = ROWS * (_COLUMNS + 8) * 4  # bytes of a block's logits
_BIAS_COLUMNS, _BIAS_THREADS = 32, 256


@dataclass(frozen=True)
class Sizes:
    """Of one call: samples, tokens of a sample, heads, channels of a head, and the factor on the logits."""

    batch: int
    tokens: int
    heads: int
    head_dim: int
    scale: float

    @property
    def blocks(self) -> int:
        """Blocks of tokens of one sample."""
        return -(-self.tokens // ROWS)

    @property
    def columns(self) -> int:
        """Channels of qkv."""
        return 3 * self.heads * self.head_dim


@dataclass(frozen=True)
class Launch:
    """The name of a kernel, and its launch: blocks, threads of each, and bytes of dynamic shared memory of each."""

    name: str
    grid: int
    block: int
    shared: int


def launch(kernel: str, sizes: Sizes) -> Launch:
    """The launch of one of `KERNELS`."""
    if kernel == BIAS_GRADIENT:
        grid = -(-sizes.columns // _BIAS_COLUMNS)
        return Launch("fastdeit_attention_bias_gradient", grid, _BIAS_THREADS, _BIAS_THREADS * 4)
    tiles, statistics = {
        FORWARD: (ROWS + 2 * _COLUMNS, ROWS * 4),
        QUERY_GRADIENT: (2 * ROWS + 2 * _COLUMNS, 0),
        KEY_GRADIENT: (2 * ROWS + 2 * _COLUMNS, 2 * _COLUMNS * 4),
    }[kernel]
    return Launch(
        f"fastdeit_attention_{kernel}_{sizes.head_dim}",
        sizes.blocks * sizes.heads * sizes.batch,
        2 * ROWS,
        tiles * (sizes.head_dim + _PADDING) * 2 + _STRIP + statistics,
    )
