"""Updates and the global norm in Triton: any list of tensors, as good as PyTorch, the same bits on every run."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastdeit import kernels
from fastdeit.kernels import _triton
from fastdeit.kernels.optimizer import _multi_tensor, _update, adamw, lamb, norm, sgd
from tests.kernels.proof import assert_as_good, few, laid_out, normal, poisoned, prove, repeated
from tests.kernels.updates import FORMS

CHUNK = _multi_tensor.CHUNK
SHAPES = [(), (1,), (8,), (7, 5), (0,), (64, 33), (CHUNK,), (CHUNK + 8,), (3, CHUNK - 1)]
HALF = torch.float16, torch.bfloat16
STATE = "params", "exp_avgs", "exp_avg_sqs", "ema", "copies"

some_shapes = st.lists(st.sampled_from(SHAPES), min_size=1, max_size=5)


def tensors(device, shapes, seed, dtype=torch.float32):
    return [normal(*shape, dtype=dtype, device=device, seed=100 * seed + i) for i, shape in enumerate(shapes)]


def gradients(device, shapes, seed, dtypes):
    """Gradients whose dtypes take turns; the values are those of the 16-bit ones."""
    return [g.to(dtypes[i % len(dtypes)]) for i, g in enumerate(tensors(device, shapes, seed, torch.float16))]


class Training:
    """The arguments of an update, in a dtype, and updates of them on a backend."""

    def __init__(self, device, shapes, *, follow=True, dtype=torch.float32, copy_dtype=torch.float16):
        self.params, self.exp_avgs, squares, self.ema = (tensors(device, shapes, i, dtype) for i in range(4))
        self.exp_avg_sqs = [square.abs() for square in squares]
        self.copies = [p.to(copy_dtype, copy=True) for p in self.params]
        self.step = torch.tensor(2.0, device=device)
        self.follow = follow

    def update(self, name, backend, grads, lr=2**-6, **changes):
        extra = {"ema": self.ema, "ema_decay": 0.75, "copies": self.copies} if self.follow else {}
        states = self.exp_avgs, self.exp_avg_sqs
        with kernels.use(backend), poisoned():
            FORMS[name](self.params, grads, states, self.step, lr, **extra | changes)

    def state(self):
        return {f"{name}[{i}]": t for name in STATE for i, t in enumerate(getattr(self, name))} | {"step": self.step}


def assert_good_training(mine, same, exact):
    for name, tensor in mine.state().items():
        assert_as_good(tensor, same.state()[name], exact.state()[name], name)


def trainings(device, shapes, **settings):
    """In Triton, by the reference, and exactly."""
    exact = Training(device, shapes, **settings | {"dtype": torch.float64, "copy_dtype": torch.float64})
    return Training(device, shapes, **settings), Training(device, shapes, **settings), exact


def run_all(all_three, name, grads, **changes):
    mine, same, exact = all_three
    mine.update(name, "triton", grads, **changes)
    same.update(name, "reference", grads, **changes)
    exact.update(name, "reference", [g.double() for g in grads], **changes)
    assert_good_training(mine, same, exact)


OPTIONS = "sgd nesterov", "sgd decoupled"


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.slow] * (name in OPTIONS)) for name in FORMS])
def name(request):
    return request.param


@given(
    shapes=some_shapes,
    dtypes=st.lists(st.sampled_from([torch.float32, *HALF]), min_size=1, max_size=2, unique=True),
    copy_dtype=st.sampled_from([torch.float32, *HALF]),
    follow=st.booleans(),
    decay=st.sampled_from([0.0, 0.1]),
    scale=st.sampled_from([None, 0.5]),
    found=st.sampled_from([None, False]),
)
@few
def test_as_good_as_pytorch(device, name, shapes, dtypes, copy_dtype, follow, decay, scale, found):
    run_all(
        trainings(device, shapes, follow=follow, copy_dtype=copy_dtype),
        name,
        gradients(device, shapes, 9, dtypes),
        weight_decay=decay,
        grad_scale=None if scale is None else torch.tensor(scale, device=device),
        found_inf=None if found is None else torch.tensor(found, device=device),
    )


def test_twenty_updates_of_which_some_are_skipped(device, name):
    shapes = [(64, 33), (CHUNK + 8,), (7, 5)]
    all_three = trainings(device, shapes)
    found = torch.rand(20, generator=torch.Generator().manual_seed(0)) < 0.3
    for i in range(20):
        run_all(
            all_three, name, gradients(device, shapes, 10 + i, [torch.float16]), found_inf=found[i].to(device), lr=0.01
        )
    assert all_three[0].step == 2 + FORMS[name].counted * (~found).sum()


@pytest.mark.filterwarnings("ignore:overflow")  # of the 16-bit copies of SGD's parameters, as in PyTorch
@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_huge_and_tiny_gradients(device, name, scale):
    shapes = [(7, 5), (CHUNK + 8,)]
    all_three = trainings(device, shapes)
    for training in all_three:
        for moment in (*training.exp_avgs, *training.exp_avg_sqs):
            moment.zero_()
    run_all(all_three, name, [g.float() * scale for g in gradients(device, shapes, 9, HALF)])


@pytest.mark.parametrize("changes", [{"ema_decay": 0}, {"ema_decay": 1}, {"weight_decay": 1}])
def test_extreme_numbers(device, name, changes):
    shapes = [(7, 5), (8,)]
    run_all(trainings(device, shapes), name, gradients(device, shapes, 9, HALF), **changes)


@pytest.mark.parametrize(
    ("name", "changes"), [("adamw", {"betas": (0, 0)}), ("lamb", {"betas": (0, 0)}), ("sgd", {"momentum": 0})]
)
def test_without_memory(device, name, changes):
    run_all(trainings(device, [(7, 5), (8,)]), name, gradients(device, [(7, 5), (8,)], 9, HALF), **changes)


def test_average_without_decay_is_the_parameter(device, name):
    training = Training(device, [(7, 5)])
    training.ema = [1e6 * e for e in training.ema]
    training.update(name, "triton", tensors(device, [(7, 5)], 9), ema_decay=0.0)
    assert torch.equal(training.ema[0], training.params[0])


def test_tensor_of_zeros_takes_the_whole_rate(device):
    shapes = [(7, 5), (8,)]
    all_three = trainings(device, shapes)
    for training in all_three:
        training.params[0].zero_()
        training.params[1].zero_()
        training.exp_avgs[1].zero_()
    run_all(all_three, "lamb", [tensors(device, shapes, 9)[0], torch.zeros(8, device=device)])
    assert all_three[0].params[0].any()


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_finite_where_pytorch_is_not(device, name, value):
    shapes = [(7, 5), (CHUNK + 8,)]
    grads = [g.float() for g in gradients(device, shapes, 9, HALF)]
    grads[1][CHUNK + 3] = value
    mine, same, _ = trainings(device, shapes)
    mine.update(name, "triton", grads)
    same.update(name, "reference", grads)
    for key, tensor in mine.state().items():
        torch.testing.assert_close(tensor, same.state()[key], equal_nan=True, rtol=2e-3, atol=1e-5, msg=key)


def bits(training):
    kinds = {2: torch.int16, 4: torch.int32}
    return [t.clone().reshape(-1).view(kinds[t.element_size()]) for t in training.state().values()]


@pytest.mark.parametrize("flag", [True, 1.0, math.nan])
def test_skipped_step_changes_no_bit(device, name, flag):
    shapes = [(7, 5), (CHUNK + 8,)]
    training = Training(device, shapes)
    training.params[0][0] = -0.0
    training.ema[1][3] = math.nan
    before = bits(training)
    grads = [torch.full(shape, math.nan, device=device) for shape in shapes]
    nan = torch.tensor(math.nan, device=device)
    training.update(name, "triton", grads, grad_scale=nan, found_inf=torch.tensor(flag, device=device))
    assert all(torch.equal(a, b) for a, b in zip(bits(training), before, strict=True))


@pytest.mark.parametrize("lr", [2**-6, torch.tensor(2**-6), torch.tensor(2**-6, dtype=torch.float64)])
def test_rate_on_the_device_is_read_there(device, name, lr, monkeypatch):
    shapes = [(7, 5), (CHUNK,)]
    host, there = Training(device, shapes), Training(device, shapes)
    grads = gradients(device, shapes, 9, HALF)
    host.update(name, "triton", grads)
    monkeypatch.setattr(_update, "host_may_look", lambda tensor: False)
    there.update(name, "triton", grads, lr=torch.as_tensor(lr, device=device))
    assert all(torch.equal(a, b) for a, b in zip(bits(host), bits(there), strict=True))


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.999, 0.9999])
def test_bias_corrections_are_exact(device, beta):
    """Of one minus beta to the power of t every digit of float32 counts: the first updates are divided by it."""
    for t in (1, 2, 3, 10, 100, 3000, 10**6, 2**24):
        step = torch.tensor(t - 1.0, device=device)
        c1, c2 = _update.make_schedule(step, torch.tensor(0.1), beta, 0.99, None, None)[2:].tolist()
        assert c1 == pytest.approx(1 - beta**t, rel=4 * torch.finfo(torch.float32).eps)
        assert c2 == pytest.approx(1 - 0.99**t, rel=4 * torch.finfo(torch.float32).eps)
        assert step == t


def test_addresses_that_are_not_aligned(device, name):
    shapes = [(CHUNK + 8,), (64, 32)]
    all_three = trainings(device, shapes)
    for training in all_three:
        for key in STATE:
            moved = [
                torch.nn.functional.pad(t.reshape(-1), (1, 0))[1:].reshape(t.shape) for t in getattr(training, key)
            ]
            setattr(training, key, moved)
    run_all(all_three, name, gradients(device, shapes, 9, [torch.float32]))


@pytest.mark.parametrize("layout", ["expanded", "strided"])
def test_gradients_of_any_layout(device, name, layout):
    shapes = [(7, 5), (3, CHUNK)]
    grads = [laid_out(g, layout) for g in tensors(device, shapes, 9)]
    run_all(trainings(device, shapes), name, grads)


def test_a_hundred_tensors(device):
    shapes = [(1 + i % 7,) for i in range(100)]
    run_all(trainings(device, shapes), "adamw", gradients(device, shapes, 9, [torch.float32]))


def test_autograd_notices_the_update(device, name):
    training = Training(device, [(7, 5)])
    training.params[0].requires_grad_()
    loss = training.params[0].square().sum()
    training.update(name, "triton", tensors(device, [(7, 5)], 9))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tensor: tensor.T, "tensors that are not contiguous"),
        (lambda tensor: tensor.double(), "it does not compute in torch.float64"),
    ],
    ids=["transposed", "float64"],
)
def test_what_triton_does_not_take_is_the_references(device, name, change, reason):
    training = Training(device, [(5, 7)], follow=False)
    for key in ("params", "exp_avgs", "exp_avg_sqs"):
        setattr(training, key, [change(t) for t in getattr(training, key)])
    before = training.params[0].clone()
    with pytest.raises(RuntimeError, match=reason):
        training.update(name, "triton", [torch.ones_like(training.params[0])])
    assert torch.equal(training.params[0], before)
    assert training.step == 2


class Wrapper(torch.Tensor):
    """A tensor without memory, as a DTensor is: its shards are known to PyTorch's operations alone."""

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise NotImplementedError


def test_tensors_without_memory_are_the_references():
    wrapper = torch.Tensor._make_wrapper_subclass(Wrapper, (8,))
    with pytest.raises(kernels._op.Unsupported, match="without memory of their own"):
        _multi_tensor.split([torch.zeros(8)], [wrapper])
    assert _multi_tensor.split([torch.zeros(0), torch.zeros(8)])[0].tensors == 2


# ---- the norm --------------------------------------------------------------------------------------------------------


def norm_of(**inputs):
    return kernels.global_norm(list(inputs.values()))


@given(shapes=some_shapes, dtypes=st.lists(st.sampled_from([torch.float32, *HALF]), min_size=1, max_size=2))
@few
def test_norm_as_good_as_pytorch(device, shapes, dtypes):
    prove(norm_of, {f"t{i}": g for i, g in enumerate(gradients(device, shapes, 9, dtypes))})


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_norm_of_huge_and_tiny_values(device, scale):
    prove(norm_of, {f"t{i}": t * scale for i, t in enumerate(tensors(device, SHAPES, 9))})


@pytest.mark.parametrize("layout", ["expanded", "strided"])
def test_norm_of_any_layout(device, layout):
    prove(norm_of, {"t": laid_out(*tensors(device, [(3, CHUNK)], 9), layout)})


def test_norm_of_16_bit_values_whose_squares_overflow(device):
    prove(norm_of, {"t": torch.full((5000,), 3e4, dtype=torch.float16, device=device)})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_norm_that_is_not_finite(device, value):
    prove(norm_of, {"t": torch.tensor([1.0, value], device=device), "u": torch.ones(3, device=device)})


def test_norm_of_nothing_is_zero(device):
    with kernels.use("triton"), poisoned():
        assert kernels.global_norm([torch.zeros(0, 3, device=device)]) == 0


# ---- bits, launches, registration ------------------------------------------------------------------------------------


@pytest.mark.parametrize("times", [3, pytest.param(50, marks=pytest.mark.card)])
def test_every_run_has_the_same_bits(device, name, times):
    shapes = [(768, 768), (768,), (3072, 768)] if device == "cuda" else [(64, 33), (3, CHUNK)]
    grads = gradients(device, shapes, 9, HALF)

    def run():
        training = Training(device, shapes)
        training.update(name, "triton", grads)
        with kernels.use("triton"):
            return *training.state().values(), kernels.global_norm(grads)

    repeated(run, times)


def recorded(function, decay=0.1, dtypes=(torch.float32,)):
    """Names of the kernels launched for lists of tensors that are not there."""

    def listed(*kinds):
        return [torch.empty(16, 16, device="meta", dtype=kinds[i % len(kinds)]) for i in range(4)]

    scalar, p = torch.empty((), device="meta"), listed(torch.float32)
    own = (p, scalar, 0.9, True, False) if function is sgd.triton_sgd else (p, p, scalar, scalar, 0.9, 0.99, 1e-8)
    with _triton.recording(90) as recording:
        function(p, listed(*dtypes), *own, decay, scalar, scalar, p, 0.9, listed(torch.float16))
    return [launch.kernel.__name__.strip("_").removesuffix("_kernel") for launch in recording.launches]


def test_one_launch_a_list():
    assert recorded(adamw.triton_adamw) == ["schedule", "adamw"]
    assert recorded(adamw.triton_adamw, dtypes=HALF) == ["schedule", "adamw", "adamw"]
    assert recorded(lamb.triton_lamb) == ["schedule", "moments", "ratio", "apply"]
    assert recorded(lamb.triton_lamb, decay=0.0) == ["schedule", "adamw"]
    assert recorded(sgd.triton_sgd) == ["sgd"]
    assert recorded(sgd.triton_sgd, dtypes=HALF) == ["sgd", "sgd"]


def test_only_what_is_aligned_is_said_to_be():
    moved = torch.zeros(17)[1:]
    lists = [torch.zeros(16), torch.zeros(15), torch.zeros(16)], [torch.zeros(16), torch.zeros(15), moved]
    parts = _multi_tensor.split(*lists)
    assert [(part.tensors, part.constants["ALIGNED"]) for part in parts] == [(1, True), (2, False)]


def test_rows_are_exact_and_aligned():
    numbers = [[2**47 + 1, 3, 2**62 + 3], [0, 5], [7]]
    rows = _multi_tensor._rows(numbers, torch.device("cpu"))
    assert [row.tolist() for row in rows] == numbers
    assert all(row.data_ptr() % 16 == rows[0].data_ptr() % 16 for row in rows)


@pytest.mark.parametrize("op", [adamw.OP, lamb.OP, sgd.OP, norm.OP], ids=["adamw", "lamb", "sgd", "norm"])
def test_opcheck(device, op):
    lists = [[t.abs() for t in tensors(device, [(7, 5), (8,)], i)] for i in range(5)]
    copies = [p.half() for p in lists[0]]
    step, lr, scale, found = (torch.tensor(x, device=device) for x in (3.0, 0.01, 0.5, 0.0))
    follow = scale, found, lists[4], 0.9, copies
    args = *lists[:4], step, lr, 0.9, 0.99, 1e-8, 0.1, *follow
    args = {norm.OP: (lists[0],), sgd.OP: (*lists[:3], lr, 0.9, True, False, 0.1, *follow)}.get(op, args)
    with kernels.use("triton"):
        torch.library.opcheck(op.registered, args)


def test_compiled_is_eager(device, name):
    torch.compiler.reset()
    shapes = [(7, 5), (CHUNK + 8,)]
    eager, compiled = Training(device, shapes), Training(device, shapes)
    grads = gradients(device, shapes, 9, HALF)
    eager.update(name, "triton", grads)

    def update(params, grads, exp_avgs, exp_avg_sqs, step, ema, copies):
        states = exp_avgs, exp_avg_sqs
        FORMS[name](params, grads, states, step, 2**-6, ema=ema, ema_decay=0.75, copies=copies)

    lists = compiled.params, grads, compiled.exp_avgs, compiled.exp_avg_sqs
    with kernels.use("triton"):
        torch.compile(update, fullgraph=True, backend="aot_eager")(*lists, compiled.step, compiled.ema, compiled.copies)
    assert all(torch.equal(a, b) for a, b in zip(bits(eager), bits(compiled), strict=True))


@pytest.mark.gpu
@pytest.mark.card
def test_graph_replays_and_the_host_never_waits(name):
    """With a rate changed on the device, and other updates and another graph between the replays."""
    shapes = [(768, 768), (768,), (1000, 768), (5,)]
    eager, graphed = Training("cuda", shapes), Training("cuda", shapes)
    grads, rate = gradients("cuda", shapes, 9, [torch.float32]), torch.tensor(0.01, device="cuda")
    eager.update(name, "triton", grads, lr=rate)
    graphed.update(name, "triton", grads, lr=rate)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    torch.cuda.set_sync_debug_mode("error")
    try:
        eager.update(name, "triton", grads, lr=rate)
        with torch.cuda.graph(graph):
            graphed.update(name, "triton", [g * 1.0 for g in grads], lr=rate)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    other = Training("cuda", shapes)
    with torch.cuda.graph(torch.cuda.CUDAGraph(), pool=graph.pool()):
        other.update(name, "triton", [g * 1.0 for g in grads], lr=rate)
    graph.replay()
    rate.fill_(0.002)
    graph.replay()
    eager.update(name, "triton", grads, lr=rate)
    assert all(torch.equal(a, b) for a, b in zip(bits(eager), bits(graphed), strict=True))
