"""Detection by a plain vision transformer (Li et al., "Benchmarking detection transfer learning with vision
transformers", 2021), with the simplest of heads in place of Mask R-CNN: each patch says what lies on its centre, and
how far the edges of its box are, as in FCOS (Tian et al., ICCV 2019).

Attention stays within windows of `window` x `window` patches in all blocks but those of `whole`.
"""

import json
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdeit.batch import Batch
from fastdeit.data.sources.folder import FileSource
from fastdeit.data.sources.index import Strings, digest
from fastdeit.methods.base import Context, Method, Out
from fastdeit.methods.config import MethodConfig
from fastdeit.methods.evaluators import Evaluation, HeldOutLoss, images

MOST = 4  # objects of an image
KEPT = 8  # detections of an image


class Annotations(FileSource):
    """ROOT/SPLIT.json has {name of a file: [[class, x0, y0, x1, y1], ...]}, and ROOT/classes.json the classes."""

    def __init__(self, root: Path, split: str) -> None:
        known = json.loads((root / f"{split}.json").read_text())
        self._objects = np.full((len(known), MOST, 5), -1, np.float32)  # padded with class -1
        for row, objects in zip(self._objects, known.values(), strict=True):
            row[: len(objects)] = objects
        classes = json.loads((root / "classes.json").read_text())
        labels, names = self._objects[:, 0, 0].astype(np.int64), Strings.of(list(known))
        super().__init__(root, classes, names, labels, digest(names.blob, self._objects, classes))

    def annotations(self, index: int) -> dict[str, np.ndarray]:
        return {"boxes": self._objects[index, :, 1:], "labels": self._objects[index, :, 0].astype(np.int64)}


class Detection(Method):
    """L = mean over patches of the classes' binary cross-entropy + mean over images of the distance of the edges."""

    class Config(MethodConfig):
        """The recipe's `method:` section."""

        needs_boxes: ClassVar[bool] = True

        use: str
        window: int
        whole: tuple[int, ...]
        seen: float = 0.3
        """Share of a box that has to be in the view for it to count."""

    def __init__(self, model: nn.Module, config: Config, context: Context) -> None:
        super().__init__(model, config, context)
        for head in model.head_names:
            model.get_submodule(head).requires_grad_(False)
        self.detector = nn.Linear(model.config.dim, context.num_classes + 4)
        (rows, columns), side = model.grid, model.config.patch_size
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        self.register_buffer("centres", (torch.stack((x, y), -1).reshape(-1, 2) + 0.5) * side)
        self.side, blocks = side, range(len(model.blocks))
        self.attend = dict.fromkeys([block for block in blocks if block not in config.whole], self.within_windows)

    def within_windows(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of patches within their window; a token before them sees itself alone."""
        prefix, window, (rows, columns) = self.model.prefix_tokens, self.config.window, self.model.grid

        def windows(x: Tensor) -> Tensor:
            x = x[:, :, prefix:].unflatten(2, (rows // window, window, columns // window, window))
            return x.transpose(3, 4).flatten(4, 5)

        mixed = F.scaled_dot_product_attention(windows(q), windows(k), windows(v))
        mixed = mixed.unflatten(4, (window, window)).transpose(3, 4).flatten(2, 5)
        return torch.cat((v[:, :, :prefix], mixed), 2)

    def answers(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(logits `[B, P, classes]`, boxes `[B, P, 4]` in pixels) of every patch."""
        tokens = self.model.tokens(x, attend=self.attend, noise=noise)[:, self.model.prefix_tokens :]
        logits, edges = self.detector(tokens).float().split((self.detector.out_features - 4, 4), -1)
        low, high = (edges.clamp(-4, 4).exp() * self.side).chunk(2, -1)
        return logits, torch.cat((self.centres - low, self.centres + high), -1)

    def truth(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(boxes `[B, N, 4]` in the view, their classes `[B, N]`, -1 for what is not seen)"""
        boxes, share = batch.boxes(batch.extras["boxes"])
        return boxes, torch.where(share >= self.config.seen, batch.extras["labels"], -1)

    def forward(self, batch: Batch) -> Out:
        logits, found = self.answers(self.student_input(batch), batch.noise["drop_path"])
        boxes, labels = self.truth(batch)
        low, high = boxes[:, None, :, :2], boxes[:, None, :, 2:]
        inside = ((self.centres[:, None] > low) & (self.centres[:, None] < high)).all(-1) & (labels >= 0)[:, None]
        area, owner = torch.where(inside, (high - low).prod(-1), torch.inf).min(-1)
        on = area.isfinite()
        wanted = F.one_hot(labels.gather(1, owner).clamp(min=0), logits.shape[-1]) * on[..., None]
        classes = F.binary_cross_entropy_with_logits(logits, wanted.float(), reduction="none").sum(-1).mean()
        distance = (found - boxes.gather(1, owner[..., None].expand(-1, -1, 4))).abs().mean(-1) / self.side
        # By image: over those of a process it would be another mean than over those of all.
        edges = ((distance * on).sum(1) / on.sum(1).clamp(min=1)).mean()
        return Out(classes + edges, parts={"classes": classes.detach(), "edges": edges.detach()})

    def evaluators(self):
        return {"precision": AveragePrecision(), "loss": HeldOutLoss()}


class AveragePrecision:
    """`ap50`, in per cent: the area under precision over recall, a mean over classes, where a box is found if its
    intersection over union with the truth is 0.5 or more."""

    lower_is_better = False

    def __call__(self, evaluation: Evaluation) -> dict[str, float]:
        device = evaluation.processes.device
        # By image: (class, score, box) of detections, (class, box) of the truth. A process may have no image at all.
        found, truth = [torch.zeros(0, KEPT, 6, device=device)], [torch.zeros(0, MOST, 5, device=device)]
        for batch in evaluation.held_out():
            with evaluation.autocast():
                logits, boxes = evaluation.method.answers(images(batch))
            score, best = logits.sigmoid().flatten(1).topk(KEPT)
            patch, label = best // logits.shape[-1], best % logits.shape[-1]
            boxes = boxes.gather(1, patch[..., None].expand(-1, -1, 4))
            found.append(torch.cat((label[..., None], score[..., None], boxes), -1))
            where, what = evaluation.method.truth(batch)
            truth.append(torch.cat((what[..., None], where), -1))
        found, truth = (evaluation.processes.gather(torch.cat(rows)).double().cpu() for rows in (found, truth))
        classes = truth[..., 0][truth[..., 0] >= 0].unique()
        return {"ap50": 100 * float(np.mean([average_precision(found, truth, each) for each in classes.tolist()] or 0))}


def average_precision(found: Tensor, truth: Tensor, label: float) -> float:
    """Of one class, from `found` `[n, K, 6]` and `truth` `[n, N, 5]`, the likeliest detection first in each image."""
    hits: list[tuple[float, bool]] = []
    for detections, objects in zip(found, truth, strict=True):
        boxes, taken, shown = objects[objects[:, 0] == label, 1:], set(), []
        for detection in detections[detections[:, 0] == label]:
            box = detection[2:]
            if any(overlap(box, other[None]).item() > 0.5 for other in shown):
                continue  # found already by a likelier one
            shown.append(box)
            best = overlap(box, boxes).max(0) if len(boxes) else None
            hit = best is not None and best.values >= 0.5 and int(best.indices) not in taken
            taken |= {int(best.indices)} if hit else set()
            hits.append((float(detection[1]), bool(hit)))
    right = np.cumsum([hit for _, hit in sorted(hits, key=lambda each: -each[0])] or [0])
    precision = np.maximum.accumulate((right / np.arange(1, len(right) + 1))[::-1])[::-1]
    return float((np.diff(right, prepend=0) * precision).sum() / (truth[..., 0] == label).sum())


def overlap(box: Tensor, boxes: Tensor) -> Tensor:
    """Intersection over union of a box `[4]` with each of `[N, 4]`."""
    low, high = torch.maximum(box[:2], boxes[:, :2]), torch.minimum(box[2:], boxes[:, 2:])
    common = (high - low).clamp(min=0).prod(-1)
    area = (box[2:] - box[:2]).prod() + (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    return common / (area - common)
