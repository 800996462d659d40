"""add_layer_norm in Triton: every combination of what it fuses, any shape, any incoming gradient."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastdeit import kernels
from fastdeit.bench.count_card import pretended_card
from fastdeit.kernels import _rows
from fastdeit.kernels._example import SMALL, Maker
from fastdeit.kernels.layer_norm import fused, op
from fastdeit.kernels.mlp import gelu
from tests.kernels.proof import few, layouts, normal, prove, repeated

WIDTHS = 1, 24, 100, 192


def arguments(device, dtype, batch, n, width, *, branch_dtype=None, gamma=True, keep=True, bias=True, scale=1.0):
    def tensor(*shape, seed, dtype=dtype):
        return (normal(*shape, dtype=torch.float32, device=device, seed=seed) * scale).to(dtype).requires_grad_()

    kept = torch.tensor([0.0 if i % 3 == 1 else 1.25 for i in range(batch)], device=device)
    return {
        "residual": tensor(batch, n, width, seed=0),
        "branch": tensor(batch, n, width, seed=1, dtype=branch_dtype or dtype),
        "weight": tensor(width, seed=2, dtype=torch.float32),
        "bias": tensor(width, seed=3, dtype=torch.float32),
        "eps": 1e-6,
        "gamma": tensor(width, seed=4, dtype=torch.float32) if gamma else None,
        "keep": kept if keep else None,
        "out_dtype": branch_dtype or dtype,
        "branch_bias": tensor(width, seed=5, dtype=torch.float32) if bias else None,
    }


@given(
    batch=st.integers(1, 3),
    n=st.sampled_from([1, 5, 49, 65]),
    width=st.sampled_from(WIDTHS),
    gamma=st.booleans(),
    keep=st.booleans(),
    bias=st.booleans(),
    layout=layouts,
)
@few
def test_as_good_as_pytorch(device, dtype, batch, n, width, gamma, keep, bias, layout):
    prove(
        kernels.add_layer_norm,
        arguments(device, dtype, batch, n, width, gamma=gamma, keep=keep, bias=bias),
        layout,
    )


@pytest.mark.parametrize("width", [192, 384, 768])
def test_float32_stream_with_a_16_bit_branch(device, width):
    prove(kernels.add_layer_norm, arguments(device, torch.float32, 3, 5, width, branch_dtype=torch.float16))


@pytest.mark.parametrize("width", [192, 1000])
def test_without_a_branch(device, dtype, width):
    inputs = arguments(device, dtype, 3, 7, width)
    inputs = {name: inputs[name] for name in ("residual", "weight", "bias", "eps", "out_dtype")}
    prove(lambda **kwargs: kernels.add_layer_norm(branch=None, **kwargs)[1], inputs, "strided")


@pytest.mark.parametrize(("held", "normed"), [([2, 0], [1, 2]), ([1], [0, 1, 2, 3]), ([0, 1, 2, 3], [3]), ([], [0])])
def test_skipped_samples(device, dtype, held, normed):
    inputs = arguments(device, dtype, 4, 5, 48)
    inputs["branch"] = inputs["branch"].detach()[: len(held)].requires_grad_()
    inputs["keep"] = torch.full((len(held),), 2.0, device=device)
    inputs["branch_samples"] = torch.tensor(held, dtype=torch.int64, device=device)
    inputs["norm_samples"] = torch.tensor(normed, dtype=torch.int64, device=device)
    prove(kernels.add_layer_norm, inputs)


def test_places_of_samples_must_be_theirs(device):
    inputs = arguments(device, torch.float32, 4, 5, 48)
    samples, places = torch.tensor([2, 0], device=device), [1, -1, 0, -1]

    def refused(reason, numbers, dtype=torch.int32, **selection):
        given = torch.tensor(numbers, dtype=dtype, device=device)
        with pytest.raises((ValueError, TypeError), match=reason):
            kernels.add_layer_norm(**inputs, norm_places=given, **selection)

    kernels.add_layer_norm(
        **inputs, norm_samples=samples, norm_places=torch.tensor(places, dtype=torch.int32, device=device)
    )
    refused("none are: leave it out", places)
    refused("norm_places is torch.int64", places, torch.int64, norm_samples=samples)
    refused(r"norm_places has shape \[3\]", places[:3], norm_samples=samples)
    if device == "cpu":
        refused("norm_places does not say where the samples stand", [0, -1, 1, -1], norm_samples=samples)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_huge_and_tiny_values(device, scale):
    prove(kernels.add_layer_norm, arguments(device, torch.float32, 2, 9, 192, scale=scale, gamma=False))


@pytest.mark.filterwarnings("ignore:invalid value")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_not_finite_where_pytorch_is_not(device, value):
    inputs = arguments(device, torch.float32, 2, 9, 48, gamma=False)
    with torch.no_grad():
        inputs["residual"][1, 3, 7] = value
        inputs["branch"][0, 2, 5] = value
    with kernels.use("triton"):
        mine = kernels.add_layer_norm(**inputs)
    theirs = kernels.add_layer_norm(**inputs)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)


def test_arguments_of_any_layout(device):
    inputs = arguments(device, torch.float32, 3, 6, 40)
    for name in ("residual", "branch"):
        inputs[name] = inputs[name].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    prove(kernels.add_layer_norm, inputs, "expanded")


def test_more_rows_than_a_pass_has_programs(device, monkeypatch):
    monkeypatch.setattr(fused, "_PROGRAMS", 4)
    rows = 3 * 7
    assert rows / _rows.tile(768)["ROWS"] > 2 * 4
    prove(kernels.add_layer_norm, arguments(device, torch.float32, 3, rows // 3, 768))


@pytest.mark.parametrize(("sms", "programs"), [(108, 432), (132, 528)])
def test_programs_of_a_backward_fill_the_card(sms, programs, monkeypatch):
    """A whole number of them on every SM: a last wave of a few would take as long as a full one."""
    with pretended_card() as card:
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=sms)
        )
        args = op.OP.examples[0].build(Maker(replace(SMALL, batch=64), torch.bfloat16, torch.device("cuda", 0)))
        _, normed, _, _ = op.OP.run_on(op._TRITON, *args)
        normed.backward(torch.empty_like(normed))
    grids = {kernel.fn.__name__: grid for kernel, grid, _ in card.launches}
    assert grids["_backward_kernel"] == (programs,)
    assert gelu._plan(torch.empty(4096, 768, device="meta"))[0] == (2 * 132, 2)


def test_no_rows(device):
    inputs = arguments(device, torch.float32, 1, 4, 16, keep=False)
    for name in ("residual", "branch"):
        inputs[name] = inputs[name].detach()[:0].requires_grad_()
    with kernels.use("triton"):
        new_residual, normed = kernels.add_layer_norm(**inputs)
        gradient = torch.autograd.grad(normed.sum() + new_residual.sum(), inputs["weight"])[0]
    assert normed.shape == (0, 4, 16)
    assert torch.equal(gradient, torch.zeros_like(gradient))


def test_what_triton_does_not_take_is_the_references(device):
    inputs = arguments(device, torch.float64, 2, 3, 8)
    with kernels.use("triton"), pytest.raises(RuntimeError, match="it does not compute in torch"):
        kernels.add_layer_norm(**inputs)
    wide = torch.zeros(1, 1, 8193, device=device)
    with kernels.use("triton"), pytest.raises(RuntimeError, match="rows of 8193 elements"):
        kernels.add_layer_norm(wide, wide, wide[0, 0], wide[0, 0])


@pytest.mark.parametrize("times", [3, pytest.param(50, marks=pytest.mark.card)])
def test_every_run_has_the_same_bits(device, times):
    n, width = (197, 768) if device == "cuda" else (5, 32)
    inputs = arguments(device, torch.float32, 64 if device == "cuda" else 3, n, width, branch_dtype=torch.float16)
    free = [value for value in inputs.values() if isinstance(value, torch.Tensor) and value.requires_grad]

    def run():
        with kernels.use("triton"):
            results = kernels.add_layer_norm(**inputs)
            return *results, *torch.autograd.grad([r.float().square().sum() for r in results], free)

    repeated(run, times)
