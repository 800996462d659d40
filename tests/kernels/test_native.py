"""The backend `native` of attention on a driver in Python: what is launched, with which arguments, and what becomes of
it; and which calls are refused."""

import ctypes
import re
import subprocess
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastdeit import kernels
from fastdeit.bench.count_card import pretended_card
from fastdeit.kernels._op import OPS
from fastdeit.kernels.native import attention, build, choice, launches
from fastdeit.kernels.native.build import Program
from fastdeit.kernels.native.cuda import CudaError, Driver
from fastdeit.kernels.native.launches import KERNELS, Sizes, launch
from fastdeit.kernels.native.module import Module
from fastdeit.kernels.native.runnable import Unusable
from tests.kernels import conftest, test_native_gpu
from tests.kernels.fake_cuda import FakeDriver
from tests.kernels.proof import prove
from tests.kernels.test_attention import packed

SOURCES = Path(__file__).parents[2] / "kernels"
STREAM = 0x5EED
PROGRAM = Program(b"\x7fELF", "sm_70", "NVRTC 12.9")
prove = partial(prove, rounded_operands=True)


def native():
    return kernels.use(attention="native")


@pytest.fixture
def on_the_cpu(monkeypatch):
    """The driver on which `native` runs CPU tensors, on a stream of their own."""
    fake = FakeDriver(computes=True)
    module = Module(PROGRAM, Driver(fake))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(attention, "_run", lambda device, call: call(module, STREAM))
    op = OPS["attention"]
    able = [
        each._replace(capability=lambda device, forced: (forced, "fake")) if each.name == "native" else each
        for each in op.backends
    ]
    monkeypatch.setattr(op, "backends", tuple(able))
    return fake


@pytest.mark.parametrize(
    ("batch", "tokens", "heads", "width", "with_bias", "layout"),
    [
        (2, 5, 3, 32, True, "dense"),
        (1, 65, 2, 64, True, "expanded"),
        (3, 64, 1, 96, False, "strided"),
        (2, 130, 2, 128, True, "dense"),
    ],
)
def test_as_good_as_pytorch(on_the_cpu, batch, tokens, heads, width, with_bias, layout):
    qkv = packed("cpu", torch.float16, batch, tokens, heads, width)
    bias = torch.zeros(3 * heads * width, dtype=torch.float16, requires_grad=True) if with_bias else None
    prove(kernels.attention, {"qkv": qkv, "num_heads": heads, "bias": bias, "scale": 0.2}, layout, mine=native())
    kinds = [launched.name.removeprefix("fastdeit_attention_") for launched in on_the_cpu.launches]
    steps = [f"{name}_{width}" for name in ("forward", "query_gradient", "key_gradient")]
    assert kinds == steps + ["bias_gradient"] * with_bias
    sizes = Sizes(batch, tokens, heads, width, 0.2)
    for kernel, launched in zip(KERNELS, on_the_cpu.launches, strict=False):
        wanted = launch(kernel, sizes)
        assert launched.grid == (wanted.grid, 1, 1)
        assert launched.block == (wanted.block, 1, 1)
        assert (launched.shared, launched.stream) == (wanted.shared, STREAM)


def test_any_layout_of_qkv(on_the_cpu):
    wide = packed("cpu", torch.float16, 2, 7, 1, 64).detach().repeat_interleave(2, -1)
    beside = torch.zeros(7 * 192 + 1, dtype=torch.float16)[1:].view(1, 7, 192)  # contiguous, but not at 16 bytes
    for qkv in (wide[..., ::2], beside):
        prove(kernels.attention, {"qkv": qkv.requires_grad_(), "num_heads": 1}, mine=native())
    addresses = [at for launched in on_the_cpu.launches for at in launched.arguments[:2]]
    assert addresses
    assert not [at for at in addresses if at % 16]


def test_a_gradient_at_an_odd_address(on_the_cpu):
    qkv = packed("cpu", torch.float16, 1, 7, 1, 64)
    with native():
        out = kernels.attention(qkv, 1)
    incoming = torch.randn(7 * 64 + 1, generator=torch.Generator().manual_seed(0)).half()[1:].view(1, 7, 64)
    (grad,) = torch.autograd.grad(out, qkv, incoming)
    with kernels.use("reference"):
        (wanted,) = torch.autograd.grad(kernels.attention(qkv, 1), qkv, incoming)
    torch.testing.assert_close(grad, wanted)
    assert on_the_cpu.launches[1].arguments[2] % 16 == 0


def test_registered_op_and_saved_statistics(on_the_cpu):
    """What the reference's backward would read of a forward by `native`, and the other way round."""
    qkv = packed("cpu", torch.float16, 2, 9, 2, 32).detach()
    with native():
        out, lse = torch.ops.fastdeit.attention(qkv, 2, 0.3, None, None)
    with kernels.use("reference"):
        for mine, theirs in zip((out, lse), torch.ops.fastdeit.attention(qkv, 2, 0.3, None, None), strict=True):
            torch.testing.assert_close(mine, theirs)
    with native():
        empty = torch.ops.fastdeit.attention_backward(out, qkv, out, lse, 2, 0.3, False, None)[1]
    assert empty.shape == (0,)


REFUSED = [
    (torch.float32, (1, 5, 192), 1, None, "it computes in torch.float16, not in torch.float32"),
    (torch.bfloat16, (1, 5, 192), 1, None, "it computes in torch.float16, not in torch.bfloat16"),
    (torch.float16, (1, 5, 192), 2, None, "heads are 32 wide"),
    (torch.float16, (1, 5, 144), 1, None, "heads are 48 wide, not 32, 64, 96 or 128"),
    (torch.float16, (1, 5, 768), 1, None, "heads are 256 wide"),
    (torch.float16, (1, 0, 192), 1, None, r"qkv \[1, 0, 192\] is empty"),
    (torch.float16, (0, 5, 192), 1, None, r"qkv \[0, 5, 192\] is empty"),
    (torch.float16, (1, 5, 192), 1, torch.ones(1, 5, dtype=torch.bool), "it does not take a mask of keys"),
]


@pytest.mark.parametrize(
    ("dtype", "shape", "heads", "mask", "reason"), [row for row in REFUSED if "32 wide" not in row[4]]
)
def test_what_it_does_not_take_is_refused_by_name(on_the_cpu, dtype, shape, heads, mask, reason):
    qkv = torch.zeros(shape, dtype=dtype)
    with (
        native(),
        pytest.raises(RuntimeError, match=f"attention=native, which cannot run on these arguments: {reason}"),
    ):
        kernels.attention(qkv, heads, key_mask=mask)
    assert not on_the_cpu.launches


def test_more_blocks_than_a_grid_holds():
    with pytest.raises(attention.Unsupported, match="2147483648 blocks, at most 2147483583 fit a launch"):
        attention._checked(torch.empty(2**21, 65, 3 * 512 * 32, dtype=torch.float16, device="meta"), 512, 1.0, None)


# ---- the driver ------------------------------------------------------------------------------------------------------


def test_a_thread_without_a_context_gets_that_of_pytorch():
    fake = FakeDriver()
    driver = Driver(fake)
    driver.enter(1)
    assert fake.context == 1000 + 30 + 1
    fake.called.clear()
    driver.enter(0)
    assert fake.called == ["cuCtxGetCurrent"]


def test_a_failing_call_says_what_the_driver_says():
    fake = FakeDriver()
    driver = Driver(fake)
    fake.fails["cuModuleLoadData"] = 209
    with pytest.raises(CudaError, match=r"cuModuleLoadData: no kernel image is available \(error 209\)"):
        driver.load(b"cubin")


def test_a_driver_without_a_function():
    fake = FakeDriver()
    fake.signatures = {name: kinds for name, kinds in fake.signatures.items() if name != "cuFuncSetAttribute"}
    with pytest.raises(CudaError, match="the NVIDIA driver has no function cuFuncSetAttribute"):
        Driver(fake)


def test_a_module_is_loaded_once_on_each_device(monkeypatch):
    fake = FakeDriver()
    module = Module(PROGRAM, Driver(fake))
    tensors = [torch.zeros(8) for _ in range(3)]
    for device in (0, 0, 1):
        monkeypatch.setattr(torch.cuda, "current_device", lambda device=device: device)
        module.forward(*tensors, Sizes(1, 1, 1, 32, 1.0), 0)
    assert fake.images == [b"\x7fELF"] * 2
    assert len(fake.kernels) == 2 * len(KERNELS)
    assert len(fake.launches) == 3


@pytest.mark.parametrize("function", ["cuModuleLoadData", "cuModuleGetFunction", "cuFuncSetAttribute"])
def test_what_the_driver_does_not_load_is_unusable_before_anything_runs(monkeypatch, function):
    """`cuFuncSetAttribute` is needed by a kernel of the backward, which could not refuse."""
    fake = FakeDriver()
    fake.fails[function] = 209
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    module = Module(PROGRAM, Driver(fake))
    with pytest.raises(Unusable, match=r"the driver does not take what NVRTC 12.9 compiled: .* image is available"):
        module.forward(*[torch.zeros(8)] * 3, Sizes(1, 1, 1, 128, 1.0), 0)
    assert not fake.launches


# ---- the table of launches -------------------------------------------------------------------------------------------

_TABLE = """
#include "launch.h"
extern "C" void row(int kernel, long long batch, long long tokens, long long heads, int dim, long long *row) {
  using namespace fastdeit;
  const LaunchShape shape = launch_shape(static_cast<Kernel>(kernel), batch, tokens, heads, dim);
  row[0] = shape.grid, row[1] = shape.block, row[2] = shape.shared_bytes;
}
"""


def test_the_table_of_launches_is_that_of_the_sources(tmp_path):
    (tmp_path / "table.cpp").write_text(_TABLE)
    command = [
        "g++",
        "-std=c++17",
        "-shared",
        "-fPIC",
        "-D__host__=",
        "-D__device__=",
        f"-I{SOURCES}",
        "table.cpp",
        "-o",
        "table.so",
    ]
    subprocess.run(command, cwd=tmp_path, check=True)
    table = ctypes.CDLL(str(tmp_path / "table.so")).row
    table.argtypes = [ctypes.c_int, *[ctypes.c_longlong] * 3, ctypes.c_int, ctypes.POINTER(ctypes.c_longlong)]
    for dim in launches.HEAD_DIMS:
        for batch, tokens, heads in ((1, 1, 1), (256, 198, 12), (3, 64, 3), (7, 65, 6), (2, 1025, 16)):
            for place, kernel in enumerate(KERNELS):
                row = (ctypes.c_longlong * 3)()
                table(place, batch, tokens, heads, dim, row)
                mine = launch(kernel, Sizes(batch, tokens, heads, dim, 1.0))
                assert [mine.grid, mine.block, mine.shared] == list(row), (kernel, dim)
                assert mine.shared <= 64 * 1024  # of a block on Turing; a V100 has 96


# ---- on a card that is not there -------------------------------------------------------------------------------------


@pytest.fixture
def v100(monkeypatch):
    """A V100 with a driver that takes everything, and `native` compiled for it; (the card, the driver)."""
    fake = FakeDriver()
    monkeypatch.setattr(choice, "driver", lambda: Driver(fake))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(choice.library, "built", lambda: None)
    monkeypatch.setattr(choice.build, "program", lambda capability: PROGRAM)
    choice.found.cache_clear()
    with pretended_card(arch=70) as card:
        yield card, fake
    choice.found.cache_clear()


def test_native_is_the_choice_on_a_v100(v100):
    card, fake = v100
    backend, reason = OPS["attention"].select(torch.device("cuda", 0))
    assert (backend.name, reason) == ("native", "NVRTC 12.9 compiled it for sm_70; not measured on sm_70 yet")
    qkv = torch.zeros(2, 198, 3 * 192, dtype=torch.float16, device="cuda:0", requires_grad=True)
    bias = torch.zeros(3 * 192, device="cuda:0", requires_grad=True)
    with card.never_waited_for():
        grads = torch.autograd.grad(kernels.attention(qkv, 3, bias=bias), (qkv, bias), qkv.new_empty(2, 198, 192))
    assert [grad.shape for grad in grads] == [qkv.shape, bias.shape]
    assert [launched.grid[0] for launched in fake.launches] == [4 * 3 * 2] * 3 + [18]
    assert fake.context == 1030
    assert not card.launches  # of Triton


FP8 = [name for name in OPS if name.startswith("fp8_")]
NOT_TRITON = {"attention": "native", "query_attention": "reference", **dict.fromkeys(FP8, "reference")}
"""What runs on a V100, of the ops that do not run on Triton there."""


def test_what_is_used_for_each_op_of_a_v100(v100):
    """No row of `choices.json` decides here: at most one backend is able besides the reference."""
    rows = kernels.info()
    assert {row.name: row.backend for row in rows} == dict.fromkeys(OPS, "triton") | NOT_TRITON
    reasons = {row.name: row.reason for row in rows}
    assert reasons.pop("attention") == "NVRTC 12.9 compiled it for sm_70; not measured on sm_70 yet"
    assert reasons.pop("query_attention") == "triton: it needs sm_80 or newer, not sm_70"
    for name in FP8:
        assert reasons.pop(name).endswith(": it needs sm_89 or newer, not sm_70")
    assert all(re.fullmatch(r"Triton [\d.]+ on sm_70; not measured on sm_70 yet", why) for why in reasons.values())


def test_attention_in_fp32_runs_on_pytorch_on_a_v100(v100):
    card, fake = v100
    with pytest.warns(RuntimeWarning, match=r"attention does not run on native: it computes in torch\.float16, not in"):
        kernels.attention(torch.zeros(1, 5, 192, device="cuda:0"), 1)
    assert not fake.launches
    assert not card.launches


def test_turing_runs_its_own_code_and_newer_cards_the_ptx_of_a_v100(v100, monkeypatch):
    monkeypatch.setattr(
        choice.build, "program", lambda card: Program(b"ELF", build.target(card, (70, 75, 90)), "NVRTC")
    )
    for card, architecture in ((70, "sm_70"), (75, "sm_75"), (90, "compute_70")):
        monkeypatch.setattr(choice, "number", lambda device, card=card: card)
        assert choice.capability(torch.device("cuda", 0), True) == (True, f"NVRTC compiled it for {architecture}")


def test_the_report_of_the_tests_says_which_card_ran_whose_code(v100, monkeypatch):
    ran = test_native_gpu.what_ran("NVRTC 12.9 compiled it for compute_70", "NVIDIA H200", 90)
    assert ran == (
        "NVRTC 12.9 compiled it for compute_70, on NVIDIA H200: not a V100, so what it computes is shown, "
        "and not how fast"
    )
    assert test_native_gpu.what_ran("NVRTC 12.9 compiled it for sm_70", "Tesla V100", 70).endswith("on Tesla V100")
    written = []
    report = SimpleNamespace(user_properties=[(test_native_gpu.RAN, ran)])
    reporter = SimpleNamespace(stats={"passed": [report, report], "": [object()]}, write_line=written.append)
    conftest.pytest_terminal_summary(reporter)
    assert written == [f"native kernels: {ran}"]


def test_what_the_card_does_not_take_falls_back_once(v100):
    _, fake = v100
    fake.fails["cuModuleLoadData"] = 209
    qkv = torch.zeros(1, 5, 192, dtype=torch.float16, device="cuda:0")
    said = "the driver does not take what NVRTC 12.9 compiled: cuModuleLoadData: no kernel image is available"
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for _ in range(2):
            kernels.attention(qkv, 1)
    lines = [str(each.message) for each in warned if said in str(each.message)]
    assert lines == [f"attention does not run on native: {said} (error 209)"]
    assert said in next(row for row in kernels.info() if row.name == "attention").reason
    with native(), pytest.raises(RuntimeError, match="attention=native, which cannot run on cuda:0: the driver does"):
        kernels.attention(qkv, 1)
