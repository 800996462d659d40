"""The convolutional teacher, and timm's models under the contract."""

import copy

import pytest
import timm
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastdeit import models
from fastdeit.models.contract import Tokens


@pytest.fixture(scope="module")
def digits_net():
    torch.manual_seed(0)
    return models.build("convnet_digits")


@pytest.fixture(scope="module")
def distilled():
    """A distilled timm model with drop-path and batch norm below a head of its own."""
    torch.manual_seed(0)
    return models.build_timm("deit_tiny_distilled_patch16_224", image_size=64, num_classes=6)


def flops(model, x):
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(x)
    return counter.get_total_flops()


def test_convnet_result_of_an_image_does_not_depend_on_its_batch(digits_net):
    x = torch.randn(4, 3, 32, 32)
    for training in (True, False):
        digits_net.train(training)
        whole = digits_net(x)
        assert whole.shape == (4, 10)
        torch.testing.assert_close(whole, torch.cat([digits_net(row[None]) for row in x]), rtol=1e-5, atol=1e-5)


def test_convnet_contract(digits_net):
    assert 100_000 < sum(p.numel() for p in digits_net.parameters()) < 200_000
    assert (digits_net.noise_per_sample, digits_net.patch_size, digits_net.distilled) == (0, None, False)
    decay, no_decay = digits_net.decay_groups(decay_dist_token=False)
    assert decay == [*(f"convs.{i}.weight" for i in range(4)), "head.weight"]
    assert sorted(decay + no_decay) == sorted(name for name, _ in digits_net.named_parameters())
    assert digits_net.flops() == flops(digits_net, torch.zeros(1, 3, 32, 32))
    assert digits_net.flops((64, 32)) == flops(digits_net, torch.zeros(1, 3, 64, 32))


def test_convnet_learns(digits_net):
    net = copy.deepcopy(digits_net).train()
    generator = torch.Generator().manual_seed(0)
    prototypes = torch.randn(10, 3, 32, 32, generator=generator)
    optimizer = torch.optim.AdamW(net.parameters(), lr=2e-3)
    y = torch.arange(10).repeat(3)
    for _ in range(12):
        x = prototypes[y] + 0.5 * torch.randn(30, 3, 32, 32, generator=generator)
        loss = torch.nn.functional.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    held_out = prototypes + 0.5 * torch.randn(10, 3, 32, 32, generator=generator)
    assert (net(held_out).argmax(1) == torch.arange(10)).float().mean() >= 0.9


def test_convnet_errors(digits_net):
    with pytest.raises(
        ValueError, match=r"ConvNet takes images \[B, C, H, W\], but got a tensor of shape \(2, 16, 192\)"
    ):
        digits_net(torch.zeros(2, 16, 192))
    with pytest.raises(ValueError, match=r"drop_path is 0\.1, but a ConvNet has no branches to drop"):
        models.build("convnet_digits", drop_path=0.1)
    with pytest.raises(ValueError, match="convnet_digits has no option 'heads'; it takes image_size, "):
        models.build("convnet_digits", heads=3)


def test_timm_names_and_results_are_timms(distilled):
    peer = timm.create_model("deit_tiny_distilled_patch16_224", img_size=64, num_classes=6)
    assert list(distilled.state_dict()) == list(peer.state_dict())
    assert [n for n, _ in distilled.named_parameters()] == [n for n, _ in peer.named_parameters()]
    peer.load_state_dict(distilled.state_dict())
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        first, second = distilled.eval()(x)
        torch.testing.assert_close((first + second) / 2, peer.eval()(x))
        assert not torch.allclose(first, second, atol=1e-3)
        for again, logits in zip(distilled.classify(distilled.tokens(x)), (first, second), strict=True):
            torch.testing.assert_close(again, logits)


def test_timm_copy_load_and_move(distilled):
    """Registries are shared with timm's model: a copy, a load and a cast have to reach both."""
    twin = copy.deepcopy(distilled)
    twin.load_state_dict({name: torch.zeros_like(t) for name, t in distilled.state_dict().items()})
    x = torch.randn(1, 3, 64, 64)
    assert twin.eval()(x)[0].abs().max() == 0
    assert distilled.eval()(x)[0].abs().max() > 0
    assert twin.double()(x.double())[0].dtype == torch.float64
    for (_, mine), theirs in zip(twin.named_parameters(), twin.inner.parameters(), strict=True):
        assert mine is theirs
    twin.inner.register_buffer("kept", torch.zeros(1))
    twin.inner.register_buffer("computed", torch.zeros(1), persistent=False)
    assert "kept" in twin.state_dict()
    assert "computed" not in twin.state_dict()
    wrapped = torch.nn.Sequential(distilled)
    assert next(iter(wrapped.state_dict())) == "0.cls_token"


# LeViT's heads hold batch norm; RepViT's flag sits in its head; plain PiT has the method and no second head.
@pytest.mark.parametrize(("name", "heads"), [("levit_128s", 2), ("repvit_m0_9", 2), ("pit_ti_224", 1), ("resnet18", 1)])
def test_timm_eval_is_eval_below_the_flag(name, heads):
    torch.manual_seed(0)
    built = models.build_timm(name, num_classes=4, drop_path=0.1 if "pit" in name else 0.0).eval()
    assert built.distilled == (heads == 2)
    x = torch.randn(2, 3, 224, 224)
    before = {key: tensor.clone() for key, tensor in built.named_buffers()}
    with torch.no_grad():
        logits = built(x)
        logits = logits if isinstance(logits, tuple) else (logits,)
        alone = built(x[:1])
        alone = alone if isinstance(alone, tuple) else (alone,)
    assert [out.shape for out in logits] == [(2, 4)] * heads
    # Batch norm in training mode would mix the images and move its statistics; drop-path would be random.
    for together, single in zip(logits, alone, strict=True):
        torch.testing.assert_close(together[:1], single, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(before[key], tensor) for key, tensor in built.named_buffers())
    peer = timm.create_model(name, num_classes=4).eval()
    peer.load_state_dict(built.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(sum(logits) / heads, peer(x), rtol=1e-4, atol=1e-5)


def test_timm_modes(distilled):
    assert distilled.train().inner.blocks[0].training
    assert not distilled.eval().inner.blocks[0].training
    assert not distilled.training


def test_timm_contract(distilled):
    assert (distilled.noise_per_sample, distilled.patch_size, distilled.distilled) == (0, None, True)
    assert distilled.mean == (0.485, 0.456, 0.406)
    assert distilled.std == (0.229, 0.224, 0.225)
    decay, no_decay = distilled.decay_groups()
    assert {"cls_token", "pos_embed", "dist_token", "blocks.0.norm1.weight", "head.bias"} <= set(no_decay)
    assert {"patch_embed.proj.weight", "head_dist.weight"} <= set(decay)
    assert len(decay) + len(no_decay) == len(list(distilled.parameters()))
    assert "dist_token" in distilled.decay_groups(decay_dist_token=True)[0]
    ours = models.build("deit_tiny_distilled_patch16_224", image_size=64, num_classes=6)
    assert distilled.decay_groups() == ours.decay_groups()
    assert distilled.flops() == flops(distilled.eval(), torch.zeros(1, 3, 64, 64))


def test_timm_errors(distilled):
    with pytest.raises(
        ValueError, match=r"timm's deit_tiny_.* takes images .* but got a tensor of shape \(2, 16, 768\)"
    ):
        distilled(torch.zeros(2, 16, 768))
    with pytest.raises(ValueError, match=r"timm [\d.]+ has no model 'resnet18x'; did you mean .*resnet18"):
        models.build_timm("resnet18x")
    with pytest.raises(ValueError, match=r"timm's vgg11 cannot be built with .*drop_path_rate"):
        models.build_timm("vgg11", drop_path=0.1)


@pytest.mark.parametrize("asked", ["tokens", "qkv", "classify"])
def test_tokens_that_cannot_be_read_are_refused_by_name(asked):
    with torch.device("meta"):
        model = models.build_timm("eva02_tiny_patch14_224")
    assert not isinstance(model, Tokens)
    with pytest.raises(AttributeError, match=r"eva02_tiny_patch14_224 is a Eva, whose .*forward_intermediates"):
        getattr(model, asked)
