"""What every op promises: a sound registration, compilation to one graph, exact gradients, the autocast dtype."""

from contextlib import nullcontext

import pytest
import torch
from torch._subclasses import FakeTensorMode

from fastdeit import kernels
from fastdeit.kernels import _op, _triton
from fastdeit.kernels._example import FEW, Maker
from fastdeit.kernels.lint import cases
from tests.kernels.examples import ONLY_FLOAT16, REFUSED, differentiable, every_example, few, leaves

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


EXAMPLES = every_example()
DIFFERENTIABLE = {name: pair for name, pair in EXAMPLES.items() if hasattr(pair[0], "registered_backward")}


ON_TRITON = {
    f"{name}-{backend.name}": (op, backend, example, torch.float16 if backend.name in ONLY_FLOAT16 else torch.float32)
    for name, (op, example) in EXAMPLES.items()
    for owner, backend in cases.backends()
    if owner == op.name and not op.mutated and (owner, backend.name, example.name) not in REFUSED
}
"""(op, backend, example, dtype) of each example by each backend that launches Triton kernels. Updates are left out,
whose own tensors have to be dense."""


@pytest.fixture(params=DIFFERENTIABLE)
def case(request):
    """(op, example) of an op that has a gradient."""
    torch.manual_seed(0)
    return DIFFERENTIABLE[request.param]


def influential(op, args):
    """The leaves that results depend on; the gradient of a bias that an argument already contains is a by-product."""
    free = leaves(args)
    results = differentiable(op.backends[-1].forward(*args))
    grads = torch.autograd.grad([t.sum() for t in results], free, allow_unused=True)
    return [leaf for leaf, grad in zip(free, grads, strict=True) if grad is not None]


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


def optimizer_lists():
    params, grads, exp_avgs, exp_avg_sqs = ([torch.randn(3, 4), torch.randn(5)] for _ in range(4))
    return params, grads, exp_avgs, [t.abs() for t in exp_avg_sqs]


@pytest.mark.parametrize("name", EXAMPLES)
def test_opcheck(name):
    """Updates are dispatched under AOTAutograd once an op: that looks at each of their many tensors."""
    torch.manual_seed(0)
    op, example = EXAMPLES[name]
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if name in DIFFERENTIABLE or example is op.examples[0]:
        checks.append("test_aot_dispatch_dynamic")
    if op.name == "fp8_product":  # PyTorch's check compares arguments by `allclose`, which no CPU has for e4m3
        checks.remove("test_schema")
    torch.library.opcheck(op.registered, few(example), test_utils=checks)


def test_opcheck_of_backward(case, monkeypatch):
    op, example = case
    seen = []
    registered = op.registered_backward
    monkeypatch.setattr(op, "registered_backward", lambda *args: seen.append(args) or registered(*args))
    sum(t.sum() for t in differentiable(op.registered(*few(example)))).backward()
    (args,) = seen
    torch.library.opcheck(registered, [a.detach() if isinstance(a, torch.Tensor) else a for a in args])


def test_gradients_are_those_of_the_formula(case):
    """Finite differences in float64 through the registered op."""
    op, example = case
    if op.name == "cosub_loss":
        pytest.skip("it holds predictions constant, which finite differences do not: see test_cosub.py")
    args = few(example, torch.float64)
    free = influential(op, args)

    def function(*values):
        changed = {id(leaf): value for leaf, value in zip(free, values, strict=True)}
        return tuple(differentiable(op.registered(*(changed.get(id(a), a) for a in args))))

    assert torch.autograd.gradcheck(function, free, fast_mode=True)


@pytest.mark.parametrize("layout", ["dense", "expanded", "transposed"])
def test_backward_is_the_references(case, layout):
    """The explicit backward equals PyTorch's own of the same mathematics, for incoming gradients of any strides."""
    op, example = case
    args = few(example, torch.float64)
    results = differentiable(op.registered(*args))
    expected = differentiable(op.native(*args))[: len(results)]
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
    op, example = case
    args = few(example, torch.float64)
    strided = [layout(a.detach()).requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a for a in args]
    outcomes = []
    for given in (args, strided):
        results = differentiable(op.registered(*given))
        assert all(t.is_contiguous() for t in results)
        outcomes.append((results, torch.autograd.grad([t.sum() for t in results], leaves(given))))
    torch.testing.assert_close(*outcomes)
    torch.library.opcheck(op.registered, strided, test_utils="test_faketensor")


def apart(t):
    """The same tensor in memory where something else lies between any two elements."""
    return t.detach().repeat_interleave(2, -1)[..., ::2].requires_grad_(t.requires_grad) if t.dim() else t


def memory(t):
    """Tells the memory of tensors apart that have no address."""
    return t.untyped_storage()._cdata


@pytest.mark.parametrize("name", ON_TRITON)
def test_kernels_get_dense_memory(name):
    """Kernels go through memory, whatever the layout of an argument or of a gradient: so they get a dense copy."""
    op, backend, example, dtype = ON_TRITON[name]
    args = example.build(Maker(FEW, dtype, torch.device("meta")))
    given = [apart(a) if isinstance(a, torch.Tensor) else a for a in args]
    with _triton.recording(90) as recorded:
        ends = differentiable(op.run_on(backend, *given))
        grads = [apart(torch.empty_like(end)) for end in ends]
        torch.autograd.backward(ends, grads)
    assert recorded.launches
    spaced = {memory(t) for t in (*given, *grads) if isinstance(t, torch.Tensor) and not t.is_contiguous()}
    for launch in recorded.launches:
        tensors = {name: a for name, a in launch.arguments.items() if isinstance(a, torch.Tensor)}
        assert [name for name, a in tensors.items() if memory(a) in spaced] == [], launch.kernel.__name__


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
    width, angles = C // H, torch.linspace(-3, 3, N * C // H // 2).view(N, -1)
    turns = rand(width, dtype=dtype), rand(width, dtype=dtype), angles.cos(), angles.sin()
    return {
        "attention": (lambda: kernels.attention(qkv, H), [qkv]),
        "query_attention": (lambda: kernels.query_attention(q, kv, H), [q, kv]),
        "layer_norm": (lambda: kernels.add_layer_norm(x, None, weight, bias)[1], [x, weight, bias]),
        "add_layer_norm": (
            lambda: kernels.add_layer_norm(x, branch, weight, bias, gamma=gamma, keep=keep),
            [x, branch, weight, bias, gamma],
        ),
        "rms_norm": (lambda: kernels.add_rms_norm(x, None, weight)[1], [x, weight]),
        "add_rms_norm": (lambda: kernels.add_rms_norm(x, branch, weight, gamma=gamma, keep=keep), [x, branch, weight]),
        "qk_norm_rope": (lambda: kernels.qk_norm_rope(qkv, H, *turns[:2], 1e-6, *turns[2:]), [qkv, *turns[:2]]),
        "swiglu": (lambda: kernels.swiglu(branch), [branch]),
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


NAMES = list(public_calls(torch.float32))


def test_each_op_but_the_updates_has_a_call():
    """Those of fp8 are parts of `fp8_linear` and `fp8_mlp`, which test_fp8.py calls."""
    public = {name for name, op in _op.OPS.items() if not op.mutated and not name.startswith("fp8_")}
    assert set(NAMES) == public


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


@pytest.mark.parametrize("name", ["fused_adamw", "fused_lamb"])
def test_compiled_optimizer(name):
    torch.compiler.reset()
    torch.manual_seed(0)
    mine, mine_step = optimizer_lists(), torch.tensor(1.0)
    theirs, their_step = [[t.clone() for t in tensors] for tensors in mine], torch.tensor(1.0)
    mine_ema, their_ema = ([t.clone() for t in tensors[0]] for tensors in (mine, theirs))
    mine[0][0].requires_grad_()

    def update(lists, step, ema):
        numbers = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
        getattr(kernels, name)(*lists, step, 1e-2, **numbers, ema=ema, ema_decay=0.5)

    torch.compile(update, fullgraph=True, backend="aot_eager")(mine, mine_step, mine_ema)
    update(theirs, their_step, their_ema)
    torch.testing.assert_close((mine, mine_ema), (theirs, their_ema))
    assert mine_step == their_step == 2


AUTOCAST_DTYPES = {
    "attention": [torch.bfloat16],
    "query_attention": [torch.bfloat16],
    "layer_norm": [torch.bfloat16],
    "add_layer_norm": [torch.float32, torch.bfloat16],
    "rms_norm": [torch.bfloat16],
    "add_rms_norm": [torch.float32, torch.bfloat16],
    "qk_norm_rope": [torch.bfloat16],
    "swiglu": [torch.bfloat16],
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


@pytest.mark.parametrize("without_values", [FakeTensorMode, lambda: torch.device("meta")], ids=["fake", "meta"])
@pytest.mark.parametrize("name", NAMES)
def test_tensors_without_values(name, without_values):
    """Results and gradients have the dtypes and shapes of real ones. There is no autocast for the meta device."""
    outcomes = []
    for inside in (nullcontext, without_values):
        with inside(), torch.autocast("cpu", torch.bfloat16, enabled=without_values is FakeTensorMode):
            call, free = public_calls(torch.float32)[name]
            results, grads = run(call, free)
        outcomes.append([(t.dtype, t.shape, t.stride()) for t in (*results, *grads)])
        devices = {t.device.type for t in results}
    assert outcomes[0] == outcomes[1]
    assert devices == {"cpu" if without_values is FakeTensorMode else "meta"}


@pytest.mark.parametrize("name", ["attention", "mlp", "layer_norm_mlp", "add_layer_norm"])
def test_autocast_leaves_float64(name, force):
    force("reference")
    call, free = public_calls(torch.float64)[name]
    with torch.autocast("cpu", torch.bfloat16):
        results, _ = run(call, free)
    assert {t.dtype for t in results} == {torch.float64}


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("name", [name for name, op in _op.OPS.items() if any(op._cast)])
def test_a_backend_in_eager_mode_gets_the_autocast_dtype_and_no_autocast(name, trained, monkeypatch):
    op, seen = _op.OPS[name], []
    reference = op.backends[-1]

    def forward(*args):
        dtypes = {a.dtype for a, cast in zip(args, op._cast, strict=True) if cast and isinstance(a, torch.Tensor)}
        seen.append((dtypes, torch.is_autocast_enabled("cpu")))
        return reference.forward(*args)

    def backward(*args):
        seen.append(({torch.bfloat16}, torch.is_autocast_enabled("cpu")))
        return reference.backward(*args)

    other = _op.Backend("other", lambda device, forced: (True, ""), forward, backward)
    monkeypatch.setattr(op, "backends", (other, reference))
    args = few(op.examples[0])
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(trained):
        results = op(*args)
        if trained:
            sum(t.float().sum() for t in differentiable(results)).backward()
        assert torch.is_autocast_enabled("cpu")
    assert seen == [({torch.bfloat16}, False)] * (1 + trained)
