"""add_rms_norm in Triton: every combination of what it fuses, any shape, any incoming gradient; and it is PyTorch's
RMSNorm."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastdeit import kernels
from fastdeit.kernels import _rows, rms_norm
from tests.kernels.proof import few, layouts, normal, prove, repeated


def arguments(device, dtype, batch, n, width, *, branch_dtype=None, gamma=True, keep=True, scale=1.0):
    def tensor(*shape, seed, dtype=dtype):
        return (normal(*shape, dtype=torch.float32, device=device, seed=seed) * scale).to(dtype).requires_grad_()

    kept = torch.tensor([0.0 if i % 3 == 1 else 1.25 for i in range(batch)], device=device)
    return {
        "residual": tensor(batch, n, width, seed=0),
        "branch": tensor(batch, n, width, seed=1, dtype=branch_dtype or dtype),
        "weight": tensor(width, seed=2, dtype=torch.float32),
        "eps": 1e-6,
        "gamma": tensor(width, seed=4, dtype=torch.float32) if gamma else None,
        "keep": kept if keep else None,
        "out_dtype": branch_dtype or dtype,
    }


# One channel alone would be a sign, whose gradient is rounding and nothing else.
@given(
    batch=st.integers(1, 3),
    n=st.sampled_from([1, 5, 49, 65]),
    width=st.sampled_from([5, 24, 100, 192]),
    gamma=st.booleans(),
    keep=st.booleans(),
    layout=layouts,
)
@few
def test_as_good_as_pytorch(device, dtype, batch, n, width, gamma, keep, layout):
    prove(kernels.add_rms_norm, arguments(device, dtype, batch, n, width, gamma=gamma, keep=keep), layout)


def test_float32_stream_with_a_16_bit_branch(device):
    prove(kernels.add_rms_norm, arguments(device, torch.float32, 3, 5, 384, branch_dtype=torch.float16))


@pytest.mark.parametrize("width", [192, 1000])
def test_without_a_branch(device, dtype, width):
    inputs = arguments(device, dtype, 3, 7, width)
    inputs = {name: inputs[name] for name in ("residual", "weight", "eps", "out_dtype")}
    prove(lambda **kwargs: kernels.add_rms_norm(branch=None, **kwargs)[1], inputs, "strided")


@pytest.mark.parametrize("place", [0, 1])
def test_one_result_alone_has_the_gradient_that_it_has_beside_the_other(device, place):
    """The other one is not used, and adds nothing."""
    inputs = arguments(device, torch.float32, 2, 3, 24)
    prove(lambda **kwargs: kernels.add_rms_norm(**kwargs)[place], inputs | {"weight": inputs["weight"].detach()})


def test_it_is_rms_norm_of_pytorch():
    inputs = arguments("cpu", torch.float64, 2, 3, 24)
    total = inputs["residual"] + inputs["branch"] * inputs["gamma"] * inputs["keep"][:, None, None]
    residual, normed = kernels.add_rms_norm(**inputs)
    torch.testing.assert_close(residual, total)
    expected = torch.nn.functional.rms_norm(total, (24,), inputs["weight"].double(), 1e-6)
    torch.testing.assert_close(normed, expected)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_huge_and_tiny_values(device, scale):
    prove(kernels.add_rms_norm, arguments(device, torch.float32, 2, 9, 192, scale=scale, gamma=False))


def test_more_rows_than_a_pass_has_programs(device, monkeypatch):
    monkeypatch.setattr(rms_norm, "_PROGRAMS", 4)
    assert 21 / _rows.tile(768)["ROWS"] > 2 * 4
    prove(kernels.add_rms_norm, arguments(device, torch.float32, 3, 7, 768))


def test_what_triton_does_not_take_is_the_references(device):
    wide = torch.zeros(1, 1, 8193, device=device)
    with kernels.use("triton"), pytest.raises(RuntimeError, match="rows of 8193 elements"):
        kernels.add_rms_norm(wide, wide, wide[0, 0])
    with kernels.use("triton"), pytest.raises(RuntimeError, match=r"it does not compute in torch\.float64"):
        kernels.add_rms_norm(**arguments(device, torch.float64, 2, 3, 8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.ones(3)}, r"weight has shape \[3\], but must be \[C\], C the last dimension of residual, = "),
        ({"branch": torch.ones(2, 3, 7)}, "branch has shape"),
        ({"branch": None}, "gamma belongs to the branch, but branch is None"),
        ({"keep": torch.ones(3)}, r"keep has shape \[3\]"),
        ({"eps": -1.0}, "eps is -1.0, but must be at least 0"),
    ],
)
def test_mistakes_are_told(changes, message):
    with pytest.raises(ValueError, match=message):
        kernels.add_rms_norm(**arguments("cpu", torch.float32, 2, 3, 8) | changes)


def test_every_run_has_the_same_bits(device):
    inputs = arguments(device, torch.float32, 3, 5, 32, branch_dtype=torch.float16)
    free = [value for value in inputs.values() if isinstance(value, torch.Tensor) and value.requires_grad]

    def run():
        with kernels.use("triton"):
            results = kernels.add_rms_norm(**inputs)
            return *results, *torch.autograd.grad([r.float().square().sum() for r in results], free)

    repeated(run, 3)
