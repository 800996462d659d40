"""Every kind of data set by name: `open_source` for one split of it, `open_pair` for training and held-out samples.

The layouts of public data sets are those in which their authors distribute them, once unpacked; nothing has to be
moved or converted. Splits are those that published transfer results use: Flowers-102 trains on its training and
validation images together (2,040) and is tested on the other 6,149.
"""

import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdeit.data import tar, tfrecord
from fastdeit.data.cifar import CIFAR10, CIFAR100, CifarSource
from fastdeit.data.index import Strings
from fastdeit.data.packed import SUFFIX, PackedSource
from fastdeit.data.source import (
    EXTENSIONS,
    DataError,
    FileSource,
    FolderSource,
    NamedSource,
    contents,
    require_same_classes,
    train_val,
)

Samples = tuple[list[str], list[tuple[str, int]]]
"""Class names, and (path relative to the root, class number) of every sample."""
_DEVKIT = "ILSVRC2012_devkit_t12/data"


def open_source(kind: str, root: str | Path, split: str) -> NamedSource:
    """One split of a data set of a kind in `KINDS`.

    split: for the kinds in _NAMED_SPLITS the name of its folder or file under `root` (packed: SPLIT.pack; see
    `tar.shards` and `files` of the modules tfrecord, parquet and arrow), for the others "train" or "val". Raises
    DataError with the path and what to do.
    """
    if kind not in KINDS:
        raise DataError(f"there is no data source {kind!r}; there are {', '.join(KINDS)}")
    if kind not in _NAMED_SPLITS and split not in ("train", "val"):
        raise DataError(f"data source {kind} has the splits train and val, not {split!r}")
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"{root}: {'not a directory' if root.exists() else 'no such directory'}")
    return KINDS[kind](root, split)


def open_pair(kind: str, root: str | Path, train: str = "train", val: str = "val") -> tuple[NamedSource, NamedSource]:
    """(training, held-out) samples of a data set, each as `open_source`; DataError also where their classes differ."""
    if kind == "folder":
        return train_val(root, train, val)
    training = open_source(kind, root, train)
    held_out = _like(training, Path(root), val) if kind == "tfrecord" else open_source(kind, root, val)
    if kind in _NUMBERED and held_out.classes == training.classes[: len(held_out.classes)]:
        # Where classes are mere numbers, the last ones may have no held-out sample.
        held_out.classes = training.classes
    require_same_classes(root, (train, training), (val, held_out))
    return training, held_out


def _packed(root: Path, split: str) -> NamedSource:
    return PackedSource(root / (split if split.endswith(SUFFIX) else split + SUFFIX))


def _tar(root: Path, split: str) -> NamedSource:
    return tar.TarSource(root, tar.shards(root, split))


def _tfrecord(root: Path, split: str) -> NamedSource:
    return tfrecord.TFRecordSource(root, tfrecord.files(root, split))


def _like(training: tfrecord.TFRecordSource, root: Path, val: str) -> NamedSource:
    """Held-out records, with classes counted as in the training split: few of them may not have the first class."""
    if training.first is None:
        raise DataError(
            f"{root}: the smallest class number is neither 0 nor 1, so that the classes may count from either; "
            f"{tfrecord.DECIDES}"
        )
    return tfrecord.TFRecordSource(root, tfrecord.files(root, val), training.first)


def _parquet(root: Path, split: str) -> NamedSource:
    try:
        from fastdeit.data import parquet
    except ImportError as error:
        raise DataError(f"Parquet files need pyarrow: pip install fastdeit[parquet] ({error})") from error
    return parquet.ParquetSource(root, parquet.files(root, split))


def _arrow(root: Path, split: str) -> NamedSource:
    try:
        from fastdeit.data import arrow
    except ImportError as error:
        raise DataError(f"Arrow files need pyarrow: pip install fastdeit[parquet] ({error})") from error
    return arrow.ArrowSource(root, arrow.files(root, split))


def _imagenet(root: Path, split: str) -> NamedSource:
    """Class folders; or, for the held-out images, all in one folder as distributed, with the official devkit in `root`
    to say which class each has. Classes are the sorted WordNet ids in either case, as everywhere."""
    folder = root / split
    images = sorted(path.name for path in folder.glob("*") if path.name.lower().endswith(EXTENSIONS))
    if not images or not (root / _DEVKIT).is_dir():
        return FolderSource(folder)
    return _listed(root, lambda: _flat_imagenet(root, split, images))


def _flat_imagenet(root: Path, split: str, images: list[str]) -> Samples:
    synsets = [one for one in _mat(root / _DEVKIT / "meta.mat", "synsets") if one["num_children"] == 0]
    classes = sorted(str(one["WNID"]) for one in synsets)
    label = {int(one["ILSVRC2012_ID"]): classes.index(str(one["WNID"])) for one in synsets}
    path = root / _DEVKIT / "ILSVRC2012_validation_ground_truth.txt"
    truth = [label[int(line)] for line in contents(path).split()]
    if len(truth) != len(images):
        raise DataError(f"{root / split}: {len(images)} images, but {path} has {len(truth)} labels; unpack all of them")
    return classes, [(f"{split}/{image}", number) for image, number in zip(images, truth, strict=True)]


def _flowers102(root: Path, split: str) -> Samples:
    """jpg/image_00001.jpg ..., imagelabels.mat (1 to 102), setid.mat (image numbers of trnid, valid, tstid)."""
    labels = _mat(root / "imagelabels.mat", "labels")
    parts = [_mat(root / "setid.mat", part) for part in (("trnid", "valid") if split == "train" else ("tstid",))]
    numbers = np.sort(np.concatenate(parts))
    classes = [str(number) for number in range(1, 103)]
    return classes, [(f"jpg/image_{number:05d}.jpg", int(labels[number - 1]) - 1) for number in numbers]


def _stanford_cars(root: Path, split: str) -> Samples:
    """cars_train/, cars_test/ and devkit/; the labels of the test images, which are distributed apart, lie in `root` or
    in devkit/."""
    folder = "cars_train" if split == "train" else "cars_test"
    file = f"{folder}_annos.mat" if split == "train" else f"{folder}_annos_withlabels.mat"
    path = root / file if (root / file).exists() else root / "devkit" / file
    classes = [str(name) for name in _mat(root / "devkit" / "cars_meta.mat", "class_names")]
    return classes, [(f"{folder}/{one['fname']}", int(one["class"]) - 1) for one in _mat(path, "annotations")]


def _inaturalist(year: int, root: Path, split: str) -> Samples:
    """train2018.json and val2018.json, in the layout of COCO, and the images in train_val2018/; 2019 likewise."""
    listed = json.loads(contents(root / f"{split}{year}.json"))
    categories = sorted(listed["categories"], key=lambda category: category["id"])
    label = {category["id"]: number for number, category in enumerate(categories)}
    of_image = {one["image_id"]: label[one["category_id"]] for one in listed["annotations"]}
    classes = [str(category["name"]) for category in categories]
    return classes, [(image["file_name"], of_image[image["id"]]) for image in listed["images"]]


def _official(reader: Callable[[Path, str], Samples]) -> Callable[[Path, str], NamedSource]:
    return lambda root, split: _listed(root, lambda: reader(root, split))


def _listed(root: Path, reader: Callable[[], Samples]) -> FileSource:
    """A source of what `reader` finds in annotation files; DataError if they are not what they should be."""
    try:
        classes, samples = reader()
        names, labels = Strings.of(name for name, _ in samples), np.array([label for _, label in samples], np.int64)
    except DataError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        raise DataError(f"{root}: the annotation files are not the official ones, or damaged: {error!r}") from error
    if not len(labels) or len(names) != len(labels) or labels.min() < 0 or labels.max() >= len(classes):
        raise DataError(f"{root}: the annotation files name no image, or classes beyond the {len(classes)} there are")
    first = root / names[0]
    if not first.exists():
        raise DataError(f"{first}: no such file, though the annotations name it; unpack the images into {root}")
    return FileSource(root, classes, names, labels)


def _mat(path: Path, variable: str) -> NDArray[Any]:
    """The elements of a variable of a MATLAB file."""
    from scipy.io import loadmat

    data = io.BytesIO(contents(path))
    try:
        return np.atleast_1d(loadmat(data, squeeze_me=True)[variable])
    except Exception as error:
        # scipy's parser ends in whatever a damaged file makes it run into.
        raise DataError(f"{path}: not the official MATLAB file, or a damaged one: {error!r}") from error


KINDS: dict[str, Callable[[Path, str], NamedSource]] = {
    "folder": lambda root, split: FolderSource(root / split),
    "packed": _packed,
    "tar": _tar,
    "tfrecord": _tfrecord,
    "parquet": _parquet,
    "arrow": _arrow,
    "imagenet": _imagenet,
    "cifar10": partial(CifarSource, CIFAR10),
    "cifar100": partial(CifarSource, CIFAR100),
    "flowers102": _official(_flowers102),
    "stanford_cars": _official(_stanford_cars),
    "inat2018": _official(partial(_inaturalist, 2018)),
    "inat2019": _official(partial(_inaturalist, 2019)),
}
_NAMED_SPLITS = ("folder", "packed", "tar", "tfrecord", "parquet", "arrow", "imagenet")
_NUMBERED = ("tar", "tfrecord", "parquet", "arrow")
