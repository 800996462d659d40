"""Learning rates and weight decays as pure functions of the step: nothing to save, nothing to restore."""

from math import cos, pi


def learning_rate(
    step: int,
    *,
    schedule: str,
    steps_per_epoch: int,
    epochs: float,
    lr: float,
    warmup_epochs: float,
    warmup_lr: float,
    min_lr: float,
) -> float:
    """Learning rate of training step `step` (counted from 0).

    cosine      linear warm-up per step from `warmup_lr` to `lr`, then a half cosine to `min_lr` over the rest.
    deit-exact  what facebookresearch/deit trains with: one value per epoch, a cosine over all epochs that the
                warm-up cuts into, and the whole of it one epoch late, because the scheduler is stepped with the index
                of the epoch that has ended. Epochs 0 and 1 both train at `warmup_lr`.
    """
    if schedule == "deit-exact":
        t = float(max(step // steps_per_epoch - 1, 0))
        progress = t / epochs
    elif schedule == "cosine":
        t = step / steps_per_epoch
        progress = (t - warmup_epochs) / max(epochs - warmup_epochs, 1e-9)
    else:
        raise ValueError(f"schedule must be cosine or deit-exact, got {schedule!r}")
    if t < warmup_epochs:
        return warmup_lr + t * (lr - warmup_lr) / warmup_epochs
    return min_lr + 0.5 * (lr - min_lr) * (1 + cos(pi * min(progress, 1.0)))


def decay_factor(step: int, *, total: int, end: float) -> float:
    """Factor on the weight decay in training step `step` of `total`, both counted from 0: a half cosine from 1 to
    `end`, per step and without a warm-up, as the public code of DINO has it."""
    return end + 0.5 * (1 - end) * (1 + cos(pi * step / total))
