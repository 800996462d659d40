"""How well a classifier does on held-out images, in more detail than a run needs: `Classification`.

A run asks only for accuracy (`methods.evaluators.Classify`). `fastdeit eval` also says how sure the network is, which
classes it confuses, and what each head and each fusion of two heads reaches.
"""

from collections.abc import Callable
from math import log, nan

import torch
from torch import Tensor

from fastdeit.batch import Batch
from fastdeit.errors import FastdeitError
from fastdeit.methods.base import scores
from fastdeit.methods.config import Fuse
from fastdeit.methods.evaluators import Evaluation, images

BINS = 15
"""Bins of confidence of the calibration error."""
_MEASURES = "top1", "top5", "loss", "ece", "nonfinite"


def named_scores(logits: Tensor | tuple[Tensor, Tensor], fuse: Fuse) -> dict[str, tuple[Tensor, Tensor]]:
    """By name (scores, log-probabilities), each float32 `[B, K]`, of a network with one head or two.

    The first is the answer. One head is `class`. Two heads have both fusions besides, `softmax` (the mean of the
    probabilities; DeiT paper, section 4) and `logit` (of the mean of the logits; DeiT's public code), whichever is the
    answer. The scores are those that `methods.base.scores` ranks classes by.
    """
    if isinstance(logits, Tensor):
        return {"class": (logits.float(), logits.float().log_softmax(-1))}
    first, second = (head.float().log_softmax(-1) for head in logits)
    sure = {
        "softmax": torch.logaddexp(first, second) - log(2),
        "logit": ((logits[0].float() + logits[1].float()) / 2).log_softmax(-1),
        "class": first,
        "distillation": second,
    }
    ranked = {name: next(iter(scores(logits, name).values())) for name in sure}
    order = [fuse, *(name for name in sure if name != fuse)]
    return {name: (ranked[name], sure[name]) for name in order}


class Classification:
    """An evaluator: for each of the scores top-1 and top-5 in per cent, loss, calibration error, non-finite rows.

    The metrics are `top1_NAME`, `top5_NAME`, `loss_NAME` (mean of -log p of the label, in nats), `ece_NAME` (expected
    calibration error in per cent: bins of equal width over the largest probability; Guo et al., ICML 2017, section 2)
    and `nonfinite_NAME`, a number of images. An image whose scores are not all finite counts as wrong, and takes no
    part in loss and calibration error, which are nan where there is no other.

    logits     network of images `[B, 3, H, W]`: logits, or those of two heads
    fuse       which of the scores is the answer, for two heads
    confusion  whether to keep `confusion`, which has the square of the number of classes

    After the call, on every process:
    names      of the scores, the answer first
    per_class  int64 `[K, 3]`, of the answer: images of the class, of these right, and right among five
    confusion  int64 `[K, K]`, of the answer: row the label, column the answer; images whose scores are not all finite
               have none and are left out; None unless asked for
    bins       float64 `[BINS, 3]`, of the answer: images by their confidence, of these right, and the sum of their
               confidences
    """

    lower_is_better = False

    def __init__(
        self, logits: Callable[[Tensor], Tensor | tuple[Tensor, Tensor]], fuse: Fuse, *, confusion: bool = False
    ) -> None:
        self._logits, self._fuse, self._keep_confusion = logits, fuse, confusion
        self.names: list[str] = []
        self.per_class: Tensor | None = None
        self.confusion: Tensor | None = None
        self.bins: Tensor | None = None

    def __call__(self, evaluation: Evaluation) -> dict[str, float]:
        sums: dict[str, Tensor] = {}
        processes = evaluation.processes
        answer: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = []
        classes = 0
        for batch in evaluation.held_out():
            with evaluation.autocast():
                scores = named_scores(self._logits(images(batch)), self._fuse)
            for index, (name, (ranked, sure)) in enumerate(scores.items()):
                row, hits = _row(ranked, sure, batch)
                sums[name] = sums[name] + row if name in sums else row
                if index == 0:
                    classes = ranked.shape[1]
                    answer.append((batch.targets.y1, *hits))
        found = processes.first((list(sums), classes) if sums else None)
        if found is None:
            raise FastdeitError("no held-out image can be used, so there is nothing to judge by")
        names, classes = found
        self.names = names
        zero = torch.zeros(5 + 3 * BINS, dtype=torch.float64, device=processes.device)
        total = processes.sum(torch.stack([sums.get(name, zero) for name in names]))
        self.bins = total[0][5:].reshape(BINS, 3).cpu()
        self._tables(answer, classes, evaluation)
        metrics = {name: _metrics(row) for name, row in zip(names, total, strict=True)}
        return {f"{measure}_{name}": metrics[name][measure] for measure in _MEASURES for name in names}

    def _tables(self, answer: list, classes: int, evaluation: Evaluation) -> None:
        device = evaluation.processes.device
        per_class = torch.zeros(classes, 3, dtype=torch.int64, device=device)
        confusion = torch.zeros(classes * classes if self._keep_confusion else 0, dtype=torch.int64, device=device)
        for label, given, first, five, finite in answer:
            row = torch.stack((torch.ones_like(label), first.long(), five.long()), 1)
            per_class.index_add_(0, label, row)
            if self._keep_confusion:
                confusion.index_add_(0, label * classes + given, finite.long())
        self.per_class = evaluation.processes.sum(per_class).cpu()
        if self._keep_confusion:
            self.confusion = evaluation.processes.sum(confusion).reshape(classes, classes).cpu()


def _row(ranked: Tensor, sure: Tensor, batch: Batch) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """(sums float64 `[5 + 3 * BINS]` of a batch, (answer, right, right among five, finite) of its images).

    The sums are images, right, right among five, non-finite, -log p; then for each bin images, right and confidence.
    """
    label = batch.targets.y1
    finite = ranked.isfinite().all(-1)
    best = ranked.nan_to_num(nan=-torch.inf).topk(min(5, ranked.shape[-1])).indices
    hits = (best == label[:, None]) & finite[:, None]
    right, five = hits[:, 0], hits.any(1)
    loss = torch.where(finite, -sure.gather(1, label[:, None])[:, 0].double(), 0.0)
    confidence = torch.where(finite, sure.amax(-1).double().exp(), 0.0)
    # Bin i holds confidences in (i / BINS, (i + 1) / BINS].
    where = ((confidence * BINS).ceil().long() - 1).clamp(0, BINS - 1)
    rows = torch.stack((finite.double(), right.double(), confidence), 1)
    bins = torch.zeros(BINS, 3, dtype=torch.float64, device=label.device).index_add_(0, where, rows)
    counts = torch.stack((torch.ones_like(finite).sum(), right.sum(), five.sum(), (~finite).sum())).double()
    return torch.cat((counts, loss.sum()[None], bins.flatten())), (best[:, 0], right, five, finite)


def _metrics(row: Tensor) -> dict[str, float]:
    images, right, five, nonfinite, loss = row[:5].tolist()
    finite = images - nonfinite
    _, hits, confidence = row[5:].reshape(BINS, 3).unbind(1)
    return {
        "top1": 100 * right / max(images, 1.0),
        "top5": 100 * five / max(images, 1.0),
        "loss": loss / finite if finite else nan,
        "ece": 100 * (hits - confidence).abs().sum().item() / finite if finite else nan,
        "nonfinite": nonfinite,
    }
