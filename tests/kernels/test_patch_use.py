"""An accelerated model in use: what timm's models can do, what is done to them later, many processes."""

import pickle
import re
from copy import deepcopy

import pytest
import torch
from timm.models.eva import EvaAttention
from timm.utils import ModelEmaV3
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

from fastdeit.kernels import accelerate, restore
from fastdeit.kernels.accelerate import modules
from tests.kernels.timm_models import (
    accelerated_pair,
    assert_close,
    assert_same_as_timm,
    fell_back,
    images_for,
    model_of,
    outcome,
    queries,
)


@pytest.fixture
def pair():
    """(accelerated model, the same under timm's code)."""
    return accelerated_pair()


# ---- what timm's models can do ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda m: m.forward_features, lambda m: m.forward_intermediates])
def test_features(wrap, pair):
    images = images_for(pair[0])
    mine, theirs = (wrap(m.eval())(images) for m in pair)
    assert_close(mine, theirs)


def test_gradient_checkpointing(pair):
    model, timms = (m.train() for m in pair)
    images = images_for(model)
    model.set_grad_checkpointing()
    assert_close(outcome(model, images), outcome(timms, images))


def test_distilled_training_and_another_head():
    model = model_of("deit_tiny_distilled_patch16_224")
    accelerate(model, strict=True)
    images = images_for(model)
    assert len(model.train()(images)) == 2
    model.set_distilled_training(False)
    model.reset_classifier(4)
    assert model(images).shape == (3, 4)


def test_compiles_to_one_graph(pair):
    model, timms = (m.train() for m in pair)
    images = images_for(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled.named_parameters = model.named_parameters
    assert_close(outcome(compiled, images), outcome(timms, images))


def test_copies_are_accelerated_and_independent(pair):
    model, timms = pair
    copy = deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert type(copy.blocks[0].mlp) is type(model.blocks[0].mlp)
    assert_same_as_timm(copy.eval(), timms.eval(), images_for(copy))


def test_pickles_are_accelerated_where_nothing_was_accelerated_before(pair):
    model, timms = pair
    data = pickle.dumps(model)
    modules.accelerated.cache_clear()
    loaded = pickle.loads(data)
    assert isinstance(loaded.blocks[0], modules.Accelerated)
    assert_same_as_timm(loaded.eval(), timms.eval(), images_for(loaded))


def test_timms_ema_follows(pair):
    model, timms = pair
    mine, theirs = ModelEmaV3(model, decay=0.5), ModelEmaV3(timms, decay=0.5)
    for m, ema in ((model, mine), (timms, theirs)):
        with torch.no_grad():
            m.blocks[0].norm1.weight.add_(1)
        ema.update(m)
    assert torch.equal(mine.module.blocks[0].norm1.weight, theirs.module.blocks[0].norm1.weight)
    assert_close(mine.module.eval()(images_for(model)), theirs.module.eval()(images_for(model)))


# ---- what happens to a model afterwards ------------------------------------------------------------------------------


class LoRA(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("path", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"])
@pytest.mark.parametrize("before", [False, True])
def test_lora(path, before):
    model = model_of().eval()
    timms = deepcopy(model)
    part, leaf = path.split(".")

    def insert():
        for m in (model, timms):
            torch.manual_seed(1)
            module = getattr(m.blocks[1], part)
            setattr(module, leaf, LoRA(getattr(module, leaf)))

    if before:
        insert()
    accelerate(model)
    if not before:
        insert()
    assert_same_as_timm(model, timms, images_for(model))
    assert {row.part for row in accelerate(model).kept} == ({"mlp", "last block"} if part == "mlp" else {"last block"})


@pytest.mark.parametrize(
    "change", [lambda qkv: LoRA(qkv), lambda qkv: qkv.register_forward_hook(lambda *_: None) and qkv]
)
def test_qkv_with_a_bias_apart_is_looked_at(change):
    module = EvaAttention(48, 3, qkv_bias_separate=True, scale_norm=False)
    accelerate(module, strict=True)
    x = torch.randn(2, 4, 48)
    assert not fell_back(module, lambda: module(x))
    module.qkv = change(module.qkv)
    assert fell_back(module, lambda: module(x))


def test_a_parametrised_leaf_is_seen(pair):
    model, timms = (m.eval() for m in pair)
    for m in pair:
        for leaf in (m.blocks[0].mlp.fc1, m.blocks[0].attn.qkv, m.blocks[1].norm2):
            parametrize.register_parametrization(leaf, "weight", nn.Hardtanh(-0.1, 0.1))
    assert_same_as_timm(model, timms, images_for(model))
    reasons = {row.path: row.reason for row in accelerate(model).kept}
    assert reasons["blocks.0.mlp"] == "fc1 is a ParametrizedLinear, not a torch.nn.Linear"
    assert reasons["blocks.1"] == "norm2 is a ParametrizedLayerNorm, not a LayerNorm"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantised_leaves_stay_timms():
    model = torch.ao.quantization.quantize_dynamic(model_of().eval(), {nn.Linear}, torch.qint8)
    expected = model(images_for(model))
    report = accelerate(model)
    assert {row.part for row in report.kept} == {"mlp", "last block"}  # the attentions call their layers
    assert_close(model(images_for(model)), expected)


def test_a_weight_of_a_tensor_subclass_is_not_read():
    class Packed(torch.Tensor):
        pass

    model = model_of()
    model.blocks[0].mlp.fc2.weight = nn.Parameter(model.blocks[0].mlp.fc2.weight.detach().as_subclass(Packed))
    assert {(row.path, row.reason) for row in accelerate(model).kept} == {
        ("blocks.0.mlp", "fc2 has a Packed as weight")
    }


@pytest.mark.parametrize(
    "path",
    ["norm1", "attn.qkv", "attn.proj", "attn.proj_drop", "ls1", "norm2", "mlp.fc1", "mlp.act", "mlp.drop2", "ls2"],
)
def test_hooks_on_inner_modules_run(path, pair):
    model = pair[0].eval()
    seen = []
    hook = model.blocks[1].get_submodule(path).register_forward_hook(lambda *_: seen.append(path))
    model(images_for(model))
    assert seen == [path]
    hook.remove()
    part = model.blocks[1].get_submodule(path.rpartition(".")[0])
    assert not fell_back(part, lambda: model(images_for(model)))


def test_hooks_on_blocks_see_whole_tokens(pair):
    seen = {m: [] for m in pair}
    for m in pair:
        for block in m.eval().blocks:
            block.register_forward_hook(lambda module, args, out, m=m: seen[m].append(out))
        m(images_for(m))
    assert_close(*seen.values())


def test_dropout_that_is_turned_on_later_is_timms(pair):
    model = pair[0]
    model.blocks[0].mlp.drop1.p = 0.5
    assert fell_back(model.blocks[0].mlp, lambda: model(images_for(model)))


# ---- many processes --------------------------------------------------------------------------------------------------

NAME = "deit3_small_patch16_224"
SHARDED = {
    "block": [""],
    "part": ["attn", "mlp"],
    "leaf": ["norm1", "norm2", "ls1", "attn.qkv", "mlp.fc1", "mlp.fc2"],
}


def gradients(model, rank, images):
    model(images[2 * rank : 2 * rank + 2]).square().sum().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {
        name.removeprefix("module."): grad.full_tensor() if isinstance(grad, DTensor) else grad
        for name, grad in grads.items()
    }


def observed(model, rank, images):
    grads = {}
    rows = queries(lambda: grads.update(gradients(model, rank, images)))
    return {name: grad.numpy() for name, grad in grads.items()}, rows


def refusal(function, model):
    with pytest.raises(RuntimeError) as raised:
        function(model)
    return str(raised.value)


def in_a_process(rank, size, images):
    found, rows, refusals = {}, {}, []
    for case, paths in {"ddp": [], **SHARDED}.items():
        model = model_of(NAME).eval()
        accelerate(model, strict=True)
        if case == "ddp":
            model = nn.parallel.DistributedDataParallel(model)
        else:
            for block in model.blocks:
                for path in paths:
                    fully_shard(block.get_submodule(path))
            fully_shard(model)
            refusals += [refusal(function, model) for function in (accelerate, restore)]
        found[case], rows[case] = observed(model, rank, torch.from_numpy(images))
    return found, rows, refusals


@pytest.mark.slow
def test_under_ddp_and_fsdp(ranks):
    timms = model_of(NAME).eval()
    images = images_for(timms, 4)
    for rank in range(2):
        expected = gradients(timms, rank, images)
    for found, rows, refusals in ranks(2, in_a_process, images.numpy()):
        assert rows == {"ddp": [1], "block": [1], "part": [], "leaf": []}
        assert list(found) == ["ddp", *SHARDED]
        for mine in found.values():
            assert mine.keys() == expected.keys()
            for name, grad in mine.items():
                close = 1e-5 * expected[name].abs().max().item()
                torch.testing.assert_close(torch.from_numpy(grad), expected[name] / 2, rtol=1e-4, atol=close)
        assert len(refusals) == 6
        for text in refusals:
            assert re.match(r"(accelerate|restore)\(model\) has to come before fully_shard, .* class of ", text)
