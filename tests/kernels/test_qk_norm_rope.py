"""qk_norm_rope in Triton: every combination of what it fuses, any shape, any incoming gradient; and it is what the
modules of `nn` make one by one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastdeit import kernels
from fastdeit.kernels import nn
from tests.kernels.proof import few, layouts, normal, prove, repeated


def arguments(device, dtype, batch, tokens, heads, width, norms=True, rope=True, scale=1.0):
    def tensor(*shape, seed, dtype=dtype):
        return (scale * normal(*shape, dtype=torch.float32, device=device, seed=seed)).to(dtype).requires_grad_()

    angles = 3 * normal(tokens, width // 2, dtype=torch.float32, device=device, seed=3)
    return {
        "qkv": tensor(batch, tokens, 3 * heads * width, seed=0),
        "num_heads": heads,
        **({f"{name}_weight": tensor(width, seed=1, dtype=torch.float32) for name in "qk"} if norms else {}),
        "eps": 1e-6,
        **({"cos": angles.cos(), "sin": angles.sin()} if rope else {}),
    }


@given(
    batch=st.integers(1, 3),
    tokens=st.sampled_from([1, 5, 49]),
    heads=st.integers(1, 3),
    width=st.sampled_from([4, 10, 24, 64]),
    fused=st.sampled_from([(True, True), (True, False), (False, True)]),
    layout=layouts,
)
@few
def test_as_good_as_pytorch(device, dtype, batch, tokens, heads, width, fused, layout):
    prove(kernels.qk_norm_rope, arguments(device, dtype, batch, tokens, heads, width, *fused), layout)


def test_heads_of_an_odd_width_without_a_rotation(device):
    prove(kernels.qk_norm_rope, arguments(device, torch.float32, 2, 5, 3, 7, rope=False))


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_far_from_one(device, scale):
    prove(kernels.qk_norm_rope, arguments(device, torch.float32, 2, 5, 2, 24, scale=scale))


def test_every_run_has_the_same_bits(device):
    inputs = arguments(device, torch.float32, 2, 33, 3, 24)

    def run():
        with kernels.use("triton"):
            out = kernels.qk_norm_rope(**inputs)
            leaves = [value for value in inputs.values() if isinstance(value, torch.Tensor) and value.requires_grad]
            return out, *torch.autograd.grad(out.square().sum(), leaves)

    repeated(run, 3)


@pytest.mark.parametrize("shape", [(0, 5), (2, 0)])
def test_no_rows(device, shape):
    inputs = arguments(device, torch.float32, *shape, 2, 8)
    with kernels.use("triton"):
        out = kernels.qk_norm_rope(**inputs)
        grads = torch.autograd.grad(out.sum(), (inputs["qkv"], inputs["q_weight"]))
    assert out.shape == grads[0].shape == inputs["qkv"].shape
    assert torch.equal(grads[1], torch.zeros(8, device=device))


GRID, PREFIX, HEADS, WIDTH = (2, 3), 2, 3, 8


@pytest.mark.parametrize("norm", [None, nn.RMSNorm])
@pytest.mark.parametrize("turned", [True, False])
def test_it_is_what_the_modules_make(norm, turned):
    rope = nn.Rope2d(GRID, WIDTH, PREFIX).double()
    qkv = normal(2, 8, 3 * HEADS * WIDTH, dtype=torch.float64, device="cpu", seed=0)
    norms = [norm(WIDTH).double() if norm else torch.nn.Identity() for _ in range(2)]
    weights = []
    for seed, module in enumerate(norms):
        if norm:
            module.weight.data += normal(WIDTH, dtype=torch.float64, device="cpu", seed=seed)
        weights.append(getattr(module, "weight", None))
    q, k, v = qkv.unflatten(-1, (3, HEADS, WIDTH)).unbind(2)
    q, k = (rope(part) if turned else part for part in (norms[0](q), norms[1](k)))
    turns = rope.turns(qkv) if turned else (None, None)
    out = kernels.qk_norm_rope(qkv, HEADS, *weights, 1e-6, *turns)
    torch.testing.assert_close(out, torch.stack((q, k, v), 2).flatten(2))


def test_without_norms_no_activation_is_kept():
    kept = []
    inputs = arguments("cpu", torch.float32, 2, 5, 2, 8, norms=False)
    pack = torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda t: t)
    with pack, kernels.use("reference"):
        kernels.qk_norm_rope(**inputs)
    assert set(kept) == {inputs["cos"].shape}


def runs_of(monkeypatch, module):
    calls = []
    monkeypatch.setattr(nn, "qk_norm_rope", lambda *args: calls.append(args) or kernels.qk_norm_rope(*args))
    module(normal(2, 8, 24, dtype=torch.float32, device="cpu", seed=0))
    return len(calls)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"qk_norm": nn.RMSNorm}, 1),
        ({"rope": nn.Rope2d(GRID, WIDTH, PREFIX)}, 1),
        ({"qk_norm": nn.RMSNorm, "rope": nn.Rope2d(GRID, WIDTH, PREFIX)}, 1),
        ({"qk_norm": nn.LayerNorm}, 0),
        ({}, 0),
    ],
)
def test_which_attention_runs_on_it(monkeypatch, options, expected):
    assert runs_of(monkeypatch, nn.Attention(24, HEADS, **options)) == expected


def test_norms_that_are_not_alike_run_one_by_one(monkeypatch):
    attention = nn.Attention(24, HEADS, qk_norm=nn.RMSNorm)
    attention.k_norm.eps = 0.5
    assert runs_of(monkeypatch, attention) == 0
    attention.k_norm = torch.nn.Identity()
    assert runs_of(monkeypatch, attention) == 0


QKV, WEIGHT, TURNS = torch.ones(2, 5, 24), torch.ones(4), torch.ones(5, 2)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((QKV.long(), 2), TypeError, "qkv is torch.int64"),
        ((QKV[0], 2), ValueError, r"qkv has shape \[5, 24\], but must be \[B, N, 3\*H\*d\]"),
        ((QKV, 5), ValueError, "num_heads is 5, but must be positive, and 3 \\* num_heads must divide"),
        ((QKV, 2, WEIGHT), ValueError, "q_weight is given alone, but q_weight and k_weight belong together"),
        ((QKV, 2, WEIGHT, WEIGHT[:2]), ValueError, r"k_weight has shape \[2\]"),
        ((QKV, 2, WEIGHT, WEIGHT, -1.0), ValueError, "eps is -1"),
        ((QKV, 2, None, None, 0.0, TURNS), ValueError, "cos is given alone, but cos and sin belong together"),
        ((QKV, 2, None, None, 0.0, TURNS, TURNS[:3]), ValueError, r"sin has shape \[3, 2\]"),
        ((QKV, 8, None, None, 0.0, TURNS, TURNS), ValueError, "heads have 1 channels"),
        (
            (QKV, 2, None, None, 0.0, TURNS, TURNS.clone().requires_grad_()),
            ValueError,
            "sin requires a gradient, which this op does not make",
        ),
    ],
)
def test_mistakes_are_told(arguments, error, message):
    with pytest.raises(error, match=message):
        kernels.qk_norm_rope(*arguments)
