"""Sizes that no test could fill: more heads than a grid's second dimension holds, and tensors of more than 2**31
elements, in memory of which a few pages exist. What is computed there is what is computed in dense memory, bit for bit.
"""

from mmap import mmap

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdeit import kernels
from fastdeit.bench.count_card import pretended_card
from fastdeit.kernels import _triton
from fastdeit.kernels.attention import backward, forward
from fastdeit.kernels.attention.tiles import Operands
from fastdeit.kernels.mlp.gelu_products import _product

TOO_FAR = 2**31
STRIDE = 2**20
interpreter = pytest.mark.skipif(not _triton.INTERPRETED, reason="there is a card, no interpreter")


def sparse(like: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The values of a float16 tensor at these strides, in memory whose other pages do not exist."""
    elements = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, strides, strict=True))
    assert elements > TOO_FAR
    return torch.frombuffer(mmap(-1, 2 * elements), dtype=torch.float16).as_strided(like.shape, strides).copy_(like)


def rand(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).half()


@pytest.mark.slow
@interpreter
@pytest.mark.parametrize("far", ["queries", "keys"])
@pytest.mark.parametrize("tokens", [3, 300])
def test_attention_far_into_a_sample(far, tokens):
    """As of one head, by both kernels of forward and both of backward."""
    rows = TOO_FAR // STRIDE + 70  # the last block of rows begins beyond the limit
    queries, tokens = (rows, tokens) if far == "queries" else (tokens, rows)
    q, kv, incoming = rand(1, queries, 16), rand(1, tokens, 32), rand(1, queries, 16)

    def placed(q, kv):
        strides = rows * STRIDE, STRIDE, 1
        q, kv = (sparse(q, strides), kv) if far == "queries" else (q, sparse(kv, strides))
        return Operands(q, *kv.chunk(2, -1), 1, 0.25)

    results = []
    for operands, gradients in (
        (
            Operands(q, *kv.chunk(2, -1), 1, 0.25),
            Operands(torch.zeros_like(q), *torch.zeros_like(kv).chunk(2, -1), 1, 0.25),
        ),
        (placed(q, kv), placed(torch.zeros_like(q), torch.zeros_like(kv))),
    ):
        out, lse = forward.forward(operands)
        sums = backward.backward(incoming, operands, out, lse, gradients, sums=True)
        results.append((out, lse, sums, gradients.q, gradients.k, gradients.v))
    for near, there in zip(*results, strict=True):
        assert torch.equal(near, there)
        assert near.any()


@triton.jit
def _tile_kernel(x, w, out, first, DEPTH: tl.constexpr, WIDTH: tl.constexpr):
    row, column = tl.arange(0, 16), tl.arange(0, 16)
    total = tl.zeros((16, 16), tl.float32)
    total = _product(x, w, row, first + column, 16, WIDTH, 1, total, DEPTH, WIDTH, 16)
    tl.store(out + row[:, None] * 16 + column[None, :], total)


@interpreter
def test_products_far_into_a_matrix():
    """Tile of columns at the end of a matrix of 2**32 elements."""
    x, w = rand(16, 32), rand(32, 16)
    width = 2 * TOO_FAR // 16
    far = sparse(w, (width, 1))
    mine, out = torch.zeros(16, 16), torch.zeros(16, 16)
    _triton.launch(_tile_kernel, (1,), x, w, out, 0, DEPTH=32, WIDTH=16, warps=4)
    _triton.launch(_tile_kernel, (1,), x, far, mine, 0, DEPTH=32, WIDTH=width, warps=4)
    assert torch.equal(mine, out)
    torch.testing.assert_close(out, x.float() @ w.float())


@pytest.mark.parametrize("op", ["attention", "query_attention"])
def test_more_heads_than_the_second_dimension_of_a_grid(op):
    batch, heads, tokens = 6_000, 12, 70
    assert batch * heads > 65_535
    with pretended_card() as card:
        x, q = (
            torch.zeros(batch, n, 768 * parts, device="cuda", dtype=torch.float16, requires_grad=True)
            for n, parts in ((tokens, 3 if op == "attention" else 2), (2, 1))
        )
        with kernels.use(**{op: "triton"}):
            out = kernels.attention(x, heads) if op == "attention" else kernels.query_attention(q, x, heads)
            out.sum().backward()
    blocks = {"attention": (2, 2, 2), "query_attention": (1, 1, 2)}[op]
    assert [grid for _, grid, _ in card.launches] == [(n * batch * heads,) for n in blocks]
