"""Pixel operations in C++ make the bytes that numpy and Pillow make, and are left out where they cannot be used."""

import ctypes
import pkgutil
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastdeit.data import compiled, pixel_ops
from fastdeit.data.execute import render
from fastdeit.data.plan import plan, policy
from fastdeit.kernels import _host_pixels
from fastdeit.kernels import input as kernel_input
from tests.data import parity

ROOT = Path(__file__).parents[2]
COMPILED = [op for op in pixel_ops.PIXEL_OPS if op.compiled is not None]
SIZES = (1, 1), (1, 9), (7, 2), (3, 3), (5, 120), (131, 4), (224, 224)
BLEND, SHEAR, SHIFT = (0.0, 0.37, 1.0, 1.9), (0.27, -0.3, 0.99, -3.0), (0.27, 10.5, -100.7, 300.0)
VALUES = {"blur": (0.0, 0.1, 0.7, 1.38, 1.4142, 2.0, 4.3), "grayscale": (0.0,)}
for name in ("color", "contrast", "brightness", "sharpness"):
    VALUES[name] = BLEND
for axis in "xy":
    VALUES |= {f"shear_{axis}": SHEAR, f"translate_{axis}": SHIFT}

there = pytest.mark.skipif(compiled.missing() is not None, reason=f"{compiled.missing()}")


def pictures(size):
    """Noise, and black and white noise, whose differences are the largest there are."""
    levels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    return levels, (levels & 1) * np.uint8(255)


def without_library(monkeypatch):
    monkeypatch.setattr(compiled, "missing", lambda: "it was left out")


@there
@pytest.mark.parametrize("op", COMPILED, ids=lambda op: op.name)
def test_an_operation_has_the_bytes_of_its_form_in_numpy(op):
    for size in SIZES:
        for picture in pictures(size):
            forms = (picture, picture[..., :1].copy()) if op.takes_grey else (picture,)
            for image in forms:
                before = image.copy()
                for value in map(float, np.float32(VALUES[op.name])):
                    made, wanted = op.compiled(image, value), op.cpu(image, value)
                    assert made.dtype == np.uint8
                    assert np.array_equal(made, wanted), (size, value)
                assert np.array_equal(image, before)


@there
def test_every_level_is_blended_alike():
    """The roundings of 32-bit floats, one by one: a product that is added to without one has other bytes."""
    levels = np.arange(256, dtype=np.uint8)
    image = np.stack((*np.meshgrid(levels, levels), np.zeros((256, 256), np.uint8)), -1)
    for factor in map(float, np.random.default_rng(0).uniform(0, 2, 40).astype(np.float32)):
        for name in ("color", "brightness", "contrast"):
            op = next(op for op in COMPILED if op.name == name)
            assert np.array_equal(op.compiled(image, factor), op.cpu(image, factor)), (name, factor)


@there
def test_values_beyond_those_of_plans_do_no_harm():
    """The library is not asked for what it has no memory, no time or no integers for."""
    image = pictures((9, 11))[0]
    for op in COMPILED:
        beyond = (1e9,) if op.name == "blur" else (-1e30, -40.0, 40.0, 1e30)
        for value in beyond if op.words else ():
            with np.errstate(invalid="raise"):
                made = op.compiled(image, value)
            with np.errstate(invalid="ignore", over="ignore"):
                assert np.array_equal(made, op.cpu(image, value)), (op.name, value)
        for value in (np.nan, np.inf, -np.inf):
            with pytest.raises(ValueError, match=f"its value is {value}, but must be finite"):
                op.run(image, value)


@there
@pytest.mark.parametrize("size", [(0, 5), (5, 0)])
def test_nothing_is_read_or_written_of_a_picture_without_pixels(size, monkeypatch):
    image, called = np.empty((*size, 3), np.uint8), []
    library = compiled._library()
    names = [f"fastdeit_{name}" for name in compiled._ARGUMENTS if name not in ("grey", "three", "sum")]
    counted = {name: lambda *_, name=name: called.append(name) for name in names}
    monkeypatch.setattr(compiled, "_library", lambda: SimpleNamespace(**{**vars(library), **counted}))
    assert render.flipped(image).shape == image.shape
    for op in COMPILED:
        if op.name not in ("contrast", "grayscale"):  # there is no mean, and nothing beside the pixels themselves
            assert op.compiled(image, 1.0).shape == image.shape
    assert called == []


@there
@pytest.mark.parametrize("size", SIZES)
def test_flips_and_channels_are_those_of_numpy(size, monkeypatch):
    image = pictures(size)[0]
    wide = np.concatenate((image, image), 1)[:, : size[1]]  # rows that do not lie one after the other
    made = render.flipped(wide), pixel_ops.three(image[..., :1])
    without_library(monkeypatch)
    assert np.array_equal(made[0], render.flipped(wide))
    assert np.array_equal(made[0], image[:, ::-1])
    assert np.array_equal(made[1], pixel_ops.three(image[..., :1]))


def test_libraries_are_no_modules():
    """Whoever walks through the package would import them."""
    folders = [str(ROOT / "fastdeit" / name) for name in ("data", "kernels")]
    found = {module.name for module in pkgutil.iter_modules(folders)}
    assert found == {path.stem for folder in folders for path in Path(folder).glob("*.py")} - {"__init__"} | {
        path.parent.name for folder in folders for path in Path(folder).glob("*/__init__.py")
    }


@there
def test_the_library_is_used_where_it_is_there(monkeypatch):
    image, kind = pictures((9, 9))[0], np.array([pixel_ops.KINDS.index("blur")])
    blurs = []
    monkeypatch.setattr(pixel_ops, "blurred", None)
    op = next(op for op in COMPILED if op.name == "blur")
    monkeypatch.setitem(vars(op), "cpu", lambda image, value: blurs.append(value) or image)
    pixel_ops.apply(image, kind, np.float32([1]))
    assert blurs == []
    without_library(monkeypatch)
    pixel_ops.apply(image, kind, np.float32([1]))
    assert blurs == [1]


REASONS = {
    "no file": "there is no {library}, which `pip install` makes where it finds a C++ compiler that works",
    "no library": "{library} cannot be used: ",
    "another library": "{library} cannot be used: ",
    "another source": "{library} was made before {source} was changed; run `pip install` again",
}


def planted(there, library, source, folder):
    """(library, source) in `folder` of which the library cannot be used, named as those that can."""
    planted = folder / library.name, folder / source.name
    if there == "no library":
        planted[0].write_text("not ELF")
    elif there == "another library":
        shutil.copy(torch._C.__file__, planted[0])
    elif there == "another source":
        if not library.exists():
            pytest.skip(f"there is no {library.name}")
        shutil.copy(library, planted[0])
        planted[1].write_text("// changed")
    return planted


@pytest.mark.parametrize("there", REASONS)
def test_a_library_that_cannot_be_used_is_left_out_with_a_reason(there, tmp_path, monkeypatch):
    library, source = planted(there, compiled.LIBRARY, compiled.SOURCE, tmp_path)
    reason = REASONS[there].format(library="pixels.compiled.so", source="pixels.cpp")
    monkeypatch.setattr(compiled, "LIBRARY", library)
    monkeypatch.setattr(compiled, "SOURCE", source)
    assert compiled.missing.__wrapped__().startswith(reason)
    monkeypatch.setattr(compiled, "missing", compiled.missing.__wrapped__)
    assert compiled.status().startswith(f"numpy and Pillow: {reason}")
    image = pictures((5, 7))[0]
    assert np.array_equal(render.flipped(image), image[:, ::-1])


@pytest.mark.parametrize("there", REASONS)
def test_the_backend_of_a_cpu_says_why_its_library_is_left_out(there, tmp_path, monkeypatch):
    library, source = planted(there, _host_pixels._LIBRARY, _host_pixels._SOURCE, tmp_path)
    reason = REASONS[there].format(library="_host_pixels.compiled.so", source="_host_pixels.cpp")
    monkeypatch.setattr(_host_pixels, "_LIBRARY", library)
    monkeypatch.setattr(_host_pixels, "_SOURCE", source)
    monkeypatch.setattr(_host_pixels, "_opened", _host_pixels._opened.__wrapped__)
    assert _host_pixels.library() is None
    runs, why = kernel_input._host_capability(torch.device("cpu"), forced=False)
    assert runs
    assert why.startswith(f"sample by sample in the cache, by numpy: {reason}")


@pytest.mark.slow
@pytest.mark.parametrize("compiler", ["c++", "false"])
def test_an_installation_compiles_them_or_goes_on_without(compiler, tmp_path):
    """As pip does it: a compiler that fails, or is not there, costs the operations their speed and nothing else."""
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not here")
    libraries = {"data/pixels.compiled.so", "kernels/_host_pixels.compiled.so"}
    for path in (tmp_path / "fastdeit" / name for name in libraries):
        path.parent.mkdir(parents=True)
        path.write_text("of an earlier installation, and newer than the sources")
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)]
    environment = {"PATH": "/usr/bin:/bin", "CC": compiler, "CXX": compiler}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    made = {str(path.relative_to(tmp_path / "fastdeit")): path for path in tmp_path.rglob("fastdeit/**/*.so")}
    assert made.keys() == (libraries if compiler == "c++" else set())
    for path in made.values():
        ctypes.CDLL(str(path))


@there
@pytest.mark.parametrize("augment", ["rand-m9-mstd0.5-inc1", "three_augment"])
def test_a_batch_has_the_same_pictures_with_and_without_the_library(augment, monkeypatch):
    """From decoded files on, with the crop and the flips of the plan."""
    size = (40, 48)
    simple = augment == "three_augment"
    drawn = policy.parse(augment, size, color_jitter=0.3 if simple else None)
    drawn = plan.Augment(size=size, crop="simple" if simple else "random_resized", policy=drawn)
    batch = parity.planned(parity.photographs() * 8, drawn)
    made = parity.on_cpu(size)(batch)
    without_library(monkeypatch)
    assert np.array_equal(made, parity.on_cpu(size)(batch))
