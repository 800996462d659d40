"""The native kernels compiled for V100 by NVRTC, which needs no GPU: registers, spills and warp-matrix instructions.

The golden file has what NVRTC 12.9.86 makes of them; `python -m tests.kernels.native.nvrtc` writes it anew.
"""

import ctypes
import importlib.metadata
import json
import re
import struct
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.kernels.native.simt import KERNELS

GOLDEN = Path(__file__).parents[2] / "golden" / "native" / "sm_70.json"
PACKAGE, VERSION = "nvidia-cuda-nvrtc-cu12", "12.9.86"
_HMMA = 0x236
"""The lowest 12 bits of an instruction of a tensor core in SASS of sm_70."""


@dataclass(frozen=True)
class Resources:
    """What a kernel takes: registers of a thread, bytes of spilled registers, and HMMA instructions in its code."""

    registers: int
    spilled_bytes: int
    hmma: int


def unavailable() -> str | None:
    """Why nothing can be compiled; None where it can."""
    try:
        found = importlib.metadata.version(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return f"{PACKAGE}=={VERSION} is not installed"
    return None if found == VERSION else f"{PACKAGE} is {found}, but the golden file is of {VERSION}"


def headers() -> list[Path]:
    """Folders of CUDA's own headers, as far as packages bring them: only what is compared with them needs them."""
    places = {
        "nvidia-cuda-runtime-cu12": "nvidia/cuda_runtime/include",
        "nvidia-cuda-nvcc-cu12": "nvidia/cuda_nvcc/include",
        "nvidia-cuda-cccl-cu12": "nvidia/cuda_cccl/include",
    }
    found = []
    for package, place in places.items():
        try:
            found.append(Path(str(importlib.metadata.distribution(package).locate_file(place))))
        except importlib.metadata.PackageNotFoundError:
            return []
    return found


def compiled(source: str, *options: str) -> tuple[bytes, str]:
    """(cubin for sm_70, what the assembler said) of CUDA C++; raises AssertionError with the errors."""
    place = importlib.metadata.distribution(PACKAGE).locate_file("nvidia/cuda_nvrtc/lib/libnvrtc.so.12")
    library, program, size = ctypes.CDLL(str(place)), ctypes.c_void_p(), ctypes.c_size_t()
    assert library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None) == 0
    given = ["--gpu-architecture=sm_70", "-std=c++17", "--ptxas-options=-v", f"-I{KERNELS}", *options]
    status = library.nvrtcCompileProgram(program, len(given), (ctypes.c_char_p * len(given))(*map(str.encode, given)))
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    assert status == 0, log.value.decode()
    library.nvrtcGetCUBINSize(program, ctypes.byref(size))
    cubin = ctypes.create_string_buffer(size.value)
    library.nvrtcGetCUBIN(program, cubin)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return cubin.raw, log.value.decode()


def code(cubin: bytes) -> dict[str, bytes]:
    """The machine code of each kernel of a cubin, an ELF file of 64 bits."""
    table, size, number, names = (*struct.unpack_from("<Q", cubin, 40), *struct.unpack_from("<3H", cubin, 58))
    sections = [struct.unpack_from("<2I4Q2I2Q", cubin, table + i * size) for i in range(number)]
    found = {}
    for name, _, _, _, offset, length, *_ in sections:
        start = sections[names][4] + name
        text = cubin[start : cubin.index(b"\0", start)].decode()
        if text.startswith(".text."):
            found[text.removeprefix(".text.")] = cubin[offset : offset + length]
    return found


def resources() -> dict[str, Resources]:
    """Of each kernel of `kernels/attention.cu`."""
    cubin, log = compiled((KERNELS / "attention.cu").read_text())
    pattern = r"entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers"
    said = {name: numbers for name, *numbers in re.findall(pattern, log, re.DOTALL)}
    found = {}
    for name, text in sorted(code(cubin).items()):
        stores, loads, registers = map(int, said[name])
        hmma = sum(word & 0xFFF == _HMMA for word, _ in struct.iter_unpack("<2Q", text))
        found[name] = Resources(registers, stores + loads, hmma)
    return found


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    lines = (f'  "{name}": {json.dumps(asdict(one))}' for name, one in resources().items())
    GOLDEN.write_text("{\n" + ",\n".join(lines) + "\n}\n")
