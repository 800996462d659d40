"""The attention of others, on stand-ins that take their calls and compute in PyTorch: every argument that they get, the
layouts that they give, and what the op makes of it. PyTorch's FlashAttention for CPUs runs as it is."""

import inspect
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastdeit import kernels
from fastdeit.bench.count import CARD, counted_card
from fastdeit.kernels import _op, _triton
from fastdeit.kernels.attention import libraries
from fastdeit.kernels.attention.op import OP
from fastdeit.kernels.trial import candidates, store
from tests.kernels import proof
from tests.kernels.proof import repeated
from tests.kernels.test_attention import packed
from tests.kernels.trials import clock

prove = partial(proof.prove, rounded_operands=True)
CUDA, CPU = torch.device("cuda"), torch.device("cpu")
HALVES = torch.float16, torch.bfloat16
SCALE = 0.3


# ---- stand-ins -------------------------------------------------------------------------------------------------------


def forward(q, k, v, scale):
    """(out, lse) of q, k and v `[B, H, N, d]`: products in 16 bit, summed in float32."""
    logits = scale * q.float() @ k.float().mT
    out = logits.softmax(-1).to(q.dtype).float() @ v.float()
    return out.to(q.dtype), logits.logsumexp(-1)


def backward(grad, q, k, v, out, lse, scale):
    q32, k32, v32, grad32 = (x.float() for x in (q, k, v, grad))
    p = torch.exp(scale * q32 @ k32.mT - lse[..., None])
    ds = (scale * p * (grad32 @ v32.mT - (grad32 * out.float()).sum(-1, keepdim=True))).to(q.dtype).float()
    return tuple(x.to(q.dtype) for x in (ds @ k32, ds.mT @ q32, p.to(q.dtype).float().mT @ grad32))


def as_laid_out(x):
    """`[B, H, N, d]` with the memory of `[B, N, H, d]`, as all of them return it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


class Card(TorchDispatchMode):
    """A card's kernels of PyTorch, by their names and signatures, that are not there for tensors on the CPU."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        run = getattr(self, function.overloadpacket.__name__, None)
        if run is None:
            return function(*args, **kwargs or {})
        self.calls.append(function.overloadpacket.__name__)
        return run(*args, **kwargs or {})

    def _scaled_dot_product_flash_attention(self, q, k, v, dropout=0.0, causal=False, debug=False, *, scale):
        assert (dropout, causal, debug) == (0, False, False)
        out, lse = forward(q, k, v, scale)
        return as_laid_out(out), lse, None, None, q.shape[2], q.shape[2], None, None, None

    def _scaled_dot_product_flash_attention_backward(
        self, grad, q, k, v, out, lse, cum_q, cum_k, max_q, max_k, dropout, causal, seed, offset, *, scale
    ):
        assert (cum_q, cum_k, max_q, max_k, dropout, causal) == (None, None, q.shape[2], k.shape[2], 0, False)
        assert (seed.dtype, seed.shape, offset.dtype, offset.shape) == (torch.uint64, (2,), torch.uint64, ())
        return tuple(as_laid_out(x) for x in backward(grad, q, k, v, out, lse, scale))

    def _scaled_dot_product_cudnn_attention(self, q, k, v, bias, with_lse, dropout=0.0, causal=False, *, scale=None):
        assert (bias, with_lse, dropout, causal) == (None, True, 0, False)
        if q.device.type == "meta":
            return q, torch.empty(1, 1, 2, 1, device="meta"), None, None, 2, 2, None, None, None
        out, lse = forward(q, k, v, scale)
        return as_laid_out(out), lse[..., None], None, None, q.shape[2], q.shape[2], None, None, None

    def _scaled_dot_product_cudnn_attention_backward(
        self, grad, q, k, v, out, lse, seed, offset, bias, cum_q, cum_k, max_q, max_k, dropout, causal, *, scale
    ):
        assert (cum_q, cum_k, max_q, max_k, dropout, causal) == (None, None, q.shape[2], k.shape[2], 0, False)
        assert bias is None
        assert seed.dtype == offset.dtype == torch.int64
        assert lse.is_contiguous()
        return backward(grad, q, k, v, out, lse.squeeze(-1), scale)

    def _scaled_dot_product_efficient_attention(self, q, k, v, bias, with_lse, dropout=0.0, causal=False, *, scale):
        assert (bias, with_lse, dropout, causal) == (None, True, 0, False)
        out, lse = forward(q, k, v, scale)
        padded = lse.new_full((*lse.shape[:2], -(-lse.shape[2] // 32) * 32), float("nan"))
        padded[..., : lse.shape[2]] = lse
        return as_laid_out(out), padded, torch.empty((), dtype=torch.int64), torch.empty((), dtype=torch.int64)

    def _efficient_attention_backward(self, grad, q, k, v, bias, out, cum_q, cum_k, max_q, max_k, lse, *rest, **named):
        dropout, seed, offset, mask, bias_too = rest
        assert (bias, cum_q, cum_k, max_q, max_k) == (None, None, None, q.shape[1], k.shape[1])
        assert (dropout, mask, bias_too) == (0, 0, False)
        assert seed.dtype == offset.dtype == torch.int64
        assert (named.pop("num_splits_key"), named.pop("shared_storage_dqdkdv")) == (1, True)
        assert lse.shape[2] % 32 == 0
        assert grad.is_contiguous()
        tensors = (x.transpose(1, 2) for x in (grad, q, k, v, out))
        found = backward(*tensors, lse[:, :, : q.shape[1]], named.pop("scale"))
        assert not named
        chunk = torch.stack([x.transpose(1, 2) for x in found], 2)
        return *chunk.unbind(2), torch.empty(())


class Packages:
    """FlashAttention-3 and -4 by the functions that are called of them."""

    def __init__(self, monkeypatch):
        self.calls = []
        fa3 = SimpleNamespace(_flash_attn_forward=self.forward("fa3"), _flash_attn_backward=self.backward_3)
        fa4 = SimpleNamespace(_flash_attn_fwd=self.forward("fa4"), _flash_attn_bwd=self.backward_4)
        modules = {"flash_attn_interface": fa3, "flash_attn.cute.interface": fa4}
        monkeypatch.setattr(libraries, "import_module", modules.__getitem__)

    def forward(self, name):
        def run(q, k, v, softmax_scale, return_lse=None):
            assert return_lse is (True if name == "fa4" else None)
            assert not q.is_contiguous()  # a view of the packed tensor
            self.calls.append(name)
            out, lse = forward(*(x.transpose(1, 2) for x in (q, k, v)), softmax_scale)
            return out.transpose(1, 2).contiguous(), lse, None, None

        return run

    def backward_3(self, dout, q, k, v, out, lse, *, dq, dk, dv, softmax_scale, deterministic):
        self.write("fa3", dout, q, k, v, out, lse, softmax_scale, deterministic, (dq, dk, dv))

    def backward_4(self, q, k, v, out, dout, lse, *, dq, dk, dv, softmax_scale, deterministic):
        self.write("fa4", dout, q, k, v, out, lse, softmax_scale, deterministic, (dq, dk, dv))

    def write(self, name, dout, q, k, v, out, lse, scale, deterministic, written):
        assert deterministic is True
        assert out.is_contiguous()
        assert dout.is_contiguous()
        self.calls.append(f"{name} backward")
        found = backward(*(x.transpose(1, 2) for x in (dout, q, k, v, out)), lse, scale)
        for place, gradient in zip(written, found, strict=True):
            place.copy_(gradient.transpose(1, 2))


def backend_of(name):
    return next(backend for backend in OP.backends if backend.name == name)


CALLS = {
    "fa3": ["fa3", "fa3 backward"],
    "fa4": ["fa4", "fa4 backward"],
    "efficient": ["_scaled_dot_product_efficient_attention", "_efficient_attention_backward"],
    "flash": ["_scaled_dot_product_flash_attention", "_scaled_dot_product_flash_attention_backward"],
    "cudnn": ["_scaled_dot_product_cudnn_attention", "_scaled_dot_product_cudnn_attention_backward"],
}


@pytest.fixture(params=CALLS)
def library(request, monkeypatch):
    """(name of a backend whose kernels are stand-ins, the calls that these got)."""
    able = [
        backend._replace(
            capability=lambda device, forced: (forced, "stand-in"),
            # A copy, which is not taken for what has kernels of its own on a CPU.
            forward=partial(backend.forward.func, backend.forward.args[0]._replace()),
            backward=partial(backend.backward.func, backend.backward.args[0]._replace()),
        )
        if backend.name == request.param
        else backend
        for backend in OP.backends
    ]
    monkeypatch.setattr(OP, "backends", tuple(able))
    libraries._cudnn_lse_dimensions.cache_clear()
    packages = Packages(monkeypatch)
    with Card() as card:
        yield request.param, packages.calls if request.param.startswith("fa") else card.calls
    libraries._cudnn_lse_dimensions.cache_clear()


# ---- the same result -------------------------------------------------------------------------------------------------


def given_of(dtype, tokens, with_bias=True, heads=2, width=16):
    bias = torch.zeros(3 * heads * width, dtype=dtype, requires_grad=True) if with_bias else None
    qkv = packed("cpu", dtype, 2, tokens, heads, width)
    return {"qkv": qkv, "num_heads": heads, "scale": SCALE, **({"bias": bias} if with_bias else {})}


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("tokens", "layout"), [(2, "dense"), (33, "expanded"), (64, "strided")])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_as_good_as_pytorch(dtype, tokens, layout, with_bias, library):
    name, calls = library
    prove(kernels.attention, given_of(dtype, tokens, with_bias), layout, mine=kernels.use(attention=name))
    assert [call for call in calls if "cudnn_attention" not in call or name == "cudnn"][:1] == CALLS[name][:1]
    assert calls[-1] == CALLS[name][1]


def test_its_backward_takes_results_in_another_layout(library):
    """The registered op and checkpointing make them dense, which a library's own results need not be."""
    name, calls = library
    given = given_of(torch.float16, 33)
    qkv, backend = given["qkv"].detach(), backend_of(name)
    results = backend.forward(qkv, 2, SCALE, None, None)
    grad = torch.ones_like(results[0])
    mine, theirs = (
        backend.backward(grad, qkv, *tensors, 2, SCALE, True, None) for tensors in (results, _op._contiguous(results))
    )
    assert calls[-1] == CALLS[name][1]
    assert all(map(torch.equal, mine, theirs))
    assert mine[0].is_contiguous()


def test_a_trial_takes_it_for_right(library):
    name, _ = library
    args = [*given_of(torch.bfloat16, 33).values(), None]
    found = candidates.try_out(candidates.Call.of(OP, args, True), [backend_of(name)], 1e9, -1.0, clock)
    assert found.wrong == found.failed == {}
    assert name in found.seconds


def test_a_view_of_a_larger_tensor_that_is_not_aligned(library):
    name, _ = library
    given = given_of(torch.float16, 5, with_bias=False)
    qkv = given["qkv"].detach()
    given["qkv"] = torch.cat([qkv, qkv], 1)[:, 1:6].requires_grad_()
    prove(kernels.attention, given, mine=kernels.use(attention=name))


REFUSED = [
    ({"dtype": torch.float64}, "it does not compute in torch.float64"),
    ({"width": 12}, r"heads are 12 wide, not a multiple of 8 up to \d+"),
    ({"width": 264}, r"heads are 264 wide, not a multiple of 8 up to \d+"),
    ({"tokens": 0}, r"qkv \[2, 0, 96\] is empty"),
]


@pytest.mark.parametrize(("given", "reason"), REFUSED)
def test_what_it_does_not_take_is_refused_by_forward(given, reason, library):
    name, calls = library
    call = given_of(**{"dtype": torch.float16, "tokens": 5, "with_bias": False} | given)
    with (
        kernels.use(attention=name),
        pytest.raises(RuntimeError, match=f"attention={name}, which cannot run .*: {reason}"),
    ):
        kernels.attention(**call)
    assert calls == []


def test_a_mask_of_keys_is_refused(library):
    name, _ = library
    with kernels.use(attention=name), pytest.raises(RuntimeError, match="it does not take a mask of keys here"):
        kernels.attention(**given_of(torch.float16, 5), key_mask=torch.ones(2, 5, dtype=torch.bool))


def test_what_its_forward_refuses_its_backward_refuses_too(library):
    """A compiled graph chooses a backend anew in backward: one that ignored the mask would give wrong gradients."""
    name, calls = library
    qkv = given_of(torch.float16, 5)["qkv"].detach()
    mask = torch.ones(2, 5, dtype=torch.bool)
    out, lse = OP.backends[-1].forward(qkv, 2, SCALE, None, mask)
    with pytest.raises(_op.Unsupported, match="it does not take a mask of keys here"):
        backend_of(name).backward(torch.ones_like(out), qkv, out, lse, 2, SCALE, False, mask)
    assert calls == []


def test_installed_packages_take_these_calls():
    interface = pytest.importorskip("flash_attn.cute.interface", reason="FlashAttention-4 is not installed")
    forward = inspect.signature(interface._flash_attn_fwd).bind(1, 2, 3, softmax_scale=SCALE, return_lse=True)
    assert list(forward.arguments)[:3] == ["q", "k", "v"]
    named = {"dq": 7, "dk": 8, "dv": 9, "softmax_scale": SCALE, "deterministic": True}
    backward = inspect.signature(interface._flash_attn_bwd).bind(1, 2, 3, 4, 5, 6, **named)
    assert list(backward.arguments)[:6] == ["q", "k", "v", "out", "dout", "lse"]


# ---- PyTorch's FlashAttention on a CPU -------------------------------------------------------------------------------


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("tokens", "width", "layout"), [(1, 7, "dense"), (198, 64, "expanded"), (65, 32, "strided")])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_on_a_cpu_it_is_as_good_as_pytorch(dtype, tokens, width, layout, with_bias):
    given = given_of(dtype, tokens, with_bias, width=width)
    prove(kernels.attention, given, layout, mine=kernels.use(attention="flash"))


def test_on_a_cpu_every_run_has_the_same_bits():
    given = given_of(torch.float32, 70)

    def run():
        with kernels.use(attention="flash"):
            out = kernels.attention(**given)
            return out, *torch.autograd.grad(out.square().sum(), (given["qkv"], given["bias"]))

    repeated(run, 3)


@pytest.mark.slow
def test_on_a_cpu_it_is_a_sound_op():
    given = given_of(torch.float32, 5)
    with kernels.use(attention="flash"):
        torch.library.opcheck(OP.registered, (given["qkv"], 2, SCALE, given["bias"], None))


def test_on_a_cpu_it_compiles_to_one_graph_of_the_same_bits():
    torch.compiler.reset()
    given = given_of(torch.float32, 5)

    def run():
        return kernels.attention(**given)

    def gradients(run):
        out = run()
        return out, *torch.autograd.grad(out.square().sum(), (given["qkv"], given["bias"]))

    with kernels.use(attention="flash"):
        compiled = gradients(torch.compile(run, fullgraph=True, backend="aot_eager"))
        assert all(map(torch.equal, compiled, gradients(run)))


# ---- which of them may run -------------------------------------------------------------------------------------------


@pytest.fixture
def card(monkeypatch):
    """Make the card one of an architecture, with these packages installed."""

    def make(arch, *packages):
        monkeypatch.setattr(_triton, "_arch_of", lambda device: arch)
        monkeypatch.setattr(libraries, "installed", lambda package: package in packages)

    monkeypatch.delenv(libraries._RAGGED, raising=False)
    return make


def able(forced):
    return [b.name for b in libraries.BACKENDS if b.capability(CUDA, forced)[0]]


FA3, FA4 = (libraries.FLASH[name].package for name in ("FA3", "FA4"))


@pytest.mark.parametrize(
    ("arch", "packages", "tried", "by_name"),
    [
        (70, [FA3, FA4], [], ["efficient"]),
        (80, [FA3, FA4], ["efficient"], ["efficient", "flash", "cudnn"]),
        (90, [], ["efficient"], ["efficient", "flash", "cudnn"]),
        (90, [FA3, FA4], ["fa3", "fa4", "efficient"], ["fa3", "fa4", "efficient", "flash", "cudnn"]),
        (100, [FA3, FA4], ["fa4", "efficient"], ["fa4", "efficient", "flash", "cudnn"]),
    ],
)
def test_a_trial_takes_only_what_repeats_its_bits(arch, packages, tried, by_name, card):
    card(arch, *packages)
    assert able(False) == tried
    assert able(True) == by_name


def test_where_determinism_is_asked_for(card, monkeypatch):
    card(90)
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert able(False) == ["efficient", "flash"]
    assert able(True) == ["efficient", "flash"]
    monkeypatch.setattr(torch, "is_deterministic_algorithms_warn_only_enabled", lambda: True)
    assert able(False) == ["efficient"]  # PyTorch warns, and adds in no fixed order all the same
    assert able(True) == ["efficient", "flash", "cudnn"]


@pytest.mark.parametrize(
    ("name", "arch", "forced", "reason"),
    [
        ("fa3", 80, True, "FA3 needs sm_90, not sm_80"),
        ("fa4", 80, True, "FA4 needs sm_90 or sm_100, not sm_80"),
        ("fa4", 90, True, "FA4 on sm_90"),
        ("cudnn", 75, True, "cuDNN's attention needs sm_80 or newer, not sm_75"),
        ("cudnn", 90, False, "its backward adds in no fixed order, so it runs where it is asked for by name"),
        ("flash", 75, True, "PyTorch's FlashAttention needs sm_80 or newer, not sm_75"),
        ("efficient", 75, False, "on cards before sm_80 it runs where it is asked for by name"),
    ],
)
def test_the_reason(name, arch, forced, reason, card):
    card(arch, FA3, FA4)
    assert next(b for b in libraries.BACKENDS if b.name == name).capability(CUDA, forced)[1] == reason


def test_what_is_not_installed_is_named(card):
    card(90)
    reasons = [backend.capability(CUDA, True) for backend in libraries.BACKENDS[:2]]
    assert reasons == [
        (False, f"{name} is not installed: there is no package {package}")
        for name, package in (("FA3", FA3), ("FA4", FA4))
    ]


def test_cudnn_is_refused_where_pytorch_lays_out_its_logarithms_otherwise(card, monkeypatch):
    card(90)
    monkeypatch.setenv(libraries._RAGGED, "1")
    assert "cudnn" not in able(True)


def test_ours_come_first():
    with counted_card(90):
        assert OP.select(CARD)[0].name == "triton"


def test_without_a_card_only_flash_runs_and_only_by_name():
    assert [b.name for b in libraries.BACKENDS if b.capability(CPU, True)[0]] == ["flash"]
    assert not any(b.capability(CPU, False)[0] for b in libraries.BACKENDS)


def test_a_package_is_looked_for_and_not_imported():
    assert libraries.installed("xdist")
    assert not libraries.installed("no_such_package")
    assert not libraries.installed("no_such_package.inner")
    assert "flash_attn" not in sys.modules


def test_what_a_trial_has_found_holds_for_these_versions_of_packages(monkeypatch):
    monkeypatch.setattr(store, "_PACKAGES", ("pytest", "no-such-package"))
    store._others.cache_clear()
    assert store.place(CPU, "wall")["others"] == {"pytest": pytest.__version__}
    store._others.cache_clear()
