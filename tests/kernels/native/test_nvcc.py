"""The native kernels compiled by nvcc, for an architecture of each generation that it knows."""

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
@pytest.mark.parametrize("architecture", [70, 75, 80, 90, 100, 120])
def test_hardly_a_register_is_spilled(tmp_path, architecture):
    known = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    if f"compute_{architecture}" not in known:
        pytest.skip(f"this nvcc does not know sm_{architecture}")
    command = [NVCC, "-std=c++17", f"-arch=sm_{architecture}", "-Xptxas", "-v", "-cubin", "-o", tmp_path / "cubin"]
    done = subprocess.run([*command, KERNELS / "attention.cu"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spilled = [int(size) for size in re.findall(r"(\d+) bytes spill stores", done.stderr)]
    assert len(spilled) == 3 * len(HEAD_DIMS) + 1
    assert max(spilled) <= (0 if architecture == 70 else MOST_SPILLED)
