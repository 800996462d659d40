"""Tokens before the first block: written once, with the values and gradients of the plain formula."""

import pytest
import torch
from torch.autograd import forward_ad

from fastdeit.bench.count import CARD, counted_card
from fastdeit.models.embedding import joined

B, P, K, C = 3, 4, 2, 8
BF16 = torch.bfloat16


def operands(shared, dtype=torch.float64):
    torch.manual_seed(0)
    shapes = (1, K, C), (B, P, C), (1 if shared else B, P, C)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def plain(prefix, patches, positions, dtype):
    return torch.cat([prefix.expand(len(patches), -1, -1), patches + positions], 1).to(dtype)


def gradients(function, args, dtype):
    tokens = function(*args, dtype)
    weights = torch.linspace(-1, 1, tokens.numel()).view(tokens.shape).to(dtype)
    return tokens, torch.autograd.grad(tokens, args, weights)


@pytest.mark.parametrize("shared", [True, False])
def test_tokens_and_gradients(shared):
    """To the bit."""
    found, expected = (gradients(run, operands(shared), torch.float64) for run in (joined, plain))
    assert torch.equal(found[0], expected[0])
    assert all(map(torch.equal, found[1], expected[1]))


@pytest.mark.parametrize("stream", [torch.float32, BF16])
def test_patches_of_16_bit_are_added_in_32(stream):
    prefix, patches, positions = (tensor.detach().float() for tensor in operands(shared=True))
    args = [tensor.requires_grad_() for tensor in (prefix, patches.to(BF16), positions)]
    found, expected = (gradients(run, args, stream) for run in (joined, plain))
    assert torch.equal(found[0], expected[0])
    assert [grad.dtype for grad in found[1]] == [torch.float32, BF16, torch.float32]
    assert torch.equal(found[1][1], expected[1][1])


def test_only_what_is_trained_has_a_gradient():
    args = operands(shared=True)
    for place, trained in enumerate((False, True, False)):
        args[place].requires_grad_(trained)
    joined(*args, torch.float64).sum().backward()
    assert [tensor.grad is not None for tensor in args] == [False, True, False]


def test_transforms_and_compilers_see_the_plain_formula():
    args = operands(shared=True)

    def loss(*args):
        return joined(*args, torch.float64).sin().sum()

    expected = torch.autograd.grad(loss(*args), args)
    compiled = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(*args), args)
    for found in (torch.func.grad(loss, (0, 1, 2))(*args), compiled):
        torch.testing.assert_close(tuple(found), expected)


def test_forward_mode_sees_the_plain_formula():
    prefix, patches, positions = (tensor.detach() for tensor in operands(shared=True))
    tangent = torch.full_like(patches, 0.5)
    with forward_ad.dual_level():
        dual = torch._VF._make_dual(patches, tangent, level=0)  # as `make_dual`, without its decompositions
        found = forward_ad.unpack_dual(joined(prefix, dual, positions, torch.float64)).tangent
    assert torch.equal(found, torch.cat([torch.zeros(B, K, C, dtype=torch.float64), tangent], 1))


def test_tokens_are_written_once():
    with counted_card(90) as (_, watch):
        prefix, positions = torch.empty(1, K, C, device=CARD), torch.empty(1, P, C, device=CARD)
        patches = torch.empty(B, P, C, device=CARD, dtype=BF16)
        watch.counting = True
        joined(prefix, patches, positions, torch.float32)
    written, read = 4 * B * (K + P) * C, 4 * (K + P) * C + 2 * B * P * C
    assert sum(launch.bytes for launch in watch.launches) == written + read
