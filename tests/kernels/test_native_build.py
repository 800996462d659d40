"""What NVRTC compiles for which card, on an NVRTC in Python and on the real one; the cache; and what is said where it
cannot be."""

import os
import sys
from pathlib import Path

import pytest
import torch

from fastdeit import kernels
from fastdeit.bench.count_card import pretended_card
from fastdeit.kernels._op import OPS, ChoiceError
from fastdeit.kernels.native import build, cache, choice, library, sources
from fastdeit.kernels.native.cuda import CompileError, CudaError, Driver, Nvrtc
from fastdeit.kernels.native.launches import HEAD_DIMS, KERNELS, Sizes, launch
from fastdeit.kernels.trial import store
from tests.kernels.fake_cuda import FakeDriver, FakeNvrtc

CARD = torch.device("cuda", 0)
OF_CUDA_13 = 75, 80, 86, 87, 88, 89, 90, 100, 103, 110, 120, 121


@pytest.fixture
def compiling(tmp_path, monkeypatch):
    """An NVRTC 12.9, and an empty cache."""
    fake = FakeNvrtc()
    monkeypatch.setenv("FASTDEIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "compilers", lambda: (Nvrtc(fake),))
    return fake


def kept() -> list[Path]:
    return sorted(cache.folder().glob("*")) if cache.folder().exists() else []


# ---- what is compiled ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "known", "wanted"),
    [
        (70, (50, 70, 75, 90), "sm_70"),
        (72, (50, 70, 75, 90), "sm_70"),
        (75, (50, 70, 75, 90), "sm_75"),
        (70, OF_CUDA_13, None),
        (75, OF_CUDA_13, "sm_75"),
        (90, (50, 70, 75, 90), "compute_70"),
        (90, OF_CUDA_13, "compute_75"),
        (80, (50, 90), None),
    ],
)
def test_architecture(capability, known, wanted):
    assert build.target(capability, known) == wanted


def test_the_sources_are_compiled_with_their_headers(compiling):
    program = build.program(70)
    assert (program.image, program.architecture, program.compiler) == (compiling.image, "sm_70", "NVRTC 12.9")
    (compiled,) = compiling.compiled
    texts = sources.texts()
    assert compiled.source == texts[build.SOURCE]
    assert {build.SOURCE, *compiled.headers} == texts.keys()
    assert {"launch.h", "tiles.cuh"} < texts.keys()
    assert compiled.options == ["--gpu-architecture=sm_70", "--std=c++17"]


def test_ptx_is_read_where_a_virtual_architecture_is_asked_for(compiling):
    build.program(90)
    assert "nvrtcGetPTX" in compiling.called
    assert "nvrtcGetCUBIN" not in compiling.called


def test_it_is_compiled_once(compiling):
    first = build.program(70)
    assert build.program(70) == first
    assert len(compiling.compiled) == 1
    assert [path.name.rpartition("-")[0] for path in kept()] == ["attention-sm_70"]


@pytest.mark.parametrize("change", ["source", "version", "architecture"])
def test_another_source_version_or_card_is_compiled_anew(compiling, monkeypatch, change):
    build.program(70)
    texts = sources.texts()
    if change == "source":
        monkeypatch.setattr(sources, "texts", lambda: texts | {"tiles.cuh": texts["tiles.cuh"] + "\n"})
    if change == "version":
        other = FakeNvrtc(version=(12, 8))
        monkeypatch.setattr(build, "compilers", lambda: (Nvrtc(other),))
    build.program(75 if change == "architecture" else 70)
    assert len(kept()) == 2


def test_what_a_trial_has_found_holds_for_these_sources(monkeypatch):
    before = store._code.__wrapped__()
    monkeypatch.setattr(sources, "texts", lambda: {"tiles.cuh": "others"})
    assert store._code.__wrapped__() != before


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:20], lambda b: b"", lambda b: b[:-1] + b"?"])
def test_a_damaged_cache_is_compiled_anew_with_a_line(compiling, damage):
    first = build.program(70)
    (path,) = kept()
    path.write_bytes(damage(path.read_bytes()))
    again = build.program(70)
    assert again.image == first.image
    assert again.notes == (
        f"{path} is not used: its checksum is not that of its content. The kernels are compiled anew",
    )
    assert build.program(70).notes == ()
    assert len(compiling.compiled) == 2


def test_a_cache_that_cannot_be_written_is_said(compiling, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    program = build.program(70)
    assert program.image == compiling.image
    assert any("cannot be written: " in note and "Set FASTDEIT_CACHE=FOLDER" in note for note in program.notes)


def test_the_first_error_of_a_source_is_the_reason(compiling):
    compiling.fails["nvrtcCompileProgram"] = 6
    compiling.log = (
        b"warning: sm_70 is old\n\nattention.cu(12): error: identifier is undefined\nattention.cu(13): error"
    )
    with pytest.raises(CompileError, match=r"^attention.cu\(12\): error: identifier is undefined$"):
        build.program(70)
    assert compiling.called[-1] == "nvrtcDestroyProgram"
    assert kept() == []


def test_the_first_compiler_that_knows_the_card_is_taken(compiling, monkeypatch):
    newer = FakeNvrtc((13, 0), OF_CUDA_13)
    monkeypatch.setattr(build, "compilers", lambda: (Nvrtc(newer), Nvrtc(compiling)))
    assert [build.program(card).compiler for card in (70, 75)] == ["NVRTC 12.9", "NVRTC 13.0"]


def test_places_of_nvrtc(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "conda"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    found = [str(path) for path in build.places()]
    assert found[0] == f"{tmp_path}/conda/lib/libnvrtc.so.12"
    assert f"{tmp_path}/cuda/lib64/libnvrtc.so.13" in found
    assert found[-2:] == ["libnvrtc.so.12", "libnvrtc.so.13"]


def test_a_file_that_is_no_library_is_passed_over(tmp_path, monkeypatch):
    (tmp_path / "libnvrtc.so.12").write_text("this is not ELF")
    monkeypatch.setattr(build, "places", lambda: [tmp_path / "libnvrtc.so.12", tmp_path / "absent.so"])
    assert build.compilers.__wrapped__() == ()


# ---- what is said ----------------------------------------------------------------------------------------------------


@pytest.fixture
def v100(compiling, monkeypatch):
    """A V100 that is not there, with its driver and `compiling`."""
    monkeypatch.setattr(choice, "driver", lambda: Driver(FakeDriver()))
    monkeypatch.setattr(library, "built", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    choice.found.cache_clear()
    with pretended_card(arch=70):
        yield compiling
    choice.found.cache_clear()


def attention_row():
    return next(row for row in kernels.info() if row.name == "attention")


def test_it_is_there(v100):
    assert attention_row()[1:] == ("native", "NVRTC 12.9 compiled it for sm_70; not measured on sm_70 yet")
    assert kernels.native_status() == "available: NVRTC 12.9 compiled it for sm_70"


def no_compiler(monkeypatch, fake):
    monkeypatch.setattr(build, "compilers", lambda: ())


def newer_compiler(monkeypatch, fake):
    monkeypatch.setattr(build, "compilers", lambda: (Nvrtc(FakeNvrtc((13, 0), OF_CUDA_13)),))


def switched_off(monkeypatch, fake):
    monkeypatch.setenv(choice.VARIABLE, "0")


def no_sources(monkeypatch, fake):
    monkeypatch.setattr(sources, "_REPOSITORY", Path("/absent"))


def broken_source(monkeypatch, fake):
    fake.fails["nvrtcCompileProgram"] = 6
    fake.log = b"attention.cu(1): error: broken"


def no_driver(monkeypatch, fake):
    def missing():
        raise CudaError("the NVIDIA driver cannot be loaded: libcuda.so.1")

    monkeypatch.setattr(choice, "driver", missing)


ABSENT = [
    (
        no_compiler,
        "there is no NVRTC here, the compiler that PyTorch's wheels for CUDA bring: pip install nvidia-cuda-",
    ),
    (newer_compiler, "NVRTC 13.0 does not compile for sm_70, NVRTC 12 does: pip install nvidia-cuda-nvrtc-cu12"),
    (switched_off, "FASTDEIT_NATIVE=0 switches them off"),
    (no_sources, "the CUDA sources are not there: /absent/attention.cu; install fastdeit anew"),
]
BROKEN = [
    (broken_source, "the kernels could not be compiled for sm_70: attention.cu(1): error: broken"),
    (no_driver, "the NVIDIA driver cannot be loaded: libcuda.so.1"),
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("trouble", "reason"), ABSENT)
def test_what_is_not_there_is_said_by_info_alone(v100, monkeypatch, trouble, reason):
    trouble(monkeypatch, v100)
    row = attention_row()
    assert row.backend == "reference"
    others = "triton and fused_backward: it needs sm_80 or newer, not sm_70; hopper: it needs sm_90, not sm_70"
    assert row.reason.startswith(f"{others}; native: {reason}")
    assert kernels.native_status().startswith(f"not used here: {reason}")


def test_a_mode_that_does_not_exist_is_an_error_on_every_device(v100, monkeypatch):
    monkeypatch.setenv(choice.VARIABLE, "off")
    for device in (CARD, torch.device("cpu")):
        with pytest.raises(ChoiceError, match="FASTDEIT_NATIVE is 'off', but must be one of: auto, 0, 1"):
            OPS["attention"].select(device)


@pytest.mark.parametrize("mode", ["auto", "1", ""])
def test_the_modes_that_use_the_kernels(v100, monkeypatch, mode):
    monkeypatch.setenv(choice.VARIABLE, mode)
    assert attention_row().backend == "native"


@pytest.mark.parametrize(("trouble", "reason"), BROKEN)
def test_what_is_broken_is_said_in_one_warning(v100, monkeypatch, trouble, reason, recwarn):
    trouble(monkeypatch, v100)
    for _ in range(2):
        assert attention_row().backend == "reference"
        assert f"native: {reason}; " in attention_row().reason
        assert kernels.native_status() == f"not used here: {reason}"
    assert [str(each.message) for each in recwarn] == [f"native kernels: {reason}"]


@pytest.mark.parametrize(("trouble", "reason"), [*ABSENT, *BROKEN])
@pytest.mark.filterwarnings("ignore:native kernels")
def test_where_it_is_asked_for_by_name_the_reason_is_an_error(v100, monkeypatch, trouble, reason):
    trouble(monkeypatch, v100)
    with kernels.use(attention="native"), pytest.raises(RuntimeError) as raised:
        kernels.attention(torch.zeros(1, 5, 192, dtype=torch.float16, device=CARD), 1)
    assert f"attention=native, which cannot run on cuda:0: {reason}" in str(raised.value)


@pytest.mark.parametrize(("arch", "able"), [(70, True), (80, False), (90, False)])
def test_newer_cards_take_it_where_they_are_asked_to(compiling, monkeypatch, arch, able):
    monkeypatch.setattr(choice, "driver", lambda: Driver(FakeDriver()))
    monkeypatch.setattr(library, "built", lambda: None)
    choice.found.cache_clear()
    with pretended_card(arch=arch):
        unforced, reason = choice.capability(CARD, False)
        assert unforced is able
        assert able or reason == "they are for cards before sm_80; others run them where they are asked for by name"
        architecture = "sm_70" if arch == 70 else "compute_70"
        assert choice.capability(CARD, True) == (True, f"NVRTC 12.9 compiled it for {architecture}")
        assert (OPS["attention"].select(CARD)[0].name == "native") is able
    choice.found.cache_clear()


def test_a_card_before_volta(monkeypatch):
    monkeypatch.setattr(choice, "number", lambda device: 61)
    assert choice.capability(CARD, True) == (False, "they need sm_70 or newer, not sm_61")


def test_a_broken_cache_is_one_warning_and_the_kernels_run(v100, recwarn):
    build.program(70)
    (path,) = kept()
    path.write_bytes(b"?")
    assert attention_row().backend == "native"
    attention_row()
    (warned,) = recwarn
    assert str(warned.message).startswith(f"native kernels: {path} is not used: its checksum")


# ---- the real compiler -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_nvrtc_12_compiles_the_sources_for_volta(tmp_path, monkeypatch):
    """And every kernel that is launched by name is in the cubin."""
    monkeypatch.setenv("FASTDEIT_CACHE", str(tmp_path))
    build.compilers.cache_clear()
    try:
        program = build.program(70)
    except build.Missing as error:
        pytest.skip(f"{error}; or pip install 'fastdeit[native]'")
    finally:
        build.compilers.cache_clear()
    assert program.architecture == "sm_70"
    assert program.image.startswith(b"\x7fELF")
    names = {launch(kernel, Sizes(1, 1, 1, dim, 1.0)).name for kernel in KERNELS for dim in HEAD_DIMS}
    assert not [name for name in names if f".text.{name}\0".encode() not in program.image]
    assert build.program(70).image == program.image
    assert len(os.listdir(tmp_path / "native")) == 1
