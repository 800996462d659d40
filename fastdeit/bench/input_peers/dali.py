"""A pipeline of DALI's own operators."""

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch

from fastdeit.bench.data import Setting, Side, Stream
from fastdeit.bench.input_peers.common import BINS, BLUR, SOLARIZE, THREE_AUGMENT, magnitude_of
from fastdeit.bench.measure import CannotRun
from fastdeit.data import pixel_ops

if TYPE_CHECKING:
    from nvidia.dali.data_node import DataNode


def dali(setting: Setting, uint8: bool = False) -> Side:
    """One pipeline of DALI's own operators; `uint8`: without the last, which normalises."""
    notes = ["one DALI pipeline"]
    if not setting.evaluation:
        notes[0] += ", not replayable"
        notes += _differences(setting)
    return Side("; ".join(notes), partial(_stream, setting, uint8))


def _differences(setting: Setting) -> Iterator[str]:
    data, augment = setting.data, setting.data.augment
    left_out = [word for word, wanted in (("erased", data.erase), ("mixed", setting.mixes)) if wanted]
    if left_out:
        yield f"nothing {' or '.join(left_out)}"
    if data.crop == "simple":
        yield "the window of the simple crop within the image: no reflected pixels"
    if augment in THREE_AUGMENT:
        yield "3-Augment by a random branch, the blur DALI's Gaussian"
    elif augment == "trivial":
        yield "DALI's TrivialAugment, bilinear"
    elif augment == "original":
        yield "DALI's AutoAugment, bilinear"
    elif setting.rand is not None:
        magnitude_of(setting.rand, "DALI")
        yield "DALI's RandAugment (every operation applied, one magnitude, bilinear)"
    elif augment != "none":
        raise CannotRun(f"DALI has no augment {augment}")
    if setting.jitter:
        yield "colour jitter by color_twist: in one order, contrast about 128, not rounded in between"


def _stream(setting: Setting, uint8: bool) -> Stream:
    from nvidia.dali import fn, pipeline_def, types

    device = setting.device
    on_cpu, cubic = device.type == "cpu", {"interp_type": types.INTERP_CUBIC, "antialias": True}

    @pipeline_def(
        batch_size=setting.batch,
        num_threads=setting.data.threads,
        device_id=None if on_cpu else device.index or 0,
        seed=0,
        enable_conditionals=True,
    )
    def pipeline() -> "DataNode":
        encoded, _ = fn.readers.file(file_root=setting.folder, random_shuffle=not setting.evaluation)
        decoder = "cpu" if on_cpu else "mixed"
        if setting.evaluation or setting.data.crop == "simple":
            images = fn.decoders.image(encoded, device=decoder)
            images = fn.resize(images, size=setting.covered, mode="not_smaller", subpixel_scale=False, **cubic)
        else:
            images = fn.decoders.image_random_crop(
                encoded,
                device=decoder,
                random_area=list(setting.data.crop_scale),
                random_aspect_ratio=list(setting.data.crop_ratio),
            )
            images = fn.resize(images, size=setting.size, **cubic)
        if not setting.evaluation:
            images = _operations(setting, images)
        return _output(setting, images, uint8)

    pipe = pipeline()
    pipe.build()
    while True:
        (images,) = pipe.run()
        yield torch.from_dlpack(images.as_tensor())


def _operations(setting: Setting, images: "DataNode") -> "DataNode":
    """What comes between the crop and the normalisation in training."""
    from nvidia.dali import fn
    from nvidia.dali.auto_aug import auto_augment, rand_augment, trivial_augment

    data, rand = setting.data, setting.rand
    drawn = {"shape": setting.size, "fill_value": pixel_ops.FILL[1]}
    if data.crop == "simple":
        where = {f"crop_pos_{axis}": fn.random.uniform(range=[0.0, 1.0]) for axis in "xy"}
        images = fn.crop(images, crop=setting.size, **where)
    images = fn.flip(images, horizontal=fn.random.coin_flip(probability=data.flip))
    if data.augment in THREE_AUGMENT:
        images = _three_augment(images)
    elif data.augment == "trivial":
        images = trivial_augment.trivial_augment_wide(images, num_magnitude_bins=BINS, **drawn)
    elif data.augment == "original":
        images = auto_augment.auto_augment(images, **drawn)
    elif rand is not None:
        magnitude = round(magnitude_of(rand, "DALI") / 10 * (BINS - 1))
        images = rand_augment.rand_augment(images, n=rand.draws, m=magnitude, num_magnitude_bins=BINS, **drawn)
    if setting.jitter:
        brightness, contrast, saturation, hue = setting.jitter
        images = fn.color_twist(
            images,
            brightness=_uniform(max(0, 1 - brightness), 1 + brightness),
            contrast=_uniform(max(0, 1 - contrast), 1 + contrast),
            saturation=_uniform(max(0, 1 - saturation), 1 + saturation),
            hue=_uniform(-360 * hue, 360 * hue),
        )
    return images


def _three_augment(images: "DataNode") -> "DataNode":
    from nvidia.dali import fn, types

    which = fn.random.uniform(range=[0.0, 3.0])
    if which < 1.0:
        grey = fn.color_space_conversion(images, image_type=types.RGB, output_type=types.GRAY)
        images = fn.cat(grey, grey, grey, axis=2)
    elif which < 2.0:
        bright = fn.cast(images >= SOLARIZE, dtype=types.UINT8)
        images = images ^ bright * types.Constant(255, dtype=types.UINT8)
    else:
        images = fn.gaussian_blur(images, sigma=_uniform(*BLUR))
    return images


def _uniform(low: float, high: float) -> "DataNode | float":
    from nvidia.dali import fn

    return fn.random.uniform(range=[low, high]) if low < high else low


def _output(setting: Setting, images: "DataNode", uint8: bool) -> "DataNode":
    """The window of evaluation, and the float images `[3, H, W]` or the bytes `[H, W, 3]`."""
    from nvidia.dali import fn, types

    # Half a pixel off the centre torchvision rounds to even, DALI away from zero: at 58.5, of an image of 4:3, one on.
    window = {"crop": setting.size, "rounding": "truncate"} if setting.evaluation else {}
    if uint8:
        return fn.crop(images, **window) if window else images
    data = setting.data
    scale = {"mean": [255 * mean for mean in data.mean], "std": [255 * std for std in data.std]}
    return fn.crop_mirror_normalize(images, dtype=types.FLOAT, output_layout="CHW", **scale, **window)
