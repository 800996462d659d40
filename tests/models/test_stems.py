"""Stems: hMLP of each patch, and the convolutions of ViT_C."""

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastdeit.kernels import to_patches
from fastdeit.models.config import ViTConfig
from fastdeit.models.vit import VisionTransformer

SHAPE = {"image_size": (32, 48), "patch_size": 16, "dim": 32, "depth": 2, "heads": 2, "num_classes": 5}
KINDS = {
    "hmlp": {"stem": "hmlp"},
    "conv": {"stem": "conv", "conv_widths": (4, 8, 16, 32)},
    "wide conv": {"stem": "conv", "conv_widths": (4, 8, 8, 16, 16, 32)},
    "mean": {"pool": "avg", "class_token": False},
    "norm of mean": {"pool": "avg", "fc_norm": True},
    "parallel": {"parallel": 2, "layer_scale": 0.1},
}


def made(kind, **options):
    torch.manual_seed(0)
    return VisionTransformer(ViTConfig(**(SHAPE | KINDS[kind] | options)))


def images(batch=3, size=(32, 48)):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def filled(module):
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.uniform_(0.1, 0.5)
    return module


@pytest.mark.parametrize("training", [False, True])
def test_hmlp_is_that_of_the_whole_image(training):
    """The public code convolves images. Patches do not overlap, so cutting them out first changes nothing."""
    stem = filled(made("hmlp").patch_embed).train(training)
    x = images()
    found = stem(to_patches(x, 16))
    torch.testing.assert_close(found, stem.proj(x).flatten(2).transpose(1, 2), rtol=1e-5, atol=1e-5)
    kinds = [type(layer) for layer in stem.proj]
    assert kinds == [*(2 * [nn.Conv2d, nn.BatchNorm2d, nn.GELU]), nn.Conv2d, nn.BatchNorm2d]
    assert [tuple(stem.proj[place].weight.shape) for place in (0, 3, 6)] == [(8, 3, 4, 4), (8, 8, 2, 2), (32, 8, 2, 2)]


def test_hmlp_of_some_patches_costs_only_these():
    vit, seen = made("hmlp").eval(), []
    vit.patch_embed.register_forward_hook(lambda stem, args, out: seen.append(out.shape))
    vit.tokens(images(2), keep=torch.tensor([[3, 0], [1, 5]]))
    assert seen == [(2, 2, 32)]


@pytest.mark.parametrize(("kind", "strides"), [("conv", [2, 2, 2, 2]), ("wide conv", [2, 2, 1, 2, 1, 2])])
def test_the_convolutional_stem_is_that_of_the_paper(kind, strides):
    stem = made(kind).patch_embed
    *body, last = stem.proj
    assert [type(layer) for layer in body] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU] * len(strides)
    convolutions = body[::3]
    assert [convolution.stride[0] for convolution in convolutions] == strides
    assert all(one.kernel_size == (3, 3) and one.bias is None for one in convolutions)
    assert [one.out_channels for one in convolutions] == list(KINDS[kind]["conv_widths"])
    assert (last.kernel_size, last.out_channels) == ((1, 1), 32)
    assert last.weight.std().item() == pytest.approx((2 / 32) ** 0.5, rel=0.1)
    assert last.bias.abs().max() == 0
    tokens = stem(images())
    assert tokens.shape == (3, 6, 32)
    torch.testing.assert_close(tokens[0, 4], stem.proj(images())[0, :, 1, 1])  # row by row


def test_a_convolutional_stem_sees_beyond_its_patch_and_so_takes_images():
    vit, x = made("conv").eval(), images(1)
    assert vit.patch_size is None
    assert vit.grid == (2, 3)
    moved = x.clone()
    moved[:, :, :16, :16] += 1
    changed = (vit.tokens(moved, stop=0) - vit.tokens(x, stop=0)).abs().amax((0, 2)) > 1e-6
    assert changed[1:].tolist() == [True, True, False, True, True, False]
    with pytest.raises(ValueError, match="a vision transformer with the stem conv takes images"):
        vit(to_patches(x, 16))
    with pytest.raises(ValueError, match=r"neither images \[B, 3, H, W\] with H and W multiples of 16"):
        vit(images(size=(32, 40)))


@pytest.mark.parametrize("kind", KINDS)
def test_flops_are_those_torch_counts(kind):
    vit = made(kind).eval()
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        vit(images(1))
    assert vit.flops() == counter.get_total_flops()
    assert vit.flops((64, 48)) == made(kind, image_size=(64, 48)).flops()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop_path_mode": "cosine"}, "drop_path_mode is 'cosine', but must be linear or constant"),
        ({"stem": "mlp"}, "stem is 'mlp', but must be patch or hmlp or conv"),
        ({"parallel": 0}, "parallel is 0, but a block has at least 1 attention and 1 MLP"),
        ({"layer_scale": 0.0}, "layer_scale is 0.0, but must be above 0; leave it None for a model without"),
        ({"layer_scale": float("nan")}, "layer_scale is nan, but must be above 0"),
        ({"distilled": True, "pool": "avg"}, "a distilled model .* needs class_token=true and pool=token"),
        ({"distilled": True, "class_token": False}, "a distilled model .* needs class_token=true and pool=token"),
        ({"class_token": False}, "pool=token reads the class token, but class_token is false; set pool=avg"),
        ({"fc_norm": True}, "fc_norm puts the last LayerNorm behind the mean of the patches, so it needs pool=avg"),
        ({"positions": "sincos"}, "positions=sincos has none for the class token; set no_embed_class=true, or"),
        ({"positions": "sincos", "no_embed_class": True, "dim": 6}, "needs a dim that is a multiple of 4 .* not 6"),
        ({"stem": "hmlp", "patch_size": 2}, "stem=hmlp cuts a patch in 4x4 parts .* patch_size 2 and dim 32 must be"),
        ({"conv_widths": (4, 8)}, "conv_widths belong to stem=conv, but stem is patch"),
        ({"stem": "conv"}, r"conv_widths \[\] make 1 pixels one .* but patch_size is 16"),
        ({"stem": "conv", "conv_widths": (4, 8)}, r"conv_widths \[4, 8\] make 4 pixels one"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ViTConfig(**(SHAPE | options))


def test_fixed_positions_with_a_class_token_that_has_none():
    vit = VisionTransformer(ViTConfig(**SHAPE, positions="sincos", no_embed_class=True)).eval()
    assert vit.pos_embed.shape == (1, 6, 32)
    assert vit.tokens(images(1), stop=0).shape == (1, 7, 32)
