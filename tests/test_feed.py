"""Batches for a loop of somebody else's: those of a run, from any step on, on any number of processes."""

import os

import pytest
import torch

import fastdeit
from fastdeit.engine.dist import World
from fastdeit.errors import UsageError
from fastdeit.recipe import resolve as recipes
from fastdeit.run import build

FIELDS = {
    "model.image_size": 16,
    "data.source": "synthetic",
    "data.synthetic_samples": 24,
    "data.synthetic_classes": 3,
    "train.batch_size": 8,
    "data.group_size": 4,
    "data.repeats": 1,
    "train.epochs": 6,
    "data.threads": 1,
}
PLAIN = {"data.mixup": 0, "data.cutmix": 0}


@pytest.fixture(scope="module")
def run():
    """The batches of the first 2 epochs of 3 steps, as a run has them."""
    words = [f"{field}={value}" for field, value in FIELDS.items()]
    recipe = recipes.load("deit_tiny", words)
    loader = build.train_loader(recipe, build.sources(recipe)[0], World(torch.device("cpu")), {}, print)
    return [batch for (batch,) in loader.batches(0, 6)]


def test_epochs_are_those_of_a_run(run):
    loader = fastdeit.loader("deit_tiny", FIELDS)
    assert (len(loader), loader.step, loader.classes[0]) == (3, 0, "class_0000")
    pairs = [pair for _ in range(2) for pair in loader]
    assert loader.step == 6
    for batch, (images, targets) in zip(run, pairs, strict=True):
        assert torch.equal(images, batch.pixels())
        y1, y2, lam = batch.targets
        assert torch.allclose(targets.sum(1), torch.ones(8))
        assert torch.allclose(targets[range(8), y1], torch.where(y1 == y2, torch.ones(8), lam))
    loader.close()


def test_a_loop_goes_on_where_it_was_left_or_where_it_is_told(run):
    loader = fastdeit.loader("deit_tiny", FIELDS)
    next(iter(loader))
    assert loader.step == 1
    rest = [images for images, _ in loader]
    assert len(rest) == 2
    assert torch.equal(rest[0], run[1].pixels())
    loader.set_step(4)
    assert [torch.equal(images, batch.pixels()) for (images, _), batch in zip(loader, run[4:], strict=True)] == [
        True
    ] * 2
    loader.set_step(0)
    assert torch.equal(next(iter(loader))[0], run[0].pixels())
    loader.close()
    loader.set_step(1)
    assert torch.equal(next(iter(loader))[0], run[1].pixels())
    loader.close()


def test_processes_share_a_batch(run, monkeypatch):
    parts = []
    for rank in range(2):
        monkeypatch.setitem(os.environ, "RANK", str(rank))
        monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
        parts.append(fastdeit.loader("deit_tiny", FIELDS | {"train.accumulate": 2}))
    assert torch.equal(torch.cat([next(iter(part))[0] for part in parts]), run[0].pixels())
    assert [len(part) for part in parts] == [3, 3]
    assert len(next(iter(fastdeit.loader("deit_tiny", FIELDS, rank=0, world=1)))[0]) == 8
    for part in parts:
        part.close()


def test_bytes_come_neither_mixed_nor_normalised(run):
    loader = fastdeit.loader("deit_tiny", FIELDS, uint8=True)
    images, labels = next(iter(loader))
    assert (images.dtype, images.shape) == (torch.uint8, (8, 16, 16, 3))
    assert torch.equal(images, run[0].images[0])
    assert torch.equal(labels, run[0].targets.y1)
    loader.close()


@pytest.mark.parametrize("plain", [PLAIN, {"data.mix_probability": 0}])
def test_labels_where_nothing_is_mixed(plain):
    loader = fastdeit.loader("deit_tiny", FIELDS | plain)
    images, labels = next(iter(loader))
    assert (images.dtype, images.shape, labels.dtype, labels.shape) == (
        torch.float32,
        (8, 3, 16, 16),
        torch.int64,
        (8,),
    )
    loader.close()


@pytest.mark.parametrize("world", [1, 3])
def test_held_out_images_come_once(world):
    fields, seen = FIELDS | {"data.synthetic_samples": 200, "train.batch_size": 12}, []
    for rank in range(world):
        loader = fastdeit.loader("deit_tiny", fields, train=False, rank=rank, world=world)
        for _ in range(2):
            batches = list(loader)
            assert len(batches) == len(loader)
        seen += torch.cat([labels for _, labels in batches]).tolist()
    assert sorted(seen) == sorted(index % 3 for index in range(20))


def test_what_a_loader_refuses():
    with pytest.raises(UsageError, match="its method wants several views of a sample; a loader gives one"):
        fastdeit.loader("deit_tiny", FIELDS | {"method.use": "tests.plugins.dino:Dino"})
    with pytest.raises(ValueError, match="step -1: training images have steps, from 0 on"):
        fastdeit.loader("deit_tiny", FIELDS).set_step(-1)
    with pytest.raises(ValueError, match="step 3"):
        fastdeit.loader("deit_tiny", FIELDS, train=False).set_step(3)
    with pytest.raises(UsageError, match="rank 2 of 2 processes: ranks are 0 to 1"):
        fastdeit.loader("deit_tiny", FIELDS, rank=2, world=2)
    with pytest.raises(UsageError, match="needs images: add --data ROOT"):
        fastdeit.loader("deit_tiny")


@pytest.mark.parametrize(("rank", "world", "said"), [("x", "2", "RANK='x' is not"), ("3", None, "give rank and world")])
def test_what_a_launcher_left_over_is_refused_with_the_way_out(monkeypatch, rank, world, said):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if world is not None:
        monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(UsageError, match=said):
        fastdeit.loader("deit_tiny", {"data.source": "synthetic"})
