"""Long pictures: of what a window shows of them, and of nothing else, memory is taken."""

import math

import numpy as np
import pytest
from PIL import Image

from fastdeit.data.execute import render
from fastdeit.data.loader import EvalLoader, TrainLoader
from fastdeit.data.plan import plan
from tests.data import parity

SIZE = (48, 40)


@pytest.fixture
def made(monkeypatch):
    """The number of pixels of every picture that is made by a resize."""
    counts, by_torch, by_pillow = [], render.resized, Image.Image.resize

    def noted(image, size, *options):
        counts.append(math.prod(size))
        return (by_torch if isinstance(image, np.ndarray) else by_pillow)(image, size, *options)

    monkeypatch.setattr(render, "resized", noted)
    monkeypatch.setattr(Image.Image, "resize", noted)
    return counts


@pytest.fixture(scope="module")
def strips(make_image, encode):
    sides = (4000, 1), (1, 4000), (900, 20), (20, 900)
    return [encode(make_image(0, width, height), "PNG") for width, height in sides]


def test_evaluation_makes_the_window_alone(strips, memory, made):
    (batch,) = EvalLoader(memory(strips), SIZE, 0.875, batch_size=4, threads=1).batches()
    assert made == 4 * [math.prod(SIZE)]
    assert batch.images[0].float().std(dim=(1, 2, 3)).min() > 1


def test_the_simple_crop_makes_the_window_alone(strips, memory, made):
    augment, options = plan.Augment(size=SIZE, crop="simple"), {"seed": 0, "batch_size": 4, "threads": 1}
    loader = TrainLoader(memory(strips), [augment], plan.Mixing(group_size=4), **options)
    list(loader.batches(0, 3))
    assert len(made) == 12
    assert max(made) <= math.prod(SIZE)


def test_the_graph_of_the_gpu_makes_the_window_alone(strips, varied):
    for work in (parity.planned(images, plan.Augment(size=SIZE, crop="simple")) for images in (strips, varied)):
        shown = graph_inputs(work)["0_shown"]
        assert (shown <= SIZE).all()
        assert (shown >= np.array(SIZE) - plan.PAD).all()


def graph_inputs(work):
    from fastdeit.data.execute import graph  # needs DALI, without which tests of other things are collected, too

    return graph.inputs([SIZE], work.views)


def test_an_ordinary_picture_is_resized_as_a_whole(varied, memory, made):
    (batch,) = EvalLoader(memory(varied[:8]), SIZE, 0.875, batch_size=8, threads=1).batches()
    assert min(made) > math.prod(SIZE)
    assert len(batch) == 8


def test_a_part_is_the_same_picture(varied, monkeypatch):
    """Made by Pillow of pictures of any shape, with reflected edges. It may resize rows first where it did columns."""
    monkeypatch.setattr(render, "_LONG", 0)
    work = parity.planned(varied[:48], plan.Augment(size=SIZE, crop="simple"))
    apart = parity.difference(parity.on_cpu(SIZE), varied[:48], work)
    assert apart.max() <= 2
    assert apart.mean() < 0.05
