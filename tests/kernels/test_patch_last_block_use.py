"""The last block of an accelerated model: what the trial before the swap finds, threads, compilation, copies."""

import pickle
import threading
from copy import deepcopy

import pytest
import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.utils.checkpoint import checkpoint

from fastdeit import models
from fastdeit.kernels import accelerate, restore, use
from fastdeit.kernels.accelerate import modules
from tests.kernels.proof import normal
from tests.kernels.timm_models import (
    TINY,
    accelerated_pair,
    all_tokens_as_timm,
    assert_close,
    assert_same_as_timm,
    images_for,
    last_block_row,
    model_of,
    outcome,
    queries,
)

PATCHES = 9  # of model_of()


@pytest.fixture
def pair():
    """(accelerated model, the same under timm's code), in eval mode."""
    return tuple(model.eval() for model in accelerated_pair())


# ---- what a forward may do with the tokens, found by trying ----------------------------------------------------------


class Patches(VisionTransformer):
    """Adds the mean of the patches to the class token, under the name of token pooling."""

    def pool(self, x, pool_type=None):
        return x[:, 0] + x[:, 1:].mean(1)


class Auxiliary(VisionTransformer):
    """Learns from the patches in training alone."""

    def forward(self, x):
        x = self.forward_features(x)
        return (self.forward_head(x), x[:, 1:].mean(1)) if self.training else self.forward_head(x)


class Averaging(VisionTransformer):
    """Reads the patches in eval mode alone."""

    def forward_head(self, x, pre_logits=False):
        return super().forward_head(x if self.training else x.mean(1, keepdim=True))


class HeadFirst(VisionTransformer):
    """Pools after the head."""

    def forward_head(self, x, pre_logits=False):
        return self.head(x)[:, 0]


class Second(VisionTransformer):
    """Runs the last block twice."""

    def forward_features(self, x, **masks):
        return self.blocks[-1](super().forward_features(x))


class Noisy(VisionTransformer):
    """Draws for all tokens after the last block."""

    def forward_features(self, x, **masks):
        return nn.functional.dropout(super().forward_features(x), 0.2, self.training)


class Recomputing(VisionTransformer):
    """Recomputes its blocks without timm's switch."""

    def forward_features(self, x, **masks):
        x = self._pos_embed(self.patch_embed(x))
        return self.norm(checkpoint(self.blocks, x, use_reentrant=False))


class Conditional(VisionTransformer):
    def forward(self, x, condition):
        return super().forward(x) * condition


class Undistilled(VisionTransformerDistilled):
    """Reads a third token."""

    def forward_head(self, x, pre_logits=False):
        return super().forward_head(x) + self.head(x[:, 2])


@pytest.mark.parametrize(
    ("cls", "reason"),
    [
        (Patches, "reads more than the first tokens of the last block"),
        (Auxiliary, "reads more than the first tokens of the last block"),
        (Averaging, "reads more than the first tokens of the last block"),
        (Noisy, "reads more than the first tokens of the last block"),
        (HeadFirst, "head takes all tokens"),
        (Second, "reads more than the first tokens of the last block"),
        (Recomputing, "cannot be tried out: CheckpointError"),
        (Conditional, "cannot be tried out: TypeError"),
        (Undistilled, "cannot be tried out: IndexError"),
    ],
)
def test_a_familiar_structure_that_reads_more(cls, reason):
    base = "deit_tiny_distilled_patch16_224" if cls is Undistilled else "deit_tiny_patch16_224"
    model = model_of(base)
    model.__class__ = cls
    row = last_block_row(accelerate(model))
    assert row.op is None
    assert row.reason.startswith(reason)
    assert type(model) is cls


def test_a_block_that_computes_something_else_for_its_first_tokens(monkeypatch):
    real = modules.query_attention
    monkeypatch.setattr(modules, "query_attention", lambda *arguments: 1.001 * real(*arguments))
    reason = last_block_row(accelerate(model_of())).reason
    assert reason == "blocks.1 computes something else for its first tokens"


def test_a_stem_with_batch_norm():
    model = model_of()
    model.patch_embed.norm = nn.BatchNorm1d(PATCHES)  # of the patches, which are the second dimension
    assert last_block_row(accelerate(model)).op


def test_a_stem_that_nothing_is_known_of():
    model = model_of()
    model.patch_embed.img_size = None
    assert last_block_row(accelerate(model)).reason.startswith("cannot be tried out: TypeError")


# ---- the request, and the class --------------------------------------------------------------------------------------


def test_another_thread_gets_all_tokens(pair):
    model, timms = pair
    images, found = images_for(model), []

    def meanwhile(*_):
        thread = threading.Thread(target=lambda: found.append(model.forward_features(images)))
        handle.remove()
        thread.start()
        thread.join()

    handle = model.blocks[0].register_forward_hook(meanwhile)
    assert queries(lambda: model(images)) == [1]
    assert_close(found[0], timms.forward_features(images))


def test_an_error_ends_the_request(pair):
    model, timms = pair
    images = images_for(model)

    def fail(*_):
        raise InterruptedError

    handle = model.blocks[0].register_forward_hook(fail)
    with pytest.raises(InterruptedError):
        model(images)
    handle.remove()
    assert_close(model.forward_features(images), timms.forward_features(images))


def test_compiles_to_one_graph_with_less_in_it(pair):
    model, timms = (m.train() for m in pair)
    images, sizes = images_for(model), []

    def backend(graph, inputs):
        for node in graph.graph.nodes:
            if "query" in str(node.target):
                sizes.append(node.args[0].meta["example_value"].shape[1])
        return graph

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    compiled.named_parameters = model.named_parameters
    with use("reference"):  # the registered op, which the graph has by its name
        assert_close(outcome(compiled, images), outcome(timms, images))
        assert sizes == [1]
        handle = model.norm.register_forward_hook(lambda *_: None)
        assert_close(outcome(compiled, images), outcome(timms, images))
        assert sizes == [1]
    handle.remove()


def test_a_compiled_block_follows_each_request(pair):
    model, timms = pair
    for block in model.blocks:
        block.compile(backend="eager", fullgraph=True)
    images = images_for(model)
    for _ in range(2):
        assert_close(model(images), timms(images))
        assert_close(model.forward_features(images), timms.forward_features(images))


def test_on_triton(device):
    from fastdeit import kernels

    model = model_of("deit_tiny_distilled_patch16_224").to(device).eval()
    timms = deepcopy(model)
    with kernels.use("triton"):
        accelerate(model, strict=True)
        images = images_for(model).to(device)
        assert queries(lambda: model(images)) == [2]
        assert_same_as_timm(model, timms, images)


def test_restore_undoes_it(pair):
    model, timms = pair
    restore(model)
    assert type(model) is type(timms)
    images = images_for(model)
    assert torch.equal(model(images), timms(images))
    assert queries(lambda: model(images)) == []


def test_the_switch(pair):
    model, timms = pair
    images = images_for(model)
    assert [row.part for row in accelerate(model, last_block=False).rows] == ["block", "attn", "mlp"] * 2
    assert type(model) is type(timms)
    all_tokens_as_timm(model, timms)
    accelerate(model)
    assert queries(lambda: model(images)) == [1]


def test_copies_and_pickles(pair):
    model, timms = pair
    data = pickle.dumps(model)
    modules.accelerated.cache_clear()
    for copy in (deepcopy(model), pickle.loads(data)):
        assert isinstance(copy, VisionTransformer)
        assert list(copy.state_dict()) == list(timms.state_dict())
        images = images_for(copy)
        assert queries(lambda copy=copy, images=images: copy(images)) == [1]
        assert_same_as_timm(copy, timms, images)


def test_nothing_but_the_class_changes():
    model = model_of("deit_tiny_distilled_patch16_224", drop_path_rate=0.3)
    timms, before, state = deepcopy(model), dict(vars(model)), torch.random.get_rng_state()
    accelerate(model, strict=True)
    model(images_for(model))
    assert vars(model).keys() == before.keys()
    assert all(vars(model)[name] is value for name, value in before.items())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), timms.parameters(), strict=True))
    accelerate(model, strict=True)
    model.eval()(images_for(model))
    torch.random.set_rng_state(state)
    accelerate(model)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_trying_out_draws_nothing():
    model = model_of("deit3_small_patch16_224", drop_path_rate=0.5, drop_rate=0.5)
    state = torch.random.get_rng_state()
    assert last_block_row(accelerate(model)).op
    assert torch.equal(torch.random.get_rng_state(), state)


def test_on_the_meta_device():
    with torch.device("meta"):
        model = timm.create_model("deit_tiny_distilled_patch16_224", img_size=48, **TINY)
    assert last_block_row(accelerate(model, strict=True)).op == "query_attention"
    assert all(parameter.is_meta for parameter in model.parameters())


def test_a_model_inside_another():
    trunk = model_of()
    report = accelerate(nn.ModuleDict({"trunk": trunk, "teacher": model_of(global_pool="avg", fc_norm=False)}))
    assert [(row.path, row.op) for row in report.rows if row.part == "last block"] == [
        ("trunk", "query_attention"),
        ("teacher", None),
    ]


def test_a_model_without_a_pooling_has_no_such_part():
    model = model_of()
    del model.global_pool
    assert {row.part for row in accelerate(model).rows} == {"block", "attn", "mlp"}


def test_under_fastdeits_adapter():
    model = models.build_timm("deit_tiny_distilled_patch16_224", image_size=32, num_classes=5)
    timms = deepcopy(model)
    accelerate(model.inner, strict=True)
    images = normal(2, 3, 32, 32, dtype=torch.float32, device="cpu", seed=0)
    assert queries(lambda: assert_close(model(images), timms(images))) == [2]
    assert queries(lambda: assert_close(model.tokens(images), timms.tokens(images))) == []


def test_hooks_do_not_see_the_trial():
    model, seen = model_of(), []
    for path in ("patch_embed", "blocks.0.attn.qkv", "blocks.1.attn.proj", "head"):
        model.get_submodule(path).register_forward_hook(lambda *_: seen.append(1))
    assert {row.part for row in accelerate(model).rows if row.op} == {"block", "attn", "mlp"}
    assert seen == []


@pytest.mark.parametrize("depth", [1, 40])
def test_depth_does_not_hide_the_difference(depth):
    model = model_of(depth=depth)
    model.__class__ = Patches
    assert last_block_row(accelerate(model)).op is None
    model = model_of(depth=depth)
    assert last_block_row(accelerate(model)).op
