"""distillation_loss in Triton: every combination of its settings, any number of classes, any incoming gradient."""

import functools

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from fastdeit import kernels
from fastdeit.kernels import _loss, losses
from tests.kernels.proof import few, laid_out, layouts, normal, prove, repeated

BASES = st.sampled_from(["ce", "bce"])
DISTILLATIONS = st.sampled_from(["none", "hard", "soft"])
CLASSES = st.sampled_from([1, 2, 10, 17, 100, 1000, 1024, 4096, 4097])


def targets(device, batch, classes):
    """Mixed and unmixed samples, among them one of two equal labels and the first and last class."""
    first = torch.tensor([7 * i % classes for i in range(batch)], device=device)
    second = torch.tensor([classes - 1 if i % 2 else 7 * i % classes for i in range(batch)], device=device)
    return first, second, torch.tensor([(0.3, 1.0, 0.0, 0.6)[i % 4] for i in range(batch)], device=device)


def loss(cls, dist, y1, y2, lam, teacher, **settings):
    return kernels.distillation_loss(cls, dist, (y1, y2, lam), teacher, **settings)


def case(device, dtype, batch, classes, base, distillation, *, scale=3.0, teacher_dtype=None, **settings):
    """(function, its tensors)."""

    def logits(seed, dtype):
        return (scale * normal(batch, classes, dtype=torch.float32, device=device, seed=seed)).to(dtype)

    distilled = distillation != "none"
    inputs = {
        "cls": logits(0, dtype).requires_grad_(),
        "dist": logits(1, dtype).requires_grad_() if distilled else None,
        **dict(zip(("y1", "y2", "lam"), targets(device, batch, classes), strict=True)),
        "teacher": logits(2, teacher_dtype or dtype) if distilled else None,
    }
    settings = {"alpha": 0.3, "tau": 2.7, "smoothing": 0.1 if base == "ce" else 0.0, **settings}
    return functools.partial(loss, base=base, distillation=distillation, **settings), inputs


@given(
    batch=st.integers(1, 5),
    classes=CLASSES,
    base=BASES,
    distillation=DISTILLATIONS,
    reduction=st.sampled_from(["numel", "batchmean"]),
    layout=layouts,
)
@example(batch=3, classes=10, base="bce", distillation="hard", reduction="numel", layout="dense")
@example(batch=2, classes=1000, base="ce", distillation="soft", reduction="batchmean", layout="strided")
@few
def test_as_good_as_pytorch(device, dtype, batch, classes, base, distillation, reduction, layout):
    prove(*case(device, dtype, batch, classes, base, distillation, reduction=reduction), layout)


@pytest.mark.parametrize("distillation", ["none", "hard", "soft"])
@pytest.mark.parametrize("base", ["ce", "bce"])
def test_imagenet_21k(device, base, distillation):
    prove(*case(device, torch.float16, 2, 21841, base, distillation))


@pytest.mark.parametrize("smoothing", [0.0, 0.5])
def test_smoothing(device, dtype, smoothing):
    prove(*case(device, dtype, 5, 100, "ce", "none", smoothing=smoothing))


@pytest.mark.parametrize("distillation", ["hard", "soft"])
@pytest.mark.parametrize("teacher_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_teacher_of_another_dtype(device, distillation, teacher_dtype):
    prove(*case(device, torch.float16, 4, 100, "ce", distillation, teacher_dtype=teacher_dtype))


@pytest.mark.parametrize("distillation", ["hard", "soft"])
def test_usual_distillation_of_one_head(device, dtype, distillation):
    function, inputs = case(device, dtype, 4, 100, "ce", distillation)
    del inputs["dist"]
    prove(lambda cls, **others: function(cls=cls, dist=cls, **others), inputs)


@pytest.mark.parametrize("distillation", ["none", "hard", "soft"])
@pytest.mark.parametrize("base", ["ce", "bce"])
@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_huge_and_tiny_logits(device, base, distillation, scale):
    prove(*case(device, torch.float32, 4, 100, base, distillation, scale=scale))


def test_confident_binary_logits_keep_their_loss(device):
    """log(1 + exp(-30)) is 1e-13, which 1 + 1e-13 in float32 would have lost."""
    function, inputs = case(device, torch.float32, 4, 100, "bce", "none")
    inputs["cls"] = (-30 - inputs["cls"].detach().abs()).requires_grad_()
    with torch.no_grad():
        for label in ("y1", "y2"):
            inputs["cls"].scatter_(1, inputs[label][:, None], 30.0)
    prove(function, inputs)


def test_logits_with_a_large_offset(device):
    function, inputs = case(device, torch.float32, 4, 100, "ce", "soft")
    for name in ("cls", "dist"):
        inputs[name] = (inputs[name].detach() + 1e4).requires_grad_()
    prove(function, inputs)


@pytest.mark.parametrize("classes", [10, 5000])
def test_chunks_that_are_all_minus_infinity(device, classes):
    function, inputs = case(device, torch.float32, 3, classes, "ce", "hard", smoothing=0.1)
    with torch.no_grad():
        inputs["dist"][:, : classes - 3] = float("-inf")
        inputs["teacher"][:, : classes - 1] = float("-inf")
    assert function(**inputs).distill.isfinite()
    prove(function, inputs)


@pytest.mark.parametrize("classes", [10, 5000])
@pytest.mark.parametrize("row", ["ties", "nan_after_infinity", "nan_at_the_end", "minus_infinity", "zeros"])
def test_the_teachers_label_is_the_first_of_the_largest(device, classes, row):
    function, inputs = case(device, torch.float32, 3, classes, "ce", "hard")
    teacher = inputs["teacher"]
    if row == "ties":
        teacher[:, [classes - 1, classes // 2, 7]] = 50.0
    elif row == "nan_after_infinity":
        teacher[:, [2, 5]] = float("inf")
        teacher[:, [6, classes - 1]] = float("nan")
    elif row == "nan_at_the_end":
        teacher[:, 2] = float("inf")
        teacher[:, classes - 1] = float("nan")
    else:
        teacher[:] = 0.0 if row == "zeros" else float("-inf")
    prove(function, inputs)


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:divide by zero")
@pytest.mark.parametrize("tensor", ["cls", "dist", "teacher"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("column", [7, 49, 20], ids=["label", "label_without_share", "other"])
@pytest.mark.parametrize(
    ("base", "distillation"),
    [("ce", "soft"), *(pytest.param(*pair, marks=pytest.mark.slow) for pair in (("ce", "hard"), ("bce", "soft")))],
)
def test_not_finite_where_pytorch_is_not(device, base, distillation, tensor, value, column):
    function, inputs = case(device, torch.float32, 4, 50, base, distillation)
    with torch.no_grad():
        inputs[tensor][1, column] = value
    free = [inputs["cls"], inputs["dist"]]
    outcomes = []
    for backend in ("triton", "reference"):
        with kernels.use(backend):
            results = function(**inputs)
            outcomes.append([*(r.detach() for r in results), *torch.autograd.grad(results.total, free)])
    for mine, theirs in zip(*outcomes, strict=True):
        torch.testing.assert_close(mine, theirs, equal_nan=True)


@pytest.mark.parametrize("base", ["ce", "bce"])
@pytest.mark.parametrize(("name", "label"), [("y1", 10), ("y2", -1), ("y1", 2**40), ("y2", 2**32)])
def test_label_out_of_range_makes_the_loss_and_its_row_nan(device, base, name, label):
    function, inputs = case(device, torch.float32, 4, 10, base, "hard")
    inputs[name][2] = label
    with kernels.use("triton"):
        result = function(**inputs)
        grads = torch.autograd.grad(result.total, [inputs["cls"], inputs["dist"]])
    assert result.total.isnan()
    assert result.base.isnan()
    assert result.distill.isfinite()
    for grad in grads:
        assert grad.isnan().any(1).tolist() == [False, False, True, False]
        assert grad[2].isnan().all()


def test_the_loss_scale_reaches_the_gradient_before_it_is_rounded(device):
    """Unscaled, most gradients of this batch are zero or subnormal in fp16."""
    function, inputs = case(device, torch.float16, 4, 4097, "bce", "soft")
    prove(lambda **tensors: function(**tensors).total * 2.0**16, inputs)


@pytest.mark.parametrize("layout", ["expanded", "strided", "transposed"])
def test_arguments_of_any_layout(device, layout):
    function, inputs = case(device, torch.float32, 4, 40, "ce", "soft")
    for name, value in inputs.items():
        given = value.detach()
        given = given.mT.contiguous().mT if given.dim() == 2 and layout == "transposed" else laid_out(given, layout)
        inputs[name] = given.requires_grad_(value.requires_grad)
    prove(function, inputs)


def test_more_rows_than_are_added_up_at_a_time(device, monkeypatch):
    monkeypatch.setattr(_loss, "tile", lambda classes, tile=_loss.tile: {**tile(classes), "ROWS": 16})
    prove(*case(device, torch.float32, 37, 3, "ce", "hard"))


def test_without_gradients(device):
    function, inputs = case(device, torch.float32, 4, 100, "ce", "soft")
    inputs = {name: value.detach() for name, value in inputs.items()}
    prove(function, inputs)
    *_, dcls, ddist = losses.triton_forward(*inputs.values(), 0.1, "ce", "soft", 0.3, 2.7, "numel", False)
    assert dcls.numel() == ddist.numel() == 0


@pytest.mark.parametrize("changed", ["cls", "lam", "teacher"])
def test_what_triton_does_not_take_is_the_references(device, changed):
    function, inputs = case(device, torch.float32, 2, 8, "ce", "soft")
    inputs[changed] = inputs[changed].detach().double()
    with kernels.use("triton"), pytest.raises(RuntimeError, match="it does not compute in torch"):
        function(**inputs)


@pytest.mark.parametrize("distillation", ["none", "soft"])
def test_registered_op_runs_triton(device, distillation):
    function, inputs = case(device, torch.float32, 4, 10, "ce", distillation)
    arguments = [*inputs.values(), *(0.1, "ce", distillation, 0.3, 2.7, "numel", True)]
    with kernels.use("triton"):
        torch.library.opcheck(losses.OP.registered, arguments)
        registered = losses.OP.registered(*arguments)
        eager = function(**inputs)
    for mine, theirs in zip(registered[:3], eager, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("times", [3, pytest.param(50, marks=pytest.mark.card)])
def test_every_run_has_the_same_bits(device, times):
    batch, classes = (256, 1000) if device == "cuda" else (5, 40)
    function, inputs = case(device, torch.float16, batch, classes, "ce", "soft")

    def run():
        with kernels.use("triton"):
            results = function(**inputs)
            grads = torch.autograd.grad(results.total * 1024, [inputs["cls"], inputs["dist"]])
            return *(result.detach() for result in results), *grads

    repeated(run, times)


@pytest.mark.gpu
@pytest.mark.card
def test_two_graphs_of_one_stream_replayed_at_once():
    """Next to each other and to eager calls, each adds up its own rows: no ticket is shared."""
    function, inputs = case("cuda", torch.float16, 4096, 1000, "ce", "soft")
    free = [inputs["cls"], inputs["dist"]]

    def run():
        total = function(**inputs).total
        return total.detach(), *torch.autograd.grad(total, free)

    expected = [tensor.clone() for tensor in run()]
    captures = []
    for _ in range(2):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captures.append((graph, run(), torch.cuda.Stream()))
    for _ in range(20):
        for graph, _, stream in captures:
            with torch.cuda.stream(stream):
                graph.replay()
        eager = run()
    torch.cuda.synchronize()
    for results in (eager, *(results for _, results, _ in captures)):
        for mine, theirs in zip(results, expected, strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.gpu
@pytest.mark.card
def test_no_call_waits_for_the_device():
    function, inputs = case("cuda", torch.float16, 64, 1000, "ce", "soft")
    function(**inputs).total.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        function(**inputs).total.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
