"""The details of an evaluation, against plain restatements in float64."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import confusion_matrix

from fastdeit.engine.dist import World
from fastdeit.errors import FastdeitError
from fastdeit.methods.base import scores
from fastdeit.methods.evaluators import Classify, Evaluation
from fastdeit.run.classification import BINS, Classification
from tests.toys import toy_batch

CLASSES, IMAGES = 7, 60


def logits_and_labels(seed=0):
    generator = torch.Generator().manual_seed(seed)
    first, second = (3 * torch.randn(IMAGES, CLASSES, generator=generator) for _ in range(2))
    return first, second, torch.randint(CLASSES, (IMAGES,), generator=generator)


def judged(logits, labels, *, rank=0, size=1, rows=None, fuse="softmax", evaluator=Classification, **options):
    """Metrics and evaluator; the network looks its logits up by the grey value of an image, which is its number."""
    rows = torch.arange(IMAGES)[rank::size] if rows is None else rows

    def held_out():
        for some in rows.split(17) if len(rows) else ():
            pixels = some.to(torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 2, 2, 3)
            yield toy_batch(pixels, labels[some], mean=(0.0,) * 3, std=(1 / 255,) * 3)

    def network(x):
        number = x[:, 0, 0, 0].round().long()
        return tuple(head[number] for head in logits) if isinstance(logits, tuple) else logits[number]

    made = evaluator(network, fuse, **options)
    evaluation = Evaluation(None, held_out, None, nullcontext, World(torch.device("cpu"), rank, size))
    return made(evaluation), made


def restated(probability, label):
    """Metrics of probabilities float64 `[N, K]`, by loops."""
    order = np.argsort(-probability, 1, kind="stable")
    right = order[:, 0] == label
    sure = probability.max(1)
    error = 0.0
    for i in range(BINS):
        inside = (sure > i / BINS) & (sure <= (i + 1) / BINS)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - sure[inside].mean())
    return {
        "top1": 100 * right.mean(),
        "top5": 100 * (order[:, :5] == label[:, None]).any(1).mean(),
        "loss": -np.log(probability[np.arange(len(label)), label]).mean(),
        "ece": 100 * error,
        "nonfinite": 0,
    }


@pytest.mark.parametrize("fuse", ["softmax", "logit", "class", "distillation"])
def test_every_score_of_two_heads_is_judged_and_the_answer_comes_first(fuse):
    first, second, labels = logits_and_labels()
    metrics, made = judged((first, second), labels, fuse=fuse, confusion=True)
    a, b = first.double(), second.double()
    probability = {
        "softmax": (a.softmax(1) + b.softmax(1)) / 2,
        "logit": ((a + b) / 2).softmax(1),
        "class": a.softmax(1),
        "distillation": b.softmax(1),
    }
    expected = {
        f"{measure}_{name}": pytest.approx(value, rel=1e-5)
        for name, p in probability.items()
        for measure, value in restated(p.numpy(), labels.numpy()).items()
    }
    assert metrics == expected
    assert next(iter(metrics)) == f"top1_{fuse}"
    answer = probability[fuse].argmax(1)
    table = torch.from_numpy(confusion_matrix(labels, answer, labels=range(CLASSES)))
    assert torch.equal(made.confusion, table)
    assert torch.equal(made.per_class[:, 0], table.sum(1))
    assert torch.equal(made.per_class[:, 1], table.diagonal())
    assert made.per_class[:, 2].sum() == round(metrics[f"top5_{fuse}"] * IMAGES / 100)
    assert (
        metrics[f"top1_{fuse}"]
        == 100 * (next(iter(scores((first, second), fuse).values())).argmax(1) == labels).sum().item() / IMAGES
    )


def test_probabilities_beyond_the_range_of_float32_have_a_finite_loss():
    logits = torch.zeros(IMAGES, CLASSES)
    logits[:, 0] = 300.0
    metrics, _ = judged((logits, logits), torch.ones(IMAGES, dtype=torch.int64))
    assert metrics["loss_softmax"] == pytest.approx(300.0)
    assert (metrics["ece_softmax"], metrics["top1_softmax"]) == (100.0, 0.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_images_without_finite_scores_are_wrong_and_counted(bad):
    """Their label is where NaN and infinity rank first, which a plain `topk` would count as right."""
    first, _, labels = logits_and_labels()
    labels[:] = first.argmax(1)
    first[:6, :] = torch.where(F.one_hot(labels[:6], CLASSES).bool(), bad, first[:6])
    metrics, made = judged(first, labels)
    table = judged(first, labels, confusion=True)[1].confusion
    assert table.sum() == table.trace() == IMAGES - 6
    expected = restated(first[6:].double().softmax(1).numpy(), labels[6:].numpy())
    assert metrics["nonfinite_class"] == 6
    assert metrics["top1_class"] == pytest.approx(100 * (IMAGES - 6) / IMAGES)
    assert metrics["loss_class"] == pytest.approx(expected["loss"], rel=1e-5)
    assert metrics["ece_class"] == pytest.approx(expected["ece"], rel=1e-5)
    assert (made.per_class.sum(0)[:2].tolist(), made.confusion) == ([IMAGES, IMAGES - 6], None)
    in_training, _ = judged(
        first, labels, evaluator=lambda network, fuse: Classify(lambda batch: {"class": network(batch.pixels())})
    )
    assert in_training["top1_class"] == metrics["top1_class"]
    assert in_training["top5_class"] == metrics["top5_class"]


def on_rank(rank, size, logits, labels):
    metrics, made = judged(logits, labels, rank=rank, size=size, confusion=True)
    nothing, everything = torch.arange(0), torch.arange(IMAGES)
    lone, _ = judged(logits, labels, rank=rank, size=size, rows=everything if rank == size - 1 else nothing)
    assert lone == pytest.approx(metrics), "the main process may have no image that can be used"
    return metrics, made.per_class.tolist(), made.confusion.tolist()


def test_two_processes_find_what_one_does(ranks):
    first, second, labels = logits_and_labels()
    alone, per_class, confusion = on_rank(0, 1, (first, second), labels)
    assert ranks(2, on_rank, (first, second), labels) == [(pytest.approx(alone), per_class, confusion)] * 2


def test_without_any_image_there_is_nothing_to_judge_by():
    first, second, labels = logits_and_labels()
    with pytest.raises(FastdeitError, match="no held-out image can be used"):
        judged((first, second), labels, rows=torch.arange(0))
