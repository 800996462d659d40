"""Updates against `torch.optim` and formulas in float64, and what a skipped step leaves alone: everything."""

import math

import pytest
import torch

from fastdeit.kernels import fused_adamw, fused_lamb, fused_sgd, global_norm, info
from fastdeit.kernels._triton import INTERPRETED
from tests.kernels.updates import UPDATES

SHAPES = (7, 5), (5,), (3, 2, 4), (33, 65)
NUMBERS = {"betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def interpreted(*values):
    """A parameter of tests that run Triton on the CPU."""
    return pytest.param(*values, marks=pytest.mark.skipif(not INTERPRETED, reason="there is a card, no interpreter"))


@pytest.fixture(
    params=[
        "fused_adamw",
        "fused_adamw=reference",
        "fused_lamb",
        "fused_sgd",
        interpreted("fused_adamw=triton"),
        interpreted("fused_lamb=triton"),
        interpreted("fused_sgd=triton"),
    ]
)
def update(request, force):
    """Each update, by the backend chosen and by others."""
    force(request.param if "=" in request.param else "auto")
    return UPDATES[request.param.partition("=")[0]]


@pytest.fixture(params=["host", "device"])
def decision(request, monkeypatch):
    """Whether `found_inf` is read at once, as on the CPU, or selects on the device, as it must elsewhere."""
    if request.param == "device":
        monkeypatch.setattr("fastdeit.kernels.optimizer._update.host_may_look", lambda flag: False)


def tensors(seed, dtype=torch.float32):
    torch.manual_seed(seed)
    return [torch.randn(shape, dtype=dtype) for shape in SHAPES]


def zeros(dtype=torch.float32):
    return [torch.zeros(shape, dtype=dtype) for shape in SHAPES]


def bits(items):
    """Copies that compare bit for bit: NaN equals NaN, and 0 does not equal -0."""
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return [t.clone().reshape(-1).view(kinds[t.element_size()]) for t in items]


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("auto", torch.float32),
        ("auto", torch.float64),
        ("fused_adamw=reference", torch.float32),
        ("fused_adamw=reference", torch.float64),
        interpreted("fused_adamw=triton", torch.float32),
    ],
)
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_adamw_is_torchs(backend, dtype, tensor_lr, force):
    force(backend)
    mine, theirs = tensors(0, dtype), [torch.nn.Parameter(p) for p in tensors(0, dtype)]
    moments = zeros(dtype), zeros(dtype)
    step = torch.tensor(0.0)
    optimizer = torch.optim.AdamW(theirs, lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, foreach=False)
    for i, lr in enumerate((2**-7, 2**-6, 0.25, 2**-10, 2**-8), 1):
        grads = tensors(i, dtype)
        optimizer.param_groups[0]["lr"] = lr
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
        fused_adamw(mine, grads, *moments, step, torch.tensor(lr) if tensor_lr else lr, **NUMBERS)
        assert all(torch.equal(a, b) for a, b in zip(grads, tensors(i, dtype), strict=True))
    assert step == 5
    few_ulps = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 4 * torch.finfo(dtype).eps}
    torch.testing.assert_close(mine, [p.detach() for p in theirs], **few_ulps)
    for key, moment in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
        torch.testing.assert_close(moment, [optimizer.state[p][key] for p in theirs], **few_ulps)


def exact_lamb(params, grads, ms, vs, t, lr):
    """One step in float64, element by element of the lists, from the paper's and apex's formulas."""
    (beta1, beta2), eps, decay = NUMBERS["betas"], NUMBERS["eps"], NUMBERS["weight_decay"]
    new = []
    for p, g, m, v in zip(params, grads, ms, vs, strict=True):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g**2
        u = m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + eps) + decay * p
        ratio = p.norm() / u.norm() if p.norm() > 0 and u.norm() > 0 else 1
        new.append((p - lr * ratio * u, m, v))
    return tuple(map(list, zip(*new, strict=True)))


def test_lamb_is_the_formula():
    params, exp_avgs, exp_avg_sqs, step = tensors(0), zeros(), zeros(), torch.tensor(0.0)
    params[1].zero_()  # a parameter of norm 0 takes ratio 1
    exact = [[t.double() for t in items] for items in (params, exp_avgs, exp_avg_sqs)]
    for t in (1, 2, 3):
        grads = tensors(t)
        fused_lamb(params, grads, exp_avgs, exp_avg_sqs, step, 0.03, **NUMBERS)
        exact = exact_lamb(exact[0], [g.double() for g in grads], *exact[1:], t, 0.03)
    for mine, theirs in zip((params, exp_avgs, exp_avg_sqs), exact, strict=True):
        torch.testing.assert_close([t.double() for t in mine], theirs, rtol=2e-6, atol=1e-7)


def test_lamb_without_decay_is_adam():
    """apex trusts the ratio only where there is decay; with none, LAMB is Adam."""
    lamb, adam, grads = tensors(0), tensors(0), tensors(1)
    numbers = NUMBERS | {"weight_decay": 0.0}
    fused_lamb(lamb, grads, zeros(), zeros(), torch.tensor(0.0), 0.03, **numbers)
    fused_adamw(adam, grads, zeros(), zeros(), torch.tensor(0.0), 0.03, **numbers)
    torch.testing.assert_close(lamb, adam)


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("fused_sgd=reference", torch.float32),
        ("fused_sgd=reference", torch.float64),
        interpreted("fused_sgd=triton", torch.float32),
    ],
)
def test_sgd_is_torchs(backend, dtype, momentum, nesterov, force):
    """Twenty updates from zero buffers; torch keeps no buffer before the first one, and none without momentum."""
    force(backend)
    mine, theirs, buffers = tensors(0, dtype), [torch.nn.Parameter(p) for p in tensors(0, dtype)], zeros(dtype)
    numbers = {"momentum": momentum, "weight_decay": 0.1, "nesterov": nesterov}
    optimizer = torch.optim.SGD(theirs, lr=0.1, **numbers, foreach=False)
    for i in range(1, 21):
        optimizer.param_groups[0]["lr"] = lr = 2.0 ** -(4 + i % 3)
        for p, g in zip(theirs, tensors(i, dtype), strict=True):
            p.grad = g
        optimizer.step()
        fused_sgd(mine, tensors(i, dtype), buffers, lr, **numbers)
    few_ulps = {"rtol": 8 * torch.finfo(dtype).eps, "atol": 16 * torch.finfo(dtype).eps}
    torch.testing.assert_close(mine, [p.detach() for p in theirs], **few_ulps)
    if momentum:
        torch.testing.assert_close(buffers, [optimizer.state[p]["momentum_buffer"] for p in theirs], **few_ulps)


@pytest.mark.parametrize("nesterov", [False, True], ids=["plain", "Nesterov"])
def test_decoupled_decay_of_sgd_does_not_pass_through_the_momentum(nesterov):
    """SGD on the loss alone, and beside it parameters shrunk by lr * weight_decay."""
    mine, theirs = tensors(0, torch.float64), tensors(0, torch.float64)
    buffers, their_buffers = zeros(torch.float64), zeros(torch.float64)
    for i in range(1, 4):
        grads, numbers = tensors(i, torch.float64), {"momentum": 0.9, "nesterov": nesterov}
        fused_sgd(mine, grads, buffers, 0.1, **numbers, weight_decay=0.5, decoupled=True)
        theirs = [p * (1 - 0.1 * 0.5) for p in theirs]
        fused_sgd(theirs, grads, their_buffers, 0.1, **numbers, weight_decay=0.0)
    torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(buffers, their_buffers)


def test_grad_scale_multiplies(update, decision):
    """Adam's update hardly depends on a common factor of all gradients; the moments do."""
    scaled, plain = (tensors(0), (zeros(), zeros())), (tensors(0), (zeros(), zeros()))
    sixteenth = [g / 16 for g in tensors(1)]
    scale = torch.tensor(1 / 16)
    update(scaled[0], tensors(1), scaled[1], torch.tensor(0.0), 0.1, grad_scale=scale)
    update(plain[0], sixteenth, plain[1], torch.tensor(0.0), 0.1)
    torch.testing.assert_close(scaled, plain)


def test_ema_and_copies_follow_the_update(update, decision):
    params, ema, found = tensors(0), tensors(2), torch.tensor(False)
    copies = [torch.empty_like(p, dtype=torch.float16) for p in params]
    before = [e.clone() for e in ema]
    lists = params, tensors(1), (zeros(), zeros())
    update(*lists, torch.tensor(0.0), 0.1, found_inf=found, ema=ema, ema_decay=0.75, copies=copies)
    expected = [0.75 * e + 0.25 * p for e, p in zip(before, params, strict=True)]
    torch.testing.assert_close(ema, expected)
    assert all(torch.equal(c, p.half()) for c, p in zip(copies, params, strict=True))


@pytest.mark.parametrize("flag", [torch.tensor(True), torch.tensor(1.0), torch.tensor(3.0)], ids=["bool", "1.0", "3.0"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_skipped_step_changes_no_bit(update, decision, flag, poison):
    params, exp_avgs, exp_avg_sqs, ema = tensors(0), tensors(2), [t.abs() for t in tensors(3)], tensors(4)
    for items in (params, exp_avgs, ema):
        items[0][0] = -0.0
    copies, step = [t.bfloat16() for t in tensors(5)], torch.tensor(6.0)
    grads = [torch.full_like(p, poison) for p in params]
    state = [*params, *exp_avgs, *exp_avg_sqs, *ema, *copies, *grads, step]
    before = bits(state)
    lists = params, grads, (exp_avgs, exp_avg_sqs)
    scale = torch.tensor(math.nan)
    extra = {"grad_scale": scale, "found_inf": flag, "ema": ema, "ema_decay": 0.5, "copies": copies}
    update(*lists, step, 0.1, **extra)
    assert all(torch.equal(a, b) for a, b in zip(bits(state), before, strict=True))


def test_flag_of_zero_is_no_flag(update, decision):
    flagged, plain = tensors(0), tensors(0)
    steps = torch.tensor(0.0), torch.tensor(0.0)
    update(flagged, tensors(1), (zeros(), zeros()), steps[0], 0.1, found_inf=torch.tensor(0.0))
    update(plain, tensors(1), (zeros(), zeros()), steps[1], 0.1)
    assert all(torch.equal(a, b) for a, b in zip(flagged, plain, strict=True))
    assert steps[0] == steps[1] == update.counted


def test_gradients_of_other_dtypes_and_strides(update):
    expected, result = tensors(0), [torch.nn.Parameter(p) for p in tensors(0)]
    grads = [g.bfloat16() for g in tensors(1)]
    update(expected, [g.float() for g in grads], (zeros(), zeros()), torch.tensor(0.0), 0.1)
    grads[0] = grads[0].T.contiguous().T
    grads[3] = grads[3].T.contiguous().T.float()
    update(result, grads, (zeros(), zeros()), torch.tensor(0.0), 0.1)
    torch.testing.assert_close([p.detach() for p in result], expected)


def test_global_norm():
    grads = tensors(1)
    exact = torch.cat([g.double().reshape(-1) for g in grads]).norm()
    torch.testing.assert_close(global_norm(grads), exact.float())
    assert global_norm([g.double() for g in grads]).dtype == torch.float32
    half = [torch.full((5000,), 100.0, dtype=torch.float16)]  # the sum of squares is far above 65504
    assert global_norm(half) == pytest.approx(100 * math.sqrt(5000))
    assert global_norm([torch.tensor([math.nan]), torch.ones(2)]).isnan()


def test_adamw_runs_torchs_kernel_on_the_cpu():
    (row,) = [row for row in info() if row.name == "fused_adamw"]
    assert row.backend == "aten"


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"params": []}, ValueError, "params is empty"),
        ({"params": [t.bfloat16() for t in tensors(0)]}, TypeError, "params are torch.bfloat16.*`copies`"),
        ({"grads": tensors(1)[:3]}, ValueError, "grads has 3 tensors, but params has 4"),
        ({"exp_avgs": []}, ValueError, "exp_avgs has 0 tensors, but params has 4"),
        ({"exp_avgs": [t.half() for t in zeros()]}, TypeError, r"exp_avgs\[0\] is torch.float16"),
        (
            {"exp_avg_sqs": [*zeros()[:3], torch.zeros(65, 33)]},
            ValueError,
            r"exp_avg_sqs\[3\] has shape \[65, 33\], but must be like params\[3\] = \[33, 65\]",
        ),
        ({"ema": tensors(0)[:1]}, ValueError, "ema has 1 tensors"),
        ({"ema": tensors(0), "ema_decay": 1.5}, ValueError, "ema_decay is 1.5"),
        ({"step": torch.tensor(0)}, TypeError, "step is torch.int64, but must be torch.float32"),
        ({"step": torch.zeros(1)}, ValueError, r"step has shape \[1\]"),
        ({"found_inf": torch.zeros(2)}, ValueError, r"found_inf has shape \[2\]"),
        ({"grad_scale": torch.ones((), device="meta")}, ValueError, "grad_scale is on meta, but must be on cpu"),
        ({"betas": (0.9, 1.0)}, ValueError, r"betas\[1\] is 1.0"),
    ],
)
@pytest.mark.parametrize("update", [fused_adamw, fused_lamb])
def test_errors_name_the_argument(update, changes, error, message):
    lists = {"params": tensors(0), "grads": tensors(1), "exp_avgs": zeros(), "exp_avg_sqs": zeros()}
    with pytest.raises(error, match=message):
        update(**lists | {"step": torch.tensor(0.0), "lr": 0.1} | NUMBERS | changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"momentum_buffers": zeros()[:2]}, ValueError, "momentum_buffers has 2 tensors, but params has 4"),
        ({"momentum_buffers": [t.half() for t in zeros()]}, TypeError, r"momentum_buffers\[0\] is torch.float16"),
        ({"momentum": 1.0}, ValueError, r"momentum is 1\.0, but must be in \[0, 1\)"),
        ({"momentum": 0.0, "nesterov": True}, ValueError, "nesterov needs a momentum above 0"),
        ({"found_inf": torch.zeros(2)}, ValueError, r"found_inf has shape \[2\]"),
        ({"ema": tensors(0), "ema_decay": 1.5}, ValueError, "ema_decay is 1.5"),
    ],
)
def test_errors_of_sgd(changes, error, message):
    lists = {"params": tensors(0), "grads": tensors(1), "momentum_buffers": zeros()}
    with pytest.raises(error, match=message):
        fused_sgd(**lists | {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1} | changes)


def test_norm_of_no_tensors_is_an_error():
    with pytest.raises(ValueError, match="tensors is empty"):
        global_norm([])
