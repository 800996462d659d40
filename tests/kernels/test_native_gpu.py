"""The native kernels on a card: on a V100 its own code, on newer ones the PTX of it, which their driver compiles."""

from functools import partial

import pytest
import torch

from fastdeit import kernels
from fastdeit.kernels.native import choice
from tests.kernels import proof
from tests.kernels.proof import poisoned, repeated
from tests.kernels.test_attention import packed

pytestmark = [pytest.mark.gpu, pytest.mark.card]
RAN = "native kernels"
prove = partial(proof.prove, rounded_operands=True)


def what_ran(origin, name, card):
    """What the report says of tests that ran what `origin` built on the card of that name."""
    other = "" if card < 75 else ": not a V100, so what it computes is shown, and not how fast"
    return f"{origin}, on {name}{other}"


@pytest.fixture(autouse=True)
def ran(record_property):
    """Says in the report of the tests what ran."""
    able, reason = choice.capability(torch.device("cuda", 0), True)
    if not able:
        pytest.skip(f"the native kernels do not run here: {reason}")
    record_property(RAN, what_ran(reason, torch.cuda.get_device_name(), choice.number(torch.device("cuda", 0))))


def native():
    return kernels.use(attention="native")


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("width", [32, 64, 96, 128])
@pytest.mark.parametrize("tokens", [*proof.TOKENS, 1025])
def test_as_good_as_pytorch(tokens, width, with_bias):
    qkv = packed("cuda", torch.float16, 3, tokens, 2, width)
    bias = torch.zeros(6 * width, dtype=torch.float16, device="cuda", requires_grad=True) if with_bias else None
    prove(kernels.attention, {"qkv": qkv, "num_heads": 2, "bias": bias}, mine=native())


def test_every_run_has_the_same_bits():
    qkv = packed("cuda", torch.float16, 64, 198, 12, 64)
    bias = torch.zeros(3 * 768, device="cuda", requires_grad=True)

    def run():
        with native(), poisoned():
            out = kernels.attention(qkv, 12, bias=bias)
            return out, *torch.autograd.grad(out.float().square().sum(), (qkv, bias))

    repeated(run, 50)


def test_the_stream_is_pytorchs_and_the_replay_of_a_graph_is_eager_mode():
    qkv = packed("cuda", torch.float16, 4, 198, 3, 64)
    bias = torch.zeros(3 * 192, device="cuda", requires_grad=True)

    def step():
        with native():
            out = kernels.attention(qkv, 3, bias=bias)
            return out, *torch.autograd.grad(out, (qkv, bias), torch.ones_like(out))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        qkv.normal_()
        for result in captured:
            result.fill_(torch.nan)
    graph.replay()
    for mine, theirs in zip(captured, step(), strict=True):
        assert torch.equal(mine, theirs)
