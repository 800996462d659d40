"""The backend that compares with NVIDIA apex: its arguments on a stand-in, its results where apex is installed."""

import math
from types import SimpleNamespace

import pytest
import torch

from fastdeit import kernels
from fastdeit.kernels.optimizer import adamw, apex, lamb

NUMBERS = 0.9, 0.99, 1e-8
OPS = {"fused_adamw": (adamw, apex.adamw), "fused_lamb": (lamb, apex.lamb)}
CUDA = torch.device("cuda")


def adam_of_apex(chunk, flag, lists, lr, beta1, beta2, eps, step, decoupled, corrected, decay, scale):
    """What `multi_tensor_adam_capturable` computes, in float32 lists, with its own order of arguments."""
    assert (flag.dtype, step.dtype, lr.dtype, scale.dtype) == (torch.int32, torch.int32, torch.float32, torch.float32)
    assert decoupled == corrected == 1
    if flag == 1:
        return
    for g, p, m, v in zip(*lists, strict=True):
        g.mul_(scale)
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        p.sub_(lr * (m / (1 - beta1**step) / ((v / (1 - beta2**step)).sqrt() + eps) + decay * p))


def lamb_of_apex(
    chunk, flag, lists, lr, beta1, beta2, eps, step, corrected, decay, averaged, decoupled, norm, limit, nvlamb, *rest
):
    """What `multi_tensor_lamb_mp` computes; `norm` and `limit` are in the units of its `scale` times gradients."""
    found_inf, scale = rest
    dtypes = {tensor.dtype for tensor in (lr, norm, limit, found_inf, scale)}
    assert dtypes == {torch.float32}
    assert (flag.dtype, step.dtype) == (torch.int32, torch.int32)
    assert corrected == averaged == decoupled == 1
    assert nvlamb is False
    if flag:
        return
    for g, p, m, v in zip(*lists, strict=True):
        g.mul_(scale).div_(norm / limit if norm > limit else 1.0)
        m.lerp_(g, 1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        g.copy_(m / (1 - beta1**step) / ((v / (1 - beta2**step)).sqrt() + eps) + decay * p)
        length, update = p.norm(), g.norm()
        p.sub_(lr * (length / update if decay and length and update else 1.0) * g)


@pytest.fixture
def stand_in(monkeypatch):
    kernels = {"multi_tensor_adam_capturable": adam_of_apex, "multi_tensor_lamb_mp": lamb_of_apex}
    monkeypatch.setattr(apex, "_kernels", lambda: SimpleNamespace(**kernels))


def arguments(device, decay, found):
    generator = torch.Generator().manual_seed(0)
    lists = [[torch.randn(s, generator=generator).to(device) for s in ((7, 5), (8,))] for _ in range(5)]
    lists[3] = [t.abs() for t in lists[3]]
    step, lr, scale = (torch.tensor(x, device=device) for x in (3.0, 0.01, 0.5))
    found = None if found is None else torch.tensor(found, device=device)
    grads = [lists[1][0], lists[1][1].half()]
    copies = [p.half() for p in lists[0]]
    params, _, exp_avgs, exp_avg_sqs, ema = lists
    numbers = *NUMBERS, decay, scale
    return params, grads, exp_avgs, exp_avg_sqs, step, lr, *numbers, found, ema, 0.9, copies


def everything(args):
    return [t for a in args for t in (a if isinstance(a, list) else [a]) if isinstance(t, torch.Tensor)]


def assert_parity(name, device, decay, found, update):
    module, _ = OPS[name]
    mine, theirs = (arguments(device, decay, found) for _ in range(2))
    module.reference(*mine)
    update(*theirs)
    for one, other in zip(everything(mine), everything(theirs), strict=True):
        rtol = 2e-3 if one.dtype == torch.float16 else 2e-6
        torch.testing.assert_close(one, other, rtol=rtol, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("found", [None, False, 1.0, math.nan])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", OPS)
def test_arguments_reach_apex_as_it_wants_them(name, decay, found, stand_in):
    """The gradients are not changed, EMA, copies and step follow, and a skipped step changes nothing."""
    assert_parity(name, "cpu", decay, found, OPS[name][1])


@pytest.mark.parametrize("found", [None, False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", OPS)
def test_apex_computes_the_reference(name, decay, found):
    able, reason = apex.capability(CUDA, forced=True)
    if not (able and torch.cuda.is_available()):
        pytest.skip(reason if not able else "there is no CUDA device")

    def update(*args):
        with kernels.use(**{name: "apex"}):
            OPS[name][0].OP(*args)

    assert_parity(name, "cuda", decay, found, update)


def test_apex_runs_only_where_it_is_asked_for(stand_in):
    assert not apex.capability(CUDA, forced=False)[0]
    assert apex.capability(CUDA, forced=True) == (True, "NVIDIA apex")
    assert apex.capability(torch.device("cpu"), forced=True) == (False, "apex needs a CUDA device")


def test_missing_apex_is_not_the_one_of_pypi(monkeypatch):
    monkeypatch.setattr(apex, "_kernels", lambda: None)
    with kernels.use(fused_lamb="apex"), pytest.raises(RuntimeError, match="PyPI is an unrelated project"):
        lamb.OP(*arguments("cpu", 0.1, None))


@pytest.mark.parametrize("name", OPS)
def test_what_apex_does_not_take_is_the_references(name, stand_in):
    _, update = OPS[name]
    args = list(arguments("cpu", 0.1, None))
    args[0] = [p.mT.contiguous().mT if p.dim() == 2 else p for p in args[0]]
    with pytest.raises(kernels._op.Unsupported, match="not contiguous"):
        update(*args)
    args[0] = [p.double() for p in args[0]]
    with pytest.raises(kernels._op.Unsupported, match=r"does not update torch\.float64"):
        update(*args)
