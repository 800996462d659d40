"""What all ops share: which backend runs, the reason, the autocast rule, and the wording of argument errors.

An op has one or more backends in order of preference; the last is `reference`, pure PyTorch, which runs everywhere and
defines the result. `FASTDEIT_KERNELS` forces a choice: `reference`, or `op=backend` pairs separated by commas. A forced
backend that cannot run raises; left alone (`auto`), the first that can run is taken, and `info()` says why.

Public functions call the reference directly in eager mode, under native autograd, because a registered op costs about ten
microseconds a call. They go through the registered op under `torch.compile`, and when a backend is forced.
"""

import os
from collections.abc import Callable, Collection, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

NAMESPACE = "fastdeit"
VARIABLE = "FASTDEIT_KERNELS"
AUTO = "auto"
OPS: dict[str, "Op"] = {}

_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


class Backend(NamedTuple):
    """One implementation of an op.

    `capability(device)` answers whether it can run there, and the reason in one sentence: why it is a good choice, or
    why it cannot run.
    """

    name: str
    capability: Callable[[torch.device], tuple[bool, str]]
    forward: Callable
    backward: Callable | None = None


class OpInfo(NamedTuple):
    """The backend an op uses on a device, and why."""

    name: str
    backend: str
    reason: str


class Op:
    """A public op and its backends, preferred ones first."""

    def __init__(self, name: str, *backends: Backend) -> None:
        self.name = name
        self.backends = backends
        OPS[name] = self

    def select(self, device: torch.device) -> tuple[Backend, str]:
        """The backend for tensors on `device` and the reason; RuntimeError when the forced one cannot run."""
        wanted = choice(self.name)
        for backend in self.backends:
            able, reason = backend.capability(device)
            if wanted == AUTO and able:
                return backend, reason
            if wanted == backend.name:
                if able:
                    return backend, f"chosen by {VARIABLE}"
                raise RuntimeError(f"{VARIABLE} asks for {self.name}={wanted}, which cannot run on {device}: {reason}")
        names = ", ".join(backend.name for backend in self.backends)
        raise RuntimeError(f"{VARIABLE} asks for {self.name}={wanted}, but {self.name} has: {names}")

    def forward(self, device: torch.device) -> Callable:
        return self.select(device)[0].forward

    def backward(self, device: torch.device) -> Callable:
        return self.select(device)[0].backward


def reference_backend(forward: Callable, backward: Callable | None = None) -> Backend:
    return Backend("reference", _reference_capability, forward, backward)


def _reference_capability(device: torch.device) -> tuple[bool, str]:
    reason = "Triton kernels are not part of this version"
    return True, reason if device.type == "cuda" else f"no CUDA device; {reason}"


@cache
def _choices() -> dict[str, str]:
    """`FASTDEIT_KERNELS` as {op: backend}, with "" for the choice of all other ops."""
    choices = {}
    for part in filter(None, os.environ.get(VARIABLE, AUTO).split(",")):
        name, _, backend = part.strip().rpartition("=")
        if name and name not in OPS:
            raise ValueError(f"{VARIABLE} names the op {name!r}; there are: {', '.join(OPS)}")
        choices[name] = backend
    return choices


def choice(name: str) -> str:
    """What `FASTDEIT_KERNELS` asks for op `name`: a backend's name or "auto". The variable is read once."""
    choices = _choices()
    return choices.get(name, choices.get("", AUTO))


def eager(op: Op) -> bool:
    """Whether the public function may call an implementation directly: not compiling, and no backend was forced."""
    return not torch.compiler.is_compiling() and choice(op.name) == AUTO


def info() -> list[OpInfo]:
    """Backend and reason of every op, on the CUDA device where there is one, else on the CPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return [OpInfo(op.name, backend.name, reason) for op in OPS.values() for backend, reason in [op.select(device)]]


def format_info() -> str:
    """`info()` as an aligned table, one op a line."""
    rows = info()
    name, backend = (max(len(row[column]) for row in rows) for column in (0, 1))
    return "\n".join(f"{row.name:{name}}  {row.backend:{backend}}  {row.reason}" for row in rows)


def autocast_rule(name: str, cast: Collection[str] = ()) -> None:
    """Under autocast, run `fastdeit::name` with autocast off and the arguments in `cast` in the autocast dtype.

    `torch.library.register_autocast` fixes one dtype at registration; this rule reads the dtype of the region (fp16 or
    bf16), and leaves float64, which autocast never touches, alone. Casts are differentiable: gradients come back in the
    dtype of the arguments.
    """
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    chosen = [argument.name in cast for argument in op._schema.arguments]

    def rule(device: str) -> Callable:
        def run(*args: object) -> object:
            dtype = torch.get_autocast_dtype(device)
            args = [to_autocast(a, dtype) if c else a for a, c in zip(args, chosen, strict=False)]
            with torch.autocast(device, enabled=False):
                return op(*args)

        return run

    for device in ("cpu", "cuda"):
        _LIBRARY.impl(name, rule(device), f"Autocast{device.upper()}")


def to_autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """The dtype that autocast gives `tensor` in the current region; None outside one, and for float64."""
    device = tensor.device.type
    if tensor.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of statistics and losses of data of `dtype`: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_shape(name: str, tensor: Tensor, shape: Sequence[int], meaning: str) -> None:
    """ValueError unless `tensor` has `shape`; `meaning` names the dimensions, such as "[B, K] like `cls`"."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {list(tensor.shape)}, but must be {meaning} = {list(shape)}")


def check_floating(name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{name} is {tensor.dtype}, but must be a floating-point tensor")


def check_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{name} is {tensor.dtype}, but must be {dtype}")


def check_choice(name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, but must be one of: {', '.join(allowed)}")


def check_index(name: str, index: Tensor, size: int) -> None:
    """IndexError when an index is outside [0, size). Looks at CPU tensors only: elsewhere it would stall the device."""
    if index.device.type != "cpu" or index.numel() == 0:
        return
    low, high = (int(value) for value in index.aminmax())
    if low < 0 or high >= size:
        raise IndexError(f"{name} holds {low if low < 0 else high}, but must be in [0, {size})")
