"""Attention, LayerNorm and MLP against plain float64 formulas, and their argument errors."""

import math

import pytest
import torch

from fastdeit.kernels import add_layer_norm, attention, layer_norm_mlp, mlp

B, N, C, H, F = 3, 5, 12, 3, 20


@pytest.fixture(params=["direct", "registered"], autouse=True)
def path(request, force):
    if request.param == "registered":
        force("reference")


def rand(*shape, dtype=torch.float64):
    return torch.randn(*shape, dtype=dtype)


def plain_layer_norm(x, weight, bias, eps):
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt() * weight + bias


def plain_mlp(x, w1, b1, w2, b2):
    pre = x @ w1.T + b1
    return (pre * 0.5 * (1 + torch.erf(pre / math.sqrt(2)))) @ w2.T + b2


@pytest.mark.parametrize("scale", [None, 0.7])
def test_attention(scale):
    qkv = rand(B, N, 3 * C)
    out = torch.empty(B, N, C, dtype=torch.float64)
    d = C // H
    for b in range(B):
        for h in range(H):
            q, k, v = (qkv[b, :, i * C + h * d : i * C + (h + 1) * d] for i in range(3))
            logits = (d**-0.5 if scale is None else scale) * q @ k.T
            out[b, :, h * d : (h + 1) * d] = logits.exp() / logits.exp().sum(1, keepdim=True) @ v
    torch.testing.assert_close(attention(qkv, H, scale), out)


def test_attention_survives_logits_beyond_fp16():
    """q = k = 40 with d = 64: the product is 102,400 before scaling, above fp16's 65,504."""
    qkv = torch.full((1, 4, 3 * 64), 40.0, dtype=torch.float16)
    assert torch.equal(attention(qkv, 1), torch.full((1, 4, 64), 40.0, dtype=torch.float16))


@pytest.mark.parametrize("gamma", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_add_layer_norm(gamma, keep):
    residual, branch, weight, bias = rand(B, N, C), rand(B, N, C), rand(C), rand(C)
    scale = rand(C) if gamma else None
    factor = torch.tensor([0.0, 1.0, 1.25]) if keep else None
    expected = residual + (1 if factor is None else factor[:, None, None]) * (1 if scale is None else scale) * branch
    new_residual, normed = add_layer_norm(residual, branch, weight, bias, 1e-3, gamma=scale, keep=factor)
    torch.testing.assert_close(new_residual, expected)
    torch.testing.assert_close(normed, plain_layer_norm(expected, weight, bias, 1e-3))


@pytest.mark.parametrize("shape", [(B, C), (B, N, C), (2, B, N, C)])
def test_plain_layer_norm(shape):
    x, weight, bias = rand(*shape), rand(C), rand(C)
    residual, normed = add_layer_norm(x, None, weight, bias, 1e-3)
    assert residual is x
    torch.testing.assert_close(normed, plain_layer_norm(x, weight, bias, 1e-3))


@pytest.mark.parametrize("residual_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("out_dtype", [None, torch.float16])
def test_layer_norm_dtypes(residual_dtype, out_dtype):
    """A large mean would drown the variance in 16-bit statistics."""
    residual, branch = (100 + rand(B, N, C)).to(residual_dtype), rand(B, N, C).bfloat16()
    weight, bias = torch.ones(C), torch.zeros(C)
    new_residual, normed = add_layer_norm(residual, branch, weight, bias, out_dtype=out_dtype)
    assert (new_residual.dtype, normed.dtype) == (residual_dtype, out_dtype or residual_dtype)
    assert torch.equal(new_residual, (residual.float() + branch.float()).to(residual_dtype))
    exact = plain_layer_norm(new_residual.double(), weight, bias, 1e-6)
    error = (normed.double() - exact).abs().max()
    assert error <= max(torch.finfo(normed.dtype).eps, 2e-5) * exact.abs().max()


@pytest.mark.parametrize("compiled", [False, True])
def test_gradient_of_the_branch_bias_is_that_of_the_linear_layer(compiled):
    torch.compiler.reset()
    x, weight, bias, gamma = (torch.nn.Parameter(rand(*shape)) for shape in ((B, N, F), (C, F), (C,), (C,)))
    residual, ones, zeros = rand(B, N, C), torch.ones(C, dtype=torch.float64), torch.zeros(C, dtype=torch.float64)
    options = {"gamma": gamma, "keep": torch.tensor([0.0, 1.0, 1.25])}

    def ours():
        branch = torch.nn.functional.linear(x, weight, bias.detach())
        return add_layer_norm(residual, branch, ones, zeros, branch_bias=bias, **options)

    run = torch.compile(ours, fullgraph=True, backend="aot_eager") if compiled else ours
    theirs = add_layer_norm(residual, torch.nn.functional.linear(x, weight, bias), ones, zeros, **options)
    gradients = []
    for new_residual, normed in (run(), theirs):
        loss = new_residual.square().sum() + normed.pow(3).sum()
        gradients.append(torch.autograd.grad(loss, (x, weight, bias, gamma)))
    torch.testing.assert_close(*gradients)


def test_dropped_branch_may_hold_anything_finite():
    residual, branch = rand(B, N, C), torch.full((B, N, C), 1e300, dtype=torch.float64)
    new_residual, _ = add_layer_norm(residual, branch, rand(C), rand(C), keep=torch.zeros(B))
    assert torch.equal(new_residual, residual)


def test_mlp():
    x, weights = rand(B, N, C), (rand(F, C), rand(F), rand(7, F), rand(7))
    torch.testing.assert_close(mlp(x, *weights), plain_mlp(x, *weights))


def test_layer_norm_mlp():
    x, weight, bias, weights = rand(B, N, C), rand(C), rand(C), (rand(F, C), rand(F), rand(7, F), rand(7))
    expected = plain_mlp(plain_layer_norm(x, weight, bias, 1e-3), *weights)
    torch.testing.assert_close(layer_norm_mlp(x, weight, bias, 1e-3, *weights), expected)


def test_layer_norm_mlp_of_a_float32_stream_with_16_bit_weights():
    x, weight, bias, weights = rand(B, N, C), rand(C), rand(C), (rand(F, C), rand(F), rand(7, F), rand(7))
    out = layer_norm_mlp(x.float(), weight.float(), bias.float(), 1e-3, *(w.bfloat16() for w in weights))
    exact = layer_norm_mlp(x, weight, bias, 1e-3, *weights)
    assert out.dtype == torch.bfloat16
    assert (out.double() - exact).norm() < 0.02 * exact.norm()


@pytest.mark.parametrize(
    ("qkv", "heads", "error", "message"),
    [
        (torch.zeros(2, 3), 1, ValueError, r"qkv has shape \[2, 3\], but must be \[B, N, 3\*H\*d\]"),
        (torch.zeros(2, 3, 10), 2, ValueError, "num_heads is 2, but must be positive, and .* divide .* 10"),
        (torch.zeros(2, 3, 12), 0, ValueError, "num_heads is 0"),
        (torch.zeros(2, 3, 12, dtype=torch.int64), 2, TypeError, "qkv is torch.int64"),
    ],
)
def test_attention_errors(qkv, heads, error, message):
    with pytest.raises(error, match=message):
        attention(qkv, heads)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"branch": torch.zeros(B, N, 1)}, r"branch has shape \[3, 5, 1\], but must be like residual = \[3, 5, 12\]"),
        ({"weight": torch.zeros(C, 1)}, r"weight has shape \[12, 1\], but must be \[C\].* = \[12\]"),
        ({"gamma": torch.zeros(1)}, r"gamma has shape \[1\]"),
        ({"keep": torch.zeros(B, 1)}, r"keep has shape \[3, 1\], but must be \[B\].* = \[3\]"),
        ({"branch": None, "keep": torch.zeros(B)}, "keep belongs to the branch, but branch is None"),
        ({"branch": None, "gamma": torch.zeros(C)}, "gamma belongs to the branch, but branch is None"),
    ],
)
def test_layer_norm_errors(changes, message):
    arguments = {
        "residual": torch.zeros(B, N, C),
        "branch": torch.zeros(B, N, C),
        "weight": torch.zeros(C),
        "bias": torch.zeros(C),
    }
    with pytest.raises(ValueError, match=message):
        add_layer_norm(**arguments | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"w1": torch.zeros(C, F)}, r"w1 has shape \[12, 20\], but must be \[outputs, inputs\] with 12 inputs"),
        ({"w2": torch.zeros(C, C)}, r"w2 has shape \[12, 12\], but must be \[outputs, inputs\] with 20 inputs"),
        ({"b1": torch.zeros(C)}, r"b1 has shape \[12\]"),
        ({"b2": torch.zeros(F)}, r"b2 has shape \[20\]"),
    ],
)
def test_mlp_errors(changes, message):
    arguments = {"x": torch.zeros(B, C), "w1": torch.zeros(F, C), "b1": torch.zeros(F)}
    arguments |= {"w2": torch.zeros(C, F), "b2": torch.zeros(C)} | changes
    with pytest.raises(ValueError, match=message):
        mlp(**arguments)
    norm = {"weight": torch.zeros(C), "bias": torch.zeros(C), "eps": 1e-6}
    with pytest.raises(ValueError, match=message):
        layer_norm_mlp(**arguments | norm)
