"""What a method is judged by on held-out images: classification, nearest neighbours, a linear probe, its own loss.

An evaluator is a plug-in of the method (`Method.evaluators`). It is called with an `Evaluation` on every process at
once, counts every image exactly once over all of them, and returns the same numbers everywhere.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdeit import kernels
from fastdeit.batch import Batch


class Processes(Protocol):
    """The processes of a run, as far as an evaluator needs them (`engine.dist.World`)."""

    device: torch.device

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all processes, in place."""
        ...

    def gather(self, rows: Tensor) -> Tensor:
        """The rows `[n, ...]` of all processes, in the order of the processes; n may differ."""
        ...

    def first(self, value: Any) -> Any:
        """The value of the first process that has one which is true, on every process; else the main process's."""
        ...


@dataclass(frozen=True)
class Evaluation:
    """What an evaluator works with; the method is in eval mode, and nothing has gradients.

    held_out  this process's share of the held-out images, in batches on the device; their `step` is the last step that
              the weights have made, or, where they are of no run, the first
    training  the same of the training images, as evaluation sees them: not augmented, each once
    autocast  a context of the run's precision, to be entered around the network
    """

    method: nn.Module
    held_out: Callable[[], Iterator[Batch]]
    training: Callable[[], Iterator[Batch]]
    autocast: Callable[[], AbstractContextManager]
    processes: Processes


class Evaluator(Protocol):
    """`evaluator(evaluation)` is a mapping of metrics, whose names no other evaluator of the method has.

    The first metric is the most important. `lower_is_better` says how all of them are read, as for a loss.
    """

    lower_is_better: bool

    def __call__(self, evaluation: Evaluation) -> dict[str, float]: ...


_ROWS = 4096
"""Images that are compared with others, or whose features are in float64, at a time."""


def images(batch: Batch) -> Tensor:
    """Normalised float32 `[B, 3, H, W]` of a batch of evaluation, whatever the precision."""
    return kernels.pixels(batch.images[0], mean=batch.mean, std=batch.std)


class Classify:
    """`top1_NAME` and `top5_NAME`, in per cent, of every score of `method.predict`, the method's answer first.

    scores  another function of a batch to named scores `[B, K]`, such as a teacher's
    """

    lower_is_better = False

    def __init__(self, scores: Callable[[Batch], dict[str, Tensor]] | None = None) -> None:
        self.scores = scores

    def __call__(self, evaluation: Evaluation) -> dict[str, float]:
        counts: dict[str, Tensor] = {}
        seen = 0
        for batch in evaluation.held_out():
            with evaluation.autocast():
                scores = self.scores(batch) if self.scores else evaluation.method.predict(images(batch))
            seen += len(batch)
            for name, score in scores.items():
                # A NaN would rank first. Where a score is not finite, the image has no answer, so it counts as wrong.
                best = score.topk(min(5, score.shape[-1])).indices == batch.targets.y1[:, None]
                best &= score.isfinite().all(-1, keepdim=True)
                hits = torch.stack((best[:, 0].sum(), best.sum())).double()
                counts[name] = counts[name] + hits if name in counts else hits
        top1, top5 = _per_cent(counts, seen, evaluation.processes)
        return {f"top1_{name}": value for name, value in top1.items()} | {
            f"top5_{name}": value for name, value in top5.items()
        }


def _per_cent(counts: dict[str, Tensor], seen: int, processes: Processes) -> tuple[dict[str, float], ...]:
    """(first, among five) of all images from the counts of this process, which may have had none."""
    names = processes.first(list(counts))  # one may have had no image that can be used
    zero = torch.zeros(2, dtype=torch.float64, device=processes.device)
    rows = [torch.full_like(zero, seen), *(counts.get(name, zero) for name in names)]
    (total, _), *hits = processes.sum(torch.stack(rows)).tolist()
    shares = [(100.0 * first / max(total, 1.0), 100.0 * five / max(total, 1.0)) for first, five in hits]
    return tuple(dict(zip(names, column, strict=True)) for column in zip(*shares, strict=True)) or ({}, {})


class HeldOutLoss:
    """`held_out_loss`, the method's own loss, and `held_out_PART` for its parts: their means over held-out images.

    What the loss draws at random comes from `batch.noise`, which depends on the image alone: every evaluation draws
    the same, such as the same masks of a masked autoencoder. Schedules stand where the run does: `batch.step` is the
    last step that was made. Held-out images have one view and no extras of stores: a run of a
    method that wants more is refused before it starts.
    """

    lower_is_better = True

    def __call__(self, evaluation: Evaluation) -> dict[str, float]:
        sums: dict[str, Tensor] = {}
        seen = 0
        for batch in evaluation.held_out():
            with evaluation.autocast():
                out = evaluation.method(batch)
            seen += len(batch)
            for name, value in {"loss": out.loss, **out.parts}.items():
                mean = value.detach().double() * len(batch)
                sums[name] = sums[name] + mean if name in sums else mean
        processes = evaluation.processes
        names = processes.first(list(sums))
        zero = torch.zeros((), dtype=torch.float64, device=processes.device)
        total, *totals = processes.sum(
            torch.stack([torch.full_like(zero, seen), *(sums.get(name, zero) for name in names)])
        ).tolist()
        return {f"held_out_{name}": value / max(total, 1.0) for name, value in zip(names, totals, strict=True)}


class Knn:
    """`knn_top1`, in per cent: the label that the `neighbours` nearest training images vote for.

    A neighbour's vote weighs exp(cosine / temperature), as in DINO (Caron et al., ICCV 2021, appendix F.1). Features
    are those of `method.features`. A process keeps the features of its own share of the training images, `[n, D]` in
    float32, and those of all held-out images. It looks for the neighbours in its share, and the nearest of all shares
    vote.
    """

    lower_is_better = False

    def __init__(self, neighbours: int = 20, temperature: float = 0.07) -> None:
        self.neighbours, self.temperature = neighbours, temperature

    def __call__(self, evaluation: Evaluation) -> dict[str, float]:
        processes = evaluation.processes
        known = [(F.normalize(x, out=x), labels) for x, labels in _blocks(evaluation, evaluation.training())]
        features, wanted = (processes.gather(rows) for rows in _features(evaluation, evaluation.held_out()))
        right = 0
        for some, truth in zip(F.normalize(features).split(_ROWS), wanted.split(_ROWS), strict=True):
            if len(some) == 0:  # no held-out image can be used
                continue
            cosines, labels = (processes.gather(each.t().contiguous()) for each in self._nearest(some, known))
            cosines, index = cosines.topk(self.neighbours, dim=0)
            labels = labels.gather(0, index)
            votes = torch.zeros(int(labels.max()) + 1, len(some), device=some.device)
            votes.scatter_add_(0, labels, (cosines / self.temperature).exp())
            right += int((votes.argmax(0) == truth).sum())
        return {"knn_top1": 100.0 * right / max(len(wanted), 1)}

    def _nearest(self, features: Tensor, known: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """(cosines, labels) `[n, neighbours]` of the nearest training images of this process; -inf where it has no more
        of them."""
        cosines = torch.full((len(features), self.neighbours), -torch.inf, device=features.device)
        labels = torch.zeros(cosines.shape, dtype=torch.int64, device=features.device)
        for x, theirs in known:
            found, index = (features @ x.t()).topk(min(self.neighbours, len(x)))
            cosines, kept = torch.cat((cosines, found), 1).topk(self.neighbours)
            labels = torch.cat((labels, theirs[index]), 1).gather(1, kept)
        return cosines, labels


class LinearProbe:
    """`linear_top1`, in per cent, of a linear layer fitted to the training images' features by least squares.

    The fit is ridge regression on one-hot labels, W = (X'X + ridge n I)^-1 X'Y with standardised features and a column
    of ones, in float64 from sums over all images: exact, with nothing to draw. A process keeps the features of its own
    share of the images, `[n, D]` in float32, and sums `[D + 1, D + 1]` and `[D + 1, classes]`.
    """

    lower_is_better = False

    def __init__(self, ridge: float = 1e-3) -> None:
        self.ridge = ridge

    def __call__(self, evaluation: Evaluation) -> dict[str, float]:
        processes = evaluation.processes
        known, labels = _features(evaluation, evaluation.training())
        width = processes.gather(known[:1]).shape[1]  # a process without images does not know it
        known = known.reshape(-1, width)
        all_labels = processes.gather(labels)
        count, classes = len(all_labels), int(all_labels.max()) + 1
        mean = processes.sum(known.sum(0, dtype=torch.float64)) / count
        squares = sum(((x.double() - mean).square().sum(0) for x in known.split(_ROWS)), torch.zeros_like(mean))
        std = (processes.sum(squares) / count).sqrt().clamp(min=1e-12)

        def standardised(x: Tensor) -> Tensor:
            return F.pad((x.double() - mean) / std, (0, 1), value=1.0)

        gram = torch.zeros(width + 1, width + 1, dtype=torch.float64, device=known.device)
        by_class = gram.new_zeros(classes, width + 1)
        for some, truth in zip(known.split(_ROWS), labels.split(_ROWS), strict=True):
            x = standardised(some)
            gram += x.t() @ x
            by_class.index_add_(0, truth, x)
        damping = self.ridge * count * torch.eye(width + 1, dtype=gram.dtype, device=gram.device)
        weight = torch.linalg.solve(processes.sum(gram) + damping, processes.sum(by_class).t())
        features, wanted = _features(evaluation, evaluation.held_out())
        right = torch.zeros((), device=processes.device)
        if len(wanted):
            right += ((standardised(features) @ weight).argmax(1) == wanted).sum()
        return {"linear_top1": _share(right, len(wanted), processes)}


def _features(evaluation: Evaluation, batches: Iterator[Batch]) -> tuple[Tensor, Tensor]:
    """(features `[n, D]` float32, labels `[n]`) of this process's share of some images."""
    found = [*_blocks(evaluation, batches)]
    if not found:  # fewer images than processes
        device = evaluation.processes.device
        return torch.zeros(0, 0, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    features, labels = zip(*found, strict=True)
    return torch.cat(features), torch.cat(labels)


def _blocks(evaluation: Evaluation, batches: Iterator[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
    """The same in parts of at least `_ROWS` images, but for the last."""
    features: list[Tensor] = []
    labels: list[Tensor] = []
    for batch in batches:
        with evaluation.autocast():
            features.append(evaluation.method.features(images(batch)).float())
        labels.append(batch.targets.y1)
        if sum(map(len, labels)) >= _ROWS:
            yield torch.cat(features), torch.cat(labels)
            features, labels = [], []
    if labels:
        yield torch.cat(features), torch.cat(labels)


def _share(right: Tensor, seen: int, processes: Processes) -> float:
    """Per cent of all images, from the count of this process."""
    counts = processes.sum(torch.stack((right.double(), torch.full_like(right.double(), seen))))
    return 100.0 * (counts[0] / counts[1].clamp(min=1)).item()
