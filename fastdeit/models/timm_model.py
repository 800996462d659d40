"""Any timm model under the contract of fastdeit's models: as a student, as a teacher, as the peer in a comparison.

timm's code computes; this adapter only gives it the contract's face. Drop-path and dropout inside draw from torch's own
generator, so unlike fastdeit's models the result of training with them depends on the number of processes.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import timm
import torch
from huggingface_hub import try_to_load_from_cache
from timm.layers import PatchEmbed, resize_rel_pos_bias_table, resize_rel_pos_bias_table_levit
from timm.models import PretrainedCfg, group_parameters
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from fastdeit.fields import size_pair
from fastdeit.models.contract import (
    Attends,
    ImageSize,
    Logits,
    Owner,
    TokenMaps,
    counted_flops,
    refuse_patches,
    split_decay,
)
from fastdeit.models.tokens import QKV, attended, block_stages, kept, last_block, mapped
from fastdeit.text import did_you_mean

_DIST_HEAD = re.compile(r"(^|\.)heads?_dist\.")


def build(
    name: str,
    *,
    image_size: ImageSize | None = None,
    num_classes: int | None = None,
    drop_path: float = 0.0,
    dropout: float = 0.0,
    pretrained: bool = False,
) -> "TimmModel":
    """The timm model `name`.

    image_size   int or (height, width); None for the model's own. Models that work at any size ignore it
    num_classes  None for the model's own, 0 for none: no head, and pooled features `[B, dim]` in the place of logits
    drop_path    timm's `drop_path_rate`
    dropout      timm's `drop_rate`
    pretrained   timm's weights, which timm downloads once

    timm's vision transformers (ViT, DeiT, DeiT III, DINOv2, CLIP, MAE, ...) come as a `TimmVisionTransformer`, which
    has tokens. Raises ValueError for a name that timm does not know, for options that the model does not take, and for
    an image that is no grid of its patches.
    """
    rates = {"drop_path_rate": drop_path, "drop_rate": dropout}
    inner = _create(name, image_size, num_classes, {option: rate for option, rate in rates.items() if rate}, pretrained)
    size = size_pair(image_size or inner.pretrained_cfg["input_size"][1:], "image_size")
    _check_patches(name, inner, size)
    return (TimmVisionTransformer if isinstance(inner, VisionTransformer) else TimmModel)(name, inner, size)


class TimmModel(nn.Module):
    """timm's model `inner`, of the name `name`, for images of `image_size` (height, width) in pixels.

    Distilled models return (class, distillation) logits in train and eval mode alike; timm averages them in eval mode.
    """

    patch_size = None
    noise_per_sample = 0

    def __init__(self, name: str, inner: nn.Module, image_size: tuple[int, int]) -> None:
        super().__init__()
        # The adapter has no tensors of its own: it shares timm's registries instead of holding timm's model as a child,
        # so that the names of parameters and of the state dict are timm's everywhere, without a prefix to add and
        # strip.
        self.__dict__["inner"] = inner
        for registry in ("_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"):
            self.__dict__[registry] = inner.__dict__[registry]
        self.name = name
        self.image_size = image_size
        self.distilled = any(_DIST_HEAD.search(key) for key, _ in self.named_parameters())
        if self.distilled:
            inner.set_distilled_training(True)
        self.train()

    def train(self, mode: bool = True) -> "TimmModel":
        """Training or eval mode.

        timm returns both logits only where `training` is set, so the flag of the module that asks stays set; dropout,
        drop-path and batch norm are modules below it and follow `mode`.
        """
        self.inner.train(mode)
        self.training = mode
        if self.distilled:
            for module in self.inner.modules():
                if hasattr(module, "distilled_training"):
                    module.training = True
        return self

    def __getattr__(self, name: str) -> Any:
        """Says of what `contract.Tokens` asks and this model lacks why that is so; an AttributeError all the same."""
        if name in ("tokens", "qkv", "classify"):
            raise AttributeError(
                f"timm's {self.name} is a {type(self.inner).__name__}, whose tokens cannot be read: its blocks may "
                "take more than tokens, such as the positions of EVA and BEiT. Those of timm's VisionTransformer can "
                "(ViT, DeiT, DeiT III, DINOv2, CLIP, MAE); of others, ask `inner.forward_intermediates`"
            )
        return super().__getattr__(name)

    @property
    def mean(self) -> tuple[float, ...]:
        """Channel means of the input normalisation the published weights expect, in units of [0, 1]."""
        return tuple(self.inner.pretrained_cfg["mean"])

    @property
    def std(self) -> tuple[float, ...]:
        """Channel standard deviations, as `mean`."""
        return tuple(self.inner.pretrained_cfg["std"])

    @property
    def grid(self) -> tuple[int, int] | None:
        """(rows, columns) of patches of the positional embedding; None for a model without patches."""
        return getattr(getattr(self.inner, "patch_embed", None), "grid_size", None)

    @property
    def prefix_tokens(self) -> int:
        """Tokens before the patches."""
        return getattr(self.inner, "num_prefix_tokens", 0)

    @property
    def prefix_positions(self) -> int:
        """Positions in the positional embedding before those of the patches."""
        positions, grid = getattr(self.inner, "pos_embed", None), self.grid
        if grid is None or not isinstance(positions, Tensor) or positions.ndim != 3:
            return 0
        # Not `num_prefix_tokens`: DeiT III and CaiT add their tokens behind the positions.
        return positions.shape[1] - grid[0] * grid[1]

    @property
    def head_names(self) -> tuple[str, ...]:
        """Names of the linear layers whose output is logits; none where `num_classes` is 0."""
        if self.inner.num_classes == 0:
            return ()
        classifier = self.inner.pretrained_cfg["classifier"]
        return (classifier,) if isinstance(classifier, str) else tuple(classifier)

    def resized_weights(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights with tables of attention's biases for this image size, as `contract.Model` has it.

        timm's functions interpolate those of BEiT, MaxViT and CoAtNet (`relative_position_bias_table`) and those of
        LeViT (`attention_biases`). The weights' own tables are taken for those of squares. What cannot be resized, as
        LeViT's for images that are no squares, stays, and does not fit then.
        """
        own, found = self.state_dict(), dict(tensors)
        for name, tensor in tensors.items():
            if name in own and tensor.shape != own[name].shape and tensor.ndim == own[name].ndim:
                owner, _, kind = name.rpartition(".")
                square = self.image_size[0] == self.image_size[1]
                made = _resized_table(kind, tensor, own[name].shape, self.get_submodule(owner), square)
                found[name] = tensor if made is None else made
        return found

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Logits:
        """Logits, or (class, distillation) logits, of float images `[B, C, H, W]`; `noise` is accepted and unused."""
        refuse_patches(x, f"timm's {self.name}")
        return self.inner(x)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """timm's own, for `forward`; `tokens` keeps all activations. Raises ValueError where the model has none."""
        try:
            self.inner.set_grad_checkpointing(enable)
        except (AttributeError, AssertionError) as error:
            raise ValueError(f"timm's {self.name} cannot compute its activations again: {error}") from error

    def layers(self) -> list[list[str]]:
        """Names of the parameters by layer (`models.layers`), as timm's `group_matcher` orders them.

        Raises ValueError for a model of timm that has none.
        """
        if not hasattr(self.inner, "group_matcher"):
            raise ValueError(f"timm's {self.name} does not say how deep its parameters lie: it has no group_matcher")
        depths = group_parameters(self.inner, self.inner.group_matcher(coarse=False), reverse=True)
        found: list[list[str]] = [[] for _ in range(1 + max(depths.values()))]
        for name, _ in self.named_parameters():
            found[depths[name]].append(name)
        return found

    def decay_groups(self, decay_dist_token: bool = False) -> tuple[list[str], list[str]]:
        """Names of the parameters `(with, without)` weight decay: without are 1-D, biases, and what timm lists.

        `decay_dist_token=True` decays the distillation token as DeiT's public code does.
        """
        exempt = set(self.inner.no_weight_decay()) if hasattr(self.inner, "no_weight_decay") else set()
        return split_decay(self, exempt - {"dist_token"} if decay_dist_token else exempt)

    def flops(self, image_size: ImageSize | None = None) -> int:
        """Floating-point operations (2 per multiply-add) of `forward` for one image, as `contract.counted_flops`."""
        size = self.image_size if image_size is None else size_pair(image_size, "image_size")
        return counted_flops(self, (1, self.inner.pretrained_cfg["input_size"][0], *size))


def _resized_table(kind: str, table: Tensor, shape: torch.Size, owner: nn.Module, square: bool) -> Tensor | None:
    """`table` of attention's biases of module `owner` in another `shape`; None where timm cannot resize it.

    square  whether it is to be for images that are squares
    """
    if kind == "attention_biases" and table.ndim == 2 and len(table) == shape[0]:  # [heads, distances]
        square = square and math.isqrt(table.shape[1]) ** 2 == table.shape[1]
        return resize_rel_pos_bias_table_levit(table.T, (shape[1], shape[0])).T.contiguous() if square else None
    if kind == "relative_position_bias_table" and hasattr(owner, "window_size"):
        try:
            return resize_rel_pos_bias_table(table, new_window_size=owner.window_size, new_bias_shape=shape)
        except (AssertionError, RuntimeError, ValueError):
            return None
    return None


class TimmVisionTransformer(TimmModel):
    """A vision transformer of timm, with its tokens (`contract.Tokens`)."""

    def tokens(
        self,
        x: Tensor,
        *,
        at: TokenMaps | None = None,
        stop: int | None = None,
        keep: Tensor | None = None,
        attend: Attends | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """All tokens `[B, N, dim]` after the final norm, as `contract.Tokens.tokens`; `noise` is accepted and unused.

        With `keep` all patches are embedded, and those not named are dropped before the first block.
        """
        refuse_patches(x, f"timm's {self.name}")
        inner, at, attend = self.inner, at or {}, attend or {}
        end = last_block(len(self.blocks), at, attend, stop)
        # From here on timm's `forward_features`, block by block.
        tokens = inner.norm_pre(inner.patch_drop(inner._pos_embed(inner.patch_embed(x))))
        if keep is not None:
            prefix = inner.num_prefix_tokens
            tokens = torch.cat((tokens[:, :prefix], kept(tokens[:, prefix:], keep)), 1)
        for index, block in enumerate(self.blocks[:end]):
            tokens = mapped(at, index, tokens) if index in at else tokens
            tokens = self._attending(index, tokens, attend[index]) if index in attend else block(tokens)
        return tokens if stop is not None else inner.norm(tokens)

    def _attending(self, index: int, tokens: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """timm's `Block.forward` with other attention."""
        q, k, v = self.qkv(index, tokens)
        block = self.blocks[index]
        if getattr(block.attn, "gate", None) is not None:
            raise ValueError(
                f"block {index} of timm's {self.name} has a gate behind attention, which attend leaves out"
            )
        mixed = getattr(block.attn, "norm", nn.Identity())(attended(attend, q, k, v))
        tokens = tokens + block.drop_path1(block.ls1(block.attn.proj_drop(block.attn.proj(mixed))))
        return tokens + block.drop_path2(block.ls2(block.mlp(block.norm2(tokens))))

    def qkv(self, block: int, tokens: Tensor) -> QKV:
        """Queries, keys and values `[B, heads, N, head_dim]` that `block` makes of `tokens`, those before it.

        Raises ValueError for a block that is not timm's pre-norm `Block` with its `Attention`.
        """
        owner = self.blocks[block]
        if not (isinstance(owner, Block) and isinstance(owner.attn, Attention)):
            attention = type(getattr(owner, "attn", None)).__name__
            raise ValueError(
                f"block {block} of timm's {self.name} is a {type(owner).__name__} with attention {attention}; q, k and "
                "v are known of timm's Block with Attention alone"
            )
        attention = owner.attn
        q, k, v = attention.qkv(owner.norm1(tokens)).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return attention.q_norm(q), attention.k_norm(k), v

    def classify(self, tokens: Tensor) -> Logits:
        """timm's `forward_head`: logits of what `tokens` returned."""
        return self.inner.forward_head(tokens)

    def stages(self, depths: Sequence[int]) -> list[list[Owner]]:
        """Owners of the parameters in the order of the computation (`contract.Tokens.stages`)."""
        return block_stages(self, depths)


def published(name: str) -> PretrainedCfg | None:
    """What timm knows of the weights that it publishes for its model `name`; None where it has no entry for them.

    Raises ValueError for a name, or a tag behind its dot, that timm does not know.
    """
    base, _, tag = name.partition(".")
    if not timm.is_model(name):
        hint = did_you_mean(base, timm.list_models())
        raise ValueError(f"timm {timm.__version__} has no model {name!r}{hint or '; see timm.list_models()'}")
    try:
        return timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        tags = ", ".join(timm.list_pretrained(f"{base}.*"))
        raise ValueError(f"timm {timm.__version__} has no weights {tag!r} of {base}; there are {tags}") from error


def _create(
    name: str, image_size: ImageSize | None, num_classes: int | None, rates: dict[str, float], pretrained: bool
) -> nn.Module:
    config, options = published(name), dict(rates)
    if num_classes is not None:
        options["num_classes"] = num_classes
    if image_size is not None and config is not None and config.fixed_input_size:
        options["img_size"] = size_pair(image_size, "image_size")
    if pretrained and (file := cached(config)) is not None:
        options["pretrained_cfg_overlay"] = {"file": file}
    try:
        return timm.create_model(name, pretrained=pretrained, **options)
    except TypeError as error:
        raise ValueError(f"timm's {name} cannot be built with {options}: {error}") from error


def _check_patches(name: str, inner: nn.Module, size: tuple[int, int]) -> None:
    """timm says the same in the first forward, by an assertion."""
    embed = getattr(inner, "patch_embed", None)
    if not isinstance(embed, PatchEmbed) or embed.dynamic_img_pad:
        return
    if any(side % patch for side, patch in zip(size, embed.patch_size, strict=True)):
        height, width = size
        patch = "x".join(map(str, embed.patch_size))
        raise ValueError(f"timm's {name}: image_size {height}x{width} is not a multiple of the patch size {patch}")


def cached(config: PretrainedCfg | None) -> str | None:
    """Path of the published weights in the hub's cache, None where they are not there.

    Given the path, timm asks no server. Otherwise it does even where it has the file, which without a network takes it
    most of a minute.
    """
    if config is None or not isinstance(config.hf_hub_id, str) or config.custom_load:
        return None
    repository, _, revision = config.hf_hub_id.partition("@")
    for name in ("model.safetensors", "pytorch_model.bin"):
        if isinstance(file := try_to_load_from_cache(repository, name, revision=revision or None), str):
            return file
    return None
