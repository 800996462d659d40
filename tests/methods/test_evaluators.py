"""Evaluators on features and losses that are known, on one process and on several."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

from fastdeit import models
from fastdeit.engine.dist import World
from fastdeit.methods import evaluators
from fastdeit.methods.base import Method, Out
from fastdeit.methods.config import SupervisedConfig
from fastdeit.methods.evaluators import Classify, Evaluation, HeldOutLoss, Knn, LinearProbe
from fastdeit.models.timm_model import TimmVisionTransformer
from fastdeit.run.evaluate import evaluate
from tests.toys import toy_batch, toy_context

CLASSES = 4


class Stream:
    """Images of one grey value each, 25 times their label plus `shift`; a process has every `size`-th."""

    def __init__(self, labels, rank=0, size=1, shift=0):
        self.labels, self.shift = labels[rank::size], shift
        self.bad, self.share = SimpleNamespace(reasons={}, check=lambda total: None), len(self.labels)

    def batches(self):
        for labels in torch.tensor(self.labels, dtype=torch.int64).split(3) if self.labels else ():
            images = (25 * labels + self.shift).to(torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 2, 2, 3)
            yield toy_batch(images, labels, mean=(0.0,) * 3, std=(1.0,) * 3)


class Features(torch.nn.Module):
    """An angle for every grey value, so that equal labels are near each other; `blind` sees none of it."""

    def __init__(self, blind=False):
        super().__init__()
        self.blind = blind

    def features(self, x):
        angle = x[:, 0, 0, 0] * (0.0 if self.blind else 5.0)
        return torch.stack((angle.cos(), angle.sin()), 1)


def found(rank, size, evaluator, method, training, held_out):
    world = World(torch.device("cpu"), rank, size)
    result = evaluate(
        method, {"it": evaluator}, Stream(held_out, rank, size, 3), lambda: Stream(training, rank, size), world, "fp32"
    )
    return result.images, result.metrics


TRAINING, HELD_OUT = [0, 1, 2, 3] * 5, [0, 1, 2, 3, 3, 2, 1]


@pytest.mark.parametrize("evaluator", [Knn(neighbours=3), LinearProbe()], ids=["knn", "linear"])
def test_features_that_tell_labels_apart_are_told_from_those_that_do_not(evaluator):
    name = "knn_top1" if isinstance(evaluator, Knn) else "linear_top1"
    assert found(0, 1, evaluator, Features(), TRAINING, HELD_OUT) == (7, {name: 100.0})
    _, metrics = found(0, 1, evaluator, Features(blind=True), TRAINING, HELD_OUT)
    assert metrics[name] < 50
    assert found(0, 1, evaluator, Features(), TRAINING, []) == (0, {name: 0.0}), "no image can be used"


def both(rank, size, training, held_out):
    return [found(rank, size, each, Features(), training, held_out) for each in (Knn(3), LinearProbe())]


@pytest.mark.parametrize(
    ("training", "held_out"),
    [
        (TRAINING, HELD_OUT),
        pytest.param(TRAINING, [2], marks=pytest.mark.slow),
        pytest.param([2], HELD_OUT, marks=pytest.mark.slow),
    ],
    ids=["shared", "fewer images than processes", "fewer training images than processes"],
)
def test_several_processes_find_the_same(ranks, training, held_out):
    expected = both(0, 1, training, held_out)
    assert ranks(2, both, training, held_out) == [expected] * 2


def every_kind(rank, size):
    """All evaluators where the main process has no image that can be used, and the last one has all."""
    method = Mean()
    held_out = Stream(HELD_OUT if rank == size - 1 else [], shift=3)
    kinds = {"classes": Classify(), "loss": HeldOutLoss(), "knn": Knn(3), "linear": LinearProbe()}
    world = World(torch.device("cpu"), rank, size)
    return evaluate(method, kinds, held_out, lambda: Stream(TRAINING, rank, size), world, "fp32").metrics


class Mean(Features):
    """Answers with the grey value, and its loss is the mean label."""

    def predict(self, x):
        return {"head": torch.stack([-(x[:, 0, 0, 0] - 25 * k / 255).abs() for k in range(CLASSES)], 1)}

    def __call__(self, batch):
        return mean_label(batch)


def test_a_main_process_without_an_image_takes_part(ranks):
    alone = every_kind(0, 1)
    assert alone["top1_head"] == 100.0
    assert ranks(2, every_kind) == [alone] * 2


def test_a_linear_probe_is_the_least_squares_fit_and_gathers_no_features(monkeypatch):
    """Against numpy's solution of the same ridge regression, in several blocks of rows."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 6, generator=generator) * torch.logspace(-1, 1, 6) + 3
    labels = torch.randint(4, (2000,), generator=generator)
    x[:, 1] += 0.2 * labels  # a little of what a fit can find
    wide = (x - x.mean(0)).double() / x.double().std(0, correction=0)
    wide = torch.cat([wide, torch.ones(2000, 1, dtype=torch.float64)], 1).numpy()
    damped = wide.T @ wide + 2000 * np.eye(7)
    scores = wide @ np.linalg.solve(damped, wide.T @ np.eye(4)[labels])
    expected = 100.0 * (scores.argmax(1) == labels.numpy()).mean()
    assert 30 < expected < 90  # many images lie near a border, where another fit decides otherwise

    rows = []
    monkeypatch.setattr(evaluators, "_ROWS", 300)
    monkeypatch.setattr(evaluators, "_features", lambda evaluation, batches: (x, labels))
    world = World(torch.device("cpu"))
    monkeypatch.setattr(world, "gather", lambda tensor: rows.append(tensor.shape) or tensor)
    evaluation = Evaluation(None, lambda: None, lambda: None, nullcontext, world)
    assert LinearProbe(1.0)(evaluation) == {"linear_top1": pytest.approx(expected)}
    assert rows == [(1, 6), (2000,)]


@pytest.mark.parametrize("known", [1.0, 100.0])
@pytest.mark.parametrize("asked", [1e-3, 1.0])
def test_votes_are_weighted_by_nearness_in_angle(known, asked):
    """Two far neighbours of one label lose against a near one of another, however long the features are."""
    training = torch.tensor([[1.0, 0.0], [-0.2 * known, known], [-0.2 * known, known]])
    method = SimpleNamespace(features=lambda x: training if len(x) == 3 else asked * torch.tensor([[1.0, 0.1]]))
    batches = {
        "training": lambda: iter([toy_batch(torch.zeros(3, 2, 2, 3, dtype=torch.uint8), torch.tensor([1, 0, 0]))]),
        "held_out": lambda: iter([toy_batch(torch.zeros(1, 2, 2, 3, dtype=torch.uint8), torch.tensor([1]))]),
    }
    evaluation = Evaluation(method, **batches, autocast=nullcontext, processes=World(torch.device("cpu")))
    assert Knn(3, temperature=0.07)(evaluation) == {"knn_top1": 100.0}
    assert Knn(3, temperature=1e6)(evaluation) == {"knn_top1": 0.0}


def mean_label(batch):
    loss = batch.targets.y1.float().mean()
    return Out(loss, parts={"twice": 2 * loss})


def held_out_loss(rank, size, labels):
    return found(rank, size, HeldOutLoss(), Mean(), [], labels)


@pytest.mark.parametrize("labels", [[0, 1, 2, 3, 3], [2]])
def test_the_held_out_loss_is_the_mean_over_images(ranks, labels):
    mean = sum(labels) / len(labels)
    expected = len(labels), {"held_out_loss": pytest.approx(mean), "held_out_twice": pytest.approx(2 * mean)}
    assert held_out_loss(0, 1, labels) == expected
    assert ranks(2, held_out_loss, labels) == [expected] * 2


def test_two_evaluators_with_one_metric_are_refused():
    class Other(Knn):
        pass

    world = World(torch.device("cpu"))
    with pytest.raises(ValueError, match="evaluator 'b' returns the metric 'knn_top1', which an earlier one has"):
        evaluate(Features(), {"a": Knn(3), "b": Other(3)}, Stream(HELD_OUT), lambda: Stream(TRAINING), world, "fp32")


def test_the_features_of_a_model_are_what_its_head_reads():
    """Without a class token they are the mean of the patches, and not the patch in the corner."""
    small = {"depth": 1, "dim": 8, "heads": 2, "image_size": 32, "patch_size": 8, "num_classes": 3}
    networks = [models.build(name, **small) for name in ("deit_digits_patch8_32", "vit_small_patch16_gap_224")]
    sizes = {"depth": 1, "embed_dim": 8, "num_heads": 2, "img_size": 32, "patch_size": 8, "num_classes": 3}
    for options in ({}, {"class_token": False, "global_pool": "avg", "fc_norm": False}):
        inner = timm.create_model("vit_tiny_patch16_224", **sizes, **options)
        networks.append(TimmVisionTransformer("vit_tiny_patch16_224", inner, (32, 32)))
    for network in networks:
        torch.nn.init.normal_(network.head.weight)  # some begin at zero
        x = torch.randn(2, 3, 32, 32)
        features = Method(network.eval(), SupervisedConfig(), toy_context()).features(x)
        torch.testing.assert_close(network.head(features), network(x))


def test_neighbours_are_found_in_parts_as_in_the_whole():
    generator = torch.Generator().manual_seed(0)
    known, features = (F.normalize(torch.randn(n, 8, generator=generator)) for n in (300, 20))
    labels = torch.randint(9, (300,), generator=generator)
    parts = [(known[start : start + 70], labels[start : start + 70]) for start in range(0, 300, 70)]
    cosines, found = Knn(neighbours=25)._nearest(features, parts)
    expected, index = (features @ known.t()).topk(25)
    torch.testing.assert_close(cosines, expected)
    assert torch.equal(found, labels[index])
