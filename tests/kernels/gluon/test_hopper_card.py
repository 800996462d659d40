"""Attention's Gluon kernels on a card of sm_90: what the machine cannot say."""

import pytest
import torch

from fastdeit import kernels
from tests.kernels import proof
from tests.kernels.proof import repeated

pytestmark = [pytest.mark.gpu, pytest.mark.card]


@pytest.fixture(autouse=True)
def _on_hopper():
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("it needs sm_90")


def packed(dtype, batch, tokens, heads):
    return proof.normal(batch, tokens, 3 * heads * 64, dtype=dtype, device="cuda", seed=0).requires_grad_()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 16, 17, 63, 64, 65, 128, 129, 145, 192, 193, 196, 197, 198, 208])
def test_as_good_as_pytorch(dtype, tokens):
    qkv = packed(dtype, 3, tokens, 2)
    bias = torch.zeros(3 * 2 * 64, dtype=dtype, device="cuda", requires_grad=True)
    inputs = {"qkv": qkv, "num_heads": 2, "bias": bias}
    proof.prove(kernels.attention, inputs, mine=kernels.use(attention="hopper"), rounded_operands=True)


@pytest.mark.parametrize("tokens", [65, 198])
def test_every_run_has_the_same_bits(tokens):
    qkv = packed(torch.bfloat16, 64, tokens, 12)
    bias = torch.zeros(3 * 12 * 64, device="cuda", requires_grad=True)

    def run():
        with kernels.use(attention="hopper"):
            out = kernels.attention(qkv, 12, bias=bias)
            return out, *torch.autograd.grad(out.float().square().sum(), (qkv, bias))

    repeated(run, 50)
