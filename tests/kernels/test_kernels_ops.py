"""What every op promises: a sound registration, compilation to one graph, exact gradients, the autocast dtype."""

import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from updates import UPDATES

from fastdeit import kernels
from fastdeit.kernels._op import OPS, Op

B, N, C, H, F, K = 2, 5, 8, 2, 12, 7
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]
SETTINGS = {
    "none": (0.1, "ce", "none", 0.5, 1.0, "numel"),
    "hard": (0.1, "ce", "hard", 0.3, 1.0, "numel"),
    "soft": (0.0, "bce", "soft", 0.3, 3.0, "numel"),
    "batchmean": (0.0, "ce", "soft", 0.3, 3.0, "batchmean"),
}


def rand(*shape, dtype=torch.float64, grad=True):
    """A seed gives the same values in float32 and float64."""
    return torch.randn(*shape).to(dtype).requires_grad_(grad)


def norm_args(dtype, gamma=False, keep=False, skip=False):
    x, branch = rand(B, N, C, dtype=dtype), rand(B - skip, N, C, dtype=dtype)
    optional = [rand(C, dtype=dtype) if gamma else None, torch.tensor([0.0, 1.25])[skip:] if keep else None]
    optional += [None, torch.tensor([1]), torch.tensor([0])] if skip else [None] * 3
    return [x, branch, rand(C, dtype=dtype), rand(C, dtype=dtype), 1e-6, *optional, dtype]


def plain_norm_args(dtype):
    return [rand(B, N, C, dtype=dtype), rand(C, dtype=dtype), rand(C, dtype=dtype), 1e-6, dtype]


def mlp_args(dtype):
    return [rand(F, C, dtype=dtype), rand(F, dtype=dtype), rand(C, F, dtype=dtype), rand(C, dtype=dtype)]


def loss_args(dtype, kind):
    distilled = kind != "none"
    logits = [rand(4, K, dtype=dtype), rand(4, K, dtype=dtype) if distilled else None]
    targets = [torch.tensor([0, 6, 2, 3]), torch.tensor([1, 6, 5, 0]), torch.tensor([0.3, 0.6, 1.0, 0.0])]
    return [*logits, *targets, rand(4, K, dtype=dtype, grad=False) if distilled else None, *SETTINGS[kind], True]


def cosub_args(dtype, smoothing, binarise):
    targets = [torch.tensor([0, 6, 2]), torch.tensor([1, 6, 5]), torch.tensor([0.3, 0.6, 1.0])]
    return [rand(6, K, dtype=dtype), *targets, smoothing, binarise, True]


class Case(NamedTuple):
    """A differentiable op and a builder of its arguments in a dtype."""

    op: Op
    build: Callable


CASES = {
    "attention": Case(OPS["attention"], lambda dtype: [rand(B, N, 3 * C, dtype=dtype), H, 0.3, None]),
    "query_attention": Case(
        OPS["query_attention"], lambda dtype: [rand(B, 2, C, dtype=dtype), rand(B, N, 2 * C, dtype=dtype), H, 0.3]
    ),
    "layer_norm": Case(OPS["layer_norm"], plain_norm_args),
    "add_layer_norm": Case(OPS["add_layer_norm"], norm_args),
    "add_layer_norm-gamma": Case(OPS["add_layer_norm"], lambda dtype: norm_args(dtype, gamma=True)),
    "add_layer_norm-keep": Case(OPS["add_layer_norm"], lambda dtype: norm_args(dtype, keep=True)),
    "add_layer_norm-skip": Case(OPS["add_layer_norm"], lambda dtype: norm_args(dtype, skip=True)),
    "add_layer_norm-all": Case(OPS["add_layer_norm"], lambda dtype: norm_args(dtype, True, True, True)),
    "mlp": Case(OPS["mlp"], lambda dtype: [rand(B, N, C, dtype=dtype), *mlp_args(dtype), True]),
    "mlp-kept": Case(OPS["mlp"], lambda dtype: [rand(B, N, C, dtype=dtype), *mlp_args(dtype), False]),
    "layer_norm_mlp": Case(OPS["layer_norm_mlp"], lambda dtype: [*plain_norm_args(dtype)[:4], *mlp_args(dtype), True]),
    "layer_norm_mlp-kept": Case(
        OPS["layer_norm_mlp"], lambda dtype: [*plain_norm_args(dtype)[:4], *mlp_args(dtype), False]
    ),
    **{
        f"distillation_loss-{kind}": Case(OPS["distillation_loss"], lambda dtype, kind=kind: loss_args(dtype, kind))
        for kind in SETTINGS
    },
    "cosub_loss": Case(OPS["cosub_loss"], lambda dtype: cosub_args(dtype, 0.1, False)),
    "cosub_loss-binary": Case(OPS["cosub_loss"], lambda dtype: cosub_args(dtype, 0.0, True)),
}


@pytest.fixture(params=CASES)
def case(request):
    torch.manual_seed(0)
    return CASES[request.param]


def leaves(args):
    return [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]


def differentiable(result):
    result = result if isinstance(result, tuple) else (result,)
    return [t for t in result if t.requires_grad]


def reference_results(case, args):
    """The results of the reference that the registered op differentiates, too."""
    count = len(differentiable(case.op.registered(*args)))
    result = case.op.backends[-1].forward(*args)
    return list(result if isinstance(result, tuple) else (result,))[:count]


def image_args(**changes):
    args = {
        "mean": MEAN,
        "std": STD,
        "partner": torch.tensor([1, 0]),
        "lam": torch.tensor([0.3, 1.0]),
        "box": torch.tensor([[0, 0, 0, 0], [1, 0, 3, 2]], dtype=torch.int32),
        "erase": (torch.tensor([[0, 1, 2, 4], [0, 0, 0, 0]], dtype=torch.int32), torch.tensor([7, -9])),
    }
    return torch.arange(2 * 4 * 6 * 3, dtype=torch.uint8).reshape(2, 4, 6, 3), args | changes


def flat_image_args(*between):
    images, args = image_args()
    return (images, *between, MEAN, STD, args["partner"], args["lam"], args["box"], *args["erase"], torch.float32)


def optimizer_lists():
    params, grads, exp_avgs, exp_avg_sqs = ([torch.randn(3, 4), torch.randn(5)] for _ in range(4))
    return params, grads, exp_avgs, [t.abs() for t in exp_avg_sqs]


def optimizer_args():
    scale, found = torch.tensor(0.5), torch.tensor(0.0)
    step, lr = torch.tensor(3.0), torch.tensor(1e-2)
    lists = optimizer_lists()
    copies = [p.bfloat16() for p in lists[0]]
    numbers = 0.9, 0.99, 1e-8, 0.1
    return (*lists, step, lr, *numbers, scale, found, [p.clone() for p in lists[0]], 0.9, copies)


def sgd_args():
    params, grads, buffers, *_, scale, found, ema, decay, copies = optimizer_args()
    return params, grads, buffers, torch.tensor(1e-2), 0.9, True, False, 0.1, scale, found, ema, decay, copies


OTHER_OPS = {
    "pixels": lambda: (OPS["pixels"], flat_image_args()),
    "patchify": lambda: (OPS["patchify"], flat_image_args(2)),
    "global_norm": lambda: (OPS["global_norm"], (optimizer_lists()[0],)),
    "fused_adamw": lambda: (OPS["fused_adamw"], optimizer_args()),
    "fused_lamb": lambda: (OPS["fused_lamb"], optimizer_args()),
    "fused_sgd": lambda: (OPS["fused_sgd"], sgd_args()),
}


def test_every_op_is_checked():
    assert {case.op.name for case in CASES.values()} | OTHER_OPS.keys() == OPS.keys()


def test_opcheck(case):
    torch.library.opcheck(case.op.registered, case.build(torch.float32))


def test_opcheck_of_backward(case, monkeypatch):
    seen = []
    registered = case.op.registered_backward
    monkeypatch.setattr(case.op, "registered_backward", lambda *args: seen.append(args) or registered(*args))
    sum(t.sum() for t in differentiable(case.op.registered(*case.build(torch.float32)))).backward()
    (args,) = seen
    torch.library.opcheck(registered, [a.detach() if isinstance(a, torch.Tensor) else a for a in args])


@pytest.mark.parametrize("name", OTHER_OPS)
def test_opcheck_without_gradient(name):
    torch.manual_seed(0)
    op, args = OTHER_OPS[name]()
    torch.library.opcheck(op.registered, args)


def test_gradients_are_those_of_the_formula(case):
    """Finite differences in float64 through the registered op."""
    if case.op.name == "cosub_loss":
        pytest.skip("it holds predictions constant, which finite differences do not: see test_kernels_cosub.py")
    args = case.build(torch.float64)
    free = leaves(args)

    def function(*values):
        values = iter(values)
        given = [next(values) if isinstance(a, torch.Tensor) and a.requires_grad else a for a in args]
        return tuple(differentiable(case.op.registered(*given)))

    assert torch.autograd.gradcheck(function, free)


@pytest.mark.parametrize("layout", ["dense", "expanded", "transposed"])
def test_backward_is_the_references(case, layout):
    """The explicit backward equals autograd of the reference, whatever the strides of the incoming gradients."""
    args = case.build(torch.float64)
    results = differentiable(case.op.registered(*args))
    expected = reference_results(case, args)
    for mine, theirs in zip(results, expected, strict=True):
        torch.testing.assert_close(mine, theirs)

    def incoming(t):
        if layout == "expanded":
            return torch.tensor(0.7, dtype=t.dtype).expand_as(t)
        dense = torch.randn_like(t)
        return dense if layout == "dense" or t.dim() < 2 else torch.randn_like(t.mT.contiguous()).mT

    grads = [incoming(t) for t in results]
    mine = torch.autograd.grad(results, leaves(args), grads)
    theirs = torch.autograd.grad(expected, leaves(args), grads)
    torch.testing.assert_close(mine, theirs)


def spaced(t):
    return t.repeat_interleave(2, -1)[..., ::2]


def permuted(t):
    return t.transpose(0, -1).contiguous().transpose(0, -1)


@pytest.mark.parametrize("layout", [spaced, permuted])
def test_arguments_of_any_layout(case, layout):
    """Results and gradients are the same, and contiguous, as fakes promise."""
    args = case.build(torch.float64)
    strided = [layout(a.detach()).requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a for a in args]
    outcomes = []
    for given in (args, strided):
        results = differentiable(case.op.registered(*given))
        assert all(t.is_contiguous() for t in results)
        outcomes.append((results, torch.autograd.grad([t.sum() for t in results], leaves(given))))
    torch.testing.assert_close(*outcomes)
    torch.library.opcheck(case.op.registered, strided, test_utils="test_faketensor")


def public_calls(dtype):
    """Every public function as a closure, with its tensors that require a gradient."""
    torch.manual_seed(0)
    qkv, branch = rand(B, N, 3 * C, dtype=dtype), rand(B, N, C, dtype=dtype)
    x, weight, bias, gamma = rand(B, N, C, dtype=dtype), *(rand(C, dtype=dtype) for _ in range(3))
    q, kv = rand(B, 2, C, dtype=dtype), rand(B, N, 2 * C, dtype=dtype)
    keep, weights = torch.tensor([0.0, 1.25]), mlp_args(dtype)
    cls, dist, y1, y2, lam, teacher, *_ = loss_args(dtype, "hard")
    targets = y1, y2, lam
    halves, *cosub_targets = cosub_args(dtype, 0.1, False)[:4]
    images, plan = image_args()
    return {
        "attention": (lambda: kernels.attention(qkv, H), [qkv]),
        "query_attention": (lambda: kernels.query_attention(q, kv, H), [q, kv]),
        "layer_norm": (lambda: kernels.add_layer_norm(x, None, weight, bias)[1], [x, weight, bias]),
        "add_layer_norm": (
            lambda: kernels.add_layer_norm(x, branch, weight, bias, gamma=gamma, keep=keep),
            [x, branch, weight, bias, gamma],
        ),
        "mlp": (lambda: kernels.mlp(x, *weights), [x, *weights]),
        "layer_norm_mlp": (lambda: kernels.layer_norm_mlp(x, weight, bias, 1e-6, *weights), [x, weight, *weights]),
        "distillation_loss": (
            lambda: kernels.distillation_loss(cls, dist, targets, teacher, distillation="hard", smoothing=0.1).total,
            [cls, dist],
        ),
        "cosub_loss": (lambda: kernels.cosub_loss(halves, cosub_targets, smoothing=0.1), [halves]),
        "pixels": (lambda: kernels.pixels(images, **plan), []),
        "patchify": (lambda: kernels.patchify(images, patch_size=2, **plan), []),
        "global_norm": (lambda: kernels.global_norm([x, weight]), []),
    }


NAMES = [
    "attention",
    "query_attention",
    "layer_norm",
    "add_layer_norm",
    "mlp",
    "layer_norm_mlp",
    "distillation_loss",
    "cosub_loss",
    "pixels",
    "patchify",
    "global_norm",
]


def run(call, free):
    out = call()
    out = out if isinstance(out, tuple) else (out,)
    return out, torch.autograd.grad([t.float().square().sum() for t in out], free) if free else ()


def counted(backend_calls):
    """The `aot_eager` compiler, which records the names of the graph's ops."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.backends.debugging import boxed_nop

    def compiler(graph, inputs):
        backend_calls.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return boxed_nop(graph, inputs)

    return aot_autograd(fw_compiler=compiler, bw_compiler=compiler)


def assert_near(mine, exact, share):
    """Same dtypes, and an error of at most `share` of the exact tensor's norm."""
    for one, other in zip(mine, exact, strict=True):
        assert (one.double() - other).norm() <= share * other.norm()


@pytest.mark.parametrize("autocast", [False, True], ids=["float64", "autocast"])
@pytest.mark.parametrize("name", NAMES)
def test_compiled_is_eager(name, autocast):
    """One graph that contains the registered op, forward and backward, and gives eager mode's results and dtypes."""
    torch.compiler.reset()
    call, free = public_calls(torch.float32 if autocast else torch.float64)[name]
    ops = []
    compiled = torch.compile(call, fullgraph=True, backend=counted(ops))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), kernels.use("reference"):
        eager, mine = run(call, free), run(compiled, free)
    assert f"fastdeit.{name}.default" in ops
    assert not free or f"fastdeit.{name}_backward.default" in ops
    if not autocast:
        return torch.testing.assert_close(mine, eager)
    for one, other in zip(mine, eager, strict=True):
        assert [t.dtype for t in one] == [t.dtype for t in other]
        assert_near(one, other, 0.02)
    return None


def test_compiled_by_inductor():
    torch.compiler.reset()
    call, free = public_calls(torch.float64)["add_layer_norm"]
    torch.testing.assert_close(run(torch.compile(call, fullgraph=True), free), run(call, free))


@pytest.mark.parametrize("name", UPDATES)
def test_compiled_optimizer(name):
    torch.compiler.reset()
    torch.manual_seed(0)
    mine, mine_step = [*optimizer_lists(), optimizer_lists()[0]], torch.tensor(1.0)
    theirs, their_step = [[t.clone() for t in tensors] for tensors in mine], torch.tensor(1.0)
    mine[0][0].requires_grad_()

    def update(lists, step):
        params, grads, *states, ema = lists
        UPDATES[name](params, grads, states, step, 1e-2, ema=ema, ema_decay=0.5)

    torch.compile(update, fullgraph=True, backend="aot_eager")(mine, mine_step)
    update(theirs, their_step)
    torch.testing.assert_close(mine, theirs)
    assert mine_step == their_step == 1 + UPDATES[name].counted


AUTOCAST_DTYPES = {
    "attention": [torch.bfloat16],
    "query_attention": [torch.bfloat16],
    "layer_norm": [torch.bfloat16],
    "add_layer_norm": [torch.float32, torch.bfloat16],
    "mlp": [torch.bfloat16],
    "layer_norm_mlp": [torch.bfloat16],
    "distillation_loss": [torch.float32],
    "cosub_loss": [torch.float32],
    "pixels": [torch.float32],
    "patchify": [torch.float32],
    "global_norm": [torch.float32],
}


@pytest.mark.parametrize("forced", [False, True], ids=["direct", "registered"])
@pytest.mark.parametrize("name", NAMES)
def test_autocast(name, forced, force):
    """Products in bf16, residual stream, statistics and losses in float32, gradients in the arguments' dtype."""
    if forced:
        force("reference")
    call, free = public_calls(torch.float32)[name]
    with torch.autocast("cpu", torch.bfloat16):
        results, grads = run(call, free)
    assert [t.dtype for t in results] == AUTOCAST_DTYPES[name]
    assert all(g.dtype == torch.float32 for g in grads)
    exact = run(call, free)
    assert_near((*results, *grads), (*exact[0], *exact[1]), 0.02)


@pytest.mark.parametrize("name", ["attention", "mlp", "layer_norm_mlp", "add_layer_norm"])
def test_autocast_leaves_float64(name, force):
    force("reference")
    call, free = public_calls(torch.float64)[name]
    with torch.autocast("cpu", torch.bfloat16):
        results, _ = run(call, free)
    assert {t.dtype for t in results} == {torch.float64}


def test_imports_nothing_else_of_fastdeit():
    code = (
        "import sys, fastdeit.kernels;"
        "print([m for m in sys.modules if m.startswith('fastdeit.') and not m.startswith('fastdeit.kernels')])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
