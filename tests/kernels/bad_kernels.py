"""Kernels that break one limit of the lint each."""

import torch
import triton
import triton.language as tl

from fastdeit.kernels import _triton
from fastdeit.kernels.lint.cases import Case


@triton.jit
def does_not_compile(x, y):
    tl.store(y + tl.arange(0, 3), tl.load(x + tl.arange(0, 3)))


@triton.jit
def scattered(x, y):
    at = tl.arange(0, 1024)
    tl.store(y + 2 * at, tl.load(x + 2 * at))


@triton.jit
def spilling(x, y):
    at = tl.arange(0, 16384)
    values = tl.load(x + at)
    tl.store(y + at, values - tl.max(values, 0))


@triton.jit
def product(x, y, rows, M: tl.constexpr, N: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, 64)
    total = tl.zeros((M, N), tl.float32)
    for start in range(0, rows, 64):
        a = tl.load(x + m[:, None] * rows + (start + k)[None, :])
        b = tl.load(x + (start + k)[:, None] * N + n[None, :])
        total = tl.dot(a, b, total)
    tl.store(y + m[:, None] * N + n[None, :], total.to(tl.float16))


_triton.expect(product, products=True)


def case(name, kernel, *numbers, warps=4, stages=1, dtype=torch.float16, **constants):
    def run():
        x = torch.empty(64, dtype=dtype, device="meta")
        _triton.launch(kernel, (1,), x, x, *numbers, warps=warps, stages=stages, **constants)

    return Case("bad", "triton", name, run, needs=80)


CASES = [
    case("error", does_not_compile),
    case("narrow", scattered),
    case("spills", spilling, warps=1, dtype=torch.float32),
    case("shared", product, 768, M=128, N=256, warps=8, stages=6),
    case("no wgmma", product, 768, M=32, N=64),
]
