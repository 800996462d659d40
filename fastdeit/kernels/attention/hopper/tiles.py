"""What attention's two Gluon kernels share: layouts, boxes of packed tensors, and the loads that fill shared memory.

A head's keys are up to three chunks, of 128, of 64, and of the 16, 32 or 64 that cover the rest: 198 are 128 + 64 + 16,
where the last has 10 that do not exist. Tensor descriptors have three dimensions, `[B, N, channels]`, so that a box
that reaches beyond the tokens of its sample is filled with zeros there, and stored without that part.
"""

from functools import cache

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

ROWS = gl.constexpr(64)
"""Queries of a step: the rows of a wgmma."""
LOG2E = gl.constexpr(1.4426950408889634)


@gluon.constexpr_function
def accumulator(columns, groups=1):
    """The layout of wgmma's results, whose columns are divided among `groups` groups of four warps."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, groups], instr_shape=[16, columns // groups, 16])


@gluon.jit
def present(first, second, third):
    """The boxes of the chunks that there are."""
    boxes = (first,)
    if second is not None:
        boxes = boxes + (second,)
    if third is not None:
        boxes = boxes + (third,)
    return boxes


@gluon.jit
def barriers(COUNT: gl.constexpr):
    """So many mbarriers, each of which one thread arrives at. A fence and a barrier of the threads have to follow."""
    made = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for number in gl.static_range(COUNT):
        mbarrier.init(made.index(number), count=1)
    return made


@gluon.jit
def invalidate(made, COUNT: gl.constexpr):
    """Where the kernel ends, behind a barrier of the threads: mbarriers are used no more. Without this use the compiler
    would put other data into their memory once nobody waits for them, which PTX forbids while they are set up."""
    for number in gl.static_range(COUNT):
        mbarrier.invalidate(made.index(number))


@gluon.jit
def load_chunks(boxes, chunks, batch, column, arrived):
    """Begin to load the keys, or the values, of a head: each chunk arrives at a barrier of its own."""
    start = 0
    for c in gl.static_range(len(boxes)):
        mbarrier.expect(arrived.index(c), boxes[c].nbytes_per_cta)
        tma.async_load(boxes[c], [batch, start, column], arrived.index(c), chunks[c])
        start += boxes[c].block_shape[1]


@cache
def chunks(tokens: int) -> tuple[int, ...]:
    """Keys of each chunk, for up to 256 tokens."""
    whole, rest = (tokens - 1) // 64 * 64, (tokens - 1) % 64 + 1
    sizes = [128] * (whole // 128) + [64] * (whole % 128 // 64)
    return *sizes, next(size for size in (16, 32, 64) if rest <= size)


def boxes(tensor: Tensor, tokens: int, width: int) -> TensorDescriptor:
    """Boxes `[1, tokens, width]` of a contiguous tensor `[B, N, channels]`."""
    block, layout = [1, tokens, width], _layout(tokens, width)
    # Not the tensor's own strides: of a dimension of size 1 that is any number, and TMA takes multiples of 16 bytes.
    _, length, channels = tensor.shape
    return TensorDescriptor(tensor, list(tensor.shape), [length * channels, channels, 1], block, layout)


@cache
def _layout(tokens: int, width: int) -> gl.NVMMASharedLayout:
    """That of a box in shared memory, of either kind of 16 bits. It is kept, because making it takes microseconds."""
    return gl.NVMMASharedLayout.get_default_for([1, tokens, width], gl.float16)


def chunk_boxes(tensor: Tensor, width: int) -> list[TensorDescriptor | None]:
    """The boxes of up to three chunks; None for those that there are not."""
    made = [boxes(tensor, size, width) for size in chunks(tensor.shape[1])]
    return made + [None] * (3 - len(made))
