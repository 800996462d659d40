import pytest
import torch

from fastdeit.kernels import _op
from fastdeit.kernels._triton import INTERPRETED


@pytest.fixture
def force(monkeypatch):
    """Sets `FASTDEIT_KERNELS` for one test; the process reads it only once."""

    def set_choice(value):
        monkeypatch.setenv(_op.VARIABLE, value)
        _op._environment.cache_clear()

    yield set_choice
    monkeypatch.undo()
    _op._environment.cache_clear()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where Triton kernels run: in the interpreter on the CPU, or on a card (`pytest -m gpu`)."""
    if request.param == "cpu" and not INTERPRETED:
        pytest.skip("there is a card, hence no interpreter; TRITON_INTERPRET=1 forces it")
    return request.param


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def dtype(request):
    return request.param


@pytest.fixture(params=[torch.float32, torch.float16, *([] if INTERPRETED else [torch.bfloat16])], ids=str)
def product_dtype(request):
    """Of operands of `tl.dot`, which is wrong for bfloat16 in the interpreter."""
    return request.param
