"""Kernels that do what the checked interpreter must not let pass, one fault each, and ones that do it rightly."""

import triton
import triton.language as tl

from fastdeit.kernels import _loss


@triton.jit
def copy(x, y, count, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(y + at, tl.load(x + at, mask=at < count, other=0.0), mask=at < count)


@triton.jit
def load_one_too_many(x, y, count, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(y + at, tl.load(x + at, mask=at <= count, other=0.0), mask=at < count)


@triton.jit
def store_without_mask(x, y, count, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(y + at, tl.load(x + at, mask=at < count, other=0.0))


@triton.jit
def load_before_the_first(x, y, count, N: tl.constexpr):
    at = tl.program_id(0) * N + tl.arange(0, N)
    tl.store(y + at, tl.load(x + at - 1, mask=at < count, other=0.0), mask=at < count)


@triton.jit
def load_across_elements(x, y, count, N: tl.constexpr):
    words = (x.to(tl.pointer_type(tl.int8), bitcast=True) + 2).to(tl.pointer_type(tl.float32), bitcast=True)
    tl.store(y + tl.program_id(0), tl.load(words))


@triton.jit
def store_to_one_place(x, y, count, N: tl.constexpr):
    tl.store(y, tl.load(x + tl.program_id(0)))


@triton.jit
def load_what_the_next_stores(x, y, count, N: tl.constexpr):
    own = tl.program_id(0)
    tl.store(y + own, tl.load(x + own))
    tl.debug_barrier()
    tl.store(x + own, tl.load(y + (own + 1) % tl.num_programs(0)))


@triton.jit
def load_its_own_store(x, y, count, N: tl.constexpr):
    own = tl.program_id(0)
    tl.store(y + own, tl.load(x + own))
    tl.store(y + own, tl.load(y + own) + 1.0)


@triton.jit
def store_twice_at_once(x, y, count, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(y + at // 2, at.to(tl.float32))


@triton.jit
def wrap_around(x, y, count, N: tl.constexpr):
    far = (tl.program_id(0) + 65_536) * 65_536
    tl.store(y + far * 0, 0.0, mask=far < 0)


@triton.jit
def promise_too_much(x, y, count, N: tl.constexpr):
    tl.multiple_of(count, 16)


@triton.jit
def sum_by_the_last(x, y, ticket, count, N: tl.constexpr):
    tl.store(y + 1 + tl.program_id(0), tl.load(x + tl.program_id(0)))
    if _loss.is_last(ticket):
        at = tl.arange(0, N)
        tl.store(y, tl.sum(tl.load(y + 1 + at, mask=at < count, other=0.0), 0))


@triton.jit
def sum_with_a_relaxed_ticket(x, y, ticket, count, N: tl.constexpr):
    tl.store(y + 1 + tl.program_id(0), tl.load(x + tl.program_id(0)))
    tl.debug_barrier()
    if tl.atomic_add(ticket, 1, sem="relaxed") == count - 1:
        at = tl.arange(0, N)
        tl.store(y, tl.sum(tl.load(y + 1 + at, mask=at < count, other=0.0), 0))


@triton.jit
def sum_without_a_barrier(x, y, ticket, count, N: tl.constexpr):
    tl.store(y + 1 + tl.program_id(0), tl.load(x + tl.program_id(0)))
    if tl.atomic_add(ticket, 1, sem="acq_rel") == count - 1:
        at = tl.arange(0, N)
        tl.store(y, tl.sum(tl.load(y + 1 + at, mask=at < count, other=0.0), 0))


@triton.jit
def first_come_first_served(x, y, ticket, count, N: tl.constexpr):
    tl.store(y + tl.atomic_add(ticket, 1, sem="acq_rel"), tl.load(x + tl.program_id(0)))


@triton.jit
def one_round_and_one_side(x, y, count, N: tl.constexpr):
    at = tl.arange(0, N)
    for start in range(0, count, N):
        tl.store(y + start + at, tl.load(x + start + at, mask=start + at < count))
    if count < 0:
        for start in range(count):
            tl.store(y + start, 0.0)


@triton.jit
def copy_far(x, y, count, N: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    tl.store(y + at, tl.load(x + at, mask=at < count, other=0.0), mask=at < count)


@triton.jit
def copy_in_a_loop(x, y, count, N: tl.constexpr):
    for start in range(0, count, N):
        at = start + tl.arange(0, N)
        tl.store(y + at, tl.load(x + at, mask=at < count, other=0.0), mask=at < count + 1)
