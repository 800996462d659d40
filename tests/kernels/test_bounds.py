"""`fastdeit kernels lint --bounds`: kernels at sizes that fit no machine stay inside their tensors, and those that do
not are found."""

import argparse

import pytest
import torch

from fastdeit import cli
from fastdeit.kernels import _triton
from fastdeit.kernels.lint import bounds, cases, interpreter
from fastdeit.kernels.lint.cases import Case
from fastdeit.kernels.lint.lint import LintError
from tests.kernels import faulty_kernels as faulty
from tests.kernels.kernel_coverage import jit_functions
from tests.kernels.mutant_hunt import planted
from tests.kernels.mutants import MUTANTS

pytestmark = pytest.mark.skipif(interpreter.unavailable() is not None, reason=str(interpreter.unavailable()))
BEYOND = 2**31 + 5


def faults(kernel, count, grid, N=1024):
    """Of a launch on x and y of `count` elements, which have no memory."""

    def run():
        x, y = (torch.empty(count, device="meta") for _ in range(2))
        _triton.launch(kernel, grid, x, y, count, N=N, warps=4)

    (checked,) = bounds.check(Case("toy", "triton", "", run, needs=70))
    assert checked.elements == count
    return checked.fault


def test_offsets_of_64_bits_reach_everything():
    assert faults(faulty.copy_far, BEYOND, (-(-BEYOND // 1024),)) is None


@pytest.mark.parametrize(
    ("kernel", "words"),
    [
        (faulty.copy, "overflow: int32 overflow detected for operation mul, by program (2097152, 0, 0)"),
        (faulty.store_without_mask, "overflow"),
    ],
)
def test_offsets_of_32_bits_do_not(kernel, words):
    assert words in faults(kernel, BEYOND, (-(-BEYOND // 1024),))


def test_the_last_program_is_seen():
    fault = faults(faulty.store_without_mask, 2**20 + 5, (1025,))
    assert "out of bounds: store of 4 bytes at byte 4194324 of y" in fault
    assert "program (1024, 0, 0)" in fault


def test_the_last_round_of_a_long_loop_is_seen():
    assert "store of 4 bytes at byte 3999996 of y" in faults(faulty.copy_in_a_loop, 999_999, (1,), N=64)


def test_tensors_that_only_a_table_names_have_their_sizes():
    """The parameters of an optimizer, one of them with more than 2**31 elements; and a fault is found there."""
    case = next(case for case in bounds.huge_cases()["fused_sgd"] if "one bias" in case.name)
    (update,) = bounds.check(case)
    assert update.fault is None
    assert update.elements > 2**31
    fault = next(m for m in MUTANTS if m.name == "a chunk is longer than the tensor")
    with planted(fault):
        (update,) = bounds.check(case)
    assert update.fault.startswith("out of bounds: load of 4 bytes at byte ")
    assert "tensor 0 of list 0" in update.fault


def test_launches_with_the_same_addresses_are_checked_once():
    first, second, *_ = cases.cases()["global_norm"][1:]
    seen = set()
    assert len(bounds.check(first, seen)) == 2
    assert bounds.check(second, seen) == []  # bfloat16 after float16


def test_corners():
    assert bounds.corners((9, 3)) == [(x, y, 0) for x in (0, 1, 8) for y in (0, 1, 2)]
    assert bounds.corners((1,)) == [(0, 0, 0)]


def test_the_command_prints_a_line_for_each_kernel_and_every_fault(capsys, monkeypatch):
    found = [bounds.Checked("mlp", f"case {i}", "k", 3, 2**32, fault) for i, fault in enumerate((None, "race: x"))]
    monkeypatch.setattr(bounds, "check_all", lambda ops: found)
    assert bounds.main(argparse.Namespace(op=None)) == 1
    out = capsys.readouterr().out
    assert "mlp  k       2         6         2.00 x 2**31    1 faults" in out
    assert out.endswith("\nmlp | case 1 | race: x\n")
    monkeypatch.setattr(bounds, "check_all", lambda ops: found[:1])
    assert bounds.main(argparse.Namespace(op="mlp")) == 0
    assert capsys.readouterr().out.endswith("\n1 launches, all within bounds\n")


def test_what_cannot_be_done_is_said(capsys, monkeypatch):
    assert cli.main(["kernels", "lint", "--bounds", "--arch", "80"]) == 2
    assert "with --bounds nothing is compiled" in capsys.readouterr().err
    with pytest.raises(LintError, match="the op 'nothing' has no Triton kernels; those that have: attention"):
        bounds.main(argparse.Namespace(op="nothing"))
    monkeypatch.setattr(interpreter, "unavailable", lambda: "of a reason")
    with pytest.raises(LintError, match="needs Triton's interpreter, but of a reason"):
        bounds.main(argparse.Namespace(op=None))


@pytest.mark.slow
@pytest.mark.parametrize("op", cases.cases())
def test_no_kernel_leaves_its_tensors_at_any_size(op):
    found = bounds.check_op(op)
    assert [checked for checked in found if checked.fault] == []
    assert max(checked.elements for checked in found) > 2**31


@pytest.mark.slow
def test_every_kernel_has_a_case():
    """Of those whose launches are recorded; device functions are parts of them."""
    recorded = set()
    for found in cases.cases().values():
        for case in found:
            with _triton.recording(90) as seen:
                case.run()
            recorded |= {interpreter.title(launch.kernel.fn) for launch in seen.launches}
    assert recorded == {name for name in jit_functions() if name.endswith("_kernel")}
