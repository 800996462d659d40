"""The plan: ids in, plain arrays out. Everything random about a batch is decided here, before any pixel is read.

Crop, flip, pixel operations and erasing are functions of (seed, epoch, sample, copy), mixing of (seed, step, group or
position), drop-path noise of (seed, step, position in the global batch). Each has a key purpose of its own, so a
further augmentation never changes the existing ones; nor does a further view of the samples, which has its name in its
purposes. Executors (`dali.py`, the mixing kernel) contain no randomness.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betaincinv

from fastdeit import rng
from fastdeit.data.plan.operations import Ops, draw
from fastdeit.data.plan.policy import NO_POLICY, Policy

PAD = 4
"""Pixels by which the window of the simple crop may reach out of the resized image."""
_ATTEMPTS = 10
_UNIT = 2.0**-32
"""From 32 random bits to a uniform in [0, 1)."""
_ERASE_AREA, _ERASE_ASPECT = (0.02, 1 / 3), (0.3, 1 / 0.3)


@dataclass(frozen=True)
class Augment:
    """Training augmentation of one view: its settings (`fastdeit.views`) with nothing left open.

    size: output (height, width) in pixels. crop: "random_resized", with crop_scale and crop_ratio the range of its area
    fraction and of width/height, or "simple", DeiT III's: the whole image, its short side resized to `size`, padded by
    `PAD` reflected pixels and cut at random. flip: probability of a horizontal flip. policy: pixel operations after
    that. erase: probability of random erasing. stream: name of the view's random streams, empty for the first view;
    crop_stream: likewise of crop and flip, which views of equal crop settings can have in common.
    """

    size: tuple[int, int] = (224, 224)
    crop: Literal["random_resized", "simple"] = "random_resized"
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    policy: Policy = NO_POLICY
    erase: float = 0.0
    stream: str = ""
    crop_stream: str = ""


@dataclass(frozen=True)
class Mixing:
    """How samples are mixed among themselves: once for all their views.

    mixup, cutmix: alpha of Beta(alpha, alpha), 0 turns it off. mix_probability: share of draws that mix at all.
    mix_switch: share of cutmix where both are on. group_size: samples that are mixed among themselves (DeiT: the batch
    of one GPU). mix_mode: who shares a draw, as in timm's Mixup: the group ("batch"), two partners ("pair"), or nobody
    ("element").
    """

    mixup: float = 0.8
    cutmix: float = 1.0
    mix_probability: float = 1.0
    mix_switch: float = 0.5
    group_size: int = 64
    mix_mode: Literal["batch", "pair", "element"] = "batch"

    @property
    def mixes(self) -> bool:
        """Whether any samples are mixed."""
        return self.mix_probability > 0 and (self.mixup > 0 or self.cutmix > 0)


@dataclass(frozen=True)
class Plan:
    """One view of B samples, in the order of execution: crop, flip, `ops`, normalisation, erasing.

    box int32 `[B, 4]` as (y, x, height, width) in source pixels: the random resized crop, or the whole image for the
    simple crop, which has further `resize` int32 `[B, 2]` (height, width), to which the whole image is resized, and
    `start` int32 `[B, 2]` (y, x) of the output window in the resized image; up to `PAD` pixels of the window lie
    outside and are reflected (without repeating the edge). flip bool `[B]`. erase_box int32 `[B, 4]` as (y0, x0, y1,
    x1) in output pixels (zeros: nothing is erased), erase_key int64 `[B]`: key of the noise that fills it.
    """

    box: NDArray[np.int32]
    flip: NDArray[np.bool_]
    ops: Ops
    erase_box: NDArray[np.int32]
    erase_key: NDArray[np.int64]
    resize: NDArray[np.int32] | None = None
    start: NDArray[np.int32] | None = None

    def take(self, rows: Sequence[int]) -> "Plan":
        """The plan of these samples."""
        rows = list(rows)
        return Plan(
            self.box[rows],
            self.flip[rows],
            Ops(self.ops.kind[rows], self.ops.value[rows]),
            self.erase_box[rows],
            self.erase_key[rows],
            None if self.resize is None else self.resize[rows],
            None if self.start is None else self.start[rows],
        )


@dataclass(frozen=True)
class Mix:
    """Mixing of B samples, consecutive groups of `group_size`, sample i of a group with its sample group_size - 1 - i.

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
    sample, copy = np.asarray(sample), np.asarray(copy)

    def key(purpose: str, stream: str = augment.stream) -> int:
        return rng.key(seed, f"{purpose}/{stream}" if stream else purpose, epoch)

    def words(purpose: str, count: int, stream: str = augment.stream) -> NDArray[np.uint32]:
        return _bits(key(purpose, stream), sample, copy, count)

    crop_stream = augment.crop_stream
    resize = start = None
    if augment.crop == "simple":
        box, resize, start = simple_crops(words("simple_crop", 2, crop_stream) * _UNIT, width, height, augment.size)
    else:
        attempts = words("crop", _ATTEMPTS * 4, crop_stream).reshape(-1, _ATTEMPTS, 4) * _UNIT
        box = crop_boxes(attempts, width, height, augment.crop_scale, augment.crop_ratio)
    policy = augment.policy
    ops = draw(policy, words("policy", policy.uniforms) * _UNIT, words("color_jitter", policy.jitter_uniforms) * _UNIT)
    erase = words("erase", 4)
    erased = erase[:, 0] * _UNIT < augment.erase
    attempts = _bits(key("erase_box"), sample[erased], copy[erased], _ATTEMPTS * 4) * _UNIT
    erase_box = np.zeros((len(sample), 4), np.int32)
    erase_box[erased] = erase_boxes(attempts.reshape(-1, _ATTEMPTS, 4), augment.size)
    return Plan(
        box=box,
        flip=words("flip", 1, crop_stream)[:, 0] * _UNIT < augment.flip,
        ops=ops,
        erase_box=erase_box,
        erase_key=np.ascontiguousarray(erase[:, 2:]).view(np.int64)[:, 0],
        resize=resize,
        start=start,
    )


def unaugmented(box: NDArray[np.int32], resize: NDArray[np.int32] | None, start: NDArray[np.int32] | None) -> Plan:
    """The plan that crops and does nothing else; arguments as in `Plan`."""
    n = len(box)
    ops = Ops(np.zeros((n, 0), np.uint8), np.zeros((n, 0), np.float32))
    return Plan(box, np.zeros(n, bool), ops, np.zeros((n, 4), np.int32), np.zeros(n, np.int64), resize, start)


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
    w, h = _sides(uniforms, (width * height)[:, None], scale, ratio)
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


def simple_crops(
    uniforms: NDArray[np.float64], width: ArrayLike, height: ArrayLike, size: tuple[int, int]
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """DeiT III's simple random crop: uniforms `[B, 2]` to (box, resize, start) as in `Plan`.

    torchvision's Resize(size) and RandomCrop(size, padding=4, padding_mode="reflect"): every window within the padded
    image is equally likely.
    """
    resize, _ = eval_window(width, height, size, 1.0)
    box = np.zeros((len(resize), 4), np.int32)
    box[:, 2], box[:, 3] = height, width
    start = np.floor(uniforms * (resize + 2 * PAD - np.asarray(size) + 1)) - PAD
    return box, resize.astype(np.int32), start.astype(np.int32)


def erase_boxes(uniforms: NDArray[np.float64], size: tuple[int, int]) -> NDArray[np.int32]:
    """The rectangle of timm's RandomErasing (Zhong et al., 2017) in an output of `size`: uniforms `[B, attempts, 4]` to
    boxes int32 `[B, 4]` (y0, x0, y1, x1).

    An attempt draws area uniformly in 1/50 to 1/3 of the image and height/width log-uniformly in 0.3 to 1/0.3; the
    first that is smaller than the image on both sides is placed uniformly. If none is, the box is zeros.
    """
    height, width = size
    h, w = _sides(uniforms, height * width, _ERASE_AREA, _ERASE_ASPECT)
    fits = (h < height) & (w < width)
    rows, first = np.arange(len(uniforms)), fits.argmax(1)
    h, w, u = h[rows, first], w[rows, first], uniforms[rows, first]
    y, x = np.floor(u[:, 2] * (height - h + 1)), np.floor(u[:, 3] * (width - w + 1))
    return (np.stack((y, x, y + h, x + w), axis=1) * fits.any(1)[:, None]).astype(np.int32)


def mix(mixing: Mixing, size: tuple[int, int], seed: int, step: int, groups: slice) -> Mix:
    """Mixing of the global batch's groups `groups.start ... groups.stop` at `step`, one draw for each group, pair or
    element (`mixing.mix_mode`); boxes are in an image of `size` (height, width).

    lambda is the inverse CDF of Beta(alpha, alpha) at one uniform. The cut box has side ratio sqrt(1 - lambda) and a
    uniform centre, is clipped to the image, and lambda of the target is corrected to the area left (Yun et al.,
    "CutMix", 2019, as in timm's Mixup).
    """
    slot = np.arange(mixing.group_size)
    of_slot = {"batch": slot * 0, "pair": np.minimum(slot, slot[::-1]), "element": slot}[mixing.mix_mode]
    per_group = of_slot.max() + 1
    ids = np.arange(groups.start * per_group, groups.stop * per_group)
    apply, switch, quantile, centre_y, centre_x = rng.uniform(rng.key(seed, "mix", step), ids, 5).T
    share = mixing.mix_switch if mixing.mixup and mixing.cutmix else float(mixing.cutmix > 0)
    cut = switch < share
    applied = (apply < mixing.mix_probability) & (mixing.mixup > 0 or mixing.cutmix > 0)
    lam = np.where(cut, _beta(mixing.cutmix, quantile), _beta(mixing.mixup, quantile))
    lam = np.where(applied, lam, 1.0)
    cut &= applied

    box = _cut_boxes(lam, centre_y, centre_x, size) * cut[:, None]
    left = 1 - (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1]) / (size[0] * size[1])
    group = np.arange(groups.stop - groups.start)[:, None]
    drawn = (group * per_group + of_slot).reshape(-1)
    return Mix(
        partner=(group * mixing.group_size + slot[::-1]).reshape(-1),
        pixel_lam=np.where(cut, 1.0, lam)[drawn].astype(np.float32),
        box=box[drawn].astype(np.int32),
        lam=np.where(cut, left, lam)[drawn].astype(np.float32),
    )


def scale_boxes(boxes: NDArray[np.int32], size: tuple[int, int], other: tuple[int, int]) -> NDArray[np.int32]:
    """Boxes int32 `[B, 4]` (y0, x0, y1, x1) in an output of `size` (height, width) as boxes in one of size `other`:
    every edge at the same fraction of the side, rounded to the nearest pixel (half to even)."""
    return np.rint(boxes * np.tile(other, 2) / np.tile(size, 2)).astype(np.int32)


def noise(seed: int, step: int, positions: ArrayLike, count: int, name: str = "drop_path") -> NDArray[np.float32]:
    """Uniforms called `name`, float32 `[B, count]` in [0, 1), for int `positions [B]` in the global batch at `step`.

    24 random bits each: exact in float32, hence never rounded up to 1. Each name has a stream of its own.
    """
    purpose = name if name == "drop_path" else f"noise/{name}"
    words = rng.bits(rng.key(seed, purpose, step), positions, count)
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


def _bits(key: int, sample: NDArray[np.int64], copy: NDArray[np.int64], count: int) -> NDArray[np.uint32]:
    out = np.empty((len(sample), count), np.uint32)
    for stream in np.unique(copy) if count else ():
        rows = copy == stream
        out[rows] = rng.bits(key, sample[rows], count, int(stream))
    return out


def _sides(
    uniforms: NDArray[np.float64],
    area: ArrayLike,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Rounded sides, both `[B, attempts]`: their product is uniform in `scale` times `area`, the first over the second
    log-uniform in `ratio`."""
    area = area * (scale[0] + uniforms[..., 0] * (scale[1] - scale[0]))
    low, high = math.log(ratio[0]), math.log(ratio[1])
    quotient = np.exp(low + uniforms[..., 1] * (high - low))
    return np.rint(np.sqrt(area * quotient)), np.rint(np.sqrt(area / quotient))


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
