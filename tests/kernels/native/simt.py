"""The native kernels compiled by the host's compiler against the SIMT shim, and called through their C API.

`shim/device.cuh` and `shim/cuda_runtime.h` take the place of the headers for CUDA. The rest is what is shipped: the
files of `kernels/`, or copies of them with a fault planted (`mutants.py`).
"""

import ctypes
import math
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

KERNELS = Path(__file__).parents[3] / "kernels"
SHIM = Path(__file__).parent / "shim"
HEAD_DIMS = 32, 64, 96, 128
COMPILER = shutil.which("g++")
UNAVAILABLE = None if COMPILER else "there is no g++ to compile the kernels for the CPU"

_FLAGS = ["-std=c++17", "-O2", "-fPIC", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-x", "c++"]
"""Fortified, longjmp refuses to go from one fiber to another."""
_CHECKS = ["-fsanitize=thread,alignment"]
_OF_THE_HOST = "simt.cpp", "api.cu"
"""Sources without a kernel."""
_LAUNCH_FAILED, _FLOAT16 = 7, 1


class Fault(AssertionError):
    """What a kernel did that no kernel may do: the shim's sentence about it."""


@dataclass(frozen=True)
class Kernels:
    """The C API of kernels that run on the CPU."""

    library: ctypes.CDLL

    def status_text(self, status: int) -> str:
        """The sentence of the API for a status."""
        return self.library.fastdeit_status_text(status).decode()

    def launch_shape(self, kernel: int, batch: int, tokens: int, heads: int, head_dim: int) -> tuple[int, int, int]:
        """(blocks, threads of a block, bytes of shared memory) of the kernel of that number."""
        shape = (ctypes.c_int64 * 3)()
        sizes = [ctypes.c_int64(size) for size in (batch, tokens, heads, head_dim)]
        status = self.library.fastdeit_attention_launch_shape(kernel, *sizes, shape)
        assert status == 0, self.status_text(status)
        return tuple(shape)

    def forward(self, qkv: Tensor, heads: int, scale: float, seed: int = 0) -> tuple[Tensor, Tensor]:
        """(out, lse) of qkv float16 `[B, N, 3*H*d]`; raises `Fault`. Another seed is another order of the threads."""
        batch, tokens, width = qkv.shape
        out = _poisoned(batch, tokens, width // 3, dtype=torch.float16)
        lse = _poisoned(batch, heads, tokens, dtype=torch.float32)
        self._call("forward", {"qkv": qkv}, {"out": out, "lse": lse}, heads, scale, seed)
        return out, lse

    def backward(
        self, grad: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, heads: int, scale: float, bias: bool, seed: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        """(gradient of qkv, float32 `[3*H*d]` gradient of its bias, or None); raises `Fault`."""
        batch, tokens, width = qkv.shape
        dqkv = _poisoned(batch, tokens, width, dtype=torch.float16)
        delta = _poisoned(batch, heads, tokens, dtype=torch.float32)
        dbias = _poisoned(width, dtype=torch.float32) if bias else None
        partial = _poisoned(batch * math.ceil(tokens / 64), width, dtype=torch.float32) if bias else None
        inputs = {"grad": grad, "qkv": qkv, "out": out, "lse": lse}
        outputs = {"dqkv": dqkv, "dbias": dbias, "delta": delta, "partial": partial}
        self._call("backward", inputs, outputs, heads, scale, seed)
        return dqkv, dbias

    def _call(
        self,
        name: str,
        inputs: dict[str, Tensor],
        outputs: dict[str, Tensor | None],
        heads: int,
        scale: float,
        seed: int,
    ) -> None:
        batch, tokens, width = inputs["qkv"].shape
        library, kept = self.library, []
        library.simt_seed(ctypes.c_uint64(seed))
        library.simt_forget_regions()
        for key, tensor in (inputs | outputs).items():
            if tensor is None:
                continue
            assert tensor.is_contiguous()
            if key in outputs:
                kept.append(writers(tensor.nbytes))
            named(library, key, tensor.data_ptr(), tensor.nbytes, kept[-1] if key in outputs else None)
        sizes = [ctypes.c_int64(size) for size in (batch, tokens, heads, width // (3 * heads))]
        pointers = [_address(tensor) for tensor in (inputs | outputs).values()]
        function = getattr(library, f"fastdeit_attention_{name}")
        status = function(*pointers, *sizes, ctypes.c_float(scale), _FLOAT16, None)
        if status == _LAUNCH_FAILED:
            raise Fault(library.simt_fault().decode())
        assert status == 0, self.status_text(status)


def _poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, math.nan, dtype=dtype)


def _address(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def writers(size: int) -> np.ndarray:
    """Where the shim notes who wrote what of an array of `size` bytes: it has to live as long as the launch."""
    return np.zeros((size + 1) // 2, np.uint32)


def named(library: ctypes.CDLL, name: str, address: int, size: int, noted: np.ndarray | None = None) -> None:
    """Lets kernels read the array of `size` bytes, and write it where their writers are `noted`."""
    where = None if noted is None else ctypes.c_void_p(noted.ctypes.data)
    library.simt_region(ctypes.c_char_p(name.encode()), ctypes.c_void_p(address), ctypes.c_size_t(size), where)


def laid_out(folder: Path, planted: dict[str, str] | None = None) -> None:
    """The files to compile, in one folder: the kernels, some of them with other text, and the shim over both."""
    for file in (*KERNELS.iterdir(), *SHIM.iterdir()):
        shutil.copy(file, folder)
    for name, text in (planted or {}).items():
        (folder / name).write_text(text)


def compiled(folder: Path, source: str, target: str, head_dims: tuple[int, ...] = HEAD_DIMS) -> Path:
    """One object file of the source, both in the folder. Kernels get the checks of their accesses to memory."""
    named = f"-DFASTDEIT_HEAD_DIMS(each)={' '.join(f'each({head_dim})' for head_dim in head_dims)}"
    checks = _CHECKS if source not in _OF_THE_HOST else []
    _run(folder, *_FLAGS, *checks, named, f"-I{folder}", "-c", source, "-o", target)
    return folder / target


def linked(folder: Path, target: str, *objects: Path) -> ctypes.CDLL:
    """The objects as a library of this process."""
    _run(folder, "-shared", *map(str, objects), "-o", target)
    library = ctypes.CDLL(str(folder / target))
    library.simt_fault.restype = ctypes.c_char_p
    return library


def _run(folder: Path, *arguments: str) -> None:
    done = subprocess.run([COMPILER, *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def built(
    folder: Path,
    planted: dict[str, str] | None = None,
    head_dims: tuple[int, ...] = HEAD_DIMS,
    shim: Path | None = None,
) -> Kernels:
    """The kernels, compiled in the folder. `shim`: the object of simt.cpp, which includes nothing that is planted,
    where it is there already."""
    laid_out(folder, planted)
    objects = [compiled(folder, source, f"{source}.o", head_dims) for source in ("api.cu", "attention.cu")]
    library = linked(folder, "kernels.so", shim or compiled(folder, "simt.cpp", "simt.cpp.o"), *objects)
    library.fastdeit_status_text.restype = ctypes.c_char_p
    return Kernels(library)
