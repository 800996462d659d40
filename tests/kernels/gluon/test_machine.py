"""The machine does what a card does with a right kernel, and finds what is wrong with wrong ones."""

from pathlib import Path

import pytest
import torch

from fastdeit.kernels import _triton
from fastdeit.kernels.attention.hopper import backend
from tests.kernels.gluon.planted import changed, module_from

if _triton.VERSION < backend.COMPILER:
    pytest.skip("this Triton has no Gluon for Hopper", allow_module_level=True)

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from tests.kernels.gluon import examples, machine

SECOND = "    result = warpgroup_mma(left, right, nothing, use_acc=False, is_async=True)\n"
FENCE = "    fence_async_shared()\n    gl.barrier()\n"
FAULTS = {
    "barriers are set up and not fenced": ("fence", f"{FENCE}    left = gl", "    gl.barrier()\n    left = gl"),
    "barriers are set up, and no barrier of threads": (
        "fence",
        f"{FENCE}    left = gl",
        "    fence_async_shared()\n    left = gl",
    ),
    "a barrier is not set up": (
        "mbarrier",
        "static_range(2):\n        mbarrier.init",
        "static_range(1):\n        mbarrier.init",
    ),
    "a barrier is valid at the end": (
        "mbarrier",
        "static_range(2):\n        mbarrier.invalidate",
        "static_range(1):\n        mbarrier.invalidate",
    ),
    "a barrier is used that is invalid": (
        "mbarrier",
        "mbarrier.invalidate(arrived.index(number))",
        "mbarrier.invalidate(arrived.index(number * 0))",
    ),
    "a barrier is made invalid that others wait for": (
        "barrier",
        "    tma.store_wait(0)\n",
        "    tma.store_wait(0)\n    mbarrier.wait(arrived.index(1), 0)\n",
    ),
    "a barrier is set up twice": ("mbarrier", "init(arrived.index(number)", "init(arrived.index(number * 0)"),
    "a load is not waited for": ("early", "    mbarrier.wait(arrived.index(0), 0)\n", ""),
    "a wait for the phase before": ("early", "wait(arrived.index(1), 0)", "wait(arrived.index(1), 1)"),
    "a wait that nothing ends": (
        "deadlock",
        "    nothing = gl",
        "    mbarrier.wait(arrived.index(1), 1)\n    nothing = gl",
    ),
    "no bytes are expected": ("deadlock", "    mbarrier.expect(arrived.index(0), a.nbytes_per_cta)\n", ""),
    "too many bytes are expected": ("deadlock", "a.nbytes_per_cta", "2 * a.nbytes_per_cta"),
    "too few bytes are expected": ("bytes", "a.nbytes_per_cta", "a.nbytes_per_cta // 2"),
    "bytes are expected twice": (
        "mbarrier",
        "    mbarrier.expect(arrived.index(1), b.nbytes_per_cta)\n",
        "    mbarrier.expect(arrived.index(1), 0)\n    mbarrier.expect(arrived.index(1), b.nbytes_per_cta)\n",
    ),
    "two loads into one place": ("race", "arrived.index(1), right)", "arrived.index(1), left)"),
    "a load is under way at the end": (
        "end",
        "    tma.store_wait(0)\n",
        "    tma.store_wait(0)\n    more = gl.allocate_shared_memory(b.dtype, b.block_shape, b.layout)\n"
        "    tma.async_load(b, [0, 0], arrived.index(1), more)\n",
    ),
    "a product is read before it is there": ("early", "once = warpgroup_mma_wait(0", "once = warpgroup_mma_wait(1"),
    "an operand is overwritten": (
        "race",
        f"{SECOND}    result = warpgroup_mma_wait(0, deps=[result])\n    gl.barrier()\n",
        f"{SECOND}    left.store(once.to(a.dtype))\n    result = warpgroup_mma_wait(0, deps=[result])\n",
    ),
    "an operand is overwritten before all have waited": (
        "barrier",
        "    once = warpgroup_mma_wait(0, deps=[once])\n    gl.barrier()\n",
        "    once = warpgroup_mma_wait(0, deps=[once])\n",
    ),
    "a product without a fence": ("fence", f"{FENCE}{SECOND}", f"    gl.barrier()\n{SECOND}"),
    "a product without a barrier": ("fence", f"{FENCE}{SECOND}", f"    fence_async_shared()\n{SECOND}"),
    "a barrier before the fence": (
        "fence",
        f"{FENCE}{SECOND}",
        f"    gl.barrier()\n    fence_async_shared()\n{SECOND}",
    ),
    "a store without a fence": ("fence", f"{FENCE}    tma.async_store", "    gl.barrier()\n    tma.async_store"),
    "a store is not waited for": ("end", "    tma.store_wait(0)\n", ""),
    "a product is not waited for": (
        "end",
        "    tma.store_wait(0)\n",
        f"    tma.store_wait(0)\n{SECOND}",
    ),
    "memory that nobody wrote": (
        "unwritten",
        "    nothing = gl",
        "    left = gl.allocate_shared_memory(a.dtype, a.block_shape, a.layout)\n    nothing = gl",
    ),
    "all programs write the same rows": ("race", "tma.async_store(c, [rows, 0]", "tma.async_store(c, [rows * 0, 0]"),
    "a program reads what was written": ("race", "tma.async_load(a, [rows, 0]", "tma.async_load(c, [rows * 0, 0]"),
    "a store beyond the end": ("bounds", "mask=row < ROWS", "mask=row < ROWS + 1"),
    "a buffer that there is not": ("bounds", "wait(arrived.index(1)", "wait(arrived.index(2)"),
    "too much memory": ("memory", "gl.int64, [2, 1]", "gl.int64, [30000, 1]"),
    "tiles that do not fit": ("type", "nothing = gl.zeros([64, COLUMNS]", "nothing = gl.zeros([64, COLUMNS // 2]"),
    "a number wraps": ("overflow", "rows = gl.program_id(0) * 64", "rows = (gl.program_id(0) + 1) * 2147483647"),
}
"""What is changed in `examples.twice`, and the kind of the fault."""


def boxes(tensor, rows):
    layout = gl.NVMMASharedLayout.get_default_for([rows, 64], gl.float16)
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [rows, 64], layout)


def twice(kernel, order="forward"):
    """a, b, and the kernel's result and sums, for 100 rows."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, 64, generator=generator).mul(0.2).half() for n in (100, 64))
    c, sums = torch.full_like(a, torch.nan), torch.full((100,), torch.nan)
    arguments = {"a": boxes(a, 64), "b": boxes(b, 64), "c": boxes(c, 64), "sums": sums, "ROWS": 100, "COLUMNS": 64}
    machine.run(kernel, (2,), arguments, order)
    return a, b, c, sums


@pytest.mark.parametrize("order", ["forward", "reverse"])
def test_a_right_kernel_computes_what_it_says(order):
    a, b, c, sums = twice(examples.twice, order)
    expected = ((a.float() @ b.float()).half().float() @ b.float()).half()
    assert torch.equal(c, expected)
    assert torch.allclose(sums, expected.float().sum(1), atol=0.02)


@pytest.mark.parametrize("name", FAULTS)
def test_what_no_kernel_may_do_is_found(name, tmp_path):
    kind, old, new = FAULTS[name]
    path = tmp_path / "examples.py"
    path.write_text(changed(Path(examples.__file__).read_text(), old, new))
    kernel = module_from(path, "wrong_example").twice
    with pytest.raises(machine.Fault) as found:
        twice(kernel)
    assert found.value.kind == kind


def test_boxes_beyond_the_end_are_zero_and_not_stored():
    tensor = torch.arange(2 * 3 * 64, dtype=torch.float16).view(2, 3, 64)
    layout = gl.NVMMASharedLayout.get_default_for([1, 16, 64], gl.float16)
    descriptor = TensorDescriptor(tensor, [2, 3, 64], [192, 64, 1], [1, 16, 64], layout)
    made = machine.Boxes(machine.Global("x", tensor), descriptor)
    offset, there = made.places([1, 2, 0])
    assert there.sum() == 64
    assert torch.equal(offset[there], torch.arange(5 * 64, 6 * 64))
    assert made.nbytes_per_cta == 16 * 64 * 2
