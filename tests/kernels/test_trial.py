"""Trials of kernels on the CPU: candidates that are fast, slow, wrong, picky or broken; cards that are not there."""

import itertools
import json
import os
from types import SimpleNamespace

import pytest
import torch

from fastdeit import kernels
from fastdeit.engine.dist import World
from fastdeit.kernels import Tuning, _op, _tried, _triton
from fastdeit.kernels._example import FEW, Maker
from fastdeit.kernels._op import OPS, REFERENCE, Backend, Op, Unsupported
from fastdeit.kernels._tried import INDUCTOR, shape_of
from fastdeit.kernels.trial import candidates, store, tuning
from fastdeit.kernels.trial.candidates import BrokenDevice, Call, try_out
from tests.kernels.examples import every_example, few, leaves
from tests.kernels.test_compiled import Graphs
from tests.pretended_card import pretended_card

CPU = torch.device("cpu")
SPEED = {REFERENCE: 4.0, INDUCTOR: 3.0, "quick": 1.0, "slow": 9.0, "middling": 2.0}
_NUMBERS = itertools.count()


def clock(name, call):
    """Seconds by the candidate's name; those that nobody named are slow."""
    call()
    return SPEED.get(name, 8.0)


def raises(error):
    def run(*args):
        raise error

    return run


def forward(x, factor):
    return x.detach() * factor


def backward(grad, factor):
    return grad * factor


def able(device, forced):
    return True, "it is here"


KINDS = {
    "quick": (forward, backward),
    "slow": (forward, backward),
    "middling": (forward, backward),
    "off": (lambda x, factor: forward(x, factor) * 1.001, backward),
    "one_element": (lambda x, factor: forward(x, factor).index_fill(0, torch.tensor([1]), 0.0), backward),
    "gradient_off": (forward, lambda grad, factor: grad * factor * 1.001),
    "nan": (lambda x, factor: forward(x, factor).fill_(torch.nan), backward),
    "shape": (lambda x, factor: forward(x, factor)[:1], backward),
    "dtype": (lambda x, factor: forward(x, factor).double(), backward),
    "broken": (raises(RuntimeError("unspecified launch failure")), backward),
    "broken_backward": (forward, raises(ZeroDivisionError("no"))),
    "picky": (raises(Unsupported("x is not to its taste")), backward),
    "greedy": (raises(torch.OutOfMemoryError("CUDA out of memory")), backward),
}
WRONG = {"off", "one_element", "gradient_off", "nan", "shape", "dtype", "broken", "broken_backward"}


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("FASTDEIT_CACHE", str(tmp_path))
    return tmp_path / "kernels"


@pytest.fixture
def make(cache):
    """`make(*names)`: the op x * factor with such backends; `calls` has the names of those that ran forward."""
    made = []

    def build(*names):
        def reference(x: torch.Tensor, factor: float) -> torch.Tensor:
            return x * factor

        def reference_backward(grad: torch.Tensor, factor: float) -> torch.Tensor:
            return grad * factor

        calls = []

        def noted(name, run):
            return lambda *args: calls.append(name) or run(*args)

        others = [Backend(name, able, noted(name, KINDS[name][0]), KINDS[name][1]) for name in names]
        op = Op(f"test_trial_{next(_NUMBERS)}", reference, reference_backward, examples=[], others=others)
        op.inductor = noted(INDUCTOR, reference)
        op.registered.register_fake(lambda x, factor: torch.empty_like(x))
        op.differentiable(
            lambda ctx, inputs, output: setattr(ctx, "factor", inputs[1]),
            lambda ctx, grad: (op.run_backward(ctx, grad, ctx.factor), None),
        )
        op.calls = calls
        made.append(op)
        return op

    yield build
    for op in made:
        del OPS[op.name]


@pytest.fixture
def begin():
    """`begin(...)`: trials on the CPU with the clock of names; `said` has what a person reads."""
    begun = []

    def start(mode="on", **options):
        said = []
        made = Tuning(mode, CPU, say=said.append, **{"clock": clock} | options)
        made.said = said
        begun.append(made)
        return made

    yield start
    for made in reversed(begun):
        made.close()


def x(*shape, grad=True):
    return torch.randn(shape or (6, 4), generator=torch.Generator().manual_seed(0)).requires_grad_(grad)


def step(tuner, op, *args):
    """One step that calls the op."""
    with tuner.trying():
        return op(*args or (x(), 2.0))


def chosen(tuner):
    return {row.op: row.backend for row in tuner.rows}


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


def test_a_broken_device_is_noted_before_all_ends(make, begin, cache, monkeypatch):
    op, tuner = make("broken"), begin()
    monkeypatch.setattr(candidates, "_wait", raises(RuntimeError("an illegal memory access was encountered")))
    with pytest.raises(BrokenDevice, match=r"has broken the device .* start anew"):
        step(tuner, op)
    monkeypatch.undo()
    monkeypatch.setenv("FASTDEIT_CACHE", str(cache.parent))
    tuner.close()
    op.calls.clear()
    step(begin(), op)
    assert "broken" not in op.calls


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


# ---- the cache -------------------------------------------------------------------------------------------------------


def test_the_next_run_takes_what_was_found(make, begin, cache):
    op = make("slow", "quick")
    step(first := begin(), op)
    first.close()
    op.calls.clear()
    step(tuner := begin(), op)
    assert op.calls == ["quick"]
    (file,) = cache.glob("*.json")
    assert tuner.said == [f"kernels: {op.name} quick (4.0x PyTorch); as found before ({file})"]


def damaged(file, change):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


DAMAGE = {
    "no JSON": (lambda file: file.write_text("{"), "is not used: it is damaged"),
    "bytes": (lambda file: file.write_bytes(b"\xff\xfe"), "is not used: it is damaged"),
    "another value": (lambda file: file.write_text("[1]"), "is not used: it is damaged"),
    "later format": (lambda file: damaged(file, lambda c: c.update(format=2)), "it has format 2, and this fastdeit"),
    "another card": (lambda file: damaged(file, lambda c: c["place"].update(card="B900")), "it is of another card"),
    "no rows": (lambda file: damaged(file, lambda c: c.pop("rows")), "is not used: it is damaged (KeyError"),
    "half a row": (lambda file: damaged(file, lambda c: c["rows"][0].pop("backend")), "it is damaged (TypeError"),
    "short shape": (lambda file: damaged(file, lambda c: c["rows"][0]["shape"].pop()), "it is damaged (TypeError"),
    "no time": (lambda file: damaged(file, lambda c: c["rows"][0].update(seconds={})), "it is damaged (ValueError"),
    "a word": (lambda file: damaged(file, lambda c: c["rows"][0].update(seconds="x")), "it is damaged (TypeError"),
    "a folder": (lambda file: file.unlink() or file.mkdir(), "is not used: Is a directory"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_that_cannot_be_used_is_as_good_as_none(make, begin, cache, damage):
    spoil, sentence = DAMAGE[damage]
    op = make("slow", "quick")
    step(first := begin(), op)
    first.close()
    (file,) = cache.glob("*.json")
    spoil(file)
    op.calls.clear()
    step(tuner := begin(), op)
    assert "slow" in op.calls  # tried anew
    assert sentence in tuner.said[0]
    assert len(tuner.said) == (3 if damage == "a folder" else 2)
    if damage != "a folder":
        assert len(json.loads(file.read_text())["rows"]) == 1
    assert not list(cache.glob(".*"))


def test_a_backend_that_this_version_does_not_have(make, begin, cache):
    op = make("slow", "quick")
    step(first := begin(), op)
    first.close()
    (file,) = cache.glob("*.json")

    def rename(content):
        content["rows"][0].update(backend="marvel", seconds={"marvel": 1.0, REFERENCE: 2.0})

    damaged(file, rename)
    step(tuner := begin(), op)
    assert f"has marvel for {op.name}, which is not used: {op.name} has slow, quick, reference" in tuner.said[0]
    assert chosen(tuner) == {op.name: "quick"}


def test_a_cache_that_cannot_be_written_costs_a_sentence(make, begin, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTDEIT_CACHE", str(tmp_path / "file"))
    op, tuner = make("off", "slow", "quick"), begin()
    step(tuner, op)
    notes = [line for line in tuner.said if "cannot be written: Not a directory. Set FASTDEIT_CACHE=FOLDER" in line]
    assert notes
    assert "Please send" not in " ".join(tuner.said)
    assert tuner.said[-1] == f"kernels: {op.name} quick (4.0x PyTorch)"


def test_two_runs_at_once_keep_each_others_rows(make, begin, cache):
    one, other = make("quick"), make("quick")
    first, second = begin(), begin()
    with first.trying():
        one(x(), 2.0)
    step(second, other)
    (file,) = cache.glob("*.json")
    assert {row["op"] for row in json.loads(file.read_text())["rows"]} == {one.name, other.name}


def card(monkeypatch, name="NVIDIA B900", units=200, driver="610.10.01"):
    properties = SimpleNamespace(name=name, multi_processor_count=units)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(store, "_driver", lambda: driver)


def test_every_card_and_version_has_a_file_of_its_own(cache, monkeypatch):
    cuda = torch.device("cuda", 0)

    def path(timed="wall"):
        return store.Store(store.place(cuda, timed)).path

    card(monkeypatch)
    paths = [path(), path("device")]
    assert path() == paths[0]
    assert paths[0].name.startswith("nvidia-b900-")
    for change in ({"name": "NVIDIA B901"}, {"units": 100}, {"driver": "610.10.02"}):
        card(monkeypatch, **change)
        paths.append(path())
    card(monkeypatch)
    for where, name in ((torch, "__version__"), (store.triton, "__version__")):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, "9.9.9")
            paths.append(path())
    with monkeypatch.context() as patch:
        patch.setattr(store, "_code", lambda: "other")
        paths.append(path())
    assert len(set(paths)) == len(paths) == 8


def test_the_driver_is_read_where_the_kernel_tells_it(tmp_path, monkeypatch):
    told = tmp_path / "version"
    monkeypatch.setattr(store, "_DRIVER", told)
    monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: 13000, raising=False)
    assert store._driver() == "CUDA 13000"
    told.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release\nGCC version: 12.3.0")
    assert store._driver() == "580.65.06"


def test_a_card_with_measurements_is_left_to_them(cache, monkeypatch):
    card(monkeypatch)
    at_width = {"backend": "triton", "because": "measured: 2.00 times reference"}
    row = {"backend": "triton", "because": "as compiled", "widths": {"48": at_width}}
    monkeypatch.setattr(_op, "_measured", lambda: {"sm_90": {"attention": row}})
    tuner = Tuning("auto", torch.device("cuda", 0), clock=clock, say=str)
    tried = []
    monkeypatch.setattr(tuner, "_decide", lambda op, args, shape: (tried.append(shape.width), (None, {}))[1])
    try:
        with pretended_card(), tuner.trying(), torch.no_grad():
            for width in (48, 96):
                kernels.attention(torch.zeros(1, 2, width, device="cuda"), 1)
    finally:
        tuner.close()
    assert tried == [96]


def test_nothing_is_tried_while_a_graph_is_recorded(cache, monkeypatch):
    card(monkeypatch)
    tuner = Tuning("on", torch.device("cuda", 0), clock=clock, say=str)
    monkeypatch.setattr(tuner, "_decide", raises(AssertionError("tried")))
    try:
        with pretended_card(capturing=True) as pretended, tuner.trying(), torch.no_grad():
            kernels.attention(torch.zeros(1, 2, 48, device="cuda"), 1)
            assert not pretended.launched
    finally:
        tuner.close()


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


# ---- every op --------------------------------------------------------------------------------------------------------

CALLS = every_example()


def twin(op, change=None):
    """The op's explicit reference as another backend; `change` spoils its results."""
    backend = op.backends[-1]

    def spoiled(*args):
        result = backend.forward(*args)
        if op.mutated:
            change(args[op.mutated[0]][0])
        else:
            change(result if isinstance(result, torch.Tensor) else result[0])
        return result

    return Backend("twin", able, backend.forward if change is None else spoiled, backend.backward)


def tried(op, args, backend):
    call = Call.of(op, args, bool(leaves(args)))
    return try_out(call, [backend], 1e9, 0.0, clock)


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
        result.view(-1)[-1] += 0.05 * result.abs().max()

    found = tried(op, few(example, torch.float32), twin(op, change))
    assert found.wrong.keys() == {"twin"}


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
        step(tuner, op, x(2, 3, 12), 2, 1.0, None)
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


def test_of_few_calls_the_time_is_that_of_one():
    calls = []
    seconds = candidates.with_launches(CPU)("any", lambda: calls.append(1))
    assert seconds > 0
    assert len(calls) == 1 + candidates._MOST_CALLS


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
