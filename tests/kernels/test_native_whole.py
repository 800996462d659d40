"""The whole backend on the CPU: the op, the calls of the C API, and the shipped kernels on the shim of `native/`."""

from functools import partial

import pytest
import torch

from fastdeit import kernels
from fastdeit.kernels._op import OPS
from fastdeit.kernels.native import attention
from fastdeit.kernels.native.library import Library
from tests.kernels import proof
from tests.kernels.test_attention import packed

pytestmark = pytest.mark.slow
HEAD_DIM = 64
prove = partial(proof.prove, rounded_operands=True)


class OnTheShim:
    """A `Runnable` of the library of the shim, which kernels let touch only what it was told of."""

    def __init__(self, folder):
        from tests.kernels.native import simt  # which needs a compiler

        self.simt = simt
        self.shim = simt.built(folder, head_dims=(HEAD_DIM,)).library
        self.library = Library(folder / "kernels.so")
        self.writers = []

    def _tell(self, read, written):
        self.shim.simt_forget_regions()
        self.writers = [self.simt.writers(tensor.nbytes) for tensor in written if tensor is not None]
        for tensor in read:
            self.simt.named(self.shim, "input", tensor.data_ptr(), tensor.nbytes)
        there = [tensor for tensor in written if tensor is not None]
        for tensor, writers in zip(there, self.writers, strict=True):
            self.simt.named(self.shim, "output", tensor.data_ptr(), tensor.nbytes, writers)

    def forward(self, qkv, out, lse, sizes, stream):
        self._tell([qkv], [out, lse])
        self.library.forward(qkv, out, lse, sizes, stream)

    def backward(self, tensors, sizes, stream):
        self._tell(tensors[:4], tensors[4:])
        self.library.backward(tensors, sizes, stream)


@pytest.fixture(scope="module")
def runnable(tmp_path_factory):
    return OnTheShim(tmp_path_factory.mktemp("shim"))


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize(("batch", "tokens", "heads"), [(2, 5, 3), (1, 70, 2)])
def test_as_good_as_pytorch(runnable, monkeypatch, batch, tokens, heads, with_bias):
    monkeypatch.setattr(attention, "_run", lambda device, call: call(runnable, 0))
    op = OPS["attention"]
    able = [
        each._replace(capability=lambda device, forced: (forced, "the shim")) if each.name == "native" else each
        for each in op.backends
    ]
    monkeypatch.setattr(op, "backends", tuple(able))
    qkv = packed("cpu", torch.float16, batch, tokens, heads, HEAD_DIM)
    bias = torch.zeros(3 * heads * HEAD_DIM, dtype=torch.float16, requires_grad=True) if with_bias else None
    given = {"qkv": qkv, "num_heads": heads, "bias": bias, "scale": 0.2}
    prove(kernels.attention, given, mine=kernels.use(attention="native"))
