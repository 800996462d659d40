"""Every model against the contract: whatever `contract.Model` and `contract.Tokens` promise, each of them keeps."""

import copy
import sys
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import nn

from fastdeit import models
from fastdeit.engine.dist import World
from fastdeit.errors import UsageError
from fastdeit.kernels import to_patches
from fastdeit.models import deit, families
from fastdeit.models.contract import Model, Tokens, missing, wrong
from fastdeit.models.layers import layers
from fastdeit.models.timm_model import TimmVisionTransformer
from fastdeit.recipe import resolve as recipes
from fastdeit.run import build
from fastdeit.run.weights import open_weights
from fastdeit.training import train

K, B = 5, 2
TINY = {"dim": 48, "heads": 3, "depth": 2, "patch_size": 16}


def small_kinds():
    """Options of the other models that make them small, by name: one model of those that are then the same."""
    kinds = {}
    for name in models.MODELS:
        if name in families.CONFIGS and name not in deit.CONFIGS:
            kinds.setdefault(replace(families.CONFIGS[name], **TINY, image_size=32), name)
    return dict.fromkeys(kinds.values(), TINY)


DEIT = {name: {"depth": 2} | ({"dim": 192, "heads": 3} if "base" in name else {}) for name in deit.CONFIGS}
SMALL = {**DEIT, "convnet_digits": {}, **small_kinds()}
TIMM = {
    "deit_tiny_distilled_patch16_224": (K, {"drop_path": 0.1}),
    "vit_tiny_patch16_224": (0, {}),
    "test_vit": (K, {}),
    "test_resnet": (K, {}),
}
CASES = [*SMALL, *(f"{name} with drop-path" for name in SMALL if "digits_patch" in name or "digits_dist" in name)]
CASES += [f"timm's {name}" for name in TIMM]
TRANSFORMERS = [case for case in CASES if "net" not in case]


@cache
def made(case):
    """A small model of the case, in which every tensor matters."""
    torch.manual_seed(0)
    if case.startswith("timm's "):
        classes, options = TIMM[case.removeprefix("timm's ")]
        built = models.build_timm(case.removeprefix("timm's "), image_size=(32, 48), num_classes=classes, **options)
    else:
        name, _, dropped = case.partition(" with ")
        options = SMALL[name] | ({"drop_path": 0.5} if dropped else {})
        built = models.build(name, image_size=(32, 48), num_classes=K, **options)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    return built.eval()


@pytest.fixture(params=CASES)
def model(request):
    yield made(request.param)
    made(request.param).eval()


@pytest.fixture(params=TRANSFORMERS)
def vit(request):
    yield made(request.param)
    made(request.param).eval()


def images(size=(32, 48), batch=B):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def noise_for(model, seed=2):
    return torch.rand(B, model.noise_per_sample, generator=torch.Generator().manual_seed(seed))


def heads(logits):
    return logits if isinstance(logits, tuple) else (logits,)


def same(left, right):
    return all(map(torch.equal, heads(left), heads(right)))


def close(left, right, tolerance=1e-4):
    for one, other in zip(heads(left), heads(right), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


# ---- Model -----------------------------------------------------------------------------------------------------------


def test_has_all_parts(model):
    assert isinstance(model, Model)
    assert missing(model) == wrong(model) == []


@torch.no_grad()
@pytest.mark.parametrize("training", [False, True])
def test_logits_are_what_the_linear_layers_of_the_head_make(model, training):
    outputs = []
    layers = [model.get_submodule(name) for name in model.head_names]
    hooks = [layer.register_forward_hook(lambda layer, args, out: outputs.append(out)) for layer in layers]
    logits = model.train(training)(images(), noise_for(model))
    for hook in hooks:
        hook.remove()
    assert all(type(layer) is nn.Linear for layer in layers)
    if layers:
        assert same(logits, tuple(outputs))
        assert [tuple(out.shape) for out in heads(logits)] == [(B, K)] * len(layers)
    else:
        assert logits.shape[0] == B


@torch.no_grad()
def test_eval_is_a_function_of_the_image_alone(model):
    x = images()
    logits = model(x)
    assert same(model(x), logits)
    assert same(model(x, torch.zeros(B, model.noise_per_sample)), logits)
    close(tuple(out[:1] for out in heads(logits)), model(x[:1]))
    assert not torch.allclose(heads(logits)[0][0], heads(logits)[0][1], atol=1e-3)


@torch.no_grad()
def test_training_needs_noise_where_it_reads_some_and_nowhere_else(model):
    model.train()
    if model.noise_per_sample == 0:
        model(images())
        return
    with pytest.raises(ValueError, match="noise"):
        model(images())
    with pytest.raises(ValueError, match="noise"):
        model(images(), noise_for(model)[:, 1:])
    torch.manual_seed(3)
    logits = model(images(), noise_for(model))
    torch.manual_seed(4)
    assert same(model(images(), noise_for(model)), logits)
    assert not same(model(images(), noise_for(model, seed=5)), logits)


def test_decay_groups_hold_each_parameter_once(model):
    decay, no_decay = model.decay_groups()
    parameters = dict(model.named_parameters())
    assert sorted(decay + no_decay) == sorted(parameters)
    assert all(parameters[name].ndim > 1 for name in decay)
    with_token, _ = model.decay_groups(decay_dist_token=True)
    assert set(with_token) - set(decay) == {name for name in parameters if name == "dist_token"}


def test_flops_of_a_model_that_reads_views_of_its_parameters():
    """Attention pooling (timm's test_vit3) expands a parameter; torch's counter raises if that asks for gradients."""
    assert models.build_timm("test_vit3").flops() > 0


def test_flops_grow_with_the_image(model):
    own = model.flops()
    assert own == model.flops((32, 48)) > 0
    if not isinstance(model, TimmVisionTransformer):  # of one size, which its positions have
        assert own < model.flops((32, 96)) < model.flops((96, 96))


@torch.no_grad()
def test_patches_are_taken_where_there_is_a_patch_size_and_nowhere_else(model):
    x = images()
    if model.patch_size is None:
        with pytest.raises(ValueError, match=r"takes images \[B, C, H, W\], but got a tensor of shape"):
            model(to_patches(x, 16))
        return
    assert same(model(to_patches(x, model.patch_size)), model(x))
    rows, columns = 48 // model.patch_size, 64 // model.patch_size
    other = images((48, 64))
    assert same(model(to_patches(other, model.patch_size), grid=(rows, columns)), model(other))
    with pytest.raises(ValueError, match="grid"):
        model(to_patches(other, model.patch_size))


def test_other_shapes_are_refused(model):
    with pytest.raises(ValueError, match=r"\(3, 7\)"):
        model(torch.zeros(3, 7))


@torch.no_grad()
def test_the_state_dict_is_all_there_is(model):
    twin = copy.deepcopy(model)
    for tensor in (*twin.parameters(), *twin.buffers()):
        tensor.zero_()
    twin.load_state_dict(model.state_dict())
    assert same(twin.eval()(images()), model(images()))


# ---- Tokens ----------------------------------------------------------------------------------------------------------


def test_transformers_and_no_others_have_tokens():
    assert [case for case in CASES if isinstance(made(case), Tokens)] == TRANSFORMERS


@torch.no_grad()
def test_forward_is_classify_of_tokens(vit):
    tokens = vit.tokens(images())
    assert tokens.ndim == 3
    close(vit.classify(tokens), vit(images()))


@torch.no_grad()
def test_tokens_are_seen_and_replaced_before_a_block(vit):
    x, seen = images(), []
    plain = vit.tokens(x)
    close(vit.tokens(x, at={1: lambda tokens: seen.append(tokens) or tokens}), plain)
    close(seen[0], vit.tokens(x, stop=1))
    assert vit.tokens(x, at={1: lambda tokens: tokens[:, :4]}).shape == (B, 4, plain.shape[2])
    assert not torch.allclose(vit.tokens(x, at={1: lambda tokens: -tokens}), plain, atol=1e-2)
    for end in (3, -1) if len(vit.blocks) == 2 else (13, -1):
        with pytest.raises(ValueError, match=f"stop is {end}, but the model has {len(vit.blocks)} blocks"):
            vit.tokens(x, stop=end)
    with pytest.raises(ValueError, match="at has block 1, but only blocks 0 to 0 run"):
        vit.tokens(x, at={1: lambda tokens: tokens}, stop=1)
    with pytest.raises(ValueError, match=r"at\[1\] must return tokens"):
        vit.tokens(x, at={1: lambda tokens: tokens[0]})


@torch.no_grad()
def test_kept_patches_bring_their_positions(vit):
    x, start = images(), vit.tokens(images(), stop=0)
    prefix = start.shape[1] - 32 * 48 // (vit.patch_size or 16) ** 2
    keep = torch.tensor([[3, 0], [1, 5]])
    some = vit.tokens(x, keep=keep, stop=0)
    close(some[:, :prefix], start[:, :prefix])
    close(some[:, prefix:], torch.stack([row[prefix + chosen] for row, chosen in zip(start, keep, strict=True)]))
    with pytest.raises(ValueError, match=r"keep must be int64 \[B, M\] with B = 2"):
        vit.tokens(x, keep=keep.float())


@torch.no_grad()
def test_the_last_blocks_tokens_are_normed(vit):
    last = vit.tokens(images(), stop=len(vit.blocks))
    close(vit.norm(last), vit.tokens(images()))
    assert not torch.allclose(last, vit.tokens(images()), atol=1e-2)


@torch.no_grad()
def test_queries_keys_and_values_are_the_attentions(vit):
    """A block by the formulas of the paper, from its q, k and v."""
    block, before = vit.blocks[1], vit.tokens(images(), stop=1)
    q, k, v = vit.qkv(1, before)
    mixed, tokens = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v, before
    for heads, part in zip(mixed.chunk(len(attentions(block)), 1), attentions(block), strict=True):
        assert heads.shape == (B, *heads.shape[1:3], before.shape[2] // heads.shape[1])
        assert heads.shape[1] == (getattr(part.attn, "num_heads", None) or part.attn.heads)
        tokens = tokens + gamma_of(part, "ls", "ls1") * part.attn.proj(heads.transpose(1, 2).flatten(2))
    added = [gamma_of(part, "ls", "ls2") * part.mlp(norm(tokens)) for part, norm in mlps(block)]
    close(tokens + sum(added), vit.tokens(images(), stop=2))


def attentions(block):
    return getattr(block, "attns", [block])


def mlps(block):
    return [(part, part.norm) for part in block.ffns] if hasattr(block, "ffns") else [(block, block.norm2)]


def gamma_of(part, *names):
    scales = [getattr(part, name, None) for name in names]
    return next((scale.gamma for scale in scales if hasattr(scale, "gamma")), 1)


def test_stages_own_each_parameter_once_and_in_order(vit):
    depth = len(vit.blocks)
    stages = vit.stages([1, depth - 1])
    owners = [owner for stage in stages for owner in stage]
    owned = [p for owner in owners for p in ([owner] if isinstance(owner, nn.Parameter) else owner.parameters())]
    assert list(map(id, owned)) == list(map(id, vit.parameters()))
    assert [[owner for owner in stage if owner in set(vit.blocks)] for stage in stages] == [
        list(vit.blocks[:1]),
        list(vit.blocks[1:]),
    ]
    with pytest.raises(ValueError, match="must be positive and add up to"):
        vit.stages([depth, 1])


# ---- by import path --------------------------------------------------------------------------------------------------

PLUGIN = """
from torch import nn


class Net(nn.Module):
    noise_per_sample = 0
    patch_size = None
    head_names = ("head",)

    def __init__(self, image_size, num_classes, drop_path=0.0):
        super().__init__()
        self.head = nn.Linear(3, num_classes)

    def forward(self, x, noise=None):
        return self.head(x.mean((2, 3)))

    def decay_groups(self, decay_dist_token=False):
        return ["head.weight"], ["head.bias"]

    def flops(self, image_size=None):
        return 6 * self.head.out_features


class NoNoise(Net):
    def forward(self, x):
        return self.head(x.mean((2, 3)))


class Misspelt(Net):
    head_names = ("haed",)
    noise_per_sample = None

    def decay_groups(self, decay_dist_token=False):
        return ["head.wieght"], ["head.bias", "head.bias"]


class Tied(Net):
    def __init__(self, **options):
        super().__init__(**options)
        self.again = self.head

    def decay_groups(self, decay_dist_token=False):
        return ["again.weight", "head.weight"], ["head.bias"]


class Right(Tied):
    # Two heads that are one layer, a table that the model has frozen itself, and another word for the size.
    head_names = "head", "again"

    def __init__(self, **options):
        super().__init__(**options)
        self.register_parameter("sines", nn.Parameter(self.head.weight.detach(), requires_grad=False))

    def decay_groups(self, decay_dist_token=False):
        return ["head.weight"], ["head.bias"]

    def flops(self, size=None):
        return 1


class NoToken(Net):
    def decay_groups(self):
        return super().decay_groups()


class Half(nn.Linear):
    head_names = ()

    def __init__(self, **options):
        super().__init__(1, 1)


def text(**options):
    return "a model"


def narrow(image_size):
    return Net(image_size, 10)
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    (tmp_path / "plugin_of_models.py").write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    yield "plugin_of_models"
    monkeypatch.delitem(sys.modules, "plugin_of_models", raising=False)


def test_a_model_by_import_path(plugin):
    built = models.build(f"{plugin}:Net", image_size=32, num_classes=7, drop_path=0.0)
    assert type(built).__name__ == "Net"
    assert built(images()).shape == (B, 7)


RECIPE = """\
model: {name: "plugin_of_models:Net", image_size: 32}
method: {use: supervised}
data: {source: synthetic, synthetic_samples: 16, synthetic_classes: 3, group_size: 8, repeats: 1}
optim: {lr: 1e-3, warmup_epochs: 0}
train: {epochs: 1, batch_size: 8}
engine: {device: cpu}
"""


def test_a_recipe_names_a_model_by_import_path(plugin, tmp_path):
    (tmp_path / "r.yaml").write_text(RECIPE)
    recipe = recipes.load(str(tmp_path / "r.yaml"), [])
    train(recipe, tmp_path / "run", World(torch.device("cpu")), resume=False)
    weights = open_weights(str(tmp_path / "run")).tensors
    assert {name: tuple(tensor.shape) for name, tensor in weights.items()} == {"head.weight": (3, 3), "head.bias": (3,)}
    (tmp_path / "r.yaml").write_text(RECIPE.replace(":Net", ":Half"))
    with pytest.raises(UsageError, match="model: model 'plugin_of_models:Half' does not follow the contract"):
        build.model(recipes.load(str(tmp_path / "r.yaml"), []), 3, print)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "NoNoise",
            r"plugin_of_models:NoNoise' does not follow .* it lacks: noise in forward\(x\) \(forward\(x, noise=",
        ),
        ("NoToken", r"it lacks: decay_dist_token in decay_groups\(\)"),
        (
            "Misspelt",
            "head_names has 'haed', which is no nn.Linear of it.*noise_per_sample is None, but.*"
            r"decay_groups\(\) names head.wieght, which is no parameter.*leaves out head.weight.*"
            "names head.bias more than once",
        ),
        ("Tied", r"decay_groups\(\) names again.weight, which is the second name of a tied parameter"),
        ("Half", r"it lacks: noise_per_sample \(the columns of .*; patch_size \(.*; decay_groups \(.*; flops \("),
        ("text", "model 'plugin_of_models:text' makes a str, not a torch.nn.Module"),
        (
            "narrow",
            "'plugin_of_models:narrow' cannot be called with image_size, num_classes: got an unexpected keyword",
        ),
        ("PLUGIN", "'plugin_of_models:PLUGIN' cannot be imported: .* has no attribute 'PLUGIN'"),
        ("__doc__", "'plugin_of_models:__doc__' is a NoneType, not a class or function that makes a model"),
    ],
)
def test_what_is_no_model_is_refused(plugin, name, message):
    with pytest.raises(ValueError, match=message):
        models.build(f"{plugin}:{name}", image_size=32, num_classes=7)


def test_what_is_right_though_unusual_is_no_mistake(plugin):
    models.build(f"{plugin}:Right", image_size=32, num_classes=7)


def test_layers_that_leave_a_parameter_out_are_refused():
    """Its factor of `optim.layer_decay` would silently be 1."""
    model = nn.Linear(1, 1)
    model.layers = lambda: [["weight"]]
    with pytest.raises(
        ValueError, match=r"Linear says wrongly how deep its parameters lie: layers\(\) leaves out bias"
    ):
        layers(model)


def test_a_model_that_has_a_part_is_not_said_to_lack_it():
    half = nn.Linear(1, 1)
    half.head_names = ()
    assert not any(part.startswith("head_names") for part in missing(half))
    assert [part.split()[0] for part in missing(half)] == [
        "noise_per_sample",
        "patch_size",
        "decay_groups",
        "flops",
        "noise",
    ]
