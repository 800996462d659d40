"""One micro-batch: what the loader makes on the host, what `.to(device)` moves, and what a method is given.

Everything that differs from batch to batch is a tensor, the place of the step in the run included. A step that
`torch.compile` or a CUDA graph has captured therefore reads the values of the batch it is given, and none of the batch
that it was captured with.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdeit import kernels

Normalisation = tuple[Sequence[float], Sequence[float]]


class Labels(NamedTuple):
    """Targets of classification: `lam * onehot(y1) + (1 - lam) * onehot(y2)`.

    y1, y2  int64 `[B]`
    lam     float32 `[B]`; 1 where nothing is mixed
    """

    y1: Tensor
    y2: Tensor
    lam: Tensor


@dataclass(frozen=True)
class Step:
    """Where a batch stands in the run, as scalars on the batch's device: what schedules are functions of.

    number    int64: steps of the optimizer before this one
    epoch     int64: whole epochs before this one
    progress  float64: `number` as a share of all steps of the run, in [0, 1)
    """

    number: Tensor
    epoch: Tensor
    progress: Tensor

    @classmethod
    def at(cls, number: int, steps_per_epoch: int, total: int) -> "Step":
        """Step `number`, counted from 0, of a run of `total` steps; on the CPU."""
        return cls(
            torch.tensor(number),
            torch.tensor(number // steps_per_epoch),
            torch.tensor(number / total, dtype=torch.float64),
        )


@dataclass(frozen=True)
class Batch:
    """B samples in V views: images as they were decoded, and what is still to be done to them.

    images     one uint8 `[B, H, W, 3]` for each view
    targets    a tree of tensors whose first dimension is B: `Labels` for classification
    partner    int64 `[B]`: the sample of this batch with which each is mixed
    pixel_lam  float32 `[B]`: weight of the own pixel outside `box`
    box        int32 `[V, B, 4]` (y0, x0, y1, x1): the cutmix window in each view, empty when y1 <= y0
    index      int64 `[B]`: number of the sample in the data set
    copy       int64 `[B]`: how often the sample came before in this epoch (repeated augmentation)
    step       where the batch stands in the run
    mean, std  normalisation of the student, in units of [0, 1]
    noise      by name float32 `[B, columns]`: uniforms in [0, 1), a function of the place in the global batch
    erase      for each view (boxes int32 `[B, 4]` like `box`, keys int64 `[B]`): what noise replaces, and its key;
               None, for a view or for all: nothing
    extras     by name a tensor `[B, ...]` that a store holds for (epoch, index, copy), which a method `needs`, and what
               the source knows of each sample besides its class, such as boxes (`sources.source.AnnotatedSource`)
    geometry   float32 `[V, B, 2, 3]`: the place (x, y, 1) of a picture, in pixels, to its place (x, y) in each view;
               None where the source knows only classes, and where pictures are mixed. `boxes` applies it
    rendered   float `[B, 3, H, W]` that stands in for the pixels of the first view (see `rendered_as`)
    """

    images: tuple[Tensor, ...]
    targets: Any
    partner: Tensor
    pixel_lam: Tensor
    box: Tensor
    index: Tensor
    copy: Tensor
    step: Step
    mean: Sequence[float]
    std: Sequence[float]
    noise: Mapping[str, Tensor] = field(default_factory=dict)
    erase: tuple[tuple[Tensor, Tensor] | None, ...] | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    geometry: Tensor | None = None
    rendered: Tensor | None = None

    @classmethod
    def ready(
        cls,
        pixels: Tensor,
        targets: Any,
        step: Step,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        noise: Mapping[str, Tensor] | None = None,
    ) -> "Batch":
        """A batch of one view whose `pixels` float `[B, 3, H, W]` need no rendering, in the normalisation given."""
        number = torch.arange(len(pixels), device=pixels.device)
        return cls(
            images=(),
            targets=targets,
            partner=number,
            pixel_lam=torch.ones(len(pixels), device=pixels.device),
            box=torch.zeros(1, len(pixels), 4, dtype=torch.int32, device=pixels.device),
            index=number,
            copy=torch.zeros_like(number),
            step=step,
            mean=mean,
            std=std,
            noise=noise or {},
            rendered=pixels,
        )

    def __len__(self) -> int:
        return len(self.index)

    def split(self, parts: int) -> "list[Batch]":
        """A batch made by `ready` as `parts` equal micro-batches. Raises ValueError where they would not be equal."""
        size, rest = divmod(len(self), parts)
        if rest:
            raise ValueError(f"{len(self)} samples cannot be split into {parts} equal micro-batches")

        def part(number: int) -> "Batch":
            rows = slice(number * size, (number + 1) * size)
            cut = map_tensors(lambda tensor: tensor[rows] if tensor.dim() else tensor, self)
            # The boxes alone have the views before the samples, and partners are numbers within the micro-batch.
            return replace(cut, box=self.box[:, rows], partner=torch.arange(size, device=self.partner.device))

        return [part(number) for number in range(parts)]

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`; the host does not wait for copies from pinned memory."""
        return map_tensors(lambda tensor: tensor.to(device, non_blocking=True), self)

    def pixels(self, view: int = 0, mean: Sequence[float] | None = None, std: Sequence[float] | None = None) -> Tensor:
        """Normalised, erased and mixed images `[B, 3, H, W]` in the autocast dtype (float32 without autocast).

        `mean` and `std` are those of another network than the student, such as a teacher.
        """
        if self.rendered is not None and view == 0:
            given = self.mean if mean is None else mean, self.std if std is None else std
            return renormalised(self.rendered, (self.mean, self.std), given)
        return kernels.pixels(self.images[view], **self._rendering(view, mean, std))

    def patches(self, patch_size: int, view: int = 0) -> Tensor:
        """The same pixels as `[B, patches, 3 * patch_size**2]`, the layout of a patch convolution's weight."""
        if self.rendered is not None and view == 0:
            return kernels.to_patches(self.rendered, patch_size)
        return kernels.patchify(self.images[view], patch_size=patch_size, **self._rendering(view, None, None))

    def boxes(self, boxes: Tensor, view: int = 0) -> tuple[Tensor, Tensor]:
        """(boxes of the pictures as they lie in a view, the share of each that is in the view).

        boxes  `[B, N, 4]` (x0, y0, x1, y1) in pixels of the picture, as a source with annotations has them

        The first are float32 `[B, N, 4]` in pixels of the view: the box around what has become of the four corners, cut
        at the edges of the view. The second are float32 `[B, N]`: the area after the cut over that before, 0 for an
        empty box.

        Raises ValueError where the source of the images has no annotations, and where pictures are mixed: a view then
        shows objects of two pictures.
        """
        if self.geometry is None:
            raise ValueError(
                "the batch does not know where its pixels lie in a picture: either data.source has no annotations "
                "(AnnotatedSource in fastdeit.data.sources.source says what these are), or its pictures are mixed; set "
                "data.mixup=0 and data.cutmix=0"
            )
        height, width = self.images[view].shape[1:3]
        x0, y0, x1, y1 = boxes.float().unbind(-1)
        # A list as an index would be copied from the host, which a CUDA graph cannot record.
        corners = torch.stack((x0, y0, x1, y0, x0, y1, x1, y1), -1).unflatten(-1, (4, 2))
        matrix, shift = self.geometry[view].split((2, 1), -1)
        # Not as a matrix product: autocast would make that one of 16 bits, and TF32 one of 10, which miss by pixels.
        corners = (matrix[:, None, None] * corners[..., None, :]).sum(-1) + shift[:, None, None, :, 0]
        low, high = corners.amin(-2), corners.amax(-2)
        sides = [(edge[..., 0].clamp(0, width), edge[..., 1].clamp(0, height)) for edge in (low, high)]
        (x0, y0), (x1, y1) = sides
        share = (x1 - x0) * (y1 - y0) / (high - low).prod(-1)
        return torch.stack((x0, y0, x1, y1), -1), share.nan_to_num(0.0, 0.0, 0.0)

    def rendered_as(self, x: Tensor) -> "Batch":
        """This batch with `x` float `[B, 3, H, W]`, in the student's normalisation, as the pixels of the first view.

        Gradients flow into `x`, as those of a disturbed image.
        """
        return replace(self, rendered=x)

    def _rendering(self, view: int, mean: Sequence[float] | None, std: Sequence[float] | None) -> dict[str, Any]:
        device = self.images[view].device.type
        return {
            "mean": self.mean if mean is None else mean,
            "std": self.std if std is None else std,
            "partner": self.partner,
            "lam": self.pixel_lam,
            "box": self.box[view],
            "erase": None if self.erase is None else self.erase[view],
            "dtype": torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32,
        }


def renormalised(x: Tensor, given: Normalisation, wanted: Normalisation) -> Tensor:
    """Images `[B, 3, H, W]` with the normalisation `given`, (mean, std), as `wanted` has them; `x` if they agree."""
    if tuple(map(tuple, given)) == tuple(map(tuple, wanted)):
        return x
    # By channel, with Python's numbers: a tensor made of them would be a copy from the host in every step.
    channels = zip(x.unbind(1), *given, *wanted, strict=True)
    return torch.stack([(c * std + mean - to_mean) / to_std for c, mean, std, to_mean, to_std in channels], 1)


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with `function` applied to every tensor in its dataclasses, tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Mapping):
        return {key: map_tensors(function, item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(function, item) for item in value))
    if isinstance(value, tuple | list):
        return type(value)(map_tensors(function, item) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: map_tensors(function, getattr(value, f.name)) for f in fields(value)})
    return value


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in `value`, in order."""
    found: list[Tensor] = []
    map_tensors(lambda tensor: found.append(tensor) or tensor, value)
    return found
