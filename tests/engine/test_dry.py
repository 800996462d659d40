"""A training step on a card that is not there: every tensor is on it, nothing waits for it, every launch is sound.

What the numbers are, the CPU's tests say, and those of `test_engine_gpu.py`.
"""

from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch

from fastdeit import kernels, methods, models
from fastdeit.bench.count_card import Waits, pretended_card
from fastdeit.engine.capture import WARM_STEPS
from fastdeit.engine.dist import World
from fastdeit.engine.ema import Ema
from fastdeit.engine.groups import default_groups
from fastdeit.engine.optimizers import AdamW
from fastdeit.engine.step import Engine
from fastdeit.methods.teacher import Teacher
from tests.toys import batch_norm_convnet, toy_batch, toy_context

B, SIDE, CLASSES = 8, 32, 10
CARD = torch.device("cuda", 0)
STEP = {
    *("_render_kernel", "_forward_kernel", "_backward_kernel", "_one_pass_kernel", "_query_gradient_kernel"),
    *("_key_gradient_kernel", "_scale_kernel"),
    *("_squares_kernel", "_root_kernel", "_schedule_kernel", "_adamw_kernel"),
}
"""Kernels of a step in 16 bit, without those that two files have under one name."""


def batch(noise, device=CARD):
    """Mixed, cut and erased."""
    box, key = torch.zeros(B, 4, dtype=torch.int32, device=device), torch.zeros(B, dtype=torch.int64, device=device)
    images = torch.zeros(B, SIDE, SIDE, 3, dtype=torch.uint8, device=device)
    drawn = {name: torch.rand(B, columns, device=device) for name, columns in noise.items()}
    return toy_batch(images, key, partner=key, box=box[None], noise=drawn, erase=((box, key),))


def supervised(rate=0.1):
    model = models.build("deit_tiny_patch16_224", image_size=SIDE, depth=2, num_classes=CLASSES, drop_path=rate)
    return methods.find("supervised")(model, methods.config("supervised")(), toy_context(CLASSES))


def skipping():
    method = supervised(rate=0.5)
    method.model.set_drop_path_skip(B // 2)
    return method


def distill(kind="hard", size=SIDE):
    model = models.build("deit_tiny_distilled_patch16_224", image_size=SIDE, depth=2, num_classes=CLASSES)
    network = models.build("deit_tiny_patch16_224", image_size=size, depth=1, num_classes=CLASSES)
    teacher = Teacher(network.to(CARD), image_size=size, mean=(0.1,) * 3, std=(0.2,) * 3)
    config = methods.config("distill")(teacher={"timm": "regnety_002"}, distillation=kind)
    return methods.find("distill")(model, config, toy_context(CLASSES, teacher))


METHODS = {
    "supervised": supervised,
    "hard": distill,
    "soft": lambda: distill("soft"),
    "teacher of another size": lambda: distill(size=48),
}


def engine(method, precision="bf16", accumulate=1, capture="none"):
    optimizer = AdamW(default_groups(method.to(CARD).named_parameters(), 0.05))
    options = {"precision": precision, "accumulate": accumulate, "clip_grad": 1.0, "capture": capture}
    return Engine(method.train(), optimizer, World(CARD), ema=Ema(optimizer.params, 0.99, method), **options)


@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", METHODS)
def test_a_step_waits_for_nothing_and_launches_its_kernels(name, precision):
    with pretended_card() as card:
        running = engine(METHODS[name](), precision, accumulate=2)
        batches = [batch(running.method.noise())] * 2
        with card.never_waited_for():
            for _ in range(2):  # the sums for the log exist from the second on
                running.step(batches, 1e-3)
        assert card.launched == STEP
        assert running.means().keys() >= {"loss", "base", "grad_norm"}
        kept = *running.sums.values(), *running.state_dict().values()
        assert {tensor.device for tensor in kept} == {CARD}


@pytest.mark.parametrize("name", ["supervised", "hard"])
def test_a_step_on_the_reference_waits_for_nothing(name):
    with pretended_card() as card, kernels.use("reference"):
        running = engine(METHODS[name]())
        batches = [batch(running.method.noise())]
        with card.never_waited_for():
            running.step(batches, 1e-3)
        assert card.launched == set()


def test_skipping_the_samples_that_drop_a_branch_waits_for_nothing():
    with pretended_card() as card:
        running = engine(skipping(), accumulate=2)
        batches = [batch(running.method.noise())] * 2
        with card.never_waited_for():
            running.step(batches, 1e-3)
        assert card.launched == STEP


def batch_norm():
    model = batch_norm_convnet(image_size=SIDE, num_classes=CLASSES)
    return methods.find("supervised")(model, methods.config("supervised")(), toy_context(CLASSES))


def test_the_statistics_of_batchnorm_wait_for_nothing():
    with pretended_card() as card, kernels.use("reference"):
        running = engine(batch_norm(), accumulate=2)
        batches = [batch(running.method.noise())] * 2
        with card.never_waited_for():
            running.step(batches, 1e-3)
        assert running.ema.stale
        assert {tensor.device for tensor in running.ema.average.values()} == {CARD}


class Graphs:
    """Stands in for CUDA graphs: notes what was launched while a step was recorded and how often it was replayed."""

    def __init__(self, monkeypatch, card):
        self.card, self.replays, self.recorded = card, 0, 0
        for name in ("stream", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        for name in ("CUDAGraph", "Stream", "current_stream"):
            monkeypatch.setattr(torch.cuda, name, lambda device=None: self)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)

    cuda_stream, capturing = 0, False

    def wait_stream(self, stream):
        pass

    def stream(self, stream):
        return nullcontext()

    def replay(self):
        self.replays += 1

    @contextmanager
    def graph(self, graph, stream, capture_error_mode):
        before, self.capturing = len(self.card.launches), True
        yield
        self.recorded, self.capturing = len(self.card.launches) - before, False


def eight_bit():
    method = supervised()
    method.model.set_fp8_products()
    return method


@pytest.mark.parametrize(
    ("make", "precision"), [(eight_bit, "bf16"), pytest.param(skipping, "fp16", marks=pytest.mark.slow)]
)
def test_a_recorded_step_is_the_step_and_waits_for_nothing(make, precision, monkeypatch):
    with pretended_card(arch=90) as card:
        graphs = Graphs(monkeypatch, card)
        running = engine(make(), precision, capture="graph")
        batches = [batch(running.method.noise())]
        with card.never_waited_for():
            for step in range(WARM_STEPS + 3):
                running.step(batches, 1e-3 * step)
        assert graphs.replays == 3
        assert len(card.launches) == graphs.recorded * (WARM_STEPS + 1)
        assert (make is eight_bit) == ({"_rows_kernel", "_columns_kernel"} <= card.launched)


# ---- what this would find --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mistake",
    [
        lambda loss: loss.item(),
        lambda loss: float(loss) > 0,
        lambda loss: loss.isfinite().all() and None,
        lambda loss: loss.cpu(),
        lambda loss: loss.new_zeros(2)[loss.new_ones(2) > 0],
        lambda loss: torch.ones(2).to(loss.device),
        lambda loss: loss.copy_(torch.ones(())),
    ],
    ids=["item", "float", "bool", "cpu", "mask", "blocking copy", "copy_"],
)
def test_a_step_that_waits_is_found(mistake):
    class Waiting(methods.find("supervised")):
        def step(self, batch, engine):
            with engine.micro():
                loss = engine.run(batch).loss
                mistake(loss.detach())
                engine.backward(loss)

    with pretended_card() as card:
        method = supervised()
        method.__class__ = Waiting
        running = engine(method)
        batches = [batch(method.noise())]
        with pytest.raises((Waits, RuntimeError)), card.never_waited_for():
            running.step(batches, 1e-3)


def test_boxes_are_moved_without_an_index_from_the_host():
    with pretended_card() as card:
        placed = replace(batch({}), geometry=torch.empty(1, B, 2, 3, device=CARD))
        moved, _ = placed.boxes(torch.empty(B, 2, 4, device=CARD))
        assert moved.shape == (B, 2, 4)
        assert "index" not in card.operations


def test_a_tensor_on_the_cpu_is_found():
    with pretended_card():
        running = engine(supervised())
        strangers = [batch(running.method.noise())]
        strangers[0].noise["drop_path"] = torch.rand(B, running.method.model.noise_per_sample)
        with pytest.raises(ValueError, match="on cpu, but must be on cuda:0"):
            running.step(strangers, 1e-3)
