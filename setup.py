"""Metadata lives in pyproject.toml. This file adds what is compiled: what the CPU does to pixels where a C++ compiler
is here, and for a GPU the CUDA sources to a wheel, and the native library where a CUDA compiler is here.

Without a C++ compiler, or with one that fails, numpy and Pillow do it (`fastdeit/data/compiled.py`).

`FASTDEIT_NATIVE` says what becomes of the library: `auto`, the default, builds it where nvcc and cmake are found, and
goes on without it otherwise; `0` never does; `1` fails with the reason where it cannot be built. An editable install
reads the sources where they are and builds the library into `build/`, only with `1`: one that was built without being
asked for would be older than the sources after the next change.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from itertools import takewhile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
NATIVE = Path("fastdeit", "kernels", "native")
LIBRARY = "libfastdeit_native.so"
SOURCES = ".cu", ".cuh", ".h"
MODES = "auto", "0", "1"


def mode() -> str:
    """What the user asks for."""
    asked = os.environ.get("FASTDEIT_NATIVE") or "auto"
    if asked not in MODES:
        raise SystemExit(f"FASTDEIT_NATIVE is {asked!r}, but must be one of: {', '.join(MODES)}")
    return asked


def compiler() -> str | None:
    """Path of nvcc; CUDACXX and CUDA_HOME are asked first."""
    homes = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    places = [os.environ.get("CUDACXX"), "nvcc", *(f"{home}/bin/nvcc" for home in homes if home)]
    return next(filter(None, map(shutil.which, filter(None, places))), None)


def missing() -> str | None:
    """Why the library cannot be built here, None where it can."""
    if compiler() is None:
        return "there is no CUDA compiler; set CUDACXX to nvcc"
    return "cmake is not here: pip install cmake" if shutil.which("cmake") is None else None


def wanted(editable: bool) -> bool:
    """Whether this build has to try."""
    return mode() == "1" or (mode() == "auto" and not editable and missing() is None)


class BuildError(Exception):
    """The library cannot be built; the message is the reason in a line, `output` what CMake said."""

    def __init__(self, reason: str, output: str = "") -> None:
        super().__init__(reason)
        self.output = output


def first_error(output: str) -> str:
    """The first error of what CMake said, in a line. CMake's own errors are indented under a line that says where."""
    lines = output.strip().splitlines() or ["no reason given"]
    at = next((at for at, line in enumerate(lines) if "error" in line.lower()), len(lines) - 1)
    message = [line.strip() for line in takewhile(str.strip, lines[at + 1 :])]
    return " ".join(message) if lines[at].startswith("CMake Error at") and message else lines[at]


def build_library(folder: Path) -> Path:
    """Build the library in `folder` by CMake. Raises BuildError."""
    if why := missing():
        raise BuildError(why)
    # pip hides every package but those of the build from Python, and so from a cmake that `pip install cmake` brought.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["CUDACXX"] = compiler()
    for command in (["cmake", "-B", str(folder), "-S", str(ROOT)], ["cmake", "--build", str(folder)]):
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        done = subprocess.run(command, env=environment, **pipe)
        if done.returncode != 0:
            raise BuildError(f"{' '.join(command)}: {first_error(done.stdout)}", done.stdout)
    return folder / LIBRARY


class Build(build_py):
    """The package, with the sources in `cu/` of `fastdeit/kernels/native`, and the library beside it."""

    def run(self) -> None:
        super().run()
        target = Path(self.build_lib) / NATIVE
        if not self.editable_mode:
            (target / "cu").mkdir(parents=True, exist_ok=True)
            for path in sorted((ROOT / "kernels").iterdir()):
                if path.suffix in SOURCES:
                    shutil.copy(path, target / "cu")
        if not wanted(self.editable_mode):
            print(f"fastdeit: the native library is not built: {self._why_not()}", file=sys.stderr)
            return
        try:
            if self.editable_mode:
                build_library(ROOT / "build")
            else:
                temporary = Path(self.get_finalized_command("build").build_temp) / "native"
                shutil.copy(build_library(temporary), target)
        except BuildError as error:
            if mode() == "1":
                print(error.output, file=sys.stderr)
                raise SystemExit(f"FASTDEIT_NATIVE=1, but the native library cannot be built: {error}") from error
            print(f"fastdeit: going on without the native library: {error}", file=sys.stderr)

    def _why_not(self) -> str:
        if mode() == "0":
            return "FASTDEIT_NATIVE=0"
        return missing() or "an editable install builds it with FASTDEIT_NATIVE=1 alone"


LIBRARIES = Path("fastdeit", "data", "pixels.cpp"), Path("fastdeit", "kernels", "_host_pixels.cpp")
"""The sources of what is compiled for the CPU: a library beside each."""


class BuildLibraries(build_ext):
    """Libraries without Python in them, so that one is for every version. The dot in their names keeps Python from
    taking them for modules."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".compiled.so"

    def build_extension(self, ext: Extension) -> None:
        # An earlier one is taken for up to date by its time alone: made with other options, or newer than an older
        # source that has come back. Where the compiler fails, it would even be installed.
        Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)
        super().build_extension(ext)


def libraries() -> list[Extension]:
    """The libraries for the CPU. Each names the source that it was made of."""
    options = {"extra_compile_args": ["-std=c++17", "-O3", "-ffp-contract=off"], "optional": True}
    made = []
    for path in LIBRARIES:
        digest = hashlib.sha256((ROOT / path).read_bytes()).hexdigest()
        name = ".".join(path.with_suffix("").parts)
        made.append(Extension(name, [str(path)], define_macros=[("FASTDEIT_SOURCE", f'"{digest}"')], **options))
    return made


class Wheel(bdist_wheel):
    """What is compiled does not know Python, so that the wheel is one for every version."""

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


setup(
    ext_modules=libraries(),
    cmdclass={"build_py": Build, "build_ext": BuildLibraries, "bdist_wheel": Wheel},
)
