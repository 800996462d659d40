"""The peers of `fastdeit bench data`: the same recipe, or as much of it as they have, by timm, by torchvision's
transforms.v2, by DALI, and by facebookresearch/deit's loader, rebuilt here from what is known of it.

`bench_data` has what all sides share, and our side; `sides` puts ours and the peers together. A peer is a function of a
`Setting` to a `Side`, which starts nothing; it raises CannotRun where the peer has nothing that would do for this
recipe. What it leaves out or does differently is noted where it is decided, and ends in `Side.work`, which is part of
every row.
"""

import argparse
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from fastdeit.bench import data as bench_data
from fastdeit.bench.data import Setting, Side, Stream
from fastdeit.bench.measure import CannotRun, Timer, reason
from fastdeit.data import pixel_ops
from fastdeit.data.plan import policy
from fastdeit.data.plan.plan import PAD
from fastdeit.errors import UsageError

if TYPE_CHECKING:
    from nvidia.dali.data_node import DataNode
    from PIL import Image
    from torch.utils.data import DataLoader

Transform = Callable[[Any], Any]

_BINS = 31
"""Magnitudes of TrivialAugment (Mueller and Hutter, 2021), and as many for DALI's RandAugment."""
_KERNEL = 9
"""Side of torchvision's Gaussian: 2 standard deviations each way at the largest of 3-Augment's."""
_THREE_AUGMENT = ("three_augment", "3a")
_SOLARIZE, _BLUR = 128, (0.1, 2.0)
"""3-Augment's threshold and range of radii (Touvron et al., "DeiT III", 2022)."""


# ---- timm ------------------------------------------------------------------------------------------------------------


def timm(setting: Setting, uint8: bool = False) -> Side:
    """`create_loader`; `uint8`: without its PrefetchLoader, the DataLoader alone."""
    notes = ["create_loader with worker processes"]
    options = _timm_evaluation(setting) if setting.evaluation else _timm_training(setting, notes)
    last = "normalises" if setting.evaluation or not setting.data.erase else "normalises and erases"
    if uint8:
        notes.append(f"the DataLoader inside PrefetchLoader, which {last}")
    else:
        notes.append(f"PrefetchLoader {last}")
    return Side("; ".join(notes), partial(_timm_stream, setting, options, uint8))


def _timm_stream(setting: Setting, options: dict[str, Any], uint8: bool) -> Stream:
    from timm.data import create_dataset, create_loader

    with _posterize_keeps_a_bit():
        loader = create_loader(
            create_dataset("", root=setting.folder),
            input_size=(3, *setting.size),
            batch_size=setting.batch,
            interpolation="bicubic",
            mean=setting.data.mean,
            std=setting.data.std,
            num_workers=setting.data.threads,
            device=setting.device,
            **options,
        )
    for images, _ in loader.loader if uint8 else loader:
        yield images


def _timm_evaluation(setting: Setting) -> dict[str, Any]:
    return {"is_training": False, "crop_pct": setting.data.eval_crop_ratio}


def _timm_training(setting: Setting, notes: list[str]) -> dict[str, Any]:
    from timm.data import FastCollateMixup

    data = setting.data
    options = {"is_training": True, "hflip": data.flip, "re_prob": data.erase, "re_mode": "pixel"}
    options |= _timm_operations(setting, notes)
    if data.crop == "simple":
        options |= {"train_crop_mode": "rkrr", "scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
        notes.append("the simple crop by train_crop_mode rkrr without scaling, within the image: no reflected pixels")
    else:
        options |= {"scale": data.crop_scale, "ratio": data.crop_ratio}
    if setting.mixes:
        notes.append("FastCollateMixup on uint8")
        options["collate_fn"] = FastCollateMixup(**_timm_mixing(setting))
    return options


def _timm_operations(setting: Setting, notes: list[str]) -> dict[str, Any]:
    """auto_augment and color_jitter of timm's create_transform."""
    augment = setting.data.augment
    if augment == "trivial" or augment.startswith("augreg"):
        raise CannotRun(f"timm has no augment {augment}")
    if augment == "three_augment":
        notes.append("its augment 3a, which is 3-Augment, and colour jitter")
        augment = "3a"
    if "inc1" in augment or augment in ("originalr", "v0r"):
        notes.append(
            "PosterizeIncreasing keeps at least 1 bit, because timm 1.0.31 asks Pillow for 0, which Pillow 13 refuses"
        )
    return {"auto_augment": None if augment == "none" else augment, "color_jitter": setting.jitter}


def _timm_mixing(setting: Setting) -> dict[str, Any]:
    """Arguments of timm's FastCollateMixup and Mixup."""
    data = setting.data
    return {
        "mixup_alpha": data.mixup,
        "cutmix_alpha": data.cutmix,
        "prob": data.mix_probability,
        "switch_prob": data.mix_switch,
        "mode": "elem" if data.mix_mode == "element" else data.mix_mode,
        "num_classes": setting.classes,
    }


@contextmanager
def _posterize_keeps_a_bit() -> Iterator[None]:
    from timm.data import auto_augment

    name = "PosterizeIncreasing"
    original = auto_augment.NAME_TO_OP[name]
    auto_augment.NAME_TO_OP[name] = lambda image, bits, **options: original(image, max(1, bits), **options)
    try:
        yield
    finally:
        auto_augment.NAME_TO_OP[name] = original


# ---- facebookresearch/deit -------------------------------------------------------------------------------------------


def deit(setting: Setting) -> Side:
    """The loader of the DeiT papers' code: everything on float32 tensors of single samples, in the workers."""
    notes = [
        "facebookresearch/deit's loader, rebuilt from its description on today's timm and torchvision: Pillow, "
        "ToTensor and Normalize of single float32 samples in worker processes, without its repeated augmentation"
    ]
    if setting.evaluation:
        transform = _deit_evaluation(setting)
    elif setting.data.augment == "three_augment":
        transform = _deit_three_augment(setting, notes)
    else:
        transform = _deit_training(setting, notes)
    if setting.mixes:
        notes.append("timm's Mixup of the float batch on the device")
    return Side("; ".join(notes), partial(_deit_stream, setting, transform))


def _deit_stream(setting: Setting, transform: Transform) -> Stream:
    from timm.data import Mixup
    from torchvision.datasets import ImageFolder

    mix = Mixup(**_timm_mixing(setting)) if setting.mixes else None
    for images, labels in _loader(setting, ImageFolder(setting.folder, transform)):
        images, labels = (tensor.to(setting.device, non_blocking=True) for tensor in (images, labels))
        yield mix(images, labels)[0] if mix else images


def _deit_evaluation(setting: Setting) -> Transform:
    from torchvision import transforms

    resize = transforms.Resize(_short_side(setting), transforms.InterpolationMode.BICUBIC)
    return transforms.Compose([resize, transforms.CenterCrop(setting.size), *_to_normalised_tensor(setting)])


def _deit_training(setting: Setting, notes: list[str]) -> Transform:
    from timm.data import create_transform

    data = setting.data
    if data.crop == "simple":
        raise CannotRun("facebookresearch/deit has the simple crop with 3-Augment only")
    if data.erase:
        notes.append("timm's RandomErasing there, too")
    options = _timm_operations(setting, notes)
    with _posterize_keeps_a_bit():
        return create_transform(
            setting.size,
            is_training=True,
            scale=data.crop_scale,
            ratio=data.crop_ratio,
            hflip=data.flip,
            interpolation="bicubic",
            mean=data.mean,
            std=data.std,
            re_prob=data.erase,
            re_mode="pixel",
            **options,
        )


def _deit_three_augment(setting: Setting, notes: list[str]) -> Transform:
    from torchvision import transforms

    data, bicubic = setting.data, transforms.InterpolationMode.BICUBIC
    if data.crop == "simple":
        crop = [
            transforms.Resize(_short_side(setting), bicubic),
            transforms.RandomCrop(setting.size, padding=PAD, padding_mode="reflect"),
        ]
    else:
        crop = [transforms.RandomResizedCrop(setting.size, data.crop_scale, data.crop_ratio, bicubic)]
    if data.erase:
        notes.append("nothing erased, because its 3-Augment excludes that")
    one_of_three = [transforms.Grayscale(3), transforms.RandomSolarize(_SOLARIZE, 1.0), _blurred]
    return transforms.Compose(
        [
            *crop,
            transforms.RandomHorizontalFlip(data.flip),
            transforms.RandomChoice(one_of_three),
            *([transforms.ColorJitter(*setting.jitter)] if setting.jitter else []),
            *_to_normalised_tensor(setting),
        ]
    )


def _to_normalised_tensor(setting: Setting) -> list[Transform]:
    from torchvision import transforms

    return [transforms.ToTensor(), transforms.Normalize(setting.data.mean, setting.data.std)]


def _blurred(image: "Image.Image") -> "Image.Image":
    from PIL import ImageFilter

    return image.filter(ImageFilter.GaussianBlur(torch.empty(()).uniform_(*_BLUR).item()))


# ---- torchvision -----------------------------------------------------------------------------------------------------


def torchvision(setting: Setting, uint8: bool = False) -> Side:
    """transforms.v2 on uint8 tensors; `uint8`: batches of what they are before ToDtype."""
    from torchvision.transforms import v2

    data = setting.data
    notes = ["decode_image and transforms.v2 on uint8 tensors in worker processes of DataLoader"]
    if setting.evaluation:
        transform = [_torchvision_resize(setting), v2.CenterCrop(setting.size)]
    else:
        transform = [*_torchvision_crop(setting), v2.RandomHorizontalFlip(data.flip)]
        transform += _torchvision_operations(setting, notes)
        transform += [v2.ColorJitter(*setting.jitter)] if setting.jitter else []
    if not uint8:
        notes.append("ToDtype and Normalize of single samples there, too")
        transform += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(data.mean, data.std)]
        if data.erase and not setting.evaluation:
            notes.append("and RandomErasing")
            transform.append(v2.RandomErasing(data.erase, value="random"))
    mix = None if uint8 else _torchvision_mixing(setting, notes)
    return Side("; ".join(notes), partial(_torchvision_stream, setting, v2.Compose(transform), mix))


def _torchvision_stream(setting: Setting, transform: Transform, mix: Transform | None) -> Stream:
    from torchvision.datasets import ImageFolder
    from torchvision.io import ImageReadMode, decode_image

    files = ImageFolder(setting.folder, transform, loader=partial(decode_image, mode=ImageReadMode.RGB))
    for batch in _loader(setting, files):
        images, labels = (tensor.to(setting.device, non_blocking=True) for tensor in batch)
        yield mix(images, labels)[0] if mix else images


def _torchvision_resize(setting: Setting) -> Transform:
    from torchvision.transforms import v2

    return v2.Resize(_short_side(setting), v2.InterpolationMode.BICUBIC, antialias=True)


def _torchvision_crop(setting: Setting) -> list[Transform]:
    from torchvision.transforms import v2

    data = setting.data
    if data.crop == "simple":
        return [_torchvision_resize(setting), v2.RandomCrop(setting.size, padding=PAD, padding_mode="reflect")]
    bicubic = v2.InterpolationMode.BICUBIC
    return [v2.RandomResizedCrop(setting.size, data.crop_scale, data.crop_ratio, bicubic, antialias=True)]


def _torchvision_operations(setting: Setting, notes: list[str]) -> list[Transform]:
    from torchvision.transforms import v2

    augment, rand = setting.data.augment, setting.rand
    # On tensors it has no bicubic one.
    drawn = {"interpolation": v2.InterpolationMode.BILINEAR, "fill": pixel_ops.FILL}
    if augment == "none":
        return []
    if augment in _THREE_AUGMENT:
        notes.append(f"3-Augment of its own operations, the blur a Gaussian of {_KERNEL} x {_KERNEL} pixels")
        blur = v2.GaussianBlur(_KERNEL, _BLUR)
        return [v2.RandomChoice([v2.Grayscale(3), v2.RandomSolarize(_SOLARIZE, 1.0), blur])]
    if rand is not None:
        magnitude = _magnitude(rand, "torchvision")
        notes.append("torchvision's RandAugment (every operation applied, one magnitude, bilinear)")
        return [v2.RandAugment(rand.draws, round(magnitude), 10 + 1, **drawn)]
    if augment == "trivial":
        notes.append("torchvision's TrivialAugmentWide, bilinear")
        return [v2.TrivialAugmentWide(_BINS, **drawn)]
    if augment == "original":
        notes.append("torchvision's AutoAugment, bilinear")
        return [v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET, **drawn)]
    raise CannotRun(f"torchvision has no augment {augment}")


def _torchvision_mixing(setting: Setting, notes: list[str]) -> Transform | None:
    from torchvision.transforms import v2

    data = setting.data
    if not setting.mixes:
        return None
    notes.append("MixUp or CutMix of the float batch on the device, one draw a batch")
    kinds = (v2.MixUp, data.mixup, 1 - data.mix_switch), (v2.CutMix, data.cutmix, data.mix_switch)
    on = [(kind(alpha=alpha, num_classes=setting.classes), share) for kind, alpha, share in kinds if alpha]
    either = v2.RandomChoice([kind for kind, _ in on], [share for _, share in on] if len(on) == 2 else None)
    return v2.RandomApply([either], data.mix_probability)


# ---- DALI ------------------------------------------------------------------------------------------------------------


def dali(setting: Setting, uint8: bool = False) -> Side:
    """One pipeline of DALI's own operators; `uint8`: without the last, which normalises."""
    notes = ["one DALI pipeline"]
    if not setting.evaluation:
        notes[0] += ", not replayable"
        notes += _dali_differences(setting)
    return Side("; ".join(notes), partial(_dali_stream, setting, uint8))


def _dali_differences(setting: Setting) -> Iterator[str]:
    data, augment = setting.data, setting.data.augment
    left_out = [word for word, wanted in (("erased", data.erase), ("mixed", setting.mixes)) if wanted]
    if left_out:
        yield f"nothing {' or '.join(left_out)}"
    if data.crop == "simple":
        yield "the window of the simple crop within the image: no reflected pixels"
    if augment in _THREE_AUGMENT:
        yield "3-Augment by a random branch, the blur DALI's Gaussian"
    elif augment == "trivial":
        yield "DALI's TrivialAugment, bilinear"
    elif augment == "original":
        yield "DALI's AutoAugment, bilinear"
    elif setting.rand is not None:
        _magnitude(setting.rand, "DALI")
        yield "DALI's RandAugment (every operation applied, one magnitude, bilinear)"
    elif augment != "none":
        raise CannotRun(f"DALI has no augment {augment}")
    if setting.jitter:
        yield "colour jitter by color_twist: in one order, contrast about 128, not rounded in between"


def _dali_stream(setting: Setting, uint8: bool) -> Stream:
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
            images = _dali_operations(setting, images)
        return _dali_output(setting, images, uint8)

    pipe = pipeline()
    pipe.build()
    while True:
        (images,) = pipe.run()
        yield torch.from_dlpack(images.as_tensor())


def _dali_operations(setting: Setting, images: "DataNode") -> "DataNode":
    """What comes between the crop and the normalisation in training."""
    from nvidia.dali import fn
    from nvidia.dali.auto_aug import auto_augment, rand_augment, trivial_augment

    data, rand = setting.data, setting.rand
    drawn = {"shape": setting.size, "fill_value": pixel_ops.FILL[1]}
    if data.crop == "simple":
        where = {f"crop_pos_{axis}": fn.random.uniform(range=[0.0, 1.0]) for axis in "xy"}
        images = fn.crop(images, crop=setting.size, **where)
    images = fn.flip(images, horizontal=fn.random.coin_flip(probability=data.flip))
    if data.augment in _THREE_AUGMENT:
        images = _dali_three_augment(images)
    elif data.augment == "trivial":
        images = trivial_augment.trivial_augment_wide(images, num_magnitude_bins=_BINS, **drawn)
    elif data.augment == "original":
        images = auto_augment.auto_augment(images, **drawn)
    elif rand is not None:
        magnitude = round(_magnitude(rand, "DALI") / 10 * (_BINS - 1))
        images = rand_augment.rand_augment(images, n=rand.draws, m=magnitude, num_magnitude_bins=_BINS, **drawn)
    if setting.jitter:
        brightness, contrast, saturation, hue = setting.jitter
        images = fn.color_twist(
            images,
            brightness=_dali_uniform(max(0, 1 - brightness), 1 + brightness),
            contrast=_dali_uniform(max(0, 1 - contrast), 1 + contrast),
            saturation=_dali_uniform(max(0, 1 - saturation), 1 + saturation),
            hue=_dali_uniform(-360 * hue, 360 * hue),
        )
    return images


def _dali_three_augment(images: "DataNode") -> "DataNode":
    from nvidia.dali import fn, types

    which = fn.random.uniform(range=[0.0, 3.0])
    if which < 1.0:
        grey = fn.color_space_conversion(images, image_type=types.RGB, output_type=types.GRAY)
        images = fn.cat(grey, grey, grey, axis=2)
    elif which < 2.0:
        bright = fn.cast(images >= _SOLARIZE, dtype=types.UINT8)
        images = images ^ bright * types.Constant(255, dtype=types.UINT8)
    else:
        images = fn.gaussian_blur(images, sigma=_dali_uniform(*_BLUR))
    return images


def _dali_uniform(low: float, high: float) -> "DataNode | float":
    from nvidia.dali import fn

    return fn.random.uniform(range=[low, high]) if low < high else low


def _dali_output(setting: Setting, images: "DataNode", uint8: bool) -> "DataNode":
    """The window of evaluation, and the float images `[3, H, W]` or the bytes `[H, W, 3]`."""
    from nvidia.dali import fn, types

    # Half a pixel off the centre torchvision rounds to even, DALI away from zero: at 58.5, of an image of 4:3, one on.
    window = {"crop": setting.size, "rounding": "truncate"} if setting.evaluation else {}
    if uint8:
        return fn.crop(images, **window) if window else images
    data = setting.data
    scale = {"mean": [255 * mean for mean in data.mean], "std": [255 * std for std in data.std]}
    return fn.crop_mirror_normalize(images, dtype=types.FLOAT, output_layout="CHW", **scale, **window)


# ---- what peers share ------------------------------------------------------------------------------------------------


def _loader(setting: Setting, files: torch.utils.data.Dataset) -> "DataLoader":
    from torch.utils.data import DataLoader

    return DataLoader(
        files,
        setting.batch,
        shuffle=not setting.evaluation,
        num_workers=setting.data.threads,
        pin_memory=setting.device.type == "cuda",
        drop_last=not setting.evaluation,
    )


def _short_side(setting: Setting) -> int:
    """To what torchvision's Resize brings the short side."""
    height, width = setting.covered
    if height != width:
        raise CannotRun("torchvision resizes to a short side, which does not fit an input that is not square")
    return height


def _magnitude(rand: policy.Policy, peer: str) -> float:
    """Of RandAugment, in tenths of the largest, as timm's; CannotRun where `peer` has nothing like it."""
    magnitude, names = rand.rows[0][0].magnitude, {op.name.removesuffix("Increasing") for (op,) in rand.rows}
    if magnitude > 10 or rand.weights is not None or not {"Rotate", "Invert"} <= names:
        raise CannotRun(f"{peer} has RandAugment with its own operations, up to magnitude 10")
    return magnitude


# ---- ours and the peers ----------------------------------------------------------------------------------------------

_SIDES: dict[str, Callable[[Setting], Side]] = {
    "fastdeit": bench_data.ours,
    "fastdeit_uint8": partial(bench_data.ours, uint8=True),
    "fastdeit_loader": bench_data.as_loader,
    bench_data.DECODER: bench_data.decoder,
    "timm": timm,
    "timm_uint8": partial(timm, uint8=True),
    "deit": deit,
    "torchvision": torchvision,
    "torchvision_uint8": partial(torchvision, uint8=True),
    "dali": dali,
    "dali_uint8": partial(dali, uint8=True),
}
_PEERS = {
    "none": ["fastdeit_uint8", "fastdeit_loader", bench_data.DECODER],
    "timm": ["fastdeit_uint8", "fastdeit_loader", bench_data.DECODER, "timm", "timm_uint8"],
    "deit": [bench_data.DECODER, "deit"],
    "torchvision": ["fastdeit_uint8", bench_data.DECODER, "torchvision", "torchvision_uint8"],
    "dali": ["fastdeit_uint8", bench_data.DECODER, "dali", "dali_uint8"],
    "all": [name for name in _SIDES if name != "fastdeit"],
}


@contextmanager
def sides(args: argparse.Namespace, device: torch.device) -> Generator[tuple[dict[str, Timer], dict[str, Any]]]:
    """(a timer for each side, facts for the row); a timer returns (seconds, CPU seconds) of `Setting.timed` batches. A
    peer that has nothing like the recipe is in the fact `failed`, with the reason; UsageError if that is true of all.
    """
    with bench_data.opened(args, device) as setting:
        built, failed = _built(setting, _PEERS[args.peer])
        facts = bench_data.facts(setting, args.overrides)
        facts |= {"work": {name: side.work for name, side in built.items()}, "failed": failed}
        bench_data.write_images(setting)
        yield {name: bench_data.timer(side.stream, setting) for name, side in built.items()}, facts


def _built(setting: Setting, names: list[str]) -> tuple[dict[str, Side], dict[str, str]]:
    """(`fastdeit` and the sides `names` that there are in this setting, the reasons of the others)."""
    built: dict[str, Side] = {}
    failed: dict[str, str] = {}
    for name in ["fastdeit", *names]:
        try:
            built[name] = _SIDES[name](setting)
        except Exception as error:
            failed[name] = reason(error)
    peers = [name for name in names if not name.startswith("fastdeit")]
    if peers and all(name in failed for name in peers):
        why = "; ".join(dict.fromkeys(failed[name] for name in peers))
        raise UsageError(f"recipe {setting.recipe.name} has nothing to be compared with: {why}")
    return built, failed
