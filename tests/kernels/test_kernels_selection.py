"""The choice of a backend, its reason, and what a forced choice does."""

import itertools

import pytest
import torch

from fastdeit import kernels
from fastdeit.kernels._op import OPS, Backend, Op

PUBLIC = {"attention", "add_layer_norm", "mlp", "layer_norm_mlp", "distillation_loss", "patchify", "pixels"}
PUBLIC |= {"global_norm", "fused_adamw", "fused_lamb"}


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
        assert row.backend == ("aten" if row.name == "fused_adamw" else "reference")
        assert row.reason
    if not torch.cuda.is_available():
        assert rows["attention"].reason.startswith("no CUDA device")


def test_format_info_is_one_line_an_op():
    lines = kernels.format_info().splitlines()
    assert [line.split()[:2] for line in lines] == [[row.name, row.backend] for row in kernels.info()]
    assert all(row.reason in line for row, line in zip(kernels.info(), lines, strict=True))


def test_forced_choice(force):
    force("fused_adamw=reference")
    rows = {row.name: row for row in kernels.info()}
    assert rows["fused_adamw"][1:] == ("reference", "chosen by FASTDEIT_KERNELS")
    assert rows["attention"].reason != "chosen by FASTDEIT_KERNELS"


def test_forced_choice_of_all_but_one(force):
    force("reference, fused_adamw=auto")
    rows = {row.name: row for row in kernels.info()}
    assert rows["fused_adamw"].backend == "aten"
    assert rows["attention"].reason == "chosen by FASTDEIT_KERNELS"


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("cuda", RuntimeError, "asks for attention=cuda, but attention has: reference"),
        ("attention=aten", RuntimeError, "asks for attention=aten, but attention has: reference"),
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
    assert (backend.name, reason) == ("quick", "it is the fastest here")
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
