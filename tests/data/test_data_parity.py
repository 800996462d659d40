"""Pixels of DALI against PIL and torchvision, with the same geometry.

PIL rounds to 8 bits between its two passes, DALI keeps floats: up to 8 levels at an edge, 0.2 on average. A shift by
one pixel would be 9 on average.
"""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from fastdeit.data import plan
from fastdeit.data.dali import Executor, Work
from fastdeit.data.loader import EvalLoader, TrainLoader
from fastdeit.data.source import header

SIZE = (96, 80)


@pytest.fixture(scope="module")
def photos(varied):
    return varied[:48]


def difference(images: np.ndarray, expected: list[Image.Image]) -> np.ndarray:
    return np.abs(images.astype(int) - np.stack([np.asarray(image) for image in expected]).astype(int))


def geometry(photos: list[bytes]) -> plan.Plan:
    width, height = np.array([header(np.frombuffer(data, np.uint8)) for data in photos]).T
    n = len(photos)
    return plan.samples(plan.Augment(), 5, 0, np.arange(n), np.zeros(n, int), width, height)


@pytest.mark.parametrize("decode_box", [True, False])
def test_random_resized_crop_and_flip(photos, decode_box):
    crops = geometry(photos)
    executor = Executor(SIZE, 48, threads=2, device="cpu", decode_box=decode_box, repair=None)
    executor.submit(Work([np.frombuffer(data, np.uint8) for data in photos], crops.box, crops.flip))
    images = np.asarray(torch.from_dlpack(executor.collect()[1].as_tensor()))
    expected = []
    for data, (y, x, h, w), flip in zip(photos, crops.box.tolist(), crops.flip, strict=True):
        image = Image.open(io.BytesIO(data)).convert("RGB")
        box = (x, y, x + w, y + h)
        crop = image.crop(box).resize(SIZE[::-1], Image.Resampling.BICUBIC)
        expected.append(crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else crop)
    apart = difference(images, expected)
    assert crops.flip.any()
    assert not crops.flip.all()
    if decode_box:
        assert apart.max() <= 8
        assert apart.mean() < 0.25
    else:  # the pixels around the box take part in the interpolation at its border
        assert apart.mean() < 1.0
        assert apart[:, 8:-8, 8:-8].mean() < 0.25


@pytest.mark.parametrize(("size", "ratio"), [((96, 96), 0.875), ((64, 64), 1.0)])
def test_evaluation_crop(photos, memory, size, ratio):
    (batch,) = EvalLoader(memory(photos), size, ratio, batch_size=48, threads=2).batches()
    reference = transforms.Compose(
        [
            transforms.Resize(int(size[0] / ratio), transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
        ]
    )
    apart = difference(
        batch.images.numpy(), [reference(Image.open(io.BytesIO(data)).convert("RGB")) for data in photos]
    )
    assert apart.max() <= 6
    assert apart.mean() < 0.25


def test_exif_rotation_is_ignored(memory, make_image, encode):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = make_image(3, 60, 40)
    encoded = [encode(image, quality=95), encode(image, quality=95, exif=exif)]
    (batch,) = EvalLoader(memory(encoded), (40, 60), 1.0, batch_size=2, threads=1).batches()
    assert torch.equal(batch.images[0], batch.images[1])
    loader = TrainLoader(
        memory(encoded),
        plan.Augment(size=(40, 60), crop_scale=(1, 1), crop_ratio=(1.5, 1.5), flip=0.0, group_size=2),
        seed=0,
        batch_size=2,
        threads=1,
    )
    ((samples,),) = loader.batches(0, 1)
    assert torch.equal(samples.images[0], samples.images[1])
