"""ImageNet's archives as downloaded: a tar file with a tar file of each class, one of the held-out images, and the
development kit. Nothing is unpacked: an image is a range of bytes in its archive.

Samples have the names, labels and order that the unpacked folders give them, so that a run may go on with these.
"""

import json
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastdeit.data.sources import imagenet_kit, tar
from fastdeit.data.sources.folder import ARCHIVES, KIT_ARCHIVE, fingerprint_of_folders
from fastdeit.data.sources.index import Listed, Strings, digest, read_image_in, text_array
from fastdeit.data.sources.names import LeftOut, group, is_image, tell
from fastdeit.data.sources.scan import scanned
from fastdeit.data.sources.shards import Index, Skipped, cached
from fastdeit.data.sources.source import DataError, listed

_MD5 = {"train": "1d675b47d978889d74fa0da5fadfb00e", "val": "29b22e2961454d5413ddabcf34fc5622"}
"""Of the official archives."""
_CLASS = ".tar"
_CACHE_FORMAT = "1"


class ArchiveSource(Listed):
    """Images in the tar file `path`: offset and size int64 `[n]`, in bytes. left_out: members that are no images."""

    def __init__(
        self,
        path: Path,
        classes: Sequence[str],
        names: Strings,
        labels: NDArray[np.int64],
        fingerprint: str,
        place: tuple[NDArray[np.int64], NDArray[np.int64]],
        left_out: LeftOut,
    ) -> None:
        super().__init__(classes, names, labels, fingerprint, root=path)
        self._offset, self._size = place
        self.left_out = left_out
        tell(path, left_out)

    def read(self, index: int) -> NDArray[np.uint8]:
        """The encoded image `index`: uint8 `[n]`. BadImage if the archive was cut meanwhile."""
        return read_image_in(self._root, int(self._offset[index]), int(self._size[index]), "tar")

    def path(self, index: int) -> str:
        """ARCHIVE:NAME of sample `index`."""
        return f"{self._root}:{self.name(index)}"


def archive(root: Path, split: str) -> Path | None:
    """The archive of a split, which is called "train" or "val" or as the archive itself; None if there is none."""
    path = root / ARCHIVES.get(split, split)
    return path if path.name in ARCHIVES.values() and path.is_file() else None


def training(path: Path) -> ArchiveSource:
    """The training images. DataError for an archive that is cut short or damaged, and where its classes are not those
    of the development kit beside it, if there is one."""
    index = _list_of(path, _by_class)
    names, classes = Strings(index["names"].tobytes()), list(Strings(index["classes"].tobytes()))
    kit = imagenet_kit.truth(path.parent)
    if kit is not None and kit[0] != classes:
        missing, extra = sorted(set(kit[0]) - set(classes)), sorted(set(classes) - set(kit[0]))
        wrong = [f"misses {_tars(missing)}"] if missing else []
        wrong += [f"has {_tars(extra)}, which the kit does not know"] if extra else []
        raise DataError(f"{path}: compared with the development kit, it {' and '.join(wrong)}; {_anew(path)}")
    place = index["offset"], index["size"]
    fingerprint = fingerprint_of_folders(names)
    return ArchiveSource(path, classes, names, index["label"], fingerprint, place, _left_out(index))


def held_out(path: Path) -> ArchiveSource:
    """The held-out images, in the order of their numbers. DataError for an archive that is cut short or damaged,
    without the development kit, and where an image is missing or has no number of the kit's."""
    kit = imagenet_kit.truth(path.parent)
    if kit is None:
        raise DataError(
            f"{path}: the development kit says which class each image has; put {KIT_ARCHIVE} beside it, as downloaded"
        )
    classes, labels = kit
    index = _list_of(path, _flat)
    images = list(Strings(index["names"].tobytes()))
    order = imagenet_kit.by_number(path, images, len(labels), imagenet_kit.TRUTH, _anew(path))
    names, numbers = Strings.of(f"val/{images[at]}" for at in order), np.array(labels, np.int64)
    # The fingerprint of the same images in a folder (`FileSource`).
    fingerprint = digest(names.blob, numbers, classes)
    place = index["offset"][order], index["size"][order]
    return ArchiveSource(path, classes, names, numbers, fingerprint, place, _left_out(index))


def _list_of(path: Path, build: Callable[[Path], Index]) -> Index:
    return cached(path.parent, [path.name], "tar", digest([_CACHE_FORMAT, path.name]), partial(build, path))


def _tars(classes: Sequence[str]) -> str:
    return listed([name + _CLASS for name in classes])


def _anew(path: Path) -> str:
    split = next(split for split, name in ARCHIVES.items() if name == path.name)
    return f"download it anew (`md5sum {path}` of the official one is {_MD5[split]})"


def _left_out(index: Index) -> LeftOut:
    return LeftOut(json.loads(index["left_out"].tobytes()))


def _flat(path: Path) -> Index:
    left_out = LeftOut()
    return _index(_images(path, str(path), left_out=left_out), left_out)


def _by_class(path: Path) -> Index:
    """The images of all classes, by class and name."""
    left_out = LeftOut()
    classes = {}
    for one in sorted(_members(path, str(path))):
        if one.name.endswith(_CLASS) and one.name != _CLASS:
            classes[one.name.removesuffix(_CLASS)] = one
        else:
            left_out[group(one.name)] += 1
    if len(classes) < 2:
        raise DataError(
            f"{path}: {len(classes)} class{'es' * (len(classes) != 1)} in it; the training images of ImageNet are a "
            f"tar file of WNID.tar; {_anew(path)}"
        )
    ranges = {f"{path}:{one.name}": (one.offset, one.offset + one.size) for one in classes.values()}
    found = scanned(list(ranges), partial(_of_class, path, ranges), size=path.stat().st_size)
    images: list[tar.Member] = []
    labels: list[int] = []
    for number, (name, (inside, others)) in enumerate(zip(classes, found, strict=True)):
        left_out.update(others)
        images += [one._replace(name=f"{name}/{one.name}") for one in inside]
        labels += [number] * len(inside)
    return _index(images, left_out) | {
        "label": np.array(labels, np.int64),
        "classes": text_array(Strings.of(classes).blob),
    }


def _of_class(path: Path, ranges: dict[str, tuple[int, int]], what: str) -> tuple[list[tar.Member], LeftOut]:
    left_out = LeftOut()
    return _images(path, what, *ranges[what], left_out=left_out), left_out


def _images(path: Path, what: str, *place: int, left_out: LeftOut) -> list[tar.Member]:
    """The images of a tar file, sorted by name."""
    found = sorted(_members(path, what, *place))
    images = [one for one in found if is_image(one.name)]
    left_out.update(group(one.name) for one in found if not is_image(one.name))
    if not images:
        raise DataError(f"{what}: no image in it; {_anew(path)}")
    twice = next((one.name for one, after in pairwise(images) if one.name == after.name), None)
    if twice is not None:
        raise DataError(f"{what}: {twice} is in it twice; {_anew(path)}")
    return images


def _members(path: Path, what: str, *place: int) -> list[tar.Member]:
    """All files of the tar file `what`. Here nothing is left out: what is wrong with an archive may be a class."""
    skipped: Skipped = []
    found = [one._replace(name=one.name.removeprefix("./")) for one in tar.members(str(path), skipped, *place)]
    if skipped:
        where, reason = skipped[0]
        inside = where.removeprefix(str(path)).lstrip(":")
        raise DataError(f"{what}: {f'{inside}: ' if inside else ''}{reason}; {_anew(path)}")
    return found


def _index(images: Sequence[tar.Member], left_out: LeftOut) -> Index:
    return {
        "names": text_array(Strings.of(one.name for one in images).blob),
        "offset": np.array([one.offset for one in images], np.int64),
        "size": np.array([one.size for one in images], np.int64),
        "left_out": text_array(json.dumps(left_out).encode()),
    }
