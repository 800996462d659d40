"""What later vision transformers add to a block: other norms and MLPs, positions, registers, masks of keys."""

from itertools import product

import pytest
import torch
from timm.layers import RmsNorm as TimmRmsNorm
from timm.layers import SwiGLUPacked
from timm.layers.pos_embed_rel import gen_relative_position_index
from timm.models.vision_transformer import Attention as TimmAttention
from timm.models.vision_transformer import Block as TimmBlock

from fastdeit import kernels
from fastdeit.kernels import nn
from tests.kernels.proof import normal

DIM, HEADS, GRID, PREFIX = 32, 2, (2, 3), 2
TOKENS = PREFIX + 6


def tokens(*shape, dtype=torch.float64):
    return normal(*(shape or (3, TOKENS, DIM)), dtype=dtype, device="cpu", seed=1)


def randomised(module):
    """With other values than those at the start, some of which are 0 or 1."""
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter += 0.2 * normal(*parameter.shape, dtype=torch.float32, device="cpu", seed=i)
    return module.double()


def assert_equal_with_gradients(mine, theirs, forward=lambda model, x: model(x)):
    """Both have the same parameters, results and gradients."""
    assert [name for name, _ in mine.named_parameters()] == [name for name, _ in theirs.named_parameters()]
    randomised(mine)
    theirs.double().load_state_dict(mine.state_dict())
    outcomes = []
    for model in (mine, theirs):
        x = tokens().requires_grad_()
        out = forward(model, x)
        out = out.sum() if isinstance(out, nn.Tokens) else out
        outcomes.append((out, *torch.autograd.grad(out.square().sum(), (x, *model.parameters()))))
    torch.testing.assert_close(*outcomes)


def test_rms_norm_is_timms():
    assert_equal_with_gradients(nn.RMSNorm(DIM), TimmRmsNorm(DIM))


def test_swiglu_is_timms():
    torch.manual_seed(0)
    mine = nn.SwiGlu(DIM, 24)
    torch.manual_seed(0)
    theirs = SwiGLUPacked(DIM, 48)
    torch.testing.assert_close(mine.state_dict(), theirs.state_dict())
    assert_equal_with_gradients(mine, theirs)


@pytest.mark.parametrize(("norm", "timms"), [(nn.RMSNorm, TimmRmsNorm), (nn.LayerNorm, torch.nn.LayerNorm)])
def test_normalised_queries_and_keys_are_timms(norm, timms):
    theirs = TimmAttention(DIM, HEADS, qkv_bias=True, qk_norm=True, norm_layer=timms)
    theirs.q_norm.eps = theirs.k_norm.eps = 1e-6
    assert_equal_with_gradients(nn.Attention(DIM, HEADS, qk_norm=norm), theirs)


def test_a_block_of_other_parts_is_timms():
    mine = nn.Block(
        DIM,
        HEADS,
        init_values=0.5,
        norm=nn.RMSNorm,
        attn=nn.Attention(DIM, HEADS, qk_norm=nn.RMSNorm),
        mlp=nn.SwiGlu(DIM, 24),
    )
    options = {"qkv_bias": True, "qk_norm": True, "init_values": 0.5, "norm_layer": TimmRmsNorm}
    theirs = TimmBlock(DIM, HEADS, mlp_layer=SwiGLUPacked, act_layer=torch.nn.SiLU, mlp_ratio=1.5, **options)
    assert_equal_with_gradients(mine, theirs)


def test_a_mask_of_keys_reaches_the_attention():
    mask = torch.ones(3, TOKENS, dtype=torch.bool)
    mask[:, 5:] = False
    block = randomised(nn.Block(DIM, HEADS))
    masked = block(tokens(), key_mask=mask).sum()
    torch.testing.assert_close(masked[:, :5], block(tokens()[:, :5]).sum())


def test_relative_positions_have_timms_order():
    index = nn.RelativePositionBias(GRID, HEADS).index
    assert torch.equal(index, gen_relative_position_index(GRID, class_token=True))
    with_registers = nn.RelativePositionBias(GRID, HEADS, prefix=3).index
    assert torch.equal(with_registers[3:, 3:], index[1:, 1:])
    for one, other in ((slice(0, 3), 0), (slice(3, None), 1)):
        assert (with_registers[one, :3] == index[other, 0]).all()
        assert (with_registers[:3, one] == index[0, other]).all()


def test_a_bias_of_relative_positions_is_learned():
    attention = randomised(nn.Attention(DIM, HEADS, relative=nn.RelativePositionBias(GRID, HEADS, PREFIX)))
    out = attention(tokens())
    expected = kernels.attention(attention.qkv(tokens()), HEADS, logit_bias=attention.relative())
    torch.testing.assert_close(out, attention.proj(expected))
    (grad,) = torch.autograd.grad(out.square().sum(), attention.relative.relative_position_bias_table)
    assert (grad != 0).all()
    with kernels.use("triton"), pytest.raises(RuntimeError, match="attention=triton is asked for"):
        attention.float()(tokens(dtype=torch.float32))


def test_rotations_are_those_of_complex_numbers():
    x = tokens(2, TOKENS, HEADS, 8)
    turned = nn.Rope2d(GRID, 8, PREFIX)(x)
    assert torch.equal(turned[:, :PREFIX], x[:, :PREFIX])
    pairs = torch.view_as_complex(x.unflatten(-1, (4, 2)))
    for row, column in product(range(GRID[0]), range(GRID[1])):
        angles = torch.tensor([column * 1.0, column * 0.1, row * 1.0, row * 0.1], dtype=torch.float64)
        place = PREFIX + row * GRID[1] + column
        expected = torch.view_as_real(pairs[:, place] * torch.polar(torch.ones(4, dtype=torch.float64), angles))
        torch.testing.assert_close(turned[:, place], expected.flatten(-2), rtol=0, atol=1e-6)


def test_logits_of_turned_queries_and_keys_depend_on_differences_of_places():
    rope = nn.Rope2d((4, 4), 8, prefix=0)
    same = tokens(1, 1, 1, 8).expand(1, 16, 1, 8)
    turned = rope(same)[0, :, 0].view(4, 4, 8)
    steps = [(turned[y, x] * turned[y + 1, x + 2]).sum() for y, x in product(range(3), range(2))]
    torch.testing.assert_close(torch.stack(steps), steps[0].expand(6), rtol=0, atol=1e-5)
    assert (turned[0, 0] * turned[2, 1]).sum() != steps[0]


def test_attention_turns_queries_and_keys_alone():
    rope = nn.Rope2d(GRID, DIM // HEADS, PREFIX)
    attention = randomised(nn.Attention(DIM, HEADS, rope=rope))
    q, k, v = attention.qkv(tokens()).view(3, TOKENS, 3, HEADS, -1).unbind(2)
    packed = torch.stack((rope(q), rope(k), v), 2).flatten(2)
    torch.testing.assert_close(attention(tokens()), attention.proj(kernels.attention(packed, HEADS)))
    assert not list(rope.state_dict())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_reaches_the_products(dtype):
    rope = nn.Rope2d(GRID, DIM // HEADS, PREFIX)
    attn = nn.Attention(DIM, HEADS, qk_norm=nn.RMSNorm, rope=rope)
    block = nn.Block(DIM, HEADS, norm=nn.RMSNorm, attn=attn, mlp=nn.SwiGlu(DIM, 24))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = block(tokens(dtype=torch.float32))
    assert (out.residual.dtype, out.branch.dtype) == (torch.float32, dtype)


def test_prefix_tokens_stand_before_the_patches():
    prefix = nn.PrefixTokens(DIM, PREFIX)
    out = prefix(tokens(3, 6, DIM))
    assert out.shape == (3, TOKENS, DIM)
    assert torch.equal(out[:, PREFIX:], tokens(3, 6, DIM))
    assert torch.equal(out[1, :PREFIX], prefix.tokens[0].double())


def test_mistakes_are_told():
    with pytest.raises(ValueError, match="width is 6, but 4 must divide it"):
        nn.Rope2d(GRID, 6)
    with pytest.raises(ValueError, match="x has 5 tokens, but prefix and grid have 8"):
        nn.Rope2d(GRID, 8, PREFIX)(torch.ones(1, 5, 1, 8))
    with pytest.raises(ValueError, match="count is 0"):
        nn.PrefixTokens(DIM, 0)


@pytest.mark.parametrize("part", ["q_norm", "k_norm", "rope"])
def test_hooks_on_what_the_fused_op_stands_for_are_called(part):
    attention = nn.Attention(32, 2, qk_norm=nn.RMSNorm, rope=nn.Rope2d((2, 2), 16, prefix=0)).double()
    x, called = torch.randn(1, 4, 32, dtype=torch.float64), []
    expected = attention(x)
    getattr(attention, part).register_forward_hook(lambda module, inputs, output: called.append(module))
    torch.testing.assert_close(attention(x), expected)
    assert len(called) == (2 if part == "rope" else 1)
