"""What every Triton kernel has to prove: it is as good as PyTorch in the same dtypes, measured against float64.

The same proofs run in Triton's interpreter on the CPU and, as `pytest -m gpu`, on a real card. The interpreter differs
from a card in three ways: it is slow, `tl.dot` of bfloat16 is wrong in it, and it cuts float32 off to bfloat16 where a
card rounds.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdeit import kernels
from fastdeit.kernels._triton import INTERPRETED

COMPILED = "FASTDEIT_IR" in os.environ
"""Whether kernels compiled for a card that is not there run on the CPU (`tests/kernels/ir`)."""

TOKENS = 1, 49, 65, 145, 196, 197, 198, 257, 577, 578
"""Tokens of the models in use: images of 16 to 384 pixels, with and without class and distillation token."""

layouts = st.sampled_from(["dense", "expanded", "strided"])
few = settings(
    max_examples=10,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],  # in the interpreter, shrinking would take minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside, memory that nothing was written to is NaN, so that a result that was not computed shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def normal(*shape: int, dtype: torch.dtype, device: str, seed: int) -> Tensor:
    """Standard normal values, the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The values in memory as they come, or every other element of a larger tensor; or the first of them expanded over
    all with zero strides."""
    if layout == "expanded" and values.numel():
        return values[(slice(1),) * values.dim()].expand(values.shape)
    if layout == "strided" and values.dim():
        return values.repeat_interleave(2, -1)[..., ::2]
    return values


def prove(
    function: Callable[..., Any],
    inputs: dict[str, Any],
    layout: str = "dense",
    *,
    mine: AbstractContextManager | None = None,
    seed: int = 99,
    rounded_operands: bool = False,
) -> None:
    """`function(**inputs)` and its gradients inside `mine`, by default `use("triton")`, are as good as the reference's.

    Floating tensors and dtypes among the inputs are float64 where the exact result is computed. `layout` is that of the
    incoming gradients. rounded_operands: whether gradients are products of operands that were rounded to 16 bit on the
    way, as the tensor cores want them, where the reference goes on in float32; then nothing is said of what they
    accumulate.
    """
    exact = {name: _as_double(value) for name, value in inputs.items()}
    with mine or kernels.use("triton"), poisoned():
        ours = _outcome(function, inputs, layout, seed)
    with kernels.use("reference"):
        same = _outcome(function, inputs, layout, seed)
        truth = _outcome(function, exact, layout, seed)
    assert ours.keys() == same.keys() == truth.keys()
    for name in ours:
        assert_as_good(ours[name], same[name], truth[name], name)
        if not (rounded_operands and name.startswith("gradient")):
            assert_rounded_once(ours[name], same[name], truth[name], name)


def _as_double(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float64
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return value


def _outcome(function: Callable[..., Any], inputs: dict[str, Any], layout: str, seed: int) -> dict[str, Tensor]:
    """Outputs and gradients by name."""
    results = function(**inputs)
    results = list(results) if isinstance(results, tuple) else [results]
    outcome = {f"output {i}": result.detach() for i, result in enumerate(results)}
    ends = [result for result in results if result.requires_grad]
    free = {n: value for n, value in inputs.items() if isinstance(value, Tensor) and value.requires_grad}
    if ends:
        incoming = [
            laid_out(normal(*t.shape, dtype=torch.float16, device=t.device.type, seed=seed + i).to(t.dtype), layout)
            for i, t in enumerate(ends)
        ]
        grads = torch.autograd.grad(ends, list(free.values()), incoming)
        outcome |= {f"gradient of {name}": grad for name, grad in zip(free, grads, strict=True)}
    return outcome


def assert_as_good(mine: Tensor, same: Tensor, exact: Tensor, name: str) -> None:
    """Error against float64 at most twice that of PyTorch in the same dtype, plus one unit in the last place, in the
    largest element and in the mean square; no sign preferred; NaN and infinity where PyTorch has them. Where compiled
    code runs on a CPU, a single number may be four units off: sums have the order of a card there, and PyTorch's own
    error of one number may be small by chance."""
    assert (mine.dtype, mine.shape) == (same.dtype, same.shape), name
    if not mine.is_floating_point():
        assert torch.equal(mine, same), name
        return
    eps = torch.finfo(mine.dtype).eps
    if mine.dtype == torch.float8_e4m3fn:  # PyTorch computes nothing in it
        mine, same, exact = mine.float(), same.float(), exact.double()
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(mine), kind(same)), f"{name}: {kind.__name__} differs"
    finite = torch.isfinite(same) & torch.isfinite(exact)
    exact = exact[finite]
    if not exact.numel():
        return
    error, their_error = mine[finite].double() - exact, same[finite].double() - exact
    ulp = eps * (2 if INTERPRETED and mine.dtype == torch.bfloat16 else 1)
    ulp *= 4 if mine.dim() == 0 and COMPILED else 1
    for size in (lambda e: e.abs().max(), rms):
        bound = 2 * size(their_error) + ulp * size(exact)
        assert size(error) <= bound, f"{name}: error {size(error):.3g}, but PyTorch's is {size(their_error):.3g}"
    if not (INTERPRETED and mine.dtype == torch.bfloat16):
        # Errors without a preferred sign average out, to within five standard errors, or a quarter of their size where
        # they are not independent. Rounding towards zero would leave more than eight tenths.
        chance = max(5 / error.numel() ** 0.5, 0.25) * error.square().mean().sqrt()
        floor = torch.finfo(torch.float32).eps * exact.abs().mean()
        bound = 2 * their_error.mean().abs() + chance + floor
        assert error.mean().abs() <= bound, f"{name}: biased by {error.mean():.3g}"


def assert_rounded_once(mine: Tensor, same: Tensor, exact: Tensor, name: str) -> None:
    """What the error of a 16-bit result has beside its own rounding, which would hide it, is at most twice PyTorch's
    and a quarter of a unit in the last place. Sums that are kept in 16 bit on the way have most of a unit, sums in
    float32 a few hundredths. The interpreter cuts off where it should round to bfloat16, and is not judged."""
    if mine.dtype != torch.float16 and (mine.dtype != torch.bfloat16 or INTERPRETED):
        return
    rounded = exact.to(mine.dtype).double()
    finite = torch.isfinite(same) & torch.isfinite(rounded)
    if not finite.any():
        return
    rounded = rounded[finite]
    excess, theirs = rms(mine[finite].double() - rounded), rms(same[finite].double() - rounded)
    bound = 2 * theirs + 0.25 * torch.finfo(mine.dtype).eps * rms(exact[finite])
    assert excess <= bound, f"{name}: accumulated error {excess:.3g}, but PyTorch's is {theirs:.3g}"


def rms(values: Tensor) -> Tensor:
    """Root of the mean square."""
    return values.square().mean().sqrt()


def repeated(function: Callable[[], tuple[Tensor, ...]], times: int) -> None:
    """Every run of `function` gives the same bits."""
    first = function()
    for _ in range(times - 1):
        for one, other in zip(first, function(), strict=True):
            assert torch.equal(one, other)
