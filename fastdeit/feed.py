"""The images of a recipe for a training loop of your own: timm's train.py, Lightning, plain PyTorch.

    loader = fastdeit.loader("deit_tiny", {"data.root": "/path/to/imagenet"})
    for epoch in range(300):
        for images, targets in loader:
            ...

What comes is the stream of `fastdeit train`: the same files, crops, operations, mixing and erasing for a seed and a
step, on any number of processes, from any step on.
"""

import os
import re
import sys
import warnings
from collections.abc import Generator, Iterator

import torch
from torch import Tensor
from torch.nn import functional

from fastdeit.batch import Batch, Labels
from fastdeit.engine.dist import World
from fastdeit.errors import UsageError
from fastdeit.recipe import resolve as recipes
from fastdeit.recipe.resolve import Recipe
from fastdeit.run import build

Pair = tuple[Tensor, Tensor]


class Loader:
    """The training images of `recipe`, or its held-out ones, as a `DataLoader` gives them: `len`, and an epoch an
    `iter`.

    recipe  as of a run. Its `data:` section says what the images are and what is done to them; `train.batch_size` is
            that of all processes together, and `train.seed` chooses the stream. `train.accumulate` is taken as 1
    train   whether the training images; else each held-out one once, over all processes
    rank, world  this process and their number; None: as torchrun says, else 0 of 1. No process waits for another
    device  where images are decoded and batches come to lie
    uint8   pixels as decoded, uint8 `[B, H, W, 3]`, neither normalised nor erased nor mixed, and labels int64 `[B]`

    Without `uint8` a batch is (images, targets): float32 `[B, 3, H, W]` (in the dtype of autocast where that is on),
    normalised, erased and mixed, and shares of the classes, float32 `[B, K]`, which `torch.nn.CrossEntropyLoss` takes;
    labels int64 `[B]` where the recipe mixes nothing, and of held-out images. Labels are not smoothed: that is for the
    loss. What a source knows of a sample besides its class, such as boxes, does not come. With `data.size_schedule` H
    and W change with the epoch. `step` is the number of the next batch since the first epoch. Raises UsageError and
    DataError as a run does, and UsageError for a method that wants several views of a sample.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        train: bool = True,
        rank: int | None = None,
        world: int | None = None,
        device: str | torch.device = "cpu",
        uint8: bool = False,
    ) -> None:
        recipe = recipes.override(recipe, ["train.accumulate=1"])
        if train and len(build.augmentations(recipe)) > 1:
            raise UsageError(f"recipe {recipe.name}: its method wants several views of a sample; a loader gives one")
        rank = _of_launcher("RANK", 0) if rank is None else rank
        world = _of_launcher("WORLD_SIZE", 1) if world is None else world
        if not 0 <= rank < world:
            raise UsageError(
                f"rank {rank} of {world} processes: ranks are 0 to {world - 1}; give rank and world, or set both RANK "
                "and WORLD_SIZE or none"
            )
        self._here, self._uint8, self.step = World(torch.device(device), rank, world), uint8, 0
        self._mixes = train and recipe.data.mixes
        source = build.sources(recipe)[0] if train else build.held_out(recipe)
        self.classes = source.classes
        make = build.train_loader if train else build.eval_loader
        self._loader = make(recipe, source, self._here, {}, _warn)
        self._each = max(recipe.train.batch_size // world, 1)
        self._train, self._stream, self._at = train, None, 0

    def __len__(self) -> int:
        """Batches of an epoch, of this process."""
        return self._loader.steps_per_epoch if self._train else -(-self._loader.share // self._each)

    def __iter__(self) -> Iterator[Pair]:
        """Batches from `step` to the end of its epoch; of held-out images, all. After a loop that was left early, the
        next one goes on where it ended: `set_step` goes elsewhere."""
        if not self._train:
            yield from map(self._pair, self._loader.batches())
            return
        for _ in range(len(self) - self.step % len(self)):
            stream = self._opened()
            self.step = self._at = self.step + 1
            (batch,) = next(stream)
            yield self._pair(batch)

    def set_step(self, step: int) -> None:
        """The next batch is the one of this step, counted from 0 over all epochs: a resumed run goes on with it."""
        if not self._train or step < 0:
            raise ValueError(f"step {step}: training images have steps, from 0 on")
        self.step = step

    def close(self) -> None:
        """End the threads that read ahead; the next batch starts them anew."""
        if self._stream is not None:
            self._stream.close()
        self._stream = None

    def _opened(self) -> Generator[list[Batch], None, None]:
        """The stream whose next batch is that of `step`. One stream serves all epochs: starting it costs a pipeline."""
        if self._stream is None or self._at != self.step:
            self.close()
            self._stream = self._loader.batches(self.step, sys.maxsize)
        return self._stream

    def _pair(self, batch: Batch) -> Pair:
        batch = batch.to(self._here.device)
        labels: Labels = batch.targets
        if self._uint8:
            return batch.images[0], labels.y1
        return batch.pixels(), self._shares(labels) if self._mixes else labels.y1

    def _shares(self, labels: Labels) -> Tensor:
        one, other = (functional.one_hot(y, len(self.classes)) for y in (labels.y1, labels.y2))
        return torch.lerp(other.float(), one.float(), labels.lam[:, None])


def _warn(path: str, reason: str) -> None:
    warnings.warn(f"{path} is not used: {reason}", stacklevel=2)


def _of_launcher(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not re.fullmatch("[0-9]{1,9}", text):
        raise UsageError(f"{name}={text[:40]!r} is not a number of torchrun; give rank and world, or unset it")
    return int(text)
