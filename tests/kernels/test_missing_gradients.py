"""A result that nobody differentiates has no gradient. Each op takes that for what it is: its gradients are those of
native autograd, None included, and no zeros are made to stand for what did not come."""

from itertools import compress, product

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastdeit import kernels
from fastdeit.kernels._op import REFERENCE
from tests.kernels.examples import every_example, few, leaves
from tests.kernels.test_optimizer import interpreted

OPS = {name: pair for name, pair in every_example().items() if hasattr(pair[0], "registered_backward")}
BACKENDS = REFERENCE, "triton"


class Calls(TorchDispatchMode):
    """Names of PyTorch's operations inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def is_there(gradient):
    return gradient is not None


def results_of(function, args):
    results = function(*args)
    return [t for t in (results if isinstance(results, tuple) else (results,)) if t is not None and t.requires_grad]


class _Dropped(torch.autograd.Function):
    """Its value, and no gradient at all."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


def gradients(ends, free):
    """Each end is weighted by numbers of its own."""
    weights = [torch.linspace(-1, 1, t.numel()).view(t.shape) for t in ends]
    return torch.autograd.grad(ends, free, weights, retain_graph=True, allow_unused=True)


@pytest.mark.parametrize("backend", [BACKENDS[0], interpreted(BACKENDS[1])])
@pytest.mark.parametrize("name", OPS)
def test_gradients_of_every_subset_of_results(name, backend):
    torch.manual_seed(0)
    op, example = OPS[name]
    args = few(example)
    free = leaves(args)
    with kernels.use(backend):
        results = results_of(op, args)
    expected = results_of(op.native, args)[: len(results)]
    for wanted in product((True, False), repeat=len(results)):
        chosen = [t if wants else _Dropped.apply(t) for t, wants in zip(results, wanted, strict=True)]
        with Calls() as calls:
            mine = gradients(chosen, free)
        theirs = [None] * len(free)
        if any(wanted):
            theirs = gradients(list(compress(expected, wanted)), free)
        assert [g is None for g in mine] == [g is None for g in theirs], wanted
        torch.testing.assert_close([*filter(is_there, mine)], [*filter(is_there, theirs)], rtol=1e-4, atol=1e-5)
        # Samples that are not normalised have no gradient but that of the stream.
        assert not {"zeros", "zeros_like", "zero_", "new_zeros"} & set(calls.names) or "skipped samples" in name
