"""A synthetic data set: pictures made on the fly, that a small model learns."""

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastdeit import rng
from fastdeit.data.sources.source import DataError

_POOL = 512


class SyntheticSource:
    """`n` procedural JPEGs of `size` (height, width) in `classes` classes: a class is a hue and a stripe direction, so
    that a small model learns it, under noise that makes the files as large as photographs of that size.

    About 512 distinct pictures are rendered on first use and kept encoded; sample i has label i % classes.
    """

    def __init__(self, n: int, classes: int, size: tuple[int, int] = (375, 500), seed: int = 0) -> None:
        if n < 1 or classes < 2:
            raise DataError(f"a synthetic data set needs at least 1 sample and 2 classes, got {n} and {classes}")
        self._n, self._size, self._seed = n, size, seed
        self._variants = max(1, _POOL // classes)
        self._pool: dict[tuple[int, int], NDArray[np.uint8]] = {}
        self.skipped: Sequence[tuple[str, str]] = ()
        self.classes = [f"class_{label:04d}" for label in range(classes)]
        self.fingerprint = f"synthetic-{n}-{classes}-{size[0]}x{size[1]}-{seed}"

    def __len__(self) -> int:
        return self._n

    def read(self, index: int) -> NDArray[np.uint8]:
        """The JPEG file of picture `index`: uint8 `[n]`."""
        which = self.label(index), index // len(self.classes) % self._variants
        if which not in self._pool:
            self._pool[which] = _render(self._seed, *which, len(self.classes), self._size)
        return self._pool[which]

    def label(self, index: int) -> int:
        """Class number of picture `index`."""
        return index % len(self.classes)

    def name(self, index: int) -> str:
        """Name of picture `index`."""
        return f"{index}.jpg"

    def path(self, index: int) -> str:
        """What stands for a path in messages."""
        return f"synthetic:{index}"


def _render(seed: int, label: int, variant: int, classes: int, size: tuple[int, int]) -> NDArray[np.uint8]:
    """One picture: class stripes in the class hue on a random smooth background, plus fine grain; JPEG quality 90,
    4:2:0."""
    height, width = size
    key = rng.key(seed, "synthetic", label, variant)
    phase, pitch, *background = rng.uniform(key, 0, 2 + 4 * 4 * 3)[0]
    angle = np.pi * label / classes
    y, x = np.mgrid[0:height, 0:width].astype(np.float32) / max(size)
    stripes = np.sin(2 * np.pi * ((4 + 4 * pitch) * (x * np.cos(angle) + y * np.sin(angle)) + phase))
    hue = 2 * np.pi * label / classes + np.array([0, 2, 4]) * np.pi / 3
    small = (np.array(background).reshape(4, 4, 3) * 255).astype(np.uint8)
    smooth = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC), np.float32)
    grain = rng.bits(key, np.arange(height), width, stream=1)[..., None] % 64
    picture = 0.4 * smooth + 60 * (1 + np.cos(hue)) * (1 + stripes[..., None]) / 2 + grain
    out = io.BytesIO()
    Image.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return np.frombuffer(out.getvalue(), dtype=np.uint8)
