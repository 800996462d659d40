import os
from dataclasses import replace
from functools import partial

import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from fastdeit.kernels import Tuning, _asked, _op
from fastdeit.kernels._triton import INTERPRETED
from tests.kernels import trials


def call_on_device(function, *args, **kwargs):
    """A call of a device function in Triton's interpreter, which puts its own functions into triton.language at every
    such call, although they have been there since the launch: a third of the time of these tests."""
    languages = {value for value in function.fn.__globals__.values() if value is tl or value is tl.core}
    if any(tl.core.is_builtin(language.load) for language in languages):
        interpreter._patch_lang(function.fn)
    return function.rewrite()(*args, **kwargs)


interpreter.InterpretedFunction.__call__ = call_on_device
# Whether an operation of integers overflows is worked out, and said only with `debug`. The checked interpreter
# (`fastdeit.kernels.lint.interpreter`) looks for itself, and says it.
interpreter.interpreter_builder.options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)


@pytest.fixture
def force(monkeypatch):
    """Sets `FASTDEIT_KERNELS` for one test; the process reads it only once."""

    def set_choice(value):
        monkeypatch.setenv(_asked.VARIABLE, value)
        _asked.environment.cache_clear()

    yield set_choice
    monkeypatch.undo()
    _asked.environment.cache_clear()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where Triton kernels run: in the interpreter on the CPU, or on a card (`pytest -m gpu`), for which a CPU that
    runs compiled kernels may stand in (`FASTDEIT_IR=90 pytest -m gpu`)."""
    if request.param == "cpu" and not INTERPRETED:
        pytest.skip("kernels are compiled, hence no interpreter; TRITON_INTERPRET=1 forces it")
    if request.param == "cuda" and not torch.cuda.is_available():
        with request.getfixturevalue("compiled")():
            yield "cpu"
    else:
        yield request.param


@pytest.fixture
def compiled():
    """`executed`, for the architecture that FASTDEIT_IR names; skips the test where none is named."""
    if (arch := os.environ.get("FASTDEIT_IR")) is None:
        pytest.skip("FASTDEIT_IR=90 (an architecture) runs compiled kernels on the CPU")
    from tests.kernels.ir import executed  # of newer versions of Triton than the oldest that is supported

    return partial(executed.executed, arch=int(arch))


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def dtype(request):
    return request.param


@pytest.fixture(params=[torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])], ids=str)
def product_dtype(request):
    """Of operands of `tl.dot`, which is wrong for bfloat16 in the interpreter."""
    return request.param


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The folder of trials in an empty cache."""
    monkeypatch.setenv("FASTDEIT_CACHE", str(tmp_path))
    return tmp_path / "kernels"


@pytest.fixture
def make(cache):
    """`make(*names)`: `trials.product`, registered for one test."""
    made = []

    def build(*names):
        made.append(trials.product(*names))
        return made[-1]

    yield build
    for op in made:
        del _op.OPS[op.name]


@pytest.fixture
def begin():
    """`begin(...)`: trials on the CPU with the clock of names; `said` has what a person reads."""
    begun = []

    def start(mode="on", **options):
        said = []
        made = Tuning(mode, trials.CPU, say=said.append, **{"clock": trials.clock} | options)
        made.said = said
        begun.append(made)
        return made

    yield start
    for made in reversed(begun):
        made.close()


def pytest_terminal_summary(terminalreporter):
    """Which card ran the native kernels, and whose code that was (`test_native_gpu.py`)."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    properties = [pair for report in reports for pair in getattr(report, "user_properties", ())]
    for said in sorted({value for name, value in properties if name == "native kernels"}):
        terminalreporter.write_line(f"native kernels: {said}")
