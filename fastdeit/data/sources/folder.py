"""Images in folders: `FolderSource` for one folder a class, `FileSource` for images that a list names."""

import os
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastdeit.data.sources.index import Listed, Strings, digest, read_range
from fastdeit.data.sources.kinds import Kind
from fastdeit.data.sources.source import EXTENSIONS, DataError, listed

DEVKIT = "ILSVRC2012_devkit_t12"
"""Folder of ImageNet's development kit: beside it, held-out images may lie in one folder without classes."""
_LAYOUT = "ROOT/{train}/CLASS/*.jpg and ROOT/{val}/CLASS/*.jpg"
_EXPECTED = _LAYOUT.format(train="train", val="val")
_SORT = (
    ". The images that lie in it directly have to be moved into one folder for each class; for the held-out images of "
    "ImageNet, unpack ILSVRC2012_devkit_t12 into ROOT instead and choose the data source imagenet"
)


class FileSource(Listed):
    """Images in files of their own: `names` are their paths relative to `root`."""

    def __init__(
        self,
        root: str | Path,
        classes: Sequence[str],
        names: Strings,
        labels: NDArray[np.int64],
        fingerprint: str | None = None,
    ) -> None:
        super().__init__(classes, names, labels, fingerprint or digest(names.blob, labels, classes))
        self._root = str(root)

    def read(self, index: int) -> NDArray[np.uint8]:
        """The bytes of file `index`: uint8 `[n]`. OSError if it cannot be read."""
        return read_range(self.path(index))

    def path(self, index: int) -> str:
        """Path of file `index`."""
        return os.path.join(self._root, self.name(index))


class FolderSource(FileSource):
    """Images under `root/CLASS/`, by torchvision's ImageFolder rule: classes are the sorted names of the subfolders,
    images every file with a known extension at any depth, sorted by folder and name.

    The fingerprint covers the relative paths, and thereby the labels, not the contents: to read 1.3 million files at
    every start would take minutes. Listing them takes 1 us each, because a listing says which entries are folders; so
    the list is made anew at every start and never out of date.
    """

    def __init__(self, root: str | Path) -> None:
        root = Path(root)
        classes = _class_names(root)
        found = [Strings.of(_image_files(root, name)) for name in classes]
        counts = np.array([len(files) for files in found])
        extensions = ", ".join(EXTENSIONS)
        if not counts.any():
            raise DataError(
                f"{root}: {len(classes)} class folders, but no image in any of them (known extensions: "
                f"{extensions}); check that the data set was unpacked completely"
            )
        empty = [name for name, count in zip(classes, counts, strict=True) if not count]
        if empty:
            raise DataError(
                f"{root}: no image in class folder{'s' if len(empty) > 1 else ''} {listed(empty)} (known "
                f"extensions: {extensions}); add images or delete the folder"
            )
        names = Strings(b"\0".join(files.blob for files in found))
        fingerprint = blake2b(names.blob, digest_size=16).hexdigest()
        super().__init__(root, classes, names, np.repeat(np.arange(len(classes)), counts), fingerprint)


def _require_directory(path: Path) -> None:
    if not path.exists():
        raise DataError(f"{path}: no such directory; the expected layout is {_EXPECTED}")
    if not path.is_dir():
        raise DataError(f"{path}: not a directory; give the folder that holds the images ({_EXPECTED})")


def _class_names(root: Path) -> list[str]:
    _require_directory(root)
    names = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    if not names:
        flat = any(entry.name.lower().endswith(EXTENSIONS) for entry in os.scandir(root))
        raise DataError(f"{root}: no class folders; the expected layout is {_EXPECTED}{_SORT if flat else ''}")
    if len(names) == 1:
        raise DataError(f"{root}: only one class folder, {names[0]!r}; classification needs two or more ({_EXPECTED})")
    return names


def _image_files(root: Path, name: str) -> list[str]:
    top = os.path.join(root, name)
    folders = []
    for folder, subfolders, files in os.walk(top, onerror=_not_listed, followlinks=True):
        for subfolder in subfolders:
            _require_no_loop(Path(folder, subfolder))
        folders.append((folder, files))
    found = []
    for folder, files in sorted(folders):
        prefix = name + folder[len(top) :]
        found += [f"{prefix}/{file}" for file in sorted(files) if file.lower().endswith(EXTENSIONS)]
    return found


def _not_listed(error: OSError) -> None:
    raise DataError(f"{error.filename}: the folder cannot be listed: {error.strerror}") from error


def _require_no_loop(path: Path) -> None:
    if path.is_symlink() and path.parent.resolve().is_relative_to(path.resolve()):
        raise DataError(f"{path}: a link to a folder that it lies in itself; remove the link")


def _open(root: Path, split: str) -> FolderSource:
    if not (root / split).is_dir():
        raise DataError(f"{root}: no subfolder {split!r}; the expected layout is {_EXPECTED}")
    return FolderSource(root / split)


def has_class_folders(root: Path, train: str, val: str) -> bool:
    """The sign of images in class folders; none where the held-out images lie in one folder, as ImageNet's do."""
    return any(entry.is_dir() for entry in (root / train).glob("*")) and not is_flat_imagenet(root, val)


def is_flat_imagenet(root: Path, val: str) -> bool:
    """Whether ImageNet's held-out images lie in one folder, as distributed, with the kit that says their classes."""
    return (root / DEVKIT).is_dir() and any(True for _ in (root / val).glob("*.JPEG"))


FOLDER = Kind("folder", _open, _LAYOUT, has_class_folders)
