"""The vision transformers that have a name: their published sizes, and their weights under the names of files."""

from dataclasses import replace
from functools import cache

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from fastdeit import models
from fastdeit.models.convert import deit_names, timm_names
from fastdeit.models.counterpart import counterpart, traceable
from fastdeit.models.families import CONFIGS, names_by_shapes
from fastdeit.models.freeze import freeze_parts
from fastdeit.models.layers import layer_scales, layers
from fastdeit.models.vit import VisionTransformer
from fastdeit.models.weights import load_weights
from fastdeit.run.settings import settings
from fastdeit.run.weights import network, open_weights

SHAPE = {"image_size": (32, 48), "patch_size": 8, "dim": 48, "depth": 2, "heads": 3, "num_classes": 5}


def small(name, **options):
    """A small model of the kind of `name`, in which every tensor matters."""
    vit = VisionTransformer(replace(CONFIGS[name], **(SHAPE | options)))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return vit.eval()


def images(size=(32, 48)):
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


# ---- sizes -----------------------------------------------------------------------------------------------------------

PUBLISHED = {
    # Millions of parameters. DeiT III: as timm counts them in benchmark-infer-amp-*.csv, rounded.
    "deit3_small_patch16_224": 22.1,
    "deit3_medium_patch16_224": 38.8,
    "deit3_base_patch16_224": 86.6,
    "deit3_large_patch16_224": 304.4,
    "deit3_huge_patch14_224": 632.1,
    # "Early convolutions help transformers see better", table 2.
    "vitc_1gf_224": 4.6,
    "vitc_4gf_224": 17.8,
    "vitc_18gf_224": 81.6,
    "vitc_36gf_224": 167.8,
}
MULTIPLY_ADDS = {"vitc_1gf_224": 1.1, "vitc_4gf_224": 4.0, "vitc_18gf_224": 17.7, "vitc_36gf_224": 35.0}
"""Billions, with all tokens in the last block; the same table."""


LARGE = "deit3_large_patch16_224", "deit3_huge_patch14_224", "vitc_18gf_224", "vitc_36gf_224"


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LARGE)) for name in PUBLISHED])
def test_parameters_are_as_many_as_published(name):
    with torch.device("meta"):
        vit = models.build(name)
    assert round(sum(parameter.numel() for parameter in vit.parameters()) / 1e6, 1) == PUBLISHED[name]


@pytest.mark.parametrize("name", MULTIPLY_ADDS)
def test_multiply_adds_are_as_many_as_published(name):
    with torch.device("meta"):
        vit = models.build(name)
    dim, hidden = vit.config.dim, int(vit.config.dim * vit.config.mlp_ratio)
    unread = 196 * (2 * dim * dim + 2 * 197 * dim + 2 * dim * hidden)
    assert (vit.flops() / 2 + unread) / 1e9 == pytest.approx(MULTIPLY_ADDS[name], abs=0.06)


def test_parallel_blocks_are_as_large_as_the_same_in_turn():
    pair = small("deit_small_patch16_18x2_LS"), small("deit_small_patch16_36_LS", depth=4)
    parallel, in_turn = (sum(parameter.numel() for parameter in vit.parameters()) for vit in pair)
    assert parallel == in_turn


# ---- which model a file is of ----------------------------------------------------------------------------------------


@cache
def shapes_of(name):
    with torch.device("meta"):
        vit = models.build(name)
    return {key: tuple(tensor.shape) for key, tensor in vit.state_dict().items()}


@pytest.mark.parametrize(
    "name",
    [
        "deit_base_distilled_patch16_384",
        "deit3_base_patch16_224",
        "deit_small_patch16_18x2_LS",
        "deit3_small_patch16_hmlp_224",
        "vit_small_patch16_gap_224",
        "vitc_18gf_224",
    ],
)
def test_shapes_tell_the_model(name):
    assert names_by_shapes(shapes_of(name)) == (name,)


def test_shapes_tell_the_model_under_deits_names_and_with_other_heads():
    for name in ("deit3_base_patch16_224", "deit_small_patch16_18x2_LS"):
        theirs = deit_names(shapes_of(name))
        assert theirs.keys() != shapes_of(name).keys()
        theirs = {key: shape for key, shape in theirs.items() if not key.startswith("head")}
        assert names_by_shapes(theirs) == (name,)
        assert names_by_shapes(theirs | {"head.weight": (7, 768)}) == (name,)
        assert names_by_shapes(theirs | {"pos_embed": (1, 5, 768)}) == ()


# ---- published layouts -----------------------------------------------------------------------------------------------


class DeitParallel(nn.Module):
    """Two branches side by side with LayerScale, in the names and the formula of DeiT's public code."""

    def __init__(self, dim, heads):
        super().__init__()
        for name in ("norm1", "norm11", "norm2", "norm21"):
            setattr(self, name, nn.LayerNorm(dim, eps=1e-6))
        for name in ("attn", "attn1"):
            setattr(self, name, timm.layers.Attention(dim, num_heads=heads, qkv_bias=True))
        for name in ("mlp", "mlp1"):
            setattr(self, name, timm.layers.Mlp(dim, 4 * dim))
        for name in ("gamma_1", "gamma_1_1", "gamma_2", "gamma_2_1"):
            setattr(self, name, nn.Parameter(torch.rand(dim)))

    def forward(self, x):
        x = x + self.gamma_1 * self.attn(self.norm1(x)) + self.gamma_1_1 * self.attn1(self.norm11(x))
        return x + self.gamma_2 * self.mlp(self.norm2(x)) + self.gamma_2_1 * self.mlp1(self.norm21(x))


@torch.no_grad()
def test_parallel_blocks_of_deits_files_compute_the_same():
    torch.manual_seed(0)
    theirs = nn.Sequential(DeitParallel(48, 3), DeitParallel(48, 3)).eval()
    ours = small("deit_base_patch16_18x2_LS")
    blocks = {f"blocks.{name}": tensor for name, tensor in theirs.state_dict().items()}
    others = {name: tensor for name, tensor in ours.state_dict().items() if not name.startswith("blocks.")}
    report = load_weights(ours, others | blocks, grid=(4, 6), may_differ=())
    assert report.converted == ("renamed the parts of parallel blocks from DeiT's names to timm's",)
    tokens = ours.tokens(images(), stop=0)
    torch.testing.assert_close(ours.tokens(images(), stop=2), theirs(tokens), rtol=1e-5, atol=1e-5)
    assert {*blocks} == {name for name in deit_names(ours.state_dict()) if name.startswith("blocks.")}


@pytest.mark.parametrize("name", ["deit3_small_patch16_224", "deit_base_patch16_18x2_LS", "deit_small_patch16_18x2"])
def test_names_of_deit_and_back(name):
    tensors = small(name).state_dict()
    theirs = deit_names(tensors)
    assert any(key.endswith((".gamma_1", ".attn1.qkv.weight")) for key in theirs)
    assert not any(".ls" in key or "attns" in key or "ffns" in key for key in theirs)
    assert list(timm_names(theirs)) == list(tensors)
    assert all(timm_names(theirs)[key] is tensor for key, tensor in tensors.items())


@torch.no_grad()
@pytest.mark.parametrize("name", ["deit3_small_patch16_224", "deit_small_patch16_18x2_LS"])
@pytest.mark.parametrize("layout", ["deit", "timm"])
def test_a_published_file_is_loaded_by_its_address(name, layout, tmp_path, monkeypatch):
    """`{"model": ...}` of torch.save with DeiT's names, or safetensors with timm's: every tensor bit for bit."""
    monkeypatch.setitem(CONFIGS, name, replace(CONFIGS[name], **SHAPE))
    tensors = small(name).state_dict()
    if layout == "deit":
        torch.save({"model": deit_names(tensors)}, tmp_path / "w.pth")
    else:
        save_file(tensors, tmp_path / "w.safetensors")
    address = str(next(tmp_path.iterdir()))
    built = network(open_weights(address), name=name, image_size=(32, 48), grid=(4, 6))
    assert all(torch.equal(built.state_dict()[key], tensor) for key, tensor in tensors.items())
    larger = network(open_weights(address), name=name, image_size=(64, 48), grid=(4, 6))
    assert larger.pos_embed.shape == (1, 48, 48)
    assert torch.equal(larger.cls_token, tensors["cls_token"])


@pytest.mark.parametrize("name", ["deit3_small_patch16_hmlp_224", "vitc_1gf_224", "deit3_small_patch16_224"])
def test_a_bare_file_has_the_size_that_its_positions_are_for(name, tmp_path, monkeypatch):
    """Also where the patches go through several layers, whose weights do not tell the size of a patch."""
    shape = {"image_size": 96, "patch_size": 16, "dim": 48, "depth": 1, "heads": 3}
    monkeypatch.setitem(CONFIGS, name, replace(CONFIGS[name], **shape, **stem(name)))
    save_file(small(name, **CONFIGS[name].__dict__).state_dict(), tmp_path / "w.safetensors")
    weights = open_weights(str(tmp_path / "w.safetensors"))
    monkeypatch.setitem(CONFIGS, name, replace(CONFIGS[name], image_size=224))
    assert settings(weights, name, []).model.image_size == 96
    assert network(weights, name=name).config.image_size == (96, 96)


def stem(name):
    return {"conv_widths": (8, 16, 32, 48)} if CONFIGS[name].stem == "conv" else {}


@torch.no_grad()
@pytest.mark.parametrize("name", ["deit3_small_patch16_224", "deit_small_patch16_18x2", "vit_small_patch16_gap_224"])
def test_timms_model_computes_the_same(name):
    ours = small(name)
    torch.testing.assert_close(counterpart(ours)(images()), ours(images()), rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ["deit3_small_patch16_hmlp_224", "vitc_1gf_224"])
def test_a_program_of_a_stem_that_timm_does_not_have_computes_the_same(name):
    ours = small(name, patch_size=16)
    theirs = traceable(ours)
    torch.testing.assert_close(theirs(images()), ours(images()), rtol=0, atol=1e-5)
    for tensor in ours.parameters():
        tensor.zero_()
    assert theirs.patch_embed.proj[0].weight.abs().max() > 0  # a copy


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("deit3_small_patch16_hmlp_224", {}, "timm has no vision transformer with the stem hmlp"),
        ("deit3_small_patch16_224", {"eps": 1e-5}, "timm's vision transformers have eps 1e-6 in LayerNorm, not 1e-05"),
        (
            "deit3_small_patch16_224",
            {"distilled": True},
            "timm has no distilled model with parallel blocks",
        ),
        ("deit_small_patch16_18x2", {"parallel": 3}, "timm has blocks of two parallel branches, not of 3"),
    ],
)
def test_what_timm_does_not_have_is_said(name, options, message):
    with pytest.raises(ValueError, match=message):
        counterpart(small(name, **options))


# ---- what works for all of them --------------------------------------------------------------------------------------


def test_layers_and_frozen_parts_of_parallel_blocks():
    vit = small("deit_small_patch16_18x2_LS")
    assert [len(names) for names in layers(vit)] == [4, 28, 28 + 2, 2]
    assert layer_scales(vit, 0.5)["blocks.1.attns.1.ls.gamma"] == 0.5
    freeze_parts(vit, ["all_but_attention"])
    trained = {name for name, parameter in vit.named_parameters() if parameter.requires_grad}
    assert "blocks.1.attns.1.attn.proj.weight" in trained
    assert not any(".ffns." in name or name.endswith("norm.weight") for name in trained)


def test_the_norm_behind_the_mean_goes_with_the_head():
    """As in timm, whose `layer_decay` leaves both as they are."""
    vit = small("deit3_small_patch16_224", pool="avg", fc_norm=True)
    assert layers(vit)[-1] == ["fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"]
    _, no_decay = vit.decay_groups()
    assert {"blocks.0.ls1.gamma", "fc_norm.weight"} <= set(no_decay)
