"""Attention in Triton: every number of tokens and width of heads in use, packed or with queries of its own."""

import contextlib
import warnings
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fastdeit import kernels
from fastdeit.kernels import _op
from fastdeit.kernels._triton import INTERPRETED
from fastdeit.kernels.attention import backward, libraries, tiles
from fastdeit.kernels.attention.op import OP
from fastdeit.kernels.attention.tiles import chunks
from tests.kernels import proof
from tests.kernels.proof import TOKENS, few, layouts, normal, repeated

prove = partial(proof.prove, rounded_operands=True)  # the gradients of logits, for the products that follow


def packed(device, dtype, batch, tokens, heads, width, scale=1.0, seed=0, parts=3):
    values = normal(batch, tokens, parts * heads * width, dtype=torch.float32, device=device, seed=seed)
    return (values * scale).to(dtype).requires_grad_()


@pytest.mark.parametrize("tokens", [pytest.param(n, marks=pytest.mark.slow) if n > 500 else n for n in TOKENS])
def test_as_good_as_pytorch(device, tokens):
    heads = 2 if tokens < 200 else 1
    bias = normal(3 * heads * 32, dtype=torch.float32, device=device, seed=1).requires_grad_()
    qkv = packed(device, torch.float16, 1, tokens, heads, 32)
    prove(kernels.attention, {"qkv": qkv, "num_heads": heads, "bias": bias})


@pytest.mark.parametrize(
    ("width", "tokens"),
    [
        *((width, 198) for width in (32, 48, 64, 80, 96, 128)),
        *(
            pytest.param(width, tokens, marks=pytest.mark.slow)
            for width in (32, 48, 64, 80, 96, 128)
            for tokens in (65, 300)
        ),
        (64, 17),
        (64, 208),
        pytest.param(64, 1025, marks=pytest.mark.slow),
    ],
)
def test_every_width_of_heads(device, width, tokens):
    prove(kernels.attention, {"qkv": packed(device, torch.float16, 1, tokens, 1, width), "num_heads": 1})


# Most of its seconds are of float32.
@pytest.mark.parametrize(
    "product_dtype",
    [
        pytest.param(torch.float32, marks=pytest.mark.slow),
        torch.float16,
        *([] if INTERPRETED else [torch.bfloat16]),
    ],
    ids=str,
)
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 100),
    heads=st.integers(1, 3),
    width=st.sampled_from([8, 16, 32, 48, 64, 80, 96, 128]),
    scale=st.sampled_from([None, 0.3, 2.0]),
    layout=layouts,
)
@settings(few, max_examples=5)
def test_any_shape(device, product_dtype, batch, tokens, heads, width, scale, layout):
    qkv = packed(device, product_dtype, batch, tokens, heads, width)
    prove(kernels.attention, {"qkv": qkv, "num_heads": heads, "scale": scale}, layout)


@pytest.mark.slow
@given(
    queries=st.sampled_from([1, 2, 65, 80]),
    tokens=st.sampled_from([1, 50, 198, 300]),
    heads=st.integers(1, 2),
    layout=layouts,
)
@settings(few, max_examples=5)
def test_queries_of_their_own(device, product_dtype, queries, tokens, heads, layout):
    q = packed(device, product_dtype, 2, queries, heads, 32, parts=1)
    kv = packed(device, product_dtype, 2, tokens, heads, 32, seed=1, parts=2)
    prove(kernels.query_attention, {"q": q, "kv": kv, "num_heads": heads}, layout)


def test_query_attention_is_the_first_rows_of_attention(device):
    qkv = packed(device, torch.float64, 2, 10, 2, 8).detach()
    q, kv = qkv[:, :3, :16], qkv[:, :, 16:]
    torch.testing.assert_close(kernels.query_attention(q, kv, 2), kernels.attention(qkv, 2)[:, :3])


@pytest.mark.parametrize("how", ["auto", "reference", "compiled"])
def test_gradient_of_the_bias_is_that_of_the_linear_layer(how):
    torch.compiler.reset()
    x, weight, bias = (torch.randn(shape, dtype=torch.float64) for shape in ((2, 5, 8), (24, 8), (24,)))
    weight.requires_grad_()
    bias.requires_grad_()

    def ours():
        qkv = torch.nn.functional.linear(x, weight, bias.detach())
        return kernels.attention(qkv, 2, bias=bias)

    run = torch.compile(ours, fullgraph=True, backend="aot_eager") if how == "compiled" else ours
    theirs = kernels.attention(torch.nn.functional.linear(x, weight, bias), 2)
    with kernels.use("reference" if how == "reference" else "auto"):
        mine = run()
        assert torch.equal(mine, theirs)
        gradients = torch.autograd.grad(mine.square().sum(), (weight, bias))
    torch.testing.assert_close(gradients, torch.autograd.grad(theirs.square().sum(), (weight, bias)))


@pytest.mark.parametrize("scale", [1e-3, 30.0])
@pytest.mark.parametrize("tokens", [70, 300])
def test_huge_and_tiny_logits(device, scale, tokens):
    prove(kernels.attention, {"qkv": packed(device, torch.float16, 1, tokens, 1, 32, scale), "num_heads": 1})


@pytest.mark.filterwarnings("error", "ignore:Conversion of an array")  # by the interpreter of Triton 3.4
@pytest.mark.parametrize("sign", [1, -1])
def test_logits_far_from_zero_do_not_reach_the_padding(device, sign):
    """All logits near +-4,500: the exponential of a missing key, whose logit is 0, would be 0 or infinite."""
    x = packed(device, torch.float32, 1, 70, 1, 32, 0.1).detach()
    x[..., :32] += 20.0
    x[..., 32:64] += sign * 40.0
    prove(kernels.attention, {"qkv": x.half().requires_grad_(), "num_heads": 1})


@pytest.mark.filterwarnings("error", "ignore:Conversion of an array")  # by the interpreter of Triton 3.4
@pytest.mark.parametrize("backend", ["triton", "fused_backward"])
def test_survives_logits_that_overflow_the_naive_form(device, backend):
    """q k^T before scaling is near 102,400, beyond fp16's 65,504: a softmax of fp16 products is NaN."""
    noise = packed(device, torch.float32, 1, 70, 1, 64, 0.1).detach()
    noise[..., :128] += 40.0
    qkv = noise.half().requires_grad_()
    q, k, v = qkv.detach().chunk(3, -1)
    assert (q.float() @ k.float().mT).min() > torch.finfo(torch.float16).max
    assert (torch.softmax((q @ k.mT) * 64**-0.5, -1) @ v).isnan().all()
    prove(kernels.attention, {"qkv": qkv, "num_heads": 1}, mine=kernels.use(attention=backend))
    with kernels.use(attention=backend):
        out = kernels.attention(qkv, 1)
        (grad,) = torch.autograd.grad(out.float().sum(), qkv)
    assert out.isfinite().all()
    assert grad.isfinite().all()


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("part", [0, 1, 2], ids=["q", "k", "v"])
def test_not_finite_where_pytorch_is_not(device, part):
    qkv = packed(device, torch.float32, 2, 20, 2, 16).detach()
    qkv[1, 7, part * 32 + 3] = float("nan")
    with kernels.use("triton"):
        mine = kernels.attention(qkv, 2)
    assert torch.equal(mine.isnan(), kernels.attention(qkv, 2).isnan())


def test_chunks_cover_with_little_padding():
    for tokens in range(1, 258):
        cover = chunks(tokens)
        assert sum(cover) >= tokens
        assert sum(cover) - tokens < max(16, tokens / 6 + 16)
        assert all(size & (size - 1) == 0 for size in cover)
    assert [sum(chunks(tokens)) for tokens in (65, 145, 197, 198, 257)] == [80, 160, 208, 208, 272]


def test_what_triton_does_not_take_is_the_references(device):
    for qkv, reason in (
        (torch.zeros(1, 2, 6, dtype=torch.float64, device=device), "it does not compute in torch.float64"),
        (torch.zeros(1, 2, 3 * 136, device=device), "heads are 136 wide, at most 128 fit"),
        (torch.zeros(1, 0, 6, device=device), "are empty"),
    ):
        with kernels.use("triton"), pytest.raises(RuntimeError, match=reason):
            kernels.attention(qkv, 1)


def test_more_programs_than_a_grid_holds_are_the_references(device, monkeypatch):
    assert tiles.MOST_PROGRAMS == 2**31 - 1
    monkeypatch.setattr(tiles, "MOST_PROGRAMS", 6)
    for op, inputs in (
        (kernels.attention, lambda batch: [torch.zeros(batch, 1, 18, device=device)]),
        (kernels.query_attention, lambda batch: [torch.zeros(batch, 1, size, device=device) for size in (6, 12)]),
    ):
        with kernels.use("triton"):
            op(*inputs(2), 3)
            with pytest.raises(RuntimeError, match="9 programs, at most 6 fit a launch"):
                op(*inputs(3), 3)


@pytest.mark.parametrize(("batch", "tokens"), [(0, 3), (2, 0)])
def test_nothing_has_no_attention_and_a_gradient(batch, tokens):
    qkv, bias = torch.zeros(batch, tokens, 24, requires_grad=True), torch.zeros(24, requires_grad=True)
    for how in ("auto", "reference"):
        with kernels.use(how):
            out = kernels.attention(qkv, 2, bias=bias)
            grads = torch.autograd.grad(out.sum(), (qkv, bias))
        assert out.shape == (batch, tokens, 8)
        assert [grad.shape for grad in grads] == [qkv.shape, bias.shape]
        assert not grads[1].any()


@pytest.mark.skipif(not INTERPRETED, reason="of the interpreter")
@pytest.mark.parametrize("op", ["attention=triton", "attention=fused_backward", "mlp=epilogue"])
def test_products_that_the_interpreter_gets_wrong_are_refused(op):
    name, backend = op.split("=")
    x, weight = (torch.zeros(*shape, 48, dtype=torch.bfloat16) for shape in ((1, 3), (48,)))
    args = [x, 1] if name == "attention" else [x, weight, weight[0], weight, weight[0]]
    with kernels.use(**{name: backend}), pytest.raises(RuntimeError, match="products of bfloat16 wrongly"):
        getattr(kernels, name)(*args)


@pytest.fixture
def unforced(monkeypatch):
    """Triton's kernels as candidates that nobody asked for by name, as on a card; warnings are given anew."""
    others = [
        b for b in OP.backends if b.name not in ("native", "hopper", *(other.name for other in libraries.BACKENDS))
    ]
    able = [b._replace(capability=lambda device, forced: (True, "a test says so")) for b in others]
    monkeypatch.setattr(OP, "backends", tuple(able))
    _op._warn_once.cache_clear()
    yield
    _op._warn_once.cache_clear()


class _Made(TorchDispatchMode):
    """Names of the operators that made a tensor of `numel` elements, views not among them."""

    def __init__(self, numel):
        super().__init__()
        self.numel, self.names = numel, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.numel() == self.numel and not function.is_view:
            self.names.append(function.name())
        return result


@pytest.mark.parametrize("width", [160, 256])
def test_heads_too_wide_are_pytorchs(device, unforced, width):
    """Under native autograd, whose backward packs the three gradients by one copy; and a warning says what is wide."""
    qkv = packed(device, torch.float16, 2, 9, 2, width)
    with pytest.warns(RuntimeWarning) as said:
        out = kernels.attention(qkv, 2)
    assert [str(one.message) for one in said] == [
        f"attention does not run on triton: heads are {width} wide, at most 128 fit, "
        f"nor on fused_backward: heads are {width} wide, at most 64 fit one program"
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernels.attention(qkv, 2)  # it is said once
    with _Made(qkv.numel()) as made:
        out.backward(torch.ones_like(out))
    assert made.names == ["aten::stack"]
    prove(kernels.attention, {"qkv": qkv, "num_heads": 2}, mine=contextlib.nullcontext())


def test_two_kernels_take_what_does_not_fit_one_program(device, unforced, monkeypatch):
    """Where measurement put the one program first, they are next."""
    row = {"backend": "fused_backward", "because": "measured", "widths": {}}
    monkeypatch.setattr(_op, "_measured", lambda: {_op.card(torch.device(device)): {"attention": row}})
    calls, original = [], backward.backward
    monkeypatch.setattr(backward, "backward", lambda *a, **k: calls.append(1) or original(*a, **k))
    fits, does_not = (packed(device, torch.float16, 1, tokens, 1, 16) for tokens in (208, 209))
    kernels.attention(fits, 1).float().sum().backward()
    assert calls == []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # both are Triton's: nothing is lost
        warnings.filterwarnings("ignore", "Conversion of an array")
        kernels.attention(does_not, 1).float().sum().backward()
    assert calls == [1]


@pytest.mark.parametrize("times", [3, pytest.param(50, marks=pytest.mark.card)])
def test_every_run_has_the_same_bits(device, times):
    batch, tokens, heads = (64, 198, 12) if device == "cuda" else (1, 70, 1)
    qkv = packed(device, torch.float16, batch, tokens, heads, 64)
    bias = torch.zeros(3 * heads * 64, device=device, requires_grad=True)

    def run():
        with kernels.use("triton"):
            out = kernels.attention(qkv, heads, bias=bias)
            return out, *torch.autograd.grad(out.float().square().sum(), (qkv, bias))

    repeated(run, times)


def some_keys(device, batch, tokens):
    """Masks of keys: without the first tile, of none at all, of one alone, and without each third."""
    mask = (torch.arange(tokens) % 3 > 0).repeat(batch, 1)
    mask[0, : tokens - 3] = False
    mask[1] = False
    mask[2:3] = torch.arange(tokens) == tokens // 2
    return mask.to(device)


def prove_masked(device, dtype, batch, tokens, heads, width):
    bias = normal(3 * heads * width, dtype=torch.float32, device=device, seed=1).requires_grad_()
    qkv, mask = packed(device, dtype, batch, tokens, heads, width), some_keys(device, batch, tokens)
    prove(kernels.attention, {"qkv": qkv, "num_heads": heads, "key_mask": mask, "bias": bias})


@pytest.mark.filterwarnings("ignore:divide by zero")  # the logarithm of no key at all
def test_a_mask_of_keys(device):
    prove_masked(device, torch.float16, 2, 67, 1, 16)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize(("tokens", "width"), [(5, 8), (150, 24)])
def test_masks_of_any_size(device, product_dtype, tokens, width):
    prove_masked(device, product_dtype, 4, tokens, 2, width)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_masked_keys_are_as_good_as_absent(backend):
    qkv, there = packed("cpu", torch.float64, 1, 9, 2, 8), torch.tensor([0, 2, 3, 7])
    mask = torch.zeros(1, 9, dtype=torch.bool).index_fill(1, there, True)
    with kernels.use(backend):
        out = kernels.attention(qkv, 2, key_mask=mask)
        (grad,) = torch.autograd.grad(out[:, there].square().sum(), qkv)
    expected = kernels.attention(qkv[:, there], 2)
    torch.testing.assert_close(out[:, there], expected)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.square().sum(), qkv)[0])


@pytest.mark.parametrize("biased", [False, True])
def test_a_sample_without_any_key_is_zero_without_a_gradient(biased):
    qkv = packed("cpu", torch.float32, 2, 5, 2, 8)
    mask = torch.tensor([[True] * 5, [False] * 5])
    logit_bias = torch.randn(2, 5, 5) if biased else None
    out = kernels.attention(qkv, 2, key_mask=mask, logit_bias=logit_bias)
    (grad,) = torch.autograd.grad(out.sum(), qkv)
    assert not out[1].any()
    assert not grad[1].any()
    torch.testing.assert_close(out[:1], kernels.attention(qkv[:1], 2, logit_bias=logit_bias))


@pytest.mark.parametrize("masked", [False, True])
def test_a_bias_of_the_logits_is_added_and_has_a_gradient(masked):
    qkv, bias = packed("cpu", torch.float64, 2, 5, 2, 8), torch.randn(2, 5, 5, dtype=torch.float64).requires_grad_()
    mask = torch.tensor([[True, True, False, True, False], [True] * 5]) if masked else None
    out = kernels.attention(qkv, 2, key_mask=mask, logit_bias=bias)
    q, k, v = qkv.view(2, 5, 3, 2, 8).permute(2, 0, 3, 1, 4)
    logits = q @ k.mT * 8**-0.5 + bias
    if masked:
        logits = logits.masked_fill(~mask[:, None, None], -torch.inf)
    expected = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(out, expected)
    grads = (torch.autograd.grad(result.square().sum(), (qkv, bias)) for result in (out, expected))
    torch.testing.assert_close(*grads)


def test_what_no_kernel_does_is_refused_by_name(device):
    qkv = packed(device, torch.float16, 1, 5, 2, 32)
    with kernels.use("triton"), pytest.raises(RuntimeError, match="attention=triton is asked for, which does not add"):
        kernels.attention(qkv, 2, logit_bias=torch.zeros(2, 5, 5, device=device))
    mask = torch.ones(1, 5, dtype=torch.bool, device=device)
    with kernels.use("fused_backward"), pytest.raises(RuntimeError, match="does not take a mask of keys yet"):
        kernels.attention(qkv, 2, key_mask=mask)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"key_mask": torch.ones(1, 5)}, TypeError, r"key_mask is torch.float32, but must be torch.bool"),
        ({"key_mask": torch.ones(1, 4, dtype=torch.bool)}, ValueError, r"key_mask has shape \[1, 4\]"),
        ({"logit_bias": torch.ones(5, 5)}, ValueError, r"logit_bias has shape \[5, 5\], but must be \[H, N, N\]"),
        ({"logit_bias": torch.ones(2, 5, 5, dtype=torch.bool)}, TypeError, "logit_bias is"),
    ],
)
def test_mistaken_masks_and_biases(given, error, message):
    with pytest.raises(error, match=message):
        kernels.attention(torch.ones(1, 5, 24), 2, **given)
