"""DeiT III and its relatives against timm: the same weights give the same logits, gradients and drop-path. And what is
theirs alone: LayerScale, parallel blocks, average pooling and fixed positions, with the last block pruned or not."""

import math
from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from fastdeit import models
from fastdeit.models.config import ViTConfig
from fastdeit.models.families import CONFIGS
from fastdeit.models.positions import sincos
from fastdeit.models.vit import VisionTransformer

SHAPE = {"image_size": (32, 48), "patch_size": 8, "dim": 48, "depth": 3, "heads": 3, "num_classes": 5}
OF_TIMM = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 3, "num_classes": 5}
AVG = {"class_token": False, "global_pool": "avg", "fc_norm": False}
PAIRS = {
    "LayerScale": ("deit3_small_patch16_224", "deit3_small_patch16_224", {}),
    "deep": ("deit_base_patch16_36x1", "vit_small_patch16_36x1_224", {"no_embed_class": True, "init_values": 0.0}),
    "parallel": ("deit_small_patch16_18x2", "vit_small_patch16_18x2_224", {"no_embed_class": True, "init_values": 0.0}),
    "parallel LayerScale": ("deit_base_patch16_18x2_LS", "vit_base_patch16_18x2_224", {"no_embed_class": True}),
    "mean": ("vit_small_patch16_gap_224", "vit_small_patch16_224", AVG),
    "norm of mean": (
        ViTConfig(**SHAPE, pool="avg", fc_norm=True, layer_scale=0.1),
        "vit_small_patch16_224",
        {"global_pool": "avg", "init_values": 0.1},
    ),
}
"""By case: our name or config, timm's name, and the options that make it ours."""


def ours_of(source, **options):
    config = source if isinstance(source, ViTConfig) else replace(CONFIGS[source], **SHAPE)
    return VisionTransformer(replace(config, **options))


def filled(model, seed=0):
    """`model` with weights in which every tensor matters, LayerScale among them."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            offset = 1.0 if "norm" in name and name.endswith("weight") else 0.5 if name.endswith("gamma") else 0.0
            parameter.normal_(offset, 0.1, generator=generator)
    return model


def pair(case, drop_path=0.0):
    source, name, options = PAIRS[case]
    peer = filled(timm.create_model(name, **OF_TIMM, **options, drop_path_rate=drop_path))
    ours = ours_of(source, drop_path=drop_path, drop_path_mode="linear")
    ours.load_state_dict(peer.state_dict(), strict=True)
    return ours, peer


def images(batch=3, size=(32, 48)):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def noise_for(model, batch=3):
    return torch.rand(batch, model.noise_per_sample, generator=torch.Generator().manual_seed(2))


def gradients(model, logits):
    """By name, of a loss of the logits; that of the key bias, which is zero in exact arithmetic, is set to zero."""
    model.zero_grad()
    F.cross_entropy(logits, torch.tensor([3, 0, 1])).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    for name, grad in found.items():
        if name.endswith("qkv.bias"):
            grad[len(grad) // 3 : 2 * len(grad) // 3] = 0
    return found


def same_gradients(ours, peer, tolerance, dropped=False):
    """`dropped`: a branch can be dropped from all samples, and then its gradients are zero."""
    assert ours.keys() <= peer.keys()
    assert peer.keys() - ours.keys() <= {"pos_embed"}  # of fixed positions
    for name, mine in ours.items():
        scale = peer[name].abs().max()
        assert scale > 0 or dropped, name
        assert (mine - peer[name]).abs().max() <= tolerance * scale, name


# ---- against timm ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", PAIRS)
def test_tensors_logits_and_gradients_are_timms(case):
    ours, peer = pair(case)
    assert list(ours.state_dict()) == list(peer.state_dict())
    assert [name for name, _ in ours.named_parameters()] == [name for name, _ in peer.named_parameters()]
    mine, theirs = ours(images()), peer(images())
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    assert theirs.std() > 0.05
    same_gradients(gradients(ours, mine), gradients(peer, theirs), 2e-5)


class Given(nn.Module):
    """A drop-path whose factors are given."""

    def __init__(self, factors):
        super().__init__()
        self.factors = factors

    def forward(self, x):
        return x * self.factors[:, None, None]


def drop(peer, noise, drop_path):
    """Put the drop-path of `noise` into timm's blocks, in the order of the computation."""
    columns = iter(noise.T)
    for number, block in enumerate(peer.blocks):
        rate = drop_path * number / (len(peer.blocks) - 1)
        parts = [(part, "drop_path") for part in (*block.attns, *block.ffns)] if hasattr(block, "attns") else None
        for owner, name in parts or ((block, "drop_path1"), (block, "drop_path2")):
            setattr(owner, name, Given((next(columns) >= rate).float() / (1 - rate)))
    assert next(columns, None) is None


@pytest.mark.parametrize("case", ["LayerScale", "parallel", "parallel LayerScale", "norm of mean"])
def test_drop_path_is_timms_with_the_same_draws(case):
    ours, peer = pair(case, drop_path=0.6)
    noise = noise_for(ours)
    drop(peer, noise, 0.6)
    mine, theirs = ours.train()(images(), noise), peer.train()(images())
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
    assert not torch.allclose(mine, ours(images(), noise.flip(0)), atol=1e-2)
    same_gradients(gradients(ours, mine), gradients(peer, theirs), 2e-5, dropped=True)


def test_deit_3_drops_all_blocks_at_one_rate():
    vit = ours_of("deit3_small_patch16_224", drop_path=0.5)
    assert [float(kept.factor) for block in vit._keeps(torch.full((1, 6), 0.49), 1) for kept in block] == [0.0] * 6
    assert [float(kept.factor) for block in vit._keeps(torch.full((1, 6), 0.5), 1) for kept in block] == [2.0] * 6


# ---- the last block --------------------------------------------------------------------------------------------------

KINDS = ["LayerScale", "parallel LayerScale", "mean", "norm of mean"]


@pytest.mark.parametrize("case", KINDS)
def test_leaving_out_what_no_head_reads_changes_nothing(case):
    """In float64, against all tokens of the last block: logits and every gradient, with drop-path."""
    vit = filled(ours_of(PAIRS[case][0], drop_path=0.5)).double().train()
    x, noise = images().double(), noise_for(vit)
    pruned, whole = vit(x, noise), vit.classify(vit.tokens(x, noise=noise))
    torch.testing.assert_close(pruned, whole, rtol=0, atol=1e-12)
    same_gradients(gradients(vit, pruned), gradients(vit, whole), 1e-11, dropped=True)


@pytest.mark.parametrize("case", KINDS)
def test_the_last_block_computes_what_the_heads_read(case):
    vit, seen = ours_of(PAIRS[case][0]).eval(), []
    for block in vit.blocks:
        block.register_forward_hook(lambda block, args, out: seen.append(out.residual.shape[1]))
    vit(images(1))
    tokens = 24 + vit.prefix_tokens
    assert seen == [tokens, tokens, 1 if vit.config.pool == "token" else tokens]


@pytest.mark.parametrize("case", ["LayerScale", "parallel LayerScale", "mean"])
def test_blocks_that_are_computed_again_change_no_bit(case):
    vit = filled(ours_of(PAIRS[case][0], drop_path=0.5)).train()
    noise, runs = noise_for(vit), []
    kept = gradients(vit, vit(images(), noise))
    vit.set_grad_checkpointing()
    vit.blocks[0].register_forward_pre_hook(lambda *_: runs.append(1))
    again = gradients(vit, vit(images(), noise))
    assert len(runs) == 2
    assert all(torch.equal(again[name], grad) for name, grad in kept.items())


# ---- pooling and positions -------------------------------------------------------------------------------------------


def test_the_mean_is_of_patches_alone():
    vit = filled(ours_of("deit3_small_patch16_224", pool="avg")).eval()
    tokens = torch.randn(2, 25, 48)
    torch.testing.assert_close(vit.classify(tokens), vit.head(tokens[:, 1:].mean(1)))
    torch.testing.assert_close(vit.classify(tokens[:, :9]), vit.head(tokens[:, 1:9].mean(1)))  # of those that are left


def test_dropout_is_in_front_of_the_head():
    vit = filled(ours_of("vit_small_patch16_gap_224", dropout=0.25)).train()
    noise = noise_for(vit)
    assert noise.shape == (3, 48)
    pooled = vit.tokens(images(), noise=noise).mean(1)
    torch.testing.assert_close(vit(images(), noise), vit.head(pooled * (noise >= 0.25) / 0.75))


def test_fixed_positions_are_big_visions():
    """`posemb_sincos_2d`, restated."""
    rows, columns, width = 3, 5, 16
    found = sincos((rows, columns), width)
    assert found.shape == (1, 15, 16)
    for place in range(15):
        y, x = divmod(place, columns)
        omega = [1 / 10_000 ** (k / (width / 4 - 1)) for k in range(width // 4)]
        expected = [function(at * w) for at in (x, y) for function in (math.sin, math.cos) for w in omega]
        torch.testing.assert_close(found[0, place], torch.tensor(expected), rtol=0, atol=1e-6)


def test_fixed_positions_are_not_trained():
    vit = ours_of("vit_small_patch16_gap_224").train()
    assert torch.equal(vit.pos_embed, sincos((4, 6), 48))
    with torch.no_grad():
        nn.init.normal_(vit.head.weight)
    assert "pos_embed" not in gradients(vit, vit(images()))
    larger = vit.tokens(images(size=(64, 48)), stop=0)  # another grid: interpolated, as learned ones are
    assert larger.shape == (3, 48, 48)


def test_the_first_vision_transformers_began_so():
    torch.manual_seed(0)
    vit = models.build("vit_small_patch16_gap_224", depth=1)
    block = vit.blocks[0]
    assert vit.head.weight.abs().max() == vit.head.bias.abs().max() == 0
    for part, out in ((block.attn.qkv.weight[:384], 384), (block.attn.proj.weight, 384), (block.mlp.fc1.weight, 1536)):
        bound = (6 / (384 + out)) ** 0.5
        assert 0.99 * bound < part.abs().max() <= bound
        assert part.std().item() == pytest.approx(bound / 3**0.5, rel=0.01)
    assert 0 < block.mlp.fc1.bias.abs().max() < 1e-5
    assert vit.patch_embed.proj.weight.std().item() == pytest.approx(768**-0.5, rel=0.01)
    assert vit.patch_embed.proj.bias.abs().max() == 0
