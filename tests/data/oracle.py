"""The plan executed by Pillow, torchvision and timm themselves, one image at a time: what the executors are held
against."""

import io

import numpy as np
from PIL import Image, ImageFilter
from timm.data import auto_augment as timm
from torchvision.transforms import functional as torchvision

from fastdeit.data.pixel_ops import FILL, KINDS
from fastdeit.data.plan.plan import PAD

_GEOMETRY = {"fillcolor": FILL, "resample": Image.Resampling.BICUBIC}
OPERATIONS = {
    "auto_contrast": lambda image, _: timm.auto_contrast(image),
    "equalize": lambda image, _: timm.equalize(image),
    "invert": lambda image, _: timm.invert(image),
    "rotate": lambda image, value: timm.rotate(image, value, **_GEOMETRY),
    "posterize": lambda image, value: timm.posterize(image, int(value)),
    "solarize": lambda image, value: timm.solarize(image, value),
    "solarize_add": lambda image, value: timm.solarize_add(image, int(value)),
    "color": timm.color,
    "contrast": timm.contrast,
    "brightness": timm.brightness,
    "sharpness": timm.sharpness,
    "shear_x": lambda image, value: timm.shear_x(image, value, **_GEOMETRY),
    "shear_y": lambda image, value: timm.shear_y(image, value, **_GEOMETRY),
    "translate_x": lambda image, value: timm.translate_x_abs(image, value, **_GEOMETRY),
    "translate_y": lambda image, value: timm.translate_y_abs(image, value, **_GEOMETRY),
    "grayscale": lambda image, _: torchvision.rgb_to_grayscale(image, 3),
    "blur": lambda image, value: image.filter(ImageFilter.GaussianBlur(value)),
    "hue": torchvision.adjust_hue,
}


def operate(image: Image.Image, kind: np.ndarray, value: np.ndarray) -> Image.Image:
    for index, argument in zip(kind.tolist(), value.tolist(), strict=True):
        if index:
            image = OPERATIONS[KINDS[index]](image, argument)
    return image


def execute(data: bytes, view, row: int, size: tuple[int, int]) -> np.ndarray:
    """Row `row` of a `plan.Plan`, from the bytes `data` to uint8 `[H, W, 3]`."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    y, x, h, w = view.box[row].tolist()
    image = image.crop((x, y, x + w, y + h))
    height, width = size if view.resize is None else view.resize[row].tolist()
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    if view.start is not None:
        top, left = view.start[row].tolist()
        image = torchvision.pad(image, PAD, padding_mode="reflect")
        image = image.crop((left + PAD, top + PAD, left + PAD + size[1], top + PAD + size[0]))
    if view.flip[row]:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    if view.ops is not None:
        image = operate(image, view.ops.kind[row], view.ops.value[row])
    return np.asarray(image)
