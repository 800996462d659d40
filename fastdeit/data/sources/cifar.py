"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009) as their author distributes them, in the binary or the Python form.

Binary: records of 1 (CIFAR-10) or 2 label bytes (CIFAR-100: coarse, fine) and 3,072 bytes, a 32x32 red, green and blue
plane. Python: pickled dictionaries of the same rows. A pickle may run any program; these are read by an unpickler that
knows nothing but numpy arrays and the built-in containers.
"""

import io
import pickle
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastdeit.data.sources.index import Listed, Strings, digest
from fastdeit.data.sources.kinds import Kind
from fastdeit.data.sources.source import DataError, contents

_SHAPE = 3, 32, 32
_PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Layout:
    """Names of files, and of what is in them. label_bytes: of a binary record; the last one is the class."""

    classes: int
    train: tuple[str, ...]
    val: tuple[str, ...]
    binary: str
    names_file: str
    label_bytes: int
    python: str
    meta: str
    names_key: bytes
    labels_key: bytes


_TEN = Layout(
    classes=10,
    train=tuple(f"data_batch_{number}" for number in range(1, 6)),
    val=("test_batch",),
    binary="cifar-10-batches-bin",
    names_file="batches.meta.txt",
    label_bytes=1,
    python="cifar-10-batches-py",
    meta="batches.meta",
    names_key=b"label_names",
    labels_key=b"labels",
)
_HUNDRED = Layout(
    classes=100,
    train=("train",),
    val=("test",),
    binary="cifar-100-binary",
    names_file="fine_label_names.txt",
    label_bytes=2,
    python="cifar-100-python",
    meta="meta",
    names_key=b"fine_label_names",
    labels_key=b"fine_labels",
)


class CifarSource(Listed):
    """One split ("train" or "val") of the data set that `layout` describes, in `root` or in its official folder there.
    A sample is called FILE:ROW. `read` encodes an image as PNG, without loss. DataError if files are missing or
    damaged."""

    def __init__(self, layout: Layout, root: Path, split: str) -> None:
        folder, batch, classes = _form(root, layout)
        files = layout.train if split == "train" else layout.val
        labels, pixels = zip(*(batch(folder, file, layout) for file in files), strict=True)
        label = np.concatenate(labels).astype(np.int64)
        if len(classes) != layout.classes or label.max() >= layout.classes:
            raise DataError(f"{folder}: not {layout.classes} classes; the files are damaged or of another data set")
        self._images = np.concatenate(pixels).reshape(-1, *_SHAPE).transpose(0, 2, 3, 1)
        counts = zip(files, map(len, labels), strict=True)
        names = Strings.of(f"{file}:{row}" for file, count in counts for row in range(count))
        super().__init__(classes, names, label, digest(names.blob, label, classes, self._images), root=folder)

    def read(self, index: int) -> NDArray[np.uint8]:
        """Image `index` as a PNG file: uint8 `[n]`."""
        out = io.BytesIO()
        Image.fromarray(np.ascontiguousarray(self._images[index])).save(out, "PNG", compress_level=1)
        return np.frombuffer(out.getvalue(), np.uint8)


def _form(root: Path, layout: Layout) -> tuple[Path, Any, list[str]]:
    """(folder, reader of its batches, class names) of the form that is there."""
    for folder in (root / layout.binary, root):
        if (folder / layout.names_file).is_file():
            return folder, _binary, contents(folder / layout.names_file).decode("ascii", "replace").split()
    for folder in (root / layout.python, root):
        if (folder / layout.meta).is_file():
            names = _unpickled(folder / layout.meta, layout.names_key)
            if not isinstance(names, list) or not all(isinstance(name, bytes) for name in names):
                raise DataError(f"{folder / layout.meta}: no list of class names; the file is damaged")
            return folder, _python, [name.decode("ascii", "replace") for name in names]
    raise DataError(
        f"{root}: neither {layout.binary}/{layout.names_file} nor {layout.python}/{layout.meta}; unpack the official "
        "archive here"
    )


def _binary(folder: Path, file: str, layout: Layout) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    path = folder / f"{file}.bin"
    data, record = np.frombuffer(contents(path), np.uint8), layout.label_bytes + _PIXELS
    if not len(data) or len(data) % record:
        raise DataError(f"{path}: {len(data)} bytes are no whole number of {record}-byte records; the file is damaged")
    rows = data.reshape(-1, record)
    return rows[:, layout.label_bytes - 1], rows[:, layout.label_bytes :]


def _python(folder: Path, file: str, layout: Layout) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    path = folder / file
    labels, data = _unpickled(path, layout.labels_key), _unpickled(path, b"data")
    rows = labels if isinstance(labels, list) and all(type(label) is int and label >= 0 for label in labels) else []
    sound = isinstance(data, np.ndarray) and data.dtype == np.uint8 and data.shape == (len(rows), _PIXELS)
    if not rows or not sound:
        raise DataError(f"{path}: no rows of {_PIXELS} pixels with a class number each; the file is damaged")
    return np.array(labels), data


class _Arrays(pickle.Unpickler):
    """Knows no global but those that rebuild a numpy array, and imports nothing."""

    _RECONSTRUCT = np.zeros(0).__reduce__()[0]
    _GLOBALS: ClassVar = {
        ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
        ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._GLOBALS:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no official file does")
        return self._GLOBALS[module, name]


def _unpickled(path: Path, key: bytes) -> Any:
    try:
        return _Arrays(io.BytesIO(contents(path)), encoding="bytes").load()[key]
    except DataError:
        raise
    except Exception as error:
        # A damaged pickle ends in whatever its last instruction runs into.
        raise DataError(f"{path}: not an official CIFAR file, or a damaged one: {error!r}") from error


def _kind(name: str, layout: Layout) -> Kind:
    folders = layout.binary, layout.python
    return Kind(
        name,
        partial(CifarSource, layout),
        f"ROOT/{layout.binary} or ROOT/{layout.python}",
        lambda root, train, val: root.name in folders or any((root / folder).is_dir() for folder in folders),
        named_splits=False,
    )


CIFAR10, CIFAR100 = _kind("cifar10", _TEN), _kind("cifar100", _HUNDRED)
