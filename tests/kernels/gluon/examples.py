"""A small Gluon kernel that does what the machine watches: loads, products, stores, and shared memory written by
threads. `test_machine.py` changes a line of it at a time."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.constexpr_function
def accumulator():
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])


@gluon.jit
def twice(a, b, c, sums, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """c = a b b for 64 rows of a, and the sums of its rows."""
    layout: gl.constexpr = accumulator()
    rows = gl.program_id(0) * 64
    arrived = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for number in gl.static_range(2):
        mbarrier.init(arrived.index(number), count=1)
    fence_async_shared()
    gl.barrier()
    left = gl.allocate_shared_memory(a.dtype, a.block_shape, a.layout)
    right = gl.allocate_shared_memory(b.dtype, b.block_shape, b.layout)
    mbarrier.expect(arrived.index(0), a.nbytes_per_cta)
    tma.async_load(a, [rows, 0], arrived.index(0), left)
    mbarrier.expect(arrived.index(1), b.nbytes_per_cta)
    tma.async_load(b, [0, 0], arrived.index(1), right)
    mbarrier.wait(arrived.index(0), 0)
    mbarrier.wait(arrived.index(1), 0)
    nothing = gl.zeros([64, COLUMNS], gl.float32, layout)
    once = warpgroup_mma(left, right, nothing, use_acc=False, is_async=True)
    once = warpgroup_mma_wait(0, deps=[once])
    gl.barrier()
    left.store(once.to(a.dtype))
    fence_async_shared()
    gl.barrier()
    result = warpgroup_mma(left, right, nothing, use_acc=False, is_async=True)
    result = warpgroup_mma_wait(0, deps=[result])
    gl.barrier()
    left.store(result.to(a.dtype))
    row = rows + gl.arange(0, 64, gl.SliceLayout(1, layout))
    gl.store(sums + row, gl.sum(result, 1), mask=row < ROWS)
    fence_async_shared()
    gl.barrier()
    tma.async_store(c, [rows, 0], left)
    tma.store_wait(0)
    for number in gl.static_range(2):
        mbarrier.invalidate(arrived.index(number))
