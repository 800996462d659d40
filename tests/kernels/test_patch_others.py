"""`accelerate` on vision transformers of torchvision and transformers: their results and gradients, whatever is done to
their modules before or after. What needs transformers runs in the slow tier, because its import takes seconds."""

import pickle
import warnings
from copy import deepcopy
from functools import cache
from inspect import signature

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torchvision.models.vision_transformer import VisionTransformer

from fastdeit import kernels
from fastdeit.kernels import accelerate, restore
from fastdeit.kernels.accelerate import modules
from fastdeit.kernels.accelerate.identity import difference
from tests.kernels.proof import normal
from tests.kernels.test_patch_changes import (
    CHANGES,
    DIM,
    accelerated_inside,
    assert_alike,
    assert_equal,
    attribute,
    each,
    outcome,
)

SIZES = {"hidden_size": DIM, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 48}
IMAGES = {"image_size": 16, "patch_size": 8}


def of_transformers(name, model="Model", **options):
    transformers = pytest.importorskip("transformers", minversion="5.24")  # earlier layers have other parts
    config = getattr(transformers, f"{name}Config")(**SIZES | IMAGES | options)
    return getattr(transformers, f"{name}{model}")(config)


MODELS = {
    "torchvision": lambda: VisionTransformer(16, 8, 2, 3, DIM, 48, num_classes=5),
    "ViT": lambda: of_transformers("ViT", "ForImageClassification"),
    "DeiT": lambda: of_transformers("DeiT"),
    "DINOv2": lambda: of_transformers("Dinov2", drop_path_rate=0.3, layerscale_value=0.5),
    "DINOv2 with registers": lambda: of_transformers("Dinov2WithRegisters", layerscale_value=0.5),
    "SigLIP": lambda: of_transformers("SiglipVision"),
    "SigLIP, exact GELU": lambda: of_transformers("SiglipVision", hidden_act="gelu"),
    "CLIP": lambda: of_transformers("CLIPVision"),
}
OF_TRANSFORMERS = [pytest.param(name, marks=pytest.mark.slow) for name in MODELS if name != "torchvision"]
SWAPPED = {"SigLIP": 2, "CLIP": 2}
"""Kinds of modules on ops, where that is not 3: GELU of another kind than the exact one stays."""


@cache
def model_of(name):
    """All values random; in float64, where a difference is no rounding."""
    torch.manual_seed(0)
    model = MODELS[name]().double()
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter += 0.2 * normal(*parameter.shape, dtype=torch.float64, device="cpu", seed=i)
    return model


def pair_of(name):
    """(accelerated, theirs)."""
    theirs = deepcopy(model_of(name))
    mine = deepcopy(theirs)
    accelerate(mine)
    return mine, theirs


def images(batch=3, dtype=torch.float64):
    return normal(batch, 3, 16, 16, dtype=dtype, device="cpu", seed=1)


def tensor_of(out):
    return out if isinstance(out, torch.Tensor) else out[0]


class Tensors(torch.nn.Module):
    """A model of which the first result is wanted."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return tensor_of(self.model(x))


def assert_same_model(mine, theirs, x=None):
    x = images() if x is None else x
    assert_equal(outcome(Tensors(mine), x), outcome(Tensors(theirs), x))


@pytest.mark.parametrize("name", ["torchvision", *OF_TRANSFORMERS])
def test_results_and_gradients_are_theirs(name):
    mine, theirs = pair_of(name)
    parts = [part for part in mine.modules() if isinstance(part, modules.Accelerated)]
    assert len({part.op for part in parts}) == SWAPPED.get(name, 3)
    assert len([part for part in parts if part.op == "add_layer_norm"]) == 2
    assert [difference(part) for part in parts] == [None] * len(parts)
    for part in parts:
        assert signature(type(part).forward) == signature(part.original.forward)
        assert signature(part.forward) == signature(part.original.forward.__get__(part))
    assert list(mine.state_dict()) == list(theirs.state_dict())
    assert_same_model(mine, theirs)
    restore(mine)
    assert [type(part) for part in mine.modules()] == [type(part) for part in theirs.modules()]


@pytest.mark.parametrize("name", ["torchvision", *OF_TRANSFORMERS])
def test_float32_is_as_close(name):
    """Errors of result and gradients are at most twice theirs, beside rounding: of the largest gradient, since that of
    a bias of the keys is a sum whose terms cancel."""
    exact = outcome(Tensors(pair_of(name)[1]), images(dtype=torch.float32).double())
    mine, theirs = (outcome(Tensors(model.float()), images(dtype=torch.float32)) for model in pair_of(name))
    rounding = 32 * torch.finfo(torch.float32).eps * max(float(truth.abs().max()) for truth in exact[1:-1])
    for my, their, truth in zip(mine, theirs, exact, strict=True):
        assert (my - truth).abs().max() <= 2 * (their - truth).abs().max() + rounding


# ---- every change of a block and of what is in it --------------------------------------------------------------------

BLOCKS = {
    "torchvision": "encoder.layers.encoder_layer_0",
    "ViT": "vit.layers.0",
    "DINOv2": "encoder.layer.0",
    "SigLIP": "encoder.layers.0.self_attn",
}
PATHS = {
    "torchvision": [
        *("", "ln_1", "self_attention", "self_attention.out_proj", "dropout", "ln_2", "mlp"),
        *(f"mlp.{place}" for place in range(5)),
    ],
    "ViT": [
        *("", "layernorm_before", "attention", "layernorm_after", "dropout", "mlp"),
        *("mlp.fc1", "mlp.activation_fn", "mlp.fc2", "attention.q_proj", "attention.v_proj", "attention.o_proj"),
    ],
    "DINOv2": ["", "norm1", "attention", "layer_scale1", "drop_path", "norm2", "mlp", "mlp.fc2", "layer_scale2"],
    "SigLIP": ["model", "model.k_proj", "model.out_proj"],
}
OTHERS = sorted(set(CHANGES) - {"shared", "wrapper", "parametrised"})
QUICK = {
    *(("ln_2", "class patch"), ("mlp.1", "same_name"), ("mlp", "hook"), ("", "own_forward")),
    *(("self_attention", "class patch"), ("self_attention", "subclass"), ("self_attention.out_proj", "hook")),
}
LINEAR = {"fc2", "3", "q_proj", "v_proj", "o_proj", "k_proj", "out_proj"}
CASES = [
    pytest.param(
        name, path, change, marks=() if (path, change) in QUICK and name == "torchvision" else pytest.mark.slow
    )
    for name, paths in PATHS.items()
    for path in paths
    for change in [*OTHERS, *(["parametrised"] if path.rpartition(".")[2] in {"ln_2", "norm2", *LINEAR} else [])]
]


def block_pair(name):
    mine, theirs = pair_of(name)
    pair = mine.get_submodule(BLOCKS[name]), theirs.get_submodule(BLOCKS[name])
    return tuple(map(Tensors, pair)) if name == "SigLIP" else pair


@pytest.mark.parametrize(("name", "path", "change"), CASES)
def test_changes_after_accelerating(name, path, change):
    assert_alike(*block_pair(name), name, CHANGES[change], path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "path", "change"), [case.values for case in CASES])
def test_changes_before_accelerating(name, path, change):
    theirs = block_pair(name)[1]

    def made(pair, path, seen):
        return accelerated_inside(CHANGES[change], pair, path, seen)

    assert_alike(deepcopy(theirs), theirs, name, made, path)


@pytest.mark.parametrize(
    ("name", "path", "key"),
    [
        ("torchvision", "dropout", "p"),
        ("torchvision", "ln_2", "eps"),
        pytest.param("ViT", "layernorm_after", "eps", marks=pytest.mark.slow),
        pytest.param("DINOv2", "drop_path", "drop_prob", marks=pytest.mark.slow),
        *(("torchvision", "self_attention", key) for key in ("num_heads", "batch_first", "add_zero_attn", "dropout")),
        *(
            pytest.param("ViT", "attention", key, marks=pytest.mark.slow)
            for key in ("scaling", "head_dim", "is_causal", "attention_dropout")
        ),
        *(pytest.param("SigLIP", "model", key, marks=pytest.mark.slow) for key in ("scale", "head_dim", "dropout")),
    ],
)
def test_attributes_that_change_after_accelerating(name, path, key):
    assert_alike(*block_pair(name), name, each(attribute(key)), path)


def test_a_change_is_told_and_a_kernel_that_is_asked_for_raises():
    block, _ = block_pair("torchvision")
    block.ln_2.eps = 0.5
    x = normal(2, 5, DIM, dtype=torch.float64, device="cpu", seed=0)
    modules._warn_once.cache_clear()
    with pytest.warns(
        RuntimeWarning, match="EncoderBlock runs its own code instead of add_layer_norm: ln_2 has another eps"
    ):
        block(x)
    with kernels.use(add_layer_norm="triton"), pytest.raises(RuntimeError, match="cannot run in this EncoderBlock"):
        block(x)


def test_a_sequence_is_an_mlp_by_its_name_alone():
    def sequence():
        nn = torch.nn
        return nn.Sequential(nn.Linear(DIM, 48), nn.GELU(), nn.Dropout(0.0), nn.Linear(48, DIM), nn.Dropout(0.0))

    model = torch.nn.ModuleDict({"mlp": sequence(), "stem": sequence()})
    assert [(row.path, row.op) for row in accelerate(model).rows] == [("mlp", "mlp")]


def test_pickles_are_tried_out_again():
    mine, theirs = pair_of("torchvision")
    loaded = pickle.loads(pickle.dumps(mine))
    assert {type(part) for part in loaded.modules()} == {type(part) for part in mine.modules()}
    assert_same_model(loaded, theirs)


# ---- transformers' own features --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT", "DINOv2", "SigLIP"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_hidden_states_and_attentions_are_recorded(name, implementation):
    mine, theirs = (model.eval() for model in pair_of(name))
    for model in (mine, theirs):
        model.set_attn_implementation(implementation)
    wanted = {"output_hidden_states": True, "output_attentions": implementation == "eager"}
    my, their = (model(images(), **wanted) for model in (mine, theirs))
    assert len(my.hidden_states) == len(their.hidden_states) >= 3
    torch.testing.assert_close(my.hidden_states, their.hidden_states)
    if implementation == "eager":
        torch.testing.assert_close(my.attentions, their.attentions)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")
@pytest.mark.parametrize("name", ["ViT", "DINOv2"])
def test_gradient_checkpointing(name):
    mine, theirs = pair_of(name)
    mine.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    block = mine.get_submodule(BLOCKS[name])
    counted = []
    block.mlp.register_forward_pre_hook(lambda module, args: counted.append(None))
    assert_same_model(mine, theirs)
    assert len(counted) == 3  # once more in the backward, and once in eval mode


@pytest.mark.slow
def test_a_mask_reaches_the_attention_of_a_layer():
    mine, theirs = block_pair("ViT")
    x = normal(2, 5, DIM, dtype=torch.float64, device="cpu", seed=0)
    mask = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    mask[..., 3:] = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(mine(x, mask), theirs(x, mask))
    assert not torch.equal(mine(x, mask), mine(x))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchvision", "ViT"])
def test_compiled_to_one_graph(name):
    torch.compiler.reset()
    mine, theirs = (model.eval() for model in pair_of(name))
    compiled = torch.compile(mine, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(tensor_of(compiled(images())), tensor_of(theirs(images())))


@pytest.mark.slow
def test_checkpointing_around_the_model():
    mine, theirs = pair_of("ViT")
    x = images().requires_grad_()
    (grad,) = torch.autograd.grad(checkpoint(Tensors(mine), x, use_reentrant=False).sum(), x)
    torch.testing.assert_close(grad, torch.autograd.grad(Tensors(theirs)(x).sum(), x)[0])
