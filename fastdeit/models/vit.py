"""The vision transformer (Dosovitskiy et al., ICLR 2021) with DeiT's second token, on `fastdeit.kernels`.

Modules, parameter names and their order are timm's, so state dicts are interchangeable. The computation differs in
three ways, none of which changes the result:

* A residual addition waits for the LayerNorm that follows it: addition, drop-path and LayerNorm are one kernel. Between
  two blocks the tokens therefore exist as a pair (residual, branch), and tokens = residual + keep * branch.
* Drop-path reads its uniforms from an argument instead of a generator, so a sample meets the same noise wherever it is
  computed.
* Only the class (and distillation) token of the last block reaches the heads, so `forward` drops the others as soon as
  their keys and values have been used: before the last projection and the last MLP.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastdeit import kernels
from fastdeit.fields import size_pair
from fastdeit.models.contract import ImageSize, Logits, Owner, TokenMaps, split_decay
from fastdeit.models.layers import block_layers
from fastdeit.models.positions import interpolated
from fastdeit.models.tokens import QKV, block_stages, kept, last_block, mapped

DropPathMode = Literal["linear", "constant"]


@dataclass(frozen=True)
class ViTConfig:
    """Shape of a vision transformer.

    image_size  pixels: int or (height, width), each a multiple of patch_size; kept as (height, width)
    patch_size  pixels per side of a square patch
    dim         channels of a token, a multiple of heads
    mlp_ratio   hidden channels of the MLP = int(dim * mlp_ratio)
    distilled   adds DeiT's distillation token and head
    drop_path   stochastic depth: rate of the last block, in [0, 1)
    drop_path_mode  linear: the rate grows from 0 in the first block to drop_path in the last, as in DeiT; constant: it
                is drop_path in all of them, as in DeiT III and CaiT
    dropout     rate in [0, 1) at which single features of the class (and distillation) token are zeroed in front of
                their heads, as by timm's `drop_rate`
    eps         of every LayerNorm
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

    def __post_init__(self) -> None:
        height, width = size_pair(self.image_size, "image_size")
        object.__setattr__(self, "image_size", (height, width))
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"image_size {height}x{width} is not a multiple of the patch size {self.patch_size}; "
                f"the nearest that is: {_round(height, self.patch_size)}x{_round(width, self.patch_size)}"
            )
        if self.dim % self.heads:
            raise ValueError(f"dim {self.dim} is not a multiple of heads {self.heads}")
        for name in ("drop_path", "dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, but must be in [0, 1)")
        if self.drop_path_mode not in get_args(DropPathMode):
            raise ValueError(f"drop_path_mode is {self.drop_path_mode!r}, but must be linear or constant")
        if self.num_classes < 1 or self.depth < 1:
            raise ValueError(f"num_classes {self.num_classes} and depth {self.depth} must be at least 1")

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        height, width = self.image_size
        return height // self.patch_size, width // self.patch_size


def _round(length: int, patch_size: int) -> int:
    return max(round(length / patch_size), 1) * patch_size


class PatchEmbed(nn.Module):
    """Linear embedding of flat patches. The weight is kept as that of a convolution, which is how it is published."""

    def __init__(self, in_chans: int, patch_size: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_chans, dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, patches: Tensor) -> Tensor:
        """Flat patches `[B, P, C*p*p]` as tokens `[B, P, dim]`."""
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class Attention(nn.Module):
    """Multi-head self-attention of normalised tokens `[B, N, dim]`."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rows: int | None = None) -> Tensor:
        """`[B, N, dim]`, or `[B, rows, dim]`: the result of the first `rows` tokens, made from their queries alone.

        The result has no gradient for `proj.bias`: the LayerNorm behind it has that as a by-product, if it is told.
        """
        weight, bias = self.qkv.weight, self.qkv.bias
        if rows is None:
            mixed = kernels.attention(F.linear(x, weight, bias.detach()), self.heads, bias=bias)
        else:
            dim = x.shape[-1]
            queries = F.linear(x[:, :rows], weight[:dim], bias[:dim])
            mixed = kernels.query_attention(queries, F.linear(x, weight[dim:], bias[dim:]), self.heads)
        return F.linear(mixed, self.proj.weight, self.proj.bias.detach())

    def heads_of(self, x: Tensor) -> QKV:
        """Queries, keys and values `[B, heads, N, head_dim]` of `x`, for whoever compares them."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v


class Mlp(nn.Module):
    """Linear, GELU (exact), linear."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)
        self.recompute = True

    def forward(self, x: Tensor) -> Tensor:
        """`[..., dim]` -> `[..., dim]`."""
        weights = self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias
        return kernels.mlp(x, *weights, recompute=self.recompute)


class Block(nn.Module):
    """Pre-norm transformer block whose residual additions wait for the next LayerNorm."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim, eps=config.eps)
        self.attn = Attention(config.dim, config.heads)
        self.norm2 = nn.LayerNorm(config.dim, eps=config.eps)
        self.mlp = Mlp(config.dim, int(config.dim * config.mlp_ratio))

    def forward(
        self,
        residual: Tensor,
        branch: Tensor | None,
        keep: Tensor | None,
        keep_attn: Tensor | None,
        rows: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Tokens in and out are pairs: `residual + keep * branch`, each `[B, N, dim]`; a missing branch is zero.

        `keep` (of the incoming branch) and `keep_attn` are float32 `[B]` drop-path factors or None for 1. The factor of
        the returned branch is the caller's to apply. With `rows`, only the first `rows` tokens come out.
        """
        residual, normed = _add_norm(residual, branch, self.norm1, keep)
        branch = self.attn(normed, rows)
        if rows is not None:
            residual = residual[:, :rows]
        residual, normed = _add_norm(residual, branch, self.norm2, keep_attn, self.attn.proj.bias)
        return residual, self.mlp(normed)


def _add_norm(
    residual: Tensor, branch: Tensor | None, norm: nn.LayerNorm, keep: Tensor | None, branch_bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`branch_bias`: the bias of the layer that made the branch, where that was detached."""
    weight, bias = norm.weight, norm.bias
    return kernels.add_layer_norm(residual, branch, weight, bias, norm.eps, keep=keep, branch_bias=branch_bias)


def _add(residual: Tensor, branch: Tensor | None, keep: Tensor | None) -> Tensor:
    """The tokens that a pair stands for, where no LayerNorm follows that could do the addition."""
    if branch is None:
        return residual
    return residual + (branch if keep is None else branch * keep[:, None, None]).to(residual.dtype)


class VisionTransformer(nn.Module):
    """ViT or (with `config.distilled`) DeiT with its second token and head. Same parameters and results as timm's.

    Initialised as DeiT: truncated normal of standard deviation 0.02 for tokens, positions and linear weights including
    the heads; zero biases; LayerNorm 1 and 0; the patch convolution keeps PyTorch's default.
    """

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self._checkpoints = False
        self._residual: torch.dtype | None = None
        patches = config.grid[0] * config.grid[1]
        self.cls_token = nn.Parameter(torch.empty(1, 1, config.dim))
        self.pos_embed = nn.Parameter(torch.empty(1, patches + self.prefix_tokens, config.dim))
        if config.distilled:
            self.dist_token = nn.Parameter(torch.empty(1, 1, config.dim))
        self.patch_embed = PatchEmbed(config.in_chans, config.patch_size, config.dim)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim, eps=config.eps)
        self.head = nn.Linear(config.dim, config.num_classes)
        if config.distilled:
            self.head_dist = nn.Linear(config.dim, config.num_classes)
        self._init_weights()

    def _init_weights(self) -> None:
        for parameter in self.parameters(recurse=False):
            trunc_normal_(parameter)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                init_linear(module)

    @property
    def distilled(self) -> bool:
        """Whether `forward` returns two logits."""
        return self.config.distilled

    @property
    def patch_size(self) -> int:
        """Pixels per side of a patch."""
        return self.config.patch_size

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches that the positional embedding is for."""
        return self.config.grid

    @property
    def prefix_tokens(self) -> int:
        """Tokens before the patches, each with a slot of its own in `pos_embed`."""
        return 2 if self.config.distilled else 1

    @property
    def head_names(self) -> tuple[str, ...]:
        """Names of the linear layers whose output is logits."""
        return ("head", "head_dist") if self.config.distilled else ("head",)

    @property
    def noise_per_sample(self) -> int:
        """Uniforms that a training-mode forward needs per sample: with drop-path one per residual branch, with dropout
        one per feature of each token that a head reads."""
        return sum(self._noise_columns)

    @property
    def _noise_columns(self) -> tuple[int, int]:
        """Columns of noise for (drop-path, dropout), in this order."""
        config = self.config
        return bool(config.drop_path) * 2 * config.depth, bool(config.dropout) * self.prefix_tokens * config.dim

    def forward(self, x: Tensor, noise: Tensor | None = None, *, grid: tuple[int, int] | None = None) -> Logits:
        """Logits `[B, num_classes]`; of a distilled model (class, distillation) logits, in train and eval mode alike.

        x      float images `[B, C, H, W]`, H and W multiples of the patch size, or their patches `[B, P, C*p*p]` (see
               `kernels.to_patches`). On another grid than the model's, its positions are interpolated to that of the
               input, in every call: the images of one step may be of several sizes
        grid   (rows, columns) of patchified input; None for the model's own
        noise  float32 `[B, noise_per_sample]` uniforms in [0, 1); needed for training with drop-path or dropout, unused
               in eval mode. With drop-path, columns 2i and 2i+1 belong to attention and MLP of block i. A branch of
               rate p is kept, and scaled by 1 / (1 - p), where its uniform is >= p (Huang et al., "Deep networks with
               stochastic depth", ECCV 2016). The columns of dropout follow, and are read in the same way, one for each
               feature of the class token and then of the distillation token

        Raises ValueError for input that is no grid of patches, and for missing or ill-shaped noise.
        """
        start = self._embed(*self._patches(x, grid))
        residual, branch, keep = self._run(start, self._keeps(noise, len(x)), rows=self.prefix_tokens)
        return self.classify(self._dropped(_add_norm(residual, branch, self.norm, keep)[1], noise))

    def tokens(
        self,
        x: Tensor,
        *,
        at: TokenMaps | None = None,
        stop: int | None = None,
        keep: Tensor | None = None,
        noise: Tensor | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        """All tokens `[B, N, dim]` after the final LayerNorm, prefix tokens first; else as `forward`.

        at    {block index: fn}: the tokens before that block are replaced by `fn(tokens)`; token pruning returns fewer
        stop  run blocks [0, stop) and return their tokens without the final LayerNorm
        keep  int64 `[B, M]`: indices of the patches to embed, with their positions; the others are never computed

        Raises ValueError for an index that no block has, and for what `forward` raises it for.
        """
        patches, grid = self._patches(x, grid)
        keeps = self._keeps(noise, len(x))
        if at is None and stop is None and keep is None:
            residual, branch, last_keep = self._run(self._embed(patches, grid), keeps)
        else:
            end = last_block(self.config.depth, at or {}, stop)
            residual, branch, last_keep = self._run_tapped(self._embed(patches, grid, keep), keeps, at or {}, end)
        if stop is not None:
            return _add(residual, branch, last_keep)
        return _add_norm(residual, branch, self.norm, last_keep)[1]

    def qkv(self, block: int, tokens: Tensor) -> QKV:
        """Queries, keys and values `[B, heads, N, head_dim]` that `block` makes of `tokens`, those before it."""
        owner = self.blocks[block]
        return owner.attn.heads_of(_add_norm(tokens, None, owner.norm1, None)[1])

    def classify(self, tokens: Tensor) -> Logits:
        """Logits, or (class, distillation) logits, of normalised tokens `[B, N, dim]`; without dropout."""
        if self.config.distilled:
            return self.head(tokens[:, 0]), self.head_dist(tokens[:, 1])
        return self.head(tokens[:, 0])

    def _patches(self, x: Tensor, grid: tuple[int, int] | None) -> tuple[Tensor, tuple[int, int]]:
        """Flat patches `[B, P, C*p*p]` of the input, and their grid (rows, columns)."""
        config, side = self.config, self.config.patch_size
        if x.ndim == 4 and x.shape[1] == config.in_chans:
            rows, columns = x.shape[2] // side, x.shape[3] // side
            if (rows * side, columns * side) == x.shape[2:] and rows and columns and grid in (None, (rows, columns)):
                return kernels.to_patches(x, side), (rows, columns)
        rows, columns = grid or config.grid
        if x.ndim == 3 and tuple(x.shape[1:]) == (rows * columns, config.in_chans * side**2):
            return x, (rows, columns)
        raise ValueError(
            f"input {tuple(x.shape)} is neither images [B, {config.in_chans}, H, W] with H and W multiples of {side}, "
            f"nor the patches [B, {rows * columns}, {config.in_chans * side**2}] of a grid of {rows}x{columns}; resize "
            f"the images, or say with grid=(rows, columns) how the patches lie"
        )

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        """Positions `[1, rows * columns, dim]` of the patches of a grid.

        Another grid than the model's is interpolated anew in every call. A copy that is kept could be stale: fused
        optimizers and replayed CUDA graphs write parameters without raising their `_version`.
        """
        positions = self.pos_embed[:, self.prefix_tokens :]
        return positions if grid == self.config.grid else interpolated(positions, self.config.grid, grid)

    def _embed(self, patches: Tensor, grid: tuple[int, int], keep: Tensor | None = None) -> Tensor:
        positions = self._positions(grid)
        if keep is not None:
            patches, positions = kept(patches, keep), positions[0, keep]
        prefix = (self.cls_token, self.dist_token) if self.config.distilled else (self.cls_token,)
        prefix = torch.cat(prefix, 1) + self.pos_embed[:, : self.prefix_tokens]
        parts = prefix.expand(len(patches), -1, -1), self.patch_embed(patches) + positions
        return torch.cat(parts if self._residual is None else [part.to(self._residual) for part in parts], 1)

    def _keeps(self, noise: Tensor | None, batch: int) -> Sequence[Tensor | None]:
        """Drop-path factors of all branches: float32 `[B]` each, or None for 1."""
        config, count = self.config, self.noise_per_sample
        if not self.training or count == 0:
            return [None] * (2 * config.depth)
        if noise is None:
            raise ValueError(
                f"training with drop_path {config.drop_path} and dropout {config.dropout} needs noise: pass float32 "
                f"uniforms in [0, 1) of shape [{batch}, {count}] (noise_per_sample columns), or call eval()"
            )
        if tuple(noise.shape) != (batch, count):
            raise ValueError(f"noise has shape {tuple(noise.shape)}, but must be [{batch}, {count}]")
        columns, _ = self._noise_columns
        if columns == 0:
            return [None] * (2 * config.depth)
        # Made on the device, every step: a buffer would be broadcast by DDP, a list copied from the host.
        first = 0.0 if config.drop_path_mode == "linear" else config.drop_path
        rates = torch.linspace(first, config.drop_path, config.depth, dtype=torch.float32, device=noise.device)
        rates = rates.repeat_interleave(2)
        return ((noise[:, :columns] >= rates) / (1 - rates)).t().contiguous().unbind(0)

    def _dropped(self, tokens: Tensor, noise: Tensor | None) -> Tensor:
        """Prefix tokens `[B, prefix, dim]` after dropout, by the last columns of the noise."""
        rate, (first, columns) = self.config.dropout, self._noise_columns
        if not self.training or columns == 0:
            return tokens
        kept_features = (noise[:, first:] >= rate) / (1 - rate)
        return tokens * kept_features.view(tokens.shape).to(tokens.dtype)

    def _run(
        self, tokens: Tensor, keeps: Sequence[Tensor | None], rows: int | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """All blocks; the last one returns the first `rows` tokens alone."""
        residual, branch, keep = tokens, None, None
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            residual, branch = self._through(block, residual, branch, keep, keeps[2 * i], rows if i == last else None)
            keep = keeps[2 * i + 1]
        return residual, branch, keep

    def _through(self, block: Block, *tokens: Any) -> tuple[Tensor, Tensor]:
        """What the block returns, without keeping its activations where they are to be computed again."""
        if self._checkpoints:
            # A block draws no random numbers, so there is no generator to bring back.
            return checkpoint(block, *tokens, use_reentrant=False, preserve_rng_state=False)
        return block(*tokens)

    def _run_tapped(
        self, tokens: Tensor, keeps: Sequence[Tensor | None], at: TokenMaps, end: int
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        residual, branch, keep = tokens, None, None
        for i in range(end):
            if i in at:
                residual, branch, keep = mapped(at, i, _add(residual, branch, keep)), None, None
            residual, branch = self._through(self.blocks[i], residual, branch, keep, keeps[2 * i])
            keep = keeps[2 * i + 1]
        return residual, branch, keep

    def stages(self, depths: Sequence[int]) -> list[list[Owner]]:
        """Owners of the parameters in the order of the computation (`contract.Tokens.stages`)."""
        return block_stages(self, depths)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only the tokens between blocks for backward, and compute each block again there: less memory, a third
        more time, the same result."""
        self._checkpoints = enable

    def set_residual(self, dtype: torch.dtype | None) -> None:
        """Keep the residual stream between the blocks, and its gradient, in this dtype; None: that of the parameters.
        LayerNorm computes in float32 all the same."""
        self._residual = dtype

    def set_keep_activations(self, enable: bool = True) -> None:
        """Keep the hidden activations of the MLPs for backward instead of making them again there."""
        for block in self.blocks:
            block.mlp.recompute = not enable

    def layers(self) -> list[list[str]]:
        """Names of the parameters by layer, from the embedding to the heads (`models.layers`)."""
        return block_layers(self)

    def decay_groups(self, decay_dist_token: bool = False) -> tuple[list[str], list[str]]:
        """Names of the parameters `(with, without)` weight decay.

        Without: 1-D parameters, biases, `pos_embed`, `cls_token` and `dist_token`. DeiT's public code decays
        `dist_token`, which its list of exceptions forgot; `decay_dist_token=True` reproduces that.
        """
        exempt = {"pos_embed", "cls_token"} if decay_dist_token else {"pos_embed", "cls_token", "dist_token"}
        return split_decay(self, exempt)

    def flops(self, image_size: ImageSize | None = None) -> int:
        """Floating-point operations (2 per multiply-add) of `forward` for one image, by default of the model's size.

        Counted are matrix products: embedding, linear layers, attention, heads. In the last block queries, projection
        and MLP count for the prefix tokens alone, as they are computed; published numbers count all tokens there.
        """
        config = self.config
        rows, columns = config.grid if image_size is None else replace(config, image_size=image_size).grid
        patches = rows * columns
        prefix, dim, tokens = self.prefix_tokens, config.dim, patches + self.prefix_tokens
        hidden = int(dim * config.mlp_ratio)
        embed = patches * config.in_chans * config.patch_size**2 * dim
        per_query = 2 * dim * dim + 2 * tokens * dim + 2 * dim * hidden
        queries = (config.depth - 1) * tokens + prefix
        blocks = queries * per_query + config.depth * tokens * 2 * dim * dim
        return 2 * (embed + blocks + prefix * dim * config.num_classes)


def trunc_normal_(tensor: Tensor) -> Tensor:
    """Fill with a normal of standard deviation 0.02, truncated at -2 and 2: absolute, as in DeiT, so hardly ever."""
    return nn.init.trunc_normal_(tensor, std=0.02, a=-2.0, b=2.0)


def init_linear(linear: nn.Linear) -> None:
    """DeiT's initialisation of a linear layer."""
    trunc_normal_(linear.weight)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
