"""The rule by which kernels are judged finds what it is there to find."""

import pytest
import torch

from tests.kernels.proof import assert_as_good, assert_rounded_once


def product(a, b, dtype, step):
    """a b, of which the sum so far is rounded to `dtype` after every `step` of the depth."""
    total = torch.zeros(a.shape[0], b.shape[1], dtype=dtype)
    for start in range(0, a.shape[1], step):
        part = a[:, start : start + step].float() @ b[start : start + step].float()
        total = (total.float() + part).to(dtype)
    return total.half()


@pytest.mark.parametrize("step", [16, 64, 128])
def test_sums_in_16_bit_are_found(step):
    """At the depth of DeiT-B, six to forty-eight roundings: less than twice the error of PyTorch in all."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(768, 128, generator=generator).half() for _ in range(2))
    a, exact = a.T, a.T.double() @ b.double()
    theirs = (a.float() @ b.float()).half()
    for judge in (assert_as_good, assert_rounded_once):
        judge(product(a, b, torch.float32, step), theirs, exact, "in float32")
    with pytest.raises(AssertionError, match="accumulated error"):
        assert_rounded_once(product(a, b, torch.float16, step), theirs, exact, "in float16")


def test_a_single_number_may_be_four_units_off():
    """PyTorch may have hit it by chance, which it does not in all elements of a tensor."""
    exact = torch.tensor(1.5, dtype=torch.float64)
    theirs = exact.float()
    for units, shape, passes in ((3.5, (), True), (4.5, (), False), (1.5, (1,), False)):
        mine = (theirs + 1.5 * units * torch.finfo(torch.float32).eps).view(shape)
        if passes:
            assert_as_good(mine, theirs.view(shape), exact.view(shape), "a number")
        else:
            with pytest.raises(AssertionError, match="a number: error"):
                assert_as_good(mine, theirs.view(shape), exact.view(shape), "a number")
