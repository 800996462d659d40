"""Attention's Gluon kernels, run on the machine."""

from unittest import mock

import pytest
import torch
import triton

from fastdeit import kernels
from fastdeit.kernels import _op, _triton
from fastdeit.kernels.attention.hopper import backend

if _triton.VERSION < backend.COMPILER:
    pytest.skip("this Triton has no Gluon for Hopper", allow_module_level=True)

from fastdeit.kernels.attention.hopper import tiles
from tests.kernels.gluon.on_machine import far, on_machine, packed, prove

BF16, FP16 = torch.bfloat16, torch.float16
EVERY = [
    *((BF16, 2), (FP16, 16), (BF16, 17), (FP16, 49), (BF16, 64), (FP16, 80), (BF16, 96), (FP16, 128), (BF16, 129)),
    *((FP16, 160), (BF16, 191), (FP16, 193), (BF16, 196), (FP16, 197), (BF16, 207)),
]
QUICK = [(BF16, 1, False), (FP16, 63, True), (BF16, 65, True), (FP16, 145, False), (BF16, 198, True), (FP16, 208, True)]
CAPABILITY = next(b for b in _op.OPS["attention"].backends if b.name == "hopper").capability


@pytest.mark.parametrize(("dtype", "tokens", "bias"), QUICK)
def test_as_good_as_pytorch(dtype, tokens, bias):
    few = 1 if tokens > 150 else 2
    prove(packed(dtype, few, tokens, few), few, bias=bias)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tokens"), EVERY)
def test_every_kind_of_chunks(dtype, tokens):
    prove(packed(dtype, 1, tokens, 2), 2, bias=tokens % 2 > 0, layout="strided" if tokens % 3 else "expanded")


@pytest.mark.parametrize(("size", "scale"), [(1e-3, None), (30.0, None), (1.0, 0.3), (1.0, 2.0)])
def test_huge_and_tiny_logits(size, scale):
    prove(packed(FP16, 1, 70, 1, size), 1, bias=False, scale=scale)


@pytest.mark.parametrize("sign", [1, -1])
def test_logits_far_from_zero_do_not_reach_the_padding(sign):
    prove(far(FP16, 70, sign), 1)


@pytest.mark.parametrize("part", [0, 1, 2], ids=["q", "k", "v"])
def test_what_is_not_finite_stays_in_its_sample(part):
    """The boxes of the first sample reach beyond its tokens, but not into the second one's."""
    qkv = packed(BF16, 2, 20, 2).detach()
    qkv[1, 0, part * 128 + 3] = float("nan")
    results = []
    for context in (on_machine(), kernels.use("reference")):
        x = qkv.clone().requires_grad_()
        with context:
            out = kernels.attention(x, 2)
            results.append((out, *torch.autograd.grad(out.float().square().sum(), x)))
    for mine, theirs in zip(*results, strict=True):
        assert mine[1].isnan().any()
        assert torch.equal(mine.isnan(), theirs.isnan())


def test_every_order_of_the_programs_has_the_same_bits():
    qkv, bias = packed(BF16, 2, 70, 2), torch.zeros(384, requires_grad=True)
    outcomes = []
    for order in ("forward", "reverse"):
        with on_machine(order) as launched:
            out = kernels.attention(qkv, 2, bias=bias)
            outcomes.append((out, *torch.autograd.grad(out.float().square().sum(), (qkv, bias))))
        assert launched == ["forward_kernel", "backward_kernel"]
    for one, other in zip(*outcomes, strict=True):
        assert torch.equal(one, other)


def test_without_a_bias_the_gradient_of_qkv_has_the_same_bits():
    qkv, bias = packed(BF16, 1, 70, 1), torch.zeros(192, requires_grad=True)
    with on_machine():
        with_bias, without = (kernels.attention(qkv, 1, bias=b).float().square().sum() for b in (bias, None))
        assert torch.equal(torch.autograd.grad(with_bias, qkv)[0], torch.autograd.grad(without, qkv)[0])


def test_tensors_of_any_layout():
    qkv = packed(FP16, 1, 20, 1).detach()
    with on_machine():
        out = kernels.attention(qkv, 1)
        shifted = torch.zeros(qkv.numel() + 1, dtype=FP16)[1:].view_as(qkv).copy_(qkv)
        assert shifted.data_ptr() % 16
        assert torch.equal(kernels.attention(shifted, 1), out)
        assert torch.equal(kernels.attention(qkv.repeat(1, 1, 2)[..., :192], 1), out)
        # Contiguous, and TMA would not take the strides of the dimensions of size 1.
        odd = qkv[:, :1].contiguous().as_strided((1, 1, 192), (1, 1, 1))
        assert torch.equal(kernels.attention(odd, 1), kernels.attention(qkv[:, :1], 1))


def test_chunks_cover_the_tokens():
    for tokens in range(1, 257):
        sizes = tiles.chunks(tokens)
        assert tokens <= sum(sizes) < tokens + (64 if sizes[-1] == 64 else sizes[-1])
        assert len(sizes) <= 3
        assert all(size % 64 == 0 for size in sizes[:-1])
    assert tiles.chunks(198) == (128, 64, 16)


REFUSED = [
    (FP16, (1, 209, 1, 64), {}, "209 tokens, at most 208 fit one program"),
    (FP16, (1, 5, 1, 32), {}, "heads are 32 wide, not 64"),
    (torch.float32, (1, 5, 1, 64), {}, "it computes in 16 bit, not in torch.float32"),
    (FP16, (1, 0, 1, 64), {}, r"qkv \[1, 0, 192\] is empty"),
    (FP16, (1, 5, 1, 64), {"scale": 0.0}, "the scale is 0, not positive"),
    (FP16, (1, 5, 1, 64), {"scale": -2.0}, "the scale is -2, not positive"),
    (FP16, (1, 5, 1, 64), {"key_mask": torch.ones(1, 5, dtype=torch.bool)}, "it does not take a mask of keys"),
]


@pytest.mark.parametrize(("dtype", "shape", "options", "reason"), REFUSED)
def test_what_does_not_fit_is_refused_by_forward(dtype, shape, options, reason):
    *shape, width = shape
    with on_machine(), pytest.raises(RuntimeError, match=f"attention=hopper, which cannot run .*: {reason}"):
        kernels.attention(packed(dtype, *shape, width=width), shape[2], **options)


@pytest.mark.parametrize(
    ("arch", "version", "expected"),
    [
        (90, (3, 8), (True, f"Gluon of Triton {triton.__version__} on sm_90")),
        (90, (3, 7), (False, f"it needs Triton 3.8 or newer, not {triton.__version__}")),
        (80, (3, 8), (False, "it needs sm_90, not sm_80")),
        (100, (3, 8), (False, "it needs sm_90, not sm_100")),
    ],
)
@pytest.mark.parametrize("forced", [False, True])
def test_where_it_runs(monkeypatch, arch, version, expected, forced):
    monkeypatch.setattr(_triton, "_arch_of", lambda device: arch)
    monkeypatch.setattr(_triton, "VERSION", version)
    assert CAPABILITY(torch.device("cuda"), forced) == expected
    assert CAPABILITY(torch.device("cpu"), forced) == (False, "no CUDA device")


def test_another_gluon_is_a_reason_and_no_error(monkeypatch):
    monkeypatch.setattr(backend, "import_module", mock.Mock(side_effect=ImportError("no warpgroup_mma")))
    reason = f"Gluon of Triton {triton.__version__} is not as it was: no warpgroup_mma"
    with on_machine(), pytest.raises(RuntimeError, match=reason):
        kernels.attention(packed(FP16, 1, 5, 1), 1)


def test_a_card_of_sm_90_prefers_triton_until_it_has_tried_both(monkeypatch):
    monkeypatch.setattr(_triton, "_arch_of", lambda device: 90)
    ours = [b for b in _op.OPS["attention"].backends if b.name in ("triton", "fused_backward", "hopper")]
    able = [b.name for b in ours if b.capability(torch.device("cuda"), False)[0]]
    assert able == ["triton", "fused_backward", "hopper"]
    assert "hopper" not in {row["attention"]["backend"] for row in _op._measured().values()}
