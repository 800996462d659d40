"""What is made of a network that will only answer: less work, the same logits, and the network itself untouched."""

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, ConvNormAct
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from fastdeit import models
from fastdeit.methods.frozen import freeze
from tests.methods.batch_norms import SIZE, norms_of, with_statistics

K = 5
HALVES = [torch.float16, torch.bfloat16]


def frozen_quietly(network, *args):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return freeze(network, *args)


@torch.no_grad()
def error(network, exact, x, dtype=torch.float32):
    """Relative error of a network's logits against those of `exact`, computed in float64."""
    expected = copy.deepcopy(exact).eval().double()(x.double())
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        return ((network(x) - expected).norm() / expected.norm()).item()


class Net(nn.Module):
    """`body`, the mean over what is left of the image, and logits."""

    def __init__(self, body, width=8):
        super().__init__()
        self.body, self.head = body, nn.Linear(width, K)

    def forward(self, x):
        x = self.body(x)
        return self.head(x.flatten(2).mean(2) if x.ndim > 2 else x)


# ---- BatchNorm is folded ---------------------------------------------------------------------------------------------


def stem(conv, norm):
    return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU(), conv, norm, nn.ReLU())


FOLDED = {
    "plain": lambda: stem(nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8)),
    "bias": lambda: stem(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8)),
    "eps": lambda: stem(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8, eps=0.3)),
    "no affine": lambda: stem(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8, affine=False)),
    "grouped": lambda: stem(nn.Conv2d(8, 8, 3, groups=2), nn.BatchNorm2d(8)),
    "depthwise": lambda: stem(nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.BatchNorm2d(8)),
    "strided, dilated": lambda: stem(nn.Conv2d(8, 8, 3, 2, 2, 2), nn.BatchNorm2d(8)),
    "synchronised": lambda: stem(nn.Conv2d(8, 8, 3), nn.SyncBatchNorm(8)),
    "1-D": lambda: stem(nn.Conv2d(8, 8, 3), nn.Sequential(nn.Flatten(2), nn.Conv1d(8, 8, 3), nn.BatchNorm1d(8))),
    "linear": lambda: nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8)),
    "timm's norm with its activation": lambda: stem(nn.Identity(), ConvNormAct(8, 8, 3, act_layer=nn.SiLU)),
}


@pytest.mark.parametrize("name", FOLDED)
def test_batch_norm_is_folded_into_the_layer_before(name):
    torch.manual_seed(0)
    if name == "synchronised":  # it trains on a GPU only
        network = Net(FOLDED[name]())
        (norm,) = norms_of(network)
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    else:
        network = with_statistics(Net(FOLDED[name]()))
    frozen, x = frozen_quietly(network, SIZE), torch.randn(4, 3, *SIZE)
    assert not norms_of(frozen)
    assert error(frozen, network, x) <= 2 * error(network.eval(), network, x) + 1e-7


@pytest.mark.parametrize("name", ["test_resnet", "regnety_002", "efficientnet_b0"])
def test_convolutional_networks_of_timm_are_left_without_a_norm(name):
    torch.manual_seed(0)
    network = with_statistics(models.build_timm(name, num_classes=K))
    frozen, x = frozen_quietly(network, (64, 64)), torch.randn(2, 3, 64, 64)
    assert norms_of(network)
    assert not norms_of(frozen)
    assert error(frozen, network, x) <= 2 * error(network.eval(), network, x)


# ---- and is not, where it cannot be ----------------------------------------------------------------------------------


class Branches(nn.Module):
    """A convolution and a norm that are used as `how` says."""

    def __init__(self, how):
        super().__init__()
        self.how = how
        self.conv, self.other, self.norm = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        if how == "tied weights":
            self.other.weight = self.conv.weight

    def forward(self, x):
        y = self.conv(x)
        out = self.norm(y)
        if self.how == "output used twice":
            return out + y
        if self.how == "output changed before":
            return self.norm(self.conv(x).mul_(2))
        if self.how == "convolution called twice":
            return out + self.conv(x.flip(3))
        if self.how == "norm called twice":
            return out + self.norm(self.other(x))
        if self.how == "tied weights":
            return out + self.other(x.flip(3))
        if self.how == "weight read elsewhere":
            return out * self.conv.weight.norm()
        assert self.how == "statistics read elsewhere"
        return out + self.norm.running_mean.reshape(1, 8, 1, 1)


class Scaled(nn.BatchNorm2d):
    def forward(self, x):
        return 2 * super().forward(x)


class Tokens(nn.Module):
    """BatchNorm over tokens `[B, N, C]`, whose channels are the N tokens and not a linear layer's outputs."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(3, 8), nn.BatchNorm1d(8)

    def forward(self, x):
        return self.norm(self.linear(F.adaptive_avg_pool2d(x, (2, 4)).flatten(2).mT)).mT


def convolution(norm, wrap=lambda conv: conv):
    return lambda: nn.Sequential(wrap(nn.Conv2d(3, 8, 3)), norm())


KEPT = {
    **{how: lambda how=how: Branches(how) for how in (
        "output used twice", "output changed before", "convolution called twice", "norm called twice", "tied weights",
        "weight read elsewhere", "statistics read elsewhere",
    )},
    "activation between": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.BatchNorm2d(8)),
    "norm before": lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 8, 3)),
    "statistics of the batch": convolution(lambda: nn.BatchNorm2d(8, track_running_stats=False)),
    "norm with a forward of its own": convolution(lambda: Scaled(8)),
    "weight made anew": convolution(lambda: nn.BatchNorm2d(8), weight_norm),
    "transposed": lambda: nn.Sequential(nn.ConvTranspose2d(3, 8, 3), nn.BatchNorm2d(8)),
    "tokens": Tokens,
}  # fmt: skip


@pytest.mark.parametrize("name", KEPT)
def test_batch_norm_stays_where_folding_would_be_wrong_or_uncertain(name):
    torch.manual_seed(0)
    network, x = with_statistics(Net(KEPT[name]())), torch.randn(4, 3, *SIZE)
    frozen = frozen_quietly(network, SIZE)
    assert len(norms_of(frozen)) == len(norms_of(network))
    torch.testing.assert_close(frozen(x), network.eval()(x).detach())


def test_batch_norm_stays_where_its_input_is_an_answer():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(3, K), nn.BatchNorm1d(K)

        def forward(self, x):
            y = self.linear(x.mean((2, 3)))
            return y, self.norm(y)

    network, x = with_statistics(Both()), torch.randn(4, 3, *SIZE)
    torch.testing.assert_close(frozen_quietly(network, SIZE)(x), network.eval()(x))


def test_logits_that_change_are_noticed_and_told():
    network = with_statistics(Net(FOLDED["plain"]()))
    norms_of(network)[0].register_forward_hook(lambda module, args, out: 3 * out)
    x = torch.randn(4, 3, *SIZE)
    with pytest.warns(UserWarning, match="BatchNorm is not folded"):
        frozen = freeze(network, SIZE)
    torch.testing.assert_close(frozen(x), network.eval()(x).detach())


def test_the_network_itself_stays_as_it_is():
    network = with_statistics(Net(stem(nn.Conv2d(8, 8, 3, bias=False), BatchNormAct2d(8))))
    before = copy.deepcopy(network.state_dict())
    frozen = freeze(network, SIZE, torch.bfloat16)
    assert network.training
    assert all(parameter.requires_grad for parameter in network.parameters())
    after = network.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor, after[name])
        assert (tensor.dtype, tensor.stride()) == (after[name].dtype, after[name].stride())
    assert not frozen.training
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert not {id(tensor) for tensor in after.values()} & {id(tensor) for tensor in frozen.state_dict().values()}


def test_it_is_tried_out_in_float32_wherever_it_is_called():
    network, seen = with_statistics(Net(FOLDED["plain"]())), set()
    network.body[0].register_forward_hook(lambda module, args, out: seen.add(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        freeze(network, SIZE)
    assert seen == {torch.float32}


def test_trying_it_out_draws_no_random_number():
    network = Net(FOLDED["plain"]())
    torch.manual_seed(3)
    freeze(network, SIZE)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))


# ---- layout and precision --------------------------------------------------------------------------------------------


def test_weights_of_our_own_networks_are_cast_once_and_for_all():
    network = models.build("deit_digits_patch8_32", num_classes=K).eval()
    frozen, x = freeze(network, (32, 32), torch.bfloat16), torch.randn(2, 3, 32, 32)
    weights = {name: p for name, p in frozen.named_parameters() if name.startswith("blocks") and p.ndim == 2}
    assert {p.dtype for p in (*weights.values(), frozen.head.weight)} == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(frozen(x), network(x))


def test_convolutions_work_in_channels_last_from_end_to_end():
    seen = []
    frozen = freeze(with_statistics(Net(FOLDED["plain"]())), SIZE)
    for module in frozen.body:
        module.register_forward_hook(lambda module, args, out: seen.append(out))
    frozen(torch.randn(4, 3, *SIZE))
    assert len(seen) == 5
    assert all(out.is_contiguous(memory_format=torch.channels_last) and not out.is_contiguous() for out in seen)


def test_a_weight_that_is_no_convolutions_keeps_its_layout():
    frozen = freeze(models.build("deit_digits_patch8_32"), (32, 32))
    assert frozen.patch_embed.proj.weight.is_contiguous()


class Apart(nn.Module):
    """A layer that the network itself keeps out of autocast, beside one that it does not."""

    def __init__(self):
        super().__init__()
        self.inside, self.apart, self.scale = nn.Linear(3, 8), nn.Linear(8, 8), nn.Parameter(torch.randn(8))
        self.twice = nn.Linear(8, 8)

    def forward(self, x):
        x = self.inside(x.mean((2, 3))) * self.scale
        with torch.autocast("cpu", enabled=False):
            x = self.apart(x.float())
        return self.twice(x) + self.twice.bias


@pytest.mark.parametrize("dtype", HALVES)
def test_16_bit_is_for_what_autocast_casts_and_nothing_else_reads(dtype):
    frozen = freeze(Net(Apart()), SIZE, dtype)
    half = {name for name, parameter in frozen.named_parameters() if parameter.dtype == dtype}
    assert half == {"body.inside.weight", "body.inside.bias", "body.twice.weight", "head.weight", "head.bias"}
    assert all(parameter.dtype in (dtype, torch.float32) for parameter in frozen.parameters())
    assert all(parameter.dtype == torch.float32 for parameter in freeze(Net(Apart()), SIZE).parameters())


NETWORKS = {
    "convnet_digits": lambda: (models.build("convnet_digits", num_classes=K), (32, 32)),
    "deit_digits": lambda: (models.build("deit_digits_patch8_32", num_classes=K), (32, 32)),
    "timm's vit": lambda: (models.build_timm("vit_tiny_patch16_224", image_size=32, num_classes=K), (32, 32)),
    "apart": lambda: (Net(Apart()), SIZE),
    "folded": lambda: (with_statistics(Net(FOLDED["grouped"]())), SIZE),
}


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", NETWORKS)
def test_storing_16_bit_changes_no_bit_of_what_autocast_computes(name, dtype):
    torch.manual_seed(0)
    network, size = NETWORKS[name]()
    x = torch.randn(4, 3, *size)
    stored, cast = frozen_quietly(network, size, dtype), frozen_quietly(network, size)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        assert torch.equal(stored(x), cast(x))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["test_resnet", "test_vit", pytest.param("regnety_002", marks=pytest.mark.slow)])
def test_16_bit_is_as_exact_as_autocast(name, dtype):
    """Over four networks, as the weights of one are rounded once, be it in its favour or not."""
    errors = []
    for seed in range(4):
        torch.manual_seed(seed)
        network = models.build_timm(name, num_classes=K, image_size=32)
        network, x = with_statistics(network) if norms_of(network) else network, torch.randn(4, 3, 32, 32)
        frozen = frozen_quietly(network, (32, 32), dtype)
        errors.append([error(model, network, x, dtype) for model in (frozen, network.eval())])
    mine, plain = torch.tensor(errors).square().mean(0).sqrt()
    assert mine <= 2 * plain


@pytest.mark.slow
def test_a_transformer_of_timm_runs_on_the_fused_ops():
    torch.manual_seed(0)
    network = models.build_timm("vit_tiny_patch16_224", image_size=32, num_classes=K).eval()
    kinds, frozen, x = list(map(type, network.inner.modules())), freeze(network, (32, 32)), torch.randn(4, 3, 32, 32)
    assert list(map(type, network.inner.modules())) == kinds
    assert type(frozen.inner) is not type(network.inner)  # its last block
    assert type(frozen.inner.blocks[0]) is not type(network.inner.blocks[0])
    assert error(frozen, network, x) <= 2 * error(network, network, x)


@pytest.mark.gpu
@pytest.mark.card
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "regnety_002"])
def test_on_a_card(name, dtype):
    torch.manual_seed(0)
    network = models.build_timm(name, num_classes=K, image_size=32)
    network = (with_statistics(network) if norms_of(network) else network).eval()
    x = torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        expected = copy.deepcopy(network).double()(x.double())
        frozen = freeze(network, (32, 32), dtype).cuda()
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            answers = [model(x.cuda()).cpu() for model in (frozen, network.cuda())]
    mine, plain = ((answer - expected).norm() for answer in answers)
    assert mine <= 2 * plain
