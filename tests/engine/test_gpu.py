"""A training step on a card: it waits for nothing, and learns what the CPU learns."""

import pytest
import torch

from fastdeit import methods, models, rng
from fastdeit.engine.dist import World
from fastdeit.engine.ema import Ema
from fastdeit.engine.groups import default_groups
from fastdeit.engine.optimizers import AdamW
from fastdeit.engine.step import Engine
from tests.toys import toy_batch, toy_context

pytestmark = [pytest.mark.gpu, pytest.mark.card]
B, SIDE, CLASSES = 8, 32, 10


def batch(step, device):
    words = rng.bits(rng.key(step, "test"), range(B), SIDE * SIDE)
    images = torch.from_numpy(words.view("uint8").reshape(B, SIDE, SIDE, 4)[..., :3].copy())
    y1 = torch.arange(B) % CLASSES
    lam = torch.full((B,), 0.7)
    return toy_batch(images, y1, y2=y1.flip(0), lam=lam, partner=torch.arange(B).flip(0), step=step).to(device)


def make(device, precision, capture="none"):
    device = torch.device(device)
    torch.manual_seed(0)
    model = models.build("deit_tiny_patch16_224", image_size=(SIDE, SIDE), depth=2, num_classes=CLASSES)
    method = methods.find("supervised")(model, methods.config("supervised")(), toy_context(CLASSES))
    optimizer = AdamW(default_groups(method.to(device).named_parameters(), 0.05))
    ema = Ema(optimizer.params, 0.9, method)
    world = World(device)
    return Engine(method, optimizer, world, precision=precision, accumulate=1, clip_grad=1.0, ema=ema, capture=capture)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_step_waits_for_nothing(precision):
    engine, data = make("cuda", precision), batch(0, "cuda")
    for _ in range(2):  # compiles kernels and allocates
        engine.step([data], 1e-3)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.step([data], 1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def losses(device, precision, steps=10, capture="none", decays=False):
    """decays: whether the weight decay of each step has another factor."""
    engine = make(device, precision, capture)
    found = []
    for step in range(steps):
        engine.step([batch(step, device)], 1e-3 * (1 + step % 3), 1.0 + step if decays else None)
        found.append(engine.means()["loss"])
    return torch.tensor(found)


@pytest.mark.parametrize(("precision", "rtol"), [("fp32", 1e-4), ("bf16", 0.02), ("fp16", 5e-3)])
def test_losses_are_those_of_the_cpu(precision, rtol):
    torch.testing.assert_close(losses("cuda", precision), losses("cpu", "fp32"), rtol=rtol, atol=0)


def test_two_runs_have_the_same_losses():
    assert torch.equal(losses("cuda", "fp16"), losses("cuda", "fp16"))


@pytest.mark.parametrize(("precision", "decays"), [("fp32", False), ("fp16", False), ("fp16", True)])
def test_a_recorded_step_has_the_bits_of_one_that_runs(precision, decays):
    assert torch.equal(losses("cuda", precision, 50, "graph", decays), losses("cuda", precision, 50, decays=decays))


def test_a_compiled_step_learns_the_same():
    torch.testing.assert_close(losses("cuda", "fp32", 50, "compile"), losses("cuda", "fp32", 50), rtol=1e-3, atol=0)


def test_a_replayed_step_waits_for_nothing():
    engine, data = make("cuda", "fp16", "graph"), batch(0, "cuda")
    for _ in range(13):  # runs, is recorded, is replayed
        engine.step([data], 1e-3)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        engine.step([data], 1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
