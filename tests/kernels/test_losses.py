"""The loss against formulas on dense one-hot targets in float64, written independently of the op."""

import itertools

import pytest
import torch

from fastdeit.kernels import distillation_loss, losses

B, K = 6, 11
LAM = torch.tensor([0.3, 0.7, 1.0, 0.0, 0.4, 1.0])
Y1 = torch.tensor([0, 10, 4, 7, 5, 2])
Y2 = torch.tensor([3, 10, 6, 1, 5, 2])  # equal labels with lam 0.7 and 0.4, lam 1 and 0, and no mixing at all


def logits(dtype=torch.float64, scale=3.0):
    torch.manual_seed(1)
    return [(scale * torch.randn(B, K, dtype=torch.float64)).to(dtype).requires_grad_() for _ in range(3)]


def dense_targets():
    one_hot = torch.nn.functional.one_hot
    lam = LAM.double()[:, None]
    return lam * one_hot(Y1, K) + (1 - lam) * one_hot(Y2, K)


def dense_loss(cls, dist, teacher, smoothing, base, distillation, alpha, tau, reduction):
    target = dense_targets()
    if base == "ce":
        target = smoothing / K + (1 - smoothing) * target
        label = -(target * cls.softmax(1).log()).sum() / B
    else:
        target = (target > 0).double()
        p = cls.sigmoid()
        label = -(target * p.log() + (1 - target) * (1 - p).log()).sum() / (B * K)
    if distillation == "none":
        return label, label, torch.zeros(())
    if distillation == "hard":
        taught = -dist.softmax(1).log()[torch.arange(B), teacher.argmax(1)].mean()
    else:
        p, q = (teacher / tau).softmax(1), (dist / tau).softmax(1)
        taught = tau**2 * (p * (p / q).log()).sum() / (B * K if reduction == "numel" else B)
    return (1 - alpha) * label + alpha * taught, label, taught


@pytest.mark.parametrize("registered", [False, True], ids=["direct", "registered"])
@pytest.mark.parametrize(
    ("base", "smoothing", "distillation", "reduction"),
    [
        *itertools.product(["ce"], [0.0, 0.1], ["none", "hard"], ["numel"]),
        *itertools.product(["ce"], [0.1], ["soft"], ["numel", "batchmean"]),
        *itertools.product(["bce"], [0.0], ["none", "hard", "soft"], ["numel"]),
    ],
)
def test_is_the_dense_formula(base, smoothing, distillation, reduction, registered, force):
    if registered:
        force("reference")
    cls, dist, teacher = logits()
    settings = {"smoothing": smoothing, "base": base, "distillation": distillation, "alpha": 0.3, "tau": 2.0}
    settings["reduction"] = reduction
    expected = dense_loss(cls, dist, teacher, **settings)
    wanted = [cls] if distillation == "none" else [cls, dist]
    heads = [cls, None, (Y1, Y2, LAM)] if distillation == "none" else [cls, dist, (Y1, Y2, LAM), teacher]
    result = distillation_loss(*heads, **settings)
    for mine, theirs in zip(result, expected, strict=True):
        torch.testing.assert_close(mine, theirs.to(mine.dtype), rtol=2e-7, atol=1e-9)  # lam is float32
    mine, theirs = (torch.autograd.grad(loss, wanted) for loss in (result.total, expected[0]))
    torch.testing.assert_close(mine, theirs, rtol=2e-7, atol=1e-9)
    assert not result.base.requires_grad
    assert not result.distill.requires_grad
    assert teacher.grad is None


def test_soft_reductions_differ_by_the_number_of_classes():
    cls, dist, teacher = logits()
    numel, batchmean = (
        distillation_loss(cls, dist, (Y1, Y2, LAM), teacher, distillation="soft", reduction=reduction).distill
        for reduction in ("numel", "batchmean")
    )
    torch.testing.assert_close(numel * K, batchmean)


def test_usual_distillation_sums_the_gradients_of_the_one_head():
    cls, _, teacher = logits()
    second = cls.detach().clone().requires_grad_()
    (one,) = torch.autograd.grad(distillation_loss(cls, cls, (Y1, Y2, LAM), teacher, distillation="hard").total, [cls])
    two = torch.autograd.grad(
        distillation_loss(cls, second, (Y1, Y2, LAM), teacher, distillation="hard").total, [cls, second]
    )
    torch.testing.assert_close(one, sum(two))


@pytest.mark.parametrize("registered", [False, True], ids=["direct", "registered"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_logits_lose_nothing_inside(dtype, registered, force):
    """Losses are float32; gradients round the exact ones once, even where 1/B alone would be lost in 16 bit."""
    if registered:
        force("reference")
    cls, dist, teacher = logits(dtype)
    result = distillation_loss(cls, dist, (Y1, Y2, LAM), teacher, distillation="soft", tau=3.0, smoothing=0.1)
    exact_inputs = [t.detach().double().requires_grad_() for t in (cls, dist)]
    exact = dense_loss(*exact_inputs, teacher.double(), 0.1, "ce", "soft", 0.5, 3.0, "numel")
    assert result.total.dtype == torch.float32
    torch.testing.assert_close(result.total.double(), exact[0].double(), rtol=1e-6, atol=0)
    scale = 1024.0
    mine = torch.autograd.grad(result.total * scale, [cls, dist])
    theirs = torch.autograd.grad(exact[0] * scale, exact_inputs)
    for got, want in zip(mine, theirs, strict=True):
        assert got.dtype == dtype
        spacing = torch.finfo(dtype).eps * want.abs() + torch.finfo(dtype).smallest_normal
        assert ((got.double() - want).abs() <= spacing).all()


def test_eager_mode_computes_no_unit_gradients(monkeypatch):
    monkeypatch.delattr(losses, "_label_gradient")
    cls, dist, teacher = logits()
    total = distillation_loss(cls, dist, (Y1, Y2, LAM), teacher, distillation="soft").total
    total.backward()
    assert cls.grad is not None
    assert "fastdeit" not in type(total.grad_fn).__name__.lower()


@pytest.mark.parametrize("wanted", ["cls", "dist", "neither", "no_grad"])
def test_unit_gradients_only_where_a_gradient_is_wanted(wanted, force, monkeypatch):
    force("reference")
    seen = []
    registered = losses.OP.registered
    monkeypatch.setattr(losses.OP, "registered", lambda *args: seen.append(registered(*args)) or seen[-1])
    cls, dist, teacher = (t.detach() for t in logits())
    (dist if wanted == "dist" else cls).requires_grad_(wanted != "neither")
    with torch.set_grad_enabled(wanted != "no_grad"):
        total = distillation_loss(cls, dist, (Y1, Y2, LAM), teacher, distillation="hard").total
    *_, dcls, ddist = seen[0]
    assert total.requires_grad == (wanted in ("cls", "dist"))
    assert (dcls.numel(), ddist.numel()) == ((B * K, B * K) if total.requires_grad else (0, 0))


@pytest.mark.parametrize("base", ["ce", "bce"])
def test_large_logits_stay_finite(base):
    cls = torch.tensor([[200.0, -200.0, 0.0]], requires_grad=True)
    targets = torch.tensor([1]), torch.tensor([1]), torch.tensor([1.0])
    loss = distillation_loss(cls, None, targets, base=base).total
    torch.testing.assert_close(loss, torch.tensor(400.0 if base == "ce" else 400.0 / 3 + 0.6931472 / 3))
    (grad,) = torch.autograd.grad(loss, cls)
    assert grad.isfinite().all()


@pytest.mark.parametrize("registered", [False, True], ids=["direct", "registered"])
@pytest.mark.parametrize(("name", "label"), [("y1", K), ("y2", -1)])
def test_label_out_of_range(name, label, registered, force):
    if registered:
        force("reference")
    targets = {"y1": Y1.clone(), "y2": Y2.clone(), "lam": LAM}
    targets[name][3] = label
    with pytest.raises(IndexError, match=rf"targets: {name} holds {label}, but must be in \[0, {K}\)"):
        distillation_loss(logits()[0], None, tuple(targets.values()))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"smoothing": 0.1, "base": "bce"}, ValueError, "every class positive"),
        ({"smoothing": 1.0}, ValueError, r"smoothing is 1.0, but must be in \[0, 1\)"),
        ({"base": "mse"}, ValueError, "base is 'mse', but must be one of: ce, bce"),
        ({"distillation": "firm"}, ValueError, "distillation is 'firm', but must be one of: none, hard, soft"),
        ({"reduction": "sum"}, ValueError, "reduction is 'sum', but must be one of: numel, batchmean"),
        ({"tau": 0.0}, ValueError, "tau is 0.0, but must be positive"),
        ({"dist": torch.zeros(B, K)}, ValueError, "dist is given, but distillation is 'none'"),
        ({"teacher": torch.zeros(B, K)}, ValueError, "teacher is given, but distillation is 'none'"),
        ({"distillation": "hard"}, ValueError, "dist is None.*pass dist=cls"),
        ({"distillation": "hard", "dist": torch.zeros(B, K)}, ValueError, "teacher is None"),
        (
            {"distillation": "hard", "dist": torch.zeros(B, K), "teacher": torch.zeros(B, K + 1)},
            ValueError,
            r"teacher has shape \[6, 12\], but must be \[B, K\] like cls = \[6, 11\]",
        ),
        ({"cls": torch.zeros(B)}, ValueError, r"cls has shape \[6\], but must be \[B, K\]"),
        ({"cls": torch.zeros(B, K, dtype=torch.int64)}, TypeError, "cls is torch.int64"),
        ({"targets": (Y1[:2], Y2, LAM)}, ValueError, r"targets: y1 has shape \[2\]"),
        ({"targets": (Y1, Y2, LAM.to("meta"))}, ValueError, "targets: lam is on meta, but must be on cpu like cls"),
        (
            {"distillation": "hard", "dist": torch.zeros(B, K), "teacher": torch.zeros(B, K, device="meta")},
            ValueError,
            "teacher is on meta, but must be on cpu like cls",
        ),
        ({"targets": (Y1, Y2.int(), LAM)}, TypeError, "targets: y2 is torch.int32, but must be torch.int64"),
    ],
)
def test_errors_name_the_argument(changes, error, message):
    arguments = {"cls": torch.zeros(B, K), "dist": None, "targets": (Y1, Y2, LAM)} | changes
    with pytest.raises(error, match=message):
        distillation_loss(**arguments)
