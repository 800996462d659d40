"""Co-training loss of two submodels: against dense BCE in float64, and in Triton against the reference."""

import functools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st

from fastdeit import kernels
from fastdeit.kernels import _loss, cosub
from tests.kernels.proof import few, laid_out, layouts, normal, prove, repeated

B, K = 4, 11
Y1 = torch.tensor([0, 10, 4, 7])
Y2 = torch.tensor([3, 10, 6, 1])  # equal labels with lam 0.7
LAM = torch.tensor([0.3, 0.7, 1.0, 0.0])
KINDS = {"soft": (0.0, False), "smooth": (0.1, False), "binary": (0.0, True)}

kinds = pytest.mark.parametrize("kind", KINDS)
registered = pytest.mark.parametrize("registered", [False, True], ids=["direct", "registered"])


def logits(dtype=torch.float64):
    torch.manual_seed(3)
    return (3 * torch.randn(2 * B, K, dtype=torch.float64)).to(dtype).requires_grad_()


def loss(logits, kind, y1=Y1, y2=Y2, lam=LAM):
    smoothing, binarise = KINDS[kind]
    return kernels.cosub_loss(logits, (y1, y2, lam), smoothing=smoothing, binarise=binarise)


def dense_target(kind):
    smoothing, binarise = KINDS[kind]
    lam = LAM.double()[:, None]
    target = smoothing / K + (1 - smoothing) * (lam * F.one_hot(Y1, K) + (1 - lam) * F.one_hot(Y2, K))
    return (target > 0).double() if binarise else target


def dense_loss(z, held, target):
    """`held`: the logits whose predictions are the constant targets of the other half."""
    bce = F.binary_cross_entropy_with_logits
    (a, b), (held_a, held_b) = z.chunk(2), held.detach().sigmoid().chunk(2)
    return (bce(a, target) + bce(b, target) + bce(a, held_b) + bce(b, held_a)) / 4


@kinds
@registered
def test_is_the_dense_formula(kind, registered, force):
    if registered:
        force("reference")
    z = logits()
    mine, theirs = loss(z, kind), dense_loss(z, z, dense_target(kind))
    torch.testing.assert_close(mine, theirs, rtol=2e-7, atol=1e-9)  # lam is float32
    grads = (torch.autograd.grad(result, z)[0] for result in (mine, theirs))
    torch.testing.assert_close(*grads, rtol=2e-7, atol=1e-9)


@kinds
@registered
def test_gradient_by_finite_differences_with_the_other_half_held(kind, registered, force):
    if registered:
        force("reference")
    z, step = logits(), 1e-5
    (grad,) = torch.autograd.grad(loss(z, kind), z)
    for direction in torch.eye(z.numel(), dtype=z.dtype).reshape(-1, *z.shape)[::7]:
        up, down = (dense_loss(z.detach() + sign * step * direction, z, dense_target(kind)) for sign in (1, -1))
        torch.testing.assert_close((grad * direction).sum(), (up - down) / (2 * step), rtol=1e-6, atol=1e-9)


@kinds
@registered
def test_equal_halves_teach_each_other_nothing(kind, registered, force):
    if registered:
        force("reference")
    half = logits().detach()[:B]
    z = half.repeat(2, 1).requires_grad_()
    (grad,) = torch.autograd.grad(loss(z, kind), z)
    label_alone = (half.sigmoid() - dense_target(kind)) / (4 * B * K)
    torch.testing.assert_close(grad, label_alone.repeat(2, 1), rtol=2e-7, atol=1e-9)


@pytest.mark.parametrize(("backend", "classes"), [("auto", 16), ("reference", 10), ("triton", 10)])
def test_cross_terms_of_equal_halves_have_exactly_no_gradient(device, backend, classes):
    """A quarter, bit for bit, of the gradient of plain BCE."""
    half = normal(B, classes, dtype=torch.float32, device=device, seed=1).requires_grad_()
    targets = [t.to(device) for t in (Y1 % classes, Y2 % classes, LAM)]
    with kernels.use(backend):
        z = half.detach().repeat(2, 1).requires_grad_()
        (grad,) = torch.autograd.grad(loss(z, "binary", *targets), z)
        (plain,) = torch.autograd.grad(kernels.distillation_loss(half, None, targets, base="bce").total, half)
    assert torch.equal(4 * grad, plain.repeat(2, 1))


@kinds
def test_swapping_the_halves_leaves_the_loss(kind):
    z = logits()
    swapped = torch.cat(z.detach().chunk(2)[::-1]).requires_grad_()
    mine, other = loss(z, kind), loss(swapped, kind)
    torch.testing.assert_close(mine, other, rtol=1e-14, atol=0)
    (grad,), (swapped_grad,) = torch.autograd.grad(mine, z), torch.autograd.grad(other, swapped)
    torch.testing.assert_close(torch.cat(swapped_grad.chunk(2)[::-1]), grad, rtol=1e-12, atol=1e-15)


def test_eager_mode_computes_no_unit_gradient(monkeypatch):
    monkeypatch.delattr(_loss, "scatter_subtract_")
    z = logits()
    total = loss(z, "smooth")
    total.backward()
    assert z.grad is not None
    assert "fastdeit" not in type(total.grad_fn).__name__.lower()


@registered
@pytest.mark.parametrize(("name", "label"), [("y1", K), ("y2", -1)])
def test_label_out_of_range(name, label, registered, force):
    if registered:
        force("reference")
    targets = {"y1": Y1.clone(), "y2": Y2.clone()}
    targets[name][2] = label
    with pytest.raises(IndexError, match=rf"targets: {name} holds {label}, but must be in \[0, {K}\)"):
        loss(logits(), "soft", **targets)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"smoothing": 0.1, "binarise": True}, ValueError, "must be 0 with binarise: .* every class positive"),
        ({"smoothing": -0.1}, ValueError, r"smoothing is -0.1, but must be in \[0, 1\)"),
        ({"logits": torch.zeros(7, K)}, ValueError, "logits has 7 rows, but must have an even number"),
        ({"logits": torch.zeros(0, K)}, ValueError, r"logits has shape \[0, 11\], but must be \[2B, K\] and not empty"),
        ({"logits": torch.zeros(8, K).int()}, TypeError, "logits is torch.int32"),
        ({"targets": (Y1.repeat(2), Y2, LAM)}, ValueError, r"y1 has shape \[8\], but must be \[B\], half the rows"),
        ({"targets": (Y1, Y2.int(), LAM)}, TypeError, "targets: y2 is torch.int32, but must be torch.int64"),
        ({"targets": (Y1, Y2, LAM.to("meta"))}, ValueError, "lam is on meta, but must be on cpu like logits"),
    ],
)
def test_errors_name_the_argument(changes, error, message):
    arguments = {"logits": torch.zeros(2 * B, K), "targets": (Y1, Y2, LAM)} | changes
    with pytest.raises(error, match=message):
        kernels.cosub_loss(**arguments)


def case(device, dtype, batch, classes, kind, scale=3.0):
    """(function, its tensors)."""
    z = scale * normal(2 * batch, classes, dtype=torch.float32, device=device, seed=0)
    inputs = {
        "logits": z.to(dtype).requires_grad_(),
        "y1": torch.tensor([7 * i % classes for i in range(batch)], device=device),
        "y2": torch.tensor([classes - 1 if i % 2 else 7 * i % classes for i in range(batch)], device=device),
        "lam": torch.tensor([(0.3, 1.0, 0.0, 0.6)[i % 4] for i in range(batch)], device=device),
    }
    return functools.partial(loss, kind=kind), inputs


@given(
    batch=st.integers(1, 5),
    classes=st.sampled_from([1, 2, 10, 17, 100, 1000, 1024, 4096, 4097]),
    kind=st.sampled_from(list(KINDS)),
    layout=layouts,
)
@example(batch=3, classes=1000, kind="smooth", layout="dense")
@few
def test_as_good_as_pytorch(device, dtype, batch, classes, kind, layout):
    prove(*case(device, dtype, batch, classes, kind), layout)


@kinds
def test_imagenet_21k(device, kind):
    prove(*case(device, torch.float16, 2, 21841, kind))


@kinds
@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_huge_and_tiny_logits(device, kind, scale):
    prove(*case(device, torch.float32, 4, 100, kind, scale))


@pytest.mark.filterwarnings("ignore:invalid value")
@kinds
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("column", [7, 49, 20], ids=["label", "label_without_share", "other"])
def test_not_finite_where_pytorch_is_not(device, kind, value, column):
    function, inputs = case(device, torch.float32, 4, 50, kind)
    with torch.no_grad():
        inputs["logits"][5, column] = value
    outcomes = []
    for backend in ("triton", "reference"):
        with kernels.use(backend):
            result = function(**inputs)
            outcomes.append([result.detach(), *torch.autograd.grad(result, inputs["logits"])])
    for mine, theirs in zip(*outcomes, strict=True):
        torch.testing.assert_close(mine, theirs, equal_nan=True)


@kinds
@pytest.mark.parametrize(("name", "label"), [("y1", 10), ("y2", -1), ("y1", 2**40), ("y2", 2**32)])
def test_label_out_of_range_makes_the_loss_and_both_its_rows_nan(device, kind, name, label):
    function, inputs = case(device, torch.float32, 3, 10, kind)
    inputs[name][1] = label
    with kernels.use("triton"):
        result = function(**inputs)
        (grad,) = torch.autograd.grad(result, inputs["logits"])
    assert result.isnan()
    assert grad.isnan().any(1).tolist() == grad.isnan().all(1).tolist() == [False, True, False] * 2


def test_the_loss_scale_reaches_the_gradient_before_it_is_rounded(device):
    """Unscaled, most gradients of this batch are zero or subnormal in fp16."""
    function, inputs = case(device, torch.float16, 4, 4097, "smooth")
    prove(lambda **tensors: function(**tensors) * 2.0**16, inputs)


@pytest.mark.parametrize("layout", ["expanded", "strided", "transposed"])
def test_arguments_of_any_layout(device, layout):
    function, inputs = case(device, torch.float32, 4, 40, "smooth")
    for name, value in inputs.items():
        given = value.detach()
        given = given.mT.contiguous().mT if given.dim() == 2 and layout == "transposed" else laid_out(given, layout)
        inputs[name] = given.requires_grad_(value.requires_grad)
    prove(function, inputs)


def test_more_rows_than_are_added_up_at_a_time(device, monkeypatch):
    monkeypatch.setattr(_loss, "tile", lambda classes, tile=_loss.tile: {**tile(classes), "ROWS": 16})
    prove(*case(device, torch.float32, 37, 3, "smooth"))


def test_without_gradients(device):
    function, inputs = case(device, torch.float32, 4, 100, "smooth")
    prove(function, {name: value.detach() for name, value in inputs.items()})
    assert cosub.triton_forward(*inputs.values(), 0.1, False, False)[1].numel() == 0


@pytest.mark.parametrize("changed", ["logits", "lam"])
def test_what_triton_does_not_take_is_the_references(device, changed):
    function, inputs = case(device, torch.float32, 2, 8, "soft")
    inputs[changed] = inputs[changed].detach().double()
    with kernels.use("triton"), pytest.raises(RuntimeError, match="it does not compute in torch"):
        function(**inputs)


def test_registered_op_runs_triton(device):
    function, inputs = case(device, torch.float32, 4, 10, "smooth")
    arguments = [*inputs.values(), 0.1, False, True]
    with kernels.use("triton"):
        torch.library.opcheck(cosub.OP.registered, arguments)
        assert torch.equal(cosub.OP.registered(*arguments)[0], function(**inputs))


@pytest.mark.parametrize("times", [3, pytest.param(50, marks=pytest.mark.card)])
def test_every_run_has_the_same_bits(device, times):
    batch, classes = (256, 1000) if device == "cuda" else (5, 40)
    function, inputs = case(device, torch.float16, batch, classes, "smooth")

    def run():
        with kernels.use("triton"):
            result = function(**inputs)
            return result.detach(), *torch.autograd.grad(result * 1024, inputs["logits"])

    repeated(run, times)
