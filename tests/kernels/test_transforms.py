"""`torch.func`, forward-mode AD and second derivatives, of every op on every kind of backend: the result is that of
PyTorch's own operations, or there is an error. Zeros for a tangent that is not zero were the mistake to look for.
"""

import gc
import warnings
from functools import cache
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, jacrev, jvp, vjp, vmap

from fastdeit import kernels
from fastdeit.kernels import _op
from fastdeit.kernels._op import AUTO, OPS, REFERENCE, Backend
from tests.kernels.examples import every_example, few, leaves

STAND_IN = "stand-in"
FLOATING = {name: pair for name, pair in every_example().items() if hasattr(pair[0], "registered_backward")}


def forward_of(function, x, tangent):
    """(value, tangent) of `function(x)` in a level of forward-mode AD. `forward_ad.make_dual` is this and, the first
    time, seconds of compiling decompositions."""
    with forward_ad.dual_level():
        dual = torch._VF._make_dual(x, tangent, level=0)
        return tuple(forward_ad.unpack_dual(function(dual)))


def twice(function, x):
    """Gradient of a gradient's square, beside another term: a gradient that was a constant would go unnoticed."""
    x = x.detach().requires_grad_()
    (first,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad(first.square().sum() + x.sum(), x)


def twice_of_a_sum(function, x):
    """As `twice`, but that the first incoming gradient, of ones, does not itself depend on anything."""
    x = x.detach().requires_grad_()
    (first,) = torch.autograd.grad(function(x).sum(), x, create_graph=True)
    return torch.autograd.grad(first.square().sum() + x.sum(), x)


def backward_in_a_vmap(function, x):
    x = x.detach().requires_grad_()
    value = function(x)
    return vmap(lambda incoming: torch.autograd.grad(value, x, incoming, retain_graph=True)[0])(
        torch.stack([torch.ones_like(value), torch.full_like(value, 2.0)])
    )


TRANSFORMS = {
    "jvp": lambda function, x: jvp(function, (x,), (torch.full_like(x, 0.5),)),
    "forward_ad": lambda function, x: forward_of(function, x, torch.full_like(x, 0.5)),
    "vmap": lambda function, x: vmap(function)(torch.stack([x, 2 * x])),
    "vjp": lambda function, x: (lambda value, back: back(torch.ones_like(value)))(*vjp(function, x)),
    "grad": lambda function, x: grad(lambda y: function(y).square().sum())(x),
    "grad of grad": lambda function, x: grad(lambda z: grad(lambda y: function(y).square().sum())(z).sum())(x),
    "jacrev": lambda function, x: jacrev(lambda y: function(y).sum())(x),
    "create_graph": twice,
    "create_graph of a sum": twice_of_a_sum,
    "backward in a vmap": backward_in_a_vmap,
}
OF_FIRST_ORDER = {"vmap", "vjp", "grad", "jacrev"}


QUICK = "vmap", "grad", "create_graph", "create_graph of a sum"
"""The first use of others costs seconds of PyTorch's: it compiles decompositions."""


def matrix():
    """[(example, transform)]: in the default tier the first example of each op, by some transforms."""
    return [
        pytest.param(
            name, transform, marks=[] if transform in QUICK and example is op.examples[0] else pytest.mark.slow
        )
        for name, (op, example) in FLOATING.items()
        for transform in TRANSFORMS
    ]


def drawn(name):
    """(op, arguments, place of the first that is differentiated for) of an example."""
    op, example = FLOATING[name]
    torch.manual_seed(0)
    args = few(example, torch.float64)
    place = next(i for i, a in enumerate(args) if any(a is leaf for leaf in leaves(args)))
    return op, args, place


@pytest.fixture
def what_dynamo_leaves():
    """Dynamo can give up in the middle of a transform. It then leaves hooks on saved tensors refused, and objects that
    turn autograd off when they are collected, in whatever test that is: so they are collected here."""
    keys = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    with torch._C._ForceDispatchKeyGuard(*keys):
        yield
        gc.collect()
    torch._C._autograd._saved_tensors_hooks_enable()


def first(result):
    return result[0] if isinstance(result, tuple) else result


def flat(result):
    return result if isinstance(result, tuple) else (result,)


def of_one(op, args, place, run):
    """`run(*args)` as a function of the argument at that place, with one result."""
    args = [a.detach() if isinstance(a, Tensor) else a for a in args]
    return lambda x: first(run(*args[:place], x, *args[place + 1 :]))


def outcome(transform, function, x):
    """The results, or the error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of PyTorch about its slow vmap, and ours about the backend that is not taken
        try:
            return flat(TRANSFORMS[transform](function, x.detach()))
        except (RuntimeError, NotImplementedError) as error:
            return error


@cache
def expected(name, transform):
    """What the op's operations of PyTorch give, once for all backends."""
    op, args, place = drawn(name)
    return outcome(transform, of_one(op, args, place, op.native), args[place])


def stand_in(op, monkeypatch):
    """A backend that autograd cannot see through, like Triton's, made of the reference's functions."""
    reference = op.backends[-1]
    other = Backend(
        STAND_IN,
        lambda device, forced: (True, ""),
        lambda *args: hidden(reference.forward(*args)),
        lambda *args: hidden(reference.backward(*args)),
    )
    monkeypatch.setattr(op, "backends", (other, reference))


def hidden(result):
    """New tensors of the same values, which have neither history nor tangent; like a kernel, it takes no wrapper."""
    if isinstance(result, tuple):
        return tuple(map(hidden, result))
    if result is None:
        return None
    assert result.data_ptr() or not result.numel()
    return torch.from_numpy(result.detach().numpy().copy())


@pytest.mark.parametrize(("name", "transform"), matrix())
@pytest.mark.parametrize("backend", [AUTO, REFERENCE, STAND_IN, f"{STAND_IN}, unforced"])
def test_right_or_refused(name, backend, transform, monkeypatch):
    op, args, place = drawn(name)
    if STAND_IN in backend:
        stand_in(op, monkeypatch)
    with kernels.use(**{op.name: AUTO if "unforced" in backend else backend}):
        mine = outcome(transform, of_one(op, args, place, op), args[place])
    if transform in OF_FIRST_ORDER and (backend == AUTO or "unforced" in backend):
        assert isinstance(mine, tuple), mine
    if isinstance(mine, tuple):
        torch.testing.assert_close(mine, expected(name, transform))


def compiled_matrix():
    """[(example, backend, transform)]: all pairs for the first example of each op, one pair in turn for the others.
    PyTorch takes a second to compile a case."""
    pairs = list(product((AUTO, REFERENCE), ("jvp", "vmap", "grad")))
    return [
        (name, *pair)
        for i, (name, (op, example)) in enumerate(FLOATING.items())
        for pair in (pairs if example is op.examples[0] else pairs[i % len(pairs) :][:1])
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("what_dynamo_leaves")
@pytest.mark.parametrize(("name", "backend", "transform"), compiled_matrix())
def test_right_or_refused_when_compiled(name, backend, transform):
    torch.compiler.reset()
    op, args, place = drawn(name)
    mine = of_one(op, args, place, op)
    compiled = torch.compile(lambda x: TRANSFORMS[transform](mine, x), backend="aot_eager", fullgraph=True)
    with kernels.use(**{op.name: backend}):
        try:
            found = flat(compiled(args[place].detach()))
        except (RuntimeError, NotImplementedError):
            return
    torch.testing.assert_close(found, expected(name, transform))


@pytest.mark.slow
@pytest.mark.usefixtures("what_dynamo_leaves")
def test_a_compiled_jvp_of_a_forced_op_raises():
    torch.compiler.reset()
    x, weights = torch.randn(2, 4), [torch.randn(6, 4), torch.randn(6), torch.randn(4, 6), torch.randn(4)]

    def tangent(x):
        return jvp(lambda y: kernels.mlp(y, *weights), (x,), (torch.ones_like(x),))[1]

    compiled = torch.compile(tangent, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), tangent(x))
    with kernels.use("reference"), pytest.raises(RuntimeError):
        compiled(x)


@pytest.mark.parametrize("transform", ["forward_ad", "vmap", "grad"])
@pytest.mark.parametrize("backend", [REFERENCE, STAND_IN])
def test_why_a_forced_op_is_refused(backend, transform, monkeypatch):
    op, ones = OPS["layer_norm"], torch.ones(2, 8)
    stand_in(op, monkeypatch)
    with kernels.use(layer_norm=backend):
        error = outcome(transform, lambda x: kernels.add_layer_norm(x, None, ones[0], ones[0])[1], ones)
    assert isinstance(error, _op.ChoiceError)
    assert f"use() asks for layer_norm={backend}, which cannot run inside torch.func or forward-mode AD" in str(error)


def test_a_backend_that_is_left_aside_is_warned_of_once(monkeypatch):
    op = OPS["layer_norm"]
    stand_in(op, monkeypatch)
    _op._warn_once.cache_clear()
    ones = torch.ones(2, 8)
    with pytest.warns(RuntimeWarning, match=r"layer_norm does not run on stand-in: it cannot run inside torch\.func"):
        vmap(lambda x: kernels.add_layer_norm(x, None, ones[0], ones[0])[1])(ones[None])


@pytest.mark.parametrize("form", ["attention", "add_layer_norm"])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_the_gradient_of_a_bias_that_is_contained_under_vmap(form):
    """Per-sample gradients, as differential privacy and influence functions take them."""
    torch.manual_seed(0)
    x, bias, ones = torch.randn(3, 2, 4, 12), torch.zeros(12), torch.ones(12)

    def loss(bias, sample):
        if form == "attention":
            return kernels.attention(sample + bias.detach(), 2, bias=bias).square().sum()
        return kernels.add_layer_norm(sample, sample + bias.detach(), ones, ones, branch_bias=bias)[1].pow(3).sum()

    mine = vmap(grad(loss), in_dims=(None, 0))(bias, x)
    for i, sample in enumerate(x):
        leaf = bias.clone().requires_grad_()
        (expected,) = torch.autograd.grad(loss(leaf, sample), leaf)
        torch.testing.assert_close(mine[i], expected)
        assert expected.any()


@pytest.mark.parametrize(("backend", "error"), [(AUTO, RuntimeError), (REFERENCE, _op.ChoiceError)])
def test_ops_without_a_gradient_are_refused(backend, error):
    """PyTorch has no batching rule for norms of lists, nor for results that are given (`out=`)."""
    images, numbers = torch.zeros(1, 4, 4, 3, dtype=torch.uint8), {"mean": [0.5] * 3, "std": [1.0] * 3}
    with kernels.use(backend):
        norm = outcome("vmap", lambda x: kernels.global_norm([x]), torch.ones(4))
        patches = outcome("vmap", lambda i: kernels.patchify(i, patch_size=2, **numbers), images)
    assert isinstance(norm, error)
    assert isinstance(patches, error)
