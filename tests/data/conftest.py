import io

import numpy as np
import pytest
import torch
from PIL import Image

torch.set_num_threads(1)


def picture(seed: int, width: int, height: int) -> Image.Image:
    """Smooth colours with some grain: no flat areas, and no energy only at the pixel grid."""
    noise = np.random.default_rng(seed)
    small = noise.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC), dtype=np.int64)
    return Image.fromarray((smooth + noise.integers(-12, 13, (height, width, 1))).clip(0, 255).astype(np.uint8))


def encode(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


class Bytes:
    """A source of encoded images in memory."""

    def __init__(self, encoded: list[bytes], classes: int = 2) -> None:
        self.encoded = [np.frombuffer(data, dtype=np.uint8) for data in encoded]
        self.classes = [str(label) for label in range(classes)]
        self.fingerprint = "bytes"

    def __len__(self) -> int:
        return len(self.encoded)

    def read(self, index: int) -> np.ndarray:
        return self.encoded[index]

    def label(self, index: int) -> int:
        return index % len(self.classes)

    def path(self, index: int) -> str:
        return f"memory:{index}"


@pytest.fixture(scope="session")
def varied() -> list[bytes]:
    """136 JPEGs of 136 sizes, 40 to 160 pixels a side, with and without chroma subsampling."""
    sizes = np.random.default_rng(0).integers(40, 161, (136, 2)).tolist()
    return [encode(picture(i, *size), quality=90, subsampling=2 * (i % 2)) for i, size in enumerate(sizes)]


@pytest.fixture
def memory():
    return Bytes


@pytest.fixture
def jpeg() -> bytes:
    return encode(picture(0, 90, 70), quality=90)


@pytest.fixture
def make_image():
    return picture


@pytest.fixture
def make_bytes():
    return encode
