"""facebookresearch/deit's loader, rebuilt here from what is known of it."""

from functools import partial
from typing import TYPE_CHECKING

import torch

from fastdeit.bench.data import Setting, Side, Stream
from fastdeit.bench.input_peers.common import BLUR, SOLARIZE, Transform, loader, short_side
from fastdeit.bench.input_peers.timm import mixing_options, operations_options, posterize_keeps_a_bit
from fastdeit.bench.measure import CannotRun
from fastdeit.data.plan.plan import PAD

if TYPE_CHECKING:
    from PIL import Image


def deit(setting: Setting) -> Side:
    """The loader of the DeiT papers' code: everything on float32 tensors of single samples, in the workers."""
    notes = [
        "facebookresearch/deit's loader, rebuilt from its description on today's timm and torchvision: Pillow, "
        "ToTensor and Normalize of single float32 samples in worker processes, without its repeated augmentation"
    ]
    if setting.evaluation:
        transform = _evaluation(setting)
    elif setting.data.augment == "three_augment":
        transform = _three_augment(setting, notes)
    else:
        transform = _training(setting, notes)
    if setting.mixes:
        notes.append("timm's Mixup of the float batch on the device")
    return Side("; ".join(notes), partial(_stream, setting, transform))


def _stream(setting: Setting, transform: Transform) -> Stream:
    from timm.data import Mixup
    from torchvision.datasets import ImageFolder

    mix = Mixup(**mixing_options(setting)) if setting.mixes else None
    for images, labels in loader(setting, ImageFolder(setting.folder, transform)):
        images, labels = (tensor.to(setting.device, non_blocking=True) for tensor in (images, labels))
        yield mix(images, labels)[0] if mix else images


def _evaluation(setting: Setting) -> Transform:
    from torchvision import transforms

    resize = transforms.Resize(short_side(setting), transforms.InterpolationMode.BICUBIC)
    return transforms.Compose([resize, transforms.CenterCrop(setting.size), *_to_normalised_tensor(setting)])


def _training(setting: Setting, notes: list[str]) -> Transform:
    from timm.data import create_transform

    data = setting.data
    if data.crop == "simple":
        raise CannotRun("facebookresearch/deit has the simple crop with 3-Augment only")
    if data.erase:
        notes.append("timm's RandomErasing there, too")
    options = operations_options(setting, notes)
    with posterize_keeps_a_bit():
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


def _three_augment(setting: Setting, notes: list[str]) -> Transform:
    from torchvision import transforms

    data, bicubic = setting.data, transforms.InterpolationMode.BICUBIC
    if data.crop == "simple":
        crop = [
            transforms.Resize(short_side(setting), bicubic),
            transforms.RandomCrop(setting.size, padding=PAD, padding_mode="reflect"),
        ]
    else:
        crop = [transforms.RandomResizedCrop(setting.size, data.crop_scale, data.crop_ratio, bicubic)]
    if data.erase:
        notes.append("nothing erased, because its 3-Augment excludes that")
    one_of_three = [transforms.Grayscale(3), transforms.RandomSolarize(SOLARIZE, 1.0), _blurred]
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

    return image.filter(ImageFilter.GaussianBlur(torch.empty(()).uniform_(*BLUR).item()))
