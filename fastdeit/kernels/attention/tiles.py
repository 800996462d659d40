"""What the Triton kernels of attention share: loads and stores of a head's rows, products, and how a launch addresses
packed tensors."""

from functools import cache
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from fastdeit.kernels import _triton
from fastdeit.kernels._op import Unsupported

ROWS = 64
"""Queries of a program, and keys of a step of a loop: the smallest tile of the tensor cores of sm_90."""
WIDEST_HEAD = 128
MOST_PROGRAMS = 2**31 - 1
"""The most that the first dimension of a CUDA grid holds; the others hold 65,535."""
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_tile(pointer, row, rows, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows `[len(row), BLOCK]` of one head; zero beyond the last row and beyond WIDTH. Offsets have the type of `row`
    and `stride`: see `rows_from`."""
    column = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < WIDTH)[None, :]
    return tl.load(pointer + row[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def store_tile(pointer, value, row, rows, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Store the rows that exist of a tile of a head, WIDTH of its BLOCK columns, in the dtype of the memory."""
    column = tl.arange(0, BLOCK)
    mask = (row < rows)[:, None] & (column < WIDTH)[None, :]
    tl.store(pointer + row[:, None] * stride + column[None, :], value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def rows_from(pointer, start, stride):
    """The pointer moved to row `start`: in 64 bits, as one number of the program, so that the offsets inside a tile,
    one a thread, need no more than 32, however many elements a sample has."""
    return pointer + tl.cast(start, tl.int64) * stride


@triton.jit
def dot(a, b, total=None):
    """a b + total; the products of float32 tiles are those of float32, not of tf32."""
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def logits(q, keys, column, tokens, scale, RAGGED: tl.constexpr):
    """Logits in powers of two; minus infinity where there is no key, which only RAGGED chunks can have."""
    s = dot(q, tl.trans(keys)) * scale
    if RAGGED:
        s = tl.where((column < tokens)[None, :], s, float("-inf"))
    return s


@triton.jit
def visible(key_mask, batch, first, column, tokens):
    """Which of the keys from `first` on take part: those that exist, and where there is a mask, are not 0 in it."""
    there = column < tokens - first
    if key_mask is not None:
        at = batch * tokens + first + column
        there = tl.load(key_mask + at, mask=there, other=0) != 0
    return there


@triton.jit
def of_head(q, k, v, q_batch, k_batch, blocks, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """The pointers moved to this program's head, its sample and head, and which of the head's `blocks` it takes. Those
    of a head follow one another, so that they find its keys and values in cache."""
    block, own = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    batch, head = (own // HEADS).to(tl.int64), own % HEADS
    queries, keys = batch * q_batch + head * WIDTH, batch * k_batch + head * WIDTH
    return q + queries, k + keys, v + keys, batch, head, block


@cache
def chunks(tokens: int) -> tuple[int, int, int]:
    """The fewest of up to three powers of two, from 16, that cover `tokens` with the least padding; 0 is none."""
    sizes = [0, 16, 32, 64, 128, 256]
    covers = [
        (a, b, c)
        for a in sizes[1:]
        for b in sizes
        for c in sizes
        if a >= b >= c and a + b + c >= tokens and (b or not c)
    ]
    return min(covers, key=lambda cover: (sum(cover), sum(size > 0 for size in cover)))


class Operands(NamedTuple):
    """q `[B, M, H*d]`, k and v `[B, N, H*d]` as the kernels address them: slices of packed tensors, and strides."""

    q: Tensor
    k: Tensor
    v: Tensor
    num_heads: int
    scale: float

    @classmethod
    def of_packed(cls, qkv: Tensor, num_heads: int, scale: float) -> "Operands":
        """Those of `[B, N, 3*H*d]`."""
        return cls(*qkv.split(qkv.shape[2] // 3, 2), num_heads, scale)

    @property
    def width(self) -> int:
        """Channels of a head."""
        return self.q.shape[2] // self.num_heads

    @property
    def sizes(self) -> tuple[int | float, ...]:
        """Run-time numbers of a launch: queries, keys, the scale, and strides of q and k by sample and by token."""
        (q_batch, q_row, _), (k_batch, k_row, _) = self.q.stride(), self.k.stride()
        return self.q.shape[1], self.k.shape[1], self.scale, q_batch, q_row, k_batch, k_row

    @property
    def constants(self) -> dict[str, int]:
        """Constants of a launch. float32 has no tensor cores here and twice the bytes: smaller tiles."""
        width = self.width
        rows = ROWS if self.q.itemsize == 2 else ROWS // 2
        block = max(16, _triton.power_of_two(width))
        return {"HEADS": self.num_heads, "WIDTH": width, "BLOCK": block, "ROWS": rows}

    def grid(self, rows: int, step: int) -> tuple[int]:
        """Of one program for each `step` of the `rows` of each head: one dimension, which alone holds enough."""
        return (_triton.cdiv(rows, step) * self.q.shape[0] * self.num_heads,)

    def check(self) -> dict[str, int]:
        """The constants. `Unsupported` for dtypes, widths, sizes and numbers of heads that the kernels do not take."""
        q, k = self.q, self.k
        _triton.require_dtypes(q, k)
        _triton.require_products(q)
        if q.dtype != k.dtype:
            raise Unsupported(f"q is {q.dtype}, but kv is {k.dtype}")
        constants = self.constants
        if constants["WIDTH"] > WIDEST_HEAD:
            raise Unsupported(f"heads are {self.width} wide, at most {WIDEST_HEAD} fit")
        if 0 in q.shape or 0 in k.shape:
            raise Unsupported(f"q {list(q.shape)} or keys {list(k.shape)} are empty")
        (programs,) = self.grid(max(q.shape[1], k.shape[1]), constants["ROWS"])
        if programs > MOST_PROGRAMS:
            raise Unsupported(f"{programs} programs, at most {MOST_PROGRAMS} fit a launch")
        return constants
