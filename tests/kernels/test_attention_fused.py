"""Attention's backward as one program a head: every number of tokens and width of heads that fit, and what does not."""

from functools import partial

import pytest
import torch
import triton
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdeit import kernels
from fastdeit.kernels import _op, _triton
from fastdeit.kernels._triton import INTERPRETED
from fastdeit.kernels.attention import fused_backward
from tests.kernels import proof
from tests.kernels.proof import few, layouts, repeated
from tests.kernels.test_attention import packed

prove = partial(proof.prove, rounded_operands=True)

HALVES = [torch.float16, *([] if INTERPRETED else [torch.bfloat16])]


def fused():
    return kernels.use(attention="fused_backward")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    "tokens", [1, 16, 17, 49, 65, 81, 145, *(pytest.param(n, marks=pytest.mark.slow) for n in (196, 197)), 198, 208]
)
def test_as_good_as_pytorch(device, dtype, tokens):
    qkv = packed(device, dtype, 1 if INTERPRETED and tokens > 100 else 2, tokens, 2, 64)
    bias = torch.zeros(3 * 2 * 64, dtype=dtype, device=device, requires_grad=True)
    prove(kernels.attention, {"qkv": qkv, "num_heads": 2, "bias": bias}, mine=fused())


@pytest.mark.slow
@given(
    batch=st.integers(1, 3),
    tokens=st.integers(1, 208),
    heads=st.integers(1, 3),
    width=st.sampled_from([8, 16, 24, 32, 40, 48, 64]),
    scale=st.sampled_from([None, 0.3, 2.0]),
    dtype=st.sampled_from(HALVES),
    layout=layouts,
)
@settings(few, max_examples=5)
def test_any_shape(device, batch, tokens, heads, width, scale, dtype, layout):
    qkv = packed(device, dtype, batch, tokens, heads, width)
    prove(kernels.attention, {"qkv": qkv, "num_heads": heads, "scale": scale}, layout, mine=fused())


@pytest.mark.filterwarnings("error", "ignore:Conversion of an array")  # by the interpreter of Triton 3.4
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("tokens", [20, 70, 198])
def test_logits_far_from_zero_do_not_reach_the_padding(device, tokens, sign):
    """All logits near +-4,500: the exponential of a missing key, whose logit is 0, would be 0 or infinite."""
    x = packed(device, torch.float32, 1, tokens, 1, 32, 0.1).detach()
    x[..., :32] += 20.0
    x[..., 32:64] += sign * 40.0
    bias = torch.zeros(96, dtype=torch.float16, device=device, requires_grad=True)
    prove(kernels.attention, {"qkv": x.half().requires_grad_(), "num_heads": 1, "bias": bias}, mine=fused())


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("part", [0, 1, 2], ids=["q", "k", "v"])
def test_gradients_are_not_finite_where_those_of_two_kernels_are_not(device, part):
    qkv = packed(device, torch.float16, 2, 20, 2, 16).detach()
    qkv[1, 7, part * 32 + 3] = float("nan")
    gradients = []
    for backend in ("fused_backward", "triton"):
        x = qkv.clone().requires_grad_()
        with kernels.use(attention=backend):
            gradients += torch.autograd.grad(kernels.attention(x, 2).float().square().sum(), x)
    assert gradients[0].isnan().any()
    assert torch.equal(*(grad.isnan() for grad in gradients))


def test_forward_is_that_of_two_kernels(device):
    qkv = packed(device, torch.float16, 1, 70, 2, 64).detach()
    with kernels.use("triton"):
        out = kernels.attention(qkv, 2)
    with fused():
        assert torch.equal(kernels.attention(qkv, 2), out)


TOO_MUCH = [
    (torch.float16, 209, 64, "209 tokens, at most 208 fit one program"),
    (torch.float16, 5, 72, "heads are 72 wide, at most 64 fit one program"),
    (torch.float32, 5, 64, "it computes in 16 bit, not in torch.float32"),
    (torch.float16, 0, 64, r"qkv \[1, 0, 192\] is empty"),
]


@pytest.mark.parametrize(("dtype", "tokens", "width", "reason"), TOO_MUCH)
def test_what_does_not_fit_is_refused_by_forward(device, dtype, tokens, width, reason):
    with fused(), pytest.raises(RuntimeError, match=f"attention=fused_backward, which cannot run .*: {reason}"):
        kernels.attention(packed(device, dtype, 1, tokens, 1, width), 1)


@pytest.mark.parametrize("times", [3, pytest.param(50, marks=pytest.mark.card)])
def test_every_run_has_the_same_bits(device, times):
    batch, tokens, heads = (64, 198, 12) if device == "cuda" else (1, 70, 1)
    qkv = packed(device, torch.float16, batch, tokens, heads, 64)
    bias = torch.zeros(3 * heads * 64, device=device, requires_grad=True)

    def run():
        with fused():
            out = kernels.attention(qkv, heads, bias=bias)
            return out, *torch.autograd.grad(out.float().square().sum(), (qkv, bias))

    repeated(run, times)


@pytest.mark.parametrize(
    ("version", "arch", "stages"),
    [((3, 9), 80, 2), ((3, 9), 90, 1), ((3, 9), 100, 2), ((3, 6), 80, 1), ((3, 10), 80, 2)],
)
def test_loads_are_ahead_where_that_does_not_spill(monkeypatch, version, arch, stages):
    monkeypatch.setattr(_triton, "VERSION", version)
    qkv, out = (torch.empty(2, 198, size, dtype=torch.float16, device="meta") for size in (192, 64))
    with _triton.recording(arch) as recorded:
        fused_backward.backward(out, qkv, out, torch.empty(2, 1, 198, device="meta"), 1, 0.125, False, None)
    assert [launch.stages for launch in recorded.launches] == [stages]


def test_not_on_a_triton_that_spills(monkeypatch):
    capability = next(b for b in _op.OPS["attention"].backends if b.name == "fused_backward").capability
    monkeypatch.setattr(_triton, "_arch_of", lambda device: 80)
    cuda = torch.device("cuda")
    assert capability(cuda, False) == (True, f"Triton {triton.__version__} on sm_80")
    monkeypatch.setattr(_triton, "VERSION", (3, 4))
    assert capability(cuda, False) == (
        False,
        f"it needs Triton 3.5 or newer, not {triton.__version__}, whose code of it is slow",
    )
    assert capability(cuda, True) == (True, f"Triton {triton.__version__} on sm_80")
