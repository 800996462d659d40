"""Captured steps: what of them a CPU can show. The recording itself is in test_engine_gpu.py."""

from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from test_engine_step import CPU, X, make, weights
from torch import Tensor

from fastdeit.engine.capture import WARM_STEPS, GraphedStep, copy_tensors, map_tensors, tensors_of
from fastdeit.engine.dist import DeviceError, World


@dataclass(frozen=True)
class Pair:
    images: tuple[Tensor, ...]
    label: Tensor | None
    mean: tuple[float, ...] = (0.5,)


def pair(value):
    return Pair((torch.full((2,), value), torch.full((1,), value)), torch.tensor([int(value)]))


def test_batches_are_copied_into_tensors_that_stay():
    kept = map_tensors(torch.clone, pair(1.0))
    stays = tensors_of(kept)
    assert len(stays) == 3
    copy_tensors([kept], [pair(2.0)])
    assert all(mine is before for mine, before in zip(tensors_of(kept), stays, strict=True))
    assert [t.tolist() for t in stays] == [[2.0, 2.0], [2.0], [2]]
    assert kept.mean == (0.5,)


@pytest.mark.parametrize(
    "other", [Pair((torch.zeros(3), torch.zeros(1)), torch.tensor([0])), Pair((torch.zeros(2), torch.zeros(1)), None)]
)
def test_a_batch_of_another_shape_is_refused(other):
    with pytest.raises(ValueError, match="a recorded step takes batches like its first"):
        copy_tensors([pair(1.0)], [other])


class Card:
    """Stands in for `torch.cuda`: a step under capture runs nothing, and a replay runs what was captured."""

    def __init__(self, monkeypatch):
        self.capturing, self.modes, self.ran = None, [], []
        for name in ("stream", "graph", "CUDAGraph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        for name in ("Stream", "current_stream"):
            monkeypatch.setattr(torch.cuda, name, lambda device: self)

    def wait_stream(self, stream):
        pass

    def stream(self, stream):
        return nullcontext()

    def CUDAGraph(self):
        return SimpleNamespace()

    @contextmanager
    def graph(self, graph, stream, capture_error_mode):
        self.capturing = graph
        self.modes.append(capture_error_mode)
        yield
        self.capturing = None

    def step(self, batches, lr):
        run = lambda: self.ran.append((float(batches[0].images[0][0]), batches[0].label.item(), float(lr)))  # noqa: E731
        if self.capturing is None:
            run()
        else:
            self.capturing.replay = run


def test_every_step_is_run_once_on_its_own_batch_and_rate_before_and_after_the_recording(monkeypatch):
    card = Card(monkeypatch)
    graphed = GraphedStep(card.step, CPU)
    for number in range(WARM_STEPS + 4):
        given = pair(float(number))
        graphed([given], 0.1 * number)
        map_tensors(torch.zero_, given)  # the loader's memory is its own again
    assert card.ran == [(float(number), number, 0.1 * number) for number in range(WARM_STEPS + 4)]
    assert card.modes == ["thread_local"]


def test_a_graph_needs_a_card():
    with pytest.raises(DeviceError, match="graph needs a CUDA device, not cpu; use none or compile"):
        make(capture="graph")


def run(capture, world=None):
    torch.compiler.reset()
    engine = make(ema_decay=0.9, clip_grad=0.01, accumulate=2, capture=capture, world=world)
    found = []
    for step in range(50):
        engine.step(list(X.chunk(2)), 0.01 * (1 + step % 3))
        found.append(engine.means()["loss"])
    return torch.tensor(found), weights(engine)


@pytest.mark.slow
def test_a_compiled_step_learns_the_same():
    torch.testing.assert_close(run("compile"), run("none"), rtol=1e-3, atol=1e-6)


def compiled_rank(rank, size):
    return run("compile", World(CPU, rank, size))[0].tolist()


@pytest.mark.slow
def test_compiled_processes_learn_the_same(ranks):
    mine, theirs = ranks(2, compiled_rank)
    assert mine == theirs
    torch.testing.assert_close(torch.tensor(mine), run("none")[0], rtol=1e-3, atol=1e-6)
