"""What tests of trials share: an op x * factor with backends of all kinds, and a clock that goes by their names."""

import itertools

import torch

from fastdeit.kernels._op import REFERENCE, Backend, Op, Unsupported
from fastdeit.kernels._tried import INDUCTOR
from fastdeit.kernels.trial.candidates import Call, try_out
from tests.kernels.examples import leaves

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


def product(*names):
    """The op x * factor with the backends of these names; `calls` has the names of those that ran forward."""

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
    return op


def x(*shape, grad=True):
    return torch.randn(shape or (6, 4), generator=torch.Generator().manual_seed(0)).requires_grad_(grad)


def step(tuner, op, *args):
    """One step that calls the op."""
    with tuner.trying():
        return op(*args or (x(), 2.0))


def chosen(tuner):
    return {row.op: row.backend for row in tuner.rows}


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
