import io

import numpy as np
import pytest
from PIL import Image

from fastdeit.data.execute.route import route


def picture(seed: int, width: int, height: int) -> Image.Image:
    """Smooth colours with some grain: no flat areas, and no energy only at the pixel grid."""
    noise = np.random.default_rng(seed)
    small = noise.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    smooth = np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC), dtype=np.int64)
    return Image.fromarray((smooth + noise.integers(-12, 13, (height, width, 1))).clip(0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def sides(data: np.ndarray) -> tuple[int, int]:
    """(width, height) as the header of a file, uint8 `[n]`, says."""
    found = route(data)
    return found.width, found.height


class Bytes:
    """A source of encoded images in memory."""

    def __init__(self, images: list[bytes], classes: int = 2) -> None:
        self.images = [np.frombuffer(data, dtype=np.uint8) for data in images]
        self.classes = [str(label) for label in range(classes)]
        self.fingerprint = "bytes"

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> np.ndarray:
        return self.images[index]

    def label(self, index: int) -> int:
        return index % len(self.classes)

    def path(self, index: int) -> str:
        return f"memory:{index}"


@pytest.fixture(scope="session")
def varied() -> list[bytes]:
    """136 JPEGs of 136 sizes, 40 to 160 pixels a side, with and without chroma subsampling."""
    sizes = np.random.default_rng(0).integers(40, 161, (136, 2)).tolist()
    return [encoded(picture(i, *size), quality=90, subsampling=2 * (i % 2)) for i, size in enumerate(sizes)]


@pytest.fixture(scope="session")
def memory():
    return Bytes


@pytest.fixture
def jpeg() -> bytes:
    return encoded(picture(0, 90, 70), quality=90)


@pytest.fixture(scope="session")
def make_image():
    return picture


@pytest.fixture(scope="session")
def encode():
    return encoded
