"""Planted faults show in compiled kernels as docs/compiled.md says."""

import os

import pytest

from tests.kernels.ir.hunt import COMPILED_PAGE, TRIED, found_by, row

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif("FASTDEIT_IR" not in os.environ, reason="FASTDEIT_IR=90 runs compiled kernels on the CPU"),
]


def test_the_page_has_every_fault():
    lines = [line for line in COMPILED_PAGE.read_text().splitlines() if line.startswith("|")]
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines[-len(TRIED) :]] == [m.name for m in TRIED]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy: what faults compute overflows
@pytest.mark.parametrize("mutant", TRIED, ids=lambda mutant: mutant.name)
def test_a_fault_shows_as_the_page_says(mutant, compiled):
    arch = compiled.keywords["arch"]
    assert row(mutant, found_by(mutant, arch)) in COMPILED_PAGE.read_text().splitlines()
