"""accelerate and restore: timm's models compute what they computed before; what is swapped and what is not."""

import subprocess
import sys
from copy import deepcopy

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import GELU
from timm.models.vision_transformer import Attention, Block, ResPostBlock
from torch import nn

from fastdeit import kernels
from fastdeit.kernels import accelerate, restore
from fastdeit.kernels.accelerate import modules, patch
from tests.kernels.proof import normal
from tests.kernels.timm_models import (
    TINY,
    accelerated_pair,
    assert_close,
    assert_same_as_timm,
    fell_back,
    images_for,
    model_of,
    outcome,
)

ALL = {"block", "attn", "mlp"}
FAMILIES = {
    "deit_tiny_patch16_224": ALL,
    "deit_tiny_distilled_patch16_224": ALL,
    "deit3_small_patch16_224": ALL,
    "vit_small_patch16_224": ALL,
    "vit_medium_patch16_reg4_gap_256": ALL,
    "vit_base_patch16_clip_224": ALL,
    "vit_base_patch16_siglip_224": ALL,
    "vit_base_patch14_reg4_dinov2": ALL,
    "naflexvit_base_patch16_gap": ALL,
    "eva_giant_patch14_224": ALL,
    "beit_base_patch16_224": {"block", "mlp"},
    "cait_xxs24_224": {"block", "mlp"},
    "vit_small_patch16_dinov3": {"block", "mlp"},
    "vit_base_patch16_clip_quickgelu_224": {"block", "attn"},
    "vit_giant_patch14_dinov2": {"block", "attn"},
    "vit_base_patch16_rpn_224": {"attn", "mlp"},
    "eva02_tiny_patch14_224": {"block"},
}
REASONS = {
    ("beit_base_patch16_224", "attn"): "has relative_position_bias_table, which the op does not take",
    ("cait_xxs24_224", "attn"): "has proj_l, a Linear, which the op does not compute",
    ("vit_small_patch16_dinov3", "attn"): "is given rotary position embeddings, which the op does not apply",
    ("vit_base_patch16_clip_quickgelu_224", "mlp"): "act is QuickGELU(), not the exact GELU",
    ("vit_base_patch16_rpn_224", "block"): "computes something else than its structure suggests",
}


@pytest.fixture
def pair():
    """(accelerated model, the same under timm's code)."""
    return accelerated_pair()


# ---- what is computed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", FAMILIES)
def test_computes_what_timm_computes(name, training):
    model = model_of(name, drop_path_rate=0.3).train(training)
    timms = deepcopy(model)
    accelerate(model)
    assert_same_as_timm(model, timms, images_for(model))


@pytest.mark.parametrize(
    "options",
    [
        {"qkv_bias": False},
        {"init_values": 0.1, "drop_path_rate": 0.5},
        {"dynamic_img_size": True},
        {"patch_drop_rate": 0.5},
        {"norm_layer": nn.LayerNorm},
        {"act_layer": GELU},
        {"scale_mlp_norm": True, "scale_attn_norm": True},
        {"qk_norm": True},
        {"proj_drop_rate": 0.2, "attn_drop_rate": 0.2},
        {"fc_norm": True, "global_pool": "avg"},
        {"no_embed_class": True, "reg_tokens": 2},
    ],
    ids=lambda options: ",".join(options),
)
def test_options_of_timms_vit(options):
    model = model_of("vit_tiny_patch16_224", **options)
    timms = deepcopy(model)
    accelerate(model)
    assert_same_as_timm(model, timms, images_for(model))


def test_on_triton(device):
    model = model_of("deit3_small_patch16_224").to(device).eval()
    timms = deepcopy(model)
    with kernels.use("triton"):
        accelerate(model, strict=True)
        assert_same_as_timm(model, timms, images_for(model).to(device))


def test_settings_are_those_of_each_module():
    model = model_of().eval()
    model.blocks[0].norm1.eps, model.blocks[0].norm2.eps, model.blocks[1].norm1.eps = 0.1, 0.5, 1.0
    model.blocks[1].attn.num_heads, model.blocks[1].attn.head_dim, model.blocks[1].attn.scale = 2, 24, 24**-0.5
    timms = deepcopy(model)
    accelerate(model, strict=True)
    assert_same_as_timm(model, timms, images_for(model))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_drop_path_draws_what_timm_draws(dtype, pair):
    model, timms = (m.to(dtype).train() for m in pair)
    images = images_for(model, 16).to(dtype)
    states = []
    for m in (model, timms):
        torch.manual_seed(11)
        m(images)
        states.append(torch.random.get_rng_state())
    assert torch.equal(*states)
    kept = [model.blocks[1].drop_path1(torch.ones(4000, 1, 1, dtype=dtype)) for _ in range(2)]
    assert not torch.equal(*kept)


def test_each_branch_has_its_own_drop_path():
    model = model_of(drop_path_rate=0.3).train()
    model.blocks[1].drop_path2.drop_prob = 0.8
    timms = deepcopy(model)
    accelerate(model, strict=True)
    assert_same_as_timm(model, timms, images_for(model, 16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drop_path_keeps_the_share_it_should(dtype):
    block = Block(48, 3, drop_path=0.25).train()
    accelerate(block, strict=True)
    tokens = torch.zeros(20_000, 1, 48, dtype=dtype)
    keep = modules.sum_of(block, tokens, tokens, "2").keep
    assert keep.dtype == torch.float32
    assert set(keep.tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs(keep.mean().item() - 1) < 5 * (0.25 / 0.75 / 20_000) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype, pair):
    model, timms = (m.eval().to(dtype) for m in pair)
    images = images_for(model).to(dtype)
    mine, same = outcome(model, images), outcome(timms, images)
    exact = outcome(deepcopy(timms).double(), images.double())
    for name in ("output 0", "blocks.0.attn.qkv.weight", "blocks.1.mlp.fc1.bias", "blocks.0.norm2.weight"):
        assert mine[name].dtype == dtype
        bound = 2 * (same[name] - exact[name]).norm() + torch.finfo(dtype).eps * exact[name].norm()
        assert (mine[name] - exact[name]).norm() <= bound, name


@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit3_small_patch16_224"])
def test_autocast(name):
    model = model_of(name).eval()
    timms = deepcopy(model)
    accelerate(model, strict=True)
    images = images_for(model)
    with torch.autocast("cpu", torch.bfloat16):
        mine, same = outcome(model, images), outcome(timms, images)
    exact = outcome(deepcopy(timms).double(), images.double())
    for key in exact:
        assert mine[key].dtype == same[key].dtype
        bound = 2 * (same[key] - exact[key]).norm() + torch.finfo(torch.bfloat16).eps * exact[key].norm()
        assert (mine[key] - exact[key]).norm() <= bound, key


@pytest.mark.parametrize("tokens_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "deit3_small_patch16_224"])
def test_residual_stream_has_timms_dtype_under_autocast(name, tokens_dtype):
    model = model_of(name)
    timms = deepcopy(model)
    accelerate(model, strict=True)
    x = normal(2, 5, 48, dtype=tokens_dtype, device="cpu", seed=0)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.blocks[0](x).dtype == timms.blocks[0](x).dtype


def test_masks_reach_the_attention(pair):
    block, timms = (m.blocks[0].eval() for m in pair)
    x = normal(2, 6, 48, dtype=torch.float32, device="cpu", seed=0)
    mask = torch.arange(6) < 4
    for arguments in ({"attn_mask": mask.expand(2, 1, 6, 6)}, {"is_causal": True}):
        assert_close(block(x, **arguments), timms(x, **arguments))
        assert fell_back(block.attn, lambda given=arguments: block(x, **given))
        assert not torch.allclose(block(x), block(x, **arguments), atol=1e-3)


def test_arguments_without_a_name_reach_timm(pair):
    block, timms = (m.blocks[0].eval() for m in pair)
    x, mask = torch.randn(2, 6, 48), (torch.arange(6) < 4).expand(2, 1, 6, 6)
    assert_close(block(x, mask), timms(x, mask))
    assert fell_back(block, lambda: block(x, mask))
    assert not fell_back(block, lambda: block(x, None))


def test_unknown_arguments_are_timms_to_refuse(pair):
    with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
        pair[0].blocks[0](torch.zeros(1, 2, 48), colour=1)


class AnyRank(nn.Module):
    """A user's own attention, of tokens `[..., N, C]`."""

    def __init__(self):
        super().__init__()
        self.num_heads = 3
        self.qkv, self.proj = nn.Linear(48, 144), nn.Linear(48, 48)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 3, 16)).movedim((-3, -2), (0, -3)).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).movedim(-3, -2).flatten(-2))


def test_attention_of_other_than_batches_of_tokens_is_the_models_own():
    module = AnyRank()
    x = torch.randn(2, 4, 5, 48)
    expected = module(x), module(x[0])
    accelerate(module, strict=True)
    assert fell_back(module, lambda: module(x))
    assert not fell_back(module, lambda: module(x[0]))
    assert_close((module(x), module(x[0])), expected)


# ---- what is swapped and what is not ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    model = model_of(name)
    report = accelerate(model)
    swapped = {row.part for row in report.rows if row.op and row.path.startswith("blocks.")}
    assert swapped == FAMILIES[name]
    for (family, part), reason in REASONS.items():
        if family == name:
            assert {row.reason for row in report.kept if row.part == part and row.path.startswith("blocks.")} == {
                reason
            }


def test_the_report_is_a_table():
    model = model_of("beit_base_patch16_224", num_heads=2)
    model.blocks[1].mlp.act = nn.SiLU()
    table = "has relative_position_bias_table, which the op does not take"
    assert str(accelerate(model)) == "\n".join(
        [
            "modules           part        runs on         why",
            "blocks.*       2  block       add_layer_norm",
            "blocks.*.attn  2  attn        its own code    " + table,
            "blocks.0.mlp   1  mlp         mlp",
            "blocks.1.mlp   1  mlp         its own code    act is SiLU(), not the exact GELU",
            "(the model)    1  last block  its own code    global_pool is 'avg', not 'token'",
        ]
    )


def test_a_model_without_blocks():
    report = accelerate(timm.create_model("regnety_002"))
    assert str(report) == "no module has the structure of a transformer block, its attention or its MLP"


def test_a_gated_mlp():
    module = timm.layers.GluMlp(48, 64, act_layer=nn.GELU)
    assert accelerate(module).kept == (("", "mlp", None, "is gated: fc1 makes 64 features, fc2 takes 32"),)


def test_parts_that_are_missing():
    unheaded = AnyRank()
    del unheaded.num_heads
    assert accelerate(unheaded).kept == (("", "attn", None, "has no num_heads"),)
    block = Block(48, 3)
    block.attn, block.mlp = nn.Identity(), nn.Identity()
    assert [row.reason for row in accelerate(block).kept] == ["has no qkv", "has no fc1"]


def test_drop_in_modules_are_on_the_ops_already():
    assert accelerate(kernels.nn.Block(48, 3)).rows == ()


def test_timm_is_not_imported():
    subprocess.run([sys.executable, "-c", "import sys, fastdeit.kernels; sys.exit('timm' in sys.modules)"], check=True)


def test_nothing_but_classes_changes(pair):
    model, timms = pair
    assert list(model.state_dict()) == list(timms.state_dict())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in timms.named_modules()]
    assert isinstance(model.blocks[0], Block)
    assert isinstance(model.blocks[0].attn, Attention)
    model.load_state_dict(timms.state_dict())


def test_twice_is_once(pair):
    model = pair[0]
    types = [type(module) for module in model.modules()]
    assert accelerate(model, strict=True).kept == ()
    assert [type(module) for module in model.modules()] == types


def test_restore_undoes_it(pair):
    model, timms = pair
    restore(model)
    assert [type(module) for module in model.modules()] == [type(module) for module in timms.modules()]
    assert torch.equal(model.eval()(images_for(model)), timms.eval()(images_for(model)))
    assert len(accelerate(model, strict=True).rows) == 7


def test_strict_changes_nothing_and_says_why():
    model = model_of()
    model.blocks[1].mlp.act = nn.SiLU()
    types = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=r"(?s)nothing was changed.*blocks.1.mlp .* act is SiLU\(\)"):
        accelerate(model, strict=True)
    assert [type(module) for module in model.modules()] == types
    with pytest.raises(ValueError, match="no module has the structure"):
        accelerate(nn.Linear(2, 2), strict=True)


def test_torchs_generator_is_left_alone():
    model = model_of()
    state = torch.random.get_rng_state()
    accelerate(model, strict=True)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_single_block_is_a_model():
    block = Block(48, 3)
    assert [row.path for row in accelerate(block, strict=True).rows] == ["", "attn", "mlp"]


@pytest.mark.parametrize("default", ["cpu", "meta"])
def test_on_the_meta_device(default):
    with torch.device("meta"):
        model = timm.create_model("deit3_small_patch16_224", drop_path_rate=0.1, **TINY)
    with torch.device(default):
        accelerate(model, strict=True)
    assert all(parameter.is_meta for parameter in model.parameters())


def test_trying_out_makes_tensors_where_the_model_is(pair):
    _, timms = pair
    with torch.device("meta"):
        accelerate(timms, strict=True)
    assert not any(parameter.is_meta for parameter in timms.parameters())


class LyingGELU(nn.Module):
    def forward(self, x):
        return F.gelu(x, approximate="tanh")


LyingGELU.__name__ = "GELU"


class Residual(Block):
    """Adds the normalised tokens instead of the tokens."""

    def forward(self, x):
        x = self.norm1(x)
        x = x + self.attn(x)
        return x + self.mlp(self.norm2(x))


class OtherOrder(Block):
    def forward(self, x, **kwargs):
        x = x + self.mlp(self.norm1(x))
        return x + self.attn(self.norm2(x))


class OtherNorms(Block):
    def forward(self, x, **kwargs):
        x = x + self.attn(self.norm2(x))
        return x + self.mlp(self.norm1(x))


class OtherLayerScale(Block):
    def forward(self, x, **kwargs):
        x = x + self.ls2(self.attn(self.norm1(x)))
        return x + self.ls1(self.mlp(self.norm2(x)))


class OtherScale(Attention):
    def forward(self, x, **kwargs):
        return super().forward(1.01 * x)


class DetachedAttention(Attention):
    def forward(self, x, **kwargs):
        return super().forward(x.detach())


@pytest.mark.parametrize(
    "module",
    [
        ResPostBlock(48, 3),
        Residual(48, 3),
        OtherOrder(48, 3),
        OtherNorms(48, 3),
        OtherLayerScale(48, 3, init_values=0.1),
        OtherScale(48, 3),
        DetachedAttention(48, 3),
        timm.layers.Mlp(48, 64, act_layer=LyingGELU),
    ],
    ids=lambda module: type(module).__name__,
)
def test_a_familiar_structure_that_computes_something_else(module):
    kept = [row for row in accelerate(module).kept if row.path == ""]
    assert [row.reason for row in kept] == ["computes something else than its structure suggests"]
    assert not isinstance(module, modules.Accelerated)


def test_a_forward_that_needs_more_than_tokens():
    class Conditional(Block):
        def forward(self, x, condition):
            return super().forward(x + condition)

    rows = {row.path: row.reason for row in accelerate(Conditional(48, 3)).kept}
    assert "cannot be tried out on tokens alone: TypeError" in rows[""]


def test_blocks_that_are_alike_are_tried_out_once(monkeypatch):
    tried = []
    monkeypatch.setattr(patch, "disagreement", lambda kind, *_: tried.append(kind.name))
    accelerate(model_of(depth=5, drop_path_rate=0.3))
    assert tried == ["block", "attn", "mlp", "block"]  # the first block has no drop-path, the others differ in its rate
    tried.clear()
    model = model_of()
    model.blocks[1].attn.num_heads = 6
    model.blocks[1].norm2.eps = 1e-3
    accelerate(model)
    assert tried == ["block", "attn", "mlp", "block", "attn"]
