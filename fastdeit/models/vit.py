"""The vision transformer (Dosovitskiy et al., ICLR 2021) with what the DeiT family added to it, on `fastdeit.kernels`.

Modules, parameter names and their order are timm's, so state dicts are interchangeable. The computation differs in
three ways, none of which changes the result:

* A residual addition waits for the LayerNorm that follows it: addition, LayerScale, drop-path and LayerNorm are one
  kernel. Between two blocks the tokens therefore exist as a `blocks.Stream`.
* Drop-path reads its uniforms from an argument instead of a generator, so a sample meets the same noise wherever it is
  computed.
* Where the heads read only the class (and distillation) token of the last block, `forward` drops the others as soon as
  their keys and values have been used: before the last projection and the last MLP.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastdeit import kernels
from fastdeit.kernels._hooks import hooks
from fastdeit.models.blocks import Attention, Block, Mlp, ParallelBlock, Stream
from fastdeit.models.config import ViTConfig
from fastdeit.models.contract import Attends, ImageSize, Logits, Owner, TokenMaps, refuse_patches, split_decay
from fastdeit.models.drop_path import Kept, drawn, dropped_of, skipping
from fastdeit.models.embedding import joined
from fastdeit.models.init import SCHEMES
from fastdeit.models.layers import block_layers
from fastdeit.models.positions import interpolated, sincos
from fastdeit.models.stems import STEMS
from fastdeit.models.tokens import QKV, block_stages, kept, last_block, mapped

Keeps = Sequence[Sequence[Kept]]


class VisionTransformer(nn.Module):
    """ViT, DeiT with its second token and head, DeiT III and their relatives: what `ViTConfig` describes. Same
    parameters and results as timm's, where timm has the model."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self._checkpoints = False
        self._residual: torch.dtype | None = None
        self._skip: tuple[int, tuple[int, ...]] | None = None
        patches, dim = config.grid[0] * config.grid[1], config.dim
        if config.class_token:
            self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        learned, positions = config.positions == "learned", torch.empty(1, patches + config.prefix_positions, dim)
        self.pos_embed = nn.Parameter(positions, requires_grad=learned)
        if config.distilled:
            self.dist_token = nn.Parameter(torch.empty(1, 1, dim))
        self.patch_embed = STEMS[config.stem](config)
        block = Block if config.parallel == 1 else ParallelBlock
        self.blocks = nn.ModuleList(block(config) for _ in range(config.depth))
        self.norm = nn.Identity() if config.fc_norm else nn.LayerNorm(dim, eps=config.eps)
        if config.fc_norm:
            self.fc_norm = nn.LayerNorm(dim, eps=config.eps)
        self.head = nn.Linear(dim, config.num_classes)
        if config.distilled:
            self.head_dist = nn.Linear(dim, config.num_classes)
        SCHEMES[config.init](self)
        if not learned:
            self.pos_embed.data.copy_(sincos(config.grid, dim))

    @property
    def distilled(self) -> bool:
        """Whether `forward` returns two logits."""
        return self.config.distilled

    @property
    def patch_size(self) -> int | None:
        """Pixels per side of a patch; None for a stem that does not look at each patch by itself, but at images."""
        return self.config.patch_size if self.patch_embed.takes_patches else None

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches that the positional embedding is for."""
        return self.config.grid

    @property
    def prefix_tokens(self) -> int:
        """Tokens before the patches."""
        return self.config.prefix_tokens

    @property
    def prefix_positions(self) -> int:
        """Positions in `pos_embed` before those of the patches."""
        return self.config.prefix_positions

    @property
    def head_names(self) -> tuple[str, ...]:
        """Names of the linear layers whose output is logits."""
        return ("head", "head_dist") if self.config.distilled else ("head",)

    @property
    def noise_per_sample(self) -> int:
        """Uniforms that a training-mode forward needs per sample: with drop-path one per residual branch, with dropout
        one per feature that a head reads."""
        return sum(self._noise_columns)

    @property
    def _noise_columns(self) -> tuple[int, int]:
        """Columns of noise for (drop-path, dropout), in this order."""
        config = self.config
        branches = bool(config.drop_path) * 2 * config.parallel * config.depth
        return branches, bool(config.dropout) * len(self.head_names) * config.dim

    def forward(self, x: Tensor, noise: Tensor | None = None, *, grid: tuple[int, int] | None = None) -> Logits:
        """Logits `[B, num_classes]`; of a distilled model (class, distillation) logits, in train and eval mode alike.

        x      float images `[B, C, H, W]`, H and W multiples of the patch size, or, where the model has a `patch_size`,
               their patches `[B, P, C*p*p]` (see `kernels.to_patches`). On another grid than the model's, its positions
               are interpolated to that of the input, in every call: the images of one step may be of several sizes
        grid   (rows, columns) of patchified input; None for the model's own
        noise  float32 `[B, noise_per_sample]` uniforms in [0, 1); needed for training with drop-path or dropout, unused
               in eval mode. With drop-path, columns 2i and 2i+1 belong to attention and MLP of block i; a block of n
               parallel branches has 2n columns, those of its attentions first. `models.drop_path` says how they are
               read: for each sample by itself, or, after `set_drop_path_skip`, by groups. The columns of dropout
               follow, one for each feature that the first head reads, and then for each that the second reads: a
               feature is kept, and scaled by 1 / (1 - p), where its uniform is >= p

        Raises ValueError for input that is no grid of patches, and for missing or ill-shaped noise.
        """
        x, grid = self._input(x, grid)
        rows = self.prefix_tokens if self.config.pool == "token" else None
        stream = self._run(self._embed(x, grid), self._keeps(noise, len(x)), rows)
        return self._logits(self._dropped(self._pooled(self._normed(stream)), noise))

    def tokens(
        self,
        x: Tensor,
        *,
        at: TokenMaps | None = None,
        stop: int | None = None,
        keep: Tensor | None = None,
        attend: Attends | None = None,
        noise: Tensor | None = None,
        grid: tuple[int, int] | None = None,
    ) -> Tensor:
        """All tokens `[B, N, dim]` after the final LayerNorm, prefix tokens first; else as `forward`.

        at      {block index: fn}: the tokens before that block are replaced by `fn(tokens)`; token pruning returns
                fewer
        stop    run blocks [0, stop) and return their tokens without the final LayerNorm
        keep    int64 `[B, M]`: indices of the patches to embed, with their positions; the others are never computed
        attend  {block index: fn}: what stands in for softmax attention there (`contract.Tokens`), in plain PyTorch

        Raises ValueError for an index that no block has, for what `forward` raises it for, and for `attend` in blocks
        of parallel attentions or with samples that are skipped (`set_drop_path_skip`), which have no tokens there.
        """
        x, grid = self._input(x, grid)
        keeps = self._keeps(noise, len(x))
        at, attend = at or {}, attend or {}
        end = last_block(self.config.depth, at, attend, stop)
        if attend and (self.config.parallel > 1 or (self.training and self._skip is not None)):
            raise ValueError(
                "attend needs one attention a block and all samples in it: take a model without parallel blocks, and "
                "leave model.drop_path_skip out"
            )
        stream = Stream(self._embed(x, grid, keep))
        for number in range(end):
            if number in at:
                stream = Stream(mapped(at, number, stream.sum()))
            own = (None, attend[number]) if number in attend else ()
            stream = self._through(self.blocks[number], stream, keeps[number], *own)
        return self._normed(stream) if stop is None else stream.sum()

    def qkv(self, block: int, tokens: Tensor) -> QKV:
        """Queries, keys and values `[B, heads, N, head_dim]` that `block` makes of `tokens`, those before it. Parallel
        attentions count as further heads."""
        return self.blocks[block].qkv(tokens)

    def classify(self, tokens: Tensor) -> Logits:
        """Logits, or (class, distillation) logits, of what `tokens` returned, `[B, N, dim]`; without dropout."""
        return self._logits(self._pooled(tokens))

    def _normed(self, stream: Stream) -> Tensor:
        """The tokens after the final LayerNorm, where that is not behind the mean."""
        return stream.sum() if self.config.fc_norm else stream.normed(self.norm)[1]

    def _pooled(self, tokens: Tensor) -> Tensor:
        """What the heads read, `[B, heads, dim]`, of the tokens after the final LayerNorm."""
        if self.config.pool == "token":
            return tokens[:, : len(self.head_names)]
        mean = tokens[:, self.prefix_tokens :].mean(1, keepdim=True)
        return Stream(mean).normed(self.fc_norm)[1] if self.config.fc_norm else mean

    def _logits(self, features: Tensor) -> Logits:
        heads = [getattr(self, name) for name in self.head_names]
        if all(map(_is_plain, heads)):  # their weights and biases are cast together
            operands = kernels.autocast_copies([tensor for head in heads for tensor in (head.weight, head.bias)])
            pairs = zip(features.unbind(1), operands[::2], operands[1::2], strict=True)
            logits = [F.linear(feature, weight, bias) for feature, weight, bias in pairs]
        else:
            logits = [head(feature) for head, feature in zip(heads, features.unbind(1), strict=True)]
        return tuple(logits) if self.config.distilled else logits[0]

    def _input(self, x: Tensor, grid: tuple[int, int] | None) -> tuple[Tensor, tuple[int, int]]:
        """What the stem takes, flat patches `[B, P, C*p*p]` or images, and the grid (rows, columns) of the patches."""
        config, side, patches = self.config, self.config.patch_size, self.patch_embed.takes_patches
        if x.ndim == 4 and x.shape[1] == config.in_chans:
            rows, columns = x.shape[2] // side, x.shape[3] // side
            if (rows * side, columns * side) == x.shape[2:] and rows and columns and grid in (None, (rows, columns)):
                return (kernels.to_patches(x, side) if patches else x), (rows, columns)
        if not patches:
            refuse_patches(x, f"a vision transformer with the stem {config.stem}")
        rows, columns = grid or config.grid
        if patches and x.ndim == 3 and tuple(x.shape[1:]) == (rows * columns, config.in_chans * side**2):
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
        positions = self.pos_embed[:, self.prefix_positions :]
        return positions if grid == self.config.grid else interpolated(positions, self.config.grid, grid)

    def _embed(self, x: Tensor, grid: tuple[int, int], keep: Tensor | None = None) -> Tensor:
        """Tokens `[B, prefix + P, dim]` before the first block; `keep` as of `tokens`."""
        positions = self._positions(grid)
        if keep is None:
            patches = self.patch_embed(x)
        else:
            patches = self.patch_embed(kept(x, keep)) if self.patch_size else kept(self.patch_embed(x), keep)
            positions = positions[0, keep]
        dtype = self._residual or torch.promote_types(patches.dtype, positions.dtype)
        if not self.config.class_token:
            return (patches + positions).to(dtype)
        prefix = torch.cat((self.cls_token, self.dist_token), 1) if self.config.distilled else self.cls_token
        if self.prefix_positions:
            prefix = prefix + self.pos_embed[:, : self.prefix_positions]
        return joined(prefix, patches, positions, dtype)

    def _keeps(self, noise: Tensor | None, batch: int) -> Keeps:
        """What drop-path leaves of the branches of each block."""
        config, count = self.config, self.noise_per_sample
        each = 2 * config.parallel
        none = [[Kept()] * each] * config.depth
        if not self.training or count == 0:
            return none
        if noise is None:
            raise ValueError(
                f"training with drop_path {config.drop_path} and dropout {config.dropout} needs noise: pass float32 "
                f"uniforms in [0, 1) of shape [{batch}, {count}] (noise_per_sample columns), or call eval()"
            )
        if tuple(noise.shape) != (batch, count):
            raise ValueError(f"noise has shape {tuple(noise.shape)}, but must be [{batch}, {count}]")
        columns, _ = self._noise_columns
        if columns == 0:
            return none
        uniforms = noise[:, :columns]
        if self._skip is None:
            keeps = drawn(uniforms, config)
        else:
            group, dropped = self._skip
            keeps = skipping(uniforms, dropped, group)
        return [keeps[start : start + each] for start in range(0, columns, each)]

    def _dropped(self, features: Tensor, noise: Tensor | None) -> Tensor:
        """Features `[B, heads, dim]` after dropout, by the last columns of the noise."""
        rate, (first, columns) = self.config.dropout, self._noise_columns
        if not self.training or columns == 0:
            return features
        factors = (noise[:, first:] >= rate) / (1 - rate)
        return features * factors.view(features.shape).to(features.dtype)

    def _run(self, tokens: Tensor, keeps: Keeps, rows: int | None) -> Stream:
        """All blocks; the last one returns the first `rows` tokens alone."""
        stream, last = Stream(tokens), len(self.blocks) - 1
        for number, block in enumerate(self.blocks):
            stream = self._through(block, stream, keeps[number], rows if number == last else None)
        return stream

    def _through(self, block: nn.Module, *inputs: Any) -> Stream:
        """What the block returns, without keeping its activations where they are to be computed again."""
        if self._checkpoints:
            # A block draws no random numbers, so there is no generator to bring back.
            return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
        return block(*inputs)

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

    def set_drop_path_skip(self, group: int) -> None:
        """In training, compute the branches of those samples alone that keep them: of every `group` samples in a row a
        fixed number (`drop_path.skipping`). Batches are then multiples of `group`.

        Raises ValueError for a model without drop-path, and for a group too small for its rate.
        """
        if self.config.drop_path == 0:
            raise ValueError("drop_path is 0, so that there is nothing to skip")
        self._skip = group, dropped_of(self.config, group)

    def set_fp8_products(self, enable: bool = True) -> None:
        """In training, let the products of the blocks' linear layers, and of the gradients of their inputs, be of 8
        bits (`kernels.fp8_linear`). Not those of a last block of which the heads read tokens of the prefix alone: it
        computes little, and what the heads read is worth the precision.

        Raises ValueError for a width that such products do not take, and where no block is left.
        """
        config = self.config
        if reason := kernels.fp8_refusal(torch.device("cpu"), config.dim, int(config.dim * config.mlp_ratio)):
            raise ValueError(reason)
        blocks = self.blocks[:-1] if config.pool == "token" else self.blocks
        if not len(blocks):
            raise ValueError("the only block of the model is its last, whose products stay as they are")
        for module in blocks.modules():
            if isinstance(module, (Attention, Mlp)):
                module.fp8 = enable

    def set_keep_activations(self, enable: bool = True) -> None:
        """Keep the hidden activations of the MLPs for backward instead of making them again there."""
        for module in self.blocks.modules():
            if isinstance(module, Mlp):
                module.recompute = not enable

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

        Counted are matrix products and convolutions: stem, linear layers, attention, heads. Where the heads read tokens
        of the prefix, queries, projection and MLP of the last block count for these alone, as they are computed;
        published numbers count all tokens there.
        """
        config = self.config
        rows, columns = config.grid if image_size is None else replace(config, image_size=image_size).grid
        patches, heads, dim = rows * columns, len(self.head_names), config.dim
        tokens = patches + self.prefix_tokens
        hidden = int(dim * config.mlp_ratio)
        per_query = 2 * dim * dim + 2 * tokens * dim + 2 * dim * hidden
        queries = (config.depth - 1) * tokens + (self.prefix_tokens if config.pool == "token" else tokens)
        blocks = config.parallel * (queries * per_query + config.depth * tokens * 2 * dim * dim)
        return 2 * (self.patch_embed.multiply_adds(patches) + blocks + heads * dim * config.num_classes)


def _is_plain(head: nn.Module) -> bool:
    """Whether calling `head` does nothing but its product: somebody may have put another module there, or hooks."""
    return type(head) is nn.Linear and head.bias is not None and not any(hooks(head))
