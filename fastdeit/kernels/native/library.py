"""The library that CMake builds from `kernels/`, called by its C API (`kernels/fastdeit_native.h`)."""

import ctypes
from ctypes import c_char_p, c_float, c_int, c_int64, c_void_p
from pathlib import Path

from torch import Tensor

from fastdeit.kernels.native.cuda import CudaError, bind
from fastdeit.kernels.native.launches import Sizes
from fastdeit.kernels.native.runnable import Backward, Unusable

NAME = "libfastdeit_native.so"
API_VERSION = 1
_PLACES = Path(__file__).parent / NAME, Path(__file__).parents[3] / "build" / NAME
"""In a wheel that was built with a CUDA compiler, and in a checkout, where `cmake --build build` puts it."""

_OK, _FLOAT16 = 0, 1
_NOT_LAUNCHED = 6, 7
"""Statuses of a library for other cards, or for a newer driver."""
_SIZES = [c_int64, c_int64, c_int64, c_int64, c_float, c_int, c_void_p]
_FUNCTIONS = {
    "fastdeit_native_api_version": [],
    "fastdeit_attention_forward": [*[c_void_p] * 3, *_SIZES],
    "fastdeit_attention_backward": [*[c_void_p] * 8, *_SIZES],
}


class LibraryError(Exception):
    """The library is there and cannot be used; the message says why."""


class Library:
    """A `Runnable` of a built library. Raises LibraryError."""

    def __init__(self, path: Path) -> None:
        try:
            self._library = ctypes.CDLL(str(path))
            bind(self._library, _FUNCTIONS, str(path))
            bind(self._library, {"fastdeit_status_text": [c_int]}, str(path))
        except OSError as error:
            raise LibraryError(f"it cannot be loaded: {error}") from error
        except CudaError as error:
            raise LibraryError(f"{error}, which this fastdeit needs; build it anew") from error
        self._library.fastdeit_status_text.restype = c_char_p
        version = self._library.fastdeit_native_api_version()
        if version != API_VERSION:
            raise LibraryError(
                f"it has version {version} of the API, and this fastdeit needs {API_VERSION}; build it anew"
            )
        self.origin = f"the library {path}"

    def forward(self, qkv: Tensor, out: Tensor, lse: Tensor, sizes: Sizes, stream: int) -> None:
        """As of `Runnable`."""
        status = self._library.fastdeit_attention_forward(*_pointers(qkv, out, lse), *_numbers(sizes, stream))
        if status in _NOT_LAUNCHED:
            raise Unusable(f"{self.origin} does not run here: {self._text(status)}")
        self._check(status)

    def backward(self, tensors: Backward, sizes: Sizes, stream: int) -> None:
        """As of `Runnable`."""
        self._check(self._library.fastdeit_attention_backward(*_pointers(*tensors), *_numbers(sizes, stream)))

    def _text(self, status: int) -> str:
        return self._library.fastdeit_status_text(status).decode()

    def _check(self, status: int) -> None:
        if status != _OK:
            raise CudaError(f"{self.origin}: {self._text(status)} (status {status})")


def built() -> Path | None:
    """The library's file, None where none was built."""
    return next((path for path in _PLACES if path.exists()), None)


def _pointers(*tensors: Tensor | None) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def _numbers(sizes: Sizes, stream: int) -> list[int | float]:
    return [sizes.batch, sizes.tokens, sizes.heads, sizes.head_dim, sizes.scale, _FLOAT16, stream]
