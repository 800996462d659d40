"""The last block of an accelerated model computes what the heads read, and all tokens where anybody else reads them."""

from copy import deepcopy
from types import MethodType

import pytest
import timm
import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from fastdeit.kernels import accelerate, restore
from tests.kernels.proof import normal
from tests.kernels.timm_models import (
    accelerated_pair,
    all_tokens_as_timm,
    assert_close,
    assert_same_as_timm,
    fell_back,
    images_for,
    last_block_row,
    model_of,
    outcome,
    queries,
)

DIM, HIDDEN, TOKENS = 48, 192, 10  # of model_of(): 3 x 3 patches and the class token

MODELS = {
    "deit": ("deit_tiny_patch16_224", {}, 1),
    "distilled": ("deit_tiny_distilled_patch16_224", {"drop_path_rate": 0.3}, 2),
    "deit3": ("deit3_small_patch16_224", {"depth": 3, "drop_path_rate": 0.5}, 1),
    "registers": ("vit_base_patch14_reg4_dinov2", {"drop_path_rate": 0.3}, 1),
    "clip": ("vit_base_patch16_clip_224", {}, 1),
    "eva": ("eva_giant_patch14_224", {"global_pool": "token"}, 1),
    "no bias": ("vit_tiny_patch16_224", {"qkv_bias": False}, 1),
    "one block": ("vit_tiny_patch16_224", {"depth": 1}, 1),
    "patch drop": ("vit_tiny_patch16_224", {"patch_drop_rate": 0.5, "drop_path_rate": 0.3}, 1),
    "dynamic size": ("vit_tiny_patch16_224", {"dynamic_img_size": True}, 1),
    "dropout": ("vit_tiny_patch16_224", {"pos_drop_rate": 0.2, "drop_rate": 0.2}, 1),
    "norm after pooling": ("vit_tiny_patch16_224", {"fc_norm": True, "final_norm": False}, 1),
    "no head": ("vit_tiny_patch16_224", {"num_classes": 0}, 1),
}


@pytest.fixture
def pair():
    """(accelerated model, the same under timm's code), in eval mode."""
    return tuple(model.eval() for model in accelerated_pair())


# ---- what is computed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("case", MODELS)
def test_computes_what_timm_computes(case, training):
    name, options, rows = MODELS[case]
    model = model_of(name, **options).train(training)
    timms = deepcopy(model)
    row = last_block_row(accelerate(model, strict=True))
    assert row == ("", "last block", "query_attention", "")
    images = images_for(model, 8)
    assert queries(lambda: model(images)) == [rows]
    assert_same_as_timm(model, timms, images)


@pytest.mark.parametrize("case", MODELS)
def test_draws_what_timm_draws(case):
    name, options, _ = MODELS[case]
    model = model_of(name, **options).train()
    timms = deepcopy(model)
    accelerate(model, strict=True)
    states = []
    for m in (model, timms):
        torch.manual_seed(11)
        m(images_for(model))
        states.append(torch.random.get_rng_state())
    assert torch.equal(*states)


def test_other_sizes_of_images():
    model = model_of("vit_tiny_patch16_224", dynamic_img_size=True)
    timms = deepcopy(model)
    accelerate(model, strict=True)
    images = normal(2, 3, 80, 64, dtype=torch.float32, device="cpu", seed=1)
    assert queries(lambda: model(images)) == [1]
    assert_same_as_timm(model, timms, images)


def test_autocast_keeps_timms_dtypes(pair):
    model, timms = pair
    with torch.autocast("cpu", torch.bfloat16):
        mine, theirs = (outcome(m, images_for(m)) for m in pair)
        assert queries(lambda: model(images_for(model))) == [1]
    exact = outcome(deepcopy(timms).double(), images_for(model).double())
    for name in exact:
        assert mine[name].dtype == theirs[name].dtype
        bound = 2 * (theirs[name] - exact[name]).norm() + torch.finfo(torch.bfloat16).eps * exact[name].norm()
        assert (mine[name] - exact[name]).norm() <= bound, name


def test_without_gradients(pair):
    model, timms = pair
    with torch.inference_mode():
        assert queries(lambda: assert_close(model(images_for(model)), timms(images_for(model)))) == [1]


def flops(model, images):
    # As plain products: the counter knows none of a CPU's fused attention.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(images)
    return counter.get_total_flops()


def test_computes_the_less_for_it():
    model = model_of()
    images = images_for(model, 1)
    accelerate(model, last_block=False)
    everything = flops(model, images)
    accelerate(model)
    per_token = 2 * (DIM * DIM + 2 * TOKENS * DIM + DIM * DIM + 2 * DIM * HIDDEN)  # queries, attention, projection, MLP
    assert everything - flops(model, images) == (TOKENS - 1) * per_token


# ---- when all tokens are computed ------------------------------------------------------------------------------------

FEATURES = {
    "forward_features": lambda m, x: m.forward_features(x),
    "forward_intermediates": lambda m, x: m.forward_intermediates(x),
    "get_intermediate_layers": lambda m, x: m.get_intermediate_layers(x, n=2, norm=True, return_prefix_tokens=True),
    "blocks": lambda m, x: m.blocks(m.patch_embed(x)),
    "last block": lambda m, x: m.blocks[-1](m.patch_embed(x)),
}


@pytest.mark.parametrize("way", FEATURES)
def test_features_are_of_all_tokens(way, pair):
    model, timms = pair
    images = images_for(model)
    model(images)
    found = []
    assert queries(lambda: found.append(FEATURES[way](model, images))) == []
    assert_close(found[0], FEATURES[way](timms, images))


def test_a_feature_extractor_after_accelerating(pair):
    from timm.models._features import FeatureGetterNet

    mine, theirs = (FeatureGetterNet(m, out_indices=[0, 1], norm=True) for m in pair)
    images = images_for(pair[0])
    assert queries(lambda: assert_close(mine(images), theirs(images))) == []


LATE = ["blocks", "norm", "blocks.1"]
LATE += [f"blocks.1.{name}" for name in ("norm1", "attn", "attn.qkv", "attn.proj_drop", "attn.proj", "drop_path1")]
LATE += [f"blocks.1.{name}" for name in ("norm2", "mlp", "mlp.fc1", "mlp.act", "mlp.fc2", "drop_path2")]
A_FEW = "norm", "blocks.1.attn", "blocks.1.mlp.fc2"
HOOKS = {
    "forward": lambda module, see: module.register_forward_hook(lambda m, args, out: see(out)),
    "pre": lambda module, see: module.register_forward_pre_hook(lambda m, args: see(*args)),
    "backward": lambda module, see: module.register_full_backward_hook(lambda m, grads, out: see(*out)),
    "backward pre": lambda module, see: module.register_full_backward_pre_hook(lambda m, out: see(*out)),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.slow] * (path not in A_FEW)) for path in LATE],
)
def test_hooks_see_all_tokens(path, kind, pair):
    model, timms = pair
    images = images_for(model)
    model(images)
    seen, handles = {m: [] for m in pair}, []
    for m in pair:
        handles.append(HOOKS[kind](m.get_submodule(path), lambda x, m=m: seen[m].append(x.shape)))
        m(images).sum().backward()
    assert seen[model] == seen[timms] != []
    assert queries(lambda: model(images)) == []
    handles[0].remove()
    assert queries(lambda: model(images)) == [1]


@pytest.mark.parametrize("path", ["patch_embed", "blocks.0", "blocks.0.attn.proj", "fc_norm", "head_drop", "head"])
@pytest.mark.parametrize("kind", HOOKS)
def test_hooks_elsewhere_see_what_they_saw(path, kind, pair):
    model, images = pair[0], images_for(pair[0])
    seen = {m: [] for m in pair}
    for m in pair:
        HOOKS[kind](m.get_submodule(path), lambda x, m=m: seen[m].append(x))
        m(images).sum().backward()
    assert_close(*seen.values())
    assert queries(lambda: model(images)) == [1]


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", ""])
def test_another_pooling_afterwards(pool, pair):
    for m in pair:
        torch.manual_seed(0)
        m.reset_classifier(5, pool)
    all_tokens_as_timm(*pair)
    assert last_block_row(accelerate(pair[0])).reason == f"global_pool is {pool!r}, not 'token'"


@pytest.mark.parametrize("pool", ["avg", "map"])
def test_another_pooling_from_the_start(pool):
    model = model_of("vit_tiny_patch16_224", global_pool=pool)
    timms = deepcopy(model)
    row = last_block_row(accelerate(model, strict=True))
    assert row == ("", "last block", None, f"global_pool is {pool!r}, not 'token'")
    assert type(model) is VisionTransformer
    all_tokens_as_timm(model, timms)


def test_an_attention_pool(pair):
    pair[0].attn_pool = nn.Identity()
    assert queries(lambda: pair[0](images_for(pair[0]))) == []
    assert last_block_row(accelerate(pair[0])).reason == "attn_pool reads all tokens"


def test_another_head_is_still_of_the_class_token(pair):
    for m in pair:
        torch.manual_seed(0)
        m.reset_classifier(5)
    assert queries(lambda: pair[0](images_for(pair[0]))) == [1]
    assert_same_as_timm(*pair, images_for(pair[0]))


@pytest.mark.parametrize("distilled", [False, True])
def test_distilled_training_is_turned_on_and_off(distilled):
    model = model_of("deit_tiny_distilled_patch16_224").train()
    timms = deepcopy(model)
    accelerate(model, strict=True)
    for m in (model, timms):
        m.set_distilled_training(distilled)
    images = images_for(model)
    assert queries(lambda: model(images)) == [2]
    assert isinstance(model(images), tuple) == distilled
    assert_same_as_timm(model, timms, images)


MASK = (torch.arange(TOKENS) < 6).expand(1, 1, TOKENS, TOKENS)


@pytest.mark.parametrize("arguments", [{"attn_mask": MASK}, {"is_causal": True}])
def test_masks(arguments, pair):
    mine, theirs = (m(images_for(m), **arguments) for m in pair)
    assert_close(mine, theirs)
    assert queries(lambda: pair[0](images_for(pair[0]), **arguments)) == []
    assert queries(lambda: pair[0](images_for(pair[0]), attn_mask=None, is_causal=False)) == [1]


def test_an_argument_that_asks_for_more():
    class Returning(VisionTransformer):
        def forward(self, x, features=False):
            return self.forward_features(x) if features else super().forward(x)

    model = model_of().eval()
    model.__class__ = Returning
    accelerate(model)
    images = images_for(model)
    assert queries(lambda: model(images)) == [1]
    assert model(images, features=True).shape[1] == TOKENS
    assert model(images, True).shape[1] == TOKENS


def test_masks_that_the_model_makes():
    class Masked(VisionTransformer):
        def forward(self, x):
            return super().forward(x, attn_mask=self.mask)

    model = model_of().eval()
    model.__class__, model.mask = Masked, None
    timms = deepcopy(model)
    assert last_block_row(accelerate(model)).op
    model.mask = timms.mask = MASK
    all_tokens_as_timm(model, timms)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant, pair, monkeypatch):
    monkeypatch.setattr("timm.models._manipulate.use_reentrant_ckpt", lambda: reentrant)
    model, timms = (m.train() for m in pair)
    images = images_for(model)
    expected = outcome(timms, images)
    model.set_grad_checkpointing()

    def step():
        torch.manual_seed(3)
        out = model(images.clone().requires_grad_())
        (out * normal(*out.shape, dtype=out.dtype, device="cpu", seed=0)).sum().backward()

    assert queries(step) == []
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, expected[name])
    assert last_block_row(accelerate(model)).reason == "gradient checkpointing computes the blocks again"
    model.set_grad_checkpointing(False)
    assert queries(lambda: model(images)) == [1]


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_around_the_model(reentrant, pair):
    model, timms = (m.train() for m in pair)
    images = images_for(model).requires_grad_()
    torch.manual_seed(3)
    used = queries(lambda: checkpoint(model, images, use_reentrant=reentrant).sum().backward())
    assert used == [1, 1]
    torch.manual_seed(3)
    timms(images).sum().backward()
    for mine, theirs in zip(model.parameters(), timms.parameters(), strict=True):
        assert_close(mine.grad, theirs.grad)


def test_a_block_under_a_checkpoint_wrapper(pair):
    model, timms = pair
    model.blocks[-1] = checkpoint_wrapper(model.blocks[-1])
    images = images_for(model)
    model(images).sum().backward()
    timms(images).sum().backward()
    for mine, theirs in zip(model.parameters(), timms.parameters(), strict=True):
        assert_close(mine.grad, theirs.grad)
    assert queries(lambda: model(images)) == []


# ---- parts that somebody has replaced --------------------------------------------------------------------------------


def mean_head(self, x, pre_logits=False):
    return self.head(self.fc_norm(x.mean(1)))


def test_a_head_of_the_users_own(pair):
    for m in pair:
        m.forward_head = MethodType(mean_head, m)
    all_tokens_as_timm(*pair)
    assert last_block_row(accelerate(pair[0])).reason == "forward_head has been replaced"


@pytest.mark.parametrize("path", ["norm", "blocks", "blocks.1", "blocks.1.attn", "blocks.1.mlp", "blocks.1.attn.proj"])
def test_a_forward_of_the_users_own(path, pair):
    seen = {m: [] for m in pair}

    def wrapped(module, sizes):
        forward = module.forward

        def patched(x, **arguments):
            out = forward(x, **arguments)
            sizes.extend([x.shape, out.shape])
            return out

        return patched

    for m in pair:
        module = m.get_submodule(path)
        module.forward = wrapped(module, seen[m])
        m(images_for(m))
    assert seen[pair[0]] == seen[pair[1]] != []
    assert queries(lambda: pair[0](images_for(pair[0]))) == []
    assert_close(*(outcome(m, images_for(m)) for m in pair))


def test_a_forward_of_the_users_own_for_a_leaf_runs(pair):
    fc1 = pair[0].blocks[0].mlp.fc1
    forward, reached = fc1.forward, []
    fc1.forward = lambda x: reached.append(x) or forward(x)
    assert fell_back(pair[0].blocks[0].mlp, lambda: pair[0](images_for(pair[0])))
    assert len(reached) == 1


def test_a_forward_around_the_model(pair):
    model = pair[0]
    model.forward = lambda x, forward=model.forward: forward(x).float()
    assert queries(lambda: model(images_for(model))) == [1]


class Blocks(nn.Sequential):
    pass


REPLACED = {
    "block": lambda m: setattr(m, "blocks", nn.Sequential(m.blocks[0], Block(DIM, 3))),
    "attention": lambda m: setattr(m.blocks[1], "attn", deepcopy(m.blocks[0].attn)) or restore(m.blocks[1].attn),
    "mlp": lambda m: setattr(m.blocks[1], "mlp", timm.layers.GluMlp(DIM, 2 * DIM)),
    "restored block": lambda m: restore(m.blocks[1]),
    "container": lambda m: setattr(m, "blocks", Blocks(*m.blocks)),
    "norm": lambda m: setattr(m, "norm", timm.layers.RmsNorm(DIM)),
    "dropout": lambda m: setattr(m.blocks[1].attn.proj_drop, "p", 0.1),
    "projection": lambda m: setattr(m.blocks[1].attn, "proj", nn.Sequential(m.blocks[1].attn.proj, nn.Tanh())),
    "qkv": lambda m: setattr(m.blocks[1].attn, "qkv", nn.Sequential(m.blocks[1].attn.qkv, nn.Tanh())),
}


@pytest.mark.parametrize("part", REPLACED)
def test_parts_that_are_replaced(part, pair):
    for m in pair:
        torch.manual_seed(0)
        REPLACED[part](m)
    all_tokens_as_timm(*pair)
    restore(pair[0])
    assert [type(module) for module in pair[0].modules()] == [type(module) for module in pair[1].modules()]


def test_a_last_block_that_keeps_its_code_is_named():
    model = model_of()
    model.blocks[1].mlp.act = nn.SiLU()
    assert last_block_row(accelerate(model)).reason == "blocks.1.mlp keeps its own code"
    model.blocks[1].mlp.act = nn.GELU()
    assert last_block_row(accelerate(model)).op == "query_attention"
