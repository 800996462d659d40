"""An accelerated model under what records, compiles or packs it: fx, TorchScript, Dynamo, pickle, quantisation."""

import inspect
import pickle
import warnings
from copy import deepcopy

import pytest
import torch
from timm.layers import Attention, DropPath
from timm.models import create_feature_extractor
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from fastdeit.kernels import accelerate, use
from fastdeit.kernels._op import ChoiceError
from fastdeit.kernels.accelerate import modules
from tests.kernels.timm_models import (
    accelerated_pair,
    assert_close,
    fell_back,
    images_for,
    last_block_row,
    model_of,
    queries,
)


@pytest.fixture
def pair():
    """(accelerated model, the same under timm's code), in eval mode."""
    return tuple(model.eval() for model in accelerated_pair())


# ---- recorded --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["", "blocks.0", "blocks.0.attn", "blocks.0.mlp"])
def test_signatures_are_timms(path, pair):
    mine, theirs = (m.get_submodule(path) for m in pair)
    assert inspect.signature(mine.forward) == inspect.signature(theirs.forward)
    assert inspect.signature(type(mine).forward) == inspect.signature(type(theirs).forward)


def test_symbolic_trace_is_of_timms_code(pair):
    mine, theirs = (torch.fx.symbolic_trace(m, {"attn_mask": None, "is_causal": False}) for m in pair)
    assert [str(node) for node in mine.graph.nodes] == [str(node) for node in theirs.graph.nodes]
    assert_close(mine(images_for(pair[0])), theirs(images_for(pair[0])))


def test_a_feature_extractor_of_inner_modules(pair):
    nodes = {"blocks.0.attn.qkv": "qkv", "blocks.1.mlp.act": "act"}
    mine, theirs = (create_feature_extractor(m, dict(nodes)) for m in pair)
    images = images_for(pair[0])
    assert_close(mine(images), theirs(images))


@pytest.mark.filterwarnings("ignore")
def test_torchscript_traces_timms_code(pair):
    model, timms = pair
    images = images_for(model)
    assert torch.equal(torch.jit.trace(model, images)(images), timms(images))
    assert queries(lambda: model(images)) == [1]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "beit_base_patch16_224"])
def test_torchscript_puts_timms_code_back_and_says_so(name):
    model = model_of(name).eval()
    images, block = images_for(model), model.blocks[0]
    expected = model(images)
    accelerate(model)
    with pytest.warns(RuntimeWarning, match="torch.jit.script has put (Block|VisionTransformer) back on its own code"):
        scripted = torch.jit.script(model)
    assert torch.equal(scripted(images), expected)
    assert torch.equal(model(images), expected)
    assert model.blocks[0] is block
    assert not any(isinstance(part, modules.Accelerated) for part in model.modules())


# ---- compiled --------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_compiled_code():
    """Dynamo compiles a function eight times at the most, and all models share theirs."""
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("no_compiled_code")
def test_blocks_that_are_alike_are_compiled_once():
    graphs = {}
    for accelerated in (False, True):
        made = graphs[accelerated] = []
        model = model_of(depth=10).eval()
        if accelerated:
            accelerate(model)
        for number, block in enumerate(model.blocks):
            model.blocks[number] = torch.compile(block, backend=lambda graph, _, made=made: made.append(1) or graph)
        model(images_for(model))
        torch._dynamo.reset()
    assert len(graphs[True]) <= len(graphs[False]) + 1  # the last block has a class of its own


@pytest.mark.slow
@pytest.mark.usefixtures("no_compiled_code")
@pytest.mark.parametrize("which", [[-1], [0], [0, 1]])
@pytest.mark.parametrize("first", ["accelerate", "compile"])
def test_blocks_that_are_compiled_one_by_one(which, first):
    model = model_of(drop_path_rate=0.3).eval()
    timms, images = deepcopy(model), images_for(model)
    if first == "accelerate":
        accelerate(model)
    for number in which:
        model.blocks[number] = torch.compile(model.blocks[number], backend="eager", fullgraph=True)
    if first == "compile":
        accelerate(model)
    for _ in range(2):
        assert_close(model(images), timms(images))
        assert_close(model.forward_features(images), timms.forward_features(images))


def scaled(forward):
    return lambda self, x, **arguments: 1.5 * forward(self, x, **arguments)


@pytest.mark.slow
@pytest.mark.usefixtures("no_compiled_code")
@pytest.mark.parametrize(
    "change",
    [
        lambda m, patch: patch.setattr(Block, "forward", scaled(Block.forward)),
        lambda m, patch: setattr(m.blocks[0].attn, "scale", 1.0) or setattr(m.blocks[0].attn, "fused_attn", False),
        lambda m, patch: setattr(m.blocks[0].norm1, "eps", 0.5),
        lambda m, patch: setattr(m.blocks[0].mlp.fc1, "forward", lambda x: x.repeat(1, 1, 4)),
        lambda m, patch: setattr(m, "forward_head", lambda x: m.head(x.mean(1))),
        lambda m, patch: m.blocks.__setitem__(0, m.blocks[1]),
    ],
    ids=["class", "scale", "eps", "fc1", "head", "shared"],
)
def test_a_compiled_model_follows_changes(change, pair, monkeypatch):
    images = images_for(pair[0])
    ops = []

    def backend(graph, inputs):
        ops.extend(str(node.target) for node in graph.graph.nodes if "fastdeit." in str(node.target))
        return graph

    compiled = [torch.compile(m, backend=backend) for m in pair]
    with torch.no_grad(), use("reference"):  # the registered ops, which the graph has by their names
        before = [c(images) for c in compiled]
        assert len(ops) == 8
        for m in pair:
            change(m, monkeypatch)
            if m is pair[0] and monkeypatch._setattr:
                break
        after = [c(images) for c in compiled]
    assert_close(*before)
    assert_close(*after)
    assert not torch.allclose(before[0], after[0])


# ---- packed ----------------------------------------------------------------------------------------------------------


def test_a_pickle_is_tried_out_again_where_it_is_loaded(pair, monkeypatch):
    data, images = pickle.dumps(pair[0]), images_for(pair[0])
    monkeypatch.setattr(Attention, "forward", scaled(Attention.forward))
    with pytest.warns(UserWarning, match=r"Attention was accelerated, but .*Attention.forward has been replaced"):
        loaded = pickle.loads(data)
    assert type(loaded.blocks[0].attn) is Attention
    assert isinstance(loaded.blocks[0].mlp, modules.Accelerated)
    assert_close(loaded(images), pair[1](images))


@pytest.mark.parametrize("inside", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_accelerating_without_gradients(inside):
    with inside():
        model = model_of()
        accelerate(model, strict=True)
        assert last_block_row(accelerate(model)).op


class Packed(torch.Tensor):
    """A weight that is stored in another way, as torchao's are: layers compute with it, and kernels cannot read it."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.linear:
            x, weight, *bias = args
            return function(x, weight.as_subclass(torch.Tensor).round(decimals=1), *bias, **(kwargs or {}))
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("before", [False, True])
def test_quantised_weights_leave_the_rest_accelerated(before):
    model = model_of().eval()
    timms = deepcopy(model)

    def pack():
        for m in (model, timms):
            for layer in (layer for layer in m.modules() if type(layer) is nn.Linear):
                layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Packed), requires_grad=False)

    if before:
        pack()
    rows = accelerate(model).rows
    if not before:
        pack()
        rows = accelerate(model).rows
    reasons = {row.part: row.reason for row in rows}
    assert {part for part, reason in reasons.items() if not reason} == {"block", "attn"}
    assert reasons["mlp"] == "fc1 has a Packed as weight"
    assert not fell_back(model.blocks[0].attn, lambda: model(images_for(model)))
    assert_close(model(images_for(model)), timms(images_for(model)))


# ---- said ------------------------------------------------------------------------------------------------------------


def test_a_kernel_that_is_asked_for_runs_or_raises(pair):
    block = pair[0].blocks[0]
    x = torch.randn(2, 5, 48)
    block.attn.scale = 1.0
    with use(attention="triton"), pytest.raises(ChoiceError, match=r"attention=triton .* Attention: has another scale"):
        block.attn(x)
    with use(attention="triton"), pytest.raises(ChoiceError, match="is given is_causal, which the op does not take"):
        pair[0].blocks[1].attn(x, is_causal=True)
    with use("reference"):
        block.attn(x)


def test_one_warning_tells_that_the_own_code_runs(pair):
    modules._warn_once.cache_clear()
    block = pair[0].blocks[0]
    block.norm1.eps = 0.5
    with pytest.warns(RuntimeWarning, match="Block runs its own code instead of add_layer_norm: norm1 has another eps"):
        block(torch.randn(2, 5, 48))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        block(torch.randn(2, 5, 48))
    assert [row.reason for row in accelerate(pair[0], strict=True).rows] == [""] * 7
    assert not fell_back(block, lambda: block(torch.randn(2, 5, 48)))


# ---- what is found before --------------------------------------------------------------------------------------------


def test_a_forward_that_was_put_in_place_of_timms_may_do_more(monkeypatch):
    kept, forward = [], Attention.forward

    def keeping(self, x, **arguments):
        kept.append(x)
        return forward(self, x, **arguments)

    monkeypatch.setattr(Attention, "forward", keeping)
    model = model_of()
    assert {row.reason for row in accelerate(model).rows if row.part == "attn"} == {
        "Attention.forward has been replaced by test_a_forward_that_was_put_in_place_of_timms_may_do_more.<locals>."
        "keeping, which would not run"
    }
    model(images_for(model))
    assert len(kept) == 2


def test_an_instance_with_a_forward_of_its_own_is_left_alone():
    model = model_of()
    model.blocks[0].attn.forward = model.blocks[0].attn.forward
    rows = {row.path: row.reason for row in accelerate(model).rows}
    assert rows["blocks.0.attn"] == "has a forward of its own, which would not run"
    assert rows["blocks.1.attn"] == ""


class PerToken(DropPath):
    def forward(self, x):
        return nn.functional.dropout(x, self.drop_prob, self.training)


def test_a_drop_path_that_drops_something_else(monkeypatch):
    PerToken.__name__ = "DropPath"
    block = Block(48, 3, drop_path=0.5)
    block.drop_path2 = PerToken(0.5)
    assert accelerate(block).rows[0].reason == "drop_path2 does more than drop samples"


def test_a_subclass_of_the_accelerated_class(pair):
    class Averaging(type(pair[0])):
        def forward_head(self, x, pre_logits=False):
            return self.head(x.mean(1))

    pair[0].__class__ = Averaging
    images, timms = images_for(pair[0]), pair[1]
    assert_close(pair[0](images), timms.head(timms.forward_features(images).mean(1)))
    assert issubclass(Averaging, VisionTransformer)


def test_a_last_block_inside_an_earlier_one(pair):
    for m in pair:
        m.blocks[0] = nn.Sequential(m.blocks[1])
    assert queries(lambda: assert_close(*(m(images_for(m)) for m in pair))) == []
    assert last_block_row(accelerate(pair[0])).reason == "blocks.0 is the last block as well"
