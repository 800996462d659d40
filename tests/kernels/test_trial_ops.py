"""Trials of every op: what is right is not taken for wrong, nor the other way; in autocast and compiled graphs, too."""

import pytest
import torch

from fastdeit import kernels
from fastdeit.kernels import _op, _triton
from fastdeit.kernels._example import FEW, Maker
from fastdeit.kernels._op import OPS, REFERENCE
from fastdeit.kernels._tried import INDUCTOR
from fastdeit.kernels.trial import candidates, tuning
from tests.kernels.examples import every_example, few, leaves
from tests.kernels.test_compiled import Graphs
from tests.kernels.trials import CPU, SPEED, chosen, raises, step, tried, twin, x

CALLS = every_example()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_the_explicit_backward_of_every_op_is_right(name, dtype):
    op, example = CALLS[name]
    torch.manual_seed(0)
    args = few(example, dtype)
    before = [tensor.detach().clone() for tensor in _op.tensors_in(args)]
    found = tried(op, args, twin(op))
    assert found.wrong == {}
    assert found.seconds.keys() == {REFERENCE, "twin"}
    assert all(torch.equal(a, b) for a, b in zip(before, _op.tensors_in(args), strict=True))
    assert all(tensor.grad is None for tensor in leaves(args))


@pytest.mark.parametrize("name", CALLS)
def test_one_element_that_is_off_in_any_op_is_found(name):
    op, example = CALLS[name]
    torch.manual_seed(0)

    def change(result):
        share = 0.05 if result.itemsize > 1 else 0.5  # of 8 bits, less could be less than a step
        values = result.double()
        values.view(-1)[-1] += share * values.abs().max()
        result.copy_(values)

    found = tried(op, few(example, torch.float32), twin(op, change))
    assert found.wrong.keys() == {"twin"}


@pytest.mark.parametrize("change", ["nothing", "one scale", "one NaN"])
def test_8_bits_are_judged_with_their_scale(change):
    """GELU of 7 may be 7 or a rounding above it, where the scale is the next: both stand for the same numbers."""
    pre = torch.linspace(-3, 7, 48).expand(4, 48).clone().to(torch.bfloat16)
    op = OPS["fp8_gelu"]

    def by_the_next_scale(pre):
        values, scale = op.backends[-1].forward(pre)
        values, scale = (values.float() / 2).to(values.dtype), scale * 2
        if change != "nothing":
            scale[1] = torch.nan if change == "one NaN" else scale[1] * 1.5
        return values, scale

    wrong = tried(op, [pre], _op.Backend("twin", lambda device, forced: (True, ""), by_the_next_scale)).wrong
    assert wrong.keys() == (set() if change == "nothing" else {"twin"})


def test_without_memory_for_float64_what_is_grossly_wrong_is_found(monkeypatch):
    op, example = CALLS["mlp"]
    monkeypatch.setattr(candidates, "_doubled", raises(torch.OutOfMemoryError("out of memory")))
    torch.manual_seed(0)
    args = few(example, torch.bfloat16)
    assert tried(op, args, twin(op)).wrong == {}
    spoiled = tried(op, args, twin(op, lambda result: result[:1].zero_()))
    assert "its mean square error" in spoiled.wrong["twin"] or "its largest error" in spoiled.wrong["twin"]


def test_an_update_that_is_skipped_proves_nothing(begin, cache):
    op = OPS["fused_adamw"]
    torch.manual_seed(0)
    args = op.examples[0].build(Maker(FEW, torch.float32, CPU))
    found_inf = args[-4]
    tuner = begin()
    found_inf.fill_(1.0)
    before = [p.clone() for p in args[0]]
    step(tuner, op, *args)
    assert tuner.open
    assert tuner.state() == []
    found_inf.fill_(0.0)
    step(tuner, op, *args)
    assert not tuner.open
    assert set(chosen(tuner)) == {"fused_adamw"}
    assert not torch.equal(before[0], args[0][0])


def test_updates_that_are_all_skipped_run_on_the_reference(begin, cache):
    op = OPS["fused_adamw"]
    args = op.examples[0].build(Maker(FEW, torch.float32, CPU))
    args[-4].fill_(1.0)
    tuner = begin()
    for _ in range(tuning.STEPS):
        assert tuner.open
        step(tuner, op, *args)
    assert not tuner.open
    assert [backend for *_, backend in tuner.state()] == [REFERENCE]


def test_a_trial_changes_nothing_that_the_update_does_not(begin, cache):
    op = OPS["fused_adamw"]
    torch.manual_seed(0)
    mine = op.examples[0].build(Maker(FEW, torch.float32, CPU))
    torch.manual_seed(0)
    theirs = op.examples[0].build(Maker(FEW, torch.float32, CPU))
    step(tuner := begin(), op, *mine)
    with kernels.use(fused_adamw=chosen(tuner)["fused_adamw"]):
        op(*theirs)
    for one, other in zip(_op.tensors_in(mine), _op.tensors_in(theirs), strict=True):
        assert torch.equal(one, other)


# ---- where calls are made --------------------------------------------------------------------------------------------


def test_a_call_under_autocast_is_tried_in_its_dtype(begin, cache, monkeypatch):
    op, seen = OPS["attention"], []

    def spied(*args):
        seen.append(args[0].dtype)
        assert not torch.is_autocast_enabled("cpu")
        return op.backends[-1].forward(*args)

    monkeypatch.setattr(op, "backends", (twin(op)._replace(forward=spied), op.backends[-1]))
    monkeypatch.setitem(op.__dict__, "inductor", op.native)
    tuner = begin()
    with torch.autocast("cpu", torch.bfloat16):
        step(tuner, op, x(2, 3, 12), 2, 1.0, None, None)
    assert set(seen) == {torch.bfloat16}
    assert tuner.rows[0].shape.dtype == "float32 in bfloat16"


@pytest.mark.parametrize("name", ["off", "gradient_off"])
def test_an_op_in_a_compiled_graph_is_tried_with_its_gradient(make, begin, monkeypatch, name):
    """There it is opaque, and its arguments ask for no gradient."""
    torch.compiler.reset()
    monkeypatch.setitem(SPEED, name, 0.1)
    op, tuner = make(name, "quick"), begin()
    graphs = Graphs(lambda x: op(x, 2.0))
    with tuner.trying():
        result = graphs.run(x())
    assert graphs.found == [{op.name}]
    assert torch.equal(result, 2 * x())
    assert chosen(tuner) == {op.name: "quick"}
    assert name in tuner.said[0]
    assert not tuner.left_to_compiler()


def test_a_registered_op_is_tried_with_its_gradient_though_no_argument_asks_for_one(make, begin, monkeypatch):
    monkeypatch.setitem(SPEED, "gradient_off", 0.1)
    op, tuner = make("gradient_off", "quick"), begin()
    with tuner.trying(), torch.no_grad():
        op.registered(x(grad=False), 2.0)
    assert [(row.backend, row.shape.trained) for row in tuner.rows] == [("quick", True)]


def test_the_compiler_sees_through_what_runs_on_pytorch(make, begin, monkeypatch):
    torch.compiler.reset()
    op, tuner = make("slow"), begin()
    graphs = Graphs(lambda x: op(x, 2.0))
    with tuner.trying():
        graphs.run(x())
    assert chosen(tuner) == {op.name: INDUCTOR}
    assert tuner.left_to_compiler()
    torch.compiler.reset()
    graphs.run(x())
    assert graphs.found == [{op.name}, set()]


@pytest.mark.parametrize(("seconds", "most"), [(1e-6, 1 + candidates._MOST_CALLS), (4e-4, 1 + 5), (3.0, 1)])
def test_a_short_call_is_timed_many_times_and_a_long_one_once(monkeypatch, seconds, most):
    """The clock advances with the calls alone, so that a busy machine does not decide how many there are."""
    calls = []
    monkeypatch.setattr(candidates, "perf_counter", lambda: seconds * len(calls))
    assert candidates.with_launches(CPU)("any", lambda: calls.append(1)) == pytest.approx(seconds)
    assert len(calls) == most


def test_the_time_of_a_device_begins_when_it_has_all_calls(monkeypatch):
    """The host queues them while the device sleeps; launches do not count."""
    asked = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            asked.append("event")
            self.calls = asked.count("call")

        def synchronize(self):
            asked.append("wait")

        def elapsed_time(self, end):
            return 0.5 * (end.calls - self.calls)  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: asked.append("sleep"), raising=False)
    seconds = candidates.of_the_device(CPU)("any", lambda: asked.append("call"))
    once = ["sleep", "event", "call", "event", "wait"]
    assert asked == [*once, "sleep", "event", *["call"] * 4, "event", "wait"]
    assert seconds == pytest.approx(0.5e-3)


INTERPRETED = [
    pytest.param(op, backend, example, id=f"{op.name}-{backend.name}-{example.name}".rstrip("-"))
    for op, example in CALLS.values()
    for backend in op.backends
    if backend.name in ("triton", "epilogue", "fused_backward")
]


@pytest.mark.slow
@pytest.mark.skipif(not _triton.INTERPRETED, reason="the interpreter is off")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("op", "backend", "example"), INTERPRETED)
def test_no_kernel_of_ours_is_taken_for_wrong(op, backend, example, dtype, monkeypatch):
    monkeypatch.setattr(candidates, "ROUNDS", 1)
    torch.manual_seed(0)
    found = tried(op, few(example, dtype), backend)
    assert found.wrong == {}
    assert backend.name in found.seconds | found.failed


@pytest.mark.slow
def test_inductor_itself(begin, cache):
    """With PyTorch's compiler and the real clock."""
    op, example = CALLS["mlp"]
    torch.manual_seed(0)
    tuner = begin(clock=None)
    step(tuner, op, *few(example))
    (row,) = tuner.rows
    assert row.seconds.keys() | row.failed.keys() == {REFERENCE, INDUCTOR}
