"""What is no kernel of ours, but spares launches and bytes: casts of many parameters at once, and the queries of a few
tokens beside the keys and values of all, against autograd of the plain formula."""

import math

import pytest
import torch
import torch.nn.functional as F

from fastdeit.bench.count import CARD, counted_card
from fastdeit.kernels import autocast_copies, queries_apart, with_bias_gradient

BF16 = torch.bfloat16
SHAPES = (6, 4), (6,), (3, 2, 2)


def parameters(*frozen, dtype=torch.float32):
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=dtype, requires_grad=place not in frozen) for place, shape in enumerate(SHAPES)]


def autocast(device="cpu"):
    return torch.autocast(device, BF16)


def gradients_of(copies, wanted):
    """Each copy is weighted by numbers of its own; the last has no part in the result."""
    weights = [torch.linspace(-1, 1, copy.numel()).view(copy.shape) for copy in copies]
    result = sum((copy.float() * weight).sum() for copy, weight in list(zip(copies, weights, strict=True))[:-1])
    return torch.autograd.grad(result, wanted, allow_unused=True)


def test_copies_and_gradients_are_those_of_single_casts():
    tensors = parameters()
    with autocast():
        copies = autocast_copies(tensors)
    plain = [tensor.to(BF16) for tensor in tensors]
    assert all(map(torch.equal, copies, plain))
    *found, none = gradients_of(copies, tensors)
    *expected, _ = gradients_of(plain, tensors)
    assert none is None
    assert [grad.dtype for grad in found] == [torch.float32] * 2
    assert all(map(torch.equal, found, expected))


def test_a_frozen_tensor_has_a_copy_without_a_gradient():
    with autocast():
        copies = autocast_copies(parameters(1))
    assert [copy.requires_grad for copy in copies] == [True, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_autocast_and_in_float64_tensors_are_left_alone(dtype):
    tensors = parameters(dtype=dtype)
    with torch.autocast("cpu", BF16, enabled=dtype == torch.float64):
        assert all(copy is tensor for copy, tensor in zip(autocast_copies(tensors), tensors, strict=True))


@pytest.mark.parametrize("order", [1, -1])
def test_each_tensor_has_the_dtype_that_autocast_gives_it(order):
    first, second, third = parameters()
    tensors = [first.detach().double().requires_grad_(), second, third][::order]
    with autocast():
        copies = autocast_copies(tensors)
        assert autocast_copies([]) == []
    assert [copy.dtype for copy in copies] == [torch.float64, BF16, BF16][::order]
    assert all(copy is tensor for copy, tensor in zip(copies, tensors, strict=True) if copy.dtype == torch.float64)
    grads = torch.autograd.grad(sum(copy.double().sum() for copy in copies), tensors)
    assert [grad.dtype for grad in grads] == [tensor.dtype for tensor in tensors]


def test_what_has_the_dtype_already_is_not_copied():
    first, second, third = parameters()
    half = second.detach().to(BF16).requires_grad_()
    with autocast():
        copies = autocast_copies([first, half, third])
        alone = autocast_copies([half])
    assert copies[1] is half
    assert alone[0] is half
    assert torch.equal(copies[0], first.to(BF16))
    assert torch.equal(copies[2], third.to(BF16))


def test_a_gradient_can_be_differentiated():
    (tensor,) = parameters()[:1]
    with autocast():
        (copy,) = autocast_copies([tensor])
    (grad,) = torch.autograd.grad(copy.float().square().sum(), tensor, create_graph=True)
    (second,) = torch.autograd.grad(grad.sum(), tensor)
    assert torch.equal(second, torch.full_like(tensor, 2.0))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiler_sees_single_casts(backend):
    tensors = parameters()

    def run(*tensors):
        with autocast():
            return [copy.float() for copy in autocast_copies(tensors)]

    compiled = torch.compile(run, backend=backend, fullgraph=True)(*tensors)
    assert all(map(torch.equal, compiled, run(*tensors)))


def test_all_copies_are_one_launch_and_all_gradients_another():
    with counted_card(90) as (_, watch), autocast("cuda"):
        tensors = [torch.empty(shape, device=CARD, requires_grad=True) for shape in SHAPES]
        grads = [torch.empty(shape, device=CARD, dtype=BF16) for shape in SHAPES]
        watch.counting = True
        torch.autograd.backward(autocast_copies(tensors), grads)
    elements = 6 * 4 + 6 + 3 * 2 * 2
    assert [(launch.kind, launch.bytes, launch.launches) for launch in watch.launches] == [
        ("casts", 6 * elements, 1),
        ("casts", 6 * elements, 1),
    ]


# ---- biases whose gradient is made elsewhere -------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4,), (3, 4), (0, 4), (2, 3, 4)], ids=str)
def test_the_gradient_of_a_bias_is_the_sum_over_all_rows(shape):
    bias, weights = torch.zeros(4, requires_grad=True), torch.arange(math.prod(shape)).float().view(shape)
    grads = [
        torch.autograd.grad((made * weights).sum(), bias)[0]
        for made in (with_bias_gradient(weights + bias.detach(), bias), weights + bias)
    ]
    assert torch.equal(*grads)


# ---- queries of a few tokens -----------------------------------------------------------------------------------------

B, N, C, ROWS = 3, 5, 4, 2


def operands():
    torch.manual_seed(0)
    return [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((B, N, C), (3 * C, C), (3 * C,))]


def apart(x, weight, bias):
    return queries_apart(x, weight, bias.detach(), bias, ROWS)


def plain(x, weight, bias):
    return F.linear(x[:, :ROWS], weight[:C], bias[:C]), F.linear(x, weight[C:], bias[C:])


def test_queries_apart_are_slices_of_the_whole():
    found, expected = apart(*operands()), plain(*operands())
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (0, 1, 2)])
def test_gradients_of_queries_apart(trained):
    args = operands()
    for place, arg in enumerate(args):
        arg.requires_grad_(place in trained)
    wanted = [args[place] for place in trained]
    found, expected = (torch.autograd.grad([part.sin().sum() for part in run(*args)], wanted) for run in (apart, plain))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-14)


def test_queries_apart_have_a_second_derivative():
    assert torch.autograd.gradgradcheck(apart, operands())


def test_queries_apart_follow_transforms_and_compilers():
    args = operands()

    def loss(*args):
        return sum(part.sin().sum() for part in apart(*args))

    expected = torch.autograd.grad(loss(*args), args)
    transformed = torch.func.grad(loss, (0, 1, 2))(*args)
    compiled = torch.autograd.grad(torch.compile(loss, backend="aot_eager", fullgraph=True)(*args), args)
    for found in (transformed, compiled):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)


def test_queries_apart_take_the_dtype_of_autocast():
    x, weight, bias = (arg.detach().float().requires_grad_() for arg in operands())
    with autocast():
        queries, rest = apart(x, weight, bias)
    assert (queries.dtype, rest.dtype) == (BF16, BF16)
    grads = torch.autograd.grad(queries.float().sum() + rest.float().sum(), [x, weight, bias])
    assert {grad.dtype for grad in grads} == {torch.float32}
    assert torch.equal(grads[2][:C], torch.full((C,), B * ROWS + 0.0))


def test_weights_of_another_shape_are_refused():
    x, weight, bias = operands()
    with pytest.raises(ValueError, match=r"weight has shape \[8, 4\], but must be \[3 \* C, C\]"):
        queries_apart(x, weight[:8], bias, bias, ROWS)
