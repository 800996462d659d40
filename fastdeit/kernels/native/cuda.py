"""The functions of NVIDIA's driver and of its run-time compiler NVRTC that fastdeit calls, by ctypes.

No other file calls them. `Driver` and `Nvrtc` take a library whose functions have the C names, so that tests can hand
in one of their own.
"""

import ctypes
from collections.abc import Mapping, Sequence
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint, c_void_p
from typing import Any

_SUCCESS = 0
_MAX_DYNAMIC_SHARED_SIZE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_FREE_SHARED_MEMORY = 48 * 1024
"""Bytes of shared memory that a block may have without being asked for."""

_POINTER = ctypes.POINTER
_DRIVER = {
    "cuInit": [c_uint],
    "cuDeviceGet": [_POINTER(c_int), c_int],
    "cuDevicePrimaryCtxRetain": [_POINTER(c_void_p), c_int],
    "cuCtxGetCurrent": [_POINTER(c_void_p)],
    "cuCtxSetCurrent": [c_void_p],
    "cuModuleLoadData": [_POINTER(c_void_p), c_char_p],
    "cuModuleGetFunction": [_POINTER(c_void_p), c_void_p, c_char_p],
    "cuFuncSetAttribute": [c_void_p, c_int, c_int],
    "cuLaunchKernel": [c_void_p, *[c_uint] * 7, c_void_p, _POINTER(c_void_p), _POINTER(c_void_p)],
    "cuGetErrorString": [c_int, _POINTER(c_char_p)],
}
_NVRTC = {
    "nvrtcVersion": [_POINTER(c_int), _POINTER(c_int)],
    "nvrtcGetNumSupportedArchs": [_POINTER(c_int)],
    "nvrtcGetSupportedArchs": [_POINTER(c_int)],
    "nvrtcCreateProgram": [_POINTER(c_void_p), c_char_p, c_char_p, c_int, _POINTER(c_char_p), _POINTER(c_char_p)],
    "nvrtcCompileProgram": [c_void_p, c_int, _POINTER(c_char_p)],
    "nvrtcGetProgramLogSize": [c_void_p, _POINTER(c_size_t)],
    "nvrtcGetProgramLog": [c_void_p, c_char_p],
    "nvrtcGetCUBINSize": [c_void_p, _POINTER(c_size_t)],
    "nvrtcGetCUBIN": [c_void_p, c_char_p],
    "nvrtcGetPTXSize": [c_void_p, _POINTER(c_size_t)],
    "nvrtcGetPTX": [c_void_p, c_char_p],
    "nvrtcDestroyProgram": [_POINTER(c_void_p)],
}
"""Argument types by name, as of the CUDA 12 and 13 headers cuda.h and nvrtc.h. All return an int, 0 for success."""


class CudaError(RuntimeError):
    """A function of the driver or of NVRTC failed, or is missing; the message names it."""


class CompileError(RuntimeError):
    """NVRTC refuses a source; the message is its first error."""


def bind(library: Any, functions: Mapping[str, Sequence[Any]], whose: str) -> None:
    """Declare functions of a C library, each with the types of its arguments; all return int.

    Raises CudaError for one that is missing.
    """
    for name, arguments in functions.items():
        try:
            function = getattr(library, name)
        except AttributeError:
            raise CudaError(f"{whose} has no function {name}") from None
        function.argtypes, function.restype = list(arguments), c_int


class Driver:
    """The driver's library, libcuda: modules, functions and launches in the context that PyTorch uses.

    Handles of modules and functions are plain integers. They belong to the device that was current when they were made.
    All methods raise CudaError with the driver's own words.
    """

    def __init__(self, library: Any) -> None:
        bind(library, _DRIVER, "the NVIDIA driver")
        self._library = library
        self._call("cuInit", 0)

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status != _SUCCESS:
            text = c_char_p()
            self._library.cuGetErrorString(status, byref(text))
            said = text.value.decode() if text.value else "unknown error"
            raise CudaError(f"{name}: {said} (error {status})")

    def enter(self, device: int) -> None:
        """Make sure that this thread has a context: PyTorch's, the primary one of the device. A thread in which
        PyTorch has not yet called the runtime has none, such as one of autograd's."""
        context = c_void_p()
        self._call("cuCtxGetCurrent", byref(context))
        if not context.value:
            number = c_int()
            self._call("cuDeviceGet", byref(number), device)
            self._call("cuDevicePrimaryCtxRetain", byref(context), number.value)
            self._call("cuCtxSetCurrent", context)

    def load(self, image: bytes) -> int:
        """The module of a cubin, or of PTX, which the driver compiles for the card first."""
        module = c_void_p()
        self._call("cuModuleLoadData", byref(module), image)
        return module.value or 0

    def function(self, module: int, name: str, shared: int) -> int:
        """The kernel `name` of a module, allowed to be launched with `shared` bytes of dynamic shared memory."""
        function = c_void_p()
        self._call("cuModuleGetFunction", byref(function), module, name.encode())
        if shared > _FREE_SHARED_MEMORY:
            self._call("cuFuncSetAttribute", function, _MAX_DYNAMIC_SHARED_SIZE, shared)
        return function.value or 0

    def launch(
        self,
        function: int,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared: int,
        stream: int,
        arguments: Sequence[Any],
    ) -> None:
        """Launch a kernel on a stream. arguments: those of the kernel, as ctypes values of its parameters' types."""
        pointers = (c_void_p * len(arguments))(*(ctypes.addressof(argument) for argument in arguments))
        self._call("cuLaunchKernel", function, *grid, *block, shared, stream, pointers, None)


class Nvrtc:
    """NVIDIA's run-time compiler."""

    def __init__(self, library: Any) -> None:
        bind(library, _NVRTC, "NVRTC")
        self._library = library
        major, minor = c_int(), c_int()
        self._call("nvrtcVersion", byref(major), byref(minor))
        self.version = major.value, minor.value
        count = c_int()
        self._call("nvrtcGetNumSupportedArchs", byref(count))
        known = (c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", known)
        self.architectures = tuple(known)
        """Numbers of the architectures that it compiles for: 70 is sm_70 and compute_70."""

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status != _SUCCESS:
            raise CudaError(f"{name} failed with error {status}")

    def compile(self, name: str, source: str, headers: Mapping[str, str], options: Sequence[str]) -> bytes:
        """The code of a CUDA C++ source: a cubin where the options name an architecture `sm_NN`, PTX where they name
        `compute_NN`.

        name     of the source, for messages
        headers  texts of what it includes, by the names that it includes them by

        Raises CompileError for a source that does not compile.
        """
        program = c_void_p()
        texts = (c_char_p * len(headers))(*(text.encode() for text in headers.values()))
        names = (c_char_p * len(headers))(*(header.encode() for header in headers))
        self._call("nvrtcCreateProgram", byref(program), source.encode(), name.encode(), len(headers), texts, names)
        try:
            given = (c_char_p * len(options))(*(option.encode() for option in options))
            if self._library.nvrtcCompileProgram(program, len(options), given) != _SUCCESS:
                raise CompileError(_first_error(self._read(program, "ProgramLog").decode(errors="replace")))
            kind = "PTX" if any("compute_" in option for option in options) else "CUBIN"
            return self._read(program, kind)
        finally:
            self._library.nvrtcDestroyProgram(byref(program))

    def _read(self, program: c_void_p, what: str) -> bytes:
        size = c_size_t()
        self._call(f"nvrtcGet{what}Size", program, byref(size))
        text = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{what}", program, text)
        return text.raw


def _first_error(log: str) -> str:
    """The first line that says what is wrong, of the compiler's log."""
    lines = [line.strip() for line in log.strip("\0").splitlines() if line.strip()]
    return next((line for line in lines if "error" in line), lines[0] if lines else "it does not say why")
