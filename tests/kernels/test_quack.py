"""The backend that compares with QuACK: its arguments and results on a stand-in, its calls where QuACK is installed."""

import inspect
import re
from pathlib import Path

import pytest
import torch

from fastdeit import kernels
from fastdeit.kernels._op import OPS, Unsupported
from fastdeit.kernels._triton import INTERPRETED
from fastdeit.kernels.mlp import cute_gelu, gelu, quack
from tests.kernels.proof import laid_out, normal, prove

CUDA = torch.device("cuda")
HALVES = [torch.float16, *([] if INTERPRETED else [torch.bfloat16])]


def product(a, b, bias=None):
    """Of 16-bit matrices, summed in float32, as tensor cores do; rows are contiguous and aligned."""
    assert a.dim() == b.dim() == 2
    assert a.stride(1) == 1
    assert 1 in b.stride()
    total = a.float() @ b.float()
    return total if bias is None else total + bias.float()


def gelu_gradient(pre, dact):
    """(dact * gelu'(pre), gelu(pre)) in float32."""
    leaf = pre.float().requires_grad_()
    with torch.enable_grad():
        act = torch.nn.functional.gelu(leaf)
    return torch.autograd.grad(act, leaf, dact)[0], act.detach()


class StandIn:
    """What QuACK's functions compute, by their signatures, and the calls that they got."""

    def __init__(self):
        self.calls = []

    def gemm_act(self, *args, **kwargs):
        self.calls.append(("gemm_act", args, kwargs))
        return self._act(*args, **kwargs)

    def gemm_dact(self, *args, **kwargs):
        self.calls.append(("gemm_dact", args, kwargs))
        return self._dact(*args, **kwargs)

    def dact_dbias_mod(self, activation):
        def epilogue(*args, **kwargs):
            self.calls.append(("dact_dbias_mod", args, kwargs))
            return self._dact_dbias(activation, *args, **kwargs)

        return epilogue

    def _act(self, A, B, C=None, bias=None, activation=None, *, tuned=True):
        assert (C, activation, tuned) == (None, cute_gelu.NAME, False)
        pre = product(A, B, bias)
        return pre.to(A.dtype), torch.nn.functional.gelu(pre).to(A.dtype)

    def _dact(self, A, B, PreAct, activation=None, *, tuned=True):
        assert (activation, tuned) == (cute_gelu.NAME, False)
        dpre, act = gelu_gradient(PreAct, product(A, B))
        return dpre.to(A.dtype), act.to(PreAct.dtype)

    def _dact_dbias(self, activation, A, B, C=None, *, tuned=True):
        assert (activation, tuned) == (cute_gelu.NAME, False)
        dpre, _ = gelu_gradient(C, product(A, B))
        return {"D": dpre.to(A.dtype), "dwb": dpre.sum(0)}


@pytest.fixture
def stand_in(monkeypatch):
    found = StandIn()
    monkeypatch.setattr(
        quack, "_quack", lambda: quack._Functions(found.gemm_act, found.gemm_dact, found.dact_dbias_mod)
    )
    for op in (OPS["mlp"], OPS["layer_norm_mlp"]):
        able = [
            b._replace(capability=lambda device, forced: (forced, "stand-in")) if b.name == "quack" else b
            for b in op.backends
        ]
        monkeypatch.setattr(op, "backends", tuple(able))
    return found


def inputs(dtype, *shape, hidden=40):
    width = shape[-1]
    shapes = {"w1": (hidden, width), "b1": (hidden,), "w2": (width, hidden), "b2": (width,)}
    given = {"x": normal(*shape, dtype=dtype, device="cpu", seed=0)}
    for seed, (name, size) in enumerate(shapes.items(), start=2):
        given[name] = (normal(*size, dtype=torch.float32, device="cpu", seed=seed) * size[-1] ** -0.5).to(dtype)
    return {name: tensor.requires_grad_() for name, tensor in given.items()}


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("layout", ["dense", "strided"])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [(2, 7, 24), (130, 16)])
def test_as_good_as_pytorch(shape, dtype, layout, recompute, stand_in):
    prove(kernels.mlp, inputs(dtype, *shape) | {"recompute": recompute}, layout, mine=kernels.use(mlp="quack"))
    assert [name for name, *_ in stand_in.calls] == ["gemm_act", "gemm_dact" if recompute else "dact_dbias_mod"]


@pytest.mark.parametrize("recompute", [True, False])
def test_after_a_layer_norm(recompute, stand_in):
    norm = {
        name: normal(24, dtype=torch.float32, device="cpu", seed=seed).requires_grad_()
        for seed, name in enumerate(("weight", "bias"), start=8)
    }
    given = inputs(torch.float16, 2, 7, 24) | norm | {"eps": 1e-6, "recompute": recompute}
    prove(kernels.layer_norm_mlp, given, mine=kernels.use(layer_norm_mlp="quack"))
    assert len(stand_in.calls) == 2


def test_weights_of_any_layout(stand_in):
    given = inputs(torch.float16, 2, 7, 24)
    for name in ("w1", "w2"):
        given[name] = laid_out(given[name].detach(), "strided").requires_grad_()
    prove(kernels.mlp, given, mine=kernels.use(mlp="quack"))


@pytest.mark.parametrize("recompute", [True, False])
def test_installed_quack_takes_these_calls(recompute, stand_in):
    pytest.importorskip("quack.gemm_interface", reason="QuACK is not installed")
    with kernels.use(mlp="quack"):
        kernels.mlp(**inputs(torch.float16, 2, 7, 24), recompute=recompute).sum().backward()
    from quack import activation
    from quack.epilogue.library import dact_dbias_mod
    from quack.gemm_interface import gemm_act, gemm_dact

    cute_gelu.register(activation)

    installed = {"gemm_act": gemm_act, "gemm_dact": gemm_dact, "dact_dbias_mod": dact_dbias_mod(cute_gelu.NAME)}
    for name, args, kwargs in stand_in.calls:
        bound = inspect.signature(installed[name]).bind(*args, **kwargs)
        assert "operands" not in bound.arguments  # where a keyword that it does not know would land


def test_installed_quack_has_what_is_looked_for():
    pytest.importorskip("quack.gemm_interface", reason="QuACK is not installed")
    assert quack._quack() is not None


def test_what_quack_does_not_take():
    x = torch.zeros(8, 24, dtype=torch.float16)
    for given, reason in (
        ((x.float(), x.float()), "16-bit operands, not torch.float32"),
        ((x, x.bfloat16()), "operands are torch.float16 and torch.bfloat16"),
        ((x[:0], x), "an operand is empty"),
        ((x[:, :12].contiguous(), x), "rows of 16 bytes or a multiple"),
        ((x.flatten()[4:12].view(1, 8), x), "aligned"),
    ):
        with pytest.raises(Unsupported, match=reason):
            quack.product_gelu(*given, x[0])
        with pytest.raises(Unsupported, match=reason):
            quack.product_gelu_backward(*given, x, act=True)


def test_quack_runs_only_where_it_is_asked_for(monkeypatch):
    assert not quack.capability(CUDA, forced=False)[0]
    assert quack.capability(torch.device("cpu"), forced=True) == (False, "no CUDA device")
    monkeypatch.setattr(quack._triton, "_arch_of", lambda device: 80)
    assert quack.capability(CUDA, forced=True) == (False, "it needs sm_90 or newer, not sm_80")
    monkeypatch.setattr(quack._triton, "_arch_of", lambda device: 90)
    monkeypatch.setattr(quack, "_quack", lambda: None)
    assert not quack.capability(CUDA, forced=True)[0]
    assert "pip install 'fastdeit[quack]'" in quack.capability(CUDA, forced=True)[1]
    monkeypatch.setattr(quack, "_quack", lambda: quack._Functions(None, None, None))
    assert quack.capability(CUDA, forced=True) == (True, "QuACK")


def test_an_older_quack_counts_as_none(monkeypatch):
    parts = {
        "quack.activation": {"dact_fn_map": {"gelu_erf": None}},
        "quack.gemm_interface": {"gemm_act": len, "gemm_dact": len},
        "quack.epilogue.library": {"dact_dbias_mod": len},
    }

    monkeypatch.setattr(cute_gelu, "register", lambda activation: activation.dact_fn_map)

    def found(changes):
        modules = {name: type("module", (), members) for name, members in (parts | changes).items()}
        monkeypatch.setattr(quack, "import_module", modules.__getitem__)
        return quack._quack.__wrapped__()

    assert found({}) == (len, len, len)
    assert found({"quack.activation": {"dact_fn_map": {"gelu_tanh_approx": None}}}) is None
    assert found({"quack.epilogue.library": {}}) is None


def cut(x, end):
    return x.clamp(-end, end)


@pytest.mark.parametrize("dtype", HALVES)
def test_our_gelu_in_its_products_is_as_good_as_pytorchs(dtype):
    """The arithmetic of the epilogue, in float32, of every number of 16 bit up to 8: at most twice PyTorch's error and
    a unit of rounding."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = numbers[numbers.isfinite() & (numbers.abs() <= 8)]
    truth = x.double().requires_grad_()
    exact = torch.nn.functional.gelu(truth)
    (slope,) = torch.autograd.grad(exact.sum(), truth)
    gradient, value = cute_gelu.value_and_gradient(x.float(), torch.ones(len(x)), cut, torch.exp2)
    leaf = x.clone().requires_grad_()
    theirs = torch.nn.functional.gelu(leaf)
    (their_slope,) = torch.autograd.grad(theirs.sum(), leaf)
    for mine, their, right in ((value, theirs.detach(), exact.detach()), (gradient, their_slope, slope)):
        bound = 2 * (their.double() - right).abs().max() + torch.finfo(dtype).eps * right.abs().max()
        assert (mine.to(dtype).double() - right).abs().max() <= bound
        assert (mine.double() - right).abs().max() < 4e-4  # 3e-5 of Phi, times |x| and what lies beside it


def test_the_polynomial_is_tritons():
    block = Path(gelu.__file__).read_text().partition("u = c * c\n")[2].partition("return 0.5")[0]
    written = re.findall(r"([-+]?) (\d\.\d+(?:e-\d+)?)", block)
    assert tuple(float(sign + number) for sign, number in written) == cute_gelu._POLYNOMIAL


@pytest.mark.gpu
@pytest.mark.card
@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 198, 192), (130, 16)])
def test_quack_computes_the_reference(shape, dtype, recompute):
    able, reason = quack.capability(CUDA, forced=True)
    if not able:
        pytest.skip(reason)
    given = {name: t.detach().cuda().requires_grad_() for name, t in inputs(dtype, *shape, hidden=768).items()}
    prove(kernels.mlp, given | {"recompute": recompute}, mine=kernels.use(mlp="quack"))
