"""Faults planted into the native kernels are found, each by the check that `mutants.py` names."""

import re

import pytest

from tests.kernels.native import simt
from tests.kernels.native.mutants import MUTANTS
from tests.kernels.native.natively import packed, prove

NAMES = {mutant.name: mutant for mutant in MUTANTS}
KINDS = {
    "shared memory: another thread": "race",
    "outside of every array|is an input|has asked for less|another thread has written": "memory",
    "never come|different operations": "barrier",
}
"""What a sentence of the shim is about."""


def planted(mutant):
    """The text of its file with the fault in it."""
    text = (simt.KERNELS / mutant.file).read_text()
    assert text.count(mutant.old) == 1, f"{mutant.name}: its text is {text.count(mutant.old)} times in {mutant.file}"
    return text.replace(mutant.old, mutant.new)


def hunt(native):
    """What finds the fault in these kernels: a check of the shim, the tolerance rule, or nothing."""
    far = packed(1, 70, 1, 64, 0.1).detach().float()
    far[..., :64] += 20.0
    far[..., 64:128] -= 40.0
    calls = (packed(2, 70, 2, 64), 2), (packed(1, 1, 1, 64), 1), (far.half().requires_grad_(), 1)
    try:
        for qkv, heads in calls:
            prove(native, qkv, heads)
    except simt.Fault as fault:
        return next(kind for sentence, kind in KINDS.items() if re.search(sentence, str(fault)))
    except AssertionError:
        return "value"
    return "nothing"


@pytest.fixture(scope="module")
def shim(tmp_path_factory):
    """The object that all faults share."""
    folder = tmp_path_factory.mktemp("shim")
    simt.laid_out(folder)
    return simt.compiled(folder, "simt.cpp", "simt.cpp.o")


def test_every_fault_can_be_planted():
    """A change of the kernels may take away the text that a fault changes: then it has to be planted anew."""
    assert len(NAMES) == len(MUTANTS) >= 40
    for mutant in MUTANTS:
        planted(mutant)


def test_faults_are_planted_in_every_file_with_code_of_a_kernel():
    declarations = {"attention.h", "attention.cu", "device.cuh", "fastdeit_native.h"}
    assert {file.name for file in simt.KERNELS.iterdir()} - declarations == {mutant.file for mutant in MUTANTS}


@pytest.mark.skipif(simt.UNAVAILABLE is not None, reason=str(simt.UNAVAILABLE))
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in NAMES])
def test_a_fault_is_found_by_the_check_that_is_named(tmp_path, shim, name):
    mutant = NAMES[name]
    native = simt.built(tmp_path, {mutant.file: planted(mutant)}, (64,), shim)
    assert hunt(native) == mutant.found


def test_without_a_fault_nothing_is_found(native):
    assert hunt(native) == "nothing"
