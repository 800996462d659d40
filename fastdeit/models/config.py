"""Shape of a vision transformer: the fields that tell the models of this package apart, and which go together."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

from fastdeit.fields import ImageSize, size_pair

DropPathMode = Literal["linear", "constant"]
Positions = Literal["learned", "sincos"]
Stem = Literal["patch", "hmlp", "conv"]
Pool = Literal["token", "avg"]
Init = Literal["deit", "vit"]

_CHOICES = {"drop_path_mode": DropPathMode, "positions": Positions, "stem": Stem, "pool": Pool, "init": Init}


@dataclass(frozen=True)
class ViTConfig:
    """Shape of a vision transformer.

    image_size  pixels: int or (height, width), each a multiple of patch_size; kept as (height, width)
    patch_size  pixels per side of the square that a token stands for
    dim         channels of a token, a multiple of heads
    mlp_ratio   hidden channels of the MLP = int(dim * mlp_ratio)
    distilled   adds DeiT's distillation token and head
    drop_path   stochastic depth: rate of the last block, in [0, 1)
    drop_path_mode  linear: the rate grows from 0 in the first block to drop_path in the last, as in DeiT; constant: it
                is drop_path in all of them, as in DeiT III and CaiT
    dropout     rate in [0, 1) at which single features are zeroed in front of a head, as by timm's `drop_rate`
    eps         of every LayerNorm
    layer_scale what the channels of each residual branch are multiplied by at the start, above 0 (LayerScale, Touvron
                et al., "Going deeper with image transformers", ICCV 2021); None: there is no such factor
    parallel    attentions, and then MLPs, that a block computes side by side of the same tokens (Touvron et al., "Three
                things everyone should know about vision transformers", ECCV 2022)
    class_token whether there is one; without it pool is avg
    no_embed_class  the positions are those of the patches alone; the class and distillation token have none (DeiT III)
    positions   learned, or the fixed sines and cosines of `positions.sincos`, which have no place for a class token
    stem        what makes tokens of pixels (`stems`). patch: one linear layer of each patch; hmlp: a small MLP of each
                patch; conv: 3x3 convolutions
    conv_widths channels after each 3x3 convolution of the stem conv, and only of that
    pool        what the heads read. token: the class (and distillation) token; avg: the mean of the patches' tokens
    fc_norm     of pool avg: the last LayerNorm comes behind the mean, instead of before it
    init        how the weights begin (`init`): deit, or vit as in the first vision transformers
    """

    image_size: ImageSize
    patch_size: int
    dim: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    num_classes: int = 1000
    distilled: bool = False
    drop_path: float = 0.0
    drop_path_mode: DropPathMode = "linear"
    dropout: float = 0.0
    in_chans: int = 3
    eps: float = 1e-6
    layer_scale: float | None = None
    parallel: int = 1
    class_token: bool = True
    no_embed_class: bool = False
    positions: Positions = "learned"
    stem: Stem = "patch"
    conv_widths: tuple[int, ...] = ()
    pool: Pool = "token"
    fc_norm: bool = False
    init: Init = "deit"

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", size_pair(self.image_size, "image_size"))
        object.__setattr__(self, "conv_widths", tuple(self.conv_widths))
        if problem := next(_problems(self), None):
            raise ValueError(problem)

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        height, width = self.image_size
        return height // self.patch_size, width // self.patch_size

    @property
    def prefix_tokens(self) -> int:
        """Tokens before those of the patches."""
        return self.class_token + self.distilled

    @property
    def prefix_positions(self) -> int:
        """Positions before those of the patches."""
        return 0 if self.no_embed_class else self.prefix_tokens

    @property
    def conv_strides(self) -> tuple[int, ...]:
        """Of the stem's 3x3 convolutions: 2 where the number of channels changes, else 1."""
        return tuple(1 + (before != after) for before, after in pairwise((self.in_chans, *self.conv_widths)))


def _problems(config: ViTConfig) -> Iterator[str]:
    """What makes no model of it, the most basic first."""
    for name, choices in _CHOICES.items():
        if getattr(config, name) not in get_args(choices):
            yield f"{name} is {getattr(config, name)!r}, but must be {' or '.join(get_args(choices))}"
    side, (height, width) = config.patch_size, config.image_size
    if height % side or width % side:
        yield (
            f"image_size {height}x{width} is not a multiple of the patch size {side}; "
            f"the nearest that is: {_round(height, side)}x{_round(width, side)}"
        )
    if config.dim % config.heads:
        yield f"dim {config.dim} is not a multiple of heads {config.heads}"
    for name in ("drop_path", "dropout"):
        if not 0 <= getattr(config, name) < 1:
            yield f"{name} is {getattr(config, name)}, but must be in [0, 1)"
    if config.num_classes < 1 or config.depth < 1:
        yield f"num_classes {config.num_classes} and depth {config.depth} must be at least 1"
    if config.parallel < 1:
        yield f"parallel is {config.parallel}, but a block has at least 1 attention and 1 MLP"
    if config.layer_scale is not None and not config.layer_scale > 0:
        yield f"layer_scale is {config.layer_scale}, but must be above 0; leave it None for a model without"
    yield from _problems_of_tokens(config)
    yield from _problems_of_stem(config)


def _problems_of_tokens(config: ViTConfig) -> Iterator[str]:
    if config.distilled and (not config.class_token or config.pool != "token"):
        yield (
            "a distilled model has one head for the class token and one for the distillation token: it needs "
            "class_token=true and pool=token"
        )
    if config.pool == "token" and not config.class_token:
        yield "pool=token reads the class token, but class_token is false; set pool=avg"
    if config.fc_norm and config.pool != "avg":
        yield "fc_norm puts the last LayerNorm behind the mean of the patches, so it needs pool=avg"
    if config.positions == "sincos" and config.prefix_positions:
        yield (
            "positions=sincos has none for the class token; set no_embed_class=true, or class_token=false and pool=avg"
        )
    if config.positions == "sincos" and (config.dim % 4 or config.dim < 8):
        yield f"positions=sincos needs a dim that is a multiple of 4 and at least 8, not {config.dim}"


def _problems_of_stem(config: ViTConfig) -> Iterator[str]:
    if config.stem == "hmlp" and (config.patch_size % 4 or config.dim % 4):
        yield (
            f"stem=hmlp cuts a patch in 4x4 parts and begins with dim/4 channels, so patch_size {config.patch_size} "
            f"and dim {config.dim} must be multiples of 4"
        )
    if config.stem != "conv" and config.conv_widths:
        yield f"conv_widths belong to stem=conv, but stem is {config.stem}"
    if config.stem == "conv" and (shrinks := 2 ** sum(stride == 2 for stride in config.conv_strides)) != (
        config.patch_size
    ):
        yield (
            f"conv_widths {list(config.conv_widths)} make {shrinks} pixels one (a convolution has stride 2 where the "
            f"number of channels changes), but patch_size is {config.patch_size}"
        )


def _round(length: int, patch_size: int) -> int:
    return max(round(length / patch_size), 1) * patch_size
