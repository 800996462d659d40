"""The Triton parts of the MLP: GELU's backward with the bias gradient, column sums, and the op they serve."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastdeit import kernels
from fastdeit.kernels import _triton
from fastdeit.kernels._op import OPS
from fastdeit.kernels._triton import INTERPRETED
from fastdeit.kernels.mlp import gelu
from tests.kernels.proof import assert_as_good, few, normal, poisoned, prove, repeated

WIDTHS = 3, 64, 100
ROWS = st.sampled_from([1, 49, 65, 68])
"""A program takes four rows at a time."""


def exact_gelu(pre):
    """(gelu, gelu') in float64."""
    pre = pre.double()
    cdf = 0.5 * (1 + torch.erf(pre / math.sqrt(2)))
    return pre * cdf, cdf + pre * torch.exp(-pre * pre / 2) / math.sqrt(2 * math.pi)


@given(rows=ROWS, width=st.sampled_from(WIDTHS), act=st.booleans())
@few
def test_backward_of_gelu_as_good_as_pytorch(device, dtype, rows, width, act):
    pre = normal(rows, width, dtype=dtype, device=device, seed=0) * 2
    dact = normal(rows, width, dtype=dtype, device=device, seed=1)
    with poisoned():
        dpre, value, dbias = gelu.backward(dact, pre, act=act)
    exact_value, derivative = exact_gelu(pre)
    theirs = pre.clone().requires_grad_()
    their_value = torch.nn.functional.gelu(theirs)
    their_value.backward(dact)
    exact = dact.double() * derivative
    assert_as_good(dpre, theirs.grad, exact, "dpre")
    assert (value is not None) == act
    if act:
        assert_as_good(value, their_value.detach(), exact_value, "act")
    their_dbias = (dact.float() * derivative.float()).sum(0).to(dtype)
    assert_as_good(dbias.to(dtype), their_dbias, exact.sum(0), "dbias")


def test_polynomial_distribution(device):
    """Everywhere within 3e-5 of the normal distribution, in float32, weighted by the size of the argument."""
    pre = torch.linspace(-12, 12, 4096 * 8, device=device).half().reshape(-1, 64)
    ones = torch.ones_like(pre)
    dpre, value, _ = gelu.backward(ones, pre, act=True)
    exact_value, derivative = exact_gelu(pre)
    half = torch.finfo(torch.float16).eps / 2
    assert ((value - exact_value).abs() <= half * exact_value.abs() + 4.5e-5).all()
    assert ((dpre - derivative).abs() <= half * derivative.abs() + 4.5e-5).all()


@given(rows=ROWS, width=st.sampled_from(WIDTHS))
@few
def test_column_sums(device, dtype, rows, width):
    x = normal(rows, width, dtype=dtype, device=device, seed=0)
    with poisoned():
        mine = gelu.column_sums(x)
    assert_as_good(mine, x.float().sum(0), x.double().sum(0), "sums")


def test_more_rows_than_programs(device, monkeypatch):
    monkeypatch.setattr(gelu, "_PROGRAMS", 3)
    x = normal(7 * 4 + 1, 16, dtype=torch.float32, device=device, seed=0)
    dpre, _, dbias = gelu.backward(x, x, act=False)
    torch.testing.assert_close(gelu.column_sums(x).double(), x.double().sum(0), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(dbias.double(), dpre.double().sum(0), atol=1e-4, rtol=1e-5)


def weights(width, hidden, dtype, device):
    shapes = {"w1": (hidden, width), "b1": (hidden,), "w2": (width, hidden), "b2": (width,)}
    tensors = {}
    for seed, (name, shape) in enumerate(shapes.items(), start=2):
        values = normal(*shape, dtype=torch.float32, device=device, seed=seed) * shape[-1] ** -0.5
        tensors[name] = values.to(dtype).requires_grad_()
    return tensors


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("layout", ["dense", "expanded", "strided"])
@pytest.mark.parametrize("shape", [(5, 24), (2, 7, 24), (0, 24)])
def test_mlp_as_good_as_pytorch(device, dtype, shape, layout, recompute):
    x = normal(*shape, dtype=dtype, device=device, seed=0).requires_grad_()
    prove(kernels.mlp, {"x": x, **weights(24, 96, dtype, device), "recompute": recompute}, layout)


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, *([] if INTERPRETED else [torch.bfloat16])])
@pytest.mark.parametrize(
    ("rows", "width", "hidden", "backend"),
    [
        (1, 24, 96, "epilogue"),
        (130, 24, 150, "epilogue"),
        (257, 40, 64, "epilogue"),
        (130, 24, 150, "epilogue_forward"),
        (130, 24, 150, "epilogue_backward"),
    ],
)
def test_products_with_an_epilogue_are_as_good_as_pytorch(device, dtype, rows, width, hidden, backend, recompute):
    x = normal(1, rows, width, dtype=dtype, device=device, seed=0).requires_grad_()
    inputs = {"x": x, **weights(width, hidden, dtype, device), "recompute": recompute}
    prove(kernels.mlp, inputs, "strided", mine=kernels.use("triton", mlp=backend))


@pytest.mark.parametrize("way", ["forward", "backward"])
def test_a_mixture_has_the_products_of_one_way(way, device):
    """Those of the other are the vendor's: their launches, or their absence, are those of "triton"."""
    x = torch.empty(4, 24, dtype=torch.float16, device="meta")
    given = [t.detach().to("meta") for t in weights(24, 96, torch.float16, "cpu").values()]

    def launches(name):
        run = next(backend for backend in OPS["mlp"].backends if backend.name == name)
        with _triton.recording(90) as recorded:
            out, pre, _ = run.forward(x, *given, True)
            forward = [launch.kernel.fn.__name__ for launch in recorded.launches]
            run.backward(out, x, given[0], given[2], pre, None, True)
        names = [launch.kernel.fn.__name__ for launch in recorded.launches]
        return {"forward": forward, "backward": names[len(forward) :]}

    mixed, ours, plain = map(launches, (f"epilogue_{way}", "epilogue", "triton"))
    assert mixed[way] == ours[way] != plain[way]
    other = {"forward": "backward", "backward": "forward"}[way]
    assert mixed[other] == plain[other] != ours[other]


@pytest.mark.parametrize("backend", ["epilogue", "epilogue_forward", "epilogue_backward"])
def test_products_take_16_bit_operands_of_one_dtype(backend, device):
    with kernels.use(mlp=backend):
        for dtypes, reason in (
            ((torch.float32,) * 2, "16-bit operands, not torch.float32"),
            ((torch.float16, torch.bfloat16), "operands are"),
        ):
            x, w = (torch.zeros(4, 4, dtype=dtype, device=device) for dtype in dtypes)
            with pytest.raises(RuntimeError, match=reason):
                kernels.mlp(x, w, w[0], w, w[0])


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("backend", ["triton", "epilogue", "epilogue_forward", "epilogue_backward"])
@pytest.mark.parametrize("stream", [torch.float32, torch.float16])
def test_layer_norm_mlp_as_good_as_pytorch(device, stream, backend, recompute):
    x = normal(2, 7, 24, dtype=stream, device=device, seed=0).requires_grad_()
    weight, bias = (normal(24, dtype=torch.float32, device=device, seed=i).requires_grad_() for i in (8, 9))
    inputs = {"x": x, "weight": weight, "bias": bias, "eps": 1e-6, **weights(24, 96, torch.float16, device)}
    inputs["recompute"] = recompute
    prove(kernels.layer_norm_mlp, inputs, "strided", mine=kernels.use(layer_norm_mlp=backend))


def calls(dtype, device):
    """Of every form of the MLP, with 24 channels and 96 hidden features: (name of its op, function of x)."""
    given = weights(24, 96, dtype, device)
    norm = torch.nn.LayerNorm(24, device=device)
    both = {recompute: kernels.nn.Mlp(24, 96, recompute=recompute).to(device, dtype) for recompute in (True, False)}
    return {
        "mlp": ("mlp", lambda x, **option: kernels.mlp(x, **given, **option)),
        "layer_norm_mlp": (
            "layer_norm_mlp",
            lambda x, **option: kernels.layer_norm_mlp(x, norm.weight, norm.bias, 1e-6, **given, **option),
        ),
        "nn.Mlp": ("mlp", lambda x, *, recompute=True: both[recompute](x)),
    }


def saved_bytes(function, *args, **options):
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
        function(*args, **options).sum().backward()
    return sum(sizes)


@pytest.mark.parametrize("backend", ["triton", "epilogue", "reference"])
@pytest.mark.parametrize("form", ["mlp", "layer_norm_mlp", "nn.Mlp"])
def test_the_activation_is_saved_where_it_is_not_recomputed(device, form, backend):
    """One tensor of hidden features, and nothing else, is what the option costs; by default it is not kept."""
    op, function = calls(torch.float16, device)[form]
    x = normal(2, 7, 24, dtype=torch.float16, device=device, seed=0).requires_grad_()
    with kernels.use(**{op: backend}):
        kept, recomputed = (saved_bytes(function, x, recompute=recompute) for recompute in (False, True))
        assert kept - recomputed == 2 * 7 * 96 * 2
        assert saved_bytes(function, x) == recomputed


@pytest.mark.parametrize("recompute", [True, False])
@pytest.mark.parametrize("backend", ["triton", "epilogue"])
@pytest.mark.parametrize("name", ["mlp", "layer_norm_mlp"])
def test_backward_writes_the_activation_only_where_it_was_not_kept(name, backend, recompute):
    meta = {name: t.detach().to("meta") for name, t in weights(24, 96, torch.float16, "cpu").items()}
    x, vector = torch.empty(2, 7, 24, dtype=torch.float16, device="meta"), torch.empty(24, device="meta")
    norm = [vector, vector] if name == "layer_norm_mlp" else []
    run = next(found for found in OPS[name].backends if found.name == backend)
    with _triton.recording(90) as recorded:
        out, pre, act, *statistics = run.forward(x, *norm, *([1e-6] if norm else []), *meta.values(), recompute)
        assert act.shape == ((0,) if recompute else pre.shape)
        recorded.launches.clear()
        run.backward(out, x, *norm, meta["w1"], meta["w2"], pre, None if recompute else act, *statistics, True)
    (acts,) = (launch.arguments["act"] for launch in recorded.launches if "dpre" in launch.arguments)
    assert (acts is not None) == recompute


@pytest.mark.parametrize("form", ["mlp", "layer_norm_mlp", "nn.Mlp"])
def test_compiled_with_the_activation_kept(form):
    torch.compiler.reset()
    _, function = calls(torch.float64, "cpu")[form]
    x = normal(2, 7, 24, dtype=torch.float64, device="cpu", seed=0).requires_grad_()
    outcomes = []
    for run in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
        out = run(x, recompute=False)
        outcomes.append((out, *torch.autograd.grad(out.square().sum(), x)))
    torch.testing.assert_close(*outcomes)


@pytest.mark.filterwarnings("ignore:(invalid value|overflow)")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 6e4, -6e4])
def test_not_finite_where_pytorch_is_not(device, value):
    pre = normal(3, 32, dtype=torch.float16, device=device, seed=0)
    pre[1, 5] = value
    theirs = pre.clone().requires_grad_()
    torch.nn.functional.gelu(theirs).sum().backward()
    dpre, _, _ = gelu.backward(torch.ones_like(pre), pre, act=False)
    torch.testing.assert_close(dpre, theirs.grad, equal_nan=True, atol=1e-4, rtol=2e-3)


@pytest.mark.parametrize("times", [3, pytest.param(50, marks=pytest.mark.card)])
def test_every_run_has_the_same_bits(device, times):
    rows = 50_688 if device == "cuda" else 70
    dact, pre = (normal(rows, 96, dtype=torch.float16, device=device, seed=i) for i in range(2))
    repeated(lambda: (*gelu.backward(dact, pre, act=True), gelu.column_sums(pre)), times)
