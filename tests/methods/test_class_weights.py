"""Class weights of supervised training: torch's weighted cross-entropy, balanced weights, and what cannot be."""

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import nn

from fastdeit.batch import Labels
from fastdeit.methods.supervised import Supervised, weighted_cross_entropy
from tests.toys import toy_batch, toy_context

B, K = 7, 4
WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 3.0])


def labels(lam):
    generator = torch.Generator().manual_seed(0)
    y1, y2 = (torch.randint(0, K, (B,), generator=generator) for _ in range(2))
    return Labels(y1, y2, torch.full((B,), lam))


def logits():
    return torch.randn(B, K, generator=torch.Generator().manual_seed(1)).requires_grad_()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_hard_labels_count_as_in_torch_but_for_the_divisor(smoothing):
    x, targets = logits(), labels(1.0)
    loss = weighted_cross_entropy(x, targets, WEIGHTS, smoothing)
    total = F.cross_entropy(x, targets.y1, weight=WEIGHTS, label_smoothing=smoothing, reduction="sum")
    torch.testing.assert_close(loss, total / B)


@pytest.mark.parametrize("lam", [0.3, 0.5])
def test_mixed_labels_count_each_class_by_share_and_weight(lam):
    """By the formula, in float64 and class by class."""
    x, targets, smoothing = logits(), labels(lam), 0.1
    expected = 0.0
    for row, y1, y2 in zip(x.double(), targets.y1, targets.y2, strict=True):
        for c in range(K):
            share = 0.9 * (lam * (c == y1) + (1 - lam) * (c == y2)) + 0.1 / K
            expected -= WEIGHTS[c].double() * share * row.log_softmax(0)[c] / B
    loss = weighted_cross_entropy(x, targets, WEIGHTS, smoothing)
    torch.testing.assert_close(loss, expected.float())
    loss.backward()
    assert x.grad.abs().sum() > 0


class Plain(nn.Module):
    noise_per_sample = 0

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3 * 4, K)

    def forward(self, x, noise=None):
        return self.linear(x.flatten(1))


def method(counts=None, **config):
    context = toy_context(num_classes=K)
    torch.manual_seed(0)
    object.__setattr__(context, "class_counts", counts and (lambda: counts))
    return Supervised(Plain(), Supervised.Config(**config), context)


def batch():
    images = torch.randint(0, 256, (B, 2, 2, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    return toy_batch(images, labels(1.0).y1)


def test_balanced_weights_let_all_classes_weigh_the_same():
    """20 images in 4 classes: a class of 5 weighs 1, as by scikit-learn's `compute_class_weight`."""
    weights = method([5, 1, 10, 4], class_weights="balanced").class_weights
    torch.testing.assert_close(weights, torch.tensor([1.0, 5.0, 0.5, 1.25]))


def test_the_method_takes_weights_from_a_checkpoint_where_it_knows_none():
    trained = method(class_weights=tuple(WEIGHTS.tolist()))
    out = trained(batch())
    expected = weighted_cross_entropy(out.logits, batch().targets, WEIGHTS, 0.1)
    torch.testing.assert_close(out.loss, expected)
    other = method(class_weights=(1.0,) * (K - 1) + (7.0,))
    other.load_state_dict(trained.state_dict())
    assert other.class_weights[-1] == 7
    evaluated = method(class_weights="balanced")  # has no training images to count
    assert torch.equal(evaluated.class_weights, torch.ones(K))
    evaluated.load_state_dict(trained.state_dict())
    assert torch.equal(evaluated.class_weights, WEIGHTS)


def test_equal_weights_are_no_weights():
    torch.testing.assert_close(method(class_weights=(1.0,) * K)(batch()).loss, method()(batch()).loss)
    assert "class_weights" not in method().state_dict()


@pytest.mark.parametrize(
    ("counts", "weights", "words"),
    [
        ([5, 0, 1, 1], "balanced", "class number 1 has no training image"),
        (None, (1.0, 2.0), "has 2 numbers, but the data set has 4 classes"),
        (None, (0.0,) * K, "all 0"),
    ],
)
def test_weights_that_do_not_fit_the_data_set(counts, weights, words):
    with pytest.raises(ValueError, match=words):
        method(counts, class_weights=weights)


@pytest.mark.parametrize("wrong", [{"class_weights": "equal"}, {"class_weights": (-1.0, 1.0)}])
def test_weights_that_are_none(wrong):
    with pytest.raises(ValidationError):
        Supervised.Config(**wrong)


def test_binary_cross_entropy_has_no_class_weights():
    with pytest.raises(ValidationError, match=r"does not go with method\.loss bce"):
        Supervised.Config(loss="bce", smoothing=0.0, class_weights="balanced")
