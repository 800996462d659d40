"""The native kernels compiled by nvcc, for every architecture that it knows and that has tensor cores."""

import re
import shutil
import subprocess

import pytest

from tests.kernels.native.simt import HEAD_DIMS, KERNELS

NVCC = shutil.which("nvcc")
MOST_SPILLED = 128
"""Bytes of a thread. For sm_70, which the kernels are written for, it is none; others have other register files, and
their compilers keep other things in them."""


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="there is no nvcc")
def test_hardly_a_register_is_spilled(tmp_path):
    listed = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout
    known = [number for number in map(int, re.findall(r"compute_(\d+)", listed)) if number >= 70]
    assert known
    of_each = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in known]
    command = [NVCC, "-std=c++17", *of_each, "-Xptxas", "-v", "-fatbin", "-o", tmp_path / "fatbin"]
    done = subprocess.run([*command, KERNELS / "attention.cu"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = re.findall(r"entry function '\w+' for 'sm_(\d+)'.*?(\d+) bytes spill stores", done.stderr, re.DOTALL)
    spilled = {number: [int(size) for arch, size in said if int(arch) == number] for number in known}
    assert {len(sizes) for sizes in spilled.values()} == {3 * len(HEAD_DIMS) + 1}
    over = {number: max(sizes) for number, sizes in spilled.items() if max(sizes) > (number != 70) * MOST_SPILLED}
    assert not over
