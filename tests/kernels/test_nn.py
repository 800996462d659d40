"""Drop-in modules: timm's parameters, timm's results."""

from functools import partial

import pytest
import torch
from timm.layers import LayerNorm as TimmLayerNorm
from timm.models.vision_transformer import Block
from torch import nn as torch_nn

from fastdeit.kernels import nn
from tests.kernels.proof import assert_as_good, normal

DIM, HEADS, DEPTH = 48, 3, 3
TimmBlock = partial(Block, norm_layer=TimmLayerNorm)
OPTIONS = [{}, {"qkv_bias": False}, {"init_values": 0.5}, {"drop_path": 0.4}, {"init_values": 0.5, "drop_path": 0.4}]
options = pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ",".join(options) or "plain")


def stack(block, norm, **options):
    """Blocks and a final norm, as the trunk of a ViT."""
    torch.manual_seed(0)
    blocks = [block(DIM, HEADS, **options) for _ in range(DEPTH)]
    return torch_nn.Sequential(torch_nn.Sequential(*blocks), norm(DIM))


def pair(options):
    """(ours, timm's, timm's in float64) with the same random parameters."""
    ours, timms, exact = (
        stack(nn.Block, nn.LayerNorm, **options),
        *(stack(TimmBlock, TimmLayerNorm, **{"qkv_bias": True} | options) for _ in range(2)),
    )
    with torch.no_grad():
        for i, parameter in enumerate(timms.parameters()):
            parameter += 0.2 * normal(*parameter.shape, dtype=torch.float32, device="cpu", seed=i)
    ours.load_state_dict(timms.state_dict())
    exact.load_state_dict(timms.state_dict())
    return ours, timms, exact.double()


def tokens(batch=6, dtype=torch.float32):
    return normal(batch, 7, DIM, dtype=dtype, device="cpu", seed=1)


def outcome(model, x):
    x = x.clone().requires_grad_()
    torch.manual_seed(3)
    out = model(x)
    grads = torch.autograd.grad(
        out, [x, *model.parameters()], normal(*out.shape, dtype=out.dtype, device="cpu", seed=2)
    )
    return dict(
        zip(["output", "input", *(name for name, _ in model.named_parameters())], (out.detach(), *grads), strict=True)
    )


@options
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_computes_what_timm_computes(options, training):
    ours, timms, exact = (model.train(training) for model in pair(options))
    mine, same, truth = outcome(ours, tokens()), outcome(timms, tokens()), outcome(exact, tokens().double())
    sizes = [value.square().mean().sqrt() for value in truth.values()]
    assert_as_good(
        *(
            torch.cat([(v / size.to(v.dtype)).flatten() for v, size in zip(o.values(), sizes, strict=True)])
            for o in (mine, same, truth)
        ),
        "output and gradients",
    )


@options
def test_starts_with_the_parameters_of_timm(options):
    ours = stack(nn.Block, nn.LayerNorm, **options).state_dict()
    timms = stack(TimmBlock, TimmLayerNorm, **{"qkv_bias": True} | options).state_dict()
    assert list(ours) == list(timms)
    assert all(torch.equal(ours[name], timms[name]) for name in ours)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_tokens_between_blocks_are_a_sum(dtype):
    x = tokens(dtype=dtype)
    block = nn.Block(DIM, HEADS, init_values=0.5, drop_path=0.4).to(dtype).train()
    pending = block(x)
    total = pending.sum()
    keep = pending.keep[:, None, None].double()
    expected = pending.residual.double() + keep * pending.gamma.double() * pending.branch.double()
    assert (total.dtype, pending.residual.dtype) == (dtype, dtype)
    torch.testing.assert_close(total, expected.to(dtype))
    torch.testing.assert_close(block.eval()(pending).sum(), block(total).sum())


def test_norm_of_a_sum_is_the_norm_of_the_tokens():
    block, norm = nn.Block(DIM, HEADS, init_values=0.5).eval(), nn.LayerNorm(DIM)
    pending = block(tokens())
    torch.testing.assert_close(norm(pending), norm(pending.sum()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drop_path_drops_samples_in_training_only(dtype):
    block = nn.Block(DIM, HEADS, drop_path=0.25).to(dtype)
    keep = block.train()(torch.zeros(20_000, 1, DIM, dtype=dtype)).keep
    assert keep.dtype == torch.float32
    assert set(keep.tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs(keep.mean().item() - 1) < 5 * (0.25 / 0.75 / 20_000) ** 0.5
    assert block.eval()(tokens(dtype=dtype)).keep is None
    assert nn.Block(DIM, HEADS).train()(tokens()).keep is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    ours, timms, exact = (model.eval() for model in pair({"init_values": 0.5}))
    with torch.autocast("cpu", dtype):
        pending = ours[0](tokens())
        assert (pending.residual.dtype, pending.branch.dtype, ours(tokens()).dtype) == (torch.float32, dtype, dtype)
        mine, same = ours(tokens()).double(), timms(tokens()).double()
    truth = exact(tokens().double())
    assert (mine - truth).norm() <= 2 * (same - truth).norm() + torch.finfo(dtype).eps * truth.norm()


def test_checkpointing_repeats_the_draws():
    ours = pair({"drop_path": 0.4})[0].train()
    plain = outcome(ours, tokens())
    blocks, norm = ours
    ours.forward = lambda x: norm(torch.utils.checkpoint.checkpoint_sequential(blocks, DEPTH, x, use_reentrant=False))
    torch.testing.assert_close(outcome(ours, tokens()), plain)


@pytest.mark.slow
def test_compiles_to_one_graph():
    ours = pair({"init_values": 0.5, "drop_path": 0.4})[0].double().train()
    plain = outcome(ours, tokens().double())
    ours.compile(fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(outcome(ours, tokens().double()), plain)


def sharded(rank, size, x):
    from torch.distributed.fsdp import fully_shard

    model = stack(nn.Block, nn.LayerNorm, init_values=0.5).eval()
    for block in model[0]:
        fully_shard(block)
    fully_shard(model)
    (model(torch.from_numpy(x)) ** 2).sum().backward()
    return {name: parameter.grad.full_tensor().numpy() for name, parameter in model.named_parameters()}


@pytest.mark.slow
def test_under_fsdp_layer_scale_outlives_its_block(ranks):
    model = stack(nn.Block, nn.LayerNorm, init_values=0.5).eval()
    (model(tokens()) ** 2).sum().backward()
    for grads in ranks(2, sharded, tokens().numpy()):
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(torch.from_numpy(grads[name]), parameter.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Attention(50, 3), "num_heads is 3, but must be positive and divide dim = 50"),
        (lambda: nn.Attention(48, 0), "num_heads is 0"),
        (lambda: nn.Block(48, 3, drop_path=1.0), r"drop_path is 1.0, but must be in \[0, 1\)"),
    ],
)
def test_errors(make, message):
    with pytest.raises(ValueError, match=message):
        make()
