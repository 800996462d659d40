"""Attention of the native library: its CUDA source, run on the CPU by the SIMT shim."""

import ctypes

import pytest
import torch

from fastdeit import kernels
from tests.kernels.native.natively import packed, prove
from tests.kernels.native.simt import HEAD_DIMS

_FORWARD, _QUERY_GRADIENT, _KEY_GRADIENT, _BIAS_GRADIENT = range(4)


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 50])
def test_as_good_as_pytorch(native, tokens):
    prove(native, packed(2, tokens, 2, 64), 2)


def test_as_good_as_pytorch_for_a_vit(native):
    prove(native, packed(1, 198, 1, 64), 1)


@pytest.mark.slow
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 50, 64, 65, 145, 197, 198, 257])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_head_dim_and_number_of_tokens(every_native, head_dim, tokens, bias):
    prove(every_native, packed(2, tokens, 3, head_dim), 3, bias=bias)


@pytest.mark.slow
@pytest.mark.parametrize("tokens", [577, 1025])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_long_sequences(every_native, head_dim, tokens):
    """Without the bias for the longest: what rounding the probabilities to 16 bit leaves in its sums is some units of
    PyTorch's error there, which is twice as large or not by chance."""
    prove(every_native, packed(1, tokens, 1, head_dim), 1, bias=tokens < 1000)


def test_without_a_bias_nothing_is_summed(native):
    prove(native, packed(2, 17, 1, 64), 1, bias=False)


@pytest.mark.parametrize(("size", "scale"), [(1e-3, None), (30.0, None), (1.0, 0.3), (1.0, -2.0), (1.0, 0.0)])
def test_huge_and_tiny_logits(native, size, scale):
    prove(native, packed(1, 70, 1, 64, size), 1, bias=False, scale=scale)


@pytest.mark.parametrize("sign", [1, -1])
def test_logits_far_from_zero_do_not_reach_the_padding(native, sign):
    """All logits near +-6,400: the exponential of a missing key, whose logit is 0, would be 0 or infinite."""
    x = packed(1, 70, 1, 64, 0.1).detach().float()
    x[..., :64] += 20.0
    x[..., 64:128] += sign * 40.0
    prove(native, x.half().requires_grad_(), 1)


def test_logits_that_overflow_16_bit(native):
    x = packed(1, 33, 1, 64, 0.1).detach().float()
    x[..., :128] += 40.0
    q, k, _ = x.chunk(3, -1)
    assert (q @ k.mT).min() > torch.finfo(torch.float16).max
    prove(native, x.half().requires_grad_(), 1, bias=False)


@pytest.mark.parametrize("part", [0, 1, 2], ids=["q", "k", "v"])
def test_not_finite_where_pytorch_is_not(native, part):
    qkv = packed(2, 20, 2, 64).detach()
    qkv[1, 7, part * 128 + 3] = float("nan")
    out, _ = native.forward(qkv, 2, 0.125)
    assert torch.equal(out.isnan(), kernels.attention(qkv, 2).isnan())


def results(native, seed):
    qkv = packed(2, 70, 1, 64).detach()
    out, lse = native.forward(qkv, 1, 0.125, seed)
    return out, lse, *native.backward(out, qkv, out, lse, 1, 0.125, True, seed)


def test_every_order_of_the_threads_has_the_same_bits(native):
    first = results(native, seed=0)
    for seed in (1, 2):
        for one, other in zip(first, results(native, seed), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("head_dim", [64, *(pytest.param(d, marks=pytest.mark.slow) for d in (32, 96, 128))])
def test_the_table_of_launches(request, head_dim):
    """The arithmetic in `kernels/launch.h`, which a program that launches the kernels by name repeats."""
    shape = request.getfixturevalue("native" if head_dim == 64 else "every_native").launch_shape
    rows = 2 * (head_dim + 8)
    for tokens, blocks in ((1, 1), (64, 1), (65, 2), (198, 4), (1025, 17)):
        grid = blocks * 12 * 5
        assert shape(_FORWARD, 5, tokens, 12, head_dim) == (grid, 128, 128 * rows + 10240 + 256)
        assert shape(_QUERY_GRADIENT, 5, tokens, 12, head_dim) == (grid, 128, 192 * rows + 10240)
        assert shape(_KEY_GRADIENT, 5, tokens, 12, head_dim) == (grid, 128, 192 * rows + 10240 + 256)
    assert shape(_BIAS_GRADIENT, 5, 198, 12, head_dim) == (3 * 12 * head_dim // 32, 256, 1024)
    assert max(shape(kernel, 5, 198, 12, head_dim)[2] for kernel in range(4)) <= 96 * 1024


def call(native, name, changes):
    """The status of a call that is right but for `changes`, by names of parameters."""
    memory = (ctypes.c_char * 65536)()
    at = -ctypes.addressof(memory) % 64 + ctypes.addressof(memory)
    names = {
        "forward": ["qkv", "out", "lse"],
        "backward": ["grad", "qkv", "out", "lse", "dqkv", "dbias", "delta", "partial"],
    }
    given = dict.fromkeys(names[name], at) | {"batch": 1, "tokens": 1, "heads": 1, "head_dim": 64, "dtype": 1} | changes
    pointers = [ctypes.c_void_p(given[pointer]) for pointer in names[name]]
    sizes = [ctypes.c_int64(given[size]) for size in ("batch", "tokens", "heads", "head_dim")]
    function = getattr(native.library, f"fastdeit_attention_{name}")
    return native.status_text(function(*pointers, *sizes, ctypes.c_float(1), given["dtype"], None))


@pytest.mark.parametrize("name", ["forward", "backward"])
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"qkv": None}, "a pointer is null"),
        ({"lse": None}, "a pointer is null"),
        ({"dtype": 2}, "only float16 is supported"),
        ({"head_dim": 48}, "the library has no kernel for this head dim: 32, 64, 96 and 128 exist"),
        ({"tokens": 0}, "a size is not positive, or too large for one launch"),
        ({"batch": -1}, "a size is not positive, or too large for one launch"),
        ({"batch": 2**31, "tokens": 65}, "a size is not positive, or too large for one launch"),
        ({"heads": 2**40}, "a size is not positive, or too large for one launch"),
        ({"qkv": 8}, "a 16-bit tensor is not aligned to 16 bytes, or a float32 tensor not to 4"),
        ({"lse": 2}, "a 16-bit tensor is not aligned to 16 bytes, or a float32 tensor not to 4"),
    ],
)
def test_mistakes_of_a_caller(native, name, changes, said):
    assert call(native, name, changes) == said


@pytest.mark.parametrize("missing", ["dbias", "partial"])
def test_the_gradient_of_a_bias_needs_its_scratch(native, missing):
    assert call(native, "backward", {missing: None}) == "a pointer is null"


def test_the_version_is_that_of_the_header(native):
    assert native.library.fastdeit_native_api_version() == 1
    assert native.status_text(99) == "no such status"
