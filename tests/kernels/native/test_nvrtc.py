"""The native kernels compiled for V100, without a GPU: what the compiler made of them (`nvrtc.py`)."""

import json
import re
from dataclasses import asdict

import pytest

from tests.kernels.native import nvrtc
from tests.kernels.native.simt import HEAD_DIMS, KERNELS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(nvrtc.unavailable() is not None, reason=str(nvrtc.unavailable())),
]

TWIN = """
extern "C" __global__ void twin(const float *in, float *out) {
  extern __shared__ __align__(32) unsigned char memory[];
  const half *rows = reinterpret_cast<const half *>(memory);
  float *sums = reinterpret_cast<float *>(memory + 4096);
  wmma::fragment<wmma::matrix_a, 16, 16, 16, half, wmma::row_major> a;
  wmma::fragment<wmma::matrix_b, 16, 16, 16, half, wmma::LAYOUT> b;
  wmma::fragment<wmma::accumulator, 16, 16, 16, float> c;
  wmma::load_matrix_sync(a, rows, 72);
  wmma::load_matrix_sync(b, rows + 1024, 72);
  wmma::load_matrix_sync(c, sums, 40, wmma::mem_row_major);
  wmma::mma_sync(c, a, b, c);
  wmma::store_matrix_sync(sums, c, 40, wmma::mem_row_major);
}
"""
OWN = """
extern "C" __global__ void twin(const float *in, float *out) {
  const Half *rows = reinterpret_cast<const Half *>(shared_memory);
  float *sums = reinterpret_cast<float *>(shared_memory + 4096);
  FragmentA a;
  FragmentB<Stored::LAYOUT> b;
  Accumulator c;
  load(a, rows, 72);
  load(b, rows + 1024, 72);
  load(c, sums, 40);
  multiply_add(c, a, b);
  store(sums, c, 40);
}
"""
HALVES = """
extern "C" __global__ void twin(const float *in, float *out) {
  out[threadIdx.x] = TO_FLOAT(TO_HALF(in[threadIdx.x]));
}
"""
CUDA = "#include <mma.h>\n#include <cuda_fp16.h>\nusing namespace nvcuda;\n"
SHIPPED = '#include "device.cuh"\nusing namespace fastdeit;\n'


@pytest.fixture(scope="module")
def found():
    return nvrtc.resources()


def test_registers_and_instructions_are_those_of_the_golden_file(found):
    """A change of the kernels changes them: look at both, then `python -m tests.kernels.native.nvrtc`."""
    assert {name: asdict(one) for name, one in found.items()} == json.loads(nvrtc.GOLDEN.read_text())


def test_no_register_is_spilled(found):
    assert {one.spilled_bytes for one in found.values()} == {0}


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_product_is_of_tensor_cores(found, head_dim):
    """16 instructions make a 16 x 16 x 16 product. A step over 32 columns has two of 16 x d x 32 in the forward, three
    for the gradient of queries, four for that of keys and values."""
    of_one = 16 * (head_dim // 16) * (32 // 16)
    for kernel, products in (("forward", 2), ("query_gradient", 3), ("key_gradient", 4)):
        assert found[f"fastdeit_attention_{kernel}_{head_dim}"].hmma == products * of_one


def test_there_is_a_kernel_for_each_line_of_the_table(found):
    named = re.findall(r"^//   (fastdeit_attention_\w+)", (KERNELS / "launch.h").read_text(), re.MULTILINE)
    assert len(named) == 4
    names = {f"{name}{d}" if name.endswith("_") else name for name in named for d in HEAD_DIMS}
    assert set(found) == names


def same_code(own, cuda):
    """Both sources are the same machine code."""
    if not (folders := nvrtc.headers()):
        pytest.skip("CUDA's own headers are not installed: nvidia-cuda-runtime-cu12, -nvcc-cu12, -cccl-cu12 12.9")
    included = [f"-I{folder}" for folder in folders]
    ours, _ = nvrtc.compiled(SHIPPED + own)
    theirs, _ = nvrtc.compiled(CUDA + cuda, "-default-device", *included)
    assert nvrtc.code(ours)["twin"] == nvrtc.code(theirs)["twin"]


@pytest.mark.parametrize(("layout", "stored"), [("row_major", "by_rows"), ("col_major", "by_columns")])
def test_warp_matrices_are_those_of_nvcuda(layout, stored):
    same_code(OWN.replace("LAYOUT", stored), TWIN.replace("LAYOUT", layout))


def test_halves_are_those_of_cuda(tmp_path):
    cuda = HALVES.replace("TO_FLOAT", "__half2float").replace("TO_HALF", "__float2half_rn")
    same_code(HALVES.replace("TO_FLOAT", "to_float").replace("TO_HALF", "to_half"), cuda)
