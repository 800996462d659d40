"""torchvision's transforms.v2 in PyTorch's DataLoader."""

from functools import partial

import torch

from fastdeit.bench.data import CLASSES, Setting, Side, Stream
from fastdeit.bench.input_peers.common import (
    BINS,
    BLUR,
    KERNEL,
    SOLARIZE,
    THREE_AUGMENT,
    Transform,
    loader,
    magnitude_of,
    short_side,
)
from fastdeit.bench.measure import CannotRun
from fastdeit.data import pixel_ops
from fastdeit.data.plan.plan import PAD


def torchvision(setting: Setting, uint8: bool = False) -> Side:
    """transforms.v2 on uint8 tensors; `uint8`: batches of what they are before ToDtype."""
    from torchvision.transforms import v2

    data = setting.data
    notes = ["decode_image and transforms.v2 on uint8 tensors in worker processes of DataLoader"]
    if setting.evaluation:
        transform = [_resize(setting), v2.CenterCrop(setting.size)]
    else:
        transform = [*_crop(setting), v2.RandomHorizontalFlip(data.flip)]
        transform += _operations(setting, notes)
        transform += [v2.ColorJitter(*setting.jitter)] if setting.jitter else []
    if not uint8:
        notes.append("ToDtype and Normalize of single samples there, too")
        transform += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(data.mean, data.std)]
        if data.erase and not setting.evaluation:
            notes.append("and RandomErasing")
            transform.append(v2.RandomErasing(data.erase, value="random"))
    mix = None if uint8 else _mixing(setting, notes)
    return Side("; ".join(notes), partial(_stream, setting, v2.Compose(transform), mix))


def _stream(setting: Setting, transform: Transform, mix: Transform | None) -> Stream:
    from torchvision.datasets import ImageFolder
    from torchvision.io import ImageReadMode, decode_image

    files = ImageFolder(setting.folder, transform, loader=partial(decode_image, mode=ImageReadMode.RGB))
    for batch in loader(setting, files):
        images, labels = (tensor.to(setting.device, non_blocking=True) for tensor in batch)
        yield mix(images, labels)[0] if mix else images


def _resize(setting: Setting) -> Transform:
    from torchvision.transforms import v2

    return v2.Resize(short_side(setting), v2.InterpolationMode.BICUBIC, antialias=True)


def _crop(setting: Setting) -> list[Transform]:
    from torchvision.transforms import v2

    data = setting.data
    if data.crop == "simple":
        return [_resize(setting), v2.RandomCrop(setting.size, padding=PAD, padding_mode="reflect")]
    bicubic = v2.InterpolationMode.BICUBIC
    return [v2.RandomResizedCrop(setting.size, data.crop_scale, data.crop_ratio, bicubic, antialias=True)]


def _operations(setting: Setting, notes: list[str]) -> list[Transform]:
    from torchvision.transforms import v2

    augment, rand = setting.data.augment, setting.rand
    # On tensors it has no bicubic one.
    drawn = {"interpolation": v2.InterpolationMode.BILINEAR, "fill": pixel_ops.FILL}
    if augment == "none":
        return []
    if augment in THREE_AUGMENT:
        notes.append(f"3-Augment of its own operations, the blur a Gaussian of {KERNEL} x {KERNEL} pixels")
        blur = v2.GaussianBlur(KERNEL, BLUR)
        return [v2.RandomChoice([v2.Grayscale(3), v2.RandomSolarize(SOLARIZE, 1.0), blur])]
    if rand is not None:
        magnitude = magnitude_of(rand, "torchvision")
        notes.append("torchvision's RandAugment (every operation applied, one magnitude, bilinear)")
        return [v2.RandAugment(rand.draws, round(magnitude), 10 + 1, **drawn)]
    if augment == "trivial":
        notes.append("torchvision's TrivialAugmentWide, bilinear")
        return [v2.TrivialAugmentWide(BINS, **drawn)]
    if augment == "original":
        notes.append("torchvision's AutoAugment, bilinear")
        return [v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET, **drawn)]
    raise CannotRun(f"torchvision has no augment {augment}")


def _mixing(setting: Setting, notes: list[str]) -> Transform | None:
    from torchvision.transforms import v2

    data = setting.data
    if not setting.mixes:
        return None
    notes.append("MixUp or CutMix of the float batch on the device, one draw a batch")
    kinds = (v2.MixUp, data.mixup, 1 - data.mix_switch), (v2.CutMix, data.cutmix, data.mix_switch)
    on = [(kind(alpha=alpha, num_classes=CLASSES), share) for kind, alpha, share in kinds if alpha]
    either = v2.RandomChoice([kind for kind, _ in on], [share for _, share in on] if len(on) == 2 else None)
    return v2.RandomApply([either], data.mix_probability)
