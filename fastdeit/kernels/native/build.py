"""The kernels compiled at run time: by NVRTC, which PyTorch's wheels for CUDA bring, and once for each card.

NVRTC 12 compiles for sm_70, NVRTC 13 no longer does. For cards after Turing the oldest architecture that NVRTC knows is
compiled to PTX, so that such a card runs the same code as a V100. The sources include no header but their own, because
PyTorch's wheels have only some of CUDA's.
"""

import ctypes
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache as once
from importlib.util import find_spec
from pathlib import Path

from fastdeit.kernels.native import cache, sources
from fastdeit.kernels.native.cuda import CudaError, Nvrtc

SOURCE = "attention.cu"
OPTIONS = ("--std=c++17",)
OLDEST, AFTER_TURING = 70, 80
_MAJOR_VERSIONS = 12, 13
_PACKAGES = {12: "cuda_nvrtc", 13: "cu13"}
"""Folders of `nvidia` in site-packages that have NVRTC, by its major version."""


class Missing(Exception):
    """What compiling needs is not on this machine; the message says what, and what to do."""


@dataclass(frozen=True)
class Program:
    """Compiled kernels: a cubin or PTX, the architecture, such as sm_70 or compute_70, and who compiled them. `notes`
    are sentences on a cache that could not be used."""

    image: bytes
    architecture: str
    compiler: str
    notes: tuple[str, ...] = ()


def places() -> Iterator[Path]:
    """Where an NVRTC may be, the best first: in NVIDIA's packages beside PyTorch, in a conda environment, in the
    toolkit that CUDA_HOME names, on the system's own path, which is a name without a folder."""
    packages = find_spec("nvidia")
    for folder in packages.submodule_search_locations or () if packages else ():
        for major in _MAJOR_VERSIONS:
            yield Path(folder) / _PACKAGES[major] / "lib" / f"libnvrtc.so.{major}"
    roots = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    for folder in (Path(sys.prefix) / "lib", *(Path(root) / "lib64" for root in roots if root), Path()):
        for major in _MAJOR_VERSIONS:
            yield folder / f"libnvrtc.so.{major}"


@once
def compilers() -> tuple[Nvrtc, ...]:
    """Every NVRTC that can be loaded here, the best first."""
    found = []
    for path in places():
        if path.parent != Path() and not path.exists():
            continue
        try:
            found.append(Nvrtc(ctypes.CDLL(str(path))))
        except (OSError, CudaError):  # of another system, or older than what is asked of it
            continue
    return tuple(found)


def target(capability: int, known: tuple[int, ...]) -> str | None:
    """The architecture that a compiler which knows `known` should compile for, for a card of that capability: 70 is
    7.0. None where it can do nothing for the card."""
    fitting = [arch for arch in known if OLDEST <= arch <= capability]
    if not fitting:
        return None
    return f"sm_{max(fitting)}" if capability < AFTER_TURING else f"compute_{min(fitting)}"


def program(capability: int) -> Program:
    """The kernels for a card of that capability, from the cache where it has them.

    Raises Missing, and CompileError or CudaError where NVRTC fails.
    """
    texts = sources.texts()
    if SOURCE not in texts:
        raise Missing(f"the CUDA sources are not there: {sources.folder() / SOURCE}; install fastdeit anew")
    nvrtc, architecture = _compiler(capability)
    version = ".".join(map(str, nvrtc.version))
    key = sources.digest(version, architecture, *OPTIONS)
    kept = cache.folder() / f"attention-{architecture}-{key[:16]}"
    notes = []
    try:
        image = cache.read(kept)
    except (OSError, cache.Damaged) as error:
        notes.append(f"{kept} is not used: {error}. The kernels are compiled anew")
        image = None
    if image is None:
        headers = {name: text for name, text in texts.items() if name != SOURCE}
        image = nvrtc.compile(SOURCE, texts[SOURCE], headers, [f"--gpu-architecture={architecture}", *OPTIONS])
        try:
            cache.write(kept, image)
        except OSError as error:
            notes.append(f"{kept} cannot be written: {error.strerror or error}. Set FASTDEIT_CACHE=FOLDER to keep it")
    return Program(image, architecture, f"NVRTC {version}", tuple(notes))


def _compiler(capability: int) -> tuple[Nvrtc, str]:
    found = compilers()
    for nvrtc in found:
        if architecture := target(capability, nvrtc.architectures):
            return nvrtc, architecture
    if not found:
        raise Missing(
            "there is no NVRTC here, the compiler that PyTorch's wheels for CUDA bring: "
            "pip install nvidia-cuda-nvrtc-cu12"
        )
    versions = ", ".join(sorted({".".join(map(str, nvrtc.version)) for nvrtc in found}))
    raise Missing(
        f"NVRTC {versions} does not compile for sm_{capability}, NVRTC 12 does: pip install nvidia-cuda-nvrtc-cu12"
    )
