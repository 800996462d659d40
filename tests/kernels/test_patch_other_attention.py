"""The attention of torchvision's and transformers' models on the op: when it runs, and that every other use of such a
module has its own code's result. What needs transformers runs in the slow tier, because its import takes seconds."""

import warnings
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from fastdeit.kernels import accelerate, use
from fastdeit.kernels.accelerate import modules, other_attention
from fastdeit.kernels.accelerate.identity import difference
from tests.kernels.proof import normal
from tests.kernels.test_patch_changes import DIM, assert_equal, outcome
from tests.kernels.test_patch_others import BLOCKS, OF_TRANSFORMERS, assert_same_model, images, of_transformers, pair_of

HEADS = 4


def tokens(batch=2, count=5, seed=0, dtype=torch.float64):
    return normal(batch, count, DIM, dtype=dtype, device="cpu", seed=seed)


def runs_of(monkeypatch, call):
    """How often `call` runs attention on an op."""
    calls, op = [], other_attention.attention
    monkeypatch.setattr(other_attention, "attention", lambda *args: calls.append(None) or op(*args))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call()
    return len(calls)


@pytest.mark.parametrize("name", ["torchvision", *OF_TRANSFORMERS])
def test_the_op_runs_in_every_layer(name, monkeypatch):
    mine, _ = pair_of(name)
    assert runs_of(monkeypatch, lambda: mine(images())) == 2


# ---- torch.nn.MultiheadAttention -------------------------------------------------------------------------------------


def attention_pair(**options):
    torch.manual_seed(0)
    theirs = nn.MultiheadAttention(DIM, HEADS, **{"batch_first": True, "dtype": torch.float64, **options})
    with torch.no_grad():
        for seed, parameter in enumerate(theirs.parameters()):
            parameter += 0.2 * normal(*parameter.shape, dtype=torch.float64, device="cpu", seed=seed)
    mine = deepcopy(theirs)
    return mine, theirs, accelerate(nn.ModuleDict({"attn": mine}))


class Called(nn.Module):
    """What a call of an attention makes: one tensor, so that it can be differentiated."""

    def __init__(self, attention, call):
        super().__init__()
        self.attention, self.call = attention, call

    def forward(self, x):
        made = self.call(self.attention, x)
        assert made[1] is None or made[1].dim() in (3, 4)
        return torch.cat([part.flatten(1) for part in made if part is not None], 1)


CAUSAL = torch.ones(5, 5, dtype=torch.bool).triu(1)
PADDING = torch.arange(5).expand(2, 5) > 2
CALLS = {
    "self": (1, lambda m, x: m(x, x, x, need_weights=False)),
    "self, by place": (1, lambda m, x: m(x, x, x, None, False)),
    "self, by name": (1, lambda m, x: m(query=x, key=x, value=x, need_weights=False)),
    "averages of no weights": (1, lambda m, x: m(x, x, x, need_weights=False, average_attn_weights=False)),
    "cross": (0, lambda m, x: m(x[:, :2], x, x, need_weights=False)),
    "weights": (0, lambda m, x: m(x, x, x)),
    "weights of heads": (0, lambda m, x: m(x, x, x, average_attn_weights=False)),
    "other values": (0, lambda m, x: m(x, x, 2 * x, need_weights=False)),
    "padding": (0, lambda m, x: m(x, x, x, PADDING, False)),
    "mask": (0, lambda m, x: m(x, x, x, need_weights=False, attn_mask=CAUSAL)),
    "causal": (0, lambda m, x: m(x, x, x, need_weights=False, attn_mask=CAUSAL, is_causal=True)),
    "without a batch": (0, lambda m, x: tuple(p if p is None else p[None] for p in m(x[0], x[0], x[0], None, False))),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("bias", [True, False])
def test_every_call_of_multihead_attention(name, bias, monkeypatch):
    expected, call = CALLS[name]
    mine, theirs, _ = attention_pair(bias=bias)
    assert runs_of(monkeypatch, lambda: call(mine, tokens())) == expected
    assert_equal(outcome(Called(mine, call), tokens()), outcome(Called(theirs, call), tokens()))
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            torch.testing.assert_close(call(mine, tokens()), call(theirs, tokens()))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"batch_first": False}, "takes tokens as [N, B, C]: batch_first is False"),
        ({"dropout": 0.1}, "drops 0.1 of the attention, which the op does not do"),
        ({"add_zero_attn": True}, "attends to a zero, which the op does not"),
        ({"add_bias_kv": True}, "has bias_k, which the op does not take"),
        ({"kdim": 8}, "has q_proj_weight, which the op does not take"),
    ],
)
def test_what_multihead_attention_keeps_its_own_code(options, reason):
    mine, _, report = attention_pair(**options)
    assert type(mine) is nn.MultiheadAttention
    assert [row.reason for row in report.rows] == [reason]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_go_to_its_own_code():
    mine, theirs, _ = attention_pair(dtype=torch.float32)
    with torch.no_grad():
        x = torch.nested.nested_tensor([tokens(dtype=torch.float32)[0], tokens(dtype=torch.float32)[1, :3]])
        results = [m.eval()(x, x, x, need_weights=False)[0].to_padded_tensor(0) for m in (mine, theirs)]
    torch.testing.assert_close(*results)


def test_torchs_encoder_layer_around_it():
    torch.manual_seed(0)
    theirs = nn.TransformerEncoderLayer(DIM, HEADS, 48, dropout=0, batch_first=True, dtype=torch.float64)
    mine = deepcopy(theirs)
    assert {row.op for row in accelerate(mine).rows} == {"attention"}
    assert_equal(outcome(mine, tokens()), outcome(theirs, tokens()))
    with torch.no_grad():
        torch.testing.assert_close(
            mine(tokens(), src_key_padding_mask=PADDING), theirs(tokens(), src_key_padding_mask=PADDING)
        )


def test_a_feature_extractor_of_torchvision():
    mine, theirs = (model.eval() for model in pair_of("torchvision"))
    assert get_graph_node_names(mine) == get_graph_node_names(theirs)
    node = "encoder.layers.encoder_layer_1.self_attention"
    for name in (node, "encoder.layers.encoder_layer_0.mlp"):
        (my, *_), (their, *_) = (create_feature_extractor(m, {name: "out"})(images())["out"] for m in (mine, theirs))
        torch.testing.assert_close(my, their)


def test_a_head_that_pools_is_left_alone():
    pool = nn.ModuleDict({"attention": nn.MultiheadAttention(DIM, HEADS, batch_first=True)})
    assert accelerate(pool).rows == ()


def test_what_is_written_past_autograds_versions_is_seen():
    mine, theirs = pair_of("torchvision")
    for model in (mine, theirs):
        for attention in (m for m in model.modules() if isinstance(m, nn.MultiheadAttention)):
            attention.in_proj_weight.data.mul_(1.5)
    assert_same_model(mine, theirs)


def distorting(function):
    return lambda *args, **kwargs: 1.5 * function(*args, **kwargs)


@pytest.mark.parametrize("name", ["torchvision", *OF_TRANSFORMERS[:1]])
@pytest.mark.parametrize("before", [True, False])
def test_a_replaced_scaled_dot_product_attention(name, before, monkeypatch):
    mine, theirs = pair_of(name)
    if before:
        modules.put_back(mine)
    monkeypatch.setattr(F, "scaled_dot_product_attention", distorting(F.scaled_dot_product_attention))
    if before:
        accelerate(mine)
    else:  # a kernel would not call it
        parts = [part for part in mine.modules() if isinstance(part, modules.Accelerated) and part.op == "attention"]
        assert all("scaled_dot_product_attention has been replaced" in str(difference(part)) for part in parts)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        assert_same_model(mine, theirs)


def test_a_kernel_that_is_asked_for_raises_where_weights_are_wanted():
    mine, _, _ = attention_pair(dtype=torch.float32)
    x = tokens(dtype=torch.float32)
    with use(attention="triton"), pytest.raises(RuntimeError, match="is asked for the weights of the attention"):
        mine(x, x, x)


# ---- transformers ----------------------------------------------------------------------------------------------------


def attentions(model):
    return [part for part in model.modules() if isinstance(part, other_attention.SplitAttention)]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT", "SigLIP"])
def test_weights_written_past_autograds_versions_are_seen(name):
    mine, theirs = pair_of(name)
    for model in (mine, theirs):
        for path, parameter in model.named_parameters():
            if path.endswith(("k_proj.weight", "q_proj.bias")):
                parameter.data.mul_(1.5)
    assert_same_model(mine, theirs)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("name", ["ViT", "DINOv2", "SigLIP"])
@pytest.mark.parametrize("before", [True, False])
def test_another_implementation_of_attention(name, before):
    mine, theirs = pair_of(name)
    if before:
        modules.put_back(mine)
    for model in (mine, theirs):
        model.set_attn_implementation("eager")
    if before:
        rows = [row for row in accelerate(mine).rows if row.part == "attn" and "head" not in row.path]
        assert {row.reason for row in rows} == {"has attn_implementation='eager', and the op stands for 'sdpa' alone"}
    else:
        reason = "has another config._attn_implementation than when it was tried out"
        assert {difference(part) for part in attentions(mine)} == {reason}
    assert_same_model(mine, theirs)
    mine.set_attn_implementation("sdpa")
    accelerate(mine)
    assert [difference(part) for part in attentions(mine)] == [None, None]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("where", ["registered", "local"])
def test_another_function_under_the_name_of_sdpa(where, monkeypatch):
    mine, theirs = pair_of("ViT")
    table = other_attention._table_of(attentions(mine)[0].original)
    own = table["sdpa"]

    def other(*args, **kwargs):
        out, weights = own(*args, **kwargs)
        return 1.5 * out, weights

    monkeypatch.setitem(table._global_mapping if where == "registered" else table._local_mapping, "sdpa", other)
    assert {difference(part) for part in attentions(mine)} == {"the attention function named sdpa has been replaced"}
    assert_same_model(mine, theirs)
    modules.put_back(mine)
    reasons = {row.reason for row in accelerate(mine).rows if row.part == "attn"}
    assert reasons == {"has another attention function named sdpa than transformers' own"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"attention_probs_dropout_prob": 0.1}, "drops 0.1 of the attention, which the op does not do"),
        ({"qkv_bias": False}, ""),
    ],
)
def test_options_of_transformers_attention(options, reason):
    theirs = of_transformers("ViT", **options).double()
    mine = deepcopy(theirs)
    assert {row.reason for row in accelerate(mine).rows if row.part == "attn"} == {reason}
    for model in (mine, theirs):
        for attention in (part for part in model.modules() if hasattr(part, "attention_dropout")):
            attention.attention_dropout = 0.0  # its draws are not those of a model without them
    if not reason:
        assert_same_model(mine, theirs)


class Lora(nn.Module):
    """A low-rank addition to a linear layer (Hu et al., "LoRA", 2021)."""

    def __init__(self, layer, rank=2):
        super().__init__()
        self.layer = layer
        self.a = nn.Parameter(normal(rank, layer.in_features, dtype=torch.float64, device="cpu", seed=1))
        self.b = nn.Parameter(normal(layer.out_features, rank, dtype=torch.float64, device="cpu", seed=2))

    def forward(self, x):
        return self.layer(x) + F.linear(F.linear(x, self.a), self.b)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize(("layer", "on_op"), [("q_proj", False), ("v_proj", False), ("o_proj", True)])
@pytest.mark.parametrize("before", [True, False])
def test_low_rank_additions(layer, on_op, before):
    mine, theirs = pair_of("ViT")
    if before:
        modules.put_back(mine)
    for model in (mine, theirs):
        attention = model.get_submodule(BLOCKS["ViT"]).attention
        setattr(attention, layer, Lora(getattr(attention, layer)))
    if before:
        accelerate(mine)
    part = mine.get_submodule(BLOCKS["ViT"]).attention
    assert (isinstance(part, modules.Accelerated) and difference(part) is None) == on_op
    assert_same_model(mine, theirs)


@pytest.mark.slow
def test_text_models_keep_their_causal_attention():
    theirs = of_transformers("CLIPText", hidden_size=DIM, vocab_size=11, max_position_embeddings=8).double().eval()
    mine = deepcopy(theirs)
    accelerate(mine)
    words = torch.tensor([[1, 4, 3, 10], [2, 2, 10, 0]])
    torch.testing.assert_close(mine(words).last_hidden_state, theirs(words).last_hidden_state)
