"""The native kernels compiled by nvcc, for an architecture of each generation that it knows."""

import re
import shutil
import subprocess

import pytest

from tests.kernels.native.simt import HEAD_DIMS, KERNELS

NVCC = shutil.which("nvcc")


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="there is no nvcc")
@pytest.mark.parametrize("architecture", [70, 75, 80, 90, 100, 120])
def test_no_register_is_spilled(tmp_path, architecture):
    known = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True, check=True).stdout.split()
    if f"compute_{architecture}" not in known:
        pytest.skip(f"this nvcc does not know sm_{architecture}")
    command = [NVCC, "-std=c++17", f"-arch=sm_{architecture}", "-Xptxas", "-v", "-cubin", "-o", tmp_path / "cubin"]
    done = subprocess.run([*command, KERNELS / "attention.cu"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spilled = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert spilled == [("0", "0")] * (3 * len(HEAD_DIMS) + 1)
