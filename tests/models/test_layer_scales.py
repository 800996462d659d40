"""Layers of parameters, and the factors that layer decay makes of them, against timm's `param_groups_layer_decay`."""

import pytest
import timm
import torch
from timm.optim import param_groups_layer_decay
from torch import nn

from fastdeit import models
from fastdeit.models.layers import hidden_matrices, layer_scales, layers
from fastdeit.models.timm_model import TimmModel

DECAY = 0.7
OURS = "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"
THEIRS = (
    *("vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "deit3_small_patch16_224", "test_vit4"),
    *("vit_base_patch16_clip_224", "cait_xxs24_224", "test_resnet", "test_convnext", "test_efficientnet", "levit_128s"),
)


def scales_of_timm(model):
    """The factor of each parameter of a model of timm, or of any that has a `group_matcher`."""
    names = {id(p): name for name, p in model.named_parameters()}
    groups = param_groups_layer_decay(model, layer_decay=DECAY)
    return {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}


def on_meta(make, *names, **options):
    with torch.device("meta"):
        return make(*names, **options)


@pytest.mark.parametrize("name", OURS)
def test_our_factors_are_those_of_timms_twin(name):
    ours = on_meta(models.build, name, num_classes=5)
    assert layer_scales(ours, DECAY) == scales_of_timm(on_meta(timm.create_model, name, num_classes=5))


@pytest.mark.parametrize("name", THEIRS)
def test_factors_of_timms_models_are_timms(name):
    inner = on_meta(timm.create_model, name, num_classes=5)
    adapter = TimmModel(name, inner, (224, 224))
    assert layer_scales(adapter, DECAY) == scales_of_timm(inner)


def test_the_convnet_has_a_layer_for_each_convolution():
    model = on_meta(models.build, "convnet_digits")
    model.group_matcher = lambda coarse: {"blocks": r"^(?:convs|norms)\.(\d+)"}
    assert layer_scales(model, DECAY) == scales_of_timm(model)


def test_layers_by_hand():
    """Embedding, two blocks, the second with the norm behind it, heads: factors 1/8, 1/4, 1/2 and 1."""
    model = on_meta(models.build, "deit_digits_distilled_patch8_32", depth=2)
    scales = layer_scales(model, 0.5)
    assert {scales[f"head{kind}.weight"] for kind in ("", "_dist")} == {1}
    assert (scales["norm.weight"], scales["blocks.1.attn.qkv.weight"], scales["blocks.0.norm1.bias"]) == (
        0.5,
        0.5,
        0.25,
    )
    assert {scales[name] for name in ("cls_token", "dist_token", "pos_embed", "patch_embed.proj.weight")} == {0.125}
    assert sorted(name for names in layers(model) for name in names) == sorted(dict(model.named_parameters()))


def test_hidden_matrices_are_the_weights_of_the_blocks():
    model = on_meta(models.build, "deit_digits_patch8_32", depth=2)
    ends = "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"
    assert hidden_matrices(model) == {f"blocks.{block}.{end}.weight" for block in (0, 1) for end in ends}


class Blocks(nn.Module):
    """A transformer of somebody else's, which has tokens and no `layers`."""

    head_names = ("out",)

    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(2, 2)
        self.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
        self.last = nn.LayerNorm(2)
        self.out = nn.Linear(2, 2)

    def tokens(self, x): ...

    qkv = classify = stages = tokens


def test_layers_of_a_foreign_transformer_are_read_from_its_names():
    found = [sorted({name.rpartition(".")[0] for name in names}) for names in layers(Blocks())]
    assert found == [["stem"], ["blocks.0"], ["blocks.1", "last"], ["out"]]


def test_a_model_that_says_nothing_is_refused():
    with pytest.raises(ValueError, match=r"Linear does not say how deep .* give it a method layers\(\)"):
        layers(nn.Linear(2, 2))
