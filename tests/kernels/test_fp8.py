"""Products of 8 bits: the casts are those of the formula to the last bit, results and gradients are within the bound of
e4m3's grid of float64, nothing hides an Inf or a NaN, and what cannot be is refused.
"""

import math
import warnings
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from fastdeit import kernels
from fastdeit.bench.count_card import pretended_card
from fastdeit.kernels import _asked
from fastdeit.kernels.fp8 import cast, gelu, product
from fastdeit.kernels.fp8.cast import E4M3, LARGEST
from fastdeit.kernels.trial import candidates
from tests.kernels.proof import assert_as_good, few, laid_out, normal

BF16 = torch.bfloat16
STEP, LEAST = 2.0**-4, 2.0**-10
"""Half a step of e4m3, relative to a normal number; half of the smallest number there is."""
TINIEST = 2.0**-126


def rows(*shape, seed=0, dtype=BF16):
    """Rows of very different sizes, and in each row elements of different sizes."""
    values = normal(*shape, dtype=torch.float32, device="cpu", seed=seed)
    sizes = 10.0 ** torch.linspace(-6, 4, shape[0])[:, None]
    return (values.pow(3) * sizes).to(dtype)


def restored(values, scale):
    return values.double() * scale.double()


def grid_error(x, scale):
    """The most that a cast of x may be off."""
    return torch.maximum(STEP * x.double().abs(), LEAST * scale.double())


def assert_same_bits(mine, theirs):
    assert mine[0].dtype == theirs[0].dtype == E4M3
    assert torch.equal(mine[0].cpu().view(torch.uint8), theirs[0].view(torch.uint8))
    assert torch.equal(mine[1].cpu().view(torch.int32), theirs[1].view(torch.int32))


# ---- casts -----------------------------------------------------------------------------------------------------------


def test_a_cast_is_within_half_a_step_and_its_scale_the_least_power_of_two_that_fits():
    x = rows(64, 96)
    values, scale = cast.reference(x)
    assert ((restored(values, scale) - x.double()).abs() <= grid_error(x, scale)).all()
    largest = x.double().abs().amax(1, keepdim=True)
    assert torch.equal(scale.log2().round().exp2(), scale)
    assert (largest <= LARGEST * scale).all()
    assert (largest > LARGEST * scale / 2).all()


def test_the_cast_of_columns_is_that_of_the_rows_of_the_transposed():
    x = rows(48, 80).t()
    assert_same_bits(cast.columns_reference(x), cast.reference(x.t().contiguous()))


@pytest.mark.parametrize("op", [cast.ROWS, cast.COLUMNS], ids=lambda op: op.name)
@pytest.mark.parametrize(
    ("shape", "strided"), [((1, 1), False), ((33, 48), True), ((270, 24), False), ((3, 300), True)]
)
def test_kernels_cast_to_the_same_bits(device, dtype, shape, strided, op):
    x = rows(*shape, dtype=torch.float32).clamp(-6e4, 6e4).to(dtype)
    triton, reference = op.backends
    mine = laid_out(x, "strided") if strided else x
    assert_same_bits(op.run_on(triton, mine.to(device)), op.run_on(reference, x))


SPECIAL = {
    "zeros": ([0.0, -0.0, 0.0], TINIEST),
    "the largest that fits": ([448.0, -448.0, 1.0], 1.0),
    "just above": ([449.0, 1.0, 0.0], 2.0),
    "the largest float": ([3.4e38, 1.0, -3.4e38], 2.0**120),
    "the least floats": ([1e-45, -1e-40, 0.0], TINIEST),
    "Inf": ([math.inf, 1.0, 0.0], math.nan),
    "-Inf": ([1.0, -math.inf, 2.0], math.nan),
    "NaN": ([1.0, 2.0, math.nan], math.nan),
}


@pytest.mark.parametrize("op", [cast.ROWS, cast.COLUMNS], ids=lambda op: op.name)
def test_special_rows_are_what_they_should_be_and_leave_the_others_alone(device, op):
    """A row with an Inf or a NaN is all NaN; PyTorch's own cast would make 448 of an Inf."""
    x = torch.tensor([values for values, _ in SPECIAL.values()])
    x = (x if op is cast.ROWS else x.t()).to(device)
    for backend in op.backends:
        values, scale = op.run_on(backend, x)
        expected = torch.tensor([scale for _, scale in SPECIAL.values()])
        torch.testing.assert_close(scale.flatten().cpu(), expected, rtol=0, atol=0, equal_nan=True)
        values = values.float().cpu()
        assert torch.equal(values.isnan().all(1), expected.isnan())
        assert torch.equal(values.isnan().any(1), expected.isnan())
        assert values[:2].tolist() == [[0, 0, 0], [448, -448, 1]]


def test_no_rows(device):
    for op, shape in ((cast.ROWS, (0, 16)), (cast.COLUMNS, (16, 0)), (gelu.FORWARD, (0, 16))):
        with kernels.use("triton"):
            values, scale = op(torch.zeros(shape, device=device))
        assert (values.shape, scale.shape) == ((0, 16), (0, 1))


# ---- GELU ------------------------------------------------------------------------------------------------------------


@given(rows_and_width=st.sampled_from([(1, 16), (21, 48), (5, 300)]))
@few
def test_gelu_and_its_backward_are_as_good_as_pytorchs(device, dtype, rows_and_width):
    """Of the casts what they stand for is judged, since a scale may be the next one where GELU is a unit off."""
    pre, dact = (3 * normal(*rows_and_width, dtype=dtype, device=device, seed=seed) for seed in range(2))
    triton, reference = gelu.FORWARD.backends
    exact = F.gelu(pre.double()).cpu()
    bound = grid_error(exact, 2 * cast.reference(exact)[1]) + 1e-4 * pre.abs().double().cpu()
    for backend in (triton, reference):
        assert ((restored(*gelu.FORWARD.run_on(backend, pre)).cpu() - exact).abs() <= bound).all()

    triton, reference = gelu.BACKWARD.backends
    found, same = (gelu.BACKWARD.run_on(backend, dact, pre) for backend in (triton, reference))
    dpre = torch.ops.aten.gelu_backward(dact.double(), pre.double())
    exacts = dpre, F.gelu(pre.double()), dpre.sum(0)
    for place, exact in zip((0, 3, 4), exacts, strict=True):
        assert_as_good(found[place].cpu(), same[place].cpu(), exact.cpu(), f"result {place}")
    scale = cast.reference(dpre.cpu())[1]
    bound = grid_error(dpre.cpu(), 2 * scale) + 1e-4 * dact.abs().double().cpu()
    assert ((restored(*found[1:3]).cpu() - dpre.cpu()).abs() <= bound).all()


# ---- layers ----------------------------------------------------------------------------------------------------------

TOKENS, WIDTH, HIDDEN = 24, 32, 64


@pytest.fixture
def layer():
    """(x, weight, bias, dout) of a linear layer, in bf16."""
    shapes = (2, TOKENS // 2, WIDTH), (HIDDEN, WIDTH), (HIDDEN,), (2, TOKENS // 2, HIDDEN)
    return [
        normal(*shape, dtype=BF16, device="cpu", seed=seed).requires_grad_(seed < 3)
        for seed, shape in enumerate(shapes)
    ]


def flat(x):
    return x.detach().double().flatten(0, -2)


def cast_as_double(x, columns=False):
    """What the cast of the rows, or of the columns, stands for."""
    values, scale = (cast.columns_reference if columns else cast.reference)(x.detach().flatten(0, -2))
    found = restored(values, scale)
    return found.t() if columns else found


def within_bf16(mine, exact):
    """Rounded once to bf16, of a sum in float32."""
    mine, exact = flat(mine), exact.reshape(flat(mine).shape)
    assert ((mine - exact).abs() <= 2.0**-8 * exact.abs() + 1e-5 * exact.abs().max()).all()


def test_a_layer_is_the_product_of_what_was_cast_and_so_is_the_gradient_of_its_input(layer):
    """The gradients of weight and bias are PyTorch's of what was not cast."""
    x, weight, bias, dout = layer
    out = kernels.fp8_linear(x, weight, bias)
    assert (out.shape, out.dtype) == ((2, TOKENS // 2, HIDDEN), BF16)
    within_bf16(out, cast_as_double(x) @ cast_as_double(weight).t() + bias.detach().double())
    dx, dweight, dbias = torch.autograd.grad(out, (x, weight, bias), dout)
    within_bf16(dx, cast_as_double(dout) @ cast_as_double(weight, columns=True))
    grads = dout.flatten(0, -2)
    assert torch.equal(dweight, grads.t() @ x.detach().flatten(0, -2))
    assert torch.equal(dbias, grads.float().sum(0).to(BF16))


def test_a_layer_is_as_far_from_float64_as_the_grid_allows_and_not_as_near_as_bf16(layer):
    x, weight, bias, dout = layer
    out = kernels.fp8_linear(x, weight, bias)
    (dx,) = torch.autograd.grad(out, x, dout)
    for mine, a, b, columns in (
        (out.detach() - bias.detach(), x, weight.t(), weight),
        (dx, dout, weight, weight.t().contiguous()),
    ):
        a, b = flat(a), b.detach().double()
        off_a, off_b = grid_error(a, cast.reference(a)[1]), grid_error(b.t(), cast.reference(columns)[1]).t()
        bound = off_a @ b.abs() + a.abs() @ off_b + off_a @ off_b
        exact = a @ b
        error = (flat(mine) - exact).abs()
        assert (error <= bound + 2.0**-7 * (exact.abs() + 4)).all()
        assert error.norm() > 3 * (exact.to(BF16).double() - exact).norm()


@pytest.fixture
def block():
    """(x, w1, b1, w2, b2, dout) of an MLP, in bf16."""
    shapes = (2, TOKENS // 2, WIDTH), (HIDDEN, WIDTH), (HIDDEN,), (WIDTH, HIDDEN), (WIDTH,), (2, TOKENS // 2, WIDTH)
    scales = 1, WIDTH**-0.5, 1, HIDDEN**-0.5, 1, 1
    return [
        (scale * normal(*shape, dtype=BF16, device="cpu", seed=seed)).requires_grad_(seed < 5)
        for seed, (shape, scale) in enumerate(zip(shapes, scales, strict=True))
    ]


def test_an_mlp_is_two_layers_and_gelu_between_them(block):
    """GELU's result and gradient are cast before they are rounded to bf16, hence no equal bits."""
    *args, dout = block

    def of_parts(x, w1, b1, w2, b2):
        return kernels.fp8_linear(F.gelu(kernels.fp8_linear(x, w1, b1)), w2, b2)

    outcomes = []
    for function in (kernels.fp8_mlp, of_parts):
        out = function(*args)
        outcomes.append([out, *torch.autograd.grad(out, args, dout)])
    exact = F.linear(
        F.gelu(F.linear(*[t.detach().double() for t in args[:3]])), *[t.detach().double() for t in args[3:]]
    )
    assert 0.01 < (outcomes[0][0].double() - exact).norm() / exact.norm() < 0.1
    for mine, theirs in zip(*outcomes, strict=True):
        assert (mine.shape, mine.dtype) == (theirs.shape, theirs.dtype)
        assert (mine.double() - theirs.double()).norm() < 0.02 * theirs.double().norm()


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("place", range(6))
def test_what_is_not_finite_reaches_results_or_gradients(block, place, bad):
    *args, dout = [tensor.detach().clone() for tensor in block]
    (*args, dout)[place].view(-1)[3] = bad
    args = [tensor.requires_grad_() for tensor in args]
    out = kernels.fp8_mlp(*args)
    grads = torch.autograd.grad(out, args, dout)
    assert not all(tensor.isfinite().all() for tensor in (out if place < 5 else grads[0], *grads))
    assert out.isfinite().all() == (place == 5)
    assert not grads[0].isfinite().all() or place in (2, 4)


def test_autocast_gives_all_tensors_its_dtype_and_gradients_their_own(layer):
    full = [tensor.detach().float().requires_grad_() for tensor in layer[:3]]
    with torch.autocast("cpu", BF16):
        out = kernels.fp8_linear(*full)
        product_of_floats = product.reference(
            *cast.reference(full[0][0]), *cast.reference(full[1]), None, torch.float32
        )
    assert torch.equal(out, kernels.fp8_linear(*layer[:3]))
    assert product_of_floats.dtype == torch.float32
    grads = torch.autograd.grad(out, full, layer[3])
    expected = torch.autograd.grad(kernels.fp8_linear(*layer[:3]), layer[:3], layer[3])
    assert all(
        mine.dtype == torch.float32 and torch.equal(mine, theirs) for mine, theirs in zip(grads, expected, strict=True)
    )


@pytest.mark.parametrize("function", [kernels.fp8_mlp, lambda x, w1, b1, *_: kernels.fp8_linear(x, w1, b1)])
def test_backward_runs_where_forward_ran_in_whatever_thread(block, function, monkeypatch):
    """On a GPU it is a thread of autograd's own, to which `use()` means nothing."""
    *args, _ = block
    seen = []

    def noting(op):
        return lambda *args: seen.append(_asked.choice(op.name)) or op.backends[-1].forward(*args)

    for op in (cast.ROWS, cast.COLUMNS, gelu.FORWARD, gelu.BACKWARD, product.OP):
        monkeypatch.setattr(op, "native", noting(op))
        monkeypatch.setattr(op, "registered", noting(op))
    with kernels.use("reference"):
        out = function(*args)
    before = len(seen)
    candidates.apart(lambda: out.float().sum().backward(), torch.device("cpu"))
    assert before < len(seen)
    assert set(seen) == {"reference"}


@pytest.mark.parametrize("without_values", [FakeTensorMode, lambda: torch.device("meta")], ids=["fake", "meta"])
def test_tensors_without_values_have_the_shapes_and_dtypes_of_real_ones(block, without_values):
    outcomes = []
    for inside in (nullcontext, without_values):
        with inside():
            *args, dout = [torch.empty(t.shape, dtype=t.dtype, requires_grad=t.requires_grad) for t in block]
            out = kernels.fp8_mlp(*args)
            found = out, *torch.autograd.grad(out, args, dout)
        outcomes.append([(t.shape, t.dtype, t.stride()) for t in found])
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("frozen", range(5))
def test_what_is_frozen_has_no_gradient_and_changes_no_other(block, frozen):
    *args, dout = block
    expected = torch.autograd.grad(kernels.fp8_mlp(*args), args, dout)
    args[frozen] = args[frozen].detach()
    wanted = [place for place in range(5) if place != frozen]
    found = torch.autograd.grad(kernels.fp8_mlp(*args), [args[place] for place in wanted], dout)
    assert all(torch.equal(mine, expected[place]) for mine, place in zip(found, wanted, strict=True))


@pytest.mark.slow
def test_compiled_is_eager(block):
    """One graph, of the reference's operations."""
    torch.compiler.reset()
    *args, dout = block
    outcomes = []
    for function in (kernels.fp8_mlp, torch.compile(kernels.fp8_mlp, fullgraph=True, backend="aot_eager")):
        out = function(*args)
        outcomes.append((out, *torch.autograd.grad(out, args, dout)))
    assert all(map(torch.equal, *outcomes))


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_other_shapes_are_refused(layer):
    x, weight, bias, _ = layer
    with pytest.raises(ValueError, match=r"weight has shape \[60, 32\], but a width of 60 is not a multiple of 16"):
        kernels.fp8_linear(x, weight[:60], bias[:60])
    with pytest.raises(
        ValueError, match=r"weight has shape \[64, 16\], but must be \[F, C\], C the last dimension of x"
    ):
        kernels.fp8_linear(x, weight[:, :16], bias)
    with pytest.raises(ValueError, match=r"weight has shape \[32, 32\], but must be \[F, C\], .* of w1"):
        kernels.fp8_mlp(x, weight, bias, weight[:32], bias[:32])
    with pytest.raises(TypeError, match=r"x is torch\.int64"):
        kernels.fp8_linear(x.long(), weight, bias)
    with pytest.raises(
        ValueError, match=r"fp8_linear needs tensors of one dtype, .*32, torch\.bfloat16, torch\.float32"
    ):
        kernels.fp8_linear(x.float(), weight.bfloat16(), bias.float())


def test_derivatives_that_it_has_not_are_refused(layer):
    x, weight, bias, _ = layer
    with pytest.raises(RuntimeError, match=r"fp8_linear rounds to 8 bits, of which torch\.func"):
        torch.func.grad(lambda y: kernels.fp8_linear(y, weight, bias).sum())(x)
    with pytest.raises(RuntimeError, match="fp8_linear has no second derivative"):
        torch.autograd.grad(kernels.fp8_linear(x, weight, bias).sum(), x, create_graph=True)


@pytest.mark.parametrize(
    ("arch", "reason"),
    [(70, "sm_89 or newer, not sm_70"), (80, "sm_89 or newer, not sm_80"), (90, None), (100, None)],
)
def test_cards_older_than_sm_89_have_no_such_products(arch, reason):
    with pretended_card(arch=arch):
        found = kernels.fp8_refusal(torch.device("cuda", 0))
    assert found is None if reason is None else reason in found


def test_on_a_card_nothing_waits_and_the_products_are_scaled_mm():
    """Launches of a forward and backward: four casts of tokens and GELU's two, four of weights, four products of 8
    bits and two of bf16."""
    card_of = torch.device("cuda", 0)
    with pretended_card(arch=90) as card:
        args = [
            torch.zeros(shape, dtype=BF16, device=card_of, requires_grad=True)
            for shape in ((3, 32), (64, 32), (64,), (32, 64))
        ]
        args.append(torch.zeros(32, dtype=BF16, device=card_of))
        card.operations.clear()
        with card.never_waited_for(), warnings.catch_warnings():
            warnings.simplefilter("error")
            torch.autograd.grad(kernels.fp8_mlp(*args), args[:4], torch.zeros(3, 32, dtype=BF16, device=card_of))
        names = [kernel.fn.__name__ for kernel, _, _ in card.launches]
        assert sorted(names) == sorted(
            ["_rows_kernel"] * 4 + ["_forward_kernel", "_backward_kernel"] + ["_columns_kernel"] * 2
        )
        assert card.operations.count("_scaled_mm") == 4
        assert card.operations.count("mm") == 2
