"""Accuracy of predictors whose accuracy is known, on one process and on several."""

from types import SimpleNamespace

import pytest
import torch

from fastdeit.engine.dist import World
from fastdeit.methods.evaluators import Classify
from fastdeit.run.evaluate import evaluate
from tests.toys import toy_batch

CLASSES = 10


class Labelled:
    """Held-out images of one grey value each, 25 times their label; `bad` of them were left out."""

    def __init__(self, labels, bad=0):
        self.labels = labels
        self.bad = SimpleNamespace(reasons=dict.fromkeys(range(bad), "unreadable"), check=lambda total: None)
        self.share = len(labels) + bad

    def batches(self):
        for labels in torch.tensor(self.labels, dtype=torch.int64).split(3):
            images = (25 * labels).to(torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 2, 2, 3)
            yield toy_batch(images, labels, mean=(0.0,) * 3, std=(1.0,) * 3)


def predict(x):
    """ "right" knows every label; "second" puts it second; "last" last; "half" is right about even labels alone."""
    label = (x[:, 0, 0, 0] * 255 / 25).round().long()
    hot = torch.nn.functional.one_hot(label, CLASSES).float()
    other = torch.nn.functional.one_hot((label + 1) % CLASSES, CLASSES).float()
    even = (label % 2 == 0).float()[:, None]
    return {"right": hot, "second": hot + 2 * other, "last": -hot, "half": hot * even - hot * (1 - even)}


def accuracy(rank, size, labels, bad=0):
    method = torch.nn.Module()
    method.predict = predict
    world = World(torch.device("cpu"), rank, size)
    found = evaluate(method, {"classify": Classify()}, Labelled(labels[rank::size], bad), None, world, "fp32")
    return found.images, found.bad, found.metrics


def test_known_predictors():
    images, bad, metrics = accuracy(0, 1, [0, 1, 2, 3, 4, 6, 8], bad=2)
    assert (images, bad) == (7, 2)
    top1 = {"right": 100.0, "second": 0.0, "last": 0.0, "half": pytest.approx(500 / 7)}
    expected = {f"top1_{name}": value for name, value in top1.items()}
    assert metrics == expected | {f"top5_{name}": value for name, value in top1.items()} | {"top5_second": 100.0}
    assert next(iter(metrics)) == "top1_right"


@pytest.mark.parametrize("labels", [[0, 1, 2, 3, 4, 6, 8], [4]])
def test_every_image_counts_once_on_several_processes(ranks, labels):
    assert ranks(2, accuracy, labels) == [accuracy(0, 1, labels)] * 2
