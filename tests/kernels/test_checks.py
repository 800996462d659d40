"""Numbers that make no sense are refused by name, or their result is NaN; empty batches have empty results."""

import math
import re

import pytest
import torch
from torch import Tensor

from fastdeit import kernels
from fastdeit.kernels import _checks, _loss
from fastdeit.kernels._op import AUTO, OPS, REFERENCE
from tests.kernels.test_ops import MEAN, STD, image_args, mlp_args
from tests.kernels.test_optimizer import interpreted

BACKENDS = [AUTO, REFERENCE, interpreted("triton")]
X, ONES = torch.ones(2, 3, 8), torch.ones(8)
LOGITS, LABELS = torch.tensor([[0.5, -1.0, 2.0], [1.0, 0.0, -0.5]]), torch.tensor([0, 2])


def loss(lam=0.5, **settings):
    targets = LABELS, LABELS.flip(0), torch.tensor([0.25, lam])
    return kernels.distillation_loss(LOGITS, LOGITS, targets, LOGITS, **{"distillation": "soft"} | settings).total


NUMBERS = {
    "eps": (lambda v: kernels.add_layer_norm(X, X, ONES, ONES, eps=v), -1e-6),
    "eps ": (lambda v: kernels.layer_norm_mlp(X, ONES, ONES, v, *mlp_args(torch.float32)), -1e-6),
    "scale": (lambda v: kernels.attention(torch.ones(1, 2, 24), 2, v), math.inf),
    "scale ": (lambda v: kernels.query_attention(torch.ones(1, 2, 8), torch.ones(1, 2, 16), 2, v), math.inf),
    "tau": (lambda v: loss(tau=v), 0.0),
    "alpha": (lambda v: loss(alpha=v), 1.5),
    "smoothing": (lambda v: loss(smoothing=v), 1.0),
    "mean[1]": (lambda v: kernels.pixels(image_args()[0], mean=[0.5, v, 0.5], std=STD), math.inf),
    "std[2]": (lambda v: kernels.pixels(image_args()[0], mean=MEAN, std=[1.0, 1.0, v]), 0.0),
    "targets: lam": (lambda v: loss(lam=v), 1.5),
    "targets: lam ": (lambda v: kernels.cosub_loss(LOGITS, (LABELS[:1], LABELS[:1], torch.tensor([v]))), -0.5),
}
"""By name, with a blank where two functions have one: a call, and a number that it does not take."""


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_are_checked_by_name(name):
    call, wrong = NUMBERS[name]
    call(0.5)
    for value in (wrong, math.nan, -math.inf):
        with pytest.raises(ValueError, match="^" + re.escape(f"{name.strip()} is {value}, but must be ")):
            call(value)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ({"low": 0}, "x is -1, but must be at least 0 and finite"),
        ({"low": -math.inf}, None),
        ({"low": 0, "high": 1}, "x is -1, but must be in [0, 1]"),
        ({"low": 0, "high": 1, "below": True}, "x is -1, but must be in [0, 1)"),
        ({"low": -1, "high": 1, "below": True}, None),
        ({"low": -2, "high": -1, "below": True}, "x is -1, but must be in [-2, -1)"),
    ],
)
def test_bounds_in_words(bounds, message):
    if message is None:
        _checks.check_number("x", -1, **bounds)
        return
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        _checks.check_number("x", -1, **bounds)


@pytest.mark.parametrize("lam", [math.nan, 1.5, -0.5])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["ce", "bce", "cosub", "cosub binarised"])
def test_a_share_that_cannot_be_looked_at_makes_the_loss_nan(name, backend, lam, monkeypatch):
    """As on a card: also where targets are binary, of which such a share would be none. The gradient, too, so that the
    step is skipped."""
    monkeypatch.setattr(_checks, "can_look_at", lambda tensor: False)
    logits, targets = LOGITS.clone().requires_grad_(), (LABELS, LABELS.flip(0), torch.tensor([0.25, lam]))
    with kernels.use(backend):
        if name.startswith("cosub"):
            total = kernels.cosub_loss(logits.repeat(2, 1), targets, binarise="binarised" in name)
        else:
            total = kernels.distillation_loss(logits, None, targets, base=name).total
    assert total.isnan()
    assert torch.autograd.grad(total, logits)[0][1].isnan().all()


def test_a_sound_share_changes_no_bit():
    lam = torch.rand(1000)
    assert torch.equal(_loss.soundness(lam), torch.ones(()))


def empty_calls() -> dict[str, tuple]:
    """Each op that takes a batch of nothing, and the shape of its result."""
    no_images, weights = torch.zeros(0, 4, 6, 3, dtype=torch.uint8), mlp_args(torch.float32)
    none, arguments = torch.zeros(0, dtype=torch.int64), {"mean": MEAN, "std": STD}
    plan = arguments | {
        "partner": none,
        "lam": torch.zeros(0),
        "box": torch.zeros(0, 4, dtype=torch.int32),
        "erase": (torch.zeros(0, 4, dtype=torch.int32), none),
    }
    x = X[:0].clone().requires_grad_()
    qkv, q = torch.zeros(0, 3, 24, requires_grad=True), torch.zeros(0, 2, 8)
    return {
        "attention": (lambda: kernels.attention(qkv, 2), (0, 3, 8)),
        "query_attention": (lambda: kernels.query_attention(q, qkv[..., :16], 2), (0, 2, 8)),
        "layer_norm": (lambda: kernels.add_layer_norm(x, None, ONES, ONES)[1], (0, 3, 8)),
        "add_layer_norm": (lambda: kernels.add_layer_norm(x, x, ONES, ONES)[1], (0, 3, 8)),
        "mlp": (lambda: kernels.mlp(x, *weights), (0, 3, 8)),
        "layer_norm_mlp": (lambda: kernels.layer_norm_mlp(x, ONES, ONES, 1e-6, *weights), (0, 3, 8)),
        "pixels": (lambda: kernels.pixels(no_images, **arguments), (0, 3, 4, 6)),
        "pixels of a plan": (lambda: kernels.pixels(no_images, **plan), (0, 3, 4, 6)),
        "patchify": (lambda: kernels.patchify(no_images, patch_size=2, **arguments), (0, 6, 12)),
        "patchify of a plan": (lambda: kernels.patchify(no_images, patch_size=2, **plan), (0, 6, 12)),
    }


@pytest.mark.parametrize(
    ("name", "backend"),
    [(name, backend) for name in empty_calls() for backend in (AUTO, REFERENCE)]
    + [interpreted(name, "triton") for name in empty_calls()]
    + [(name, "host") for name in empty_calls() if name.startswith(("pixels", "patchify"))],
)
def test_an_empty_batch_has_an_empty_result(name, backend):
    call, shape = empty_calls()[name]
    op = OPS[name.partition(" ")[0]]
    with kernels.use(**{op.name: backend}):
        if backend == "triton" and "attention" in name:
            with pytest.raises(RuntimeError, match="are empty"):
                call()
            return
        result: Tensor = call()
    assert (tuple(result.shape), result.is_contiguous()) == (shape, True)
    if result.requires_grad:
        result.sum().backward()


@pytest.mark.parametrize("backend", [*BACKENDS, "host"])
@pytest.mark.parametrize(("patch_size", "size"), [(1, (4, 6)), (2, (4, 6)), (4, (4, 4))])
def test_patches_are_contiguous(backend, patch_size, size):
    """Also those of one pixel, and one patch that is the whole image."""
    images = torch.arange(2 * size[0] * size[1] * 3, dtype=torch.uint8).reshape(2, *size, 3)
    with kernels.use(backend):
        patches = kernels.patchify(images, patch_size=patch_size, mean=MEAN, std=STD)
        whole = kernels.pixels(images, mean=MEAN, std=STD)
    assert patches.is_contiguous()
    assert kernels.to_patches(whole, patch_size).is_contiguous()
    torch.testing.assert_close(patches, kernels.to_patches(whole, patch_size))


@pytest.mark.filterwarnings("ignore:overflow")  # of the interpreter
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("value", "expected"), [(1e20, math.inf), (1e18, 1e18), (1e-24, 0.0)])
def test_the_norm_has_the_range_of_a_square(backend, value, expected):
    """A stated limit, the same on all backends: beyond it the guard skips the step."""
    with kernels.use(backend):
        norm = kernels.global_norm([torch.tensor([value]), torch.zeros(3)])
    assert norm.item() == pytest.approx(expected, rel=1e-6)
