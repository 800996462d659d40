"""ImageNet as its authors and Kaggle distribute it, and Tiny ImageNet; nothing has to be moved.

Classes are the sorted WordNet ids, as everywhere. The held-out images lie in one folder: the class of each follows from
the number in its name, never from its place in a listing, which a file that is missing or added would shift.
"""

import csv
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from fastdeit.data.sources.folder import DEVKIT, FolderSource, is_flat_imagenet
from fastdeit.data.sources.kinds import Kind
from fastdeit.data.sources.names import is_image
from fastdeit.data.sources.public import annotated, mat
from fastdeit.data.sources.source import DataError, NamedSource, contents, listed

_MAT, _TRUTH = "meta.mat", "ILSVRC2012_validation_ground_truth.txt"
_HELD_OUT = re.compile(r"ILSVRC2012_val_(\d{8})(?:\.jpe?g)?", re.IGNORECASE)
_HELD_OUT_NAME = "ILSVRC2012_val_{:08d}.JPEG"
_KAGGLE, _SOLUTION = "ILSVRC/Data/CLS-LOC", "LOC_val_solution.csv"
_TINY = "val/val_annotations.txt"

Truth = tuple[list[str], list[int]]
"""Class names, and the class numbers of held-out images 1, 2, ..."""


def truth(folder: Path, read: Callable[[str], bytes]) -> Truth:
    """What the development kit says of the held-out images; read(name): a file of its folder `data`, in messages called
    `folder`."""
    synsets = [one for one in mat(folder / _MAT, "synsets", read(_MAT)) if one["num_children"] == 0]
    classes = sorted(str(one["WNID"]) for one in synsets)
    label = {int(one["ILSVRC2012_ID"]): classes.index(str(one["WNID"])) for one in synsets}
    return classes, [label[int(line)] for line in read(_TRUTH).split()]


def by_number(place: object, images: Sequence[str], count: int, labels: object) -> list[str]:
    """The names of ImageNet's held-out images 1 to `count`, by the number that each bears; `labels` has a line for
    each. DataError, with the first of them, for an image that is missing, there twice, or none of these."""
    found: dict[int, str] = {}
    extra = []
    for image in sorted(images):
        number = _number(image)
        if not 1 <= number <= count or number in found:
            extra.append(image)
        else:
            found[number] = image
    missing = [_HELD_OUT_NAME.format(number) for number in range(1, count + 1) if number not in found]
    require_none(place, missing, extra, f"the label of an image is that of its number in {labels}, which has {count}")
    return [found[number] for number in range(1, count + 1)]


def require_none(place: object, missing: Sequence[str], extra: Sequence[str], why: str) -> None:
    """DataError where images are missing, or there though no label is theirs."""
    wrong = [f"{len(missing)} are missing, as {listed(missing)}"] if missing else []
    wrong += [f"{len(extra)} are none of them: {listed(extra)}"] if extra else []
    if wrong:
        raise DataError(
            f"{place}: {why}, but of the images {' and '.join(wrong)}; unpack the held-out images anew, and remove "
            "what is not from there"
        )


def _number(image: str) -> int:
    match = _HELD_OUT.fullmatch(image)
    return int(match[1]) if match else 0


def _imagenet(root: Path, split: str) -> NamedSource:
    """Class folders; Kaggle's; or, for the held-out images, all in one folder as distributed, with the official devkit
    in `root` to say which class each has."""
    if (root / _KAGGLE).is_dir():
        return _kaggle(root, split)
    folder = root / split
    images = [path.name for path in folder.glob("*") if is_image(path.name)]
    if not images or not (root / DEVKIT / "data").is_dir():
        return FolderSource(folder)
    return annotated(root, lambda: _flat(root, split, images))


def _flat(root: Path, split: str, images: list[str]) -> tuple[list[str], list[tuple[str, int]]]:
    kit = root / DEVKIT / "data"
    classes, labels = truth(kit, lambda name: contents(kit / name))
    ordered = by_number(root / split, images, len(labels), kit / _TRUTH)
    return classes, [(f"{split}/{image}", label) for image, label in zip(ordered, labels, strict=True)]


def _kaggle(root: Path, split: str) -> NamedSource:
    """ILSVRC/Data/CLS-LOC with train/WNID and val/, and LOC_val_solution.csv: as Kaggle's archive unpacks."""
    if split not in ("train", "val"):
        raise DataError(f"{root}: Kaggle's ImageNet has the splits train and val, not {split!r}")
    training = root / _KAGGLE / "train"
    if split == "train":
        return FolderSource(training)
    return annotated(root, lambda: _solved(root, sorted(path.name for path in training.iterdir() if path.is_dir())))


def _solved(root: Path, classes: list[str]) -> tuple[list[str], list[tuple[str, int]]]:
    path = root / _SOLUTION
    rows = list(csv.reader(contents(path).decode().splitlines()))[1:]
    # The second column is the class and its boxes: "n01751748 111 108 230 366 ".
    wnid = {_number(image): prediction.split()[0] for image, prediction, *_ in rows}
    if sorted(wnid) != list(range(1, len(rows) + 1)):
        raise DataError(f"{path}: not the official file: it does not name the images 1 to {len(rows)}, each once")
    classes = sorted({*classes, *wnid.values()})
    number = {name: at for at, name in enumerate(classes)}
    folder = root / _KAGGLE / "val"
    ordered = by_number(folder, [one.name for one in folder.glob("*") if is_image(one.name)], len(rows), path)
    return classes, [(f"{_KAGGLE}/val/{image}", number[wnid[at]]) for at, image in enumerate(ordered, 1)]


def _tiny_imagenet(root: Path, split: str) -> NamedSource:
    """train/WNID/images/*.JPEG, and val/images/*.JPEG with val/val_annotations.txt."""
    if split == "train":
        return FolderSource(root / "train")
    return annotated(root, lambda: _tiny_held_out(root))


def _tiny_held_out(root: Path) -> tuple[list[str], list[tuple[str, int]]]:
    classes = sorted(contents(root / "wnids.txt").decode().split())
    rows = [line.split("\t")[:2] for line in contents(root / _TINY).decode().splitlines() if line]
    labels = {image: classes.index(wnid) for image, wnid in rows}
    there = {path.name for path in (root / "val" / "images").glob("*") if is_image(path.name)}
    missing, extra = sorted(set(labels) - there), sorted(there - set(labels))
    require_none(root / "val" / "images", missing, extra, f"the label of an image is that of its name in {_TINY}")
    return classes, [(f"val/images/{image}", label) for image, label in sorted(labels.items())]


def _is_tiny(root: Path, train: str, val: str) -> bool:
    return (root / _TINY).is_file() and (root / "wnids.txt").is_file()


IMAGENET = Kind(
    "imagenet",
    _imagenet,
    f"ROOT/{{train}}/WNID/*.JPEG and ROOT/{{val}}/*.JPEG with ROOT/{DEVKIT}, or Kaggle's ROOT/{_KAGGLE} with "
    f"ROOT/{_SOLUTION}",
    lambda root, train, val: is_flat_imagenet(root, val) or (root / _KAGGLE).is_dir(),
)
TINY_IMAGENET = Kind(
    "tiny_imagenet",
    _tiny_imagenet,
    f"ROOT/train/WNID/images/*.JPEG, ROOT/val/images/*.JPEG, ROOT/{_TINY} and ROOT/wnids.txt",
    _is_tiny,
    named_splits=False,
)
