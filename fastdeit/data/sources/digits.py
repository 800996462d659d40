"""scikit-learn's 1,797 handwritten digits as an image folder: a real data set that needs no download and trains in
minutes.

The 8x8 grey pictures become 32x32 JPEGs, once, in a cache directory: `train/` 80 %, `val/` 20 % of every class. Small,
but it goes through the same reading, decoding and augmentation as ImageNet.
"""

import shutil
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from fastdeit import rng
from fastdeit.cache_folder import cache_folder
from fastdeit.data.sources.source import DataError

VERSION = 1
_SIZE = 32
_QUALITY = 95
_VAL_SHARE = 0.2


def prepare(cache: str | Path | None = None) -> Path:
    """Root of the digits, written first if need be; `cache` defaults to $FASTDEIT_CACHE, else ~/.cache/fastdeit.

    The folder appears complete or not at all: it is written beside its place and renamed. Of several processes that
    start at once, one wins and the others use its folder. DataError where `cache` cannot be written.
    """
    cache = cache_folder() if cache is None else Path(cache).expanduser()
    root = cache / f"digits-{VERSION}"
    if root.is_dir():
        return root
    try:
        cache.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=cache))
        try:
            _write(scratch)
            scratch.chmod(0o755)
            _publish(scratch, root)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{cache}: the digits cannot be written there: {reason}; set FASTDEIT_CACHE=FOLDER") from error
    return root


def _publish(scratch: Path, root: Path) -> None:
    try:
        scratch.rename(root)
    except OSError:
        # Another process was first: renaming onto its folder fails, for it is not empty.
        if not root.is_dir():
            raise


def _write(root: Path) -> None:
    from sklearn.datasets import load_digits

    data = load_digits()
    grey = np.rint(data.images * (255 / 16)).astype(np.uint8)
    for label in range(10):
        of_class = np.flatnonzero(data.target == label)
        shuffled = of_class[rng.permutation(rng.key(0, "digits", label), len(of_class))]
        held_out = round(len(of_class) * _VAL_SHARE)
        for part, indices in (("val", shuffled[:held_out]), ("train", shuffled[held_out:])):
            folder = root / part / str(label)
            folder.mkdir(parents=True)
            for index in indices:
                image = Image.fromarray(grey[index]).resize((_SIZE, _SIZE), Image.Resampling.BICUBIC)
                image.save(folder / f"{index:04d}.jpg", quality=_QUALITY)
