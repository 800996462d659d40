"""The plan: ids in, plain arrays out. Everything random about a batch is decided here, before any pixel is read.

Crop and flip are functions of (seed, epoch, sample, copy), mixing of (seed, step, group), drop-path noise of (seed,
step, position in the global batch). Each has a key purpose of its own, so a further augmentation never changes the
existing ones. Executors (`dali.py`, the mixing kernel) contain no randomness.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betaincinv

from fastdeit import rng

_ATTEMPTS = 10


@dataclass(frozen=True)
class Augment:
    """Training augmentation.

    size: output (height, width) in pixels. crop_scale, crop_ratio: area fraction and width/height range of the random
    resized crop. flip: probability of a horizontal flip. mixup, cutmix: alpha of Beta(alpha, alpha), 0 turns it off.
    mix_probability: share of groups that are mixed at all. mix_switch: share of cutmix where both are on.
    group_size: samples that share one lambda (DeiT: the batch of one GPU).
    """

    size: tuple[int, int] = (224, 224)
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    mixup: float = 0.8
    cutmix: float = 1.0
    mix_probability: float = 1.0
    mix_switch: float = 0.5
    group_size: int = 64


@dataclass(frozen=True)
class Plan:
    """Geometry of B samples: `box` int32 `[B, 4]` as (y, x, height, width) in source pixels, `flip` bool `[B]`."""

    box: NDArray[np.int32]
    flip: NDArray[np.bool_]


@dataclass(frozen=True)
class Mix:
    """Mixing of B samples, consecutive groups of `group_size`.

    The mixed image is `pixel_lam * x[i] + (1 - pixel_lam) * x[partner[i]]`, and the partner's pixels inside `box`; its
    target is `lam * onehot(y[i]) + (1 - lam) * onehot(y[partner[i]])`.

    partner int64 `[B]` (index among these B), pixel_lam float32 `[B]` (1 for cutmix), box int32 `[B, 4]` as
    (y0, x0, y1, x1) in output pixels (zeros without cutmix), lam float32 `[B]`.
    """

    partner: NDArray[np.int64]
    pixel_lam: NDArray[np.float32]
    box: NDArray[np.int32]
    lam: NDArray[np.float32]


def samples(
    augment: Augment, seed: int, epoch: int, sample: ArrayLike, copy: ArrayLike, width: ArrayLike, height: ArrayLike
) -> Plan:
    """Plan of B samples, all arguments after `epoch` int `[B]`; row i depends on (seed, epoch, sample[i], copy[i]) and
    the size of its image alone."""
    crop = _per_copy(rng.key(seed, "crop", epoch), sample, copy, _ATTEMPTS * 4)
    flip = _per_copy(rng.key(seed, "flip", epoch), sample, copy, 1)
    box = crop_boxes(crop.reshape(-1, _ATTEMPTS, 4), width, height, augment.crop_scale, augment.crop_ratio)
    return Plan(box, flip[:, 0] < augment.flip)


def crop_boxes(
    uniforms: NDArray[np.float64],
    width: ArrayLike,
    height: ArrayLike,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> NDArray[np.int32]:
    """torchvision's RandomResizedCrop as a function: uniforms `[B, attempts, 4]` to boxes int32 `[B, 4]` (y, x, h, w).

    An attempt draws area uniformly in `scale` times the image area and the aspect ratio log-uniformly in `ratio`; the
    first that fits is placed uniformly. If none fits, the largest central crop whose aspect ratio lies within `ratio`.
    """
    width, height = np.asarray(width, np.float64), np.asarray(height, np.float64)
    area = (width * height)[:, None] * (scale[0] + uniforms[..., 0] * (scale[1] - scale[0]))
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = np.exp(low + uniforms[..., 1] * (high - low))
    w, h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (w > 0) & (h > 0) & (w <= width[:, None]) & (h <= height[:, None])
    rows, first = np.arange(len(uniforms)), fits.argmax(1)
    w, h, u = w[rows, first], h[rows, first], uniforms[rows, first]
    y, x = np.floor(u[:, 2] * (height - h + 1)), np.floor(u[:, 3] * (width - w + 1))

    none = ~fits.any(1)
    shape = width / height
    central_w = np.where(shape > ratio[1], np.maximum(1, np.rint(height * ratio[1])), width)
    central_h = np.where(shape < ratio[0], np.maximum(1, np.rint(width / ratio[0])), height)
    w, h = np.where(none, central_w, w), np.where(none, central_h, h)
    y, x = np.where(none, (height - h) // 2, y), np.where(none, (width - w) // 2, x)
    return np.stack((y, x, h, w), axis=1).astype(np.int32)


def mix(augment: Augment, seed: int, step: int, groups: slice) -> Mix:
    """Mixing of the global batch's groups `groups.start ... groups.stop` at `step`, one draw a group.

    lambda is the inverse CDF of Beta(alpha, alpha) at one uniform. The cut box has side ratio sqrt(1 - lambda) and a
    uniform centre, is clipped to the image, and lambda of the target is corrected to the area left (Yun et al.,
    "CutMix", 2019, as in timm's Mixup).
    """
    ids = np.arange(groups.start, groups.stop)
    size = augment.group_size
    apply, switch, quantile, centre_y, centre_x = rng.uniform(rng.key(seed, "mix", step), ids, 5).T
    share = augment.mix_switch if augment.mixup and augment.cutmix else float(augment.cutmix > 0)
    cut = switch < share
    applied = (apply < augment.mix_probability) & (augment.mixup > 0 or augment.cutmix > 0)
    lam = np.where(cut, _beta(augment.cutmix, quantile), _beta(augment.mixup, quantile))
    lam = np.where(applied, lam, 1.0)
    cut &= applied

    box = _cut_boxes(lam, centre_y, centre_x, augment.size) * cut[:, None]
    left = 1 - (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1]) / (augment.size[0] * augment.size[1])
    pairs = np.arange(len(ids))[:, None] * size + np.arange(size)[::-1]
    return Mix(
        partner=pairs.reshape(-1),
        pixel_lam=np.repeat(np.where(cut, 1.0, lam), size).astype(np.float32),
        box=np.repeat(box, size, axis=0).astype(np.int32),
        lam=np.repeat(np.where(cut, left, lam), size).astype(np.float32),
    )


def noise(seed: int, step: int, positions: ArrayLike, count: int) -> NDArray[np.float32]:
    """Drop-path uniforms in [0, 1), float32 `[B, count]`, for int `positions [B]` in the global batch at `step`.

    24 random bits each: exact in float32, hence never rounded up to 1.
    """
    words = rng.bits(rng.key(seed, "drop_path", step), positions, count)
    return (words >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)


def eval_window(
    width: ArrayLike, height: ArrayLike, size: tuple[int, int], ratio: float
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Evaluation geometry: (resize, start), both int64 `[B, 2]` as (y, x).

    The image is resized to `resize`, the smallest size of its aspect ratio that covers int(size / ratio), and cut from
    `start` to `size`. Integer arithmetic and half-to-even rounding are torchvision's (Resize, CenterCrop); a framework
    that rounds 58.5 up shifts the picture by a pixel.
    """
    if not 0 < ratio <= 1:
        raise ValueError(f"crop ratio {ratio} must lie in (0, 1]: the part of the resized image that is kept")
    width, height = np.atleast_1d(np.asarray(width, np.int64)), np.atleast_1d(np.asarray(height, np.int64))
    cover_h, cover_w = int(size[0] / ratio), int(size[1] / ratio)
    narrow = width * cover_h <= height * cover_w
    new_h = np.where(narrow, (cover_w * height / width).astype(np.int64), cover_h)
    new_w = np.where(narrow, cover_w, (cover_h * width / height).astype(np.int64))
    resize = np.stack((new_h, new_w), axis=1)
    start = np.rint((resize - np.asarray(size)) / 2).astype(np.int64)
    return resize, start


def _per_copy(key: int, sample: ArrayLike, copy: ArrayLike, count: int) -> NDArray[np.float64]:
    sample, copy = np.asarray(sample), np.asarray(copy)
    out = np.empty((len(sample), count))
    for stream in np.unique(copy):
        rows = copy == stream
        out[rows] = rng.uniform(key, sample[rows], count, int(stream))
    return out


def _beta(alpha: float, quantile: NDArray[np.float64]) -> NDArray[np.float64]:
    return betaincinv(alpha, alpha, quantile) if alpha > 0 else np.ones_like(quantile)


def _cut_boxes(
    lam: NDArray[np.float64], centre_y: NDArray[np.float64], centre_x: NDArray[np.float64], size: tuple[int, int]
) -> NDArray[np.int64]:
    side = np.sqrt(1 - lam)
    edges = []
    for length, centre in zip(size, (centre_y, centre_x), strict=True):
        half = (length * side).astype(np.int64) // 2
        middle = (centre * length).astype(np.int64)
        edges.append((np.clip(middle - half, 0, length), np.clip(middle + half, 0, length)))
    (y0, y1), (x0, x1) = edges
    return np.stack((y0, x0, y1, x1), axis=1)
