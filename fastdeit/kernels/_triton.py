"""What all Triton kernels share: where they run, how they are launched, and how launches are recorded.

Every launch of the package goes through `launch`. That is why `recording` sees exactly what would be compiled, for a
card that need not be there: `lint.py` compiles what it saw.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import triton
from torch import Tensor

from fastdeit.kernels._op import Unsupported

INTERPRETED = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter, on the CPU: TRITON_INTERPRET=1 before this package is imported."""

VERSION = tuple(int(part) for part in triton.__version__.split(".")[:2])
"""Triton's major and minor version: what the compiler makes of a kernel changes with them."""

_DTYPES = torch.float32, torch.float16, torch.bfloat16

OLDEST = 70
"""Oldest supported architecture, as a number: 70 is sm_70, Volta."""


@dataclass(frozen=True)
class Launch:
    """One recorded launch: the kernel, the grid of its programs, its arguments by name, and its number of warps and
    pipeline stages."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    warps: int
    stages: int


@dataclass
class Recording:
    """Launches for architecture `arch`."""

    arch: int
    launches: list[Launch] = field(default_factory=list)


_recording: Recording | None = None


def capability(
    device: torch.device, forced: bool, needs: int = OLDEST, compiler: tuple[int, int] = (0, 0)
) -> tuple[bool, str]:
    """Whether Triton kernels for architecture `needs` and newer run on `device`, and the reason. Those of which only
    `compiler` and newer versions of Triton make good code run on others if they are forced."""
    if device.type == "cuda":
        if not forced and compiler > VERSION:
            wanted = ".".join(map(str, compiler))
            return False, f"it needs Triton {wanted} or newer, not {triton.__version__}, whose code of it is slow"
        able = _arch_of(device) >= needs
        card = f"sm_{_arch_of(device)}"
        return able, f"Triton {triton.__version__} on {card}" if able else f"it needs sm_{needs} or newer, not {card}"
    if device.type == "cpu" and INTERPRETED and forced:
        return True, "Triton's interpreter"
    return False, "no CUDA device"


def gluon_capability(device: torch.device, forced: bool, needs: int, compiler: tuple[int, int]) -> tuple[bool, str]:
    """Whether kernels in Gluon for architecture `needs` alone run on `device`, and the reason. Gluon is experimental:
    versions before `compiler` have another one."""
    if device.type != "cuda":
        return False, "no CUDA device"
    if _arch_of(device) != needs:
        return False, f"it needs sm_{needs}, not sm_{_arch_of(device)}"
    if compiler > VERSION:
        return False, f"it needs Triton {'.'.join(map(str, compiler))} or newer, not {triton.__version__}"
    return True, f"Gluon of Triton {triton.__version__} on sm_{needs}"


def arch(device: torch.device) -> int:
    """Architecture that kernels for tensors on `device` are compiled for: 90 is sm_90. The interpreter counts as 90."""
    if _recording is not None:
        return _recording.arch
    return _arch_of(device) if device.type == "cuda" else 90


@cache
def _arch_of(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


_SMS = 132
"""Of the card that launches are recorded for: an H200."""


@cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors (SMs) of the card, or of the part of it that this process has. The interpreter has one,
    the card of a recording 132.

    A launch with a whole number of programs for each leaves none idle at its end. Sums that such programs add up have
    one order on all cards with that number."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 1 if device.type == "cpu" else _SMS


@contextmanager
def recording(arch: int) -> Iterator[Recording]:
    """Inside, kernels are not run: their launches, which may have tensors on the meta device, are recorded."""
    global _recording
    _recording = Recording(arch)
    try:
        yield _recording
    finally:
        _recording = None


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, warps: int, stages: int = 1, **constants: Any) -> None:
    """`kernel[grid](*args, **constants)` on the device of its first tensor; nothing for an empty grid.

    Contraction of products and sums into fused multiply-adds is asked for by name, because its default changes between
    versions of Triton.
    """
    if 0 in grid:
        return
    if _recording is not None:
        arguments = {**dict(zip(kernel.arg_names, args, strict=False)), **constants}
        _recording.launches.append(Launch(kernel, grid, arguments, warps, stages))
        return
    run = kernel[grid]
    device = next(a.device for a in args if isinstance(a, Tensor))
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            run(*args, num_warps=warps, num_stages=stages, enable_fp_fusion=True, **constants)
    else:
        run(*args, num_warps=warps, num_stages=stages, enable_fp_fusion=True, **constants)


def of_descriptor(value: Any) -> Any:
    """The tensor that a tensor descriptor describes; anything else as it is."""
    return value.base if hasattr(value, "block_shape") else value


def cdiv(amount: int, part: int) -> int:
    """How many parts cover the amount. On the host `triton.cdiv`, a function of the compiler, takes microseconds."""
    return -(-amount // part)


def power_of_two(size: int) -> int:
    """The least power of two that is at least `size`, which is at least 1."""
    return 1 << (size - 1).bit_length()


@dataclass(frozen=True)
class Expected:
    """What the compiler has to make of a kernel, as far as its arguments allow: the bits of its widest loads and stores
    of global memory, whether it multiplies matrices, for which sm_90 has instructions of its own for 16 bits, and
    whether it loads and stores boxes of tensors by TMA."""

    loads: int = 128
    stores: int = 128
    products: bool = False
    boxes: bool = False


EXPECTED: dict[tuple[str, str], Expected] = {}
"""By (module, name) of a kernel, of those that differ from most."""


def expect(kernel: Any, *, loads: int = 128, stores: int = 128, products: bool = False, boxes: bool = False) -> None:
    """State what the compiler has to make of `kernel` where that is not `Expected()`; `lint.py` checks it."""
    EXPECTED[kernel.fn.__module__, kernel.fn.__name__] = Expected(loads, stores, products, boxes)


def require(condition: bool, reason: str) -> None:
    """Raise `Unsupported` with the reason unless the condition holds."""
    if not condition:
        raise Unsupported(reason)


def require_products(*tensors: Tensor) -> None:
    """Refuse what `tl.dot` gets wrong: the interpreter takes the bits of bfloat16 for integers."""
    wrong = INTERPRETED and any(tensor.dtype == torch.bfloat16 for tensor in tensors)
    require(not wrong, "Triton's interpreter computes products of bfloat16 wrongly")


def require_dtypes(*tensors: Tensor | None) -> None:
    """Triton backends compute in float32: float64 is the reference's."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype not in _DTYPES:
            raise Unsupported(f"it does not compute in {tensor.dtype}")
