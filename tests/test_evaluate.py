"""Accuracy of predictors whose accuracy is known, on one process and on several."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from fastdeit.engine.dist import World
from fastdeit.evaluate import evaluate

CLASSES = 10


class Labelled:
    """Held-out images of one grey value each, 25 times their label; `bad` of them were left out."""

    def __init__(self, labels, bad=0):
        self.labels = labels
        self.bad = SimpleNamespace(reasons=dict.fromkeys(range(bad), "unreadable"))

    def batches(self):
        for labels in torch.tensor(self.labels, dtype=torch.int64).split(3):
            images = (25 * labels).to(torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 2, 2, 3)
            yield SimpleNamespace(images=(images,), y1=labels)


def predict(x):
    """ "right" knows every label; "second" puts it second; "last" last; "half" is right about even labels alone."""
    label = (x[:, 0, 0, 0] * 255 / 25).round().long()
    hot = torch.nn.functional.one_hot(label, CLASSES).float()
    other = torch.nn.functional.one_hot((label + 1) % CLASSES, CLASSES).float()
    even = (label % 2 == 0).float()[:, None]
    return {"right": hot, "second": hot + 2 * other, "last": -hot, "half": hot * even - hot * (1 - even)}


def accuracy(rank, size, labels, bad=0):
    found = evaluate(
        predict,
        Labelled(labels[rank::size], bad),
        World(torch.device("cpu"), rank, size),
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
        autocast=nullcontext(),
    )
    return found.images, found.bad, found.top1, found.top5


def test_known_predictors():
    images, bad, top1, top5 = accuracy(0, 1, [0, 1, 2, 3, 4, 6, 8], bad=2)
    assert (images, bad) == (7, 2)
    assert top1 == {"right": 100.0, "second": 0.0, "last": 0.0, "half": pytest.approx(500 / 7)}
    assert top5 == {"right": 100.0, "second": 100.0, "last": 0.0, "half": pytest.approx(500 / 7)}


@pytest.mark.parametrize("labels", [[0, 1, 2, 3, 4, 6, 8], [4]])
def test_every_image_counts_once_on_several_processes(ranks, labels):
    images, bad, top1, top5 = accuracy(0, 1, labels)
    assert ranks(2, accuracy, labels) == [(images, bad, top1, top5)] * 2
