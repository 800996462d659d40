"""What timm's own `tests/test_models.py` asks of a model, asked with and without `accelerate`: any difference fails.

Restated, because timm's wheel has no tests: small models of every family of vision transformers, and each of the things
that those tests, and the methods that all of timm's transformers share, do with a model. What raises for timm's model
has to raise for the accelerated one, too.
"""

from collections.abc import Callable
from copy import deepcopy
from functools import cache

import pytest
import timm
import torch
from timm.models import create_feature_extractor, group_parameters
from timm.models._features import FeatureGetterNet

from fastdeit.kernels import accelerate
from tests.kernels.proof import normal
from tests.kernels.timm_models import TINY, images_for

FAMILIES = [
    *("vit_tiny_patch16_224", "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "deit3_small_patch16_224"),
    *("vit_medium_patch16_reg4_gap_256", "vit_base_patch16_clip_224", "vit_base_patch14_reg4_dinov2"),
    *(
        "vit_base_patch16_siglip_224",
        "vit_base_patch16_siglip_gap_224",
        "eva_giant_patch14_224",
        "eva02_tiny_patch14_224",
    ),
    *("beit_base_patch16_224", "vit_small_patch16_dinov3", "cait_xxs24_224", "vit_base_patch16_rope_reg1_gap_256"),
    *("vit_base_patch16_rope_mixed_ape_224", "naflexvit_base_patch16_gap", "vit_base_patch16_rpn_224"),
    *("vit_giant_patch14_dinov2", "vit_base_patch16_clip_quickgelu_224"),
]


@cache
def pair(name):
    """A small model of timm's, scriptable, with random values; and the same, accelerated."""
    size = {} if "naflex" in name else {"img_size": 56 if "patch14" in name else 48}
    torch.manual_seed(0)
    with timm.layers.set_scriptable(True):
        model = timm.create_model(name, **{**TINY, "num_heads": 4 if "rope" in name else 3, **size})
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter += 0.1 * normal(*parameter.shape, dtype=torch.float32, device="cpu", seed=i)
    accelerated = deepcopy(model.eval())
    assert any(row.op for row in accelerate(accelerated).rows)
    return model, accelerated


# ---- what is asked of a model ----------------------------------------------------------------------------------------


def forward(model):
    with torch.no_grad():
        return model(images_for(model))


def inference(model):
    with torch.inference_mode():
        return model(images_for(model))


def backward(model):
    model.train()
    outs = model(images_for(model))
    (torch.cat(outs) if isinstance(outs, tuple) else outs).mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def default_config(model):
    features = model.forward_features(images_for(model))
    model.reset_classifier(0)
    pooled = model(images_for(model))
    model.reset_classifier(0, "")
    unpooled = model(images_for(model))
    return features, pooled, unpooled, model.num_features, model.default_cfg, list(model.state_dict())


def another_head(model):
    torch.manual_seed(1)
    model.reset_classifier(3)
    return model(images_for(model))


def other_pooling(model):
    def pooled(pool):
        torch.manual_seed(1)
        model.reset_classifier(3, pool)
        return model(images_for(model))

    return [answer(pooled, pool) for pool in ("token", "avg", "max", "avgmax")]


def torchscript(model):
    return torch.jit.script(model)(images_for(model))


def torchscript_trace(model):
    return torch.jit.trace(model, images_for(model), check_trace=False)(images_for(model))


def symbolic_trace(model):
    leaves = create_feature_extractor(model, ["blocks.1"])
    return leaves(images_for(model)), [str(node) for node in leaves.graph.nodes]


def features_inside_a_block(model):
    return create_feature_extractor(model, ["blocks.0.norm1", "blocks.1.norm2"])(images_for(model))


def feature_list(model):
    net = FeatureGetterNet(model, out_indices=(0, 1), norm=True)
    return net(images_for(model)), net.feature_info.channels()


def intermediates(model):
    images = images_for(model)
    both = model.forward_intermediates(images, return_prefix_tokens=True, norm=True)
    return both, model.forward_intermediates(images, indices=1, stop_early=True, intermediates_only=True)


def pruned_intermediates(model):
    kept = model.prune_intermediate_layers(1, prune_norm=False, prune_head=False)
    return kept, len(model.blocks), model(images_for(model))


def intermediate_layers(model):
    images = images_for(model)
    return model.get_intermediate_layers(images, n=2, reshape=True, return_prefix_tokens=True, norm=True)


def another_size(model):
    patch = model.patch_embed.patch_size[0]
    model.set_input_size((4 * patch, 2 * patch))
    return model(normal(2, 3, 4 * patch, 2 * patch, dtype=torch.float32, device="cpu", seed=2))


def dynamic_size(model):
    patch = model.patch_embed.patch_size[0]
    model.dynamic_img_size = model.patch_embed.dynamic_img_size = True
    model.patch_embed.strict_img_size = False
    model.patch_embed.flatten, model.patch_embed.output_fmt = False, timm.layers.Format.NHWC
    return model(normal(2, 3, 2 * patch, 5 * patch, dtype=torch.float32, device="cpu", seed=2))


def checkpointing(model):
    model.set_grad_checkpointing()
    return backward(model)


def prefix_and_groups(model):
    groups = group_parameters(model, model.group_matcher())
    return model.num_prefix_tokens, sorted(model.no_weight_decay()), groups, model.get_classifier() is not None


def pre_logits(model):
    return model.forward_head(model.forward_features(images_for(model)), pre_logits=True)


def masks(model):
    tokens = model.forward_features(images_for(model)).shape[1]
    mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    return model(images_for(model), attn_mask=mask), model(images_for(model), is_causal=True)


def half(model):
    return model.bfloat16()(images_for(model).bfloat16()).shape


QUESTIONS: list[Callable] = [
    *(forward, inference, backward, default_config, another_head, other_pooling, torchscript, torchscript_trace),
    *(symbolic_trace, features_inside_a_block, feature_list, intermediates, pruned_intermediates, intermediate_layers),
    *(another_size, dynamic_size, checkpointing, prefix_and_groups, pre_logits, masks, half),
]


def answer(question, of):
    """What comes of it, or the type of the error."""
    try:
        return question(of)
    except Exception as error:
        return type(error)


def assert_same(mine, theirs):
    """Tensors of equal shape and dtype that differ by rounding, and everything else equal."""
    assert type(mine) is type(theirs), (mine, theirs)
    if isinstance(theirs, torch.Tensor):
        assert mine.shape == theirs.shape
        assert mine.dtype == theirs.dtype
        close = 1e-5 + 1e-5 * theirs.abs().max().item() if theirs.numel() else 0.0
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=close)
    elif isinstance(theirs, dict):
        assert mine.keys() == theirs.keys()
        for key, value in theirs.items():
            assert_same(mine[key], value)
    elif isinstance(theirs, (list, tuple)):
        assert len(mine) == len(theirs)
        for my, their in zip(mine, theirs, strict=True):
            assert_same(my, their)
    else:
        assert mine == theirs


UNABLE = {
    "another_size": "cait naflexvit",
    "dynamic_size": "beit cait eva02 naflexvit vit_base_patch16_rope_reg1_gap_256",
    "intermediate_layers": "beit cait eva eva02 naflexvit vit_base_patch16_rope vit_small_patch16_dinov3",
    "intermediates": "cait",
    "masks": "beit cait naflexvit",
    "torchscript": "naflexvit",
}
"""What timm's own models raise at, by the beginnings of their names."""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.__name__)
@pytest.mark.parametrize("name", FAMILIES)
def test_timms_own_questions(name, question):
    timms, model = map(deepcopy, pair(name))
    theirs = answer(question, timms)
    assert isinstance(theirs, type) == name.startswith(tuple(UNABLE.get(question.__name__, "none").split()))
    assert_same(answer(question, model), theirs)
