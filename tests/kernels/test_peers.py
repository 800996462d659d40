"""What the tests of other libraries ask of the same mathematics, asked of our ops: small sizes, their numbers and their
tolerances. Restated, not copied; no test fetches anything.

    timm 1.0.31, tests/test_optim.py (Apache 2.0)
    NVIDIA apex, tests/L0/run_optimizers (BSD 3-clause)
    Liger-Kernel 0.8.5, test/transformers/test_{layer_norm,rms_norm,swiglu,cross_entropy,kl_div,rope}.py (BSD 2-clause)

What they ask and our ops refuse by design, such as parameters with gaps between their elements, is asked here to be
refused.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastdeit import kernels
from fastdeit.kernels._triton import INTERPRETED
from tests.kernels.updates import UPDATES

pytestmark = pytest.mark.slow
BACKENDS = [
    "auto",
    pytest.param("triton", marks=pytest.mark.skipif(not INTERPRETED, reason="there is a card, no interpreter")),
]


class Optimizer:
    """One of our updates with the state that it needs, for lists of parameters."""

    def __init__(self, name, params, lr, **changes):
        self.update, self.params, self.lr, self.changes = UPDATES[name], list(params), lr, changes
        self.states = [[torch.zeros_like(p) for p in self.params] for _ in range(2)]
        self.steps = torch.zeros(())

    def step(self, grads, **others):
        params = [p.detach() for p in self.params]
        self.update(params, grads, self.states, self.steps, self.lr, **self.changes, **others)

    def minimise(self, loss):
        self.step(torch.autograd.grad(loss, self.params))


# ---- timm's optimizers -----------------------------------------------------------------------------------------------

OPTIMIZERS = {"fused_adamw": 1e-2, "fused_lamb": 1e-2, "fused_sgd": 3e-3}
"""With timm's learning rate for the basic cases."""


def problem(seed=0):
    torch.manual_seed(seed)
    weight, bias, x = torch.randn(10, 5), torch.randn(10), torch.randn(5)
    return [weight.requires_grad_(), bias.requires_grad_()], lambda w, b: (w.mv(x) + b).square().sum()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("groups", [1, 2])
def test_timm_a_linear_problem_gets_better(name, groups):
    params, loss = problem()
    before = float(loss(*params))
    lists = [params] if groups == 1 else [[p] for p in params]
    optimizers = [Optimizer(name, part, OPTIMIZERS[name]) for part in lists]
    for _ in range(200):
        for optimizer in optimizers:
            optimizer.minimise(loss(*params))
    assert float(loss(*params)) < before


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_timm_a_restored_state_goes_on_with_the_same_bits(name):
    params, loss = problem()
    first = Optimizer(name, params, OPTIMIZERS[name])
    for _ in range(20):
        first.minimise(loss(*params))
    second = Optimizer(name, [p.detach().clone().requires_grad_() for p in params], OPTIMIZERS[name])
    second.states = [[tensor.clone() for tensor in state] for state in first.states]
    second.steps = first.steps.clone()
    for _ in range(20):
        for optimizer in (first, second):
            optimizer.minimise(loss(*optimizer.params))
        assert all(torch.equal(a, b) for a, b in zip(first.params, second.params, strict=True))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_timm_parameters_with_gaps_are_refused(name):
    params = [torch.randn(10, 5, 2)[..., 0], torch.randn(10, 2)[..., 0]]
    with pytest.raises(ValueError, match="params"):
        Optimizer(name, params, 1e-2).step([torch.ones(10, 5), torch.ones(10)])


@pytest.mark.parametrize(("name", "lr"), [("fused_adamw", 5e-2), ("fused_lamb", 1e-3), ("fused_sgd", 1e-3)])
def test_timm_every_step_of_a_small_model_is_better(name, lr):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1), nn.Sigmoid())
    x = torch.arange(1, 7).view(3, 2) / 10
    optimizer, losses = Optimizer(name, model.parameters(), lr, weight_decay=0.0), []
    for _ in range(20):
        loss = model(x).sum()
        optimizer.minimise(loss)
        losses.append(float(loss))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(("name", "lr"), [("fused_adamw", 5e-2), ("fused_lamb", 1e-3), ("fused_sgd", 1e-4)])
def test_timm_rosenbrock_one_coordinate_at_a_time(name, lr):
    point = torch.tensor([1.5, 1.5], requires_grad=True)
    before = float((point.detach() - 1).norm())
    optimizer = Optimizer(name, [point], lr, weight_decay=0.0)
    for i in range(2000):
        x, y = point
        (grad,) = torch.autograd.grad((1 - x) ** 2 + 100 * (y - x**2) ** 2, point)
        optimizer.step([grad * torch.tensor([1.0, 0.0] if i % 2 else [0.0, 1.0])])
    assert float((point.detach() - 1).norm()) <= before


# ---- apex's optimizers -----------------------------------------------------------------------------------------------

SIZES = {"one": [(1,)], "several": [(41, 10), (41,), (7, 20), (1,)]}
OPTIONS = {
    "usual": {"lr": 5e-4, "betas": (0.9, 0.999), "eps": 1e-8},
    "others": {"lr": 0.01, "betas": (0.6, 0.9), "eps": 3e-6},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("decay", [0.0, 0.01])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("sizes", SIZES)
def test_apex_adam_is_torchs(sizes, options, decay, backend):
    torch.manual_seed(0)
    lr, numbers = OPTIONS[options]["lr"], {"betas": OPTIONS[options]["betas"], "eps": OPTIONS[options]["eps"]}
    theirs = [nn.Parameter(torch.rand(size)) for size in SIZES[sizes]]
    mine = Optimizer("fused_adamw", [p.detach().clone() for p in theirs], lr, **numbers, weight_decay=decay)
    judge = torch.optim.AdamW(theirs, lr, weight_decay=decay, **numbers)
    with kernels.use(backend):
        for _ in range(7):
            for p in theirs:
                p.grad = torch.rand_like(p)
            judge.step()
            mine.step([p.grad for p in theirs])
            torch.testing.assert_close(mine.params, [p.detach() for p in theirs])


@pytest.mark.parametrize("backend", BACKENDS)
def test_apex_scaled_half_gradients_and_half_copies(backend):
    torch.manual_seed(0)
    theirs, scale = nn.Parameter(torch.rand(1801)), 4.0
    mine = Optimizer("fused_adamw", [theirs.detach().clone()], 5e-4, weight_decay=0.0)
    judge = torch.optim.AdamW([theirs], 5e-4, betas=(0.9, 0.99), weight_decay=0.0)
    copy = torch.empty(1801, dtype=torch.float16)
    with kernels.use(backend):
        for _ in range(7):
            half = torch.rand(1801).half()
            theirs.grad = half.float() / scale
            judge.step()
            mine.step([half], grad_scale=torch.tensor(1 / scale), copies=[copy])
            torch.testing.assert_close(mine.params[0], theirs.detach())
            assert torch.equal(copy, mine.params[0].half())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("decay", [0.0, 0.01])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("sizes", SIZES)
def test_apex_lamb_is_its_formula(sizes, options, decay, backend):
    """As FusedLAMB without `use_nvlamb`: no trust ratio without weight decay; gradients clipped to a norm of 1."""
    torch.manual_seed(0)
    (beta1, beta2), eps, lr = (OPTIONS[options][key] for key in ("betas", "eps", "lr"))
    theirs = [torch.rand(size) for size in SIZES[sizes]]
    m, v = ([torch.zeros_like(p) for p in theirs] for _ in range(2))
    numbers = {"betas": (beta1, beta2), "eps": eps, "weight_decay": decay}
    mine = Optimizer("fused_lamb", [p.clone() for p in theirs], lr, **numbers)
    with kernels.use(backend):
        for step in range(1, 8):
            grads = [torch.rand_like(p) for p in theirs]
            clip = 1 / max(1.0, math.sqrt(sum(float(g.square().sum()) for g in grads)))
            mine.step(grads, grad_scale=torch.tensor(clip))
            for i, p in enumerate(theirs):
                m[i] = beta1 * m[i] + (1 - beta1) * clip * grads[i]
                v[i] = beta2 * v[i] + (1 - beta2) * (clip * grads[i]).square()
                update = m[i] / (1 - beta1**step) / ((v[i] / (1 - beta2**step)).sqrt() + eps) + decay * p
                ratio = p.norm() / update.norm() if decay and p.norm() > 0 and update.norm() > 0 else 1.0
                theirs[i] = p - lr * ratio * update
            torch.testing.assert_close(mine.params, theirs)


# ---- Liger's norms, activation and losses ----------------------------------------------------------------------------

TOLERANCES = [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
"""Both the relative and the absolute one."""


def assert_same(mine, theirs, inputs, tolerance):
    """Results and gradients of two functions of the same inputs."""
    found = []
    for function in (mine, theirs):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = function(*leaves)
        torch.manual_seed(1)
        found.append((out, *torch.autograd.grad(out, leaves, torch.randn_like(out))))
    torch.testing.assert_close(*found, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("shape", [(2, 8, 64), (4, 16, 128), (1, 1, 1023), (3, 7, 256), (1, 1, 1500)])
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCES)
def test_liger_layer_norm(shape, dtype, tolerance):
    torch.manual_seed(0)
    inputs = [torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype), torch.randn(shape[-1]).to(dtype)]
    with kernels.use("triton" if INTERPRETED else "auto"):
        assert_same(
            lambda x, w, b: kernels.add_layer_norm(x, None, w, b, 1e-6)[1],
            # In float32: PyTorch's gradient of the weight in bfloat16 is off by 0.3 on a CPU.
            lambda x, w, b: F.layer_norm(x.float(), shape[-1:], w.float(), b.float(), 1e-6).to(dtype),
            inputs,
            tolerance,
        )


@pytest.mark.parametrize("shape", [(2, 128, 512), (5, 123, 123)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-1)])
def test_liger_rms_norm(shape, dtype, tolerance):
    torch.manual_seed(0)
    inputs = [torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)]
    with kernels.use("triton" if INTERPRETED else "auto"):
        assert_same(
            lambda x, w: kernels.add_rms_norm(x, None, w, 1e-6)[1],
            lambda x, w: F.rms_norm(x, shape[-1:], w, 1e-6),
            inputs,
            tolerance,
        )


@pytest.mark.parametrize("shape", [(2, 8, 64), (9, 7, 41)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 5e-2)])
def test_liger_swiglu(shape, dtype, tolerance):
    torch.manual_seed(0)
    x = torch.randn(*shape[:2], 2 * shape[2]).to(dtype)
    with kernels.use("triton" if INTERPRETED else "auto"):
        assert_same(kernels.swiglu, lambda x: F.silu(x[..., : shape[2]]) * x[..., shape[2] :], [x], tolerance)


def loss_of(logits, targets, **options):
    return kernels.distillation_loss(logits, None, (targets, targets, torch.ones(len(targets))), **options)


@pytest.mark.parametrize("shape", [(4, 8), (63, 41), (33, 3200)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    ("scale", "dtype", "tolerance"),
    [(1.0, torch.float32, 1e-6), (10.0, torch.float32, 1e-6), (1.0, torch.bfloat16, 5e-2)],
)
def test_liger_cross_entropy(shape, smoothing, scale, dtype, tolerance):
    torch.manual_seed(0)
    logits, targets = (scale * torch.randn(shape)).to(dtype), torch.randint(shape[1], shape[:1])
    with kernels.use("triton" if INTERPRETED else "auto"):
        assert_same(
            lambda x: loss_of(x, targets, smoothing=smoothing).total,
            lambda x: F.cross_entropy(x.float(), targets, label_smoothing=smoothing),
            [logits],
            tolerance,
        )


@pytest.mark.parametrize("shape", [(2, 32), (41, 401)])
def test_liger_kl_divergence(shape):
    torch.manual_seed(0)
    student, teacher, targets = torch.randn(shape), torch.randn(shape), torch.zeros(shape[0], dtype=torch.int64)

    def mine(x):
        pair = targets, targets, torch.ones(shape[0])
        options = {"distillation": "soft", "alpha": 1.0, "reduction": "batchmean"}
        return kernels.distillation_loss(x, x, pair, teacher, **options).total

    def theirs(x):
        return F.kl_div(x.log_softmax(-1), teacher.softmax(-1), reduction="batchmean")

    with kernels.use("triton" if INTERPRETED else "auto"):
        assert_same(mine, theirs, [student], 1e-5)
