"""What is measured of a trained network besides the metrics of its recipe, on all held-out images."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdeit import rng
from fastdeit.engine.dist import World
from fastdeit.methods.base import scores
from fastdeit.methods.evaluators import images as normalised
from fastdeit.recipe.resolve import Recipe
from fastdeit.run import build
from fastdeit.run.weights import network, open_weights

SHIFT = 4
"""Pixels by which `shifts` moves the images."""
CROPS = (1.0, 0.5, 0.25, 0.1)
"""Shares of the picture that `crops` leaves."""


@dataclass(frozen=True)
class Trained:
    """A trained network with the held-out images.

    runs  the runs of all variants with this seed so far, by name; `run` is that of the network
    """

    recipe: Recipe
    run: Path
    runs: Mapping[str, Path]

    @cached_property
    def model(self) -> nn.Module:
        """The network in eval mode, on the CPU."""
        return network(open_weights(str(self.run)))

    @cached_property
    def images(self) -> Tensor:
        """Held-out images `[N, 3, H, W]`, float32, normalised as the network was trained with."""
        return self._held_out[0]

    @cached_property
    def labels(self) -> Tensor:
        """Their labels, int64 `[N]`."""
        return self._held_out[1]

    @cached_property
    def _held_out(self) -> tuple[Tensor, Tensor]:
        def refuse(path: str, reason: str) -> None:
            raise ValueError(f"{path}: {reason}")

        source = build.held_out(self.recipe)
        batches = build.eval_loader(self.recipe, source, World(torch.device("cpu")), {}, refuse).batches()
        pairs = [(normalised(batch), batch.targets.y1) for batch in batches]
        return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])

    def answers(self, x: Tensor, model: nn.Module | None = None) -> Tensor:
        """The classes `[N]` that the network, or `model`, answers with; two heads are fused as the recipe says."""
        logits = (model or self.model)(x)
        return next(iter(scores(logits, self.recipe.method.fuse).values())).argmax(-1)

    def teacher(self) -> nn.Module:
        """The network of the variant `teacher`. It must have the normalisation of this one."""
        return network(open_weights(str(self.runs["teacher"])))


Probe = Callable[[Trained], dict[str, float]]


def measure(names: tuple[str, ...], trained: Trained) -> dict[str, float]:
    """The metrics of the probes `names`."""
    found: dict[str, float] = {}
    with torch.no_grad():
        for name in names:
            found |= PROBES[name](trained)
    return found


def shifts(trained: Trained) -> dict[str, float]:
    """`shift_agreement`: per cent of images and the four directions in which the answer is that before a shift by
    `SHIFT` pixels. What comes in at the border repeats it."""
    x, before = trained.images, trained.answers(trained.images)
    padded = F.pad(x, (SHIFT,) * 4, mode="replicate")
    height, width = x.shape[2:]
    corners = ((0, SHIFT), (2 * SHIFT, SHIFT), (SHIFT, 0), (SHIFT, 2 * SHIFT))
    same = [trained.answers(padded[:, :, top : top + height, left : left + width]) == before for top, left in corners]
    return {"shift_agreement": _per_cent(torch.cat(same))}


def teacher(trained: Trained) -> dict[str, float]:
    """`teacher_agreement`: per cent of images with the answer of the variant `teacher`."""
    return {
        "teacher_agreement": _per_cent(trained.answers(trained.images) == trained.teacher()(trained.images).argmax(-1))
    }


def tokens(trained: Trained) -> dict[str, float]:
    """Cosines of the two prefix tokens of a distilled model, as means over images.

    cosine_N           of the tokens after block N, before the final norm; 0: as they go into the first block, with
                       their positions
    cosine_input       the first of them
    cosine_output      after the final norm, which the heads read
    cosine_least_rise  the least difference of successive ones, the output being the last
    cosine_centred     at the output, with each token's mean over images subtracted
    disagreement       per cent of images on which the heads' answers differ
    """
    model, x = trained.model, trained.images
    through = [model.tokens(x, stop=stop)[:, :2] for stop in range(len(model.blocks))]
    output = model.tokens(x)[:, :2]
    found = [_cosine(pair) for pair in (*through, output)]
    first, second = (head.argmax(-1) for head in model(x))
    return {
        **{f"cosine_{number}": value for number, value in enumerate(found[:-1])},
        "cosine_input": found[0],
        "cosine_output": found[-1],
        "cosine_least_rise": min(after - before for before, after in pairwise(found)),
        "cosine_centred": _cosine(output - output.mean(0)),
        "disagreement": _per_cent(first != second),
    }


def crops(trained: Trained) -> dict[str, float]:
    """`crop_P`: per cent of images with the right answer where a random square crop of P per cent of the picture is
    all that is seen, at the network's size. The crops are the same for every seed and network."""
    x = trained.images
    count, _, height, width = x.shape
    found = {}
    for share in CROPS:
        rows, columns = (round(side * share**0.5) for side in (height, width))
        noise = torch.Generator().manual_seed(rng.key(0, "crops", round(100 * share)) >> 1)
        tops = torch.randint(height - rows + 1, (count,), generator=noise).tolist()
        lefts = torch.randint(width - columns + 1, (count,), generator=noise).tolist()
        cut = [
            image[:, top : top + rows, left : left + columns] for image, top, left in zip(x, tops, lefts, strict=True)
        ]
        seen = F.interpolate(torch.stack(cut), size=(height, width), mode="bilinear", align_corners=False)
        found[f"crop_{round(100 * share)}"] = _per_cent(trained.answers(seen) == trained.labels)
    return found


def positions(trained: Trained) -> dict[str, float]:
    """Accuracy at one and a half times the size before any fine-tuning, by how the positions are interpolated.

    top1_bicubic, top1_bilinear  per cent
    norm_bicubic, norm_bilinear  mean norm of a position after interpolation, divided by that before
    """
    model, side = trained.model, trained.model.patch_size
    grid = model.grid
    larger = tuple(round(1.5 * cells) for cells in grid)
    size = [cells * side for cells in larger]
    bigger = replace(trained, recipe=_at_size(trained.recipe, size))
    learned = model.pos_embed[:, model.prefix_tokens :].unflatten(1, grid).permute(0, 3, 1, 2)
    found = {}
    for mode in ("bicubic", "bilinear"):
        resized = F.interpolate(learned, size=larger, mode=mode, align_corners=False).flatten(2).transpose(1, 2)
        network_at = network(open_weights(str(trained.run)), image_size=tuple(size))
        network_at.pos_embed[:, model.prefix_tokens :] = resized
        right = trained.answers(bigger.images, network_at) == bigger.labels
        found[f"top1_{mode}"] = _per_cent(right)
        found[f"norm_{mode}"] = (resized.norm(dim=-1).mean() / learned.norm(dim=1).mean()).item()
    return found


def _at_size(recipe: Recipe, size: list[int]) -> Recipe:
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"image_size": tuple(size)})})


def _cosine(pair: Tensor) -> float:
    return F.cosine_similarity(pair[:, 0], pair[:, 1], dim=-1).mean().item()


def _per_cent(hits: Tensor) -> float:
    return 100 * hits.double().mean().item()


PROBES: dict[str, Probe] = {
    "shifts": shifts,
    "teacher": teacher,
    "tokens": tokens,
    "crops": crops,
    "positions": positions,
}
