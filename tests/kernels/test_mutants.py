"""Planted faults are found: each by the proof that docs/proofs.md names."""

import pytest

from fastdeit.kernels import losses
from fastdeit.kernels.lint import interpreter
from tests.kernels.kernel_coverage import jit_functions
from tests.kernels.mutant_hunt import PAGE, hunt, planted, row
from tests.kernels.mutants import MUTANTS

pytestmark = pytest.mark.skipif(interpreter.unavailable() is not None, reason=str(interpreter.unavailable()))
NAMES = {mutant.name: mutant for mutant in MUTANTS}


@pytest.mark.slow
def test_every_fault_can_be_planted_and_is_taken_back():
    """A change of the kernels may take away the text that a fault changes: then it has to be planted anew."""
    before = {name: function.fn for name, function in jit_functions().items()}
    for mutant in MUTANTS:
        with planted(mutant):
            pass
    assert {name: function.fn for name, function in jit_functions().items()} == before


def test_a_planted_fault_is_in_the_kernel():
    fault = NAMES["the logit of a label that does not exist is read"]
    plain = losses._exact_difference.fn
    with planted(fault):
        assert losses._exact_difference.fn is not plain
        assert plain.__name__ == losses._exact_difference.fn.__name__


def test_faults_are_planted_in_every_file_with_kernels():
    files = {
        f"{function.fn.__module__.removeprefix('fastdeit.kernels.').replace('.', '/')}.py"
        for function in jit_functions().values()
    }
    assert files == {mutant.file for mutant in MUTANTS}
    assert len(NAMES) == len(MUTANTS) >= 40


def test_the_page_has_every_fault_and_none_survives():
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    named = [line.split(" | ")[0].removeprefix("| ") for line in lines]
    assert named[-len(MUTANTS) :] == list(NAMES)
    assert not [line for line in lines if "**nothing**" in line]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy: what faults compute overflows
@pytest.mark.parametrize("name", NAMES)
def test_a_fault_is_found_by_the_proof_that_the_page_names(name):
    assert row(NAMES[name], hunt(NAMES[name])) in PAGE.read_text().splitlines()
