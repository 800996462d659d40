"""What all ops share: registration, the choice of a backend with its reason, autocast, and argument checks.

An op has one or more backends in order of preference; the last is `reference`, pure PyTorch, which runs everywhere
and defines the result. The first that can run is taken, and `info()` says why. The environment variable
`FASTDEIT_KERNELS` forces another choice: a backend for all ops, `op=backend` for one, or several of these separated by
commas. A forced backend that cannot run raises.

In eager mode the reference runs under native autograd, since a registered op costs ten to twenty microseconds a call.
Under `torch.compile`, and when a backend is forced, the registered op runs.
"""

import os
from collections.abc import Callable, Collection, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

NAMESPACE = "fastdeit"
VARIABLE = "FASTDEIT_KERNELS"
AUTO, REFERENCE = "auto", "reference"
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
    """A public op: its backends, and `torch.ops.fastdeit.<name>`, which runs the selected one.

    The annotations of the reference are the schema of the op, and those of its backward that of `<name>_backward`.
    Arguments are positional; results are new, contiguous tensors.

    reference, backward  the reference and its explicit backward, None when the op is not differentiable
    others               backends to prefer to the reference, best first
    cast                 arguments that take the autocast dtype under autocast; the op itself runs with autocast off
    mutates              arguments that are changed in place
    """

    def __init__(
        self,
        name: str,
        reference: Callable,
        backward: Callable | None = None,
        *,
        others: Sequence[Backend] = (),
        cast: Collection[str] = (),
        mutates: Collection[str] = (),
    ) -> None:
        self.name = name
        self.backends = (*others, Backend(REFERENCE, _reference_capability, reference, backward))
        self.registered = self._register(name, reference, "forward", mutates)
        _autocast(name, cast)
        if backward is not None:
            self.registered_backward = self._register(f"{name}_backward", backward, "backward")
            _autocast(f"{name}_backward")
        OPS[name] = self

    def __call__(self, *args: Any) -> Any:
        """Run on the arguments of the reference: directly in eager mode, else as the registered op."""
        if torch.compiler.is_compiling() or choice(self.name) != AUTO:
            return self.registered(*args)
        backend, _ = self.select(_device(args))
        if backend.backward is None or backend.name == REFERENCE:
            return backend.forward(*args)
        return self.registered(*args)

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

    def _register(self, name: str, like: Callable, role: str, mutates: Collection[str] = ()) -> Callable:
        def run(*args: Any) -> Any:
            backend, _ = self.select(_device(args))
            return _contiguous(getattr(backend, role)(*args))

        schema = torch.library.infer_schema(like, mutates_args=mutates)
        return torch.library.custom_op(f"{NAMESPACE}::{name}", run, mutates_args=mutates, schema=schema)


def _device(args: tuple) -> torch.device:
    first = args[0]
    return first.device if isinstance(first, Tensor) else first[0].device


def _contiguous(result: Tensor | tuple[Tensor, ...] | None) -> Tensor | tuple[Tensor, ...] | None:
    """The layout that fakes promise, whatever the layout of the arguments."""
    if isinstance(result, tuple):
        return tuple(tensor.contiguous() for tensor in result)
    return None if result is None else result.contiguous()


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
            raise ValueError(f"{VARIABLE} names the op {name!r}, but the ops are: {', '.join(OPS)}")
        choices[name] = backend
    return choices


def choice(name: str) -> str:
    """What `FASTDEIT_KERNELS` asks for op `name`: a backend's name or "auto". The variable is read once."""
    choices = _choices()
    return choices.get(name, choices.get("", AUTO))


def info() -> list[OpInfo]:
    """Backend and reason of every op, on the CUDA device where there is one, else on the CPU."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return [OpInfo(op.name, backend.name, reason) for op in OPS.values() for backend, reason in [op.select(device)]]


def format_info() -> str:
    """`info()` as an aligned table, one op a line."""
    rows = info()
    name, backend = (max(len(row[column]) for row in rows) for column in (0, 1))
    return "\n".join(f"{row.name:{name}}  {row.backend:{backend}}  {row.reason}" for row in rows)


def _autocast(name: str, cast: Collection[str] = ()) -> None:
    """Under autocast, run `fastdeit::name` with autocast off and the arguments in `cast` in the autocast dtype.

    `torch.library.register_autocast` fixes one dtype at registration; this rule reads the dtype of the region (fp16 or
    bf16), and leaves float64, which autocast never touches, alone. Casts are differentiable: gradients come back in the
    dtype of the arguments.
    """
    op = getattr(getattr(torch.ops, NAMESPACE), name).default
    chosen = [argument.name in cast for argument in op._schema.arguments]

    def rule(device: str) -> Callable:
        def run(*args: Any) -> Any:
            dtype = torch.get_autocast_dtype(device)
            args = [_to_autocast(a, dtype) if c else a for a, c in zip(args, chosen, strict=True)]
            with torch.autocast(device, enabled=False):
                return op(*args)

        return run

    for device in ("cpu", "cuda"):
        _LIBRARY.impl(name, rule(device), f"Autocast{device.upper()}")


def _to_autocast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
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
