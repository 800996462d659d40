"""Trials of kernels: which candidate is chosen, for which calls, in which process, in a run that is resumed."""

import json
import os
import re

import pytest
import torch

from fastdeit import kernels
from fastdeit.engine.dist import World
from fastdeit.kernels import Tuning, _tried
from fastdeit.kernels._example import FEW, Maker
from fastdeit.kernels._op import OPS, REFERENCE
from fastdeit.kernels._tried import INDUCTOR, shape_of
from fastdeit.kernels.trial import candidates, tuning
from fastdeit.kernels.trial.candidates import BrokenDevice
from tests.kernels.trials import CPU, KINDS, SPEED, WRONG, backward, chosen, forward, raises, step, x

# ---- the choice ------------------------------------------------------------------------------------------------------


def test_the_fastest_that_is_right_runs_from_the_first_call_on(make, begin, cache):
    op, tuner = make("slow", "middling", "quick"), begin()
    with tuner.trying():
        result = op(x(), 2.0)
        assert op.calls[-1] == "quick"
        op.calls.clear()
        op(x(), 3.0)
        assert op.calls == ["quick"]
    assert torch.equal(result, 2 * x())
    assert (tuner.open, tuner.changed) == (False, True)
    (file,) = cache.glob("*.json")
    assert tuner.said == [f"kernels: {op.name} quick (4.0x PyTorch); stored in {file}"]
    (row,) = json.loads(file.read_text())["rows"]
    assert row["seconds"] == {name: SPEED[name] for name in (REFERENCE, "slow", "middling", "quick", INDUCTOR)}
    assert op.select(CPU)[0].name == "quick"
    assert "4.00x PyTorch" in op.select(CPU)[1]
    step(tuner, op)
    assert not tuner.changed
    tuner.close()
    assert op.select(CPU)[0].name == "slow"  # what holds without a trial


def test_calls_in_a_pause_are_not_tried(make, begin):
    """Such as those whose shapes differ between processes, which would wait for each other."""
    op, tuner = make("slow", "quick"), begin()
    with tuner.trying():
        with tuner.paused():
            op(x(), 2.0)
        assert chosen(tuner) == {}
        op(x(), 2.0)
    assert chosen(tuner) == {op.name: "quick"}


@pytest.mark.parametrize(
    ("names", "expected"),
    [((), INDUCTOR), (("slow",), INDUCTOR), (("slow", "quick"), "quick"), (("middling",), "middling")],
)
def test_pytorch_itself_is_a_candidate_in_both_forms(make, begin, monkeypatch, names, expected):
    op, tuner = make(*names), begin()
    step(tuner, op)
    assert chosen(tuner) == {op.name: expected}
    op.calls.clear()
    y = op(x(), 2.0)
    assert op.calls == [expected]
    y.sum().backward()
    monkeypatch.setitem(SPEED, REFERENCE, 0.5)
    other = make(*names)
    step(again := begin(), other)
    other.calls.clear()
    assert type(other(x(), 2.0).grad_fn).__name__ == "MulBackward0"
    assert (chosen(again), other.calls) == ({other.name: REFERENCE}, [])


@pytest.mark.parametrize("name", sorted(KINDS.keys() - {"quick", "slow", "middling"}))
def test_what_is_wrong_or_raises_is_not_used(make, begin, cache, monkeypatch, name):
    monkeypatch.setitem(SPEED, name, 0.1)
    op, tuner = make(name, "quick"), begin()
    assert torch.equal(step(tuner, op), 2 * x())
    assert chosen(tuner) == {op.name: "quick"}
    if name not in WRONG:
        assert "taste" in tuner.rows[0].failed[name] or "memory" in tuner.rows[0].failed[name]
        assert len(tuner.said) == 1
        return
    assert tuner.said[0].startswith(f"kernels: WRONG ON THIS CARD and not used: {op.name} on {name}: ")
    (report,) = cache.glob("report-*.json")
    assert f"Please send {report}" in tuner.said[0]
    content = json.loads(report.read_text())
    assert (content["op"], content["backend"], content["arguments"][1]) == (op.name, name, 2.0)
    assert content["arguments"][0] == "torch.float32 [6, 4], strides [4, 1]"
    op.calls.clear()
    op(x(3, 5), 2.0)  # disabled for all shapes
    assert name not in op.calls
    tuner.close()
    later = begin()
    op.calls.clear()
    step(later, op, x(7, 5), 2.0)
    assert name not in op.calls
    assert later.said[0].startswith(f"kernels: {op.name} does not run on {name} on this card, as was found before: ")
    later.close()
    step(begin(anew=True), op)  # as `fastdeit kernels tune`
    assert name in op.calls


@pytest.mark.parametrize(
    ("name", "wait", "why"),
    [
        ("broken", raises(RuntimeError("an illegal memory access")), "RuntimeError: unspecified launch failure"),
        ("quick", lambda call: candidates._poll(lambda: False), "it has not ended after 0.01 s"),
    ],
)
def test_a_broken_device_is_noted_before_all_ends(make, begin, cache, monkeypatch, name, wait, why):
    op, tuner = make(name), begin()
    monkeypatch.setattr(candidates, "_wait", wait)
    monkeypatch.setattr(candidates, "_PATIENCE_S", 0.01)
    with pytest.raises(BrokenDevice, match=re.escape(f"has broken the device ({why}); it will not be tried again")):
        step(tuner, op)
    monkeypatch.undo()
    monkeypatch.setenv("FASTDEIT_CACHE", str(cache.parent))
    tuner.close()
    op.calls.clear()
    step(begin(), op)
    assert name not in op.calls


def test_what_turns_out_wrong_at_a_later_shape_is_given_up_at_the_earlier_ones(make, begin, monkeypatch):
    """Such as offsets that overflow in large tensors."""
    monkeypatch.setitem(SPEED, "large_off", 0.1)
    monkeypatch.setitem(
        KINDS, "large_off", (lambda x, factor: forward(x, factor) * (1.001 if len(x) > 6 else 1), backward)
    )
    op, tuner = make("large_off", "slow", "quick"), begin()
    with tuner.trying():
        op(x(), 2.0)
        assert op.calls[-1] == "large_off"
        op(x(50, 4), 2.0)
        op(x(), 2.0)
        assert op.calls[-1] == "quick"
    assert [row.backend for row in tuner.rows] == ["quick", "quick"]
    assert {backend for *_, backend in tuner.state()} == {"quick"}


def test_a_forward_alone_is_tried_as_such(make, begin):
    op, tuner = make("gradient_off", "quick"), begin()
    SPEED["gradient_off"] = 0.1
    try:
        with tuner.trying(), torch.no_grad():
            op(x(), 2.0)
    finally:
        del SPEED["gradient_off"]
    assert [(row.backend, row.shape.trained) for row in tuner.rows] == [("gradient_off", False)]
    assert "gradient_off" in tuner.state()[0]


def test_where_nothing_else_can_run_that_is_known_next_time(make, begin):
    op = make("picky")
    op.inductor = raises(RuntimeError("no compiler"))
    step(first := begin(), op)
    assert first.said[0].startswith(f"kernels: {op.name} reference; stored in")
    assert first.rows[0].failed == {"picky": "x is not to its taste", INDUCTOR: "it raised RuntimeError: no compiler"}
    first.close()
    op.calls.clear()
    step(begin(), op)
    assert op.calls == []


def test_forced_choices_are_not_tried(make, begin):
    op, tuner = make("slow", "quick"), begin()
    with kernels.use(**{op.name: "slow"}):
        step(tuner, op)
    assert op.calls == ["slow"]
    assert tuner.rows == []


def test_off_and_auto_on_a_cpu_do_nothing(make, begin, cache):
    op = make("slow", "quick")
    for mode in ("off", "auto"):
        tuner = begin(mode)
        step(tuner, op)
        assert _tried.current() is None
        assert (tuner.state(), tuner.said, tuner.changed, tuner.open) == (None, [], False, False)
    assert op.calls == ["slow", "slow"]
    assert not cache.exists()


def test_only_the_thread_of_the_step_tries(make, begin):
    op, tuner = make("slow", "quick"), begin()
    with tuner.trying():
        candidates.apart(lambda: op(x(), 2.0), CPU)
    assert op.calls == []
    assert tuner.rows == []


@pytest.mark.parametrize("differentiated", [False, True])
def test_what_a_backward_calls_is_tried_in_autograds_thread_unless_it_is_differentiated(make, begin, differentiated):
    """On a GPU a backward runs in a thread of autograd's own, which a trial of a gradient would wait for."""
    op, tuner = make("slow", "quick"), begin()

    class Behind(torch.autograd.Function):
        @staticmethod
        def forward(ctx, values):
            return values.clone()

        @staticmethod
        def backward(ctx, grad):
            with torch.set_grad_enabled(differentiated):
                return op(grad.clone().requires_grad_(differentiated), 2.0).detach()

    with tuner.trying():
        candidates.apart(lambda: Behind.apply(x()).sum().backward(), CPU)
    assert chosen(tuner) == ({} if differentiated else {op.name: "quick"})


# ---- shapes ----------------------------------------------------------------------------------------------------------


def test_shapes_that_share_a_choice():
    like = shape_of([x(5, 197, 8), 2.0, None], True)
    assert shape_of([x(5, 197, 8), 3.0, None], True) == like  # numbers of Python's do not matter
    assert shape_of([x(4, 197, 8), 2.0, None], True) == like  # 788 and 985 rows: up to 1024
    assert like.rows == 1024
    others = [
        [x(6, 197, 8), 2.0, None],
        [x(5, 198, 8), 2.0, None],
        [x(5, 197, 9), 2.0, None],
        [x(5, 197, 8).bfloat16(), 2.0, None],
        [x(5, 197, 8), 2.0, x()],
        [x(5, 197, 8), 2, None],
    ]
    shapes = {like, shape_of([x(5, 197, 8), 2.0, None], False), *(shape_of(args, True) for args in others)}
    assert len(shapes) == 2 + len(others)
    with torch.autocast("cpu", torch.bfloat16):
        assert shape_of([x(5, 197, 8), 2.0, None], True).dtype == "float32 in bfloat16"
        assert shape_of([x(5, 197, 8).bfloat16()], True).dtype == "bfloat16"
    lists = shape_of([[x(3, 4), x(5)], []], False)
    assert (lists.rows, lists.tokens, lists.width, lists.others) == (32, 2, 4, "-")
    assert shape_of([torch.zeros(()), 1], False)[:3] == (1, 1, 1)
    assert shape_of([torch.zeros(0, 4)], False).rows == 1


def test_other_shapes_go_by_what_was_chosen_at_their_width(make, begin):
    op, tuner = make("slow", "quick"), begin()
    step(tuner, op)
    op.calls.clear()
    op(x(1000, 4), 2.0)
    assert op.calls == ["quick"]
    op(x(6, 5), 2.0)  # of that width nothing was tried: PyTorch's own operations
    assert op.calls == ["quick"]


def test_what_was_not_tried_runs_on_pytorch_from_the_beginning(make, begin):
    """Before the first step a teacher may be scored."""
    op, tuner = make("broken", "quick"), begin()
    tuner.begin(0, None)
    assert torch.equal(op(x(), 2.0), 2 * x())
    assert op.calls == []
    step(tuner, op)
    assert chosen(tuner) == {op.name: "quick"}


def test_what_was_tried_without_its_backward_is_not_trained_with(make, begin):
    op, tuner = make("slow", "quick"), begin()
    with tuner.trying(), torch.no_grad():
        op(x(), 2.0)
    op.calls.clear()
    op(x(), 2.0)
    op(x(grad=False), 2.0)
    assert op.calls == ["quick"]


def test_a_phase_may_bring_new_shapes(make, begin):
    op, tuner = make("slow", "quick"), begin()
    step(tuner, op)
    tuner.reopen()
    step(tuner, op, x(6, 5), 2.0)
    assert [row.shape.width for row in tuner.rows] == [4, 5]


# ---- budget, ranks, resume -------------------------------------------------------------------------------------------


def test_without_a_budget_all_runs_on_pytorch(make, begin, cache):
    op, tuner = make("quick"), begin(budget=0.0)
    step(tuner, op)
    assert op.calls == []
    assert tuner.said == [
        "kernels: nothing was tried; the budget of 0 s left no time, hence PyTorch's own operations, for " + op.name
    ]
    assert not cache.exists()
    op(x(), 2.0)
    assert op.calls == []


def test_what_the_budget_does_not_reach(make, begin, cache, monkeypatch):
    """Time passes in trials only: the second op finds less than half of the budget, the third nothing."""
    now = iter(range(0, 10_000, 7)).__next__
    monkeypatch.setattr(tuning, "monotonic", now)
    monkeypatch.setattr(candidates, "monotonic", lambda: 0)
    first, second, third = (make("quick") for _ in range(3))
    tuner = begin(budget=13.0)
    with tuner.trying():
        for op in (first, second, third):
            op(x(), 2.0)
    assert INDUCTOR in first.calls
    assert INDUCTOR not in second.calls
    assert "quick" in second.calls
    assert third.calls == []
    assert f"try more candidates of {second.name}" in tuner.said[0]
    assert f"for {third.name}" in tuner.said[0]
    (file,) = cache.glob("*.json")
    assert [row["op"] for row in json.loads(file.read_text())["rows"]] == [first.name]


def test_all_processes_take_what_the_main_one_found(make, begin, monkeypatch):
    op = make("off", "slow", "quick")
    values = []
    main = begin(share=lambda value: values.append(value) or value)
    step(main, op)
    state = main.state()
    main.close()
    monkeypatch.setitem(SPEED, "quick", 100.0)
    answers = iter(values)
    other = begin(share=lambda value: next(answers), main=False)
    op.calls.clear()
    step(other, op)
    assert op.calls == ["quick"]
    assert other.state() == state
    assert next(answers, None) is None
    assert "off" not in [backend.name for backend, _ in op.able_unforced(CPU)]


def trial_of_a_rank(rank, size, cache):
    """(state, what this rank ran, what it timed) of a trial in which every rank would choose something else."""
    os.environ["FASTDEIT_CACHE"] = cache  # the server that ranks are forked from may have another
    torch.manual_seed(0)
    timed = []

    def own_clock(name, call):
        timed.append(name)
        call()
        return {REFERENCE: 2.0, "aten": 1.0}[name] if rank == 0 else {REFERENCE: 1.0, "aten": 2.0}[name]

    world = World(CPU, rank, size)
    tuner = Tuning("on", CPU, share=world.same, main=world.main, clock=own_clock, say=str)
    args = OPS["fused_adamw"].examples[0].build(Maker(FEW, torch.float32, CPU))
    with tuner.trying():
        OPS["fused_adamw"](*args)
    return tuner.state(), OPS["fused_adamw"].select(CPU)[0].name, len(timed), args[0][0].sum().item()


@pytest.mark.slow
def test_two_processes_choose_alike(ranks, cache):
    main, other = ranks(2, trial_of_a_rank, str(cache.parent))
    assert main[0] == other[0] != []
    assert main[1] == other[1] == "aten"
    assert main[2] > other[2] == 0
    assert main[3] == other[3]


def test_a_resumed_run_has_the_choices_of_its_checkpoint(make, begin, monkeypatch):
    op = make("slow", "quick")
    step(before := begin(), op)
    state = json.loads(json.dumps(before.state()))
    before.close()
    monkeypatch.setitem(SPEED, "slow", 0.1)
    step(newer := begin(anew=True), op)  # the cache has another choice now
    assert chosen(newer) == {op.name: "slow"}
    newer.close()
    for mode in ("on", "off", "auto"):
        resumed = begin(mode)
        resumed.begin(3, state)
        op.calls.clear()
        step(resumed, op)
        assert op.calls == ["quick"]
        assert resumed.state() == state
        resumed.close()


def test_a_run_that_began_without_trials_goes_on_without_them(make, begin):
    op, tuner = make("slow", "quick"), begin()
    tuner.begin(3, None)
    step(tuner, op)
    assert op.calls == ["slow"]
    assert tuner.said == ["kernels: the run was begun without trials of them, and goes on as it was begun"]


def test_a_choice_of_a_checkpoint_that_does_not_hold_here_is_told(make, begin):
    op, tuner = make("slow", "quick"), begin()
    shape = list(shape_of([x(), 2.0], True))
    tuner.begin(3, [[op.name, shape, "marvel"], ["no_op", shape, "quick"]])
    assert "choice of marvel for" in tuner.said[0]
    assert "there is no op no_op" in tuner.said[1]
    tuner.begin(3, [["mlp", shape, "triton"]])
    assert "choice of triton for mlp does not hold here: no CUDA device" in tuner.said[2]
    step(tuner, op)
    assert chosen(tuner) == {op.name: "quick"}
