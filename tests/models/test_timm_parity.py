"""The DeiT family against timm: with the same weights, the same logits, gradients and state dict."""

import gc

import pytest
import timm
import torch
import torch.nn.functional as F

from fastdeit import models
from fastdeit.models.deit import CONFIGS

NAMES = [name for name in CONFIGS if "digits" not in name]
# timm's factories take any shape, so the digits models can be compared as well.
_SHAPE = CONFIGS["deit_digits_patch8_32"]
DIGITS = {
    "img_size": _SHAPE.image_size,
    "patch_size": _SHAPE.patch_size,
    "embed_dim": _SHAPE.dim,
    "depth": _SHAPE.depth,
    "num_heads": _SHAPE.heads,
    "num_classes": _SHAPE.num_classes,
}
ALL = [*NAMES, "deit_digits_patch8_32", "deit_digits_distilled_patch8_32"]
QUICK = "deit_tiny_patch16_224", "deit_digits_patch8_32", "deit_digits_distilled_patch8_32"


def randomised(model, seed=0):
    """A state dict in which every tensor matters: biases and LayerNorms are not at 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, tensor in model.state_dict().items():
        offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        weights[name] = torch.empty(tensor.shape).normal_(offset, 0.02, generator=generator)
    return weights


def bare_timm(name, **options):
    """timm's model without initialised weights, where this timm can do that; older ones compute with tensors."""
    try:
        with torch.device("meta"):
            return timm.create_model(name, pretrained=False, **options)
    except RuntimeError:
        return timm.create_model(name, pretrained=False, **options)


def pair(name, **options):
    """(ours, timm's) with the same weights. Neither is initialised first, which would take seconds for a base model."""
    digits = "digits" in name
    peer_name = (
        ("deit_tiny_distilled_patch16_224" if "distilled" in name else "deit_tiny_patch16_224") if digits else name
    )
    with torch.device("meta"):
        ours = models.build(name, **options)
    peer = bare_timm(peer_name, **(DIGITS if digits else options))
    weights = randomised(peer)
    ours.load_state_dict(weights, strict=True, assign=True)
    peer.load_state_dict(ours.state_dict(), strict=True, assign=True)
    if ours.distilled:
        peer.set_distilled_training(True)
    return ours, peer


def image(model, batch=1, seed=1):
    size = model.config.image_size
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(seed))


def heads(logits):
    return logits if isinstance(logits, tuple) else (logits,)


@pytest.fixture(autouse=True)
def _free_memory():
    yield
    gc.collect()


def marked(names):
    return [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in names]


@pytest.mark.parametrize("name", marked(ALL))
def test_state_dict_and_logits_are_timms(name):
    ours, peer = pair(name)
    assert list(ours.state_dict()) == list(peer.state_dict())
    assert [n for n, _ in ours.named_parameters()] == [n for n, _ in peer.named_parameters()]
    assert [p.shape for p in ours.parameters()] == [p.shape for p in peer.parameters()]
    x = image(ours)
    ours.eval()
    with torch.no_grad():
        got, both = heads(ours(x)), heads(peer.train()(x))
    assert len(got) == len(both) == 1 + ours.distilled
    for mine, theirs in zip(got, both, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
        assert theirs.std() > 0.05


@pytest.mark.parametrize("name", marked(name for name in ALL if "distilled" in name and "base" not in name))
def test_mean_of_heads_is_timms_eval_output(name):
    ours, peer = pair(name)
    x = image(ours)
    with torch.no_grad():
        first, second = ours.eval()(x)
        torch.testing.assert_close((first + second) / 2, peer.eval()(x), rtol=0, atol=1e-5)
        for train, evaluated in zip(ours.train()(x), (first, second), strict=True):
            assert torch.equal(train, evaluated)


@pytest.mark.parametrize("name", marked(ALL))
def test_gradients_are_timms(name):
    # Base models differ from small ones in width alone, so two of their blocks are enough.
    ours, peer = pair(name, **({"depth": 2} if "base" in name else {}))
    x = image(ours)
    for model in (ours, peer):
        logits = heads(model.train()(x))
        sum(F.cross_entropy(head, torch.tensor([3 + i])) for i, head in enumerate(logits)).backward()
    for (key, mine), theirs in zip(ours.named_parameters(), peer.parameters(), strict=True):
        scale = theirs.grad.abs().max()
        assert scale > 0, key
        if key.endswith("qkv.bias"):
            # The gradient of the key bias is zero in exact arithmetic: softmax ignores a shift of all keys.
            dim = ours.config.dim
            mine.grad[dim : 2 * dim] = theirs.grad[dim : 2 * dim] = 0
        assert (mine.grad - theirs.grad).abs().max() <= 2e-5 * scale, key


def test_parameter_counts_are_the_published_ones():
    published = {
        "deit_tiny_patch16_224": 5_717_416,
        "deit_small_patch16_224": 22_050_664,
        "deit_base_patch16_224": 86_567_656,
        "deit_tiny_distilled_patch16_224": 5_910_800,
        "deit_small_distilled_patch16_224": 22_436_432,
        "deit_base_distilled_patch16_224": 87_338_192,
    }
    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in models.build(name).parameters()) for name in published}
    assert counts == published


@pytest.mark.parametrize("size", [(192, 256), 160])
def test_other_image_sizes(size):
    name = "deit_tiny_distilled_patch16_224"
    with torch.device("meta"):
        ours = models.build(name, image_size=size, depth=2)
    peer = bare_timm(name, img_size=size, depth=2)
    weights = randomised(peer)
    ours.load_state_dict(weights, assign=True)
    peer.load_state_dict(weights, assign=True)
    peer.set_distilled_training(True)
    x = image(ours, batch=2)
    with torch.no_grad():
        for mine, theirs in zip(ours(x), peer.train()(x), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)
