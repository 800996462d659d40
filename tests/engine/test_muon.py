"""Muon: its iterations, `torch.optim.Muon`, AdamW for what is no matrix, skipped steps, averages, state by name."""

import pytest
import torch
from torch import nn

from fastdeit.engine.groups import ParamGroup
from fastdeit.engine.guard import Verdict
from fastdeit.engine.muon import orthogonalised
from fastdeit.engine.optimizers import AdamW, Muon
from fastdeit.engine.options import MuonOptions

SHAPES = {"wide": (4, 12), "tall": (12, 4), "tall too": (12, 4), "square": (6, 6)}
OTHERS = {"bias": (5,), "token": (1, 1, 4), "head": (3, 4)}
PASS = Verdict(torch.tensor(0.5), torch.tensor(False), torch.ones(()))
SKIP = Verdict(torch.tensor(0.5), torch.tensor(True), torch.ones(()))


def values():
    generator = torch.Generator().manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in (SHAPES | OTHERS).items()}


def muon(params):
    matrices = {name: params[name] for name in SHAPES}
    return Muon([ParamGroup(matrices, 0.1, 0.5, matrix=True), ParamGroup({n: params[n] for n in OTHERS}, 0.2)])


def give_gradients(params, number):
    for index, p in enumerate(params.values()):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(10 * number + index))


def walk(optimizer, params, numbers, verdict=PASS, **average):
    for number in numbers:
        give_gradients(params, number)
        optimizer.step(0.02, verdict, **average)


def copied(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_same_bits(mine, theirs):
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("shape", SHAPES.values())
def test_iterations_are_the_quintic_of_the_singular_values(shape):
    """By the definition: u f(f(f(f(f(s))))) v of the matrix u s v, scaled to the Frobenius norm 1."""
    x = torch.randn(2, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    s = s / s.square().sum(1, keepdim=True).sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    torch.testing.assert_close(orthogonalised(x), u @ torch.diag_embed(s) @ v)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
def test_matrices_are_updated_as_by_torchs_muon_and_the_rest_as_by_adamw():
    mine, theirs = values(), values()
    optimizer = muon(mine)
    walk(optimizer, mine, range(3))
    numbers = {"lr": 0.01, "weight_decay": 0.1, "momentum": 0.95, "adjust_lr_fn": "match_rms_adamw"}
    matrices = torch.optim.Muon([theirs[name] for name in SHAPES], **numbers)
    others = AdamW([ParamGroup({name: theirs[name] for name in OTHERS}, 0.2)])
    for number in range(3):
        give_gradients(theirs, number)
        others.step(0.02, PASS)
        for p in theirs.values():
            p.grad *= 0.5
        matrices.step()
    for name in SHAPES:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-6, atol=1e-6, msg=name)
    assert_same_bits({name: mine[name] for name in OTHERS}, {name: theirs[name] for name in OTHERS})
    for moment in ("exp_avg", "exp_avg_sq"):
        assert_same_bits(optimizer.state[moment], others.state[moment])


def test_a_step_has_the_size_of_one_of_adamw():
    """AdamW's first step is the learning rate in root mean square; Muon's is about 0.2 of it, as AdamW's later are."""
    p = {"p": nn.Parameter(torch.zeros(64, 192))}
    give_gradients(p, 0)
    Muon([ParamGroup(p, 0.0, matrix=True)]).step(0.02, PASS)
    assert p["p"].detach().square().mean().sqrt() / 0.02 == pytest.approx(0.2, rel=0.15)


@pytest.mark.parametrize("bad", [1.0, float("nan"), float("inf")])
def test_a_skipped_step_changes_nothing(bad):
    params = values()
    optimizer = muon(params)
    walk(optimizer, params, range(2))
    average = copied(params)
    before = copied(params), copied(optimizer.state_dict()), copied(average)
    give_gradients(params, 2)
    for p in params.values():
        p.grad[0] = bad
    optimizer.step(0.02, SKIP, average, 0.5)
    for now, then in zip((params, optimizer.state_dict(), average), before, strict=True):
        assert_same_bits(now, then)


def test_an_average_follows_in_the_same_pass():
    params = values()
    average = {name: torch.ones_like(p) for name, p in params.items()}
    walk(muon(params), params, [0], ema=average, ema_decay=0.75)
    for name, p in params.items():
        torch.testing.assert_close(average[name], 0.75 + 0.25 * p.detach())


def test_a_matrix_keeps_its_momentum_alone_and_goes_on_from_a_checkpoint_bit_for_bit():
    params = values()
    optimizer = muon(params)
    walk(optimizer, params, range(3))
    saved, weights = copied(optimizer.state_dict()), copied(params)
    kinds = {name: {key.split(".")[0] for key in saved if key.endswith(f".{name}")} for name in params}
    assert all(kinds[name] == {"step", "momentum_buffer"} for name in SHAPES)
    assert all(kinds[name] == {"step", "exp_avg", "exp_avg_sq"} for name in OTHERS)
    assert {saved[f"step.{name}"].item() for name in params} == {3}
    walk(optimizer, params, range(3, 5))

    resumed = values()
    for name, p in resumed.items():
        p.data.copy_(weights[name])
    other = muon(resumed)
    other.load_state_dict(saved)
    walk(other, resumed, range(3, 5))
    assert_same_bits(resumed, params)


def test_a_rate_on_the_device_is_a_rate():
    """As a recorded step reads it: a tensor, which may change between replays."""
    one, other = values(), values()
    give_gradients(one, 0)
    give_gradients(other, 0)
    muon(one).step(0.02, PASS)
    muon(other).step(torch.tensor(0.02, dtype=torch.float64), PASS)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-6, atol=1e-7)


def test_the_host_reads_nothing():
    """On tensors without data, where every read of a value is an error; as a CUDA graph needs it."""
    params = {name: nn.Parameter(p.to("meta")) for name, p in values().items() if name in SHAPES}
    optimizer = Muon([ParamGroup(params, 0.1, matrix=True)])
    for p in params.values():
        p.grad = torch.empty_like(p)
    verdict = Verdict(*(tensor.to("meta") for tensor in PASS))
    optimizer.step(torch.empty((), dtype=torch.float64, device="meta"), verdict, {n: p.data for n, p in params.items()})


def test_momentum_is_an_option():
    params = values()
    matrices = {name: params[name] for name in SHAPES}
    optimizer = Muon([ParamGroup(matrices, 0.1, matrix=True)], MuonOptions(momentum=0.0))
    walk(optimizer, params, range(2))
    torch.testing.assert_close(optimizer.state["momentum_buffer"]["wide"], 0.5 * params["wide"].grad)
