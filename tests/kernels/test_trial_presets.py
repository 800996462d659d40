"""Whole steps in presets: what a preset takes, which one wins, and what becomes of it in the next run."""

import json
import weakref

import pytest
import torch

from fastdeit.kernels import _op
from fastdeit.kernels._op import REFERENCE
from fastdeit.kernels._tried import INDUCTOR, shape_of
from fastdeit.kernels.trial import presets
from fastdeit.kernels.trial.presets import ALONE, DEFAULT, PRESETS, fastest
from fastdeit.kernels.trial.store import Row
from tests.kernels.trials import SPEED, chosen, clock, x

ORDER = {"reference": 0.5, "reference, compiled": 0.75, DEFAULT: 1.0}


def row(op, **seconds):
    """Of an op on a card where these backends are right."""
    seconds = {REFERENCE: 9.0} | seconds
    return Row(op, shape_of([x(), 1.0], True), min(seconds, key=seconds.get), seconds)


CARD = [
    row("add_layer_norm", triton=2.0, inductor=1.0),
    row("mlp", triton=3.0, epilogue=4.0, epilogue_forward=2.0, inductor=5.0),
    row("attention", triton=3.0, fused_backward=2.0, hopper=1.5, fa3=1.0, efficient=6.0),
    row("query_attention", triton=1.0),
]


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        (DEFAULT, "triton triton fa3 triton"),
        ("epilogues", "triton epilogue_forward fa3 triton"),
        ("two-kernel attention", "triton triton triton triton"),
        ("one-kernel attention", "triton triton hopper triton"),
        ("libraries' attention", "triton triton fa3 triton"),
        ("epilogues, one-kernel attention", "triton epilogue_forward hopper triton"),
        (ALONE, "inductor epilogue_forward fa3 triton"),
        ("reference", "reference reference reference reference"),
        ("reference, compiled", "inductor inductor fa3 triton"),
    ],
)
def test_what_a_preset_takes(preset, expected):
    assert [presets.backend(preset, of) for of in CARD] == expected.split()


def test_presets_that_are_the_same_are_one():
    assert list(presets.distinct(CARD[:1])) == [DEFAULT, ALONE, "reference"]
    on_a_cpu = [row("mlp", inductor=10.0), row("attention", inductor=3.0)]
    assert presets.distinct(on_a_cpu) == {
        DEFAULT: [REFERENCE, INDUCTOR],
        "reference": [REFERENCE] * 2,
        "reference, compiled": [INDUCTOR] * 2,
    }


def test_every_backend_that_a_trial_may_choose_is_in_a_preset():
    forms = [(op, name) for preset in PRESETS.values() for op, names in preset.items() for name in names]
    for op in presets._OF_ATTENTION + presets._OF_MLP:
        named = {name for of, name in forms if of == op} | {"triton", REFERENCE}
        others = {"native"}  # for cards whose tensor cores Triton does not reach: the only one there
        assert {backend.name for backend in _op.OPS[op].backends} <= named | others


@pytest.mark.parametrize(
    ("rounds", "expected"),
    [
        ({DEFAULT: [4, 4, 4], "epilogues": [3, 3, 3], "reference": [9, 9, 9]}, "epilogues"),
        ({DEFAULT: [4, 4, 4], "epilogues": [3, 3, 5]}, DEFAULT),  # the default was faster once
        ({DEFAULT: [4, 4, 4], "epilogues": [3, 3, 4]}, DEFAULT),
        ({DEFAULT: [4, 8, 4], "epilogues": [3, 7, 3]}, "epilogues"),  # a slow round was slow for both
        ({DEFAULT: [4, 4, 4], "epilogues": [1, 1, 5], "reference": [3, 3, 3]}, "reference"),
        ({"epilogues": [3, 3, 3], "reference": [2, 4, 2]}, "reference"),
    ],
)
def test_the_default_gives_way_only_where_it_was_slower_in_every_round(rounds, expected):
    assert fastest(rounds) == expected


# ---- in a trial ------------------------------------------------------------------------------------------------------


@pytest.fixture
def rehearsed(make, begin, monkeypatch):
    """`rehearsed(seconds by preset, op, **options)`: a tuner that has rehearsed a forward and backward of the op."""

    def start(seconds, op=None, **options):
        for name, each in seconds.items():
            monkeypatch.setitem(SPEED, f"preset {name}", each)
        op, tuner = op or make("slow", "quick"), begin(presets=True, **options)

        def run():
            value = x()
            op(value, 2.0).sum().backward()

        with tuner.trying():
            assert tuner.rehearses
            tuner.rehearse(run)
            assert not tuner.rehearses
        op.calls.clear()
        run()
        return op, tuner

    return start


def test_the_preset_in_which_the_whole_step_is_fastest_holds(rehearsed, cache):
    op, tuner = rehearsed(ORDER)
    assert op.calls == []  # PyTorch's own operations, although quick is the fastest alone
    assert chosen(tuner) == {op.name: REFERENCE}
    assert [backend for *_, backend in tuner.state()] == [REFERENCE]
    (file,) = cache.glob("*.json")
    assert tuner.said == [f"kernels: {op.name} reference; the whole step reference, 2.00x default; stored in {file}"]
    reason = _op.OPS[op.name].select(torch.device("cpu"))[1]
    assert reason.startswith("the whole step runs in the preset reference: fastest of default, reference, reference, ")
    (whole,) = json.loads(file.read_text())["wholes"]
    assert (whole["preset"], whole["seconds"]) == ("reference", ORDER)
    (kept,) = json.loads(file.read_text())["rows"]
    assert kept["backend"] == "quick"  # what is known of the op alone


def test_what_is_as_fast_as_the_default_does_not_take_its_place(rehearsed):
    op, tuner = rehearsed(dict.fromkeys(ORDER, 1.0))
    assert op.calls == ["quick"]
    assert "; the whole step default; stored in" in tuner.said[0]


def test_the_next_run_takes_the_preset_without_timing_it(rehearsed):
    op, first = rehearsed(ORDER)
    first.close()
    timed = []
    op, tuner = rehearsed({}, op, clock=lambda name, call: timed.append(name) or clock(name, call))
    assert (op.calls, timed) == ([], [])
    assert "the whole step reference, 2.00x default; as found before" in tuner.said[0]
    tuner.close()
    op, again = rehearsed({"reference": 2.0}, op, anew=True)  # as `fastdeit kernels tune`
    assert chosen(again) == {op.name: INDUCTOR}


def test_a_step_of_other_calls_is_timed_anew(rehearsed, make):
    rehearsed(ORDER)[1].close()
    _, tuner = rehearsed({"reference": 2.0})  # of another op
    assert [whole.preset for whole in tuner.wholes] == ["reference, compiled"]


@pytest.mark.parametrize("good", [0, 2])
def test_a_preset_that_fails_is_left_out(rehearsed, good):
    """Also where it does after some good steps, as where memory is short; what it held is free for those after it."""
    held, alive = [], []

    def own(name, call):
        alive.append(sum(ref() is not None for ref in held))
        if name == "preset reference":
            activations = torch.nn.Identity()
            held.append(weakref.ref(activations))
            if len(held) > good:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return clock(name, call)

    _, tuner = rehearsed(ORDER, clock=own)
    assert [whole.preset for whole in tuner.wholes] == ["reference, compiled"]
    assert tuner.wholes[0].failed == {"reference": "OutOfMemoryError: CUDA out of memory"}
    assert len(held) > good
    assert not any(alive)


def test_where_no_preset_runs_the_error_is_that_of_the_step(rehearsed):
    def own(name, call):
        if name.startswith("preset"):
            raise ZeroDivisionError(name)
        return clock(name, call)

    with pytest.raises(ZeroDivisionError, match="preset reference, compiled"):
        rehearsed({}, clock=own)


def test_a_budget_that_does_not_reach_the_presets(rehearsed, monkeypatch, cache):
    """Time passes in calls of the presets only: the first of them takes what is left."""
    now = [0.0]
    for module in ("presets", "tuning", "candidates"):
        monkeypatch.setattr(f"fastdeit.kernels.trial.{module}.monotonic", lambda: now[0])

    def own(name, call):
        now[0] += 10.0 * (name == "preset default")
        return clock(name, call)

    op, tuner = rehearsed(ORDER, clock=own, budget=70.0)  # one round and two more
    assert op.calls == ["quick"]
    assert chosen(tuner) == {op.name: "quick"}
    assert "the budget of 70 s left the next run to try more candidates of presets of the whole step" in tuner.said[0]
    (file,) = cache.glob("*.json")
    assert json.loads(file.read_text())["wholes"] == []
    tuner.close()
    _, enough = rehearsed({}, op, clock=own, budget=81.0)
    assert [whole.preset for whole in enough.wholes] == ["reference"]


def test_other_processes_make_the_same_steps_and_take_the_main_ones_preset(rehearsed):
    values, ran = [], []
    op, main = rehearsed(
        ORDER, share=lambda value: values.append(value) or value, clock=lambda n, c: ran.append(n) or clock(n, c)
    )
    state = main.state()
    main.close()
    answers, steps = iter(values), []

    def counted(name, call):
        raise AssertionError("only the main process times")

    run = op.native
    op.native = lambda *args: steps.append("native") or run(*args)
    try:
        _, other = rehearsed({}, op, share=lambda value: next(answers), main=False, clock=counted)
    finally:
        op.native = run
    assert next(answers, None) is None
    assert other.state() == state
    assert len(steps) == ran.count("preset reference") + 1  # and once at the end
