"""The choice of a backend, its reason, and what a forced choice does."""

import asyncio
import itertools
import warnings
from threading import Barrier, Thread, get_ident

import pytest
import torch

from fastdeit import cli, kernels
from fastdeit.kernels import _asked, _op, _triton
from fastdeit.kernels._op import OPS, Backend, Op, Unsupported
from tests.kernels.test_compiled import Graphs

PUBLIC = {"attention", "add_layer_norm", "mlp", "layer_norm_mlp", "distillation_loss", "patchify", "pixels"}
PUBLIC |= {"cosub_loss", "global_norm", "fused_adamw", "fused_lamb", "fused_sgd"}
OF_THE_CPU = {"fused_adamw": "aten", "pixels": "host", "patchify": "host"}


def refuses(device, forced):
    return False, "it is made for another machine"


def works(device, forced):
    return True, "it is the fastest here"


_NUMBERS = itertools.count()


@pytest.fixture
def scale():
    """A differentiable op with a backend that cannot run, one that can, and the reference."""

    def reference(x: torch.Tensor, factor: float) -> torch.Tensor:
        return x * factor

    def backward(grad: torch.Tensor, factor: float) -> torch.Tensor:
        return grad * factor

    def marked(x, factor):
        return (x.detach() * factor).clone()

    name = f"test_scale_{next(_NUMBERS)}"  # torch before 2.9 keeps the autocast rule of a name for ever
    op = Op(
        name,
        reference,
        backward,
        examples=[],
        others=[Backend("absent", refuses, marked), Backend("quick", works, marked, backward)],
    )
    op.registered.register_fake(lambda x, factor: torch.empty_like(x))
    op.differentiable(
        lambda ctx, inputs, output: setattr(ctx, "factor", inputs[1]),
        lambda ctx, grad: (op.run_backward(ctx, grad, ctx.factor), None),
    )
    yield op
    del OPS[name]


def test_info_has_a_reason_for_every_op():
    rows = {row.name: row for row in kernels.info()}
    assert rows.keys() >= PUBLIC
    for row in rows.values():
        assert row.backend == OF_THE_CPU.get(row.name, "reference")
        assert row.reason
    if not torch.cuda.is_available():
        assert rows["attention"].reason.startswith("no CUDA device")


def test_measured_choice(scale, monkeypatch):
    cpu = torch.device("cpu")
    assert scale.select(cpu)[1].endswith("not measured on cpu yet")
    rows = {"cpu": {scale.name: {"backend": "reference", "because": "2.0x quick on this card"}}}
    monkeypatch.setattr(_op, "_measured", lambda: rows)
    assert (scale.select(cpu)[0].name, scale.select(cpu)[1]) == ("reference", "2.0x quick on this card")
    assert type(scale(torch.ones(3, requires_grad=True), 2.0).grad_fn).__name__ == "MulBackward0"
    rows["cpu"][scale.name]["backend"] = "absent"  # measured on another machine, and not able here
    assert scale.select(cpu)[0].name == "quick"


def test_measured_choice_at_a_width(scale, monkeypatch):
    """Forward goes by its first argument, the registered backward by the argument after the gradient."""
    at_three = {"backend": "quick", "because": "fast"}
    rows = {
        "backend": "reference",
        "because": "slow",
        "widths": {"3": at_three, "4": {"backend": "reference", "because": "slower still"}},
    }
    monkeypatch.setattr(_op, "_measured", lambda: {"cpu": {scale.name: rows}})
    taken = []
    quick = scale.backends[1]
    scale.backends = (
        quick._replace(forward=lambda *a: taken.append("forward") or quick.forward(*a)),
        *scale.backends[2:],
    )
    for shape, expected in {(3,): 1, (5, 3): 1, (3, 4): 0, (3, 5): 0, (): 0}.items():
        taken.clear()
        assert torch.equal(scale(torch.ones(shape), 2.0), torch.full(shape, 2.0))
        assert len(taken) == expected
        scale.registered(torch.ones(shape), 2.0)
        assert len(taken) == 2 * expected
    backend, reason = scale.select(torch.device("cpu"))
    assert (backend.name, reason) == ("reference", "slow; at width 3 quick, fast")


def test_registered_backward_goes_by_the_width_after_the_gradient(scale, monkeypatch):
    widths = {"6": {"backend": "triton", "because": "fast"}}
    row = {"backend": "reference", "because": "slow", "widths": widths}
    monkeypatch.setattr(_op, "_measured", lambda: {"cpu": {"attention": row}})
    taken = []
    attention = OPS["attention"]
    spied = Backend("triton", works, None, lambda *args: taken.append(args) or attention.backends[-1].backward(*args))
    monkeypatch.setattr(attention, "backends", (spied, attention.backends[-1]))
    qkv, out = torch.ones(1, 2, 6), torch.ones(1, 2, 2)  # as wide as the row says, and not
    lse = attention.backends[-1].forward(qkv, 1, 1.0, None, None)[1]
    attention.registered_backward(out, qkv, out, lse, 1, 1.0, False, None)
    assert len(taken) == 1


def test_shipped_measurements_name_ops_and_backends():
    for ops in _op._measured().values():
        for name, op in ops.items():
            for row in (op, *op["widths"].values()):
                assert row["backend"] in {backend.name for backend in OPS[name].backends}
                assert row["because"]
            assert all(width.isdigit() for width in op["widths"])


def test_use_outranks_the_environment(force):
    force("fused_adamw=reference")
    with kernels.use(fused_adamw="auto"):
        assert next(row for row in kernels.info() if row.name == "fused_adamw").backend == "aten"
        with kernels.use("reference"):
            assert all(row[1:] == ("reference", "chosen by use()") for row in kernels.info())
    assert next(row for row in kernels.info() if row.name == "fused_adamw").reason == "chosen by FASTDEIT_KERNELS"
    with pytest.raises(ValueError, match=r"use\(\) names the op 'atention'"), kernels.use(atention="reference"):
        pass


def test_what_a_backend_does_not_take_goes_to_the_next_with_one_warning(scale):
    def picky(x, factor):
        raise Unsupported("x is not to its taste")

    picky = scale.backends[1]._replace(forward=picky)
    scale.backends = (picky, scale.backends[-1])
    x = torch.ones(3)
    with pytest.warns(RuntimeWarning, match=f"{scale.name} does not run on quick: x is not to its taste"):
        assert torch.equal(scale(x, 2.0), 2 * x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(scale(x, 2.0), 2 * x)
        assert torch.equal(scale.registered(x, 2.0), 2 * x)
    with kernels.use(**{scale.name: "quick"}), pytest.raises(RuntimeError, match="these arguments: x is not to its"):
        scale(x, 2.0)


@pytest.mark.parametrize("registered", [False, True])
def test_no_warning_of_a_backend_whose_place_another_takes(scale, registered):
    def picky(x, factor):
        raise Unsupported("x is not to its taste")

    quick = scale.backends[1]
    scale.backends = (quick._replace(name="picky", forward=picky), quick, scale.backends[-1])
    x, run = torch.ones(3), scale.registered if registered else scale
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(run(x, 2.0), 2 * x)
    scale.backends = (scale.backends[0], quick._replace(forward=picky), scale.backends[-1])
    with pytest.warns(RuntimeWarning, match=r"picky: x is not to its taste, nor on quick: x is not to its taste$"):
        run(x, 2.0)


def test_gradient_of_a_gradient_raises_instead_of_being_wrong(scale):
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        torch.autograd.grad(scale(x, 2.0).pow(2).sum(), x, create_graph=True)


def test_backward_runs_where_its_forward_ran(scale):
    x = torch.ones(3, requires_grad=True)
    calls = []
    quick = scale.backends[1]
    scale.backends = (
        quick._replace(backward=lambda *args: calls.append(args) or quick.backward(*args)),
        scale.backends[-1],
    )
    with kernels.use(**{scale.name: "quick"}):
        y = scale(x, 2.0)
    with kernels.use("reference"):
        y.sum().backward()
    assert len(calls) == 1


def in_thread(function):
    """The result of `function()` in a thread of its own."""
    results = []
    thread = Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def test_use_holds_in_its_thread_alone():
    """Two threads enter and leave in turn, so that each would pop what the other has pushed."""
    turns, found = Barrier(2, timeout=30), []

    def other():
        with kernels.use("triton"):
            turns.wait()  # both are inside
            turns.wait()  # the main thread is outside again
            found.append(_asked.choice("mlp"))
        return _asked.choice("mlp")

    thread = Thread(target=lambda: found.append(other()))
    with kernels.use("reference"):
        assert in_thread(lambda: _asked.choice("mlp")) == "auto"
        thread.start()
        turns.wait()
        assert _asked.choice("mlp") == "reference"
    assert _asked.choice("mlp") == "auto"
    turns.wait()
    thread.join()
    assert found == ["triton", "auto"]


def test_use_holds_in_its_task_alone():
    found = {}

    async def task(name, backend, order):
        with kernels.use(backend):
            for turn in range(order):
                await asyncio.sleep(0)
                found[name, turn] = _asked.choice("mlp")
        found[name, "after"] = _asked.choice("mlp")

    async def both():
        await asyncio.gather(task("first", "reference", 1), task("second", "triton", 3))

    asyncio.run(both())
    assert {value for (name, turn), value in found.items() if name == "first" and turn != "after"} == {"reference"}
    assert {value for (name, turn), value in found.items() if name == "second" and turn != "after"} == {"triton"}
    assert found["first", "after"] == found["second", "after"] == _asked.choice("mlp") == "auto"


def test_compiled_functions_follow_the_choice_of_their_thread(scale):
    torch.compiler.reset()
    scale.backends = scale.backends[-1:]
    graphs, x = Graphs(lambda x: scale(x, 2.0)), torch.ones(3)
    with kernels.use("reference"):
        graphs.run(x)
        in_thread(lambda: graphs.run(x))
    assert graphs.found == [{scale.name}, set()]


@pytest.mark.parametrize("forced", ["reference", "quick"])
def test_a_backward_in_another_thread_runs_where_its_forward_ran(scale, forced):
    """As on a card, where autograd has threads of its own."""
    x, taken = torch.ones(3, requires_grad=True), []

    def spied(backend):
        return backend._replace(backward=lambda *args: taken.append(backend.name) or backend.backward(*args))

    scale.backends = tuple(map(spied, scale.backends[1:]))
    with kernels.use(**{scale.name: forced}):
        y = scale(x, 2.0)
    in_thread(lambda: y.sum().backward())
    with kernels.use(**{scale.name: "quick" if forced == "reference" else "reference"}):
        scale.registered(x, 2.0)
    assert taken == [forced]


class Nested(torch.autograd.Function):
    """A backward that calls `backward` so many times, one within the other, and then `call()`. PyTorch moves such calls
    to a thread of autograd's own where they are nested too deeply for the caller's."""

    @staticmethod
    def forward(ctx, x, depth, call):
        ctx.depth, ctx.call = depth, call
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        if ctx.depth == 0:
            ctx.call()
        else:
            with torch.enable_grad():
                Nested.apply(grad.detach().requires_grad_(), ctx.depth - 1, ctx.call).sum().backward()
        return grad, None, None


def test_threads_of_autograd_see_what_holds_where_backward_is_called(scale):
    """The registered ops of a compiled backward look there, as on a card. What ran earlier has left nothing behind."""
    found, x = [], torch.ones(3, requires_grad=True)

    def call():
        with _asked.of_forward(None):  # as a backward in eager mode has it around its ops
            assert _asked.choice(scale.name) == "auto"
        found.append((get_ident() == main, _asked.choice(scale.name), _asked.source()))

    main = get_ident()
    with kernels.use(**{scale.name: "quick"}):
        Nested.apply(x, 100, call).sum().backward()
        with kernels.use("reference"):
            Nested.apply(x, 100, call).sum().backward()
    Nested.apply(x, 100, call).sum().backward()
    Nested.apply(x, 0, call).sum().backward()

    async def suspended():
        with kernels.use("reference"):
            await asyncio.sleep(0)

    async def other():
        Nested.apply(x, 0, call).sum().backward()

    async def both():
        await asyncio.gather(suspended(), other())

    asyncio.run(both())
    assert found == [
        (False, "quick", "use()"),
        (False, "reference", "use()"),
        (False, "auto", "FASTDEIT_KERNELS"),
        (True, "auto", "FASTDEIT_KERNELS"),
        (True, "auto", "FASTDEIT_KERNELS"),
    ]


def test_format_info_is_one_line_an_op():
    lines = kernels.format_info().splitlines()
    assert [line.split()[:2] for line in lines] == [[row.name, row.backend] for row in kernels.info()]
    assert all(row.reason in line for row, line in zip(kernels.info(), lines, strict=True))


def test_forced_choice(force):
    force("fused_adamw=reference")
    rows = {row.name: row for row in kernels.info()}
    assert rows["fused_adamw"][1:] == ("reference", "chosen by FASTDEIT_KERNELS")
    assert rows["attention"].reason != "chosen by FASTDEIT_KERNELS"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("cuda", "asks for attention='cuda', but attention has: "),
        ("attention=fused_backward", "which cannot run on cpu: no CUDA device"),
        ("atention=reference", "names the op 'atention', but the ops are: attention, "),
    ],
)
def test_an_impossible_choice_is_bad_usage(value, message, force, capsys, monkeypatch):
    monkeypatch.setattr(_triton, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    force(value)
    assert cli.main(["kernels"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("asked", ["attention=fa4", "mlp=nope", "nonsense=x"])
def test_a_dry_run_refuses_kernels_as_a_start_does(force, asked, capfd, tmp_path):
    force(asked)
    said = []
    for options in (["--dry-run"], ["--run-dir", str(tmp_path / "run")]):
        assert cli.main(["train", "digits", "engine.device=cpu", *options]) == 2
        said.append(capfd.readouterr().err)
    assert said[0] == said[1]
    assert said[0].startswith("fastdeit: FASTDEIT_KERNELS ")
    assert not (tmp_path / "run").exists()


def test_forced_choice_of_all_but_one(force):
    force("reference, fused_adamw=auto")
    rows = {row.name: row for row in kernels.info()}
    assert rows["fused_adamw"].backend == "aten"
    assert rows["attention"].reason == "chosen by FASTDEIT_KERNELS"


NAMES = "triton, fused_backward, hopper, native, fa3, fa4, efficient, flash, cudnn, reference"


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("cuda", RuntimeError, f"asks for attention='cuda', but attention has: {NAMES}"),
        (
            "attention=aten",
            RuntimeError,
            f"attention='aten', but attention has: {NAMES}",
        ),
        ("atention=reference", ValueError, "names the op 'atention', but the ops are: attention, "),
    ],
)
def test_impossible_choice_raises(value, error, message, force):
    force(value)
    with pytest.raises(error, match=message):
        kernels.attention(torch.zeros(1, 2, 6), 1)


def test_preference_capability_and_reason(scale, force):
    cpu = torch.device("cpu")
    backend, reason = scale.select(cpu)
    assert (backend.name, reason) == ("quick", "it is the fastest here; not measured on cpu yet")
    force(f"{scale.name}=absent")
    with pytest.raises(
        RuntimeError, match=f"{scale.name}=absent, which cannot run on cpu: it is made for another machine"
    ):
        scale.select(cpu)


def test_backend_that_autograd_cannot_see_has_a_function_of_its_own(scale, force):
    x = torch.ones(3, requires_grad=True)
    assert type(scale(x, 2.0).grad_fn).__name__ != "MulBackward0"
    (grad,) = torch.autograd.grad(scale(x, 2.0).sum(), x)
    assert torch.equal(grad, torch.full((3,), 2.0))
    force(f"{scale.name}=reference")
    (grad,) = torch.autograd.grad(scale(x, 3.0).sum(), x)
    assert torch.equal(grad, torch.full((3,), 3.0))


def test_eager_reference_is_native_autograd():
    """No registered op in the graph of eager mode: it would cost more than a small op itself."""
    qkv = torch.zeros(1, 2, 6, requires_grad=True)
    assert "fastdeit" not in type(kernels.attention(qkv, 1).grad_fn).__name__.lower()


def test_another_backend_than_the_reference_is_compiled_once_for_all_choices(scale):
    torch.compiler.reset()
    taken = []
    quick = scale.backends[1]
    scale.backends = (quick._replace(forward=lambda *a: taken.append(1) or quick.forward(*a)), scale.backends[-1])
    graphs = Graphs(lambda x: scale(x, 2.0))
    x = torch.ones(3)
    assert torch.equal(graphs.run(x), 2 * x)
    with kernels.use(**{scale.name: "reference"}):
        assert torch.equal(graphs.run(x), 2 * x)
    assert graphs.found == [{scale.name}]
    assert len(taken) == 1


@pytest.mark.parametrize(
    ("everywhere", "widths", "traced"),
    [
        ("reference", {}, True),
        ("reference", {"3": "reference"}, True),
        ("reference", {"3": "quick"}, False),
        ("quick", {}, False),
    ],
)
def test_the_reference_is_traced_through_where_it_is_the_choice_for_all_widths(
    scale, monkeypatch, everywhere, widths, traced
):
    torch.compiler.reset()
    row = {"backend": everywhere, "because": "measured"}
    row["widths"] = {width: {"backend": name, "because": "measured"} for width, name in widths.items()}
    monkeypatch.setattr(_op, "_measured", lambda: {"cpu": {scale.name: row}})
    graphs = Graphs(lambda x: scale(x, 2.0))
    graphs.run(torch.ones(5))
    assert graphs.found == [set() if traced else {scale.name}]
