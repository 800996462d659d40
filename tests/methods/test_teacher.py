"""What is made of a network that will only answer: less work, the same logits, and the network itself untouched."""

import copy
import json
import warnings
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.layers import BatchNormAct2d, ConvNormAct
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrizations import weight_norm

from fastdeit import methods, models
from fastdeit.bench.step import Cell, batch
from fastdeit.engine.dist import World
from fastdeit.errors import Interrupted, UsageError
from fastdeit.methods.config import FeatureTeacherConfig, TeacherConfig
from fastdeit.methods.frozen import freeze
from fastdeit.methods.teacher import DeferredTeacher, Teacher
from fastdeit.models import tokens as tokens_of
from fastdeit.recipe import resolve as recipes
from fastdeit.run import build
from fastdeit.training import train
from tests.toys import toy_context

K, SIZE = 5, (16, 12)
HALVES = [torch.float16, torch.bfloat16]


def with_statistics(network, seed=0):
    """Norms as training leaves them: statistics of what they see, and an affine map that does something."""
    generator = torch.Generator().manual_seed(seed)
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.momentum = None
        for parameter in norm.parameters():
            parameter.data.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
    with torch.no_grad():
        network.train()(torch.randn(16, 3, *(4 * side for side in SIZE), generator=generator))
    return network


def norms_of(network):
    return [module for module in network.modules() if isinstance(module, _BatchNorm)]


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


# ---- in a method and in a run ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), [("test_resnet", torch.float32), ("test_vit", torch.bfloat16)])
def test_a_method_is_compiled_through_its_teacher(name, dtype):
    torch.manual_seed(0)
    network = freeze(models.build_timm(name, num_classes=1000, image_size=32), (32, 32), dtype)
    teacher = Teacher(network, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.2))
    config = methods.config("distill")(teacher={"timm": name})
    student = models.build("deit_digits_distilled_patch8_32", num_classes=1000)
    method = methods.find("distill")(student, config, toy_context(1000, teacher)).eval()
    samples = batch(Cell("step", "", 2, 32, "fp32"), method.noise(), torch.device("cpu"))
    compiled = torch.compile(method, fullgraph=True, dynamic=False, backend="eager")
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
        torch.testing.assert_close(compiled(samples).loss, method(samples).loss)


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    network = with_statistics(models.build_timm("test_resnet", num_classes=10))
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_teacher_of_a_recipe_is_ready_for_its_precision(weights, tmp_path, precision, dtype):
    config = TeacherConfig(timm="test_resnet", weights=str(weights), image_size=48)
    teacher = build.teacher(config, (32, 32), 10, tmp_path, precision)
    assert teacher.size == (48, 48)
    assert not norms_of(teacher.model)
    assert {parameter.dtype for parameter in teacher.model.parameters()} == {dtype}
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        assert teacher.logits(torch.randn(2, 3, 32, 32).to(dtype)).shape == (2, 10)


RECIPE = """\
model: {name: deit_digits_distilled_patch8_32, image_size: 32, drop_path: 0.1}
method: {use: distill, teacher: {timm: test_resnet, weights: WEIGHTS}}
data: {source: synthetic, synthetic_samples: 64, synthetic_classes: 10, group_size: 8, repeats: 1}
optim: {lr: 1e-3, warmup_epochs: 0.5, min_lr: 1e-5}
train: {epochs: 2, batch_size: 16}
engine: {device: cpu, precision: bf16}
"""


@pytest.mark.slow
def test_a_run_with_a_teacher_is_resumed_bit_by_bit_and_saves_none_of_it(weights, tmp_path, monkeypatch):
    class StopAt(World):
        def stop_requested(self):
            self.asked = getattr(self, "asked", 0) + 1
            return self.asked == 3

    made, original = [], build.teacher
    monkeypatch.setattr(build, "teacher", lambda *args, **options: made.append(original(*args, **options)) or made[-1])
    (tmp_path / "r.yaml").write_text(RECIPE.replace("WEIGHTS", str(weights)))
    recipe, cpu = recipes.load(str(tmp_path / "r.yaml"), []), torch.device("cpu")
    train(recipe, tmp_path / "whole", World(cpu), resume=False)
    with pytest.raises(Interrupted):
        train(recipe, tmp_path / "resumed", StopAt(cpu), resume=False)
    train(recipe, tmp_path / "resumed", World(cpu), resume=True)
    assert {p.dtype for teacher in made for p in teacher.model.parameters()} == {torch.bfloat16}
    last = "checkpoints/step_00000008"
    whole, resumed = (sorted((tmp_path / run / last).iterdir()) for run in ("whole", "resumed"))
    student = set(models.build("deit_digits_distilled_patch8_32", image_size=32).state_dict())
    for mine, theirs in zip(whole, resumed, strict=True):
        if mine.suffix == ".safetensors":
            tensors, others = load_file(mine), load_file(theirs)
            assert tensors.keys() == others.keys()
            assert all(torch.equal(tensor, others[name]) for name, tensor in tensors.items())
            assert mine.stem != "model" or set(tensors) == student
            assert not any("conv" in name or "teacher" in name for name in tensors)
    losses = [
        [json.loads(line).get("loss") for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()][-3:]
        for run in ("whole", "resumed")
    ]
    assert losses[0] == losses[1]


# ---- features --------------------------------------------------------------------------------------------------------


class OfViews:
    """A batch of two views that says what it was asked to render."""

    def pixels(self, view=0, mean=None, std=None):
        return torch.full((2, 3, 8, 8), 100.0 * view + 10 * mean + std)


def test_a_teacher_renders_each_view_in_its_own_normalisation():
    teacher = Teacher(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), mean=3, std=7)
    assert teacher.pixels(OfViews(), view=1).unique().tolist() == [137]
    assert teacher(OfViews()).tolist() == [[37.0] * 3] * 2


TRANSFORMERS = {
    "ours": lambda: models.build("deit_digits_patch8_32", image_size=32),
    "timm's": lambda: models.build_timm("test_vit", image_size=32, num_classes=0),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_features_of_a_teacher_are_its_networks(name):
    """In eval mode, without gradient, at the teacher's resolution."""
    torch.manual_seed(0)
    network = TRANSFORMERS[name]().train()
    teacher, x = Teacher(copy.deepcopy(network), image_size=32), torch.randn(2, 3, 48, 48, requires_grad=True)
    seen = F.interpolate(x.detach(), size=(32, 32), mode="bicubic", antialias=True)
    keep = torch.tensor([[0, 3], [2, 1]])
    network.eval().requires_grad_(False)
    read = teacher.taps(x, blocks=(0,), qkv=(1,), keep=keep)
    expected = tokens_of.taps(network, seen, blocks=(0,), qkv=(1,), keep=keep)
    answers = [teacher.tokens(x), teacher.tokens(x, stop=1, keep=keep), read.tokens[0], *read.qkv[1]]
    exact = [network.tokens(seen), network.tokens(seen, stop=1, keep=keep), expected.tokens[0], *expected.qkv[1]]
    for answer, own in zip(answers, exact, strict=True):
        torch.testing.assert_close(answer, own)
        assert not answer.requires_grad


@pytest.mark.parametrize("ask", [Teacher.tokens, partial(Teacher.taps, blocks=(0,))])
def test_a_teacher_without_tokens_says_so(ask):
    with pytest.raises(ValueError, match="the teacher is a ConvNet, which has no tokens; a method that reads tokens"):
        ask(Teacher(models.build("convnet_digits")), torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_features_are_compiled_in_one_graph(name):
    torch.manual_seed(0)
    teacher, x = Teacher(freeze(TRANSFORMERS[name](), (32, 32)), image_size=32), torch.randn(2, 3, 32, 32)

    def relation(x):
        read = teacher.taps(x, blocks=(0,), qkv=(1,))
        return read.tokens[0].sum() + (read.qkv[1][0] @ read.qkv[1][1].mT).sum() + teacher.tokens(x, stop=1).sum()

    compiled = torch.compile(relation, fullgraph=True, dynamic=False, backend="eager")
    torch.testing.assert_close(compiled(x), relation(x))


def saved(network, path):
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, path)
    return str(path)


FEATURES = {
    # What the recipe names, and the networks whose weights will do for it.
    "timm": ("test_vit", lambda classes: models.build_timm("test_vit", image_size=32, num_classes=classes)),
    "model": ("deit_digits_patch8_32", lambda classes: models.build("deit_digits_patch8_32", num_classes=classes)),
}


@pytest.mark.parametrize("classes", [0, 7])
@pytest.mark.parametrize("origin", FEATURES)
def test_a_teacher_of_features_needs_no_head_for_the_data_set(origin, classes, tmp_path):
    name, make = FEATURES[origin]
    network = make(classes or 7)
    if classes == 0:
        state = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("head.")}
        network.state_dict = lambda: state
    options = {origin: name, "weights": saved(network, tmp_path / "w.safetensors")}
    teacher = build.teacher(FeatureTeacherConfig(**options), (32, 32), 10, tmp_path, "bf16")
    x = torch.randn(2, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        read, expected = teacher.taps(x, blocks=(1,), qkv=(2,)), network.eval().tokens(x, stop=2)
    assert next(iter(teacher.model.blocks)).attn.qkv.weight.dtype == torch.bfloat16
    torch.testing.assert_close(read.tokens[1].float(), expected.float(), rtol=0.05, atol=0.05)
    with pytest.raises(
        UsageError, match="head of the weights knows 7" if classes else "it needs head.weight, head.bias"
    ):
        build.teacher(TeacherConfig(**options), (32, 32), 10, tmp_path, "bf16")


@pytest.mark.parametrize("origin", FEATURES)
def test_a_teacher_of_features_still_needs_its_body(origin, tmp_path):
    name, make = FEATURES[origin]
    network = make(10)
    state = {name: tensor for name, tensor in network.state_dict().items() if not name.startswith("blocks.1.")}
    network.state_dict = lambda: state
    config = FeatureTeacherConfig(**{origin: name, "weights": saved(network, tmp_path / "w.safetensors")})
    with pytest.raises(UsageError, match=r"do not fit the model: it needs blocks\.1\."):
        build.teacher(config, (32, 32), 10, tmp_path)


METHOD = """\
import torch
from fastdeit.methods.base import Method, Out
from fastdeit.methods.config import FeatureTeacherConfig, MethodConfig
from fastdeit.models.tokens import taps


class Relations(Method):
    class Config(MethodConfig):
        teacher: FeatureTeacherConfig

    def __init__(self, model, config, context):
        super().__init__(model, config, context)
        self.teacher = context.teacher(config.teacher)
        unused = ("blocks.2.attn.proj", "blocks.2.norm2", "blocks.2.mlp", "blocks.3", "norm", "head")
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(unused))

    def forward(self, batch):
        q, k, _ = self.teacher.taps(self.teacher.pixels(batch), qkv=(1,)).qkv[1]
        told = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).mean(1)
        q, k, _ = taps(self.model, batch.pixels(), qkv=(2,), noise=batch.noise["drop_path"]).qkv[2]
        said = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1).mean(1)
        return Out((told - said).square().mean())
"""


def test_relations_are_learned_from_a_teacher_without_a_head(tmp_path, monkeypatch):
    """By a method of another package; the teacher is not scored."""
    (tmp_path / "relations_of_a_teacher.py").write_text(METHOD)
    monkeypatch.syspath_prepend(tmp_path)
    path = saved(models.build_timm("test_vit", image_size=32, num_classes=0), tmp_path / "w.safetensors")
    text = RECIPE.replace("use: distill", "use: 'relations_of_a_teacher:Relations'").replace("test_resnet", "test_vit")
    # At 64 pixels the teacher has the student's grid.
    text = text.replace("WEIGHTS", f"{path}, image_size: 64").replace("bf16", "fp32").replace("_distilled", "")
    (tmp_path / "r.yaml").write_text(text)
    recipe = recipes.load(str(tmp_path / "r.yaml"), [])
    train(recipe, tmp_path / "run", World(torch.device("cpu")), resume=False)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert not any("teacher_top1" in line for line in lines)
    assert any(line.get("loss") is not None for line in lines)


def test_a_deferred_teacher_is_built_once_when_it_is_first_asked():
    made = []

    def make():
        made.append(Teacher(nn.Linear(2, 3), mean=(0.1,) * 3, std=(0.2,) * 3))
        return made[-1]

    deferred = DeferredTeacher(make)
    copy.copy(deferred)
    assert made == []
    assert deferred.mean == (0.1,) * 3
    assert deferred.logits(torch.ones(1, 2)).shape == (1, 3)
    assert len(made) == 1


def test_what_fails_while_a_deferred_teacher_is_built_is_what_is_raised():
    def make():
        raise AttributeError("the network has no head")

    with pytest.raises(AttributeError, match="the network has no head"):
        DeferredTeacher(make).logits(torch.ones(1, 2))
