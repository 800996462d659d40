"""swiglu in Triton: any shape, dtype and incoming gradient; and it is what PyTorch's parts make."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from fastdeit import kernels
from tests.kernels.proof import few, layouts, normal, prove


def tokens(device, dtype, *shape, scale=1.0):
    return (scale * normal(*shape, dtype=torch.float32, device=device, seed=0)).to(dtype).requires_grad_()


@given(rows=st.sampled_from([1, 5, 21]), width=st.sampled_from([1, 24, 100, 520]), layout=layouts)
@few
def test_as_good_as_pytorch(device, dtype, rows, width, layout):
    prove(kernels.swiglu, {"x": tokens(device, dtype, rows, 2 * width)}, layout)


def test_saturated_gates(device):
    prove(kernels.swiglu, {"x": tokens(device, torch.float32, 7, 48, scale=50.0)})


def test_it_is_silu_of_the_first_half_times_the_second():
    x = tokens("cpu", torch.float64, 2, 3, 8)
    torch.testing.assert_close(kernels.swiglu(x), F.silu(x[..., :4]) * x[..., 4:])


def test_no_rows(device):
    x = tokens(device, torch.float32, 0, 16)
    with kernels.use("triton"):
        out = kernels.swiglu(x)
        (grad,) = torch.autograd.grad(out.sum(), x)
    assert (out.shape, grad.shape) == ((0, 8), (0, 16))


def test_an_odd_width_is_refused():
    with pytest.raises(ValueError, match=r"x has shape \[2, 7\], but must be \[\.\.\., 2\*F\]"):
        kernels.swiglu(torch.ones(2, 7))
    with pytest.raises(TypeError, match=r"x is torch\.int64"):
        kernels.swiglu(torch.ones(2, 8, dtype=torch.int64))
