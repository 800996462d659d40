"""Adaptive gradient clipping: timm's `adaptive_clip_grad`, exempt heads, a loss scale, what is not finite."""

from types import SimpleNamespace

import pytest
import torch
from timm.utils.agc import adaptive_clip_grad
from torch import nn

from fastdeit.engine.clip import UnitClipping
from fastdeit.engine.dist import World
from fastdeit.engine.groups import default_groups
from fastdeit.engine.optimizers import Sgd
from fastdeit.engine.options import SgdOptions
from fastdeit.engine.step import Engine

SHAPES = {"conv": (6, 3, 2, 2), "linear": (8, 5), "bias": (7,), "scale": (), "token": (1, 1, 9), "zero": (4, 4)}
ONE = torch.ones(())


def values(size=1.0):
    """Parameters, one of them zero, whose gradients have rows of all sizes; one row is zero."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for name, shape in SHAPES.items():
        p = nn.Parameter(torch.randn(shape, generator=generator) * (name != "zero"))
        lengths = 10 ** (3 * torch.rand(shape[:1] + (1,) * (len(shape) - 1), generator=generator) - 4)
        p.grad = torch.randn(shape, generator=generator) * lengths * size
        made[name] = p
    made["linear"].grad[2] = 0
    return made


def test_gradients_are_clipped_as_by_timm():
    mine = values()
    before = {name: p.grad.clone() for name, p in mine.items()}
    theirs = {name: nn.Parameter(p.detach().clone()) for name, p in mine.items()}
    for name, p in theirs.items():
        p.grad = before[name].clone()
    UnitClipping(0.01).apply(mine, ONE)
    adaptive_clip_grad(theirs.values(), 0.01)
    for name, p in mine.items():
        torch.testing.assert_close(p.grad, theirs[name].grad, rtol=1e-5, atol=0, msg=name)
    rows = (mine["linear"].grad != before["linear"]).any(1)
    assert 0 < rows.sum() < 8  # some are clipped, and the others keep their bits


def test_a_loss_scale_is_taken_out_before_the_comparison():
    plain = values()
    scaled = values(1024.0)
    UnitClipping(0.01).apply(plain, ONE)
    UnitClipping(0.01).apply(scaled, ONE / 1024)
    for name, p in plain.items():
        torch.testing.assert_close(scaled[name].grad / 1024, p.grad, msg=name)


def test_exempt_are_names_and_what_lies_below_them():
    params = {name: nn.Parameter(torch.ones(2, 2)) for name in ("head.weight", "header.weight", "body", "head")}
    for p in params.values():
        p.grad = torch.ones(2, 2)
    UnitClipping(0.01, ["head"]).apply(params, ONE)
    assert {name for name, p in params.items() if (p.grad == 1).all()} == {"head", "head.weight"}
    UnitClipping(0.01, list(params)).apply(params, ONE)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so(bad):
    p = nn.Parameter(torch.ones(2, 2))
    p.grad = torch.tensor([[bad, 1.0], [1.0, 1.0]])
    UnitClipping(0.01).apply({"p": p}, ONE)
    assert not p.grad[0].isfinite().all()
    assert p.grad[1].isfinite().all()


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.body.weight.fill_(1.0)
            self.head.weight.fill_(1.0)

    def forward(self, x):
        return SimpleNamespace(loss=0.25 * self.head(self.body(x)).float().sum(), parts={})

    def step(self, batch, engine):
        engine.backward(engine.run(batch).loss)

    def after_step(self, engine):
        pass


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_engine_clips_before_the_update_and_logs_the_norm_before(precision):
    """The body's rows of norm sqrt(2) get gradients of norm 0.1 sqrt(2); with the rate 1 each weight falls by 0.1."""
    toy = Toy()
    optimizer = Sgd(default_groups(toy.named_parameters(), 0.0), SgdOptions(momentum=0.0, nesterov=False))
    world = World(torch.device("cpu"))
    engine = Engine(toy, optimizer, world, precision=precision, accumulate=1, clip_units=UnitClipping(0.1, ["head"]))
    engine.step([torch.ones(1, 2)], 1.0)
    torch.testing.assert_close(toy.body.weight.detach(), torch.full((2, 2), 0.9))
    torch.testing.assert_close(toy.head.weight.detach(), torch.full((2, 2), 0.5))
    assert engine.means()["grad_norm"] == pytest.approx((8 * 0.5**2) ** 0.5, rel=1e-3)
