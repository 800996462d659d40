"""Faults planted into attention's Gluon kernels are found, each by what `mutants.diff` names: a kind of fault of the
machine, or "value", which is the error rule. The file has the form of those of `tests/kernels/mutants.py`, with a call
of `CALLS` in place of cases."""

from pathlib import Path

import pytest
import torch

from fastdeit.kernels import _triton
from fastdeit.kernels.attention.hopper import backend
from tests.kernels.gluon.planted import changed, planted
from tests.kernels.mutants import mutants_in

if _triton.VERSION < backend.COMPILER:
    pytest.skip("this Triton has no Gluon for Hopper", allow_module_level=True)

from fastdeit.kernels.attention.hopper import backward, forward, tiles
from tests.kernels.gluon.machine import Fault
from tests.kernels.gluon.on_machine import far, packed, prove

MODULES = tiles, forward, backward
MUTANTS = {mutant.name: mutant for mutant in mutants_in(Path(__file__).with_name("mutants.diff"))}
CALLS = {
    "1 head": lambda: (packed(torch.float16, 1, 70, 1), 1),
    "2 samples": lambda: (packed(torch.float16, 2, 70, 2), 2),
    "far below": lambda: (far(torch.float16, 70, -1), 1),
    "198 tokens": lambda: (packed(torch.bfloat16, 1, 198, 1), 1),
}


def hunt(call):
    """What finds a fault in this call."""
    try:
        prove(*CALLS[call]())
    except Fault as fault:
        return fault.kind
    except AssertionError:
        return "value"
    return "nothing"


def test_every_fault_can_be_planted():
    """A change of the kernels may take away the text that a fault changes: then it has to be planted anew."""
    assert len(MUTANTS) >= 40
    assert {mutant.file for mutant in MUTANTS.values()} == {Path(module.__file__).name for module in MODULES}
    for mutant in MUTANTS.values():
        changed(Path(tiles.__file__).with_name(mutant.file).read_text(), mutant.old, mutant.new)


def test_without_a_fault_nothing_is_found():
    assert [hunt(call) for call in CALLS] == ["nothing"] * len(CALLS)


QUICK = (
    "queries are multiplied before they are there",
    "p and ds replace those that other warps still read",
    "the last key takes no part",
)
"""Those that are not among the long proofs."""


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MUTANTS]
)
def test_a_fault_is_found_by_what_is_named(name, tmp_path):
    mutant = MUTANTS[name]
    with planted(MODULES, mutant.file, mutant.old, mutant.new, tmp_path):
        assert hunt(mutant.cases) == mutant.kind
