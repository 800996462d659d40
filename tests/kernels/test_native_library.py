"""The library that CMake builds: its C API on a library of the host's compiler, what is wrong with one and what is said
then, CMake itself, and `FASTDEIT_NATIVE` of setup.py."""

import ctypes
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import setuptools
import torch

from fastdeit import kernels
from fastdeit.bench.count_card import pretended_card
from fastdeit.kernels.native import build, choice, library, sources
from fastdeit.kernels.native.build import Program
from fastdeit.kernels.native.cuda import CudaError, Driver
from fastdeit.kernels.native.launches import Sizes
from fastdeit.kernels.native.library import Library, LibraryError
from fastdeit.kernels.native.runnable import Backward, Unusable
from tests.kernels.fake_cuda import FakeDriver

ROOT = Path(__file__).parents[2]
CARD = torch.device("cuda", 0)
STUB = r"""
#include "fastdeit_native.h"
int64_t seen[14];
float seen_scale;
int answer = 0;
#define SEE(i, x) seen[i] = (int64_t)(x)
int fastdeit_native_api_version(void) { return VERSION; }
const char *fastdeit_status_text(int status) { return status == 6 ? "built for another architecture" : "a sentence"; }
int fastdeit_attention_forward(const void *qkv, void *out, float *lse, int64_t batch, int64_t tokens, int64_t heads,
                               int64_t head_dim, float scale, int dtype, void *stream) {
  SEE(0, qkv); SEE(1, out); SEE(2, lse); SEE(3, batch); SEE(4, tokens); SEE(5, heads); SEE(6, head_dim);
  SEE(7, dtype); SEE(8, stream);
  seen_scale = scale;
  return answer;
}
#ifndef WITHOUT_BACKWARD
int fastdeit_attention_backward(const void *grad, const void *qkv, const void *out, const float *lse, void *dqkv,
                                float *dbias, float *delta, float *partial, int64_t batch, int64_t tokens,
                                int64_t heads, int64_t head_dim, float scale, int dtype, void *stream) {
  SEE(0, grad); SEE(1, qkv); SEE(2, out); SEE(3, lse); SEE(4, dqkv); SEE(5, dbias); SEE(6, delta); SEE(7, partial);
  SEE(8, batch); SEE(9, tokens); SEE(10, heads); SEE(11, head_dim); SEE(12, dtype); SEE(13, stream);
  seen_scale = scale;
  return answer;
}
#endif
"""


@pytest.fixture(scope="module")
def stub(tmp_path_factory):
    """`stub(*flags)` is the path of a library with the C API, compiled with these flags besides."""
    folder = tmp_path_factory.mktemp("stubs")
    (folder / "stub.c").write_text(STUB)

    def compiled(*flags, version=library.API_VERSION):
        path = folder / f"{version}{''.join(flags)}.so"
        if not path.exists():
            command = ["gcc", "-shared", "-fPIC", f"-DVERSION={version}", *flags, f"-I{ROOT / 'kernels'}", "stub.c"]
            subprocess.run([*command, "-o", str(path)], cwd=folder, check=True)
        return path

    return compiled


def seen(path, count):
    loaded = ctypes.CDLL(str(path))
    return list((ctypes.c_int64 * 14).in_dll(loaded, "seen"))[:count], ctypes.c_float.in_dll(loaded, "seen_scale").value


def answer(path, status):
    ctypes.c_int.in_dll(ctypes.CDLL(str(path)), "answer").value = status


@pytest.mark.parametrize("with_bias", [True, False])
def test_arguments_are_those_of_the_header(stub, with_bias):
    made = Library(stub())
    sizes, stream = Sizes(2**33, 3, 5, 32, 0.5), 2**40
    tensors = [torch.zeros(1) for _ in range(8)]
    addresses = [tensor.data_ptr() for tensor in tensors]
    made.forward(*tensors[:3], sizes, stream)
    assert seen(stub(), 9) == ([*addresses[:3], 2**33, 3, 5, 32, 1, 2**40], 0.5)
    if not with_bias:
        for place in (5, 7):
            tensors[place], addresses[place] = None, 0
    made.backward(Backward(*tensors), sizes, stream)
    assert seen(stub(), 14) == ([*addresses, 2**33, 3, 5, 32, 1, 2**40], 0.5)


def test_a_status_is_an_error_with_its_sentence(stub):
    made, sizes = Library(stub()), Sizes(1, 1, 1, 32, 1.0)
    tensors = [torch.zeros(1) for _ in range(8)]
    try:
        answer(stub(), 5)
        with pytest.raises(CudaError, match=r"the library .*: a sentence \(status 5\)"):
            made.forward(*tensors[:3], sizes, 0)
        answer(stub(), 6)
        with pytest.raises(CudaError, match=r"built for another architecture \(status 6\)"):
            made.backward(Backward(*tensors), sizes, 0)  # too late for others
        with pytest.raises(Unusable, match="does not run here: built for another architecture"):
            made.forward(*tensors[:3], sizes, 0)
    finally:
        answer(stub(), 0)


def no_library(tmp_path):
    (tmp_path / "text.so").write_text("this is not ELF")
    return tmp_path / "text.so"


def test_what_is_wrong_with_a_library(stub, tmp_path):
    for path, reason in (
        (stub(version=0), "it has version 0 of the API, and this fastdeit needs 1; build it anew"),
        (
            stub("-DWITHOUT_BACKWARD"),
            "has no function fastdeit_attention_backward, which this fastdeit needs; build it",
        ),
        (no_library(tmp_path), "it cannot be loaded: .*(invalid ELF header|file too short)"),
    ):
        with pytest.raises(LibraryError, match=reason):
            Library(path)


def test_the_version_and_the_statuses_are_those_of_the_header():
    header = (ROOT / "kernels" / "fastdeit_native.h").read_text()
    numbers = {name: int(number) for name, number in re.findall(r"FASTDEIT_(\w+)(?: =)? (\d+)", header)}
    assert numbers["NATIVE_API_VERSION"] == library.API_VERSION
    assert numbers["FLOAT16"] == library._FLOAT16
    assert (numbers["NO_KERNEL_IMAGE"], numbers["LAUNCH_FAILED"]) == library._NOT_LAUNCHED


# ---- the choice ------------------------------------------------------------------------------------------------------


@pytest.fixture
def v100(monkeypatch):
    """`v100(path, nvrtc=...)`: a V100 with that library, and with what NVRTC compiles, if it is there."""
    choice.found.cache_clear()

    def found(path, nvrtc=True):
        def program(capability):
            if not nvrtc:
                raise build.Missing("there is no NVRTC")
            return Program(b"ELF", "sm_70", "NVRTC 12.9")

        monkeypatch.setattr(library, "built", lambda: path)
        monkeypatch.setattr(build, "program", program)

    monkeypatch.setattr(choice, "driver", lambda: Driver(FakeDriver()))
    with pretended_card(arch=70):
        yield found
    choice.found.cache_clear()


def call():
    return kernels.attention(torch.zeros(1, 5, 192, dtype=torch.float16, device=CARD), 1)


def test_the_library_is_preferred(v100, stub, monkeypatch):
    v100(stub())
    monkeypatch.setattr(build, "program", lambda capability: pytest.fail("nothing has to be compiled"))
    assert choice.capability(CARD, False) == (True, f"the library {stub()}")
    call()
    assert seen(stub(), 9)[0][3:8] == [1, 5, 1, 64, 1]


@pytest.mark.parametrize("nvrtc", [True, False])
@pytest.mark.parametrize("trouble", ["version", "symbol", "text"])
def test_a_library_that_cannot_be_used_is_one_warning_and_nvrtc(v100, stub, tmp_path, recwarn, trouble, nvrtc):
    paths = {"version": lambda: stub(version=0), "symbol": lambda: stub("-DWITHOUT_BACKWARD")}
    path = paths.get(trouble, lambda: no_library(tmp_path))()
    v100(path, nvrtc)
    able, reason = choice.capability(CARD, False)
    choice.capability(CARD, False)
    assert able is nvrtc
    if able:
        assert reason == "NVRTC 12.9 compiled it for sm_70"
    else:
        assert reason.startswith(f"the library {path} is not used: ")
        assert reason.endswith(", and there is no NVRTC")
    (warned,) = recwarn
    assert str(warned.message).startswith(f"native kernels: the library {path} is not used: ")
    call()


def test_a_library_for_other_cards_gives_way_at_the_first_call(v100, stub, recwarn):
    v100(stub())
    answer(stub(), 6)
    try:
        for _ in range(2):
            call()
    finally:
        answer(stub(), 0)
    said = f"native kernels: the library {stub()} does not run here: built for another architecture"
    assert [str(each.message) for each in recwarn] == [said]
    assert choice.capability(CARD, False) == (True, "NVRTC 12.9 compiled it for sm_70")


# ---- CMake -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cmake(tmp_path):
    """`cmake(*arguments)` runs it; the process, with all that it said in `stdout`."""
    if shutil.which("cmake") is None:
        pytest.skip("cmake is not here: pip install 'fastdeit[native]'")

    def run(*arguments, **environment):
        command = [shutil.which("cmake"), *map(str, arguments)]
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.run(command, cwd=tmp_path, env=environment or None, **pipe)

    return run


@pytest.mark.slow
def test_without_a_toolkit_cmake_says_what_to_do(cmake):
    done = cmake("-B", "build", "-S", ROOT, "-DCMAKE_CUDA_COMPILER=NOTFOUND", PATH="/usr/bin:/bin")
    assert done.returncode == 1
    said = " ".join(done.stdout.split())
    assert "No CUDA toolkit was found, so the native library cannot be built. Set CUDACXX to nvcc" in said
    assert "fastdeit compiles the same kernels at run time through NVRTC" in said


@pytest.mark.slow
@pytest.mark.parametrize("named", [True, False])
def test_a_compiler_that_does_not_work_is_told_apart_from_none(cmake, tmp_path, named):
    (tmp_path / "nvcc").write_text("#!/bin/sh\necho 'error: unsupported GNU version!' >&2\nexit 1\n")
    (tmp_path / "nvcc").chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin", "CUDACXX": str(tmp_path / "nvcc")}
    if not named:
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = cmake("-B", "build", "-S", ROOT, **environment)
    assert done.returncode == 1
    said = " ".join(done.stdout.split())
    assert f"{tmp_path}/nvcc is no CUDA compiler that works here, so the native library cannot be built" in said
    logs = Path(re.search(r"What it said is in a log in (\S+);", said).group(1)).iterdir()
    assert any("unsupported GNU version!" in path.read_text() for path in logs if path.is_file())


@pytest.mark.slow
def test_cmake_builds_the_library(cmake, tmp_path):
    """For what the toolkit knows; without a card the library says that it cannot launch, and others take its place."""
    if (nvcc := _setup().compiler()) is None:
        pytest.skip("there is no nvcc here, so nothing was compiled by CMake")
    configured = cmake("-B", "build", "-S", ROOT, f"-DCMAKE_CUDA_COMPILER={nvcc}")
    assert configured.returncode == 0, configured.stdout
    done = cmake("--build", "build")
    assert done.returncode == 0, done.stdout
    made = Library(tmp_path / "build" / library.NAME)
    if not torch.cuda.is_available():
        tensors = [torch.zeros(1024, dtype=torch.float16) for _ in range(3)]
        with pytest.raises(Unusable, match="does not run here"):
            made.forward(*tensors, Sizes(1, 1, 1, 32, 1.0), 0)
    version, architectures = re.search(
        r"fastdeit_native: CUDA ([\d.]+), architectures (\S+)", configured.stdout
    ).groups()
    assert architectures == ("75" if int(version.split(".")[0]) >= 13 else "70;75-real")


_OLDER = """#!/bin/bash
for each in "$@"; do
    [ "$each" = --version ] && echo "Cuda compilation tools, release 12.9, V12.9.86" && exit
done
exec {nvcc} "${{@//_70/_75}}"
"""


@pytest.mark.slow
def test_a_toolkit_before_cuda_13_is_asked_for_volta(cmake, tmp_path):
    """What CMake asks of an nvcc that says it is 12.9; the one that is here compiles for Turing instead."""
    if (nvcc := _setup().compiler()) is None:
        pytest.skip("there is no nvcc here, so CMake configures nothing")
    (tmp_path / "nvcc").write_text(_OLDER.format(nvcc=nvcc))
    (tmp_path / "nvcc").chmod(0o755)
    done = cmake("-B", "build", "-S", ROOT, PATH="/usr/bin:/bin", CUDACXX=str(tmp_path / "nvcc"))
    assert done.returncode == 0, done.stdout
    assert "fastdeit_native: CUDA 12.9.86, architectures 70;75-real" in done.stdout
    flags = (tmp_path / "build" / "CMakeFiles" / "fastdeit_native.dir" / "flags.make").read_text()
    wanted = {"arch=compute_70,code=[compute_70,sm_70]", "arch=compute_75,code=[sm_75]"}
    assert set(re.findall(r"--generate-code=(\S+?\])", flags)) == wanted


# ---- pip -------------------------------------------------------------------------------------------------------------


def _setup():
    """setup.py as a module, without its last line having any effect."""
    before, setuptools.setup = setuptools.setup, lambda **_: None
    try:
        spec = importlib.util.spec_from_file_location("fastdeit_setup", ROOT / "setup.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        setuptools.setup = before
    return module


@pytest.fixture(scope="module")
def setup():
    return _setup()


@pytest.mark.parametrize(
    ("asked", "why", "editable", "wanted"),
    [
        ("auto", None, False, True),
        ("auto", "there is no CUDA compiler", False, False),
        ("auto", None, True, False),
        ("0", None, False, False),
        ("1", None, True, True),
        ("1", "there is no CUDA compiler", False, True),
        ("", None, False, True),
    ],
)
def test_what_pip_builds(setup, monkeypatch, asked, why, editable, wanted):
    monkeypatch.setenv("FASTDEIT_NATIVE", asked)
    monkeypatch.setattr(setup, "missing", lambda: why)
    assert setup.wanted(editable) is wanted


def test_a_mode_that_does_not_exist(setup, monkeypatch):
    monkeypatch.setenv("FASTDEIT_NATIVE", "yes")
    with pytest.raises(SystemExit, match="FASTDEIT_NATIVE is 'yes', but must be one of: auto, 0, 1"):
        setup.mode()


def test_where_nvcc_is_looked_for(setup, monkeypatch):
    monkeypatch.setattr(setup.shutil, "which", lambda name: name if name.startswith("/opt") else None)
    for name in ("CUDACXX", "CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert setup.missing() == "there is no CUDA compiler; set CUDACXX to nvcc"
    monkeypatch.setenv("CUDA_HOME", "/opt/cuda")
    assert setup.compiler() == "/opt/cuda/bin/nvcc"
    assert setup.missing() == "cmake is not here: pip install cmake"
    monkeypatch.setenv("CUDACXX", "/opt/other/nvcc")
    assert setup.compiler() == "/opt/other/nvcc"


def test_cmake_is_run_without_what_pip_hides_from_python(setup, monkeypatch, tmp_path):
    """The cmake of `pip install cmake` is a script in Python. Its failure is the reason, in a line."""
    (tmp_path / "cmake").write_text('#!/bin/sh\necho "error: ${PYTHONPATH-none}, ${CUDACXX-none}"\nexit 1\n')
    (tmp_path / "nvcc").touch()
    for name in ("cmake", "nvcc"):
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("PYTHONPATH", "/of/pip")
    monkeypatch.delenv("CUDACXX", raising=False)
    with pytest.raises(setup.BuildError, match=f"^cmake -B .*: error: none, {tmp_path}/nvcc$"):
        setup.build_library(tmp_path / "build")


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (
            "-- found\nCMake Error at C.txt:5 (message):\n  no nvcc.  Set\n  CUDACXX.\n\n\n-- errors!",
            "no nvcc.  Set CUDACXX.",
        ),
        ("[ 50%] Building\na.cu(3): error: broken\n1 error detected", "a.cu(3): error: broken"),
        ("it ends like this", "it ends like this"),
        ("", "no reason given"),
    ],
)
def test_the_first_error_of_cmake_is_the_reason(setup, said, reason):
    assert setup.first_error(said) == reason


@pytest.fixture
def building(setup, monkeypatch, tmp_path):
    """`building(mode)` runs the part of pip's build that is fastdeit's own, where CMake fails."""

    def failing(folder):
        raise setup.BuildError("cmake --build: attention.cu(1): error: broken", "the whole log")

    monkeypatch.setattr(setup, "missing", lambda: None)
    monkeypatch.setattr(setup, "build_library", failing)
    monkeypatch.setattr(setup.build_py, "run", lambda self: None)
    monkeypatch.chdir(ROOT)

    def run(mode):
        monkeypatch.setenv("FASTDEIT_NATIVE", mode)
        command = setup.Build(setuptools.Distribution())
        command.build_lib = str(tmp_path)
        command.editable_mode = False
        command.run()
        return {path.name for path in (tmp_path / setup.NATIVE / "cu").iterdir()}

    return run


@pytest.mark.parametrize(
    ("mode", "line"),
    [
        ("0", "fastdeit: the native library is not built: FASTDEIT_NATIVE=0\n"),
        ("auto", "fastdeit: going on without the native library: cmake --build: attention.cu(1): error: broken\n"),
    ],
)
def test_pip_goes_on_with_one_line(building, capsys, mode, line):
    assert building(mode) == {path.name for path in (ROOT / "kernels").iterdir() if path.suffix != ".md"}
    assert capsys.readouterr().err == line


def test_pip_fails_where_the_library_is_asked_for(building, capsys):
    with pytest.raises(
        SystemExit, match=r"FASTDEIT_NATIVE=1, but the native library cannot be built: .* error: broken"
    ):
        building("1")
    assert capsys.readouterr().err == "the whole log\n"


def test_a_wheel_has_the_sources_that_the_package_looks_for(building, tmp_path, monkeypatch):
    building("0")
    repository = sources.texts()
    monkeypatch.setattr(sources, "_COPY", tmp_path / "fastdeit" / "kernels" / "native" / sources._COPY.name)
    assert sources.folder() == sources._COPY
    assert sources.texts() == repository
