"""What a backward keeps from its forward goes through hooks on saved tensors: activation checkpointing, offloading,
parameters that are freed in between. Each op on each backend gives the gradients that it gives without them.

What is saved, and how it is read, is the same for all backends of an op but the reference. So a stand-in for them, the
reference's own functions, is enough for most runs; Triton's follow in the slow tier.
"""

import math

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from fastdeit import kernels
from fastdeit.kernels._op import AUTO, REFERENCE, Backend
from tests.kernels.examples import ONLY_FLOAT16, REFUSED, every_example, few, leaves
from tests.kernels.test_optimizer import interpreted

STAND_IN = "stand-in"
NEEDS_A_CARD = {"quack", "native", "hopper", "efficient", "cudnn", "fa3", "fa4"}
CALLS = {
    f"{name}-{backend}": (op, example, backend)
    for name, (op, example) in every_example().items()
    if hasattr(op, "registered_backward")
    for backend in (AUTO, STAND_IN, *(b.name for b in op.backends if b.name not in NEEDS_A_CARD))
    if (op.name, backend, example.name) not in REFUSED
}


def parameter(name):
    """A test of one call: slow where it is Triton's."""
    backend = CALLS[name][2]
    if backend in (AUTO, STAND_IN, REFERENCE, "flash"):
        return name
    return pytest.param(name, marks=[pytest.mark.slow, *interpreted(name).marks])


@pytest.fixture(params=[parameter(name) for name in CALLS])
def call(request, monkeypatch):
    """(function of nothing that calls an op on one backend, the arguments that require a gradient)."""
    op, example, backend = CALLS[request.param]
    torch.manual_seed(0)
    args = few(example, torch.float16 if backend in ONLY_FLOAT16 else torch.float32)
    if backend == STAND_IN:
        reference = op.backends[-1]
        other = Backend(STAND_IN, lambda device, forced: (True, ""), reference.forward, reference.backward)
        monkeypatch.setattr(op, "backends", (other, reference))

    def forward():
        with kernels.use(**{op.name: backend}):
            result = op(*args)
        return result if isinstance(result, tuple) else (result,)

    places = [place for place, result in enumerate(forward()) if result is not None and result.requires_grad]

    def run():
        results = forward()
        return tuple(results[place] for place in places)

    return run, leaves(args)


def gradients(function, free):
    return torch.autograd.grad([t.float().square().sum() for t in function()], free, allow_unused=True)


def checkpointed(run, use_reentrant=False):
    """Reentrant checkpointing asks for an argument that requires a gradient."""
    trigger = torch.ones((), requires_grad=True)
    return checkpoint(lambda _: run(), trigger, use_reentrant=use_reentrant)


def once(run):
    """Each saved tensor is handed out a single time, as a copy."""
    handed_out = []

    def unpack(packed: tuple[Tensor]) -> Tensor:
        assert not any(packed is other for other in handed_out), "a saved tensor is unpacked twice"
        handed_out.append(packed)
        return packed[0]

    with saved_tensors_hooks(lambda tensor: (tensor.detach().clone(),), unpack):
        return run()


def offloaded(run):
    with save_on_cpu():
        return run()


WAYS = {
    "each once": once,
    "checkpoint": checkpointed,
    "checkpoint in a checkpoint": lambda run: checkpointed(lambda: checkpointed(run)),
    "save_on_cpu": offloaded,
    "checkpoint, offloaded": lambda run: offloaded(lambda: checkpointed(run)),
}


def assert_equal(mine, theirs, name):
    for one, other in zip(mine, theirs, strict=True):
        assert (one is None) == (other is None), name
        assert one is None or torch.equal(one, other), name


def test_gradients_under_hooks_are_those_without(call):
    run, free = call
    expected = gradients(run, free)
    for name, way in WAYS.items():
        assert_equal(gradients(lambda way=way: way(run), free), expected, name)


def test_reentrant_checkpoint(call):
    """It calls `backward` inside a backward, hence fills `grad` instead of returning gradients."""
    run, free = call
    expected = gradients(run, free)
    sum(t.float().square().sum() for t in checkpointed(run, use_reentrant=True)).backward()
    assert_equal([leaf.grad for leaf in free], expected, "reentrant checkpoint")


def test_parameters_may_be_freed_between_forward_and_backward(call):
    """As FSDP does, which gathers them again before the backward: what is saved is the parameter, no copy of it."""
    run, free = call
    expected = gradients(run, free)
    results = run()
    kept = [leaf.detach().clone() for leaf in free]
    for leaf in free:
        leaf.untyped_storage().resize_(0)
    for leaf, value in zip(free, kept, strict=True):
        leaf.untyped_storage().resize_(math.prod(leaf.shape) * leaf.itemsize)
        with torch.no_grad(), torch.autograd._unsafe_preserve_version_counter(leaf):
            leaf.copy_(value)
    assert_equal(gradients(lambda: results, free), expected, "freed in between")


@pytest.mark.parametrize("backend", [AUTO, REFERENCE, interpreted("triton")])
def test_a_branch_of_which_only_the_shape_is_wanted_is_not_saved(backend):
    """Its memory would be kept, and `save_on_cpu` would write all of what is one element."""
    saved = []
    residual, branch = torch.zeros(2, 3, 8, requires_grad=True), torch.zeros(2, 3, 8, requires_grad=True)
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t), kernels.use(backend):
        kernels.add_layer_norm(residual, branch, torch.ones(8), torch.ones(8))
    assert sum(t.shape == residual.shape for t in saved) == 1
    assert all(0 not in t.stride() for t in saved)
