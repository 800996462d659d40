"""Public data sets in the layouts in which their authors distribute them, once unpacked; nothing has to be moved.

Splits are those that published transfer results use: Flowers-102 trains on its training and validation images together
(2,040) and is tested on the other 6,149.
"""

import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdeit.data.sources.folder import FileSource
from fastdeit.data.sources.index import Strings
from fastdeit.data.sources.kinds import Kind
from fastdeit.data.sources.source import DataError, contents

Samples = tuple[list[str], list[tuple[str, int]]]
"""Class names, and (path relative to the root, class number) of every sample."""


def _flowers102(root: Path, split: str) -> Samples:
    """jpg/image_00001.jpg ..., imagelabels.mat (1 to 102), setid.mat (image numbers of trnid, valid, tstid)."""
    labels = mat(root / "imagelabels.mat", "labels")
    parts = [mat(root / "setid.mat", part) for part in (("trnid", "valid") if split == "train" else ("tstid",))]
    numbers = np.sort(np.concatenate(parts))
    classes = [str(number) for number in range(1, 103)]
    return classes, [(f"jpg/image_{number:05d}.jpg", int(labels[number - 1]) - 1) for number in numbers]


def _stanford_cars(root: Path, split: str) -> Samples:
    """cars_train/, cars_test/ and devkit/; the labels of the test images, which are distributed apart, lie in `root` or
    in devkit/."""
    folder = "cars_train" if split == "train" else "cars_test"
    file = f"{folder}_annos.mat" if split == "train" else f"{folder}_annos_withlabels.mat"
    path = root / file if (root / file).exists() else root / "devkit" / file
    classes = [str(name) for name in mat(root / "devkit" / "cars_meta.mat", "class_names")]
    return classes, [(f"{folder}/{one['fname']}", int(one["class"]) - 1) for one in mat(path, "annotations")]


def _inaturalist(year: int, root: Path, split: str) -> Samples:
    """train2018.json and val2018.json, in the layout of COCO, and the images in train_val2018/; 2019 likewise."""
    listed = json.loads(contents(root / f"{split}{year}.json"))
    categories = sorted(listed["categories"], key=lambda category: category["id"])
    label = {category["id"]: number for number, category in enumerate(categories)}
    of_image = {one["image_id"]: label[one["category_id"]] for one in listed["annotations"]}
    classes = [str(category["name"]) for category in categories]
    return classes, [(image["file_name"], of_image[image["id"]]) for image in listed["images"]]


def annotated(root: Path, reader: Callable[[], Samples]) -> FileSource:
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


def mat(path: Path, variable: str, data: bytes | None = None) -> NDArray[Any]:
    """The elements of a variable of a MATLAB file; data: its bytes, where they are read already."""
    from scipy.io import loadmat

    file = io.BytesIO(contents(path) if data is None else data)
    try:
        return np.atleast_1d(loadmat(file, squeeze_me=True)[variable])
    except Exception as error:
        # scipy's parser ends in whatever a damaged file makes it run into.
        raise DataError(f"{path}: not the official MATLAB file, or a damaged one: {error!r}") from error


def _official(name: str, reader: Callable[[Path, str], Samples], layout: str, *signs: str) -> Kind:
    """The kind of a data set whose annotation files `reader` reads; `signs`: names of files that no other kind has."""
    return Kind(
        name,
        lambda root, split: annotated(root, lambda: reader(root, split)),
        layout,
        lambda root, train, val: all((root / sign).exists() for sign in signs),
        named_splits=False,
    )


FLOWERS102 = _official(
    "flowers102",
    _flowers102,
    "ROOT/jpg, ROOT/imagelabels.mat and ROOT/setid.mat",
    *("setid.mat", "imagelabels.mat"),
)
STANFORD_CARS = _official(
    "stanford_cars",
    _stanford_cars,
    "ROOT/cars_train, ROOT/cars_test and ROOT/devkit, with cars_test_annos_withlabels.mat in ROOT or ROOT/devkit",
    "devkit/cars_meta.mat",
)
INAT2018, INAT2019 = (
    _official(
        f"inat{year}",
        partial(_inaturalist, year),
        f"ROOT/train{year}.json, ROOT/val{year}.json and ROOT/train_val{year}",
        f"train{year}.json",
    )
    for year in (2018, 2019)
)
