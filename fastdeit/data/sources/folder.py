"""Images in folders: `FolderSource` for one folder a class, `FileSource` for images that a list names."""

import os
import re
from collections.abc import Sequence
from hashlib import blake2b
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastdeit.data.sources import unread
from fastdeit.data.sources.index import Listed, Strings, digest, read_image
from fastdeit.data.sources.kinds import Kind
from fastdeit.data.sources.names import LeftOut, group, has_header, has_no_extension, is_image, is_litter, tell
from fastdeit.data.sources.notices import say
from fastdeit.data.sources.source import EXTENSIONS, DataError, listed

_LOOKED_AT = 1000  # entries of a folder
_ENDS = 32  # files at either end of a folder's list that are opened, where there are many without an extension
DEVKIT = "ILSVRC2012_devkit_t12"
"""Folder of ImageNet's development kit: beside it, held-out images may lie in one folder without classes."""
KIT_ARCHIVE = f"{DEVKIT}.tar.gz"
ARCHIVES = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}
"""ImageNet's archives as downloaded, by split."""
_TINY_IMAGENET = "val/val_annotations.txt"
_LAYOUT = "ROOT/{train}/CLASS/*.jpg and ROOT/{val}/CLASS/*.jpg"
_EXPECTED = _LAYOUT.format(train="train", val="val")
_PART = re.compile(
    r"(train(ing)?|val(id(ation)?)?|test(ing)?|dev|unlabell?ed)[-_]?(set|images|\d+)?"
    r"|data|metadata|images?|imgs?|pictures|JPEGImages|labels?|masks?|annotations?|segmentation(s|class|object)?|trimaps",
    re.IGNORECASE,
)
"""Folders of splits, and of pictures beside what is known of them. A single class may be called so, as "train"."""
_SORTED = "move the images into one folder for each class, or write a list of them with data.source=list"
_SORT = (
    ". The images that lie in it directly have to be moved into one folder for each class, or named with their classes "
    "in a list (data.source=list); for the held-out images of "
    "ImageNet, put ILSVRC2012_devkit_t12.tar.gz into ROOT instead and choose the data source imagenet; of Kaggle's "
    "archive, ROOT is the folder that holds LOC_val_solution.csv"
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
        super().__init__(classes, names, labels, fingerprint or digest(names.blob, labels, classes), root=root)

    def read(self, index: int) -> NDArray[np.uint8]:
        """The bytes of file `index`: uint8 `[n]`. OSError if it cannot be read."""
        return read_image(self.path(index))


class FolderSource(FileSource):
    """Images under `root/CLASS/`, by torchvision's ImageFolder rule: classes are the sorted names of the subfolders,
    images every file with a known extension at any depth, sorted by folder and name; and those without an extension
    whose header is that of an image.

    The fingerprint covers the relative paths, and thereby the labels, not the contents: to read 1.3 million files at
    every start would take minutes. Listing them takes 1 us each, because a listing says which entries are folders; so
    the list is made anew at every start and never out of date.

    Hidden files and folders and what programs leave behind (`names.is_litter`) are neither classes nor images.
    `left_out` counts them and the files that are no images; a warning says so. Raises DataError where a folder is met
    twice, by links: its images would count twice.
    """

    def __init__(self, root: str | Path) -> None:
        root = Path(root)
        self.left_out = LeftOut()
        classes = _class_names(root, self.left_out)
        walk = _Walk(self.left_out)
        found = [Strings.of(walk.images(root, name)) for name in classes]
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
        labels = np.repeat(np.arange(len(classes)), counts)
        super().__init__(root, classes, names, labels, fingerprint_of_folders(names))
        if walk.by_header:
            say(f"{root}: {walk.by_header:,} files without an extension are read, because their headers are of images")
        tell(root, self.left_out)


def fingerprint_of_folders(names: Strings) -> str:
    """Fingerprint of images with these paths CLASS/FILE, of which the classes are a part."""
    return blake2b(names.blob, digest_size=16).hexdigest()


def _require_directory(path: Path) -> None:
    if not path.exists():
        raise DataError(f"{path}: no such directory; the expected layout is {_EXPECTED}")
    if not path.is_dir():
        raise DataError(f"{path}: not a directory; give the folder that holds the images ({_EXPECTED})")


def _class_names(root: Path, left_out: LeftOut) -> list[str]:
    _require_directory(root)
    folders, files = [], []
    for entry in os.scandir(root):
        (folders if entry.is_dir() else files).append(entry.name)
    names = sorted(name for name in folders if not is_litter(name))
    left_out.update(f"{name}/" for name in folders if is_litter(name))
    left_out.update(map(group, files))
    if not names:
        flat = any(map(is_image, files))
        raise DataError(f"{root}: no class folders; the expected layout is {_EXPECTED}{_SORT if flat else ''}")
    if all(map(_PART.fullmatch, names)):
        raise DataError(
            f"{root}: its folders {listed(names)} are named as splits, or as pictures and what is known of them, and "
            f"not as classes; {_SORTED}"
        )
    if len(names) == 1:
        raise DataError(f"{root}: only one class folder, {names[0]!r}; classification needs two or more ({_EXPECTED})")
    return names


class _Walk:
    """Folders gone through, each of them once: `left_out` counts what in them is no image, `by_header` the images
    without an extension."""

    def __init__(self, left_out: LeftOut) -> None:
        self.by_header = 0
        self._left_out = left_out
        self._met: dict[tuple[int, int], str] = {}

    def images(self, root: Path, name: str) -> list[str]:
        """Paths relative to `root` of the images at any depth under its folder `name`, sorted by folder and name."""
        top = os.path.join(root, name)
        self._meet(top)
        folders = []
        for folder, subfolders, files in os.walk(top, onerror=_not_listed, followlinks=True):
            self._left_out.update(f"{one}/" for one in subfolders if is_litter(one))
            subfolders[:] = [one for one in subfolders if not is_litter(one)]
            for subfolder in subfolders:
                self._meet(os.path.join(folder, subfolder))
            folders.append((folder, files))
        found = []
        for folder, files in sorted(folders):
            prefix = name + folder[len(top) :]
            images = list(filter(is_image, files))
            if len(images) < len(files):
                images += self._by_header(folder, [file for file in files if not is_image(file)])
            found += [f"{prefix}/{file}" for file in sorted(images)]
        return found

    def _by_header(self, folder: str, files: list[str]) -> list[str]:
        """Those of files without a name of an image that are images all the same; the others are left out.

        Every header that is looked at is a file opened, of which a disk allows some hundred a second. So of many files
        without an extension the first and the last ones speak for all, if they agree.
        """
        bare = sorted(filter(has_no_extension, files))
        ends = bare[:_ENDS] + bare[-_ENDS:] if len(bare) > 2 * _ENDS else bare
        images = [file for file in ends if has_header(os.path.join(folder, file))]
        if len(ends) < len(bare):
            agree = len(images) in (0, len(ends))
            rest = bare[_ENDS:-_ENDS]
            images += rest if agree and images else []
            images += [] if agree else [file for file in rest if has_header(os.path.join(folder, file))]
        self._left_out.update(group(file) for file in set(files).difference(images))
        self.by_header += len(images)
        return images

    def _meet(self, folder: str) -> None:
        """DataError if the folder was met before, under whatever name: links would multiply its images."""
        try:
            state = os.stat(folder)
        except OSError as error:
            raise DataError(f"{folder}: the folder cannot be listed: {error.strerror}") from error
        before = self._met.setdefault((state.st_dev, state.st_ino), folder)
        if before != folder:
            raise DataError(
                f"{folder}: the same folder as {before}, by a link, so that its images would count twice; remove the "
                "link"
            )


def _not_listed(error: OSError) -> None:
    raise DataError(f"{error.filename}: the folder cannot be listed: {error.strerror}") from error


def _open(root: Path, split: str) -> FolderSource:
    if not (root / split).is_dir():
        raise DataError(f"{root}: no subfolder {split!r}; the expected layout is {_EXPECTED}")
    return FolderSource(root / split)


def has_class_folders(root: Path, train: str, val: str) -> bool:
    """The sign of images in class folders; none where the held-out images lie in one folder, as ImageNet's and Tiny
    ImageNet's do. The root itself is a split only if folders in it hold images, and are not called as splits are."""
    folders = (entry for entry in (root / train).glob("*") if entry.is_dir() and not is_litter(entry.name))
    if train == ".":
        there = list(folders)
        folders = (one for one in there if len(there) > 1 and not _PART.fullmatch(one.name) and _holds_images(one))
    if not any(True for _ in folders) or is_flat_imagenet(root, val) or (root / _TINY_IMAGENET).is_file():
        return False
    return train != "." or unread.of_folder(root) is None


def _holds_images(folder: Path) -> bool:
    with os.scandir(folder) as entries:
        names = [entry.name for entry in islice(entries, _LOOKED_AT)]
    bare = sorted(filter(has_no_extension, names))
    return any(map(is_image, names)) or any(has_header(os.path.join(folder, name)) for name in bare[:_ENDS])


def is_flat_imagenet(root: Path, val: str) -> bool:
    """Whether ImageNet's held-out images are as distributed: in one folder, with the kit that says their classes, or
    still in their archive."""
    if not (root / val).is_dir():
        return val in ARCHIVES and (root / ARCHIVES[val]).is_file()
    kit = (root / DEVKIT).is_dir() or (root / KIT_ARCHIVE).is_file()
    return kit and any(True for _ in (root / val).glob("*.JPEG"))


FOLDER = Kind("folder", _open, _LAYOUT, has_class_folders)
