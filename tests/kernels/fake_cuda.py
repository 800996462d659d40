"""A driver and an NVRTC in Python, called through ctypes as the real ones are: pointers, sizes and types are C's.

`FakeDriver` notes every launch. Its kernels compute with PyTorch in the memory that the pointers of a launch name,
which is that of CPU tensors.
"""

import ctypes
from ctypes import c_char_p, c_float, c_int, c_size_t, c_void_p
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fastdeit.kernels.attention import op as attention
from fastdeit.kernels.native.cuda import _DRIVER, _NVRTC

ROWS = 64
_POINTERS = {"forward": 3, "query_gradient": 7, "key_gradient": 6, "bias_gradient": 2}
"""Parameters of a kernel that are pointers; `kernels/launch.h` lists all of them."""


class Fake:
    """A library whose functions are this object's methods by their C names, called through C's types."""

    signatures: dict[str, Any]

    def __init__(self) -> None:
        self.fails: dict[str, int] = {}
        """Status by function, for those that shall fail."""
        self.called: list[str] = []
        self.error = ""
        """What was wrong with a call; C knows no exceptions."""

    def __getattr__(self, name: str) -> Any:
        if name not in self.signatures:
            raise AttributeError(name)
        prototype = ctypes.CFUNCTYPE(c_int, *map(_as_address, self.signatures[name]))
        made = prototype(lambda *arguments: self._call(name, arguments))
        vars(self)[name] = made
        return made

    def _call(self, name: str, arguments: Any) -> int:
        self.called.append(name)
        if name in self.fails:
            return self.fails[name]
        try:
            getattr(self, f"do_{name}")(*arguments)
        except Exception as error:
            self.error = f"{type(error).__name__}: {error}"
            return 999
        return 0


def _as_address(kind: Any) -> Any:
    """Pointers reach Python as addresses, so that it can write to them."""
    return c_void_p if hasattr(kind, "contents") or kind is c_char_p else kind


def _write(address: int, kind: Any, value: Any) -> None:
    kind.from_address(address).value = value


def array(address: int, dtype: Any, *shape: int) -> torch.Tensor:
    """The memory at an address as a tensor."""
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = (ctypes.c_char * count).from_address(address)
    return torch.from_numpy(np.frombuffer(memory, dtype).reshape(shape))


@dataclass
class Launched:
    """One launch as the driver got it."""

    name: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int
    stream: int
    arguments: list[Any]


@dataclass
class _Kernel:
    name: str
    shared: int = 48 * 1024


class FakeDriver(Fake):
    """libcuda. image: the module that it takes, any where it is None. computes: whether the kernels do anything."""

    signatures = _DRIVER

    def __init__(self, computes: bool = False) -> None:
        super().__init__()
        self.computes = computes
        self.context = 0
        self.images: list[bytes] = []
        self.kernels: list[_Kernel] = []
        self.launches: list[Launched] = []

    def do_cuInit(self, flags: int) -> None: ...

    def do_cuDeviceGet(self, device: int, ordinal: int) -> None:
        _write(device, c_int, 30 + ordinal)

    def do_cuDevicePrimaryCtxRetain(self, context: int, device: int) -> None:
        _write(context, c_void_p, 1000 + device)

    def do_cuCtxGetCurrent(self, context: int) -> None:
        _write(context, c_void_p, self.context)

    def do_cuCtxSetCurrent(self, context: int) -> None:
        self.context = context

    def do_cuModuleLoadData(self, module: int, image: int) -> None:
        self.images.append(ctypes.string_at(image, 4))
        _write(module, c_void_p, 7)

    def do_cuModuleGetFunction(self, function: int, module: int, name: int) -> None:
        assert module == 7
        self.kernels.append(_Kernel(ctypes.string_at(name).decode()))
        _write(function, c_void_p, len(self.kernels))

    def do_cuFuncSetAttribute(self, function: int, attribute: int, value: int) -> None:
        assert attribute == 8
        self.kernels[function - 1].shared = value

    def do_cuGetErrorString(self, error: int, text: int) -> None:
        said = "no kernel image is available" if error == 209 else self.error
        self.text = ctypes.create_string_buffer(said.encode())
        _write(text, c_void_p, ctypes.addressof(self.text))

    def do_cuLaunchKernel(self, function: int, *sizes_and_rest: int) -> None:
        *sizes, shared, stream, parameters, extra = sizes_and_rest
        kernel = self.kernels[function - 1]
        assert extra is None
        assert shared <= kernel.shared, f"{kernel.name} was not allowed {shared} bytes of shared memory"
        pointers = next(count for name, count in _POINTERS.items() if f"_{name}" in kernel.name)
        tail = [c_int, c_int] if "bias" in kernel.name else [c_int, c_int, c_float]
        kinds = [c_void_p] * pointers + tail
        addresses = (c_void_p * len(kinds)).from_address(parameters)
        values = [kind.from_address(address).value for kind, address in zip(kinds, addresses, strict=True)]
        launched = Launched(kernel.name, tuple(sizes[:3]), tuple(sizes[3:]), shared, stream or 0, values)
        self.launches.append(launched)
        if self.computes:
            compute(launched)


def compute(launched: Launched) -> None:
    """What the kernel of a launch does to memory, by the reference of the op."""
    if "bias" in launched.name:
        partial, dbias, rows, columns = launched.arguments
        array(dbias, np.float32, columns).copy_(array(partial, np.float32, rows, columns).sum(0))
        return
    *pointers, tokens, heads, scale = launched.arguments
    head_dim = int(launched.name.rpartition("_")[2])
    blocks = -(-tokens // ROWS)
    batch = launched.grid[0] // (blocks * heads)
    width = heads * head_dim
    qkv = array(pointers[0], np.float16, batch, tokens, 3 * width)
    statistics = batch, heads, tokens
    if "forward" in launched.name:
        out, lse = attention.reference(qkv, heads, scale, None, None)
        array(pointers[1], np.float16, batch, tokens, width).copy_(out)
        array(pointers[2], np.float32, *statistics).copy_(lse)
        return
    if "query" in launched.name:
        out, grad, lse, delta, dqkv, partial = pointers[1:]
        out, grad = (array(each, np.float16, batch, tokens, width) for each in (out, grad))
        products = (out.float() * grad.float()).view(batch, tokens, heads, head_dim).sum(-1)
        array(delta, np.float32, *statistics).copy_(products.transpose(1, 2))
        parts = slice(0, width)
    else:
        grad, lse, delta, dqkv, partial = pointers[1:]
        grad = array(grad, np.float16, batch, tokens, width)
        # Any out with the same rowsum(grad * out) has the same gradients, so that delta must have been written.
        norm = grad.float().view(batch, tokens, heads, head_dim).square().sum(-1, keepdim=True)
        given = array(delta, np.float32, *statistics).transpose(1, 2)[..., None]
        out = (grad.float().view(batch, tokens, heads, head_dim) * given / norm).view(batch, tokens, width)
        parts = slice(width, 3 * width)
    lse = array(lse, np.float32, *statistics)
    exact, _ = attention.reference_backward(grad.float(), qkv.float(), out.float(), lse, heads, scale, False, None)
    array(dqkv, np.float16, batch, tokens, 3 * width)[..., parts] = exact[..., parts].half()
    if partial is not None:
        padded = torch.zeros(batch, blocks * ROWS, 3 * width)
        padded[:, :tokens] = exact
        sums = padded.view(batch * blocks, ROWS, 3 * width).sum(1)
        array(partial, np.float32, batch * blocks, 3 * width)[:, parts] = sums[:, parts]


@dataclass
class _Compiled:
    source: str
    headers: dict[str, str]
    options: list[str] = field(default_factory=list)


class FakeNvrtc(Fake):
    """libnvrtc of a version that knows some architectures; what it compiles is `image`."""

    signatures = _NVRTC

    def __init__(self, version: tuple[int, int] = (12, 9), known: tuple[int, ...] = (50, 70, 72, 75, 80, 90)) -> None:
        super().__init__()
        self.version, self.known = version, known
        self.image, self.log = b"ELF of the kernels", b""
        self.compiled: list[_Compiled] = []

    def do_nvrtcVersion(self, major: int, minor: int) -> None:
        _write(major, c_int, self.version[0])
        _write(minor, c_int, self.version[1])

    def do_nvrtcGetNumSupportedArchs(self, count: int) -> None:
        _write(count, c_int, len(self.known))

    def do_nvrtcGetSupportedArchs(self, known: int) -> None:
        ctypes.memmove(known, (c_int * len(self.known))(*self.known), 4 * len(self.known))

    def do_nvrtcCreateProgram(self, program, source, name, count, texts, names) -> None:
        pairs = zip(*((c_char_p * count).from_address(each) for each in (names, texts)), strict=True)
        headers = {name.decode(): text.decode() for name, text in pairs}
        self.compiled.append(_Compiled(ctypes.string_at(source).decode(), headers))
        _write(program, c_void_p, len(self.compiled))

    def do_nvrtcCompileProgram(self, program, count, options) -> None:
        given = (c_char_p * count).from_address(options)
        self.compiled[program - 1].options = [option.decode() for option in given]

    def do_nvrtcGetProgramLogSize(self, program, size) -> None:
        _write(size, c_size_t, len(self.log) + 1)

    def do_nvrtcGetProgramLog(self, program, text) -> None:
        ctypes.memmove(text, self.log + b"\0", len(self.log) + 1)

    def do_nvrtcGetCUBINSize(self, program, size) -> None:
        _write(size, c_size_t, len(self.image))

    def do_nvrtcGetCUBIN(self, program, code) -> None:
        ctypes.memmove(code, self.image, len(self.image))

    do_nvrtcGetPTXSize, do_nvrtcGetPTX = do_nvrtcGetCUBINSize, do_nvrtcGetCUBIN

    def do_nvrtcDestroyProgram(self, program) -> None:
        assert c_void_p.from_address(program).value == len(self.compiled)
