"""An op is told of once: what its registration brings is what the lint, the benchmark and the tests run."""

import argparse

import pytest
import torch
import triton
import triton.language as tl

from fastdeit.bench import kernels
from fastdeit.bench.count_card import pretended_card
from fastdeit.kernels import _op, _triton
from fastdeit.kernels._example import FEW, Example, Maker
from fastdeit.kernels.lint import cases, lint
from tests.kernels.examples import dry_calls, every_example


@pytest.mark.parametrize("name", _op.OPS)
def test_every_op_has_examples_and_the_first_can_be_measured(name):
    first, *others = _op.OPS[name].examples
    assert first.bytes(first.build(Maker(FEW, torch.float16, torch.device("meta")))) > 0
    names = [example.name for example in (first, *others)]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("name", every_example())
def test_an_example_makes_what_it_is_asked_for(name):
    """Floating tensors are of the dtype, or float32 where parameters are, and all are on the device."""
    _, example = every_example()[name]
    for dtype, allowed in ((torch.float64, {torch.float64}), (torch.float16, {torch.float16, torch.float32})):
        args = example.build(Maker(FEW, dtype, torch.device("meta")))
        tensors = [t for a in args for t in (a if isinstance(a, list) else [a]) if isinstance(t, torch.Tensor)]
        assert {t.device.type for t in tensors} == {"meta"}
        assert {t.dtype for t in tensors if t.requires_grad} <= allowed


@triton.jit
def _double_kernel(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, 2 * tl.load(x + at))


def _double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def _double_on_triton(x: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(x)
    _triton.launch(_double_kernel, (1,), x, out, N=16, warps=1)
    return out


@pytest.fixture(scope="module")
def new_op():
    """An op that the package does not know."""
    op = _op.Op(
        "double",
        _double,
        examples=[Example("", lambda make: [make.normal(16, grad=False)], bytes=lambda args: 2 * args[0].nbytes)],
        others=[_op.Backend("triton", _triton.capability, _double_on_triton)],
    )
    yield op
    del _op.OPS["double"]


def test_the_lint_and_its_golden_mixes_have_a_new_op(new_op, monkeypatch):
    monkeypatch.setattr(lint._triton, "INTERPRETED", False)
    monkeypatch.setattr(lint, "job_of", lambda launch, arch: lint.Job("m", launch.kernel.fn.__name__, (), 4, 1, arch))
    assert [row.key for row in lint.plan([80, 90], ["double"])] == [
        "double | deit_base fp16 | m._double_kernel | sm_80",
        "double | deit_base fp16 | m._double_kernel | sm_90",
    ]
    assert ("double", "triton") in {(case.op, case.backend) for case in cases.cases()["double"]}


def test_the_benchmark_has_a_new_op(new_op, capsys):
    args = {"device": "cpu", "op": ["double"], "model": "deit_tiny_patch16_224", "batch": 1, "dtype": "fp32"}
    kernels.main(argparse.Namespace(**args, predict=True))
    assert capsys.readouterr().out.splitlines()[-1].startswith("double ")


def test_checks_of_registrations_have_a_new_op(new_op):
    assert every_example()["double"] == (new_op, new_op.examples[0])


def test_dry_runs_have_a_new_op(new_op):
    op, backend, example, sizes, dtype = dry_calls()["double-triton-float16"]
    with pretended_card() as card:
        op.run_on(backend, *example.build(Maker(sizes, dtype, torch.device("cuda", 0))))
    assert card.launched == {"_double_kernel"}
