"""How long a run is, in steps and epochs, and the settings that follow the size of the data set.

A recipe that starts from weights may leave its length and its warm-up to a rule, which is that of BiT (Kolesnikov et
al., "Big Transfer", ECCV 2020, section 3.3) in images instead of steps, for any batch size:

    training images     images shown        which is, with BiT's batches of 512
    below 20,000           256,000             500 steps
    below 500,000        5,120,000          10,000 steps
    from 500,000 on     10,240,000          20,000 steps

but at most 100 epochs, the length of fine-tuning in BEiT and MAE, and whole epochs. The warm-up is a twentieth of it.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fastdeit.recipe.yaml import format_value

if TYPE_CHECKING:
    from fastdeit.recipe.resolve import Recipe

_SHOWN = (20_000, 256_000), (500_000, 5_120_000)
"""(training images, images shown to fewer than these)."""
_SHOWN_AT_MOST = 10_240_000
_MOST_EPOCHS = 100
_WARMUP = 0.05


class LengthError(ValueError):
    """The length of a recipe does not fit the data set."""


@dataclass(frozen=True)
class Length:
    """The length of a run in steps of the optimizer.

    steps_per_epoch  whole batches that the training images make
    total            steps of the run
    eval_every       steps between two evaluations
    warmup_epochs    epochs in which the learning rate rises
    """

    steps_per_epoch: int
    total: int
    eval_every: int
    warmup_epochs: float

    @property
    def epochs(self) -> float:
        """Passes over the training set, the last one perhaps in part."""
        return self.total / self.steps_per_epoch

    @property
    def epochs_begun(self) -> int:
        """Epochs that the run enters."""
        return -(-self.total // self.steps_per_epoch)

    @property
    def evaluations(self) -> int:
        """How often the run is evaluated: every `eval_every` steps, and after the last."""
        return -(-self.total // self.eval_every)


def length(recipe: "Recipe", images: int, steps_per_epoch: int) -> Length:
    """The length of the recipe's run on `images` training images, of which `steps_per_epoch` batches are an epoch.

    Raises LengthError where the warm-up is not shorter than the run, or an entry of data.size_schedule begins after it.
    """
    train, warmup = recipe.train, recipe.optim.warmup_epochs
    total = train.steps
    if total is None:
        total = steps_per_epoch * (epochs_for(images) if train.epochs is None else train.epochs)
    epochs = total / steps_per_epoch
    every = train.eval_every_steps
    if every is None:
        every = max(1, round(steps_per_epoch * train.eval_every))
    if warmup is None:
        warmup = _WARMUP * epochs
    elif warmup >= epochs:
        raise LengthError(
            f"optim.warmup_epochs is {format_value(warmup)}, but the run has {total} steps, {epochs:.3g} epochs of "
            f"{images} images; add optim.warmup_epochs={_WARMUP * epochs:.3g}, or null, for a twentieth of the run"
        )
    found = Length(steps_per_epoch, total, every, warmup)
    last = max((epoch for epoch, _ in recipe.data.size_schedule), default=0)
    if last >= found.epochs_begun:
        raise LengthError(
            f"data.size_schedule changes the size in epoch {last}, but the run has {found.epochs_begun} epochs, "
            "counted from 0; give it epochs of this run, or add data.size_schedule=[]"
        )
    return found


def settled(recipe: "Recipe", found: Length) -> "Recipe":
    """The recipe with the numbers written out that it left to the rule, so that its run says what was done."""
    train = recipe.train
    if train.epochs is None and train.steps is None:
        train = train.model_copy(update={"epochs": found.epochs_begun})
    optim = recipe.optim.model_copy(update={"warmup_epochs": found.warmup_epochs})
    return recipe.model_copy(update={"train": train, "optim": optim})


def left_open(recipe: "Recipe") -> set[str]:
    """The fields that `settled` is going to fill in."""
    train, found = recipe.train, set()
    if train.epochs is None and train.steps is None:
        found.add("train.epochs")
    if recipe.optim.warmup_epochs is None:
        found.add("optim.warmup_epochs")
    return found


def epochs_for(images: int) -> int:
    """Epochs of fine-tuning on so many training images, by the rule above."""
    shown = next((shown for limit, shown in _SHOWN if images < limit), _SHOWN_AT_MOST)
    return min(-(-shown // images), _MOST_EPOCHS)
