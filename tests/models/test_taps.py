"""Tokens and q/k/v of several blocks in one pass, of ours and timm's, plain and frozen: values, and how much runs."""

import pytest
import torch
from torch import nn

from fastdeit import models
from fastdeit.methods.frozen import freeze
from fastdeit.models.tokens import taps

SIZE = (32, 48)
NETWORKS = {
    "ours": lambda: models.build("deit_digits_distilled_patch8_32", image_size=SIZE),
    "timm's": lambda: models.build_timm("test_vit", image_size=SIZE, num_classes=3),
    "timm's without a head": lambda: models.build_timm("test_vit", image_size=SIZE, num_classes=0),
    "timm's, distilled": lambda: models.build_timm("deit_tiny_distilled_patch16_224", image_size=SIZE, num_classes=3),
}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request):
    torch.manual_seed(0)
    built = NETWORKS[request.param]().eval()
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return built


@pytest.fixture(scope="module")
def frozen(network):
    return freeze(network, SIZE)


@pytest.fixture
def calls(network):
    """Names of the modules that ran."""
    seen = []
    hooks = [
        module.register_forward_hook(lambda module, args, out, name=name: seen.append(name))
        for name, module in network.named_modules()
    ]
    yield seen
    for hook in hooks:
        hook.remove()


def images(batch=2):
    return torch.randn(batch, 3, *SIZE, generator=torch.Generator().manual_seed(1))


def by_hooks(network, x, blocks, qkv):
    """Tokens after blocks and q/k/v, read by hooks while timm's own forward runs; of ours from its tokens."""
    last, found = len(network.blocks) - 1, {}
    hooks = []
    if hasattr(network, "inner"):
        for i, block in enumerate(network.blocks):
            hooks += [block.register_forward_hook(lambda module, args, out, i=i: found.update({f"tokens {i}": out}))]
            hooks += [block.attn.qkv.register_forward_hook(lambda m, args, out, i=i: found.update({f"qkv {i}": out}))]
        network(x)
    else:
        for i, block in enumerate(network.blocks):
            tokens = network.tokens(x, stop=i)
            found[f"qkv {i}"] = block.attn.qkv(block.norm1(tokens))
            if i:
                found[f"tokens {i - 1}"] = tokens
        found[f"tokens {last}"] = network.tokens(x, stop=last + 1)
    for hook in hooks:
        hook.remove()
    heads = getattr(network.blocks[0].attn, "num_heads", None) or network.blocks[0].attn.heads
    return {i: found[f"tokens {i}"] for i in blocks}, {
        i: found[f"qkv {i}"].unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4) for i in qkv
    }


@torch.no_grad()
@pytest.mark.parametrize("accelerated", [False, True], ids=["plain", "frozen"])
@pytest.mark.parametrize(("blocks", "qkv"), [((0, 2), (1,)), ((), (0, 3)), ((3,), ()), ((1, 0), (1, 0))])
def test_values_are_those_of_the_whole_forward(network, frozen, accelerated, blocks, qkv):
    asked = frozen if accelerated else network
    read, (tokens, projected) = taps(asked, images(), blocks=blocks, qkv=qkv), by_hooks(network, images(), blocks, qkv)
    assert (list(read.tokens), list(read.qkv)) == (list(blocks), list(qkv))
    for i in blocks:
        torch.testing.assert_close(read.tokens[i], tokens[i], rtol=1e-4, atol=1e-4)
    for i in qkv:
        torch.testing.assert_close(torch.stack(read.qkv[i]), projected[i], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_stopped_frozen_network_returns_all_tokens(network, frozen):
    for stop in (0, 1, len(network.blocks)):
        mine, expected = (one.tokens(images(), stop=stop) for one in (frozen, network))
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(frozen.tokens(images()), network.tokens(images()), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize(
    ("wanted", "whole", "begun"),
    [({"blocks": (1,)}, 2, None), ({"qkv": (2,)}, 2, 2), ({"blocks": (0,), "qkv": (1,)}, 1, 1), ({"qkv": (0,)}, 0, 0)],
)
def test_nothing_runs_after_what_is_asked_for(network, calls, wanted, whole, begun):
    """Of a block that is asked for q/k/v alone, norm and projection run; of later ones and the head nothing."""
    taps(network, images(), **wanted)
    assert {int(name.split(".")[1]) for name in calls if name.startswith("blocks.") and name.count(".") == 1} == set(
        range(whole)
    )
    others = {name for name in calls if name.startswith("blocks.") and int(name.split(".")[1]) >= whole}
    assert {name.rpartition(".")[0] for name in others} <= {f"blocks.{begun}", f"blocks.{begun}.attn"}
    assert not {name for name in others if name.endswith(("proj", "fc1", "mlp", "norm2", "attn"))}
    assert not {name for name in calls if name.split(".")[0] in ("norm", "head", "head_dist", "fc_norm")}


def test_what_did_not_run_has_no_gradient(network):
    read = taps(network, images(), blocks=(0,), qkv=(1,))
    sum(tensor.square().sum() for tensor in (read.tokens[0], *read.qkv[1])).backward()
    learned = {name for name, parameter in network.named_parameters() if parameter.grad is not None}
    network.zero_grad()
    later = {name for name, _ in network.named_parameters() if name.startswith("blocks.")} - {
        name
        for name, _ in network.named_parameters()
        if name.startswith(("blocks.0.", "blocks.1.norm1", "blocks.1.attn.qkv"))
    }
    assert not learned & later
    assert {"pos_embed", "blocks.0.mlp.fc2.weight", "blocks.1.attn.qkv.weight", "blocks.1.attn.qkv.bias"} <= learned
    assert not {name for name in learned if name.split(".")[0] in ("norm", "head", "head_dist")}


def softmax_attention(q, k, v):
    return (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v


@torch.no_grad()
@pytest.mark.parametrize("accelerated", [False, True], ids=["plain", "frozen"])
def test_attention_of_the_caller_stands_in_for_that_of_a_block(network, frozen, accelerated):
    asked, x = frozen if accelerated else network, images()
    expected = network.tokens(x)
    torch.testing.assert_close(
        asked.tokens(x, attend={0: softmax_attention, 2: softmax_attention}), expected, rtol=1e-4, atol=1e-4
    )
    assert (asked.tokens(x, attend={1: lambda q, k, v: 0 * v}) - expected).abs().max() > 0.01
    assert torch.equal(asked.tokens(x, stop=1, attend={0: softmax_attention}).isfinite(), expected.isfinite())


@pytest.mark.parametrize(
    ("attend", "words"),
    [
        ({99: softmax_attention}, "attend has block 99"),
        ({1: lambda q, k, v: v[:, :1]}, "attend must return mixed values"),
    ],
)
def test_attention_that_does_not_fit_is_refused(network, attend, words):
    with pytest.raises(ValueError, match=words):
        network.tokens(images(), attend=attend)


def test_attention_of_the_caller_needs_every_sample_and_one_attention_a_block():
    parallel = models.build("deit_digits_patch8_32", image_size=SIZE, depth=2, parallel=2)
    skipping = models.build("deit_digits_patch8_32", image_size=SIZE, depth=2, drop_path=0.5)
    skipping.set_drop_path_skip(2)
    for vit in (parallel, skipping):
        with pytest.raises(ValueError, match="attend needs one attention a block and all samples in it"):
            vit.train().tokens(images(), attend={0: softmax_attention}, noise=torch.rand(2, vit.noise_per_sample))
    skipping.eval().tokens(images(), attend={0: softmax_attention})


def test_gradients_through_attention_of_the_caller_are_those_without():
    torch.manual_seed(0)
    vit, x = models.build("deit_digits_patch8_32", image_size=SIZE, depth=2).double(), images().double()
    mine, expected = (
        torch.autograd.grad(vit.tokens(x, attend=attend).sin().sum(), list(vit.blocks.parameters()))
        for attend in ({0: softmax_attention, 1: softmax_attention}, None)
    )
    torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-12)


def test_gradients_of_q_k_and_v_are_those_of_autograd():
    """With the bias, which our attention otherwise keeps apart."""
    torch.manual_seed(0)
    vit, x = models.build("deit_digits_patch8_32", image_size=SIZE, depth=2).double(), images().double()
    q, k, v = taps(vit, x, qkv=(1,)).qkv[1]
    mine = torch.autograd.grad((q * k + v).sin().sum(), list(vit.blocks[1].attn.qkv.parameters()))
    projected = vit.blocks[1].attn.qkv(vit.blocks[1].norm1(vit.tokens(x, stop=1)))
    q, k, v = projected.unflatten(2, (3, 3, 32)).permute(2, 0, 3, 1, 4)
    expected = torch.autograd.grad((q * k + v).sin().sum(), list(vit.blocks[1].attn.qkv.parameters()))
    torch.testing.assert_close(mine, expected, rtol=1e-9, atol=1e-12)


@torch.no_grad()
def test_options_are_those_of_tokens(network):
    keep = torch.tensor([[1, 4], [5, 0]])
    read = taps(network, images(), blocks=(1,), keep=keep)
    torch.testing.assert_close(read.tokens[1], network.tokens(images(), stop=2, keep=keep))


def test_normalised_queries_and_keys_are_what_the_softmax_is_given():
    torch.manual_seed(0)
    vit = models.build_timm("test_vit", image_size=SIZE, num_classes=3)
    for block in vit.blocks:
        block.attn.q_norm, block.attn.k_norm = nn.LayerNorm(block.attn.head_dim), nn.Tanh()
    seen = []
    vit.blocks[1].attn.q_norm.register_forward_hook(lambda module, args, out: seen.append(out))
    vit.blocks[1].attn.k_norm.register_forward_hook(lambda module, args, out: seen.append(out))
    vit.eval()(images())
    read = taps(vit, images(), qkv=(1,)).qkv[1]
    torch.testing.assert_close(read[0], seen[0])
    torch.testing.assert_close(read[1], seen[1])


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({}, r"taps needs blocks=\(...\) or qkv=\(...\)"),
        ({"blocks": (4,)}, "there is no block 4; the model has blocks 0 to 3"),
        ({"qkv": (-1,)}, "there is no block -1; the model has blocks 0 to 3"),
    ],
)
def test_blocks_that_do_not_exist_are_refused(wanted, message):
    with pytest.raises(ValueError, match=message):
        taps(models.build("deit_digits_patch8_32"), torch.zeros(1, 3, 32, 32), **wanted)


def test_q_k_and_v_of_an_unknown_attention_are_refused():
    vit = models.build_timm("test_vit", image_size=SIZE, num_classes=3)
    vit.blocks[1].attn = nn.Identity()
    message = "block 1 of timm's test_vit is a Block with attention Identity; q, k and v are known of timm's Block with"
    with pytest.raises(ValueError, match=message):
        taps(vit, images(), qkv=(1,))
