"""Decoding and geometry against PIL and torchvision, with the same plan.

torch's resize of 8-bit images follows PIL's arithmetic but for the precision of its weights: up to 5 levels, 0.1 on
average. DALI's, in the GPU's graph, keeps floats between its two passes: up to 8 levels at an edge, 0.2 on average. A
shift by one pixel would be 9 on average.
"""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from fastdeit.data.loader import EvalLoader, TrainLoader
from fastdeit.data.plan import plan
from tests.data import parity

SIZE = (96, 80)


@pytest.fixture(scope="module")
def photos(varied):
    return varied[:48]


@pytest.mark.parametrize("crop", ["random_resized", "simple"])
def test_crop_and_flip_on_the_cpu(photos, crop):
    work = parity.planned(photos, plan.Augment(size=SIZE, crop=crop))
    apart = parity.difference(parity.on_cpu(SIZE), photos, work)
    assert work.views[0].flip.any()
    assert not work.views[0].flip.all()
    assert apart.max() <= 5
    assert apart.mean() < 0.1


def test_random_resized_crop_and_flip_in_the_graph(photos):
    work = parity.planned(photos, plan.Augment(size=SIZE))
    apart = parity.difference(parity.in_graph(work, SIZE), photos, work)
    assert apart.mean() < 1.0  # the pixels around the box take part in the interpolation at its border
    assert apart[:, 8:-8, 8:-8].mean() < 0.25


def test_simple_crop_and_flip_in_the_graph(photos):
    work = parity.planned(photos, plan.Augment(size=SIZE, crop="simple"))
    apart = parity.difference(parity.in_graph(work, SIZE), photos, work)
    assert apart.max() <= 8
    assert apart.mean() < 0.25


@pytest.mark.parametrize(("size", "ratio"), [((96, 96), 0.875), ((64, 64), 1.0)])
def test_evaluation_crop(photos, memory, size, ratio):
    (batch,) = EvalLoader(memory(photos), size, ratio, batch_size=48, threads=2).batches()
    reference = transforms.Compose(
        [
            transforms.Resize(int(size[0] / ratio), transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
        ]
    )
    wanted = np.stack([np.asarray(reference(Image.open(io.BytesIO(data)).convert("RGB"))) for data in photos])
    apart = np.abs(batch.images[0].numpy().astype(int) - wanted)
    assert apart.max() <= 5
    assert apart.mean() < 0.1


def test_exif_rotation_is_ignored(memory, make_image, encode):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = make_image(3, 60, 40)
    encoded = [encode(image, quality=95), encode(image, quality=95, exif=exif)]
    (batch,) = EvalLoader(memory(encoded), (40, 60), 1.0, batch_size=2, threads=1).batches()
    assert torch.equal(batch.images[0][0], batch.images[0][1])
    loader = TrainLoader(
        memory(encoded),
        [plan.Augment(size=(40, 60), crop_scale=(1, 1), crop_ratio=(1.5, 1.5), flip=0.0)],
        plan.Mixing(group_size=2),
        seed=0,
        batch_size=2,
        threads=1,
    )
    ((samples,),) = loader.batches(0, 1)
    assert torch.equal(samples.images[0][0], samples.images[0][1])
