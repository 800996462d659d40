"""Checks of the arguments of ops, with one wording for every op."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

_FAKE = torch._C._TorchDispatchModeKey.FAKE


def check_shape(name: str, tensor: Tensor, shape: Sequence[int], meaning: str) -> None:
    """ValueError unless `tensor` has `shape`; `meaning` names the dimensions, such as "[B, K] like `cls`"."""
    if tensor.shape != tuple(shape):
        raise ValueError(f"{name} has shape {list(tensor.shape)}, but must be {meaning} = {list(shape)}")


def check_floating(name: str, tensor: Tensor) -> None:
    """TypeError unless `tensor` holds floating-point numbers."""
    if not tensor.is_floating_point():
        raise TypeError(f"{name} is {tensor.dtype}, but must be a floating-point tensor")


def check_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """TypeError unless `tensor` is of `dtype`."""
    if tensor.dtype != dtype:
        raise TypeError(f"{name} is {tensor.dtype}, but must be {dtype}")


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    """ValueError unless `value` is one of those allowed."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, but must be one of: {', '.join(allowed)}")


def check_number(name: str, value: float, low: float, high: float = math.inf, *, below: bool = False) -> None:
    """ValueError unless `value` is finite, at least `low`, and at most `high`, or with `below` less than `high`. NaN is
    neither."""
    if not (low <= value <= high and abs(value) < math.inf) or (below and value == high):
        end = "finite" if high == math.inf else f"in [{low:g}, {high:g}{')' if below else ']'}"
        least = f"at least {low:g} and " if high == math.inf and low > -math.inf else ""
        raise ValueError(f"{name} is {value}, but must be {least}{end}")


def check_positive(name: str, value: float) -> None:
    """ValueError unless `value` is above 0 and finite."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is {value}, but must be positive and finite")


def check_index(name: str, index: Tensor, size: int) -> None:
    """IndexError when an index that can be looked at is outside [0, size)."""
    if not can_look_at(index) or index.numel() == 0:
        return
    low, high = (int(value) for value in index.aminmax())
    if low < 0 or high >= size:
        raise IndexError(f"{name} holds {low if low < 0 else high}, but must be in [0, {size})")


def can_look_at(tensor: Tensor) -> bool:
    """Whether the values of `tensor` may be read to check them: that would stall a device, and break a graph that is
    being compiled, whose own indexing raises RuntimeError on the CPU. A fake tensor has none."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not is_fake(tensor)


def is_fake(tensor: Tensor) -> bool:
    """Whether operations on `tensor` make no values: it is of a `FakeTensorMode`, or that mode is on."""
    return isinstance(tensor, FakeTensor) or torch._C._get_dispatch_mode(_FAKE) is not None


def check_device(name: str, tensor: Tensor, other: Tensor, other_name: str) -> None:
    """ValueError unless `tensor` is on the device of `other`."""
    if tensor.device != other.device:
        raise ValueError(f"{name} is on {tensor.device}, but must be on {other.device} like {other_name}")
