"""One truth about every picture: training, evaluation and `pixels` see what Pillow sees, or refuse the same files."""

import io

import numpy as np
import pytest
from PIL import Image

from fastdeit.data.execute import pillow
from fastdeit.data.execute.dali import Executor, files
from fastdeit.data.execute.decode import pixels
from fastdeit.data.execute.route import MAX_PIXELS, Route, route, routed
from fastdeit.data.loader import EvalLoader, TrainLoader
from fastdeit.data.plan import plan
from fastdeit.data.sources.source import BadImage
from tests.data import pictures

SIZE = pictures.SIDE, pictures.SIDE


def array(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def by_pillow(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


@pytest.fixture(scope="module")
def matrix():
    """(name, bytes, pixels of Pillow or ours, None where nobody reads it) of every kind of file."""
    read = pictures.ordinary() | pictures.odd() | pictures.damaged()
    rows = [(name, data, by_pillow(data)) for name, data in read.items()]
    rows += [(name, data, wanted) for name, (data, wanted) in pictures.deep().items()]
    rows += [(name, data, pixels(array(data))) for name, data in pictures.forgiven().items()]
    return rows + [(name, data, None) for name, data in pictures.refused().items()]


@pytest.fixture(scope="module")
def source(matrix, memory):
    return memory([data for _, data, _ in matrix])


def wrong(matrix, seen: dict[int, np.ndarray]) -> dict[str, str]:
    """What is not as in the matrix, by name; seen: pixels by row, without those that were refused."""
    found = {}
    for row, (name, _, wanted) in enumerate(matrix):
        got = seen.get(row)
        if (got is None) != (wanted is None):
            found[name] = "refused" if got is None else "read"
        elif got is not None and not np.array_equal(got, wanted):
            found[name] = f"{got.shape}, {np.abs(got.astype(int) - wanted.astype(int)).max()} apart"
    return found


def test_pixels(matrix):
    seen = {}
    for row, (_, data, _) in enumerate(matrix):
        try:
            seen[row] = pixels(array(data))
        except BadImage:
            continue
    assert wrong(matrix, seen) == {}


@pytest.mark.parametrize("batch", [200, 7])
def test_evaluation(matrix, source, batch):
    """All kinds in one batch, and in batches of other neighbours."""
    loader = EvalLoader(source, SIZE, 1.0, batch_size=batch, threads=1, max_bad_fraction=1, on_bad=lambda *_: None)
    seen = {}
    for samples in loader.batches():
        seen |= zip(samples.index.tolist(), samples.images[0].numpy(), strict=True)
    assert wrong(matrix, seen) == {}


def test_training(matrix, source):
    """The box is the whole picture, so that nothing is resized."""
    augment = plan.Augment(size=SIZE, crop_scale=(1, 1), crop_ratio=(1, 1), flip=0.0)
    count = len(matrix) // 8 * 8
    loader = TrainLoader(
        source, [augment], plan.Mixing(group_size=8), seed=0, batch_size=count, threads=1, max_bad_fraction=1,
        on_bad=lambda *_: None,
    )  # fmt: skip
    seen = {}
    for (samples,) in loader.batches(0, 2):
        seen |= zip(samples.index.tolist(), samples.images[0].numpy(), strict=True)
    assert len(seen) + len(loader.bad.reasons) == len(matrix)
    assert wrong(matrix, seen) == {}
