"""ImageNet as its authors and Kaggle distribute it, and Tiny ImageNet; nothing has to be moved.

Classes are the sorted WordNet ids, as everywhere. The held-out images lie in one folder (`imagenet_kit`), or in the
archive as downloaded (`imagenet_tar`).
"""

import csv
from collections.abc import Sequence
from pathlib import Path

from fastdeit.data.sources import imagenet_tar
from fastdeit.data.sources.folder import ARCHIVES, DEVKIT, KIT_ARCHIVE, FolderSource, is_flat_imagenet
from fastdeit.data.sources.imagenet_kit import TRUTH, by_number, number, require_none, truth
from fastdeit.data.sources.kinds import Kind
from fastdeit.data.sources.names import is_image
from fastdeit.data.sources.public import Samples, annotated
from fastdeit.data.sources.source import DataError, NamedSource, contents

_KAGGLE, _SOLUTION = "ILSVRC/Data/CLS-LOC", "LOC_val_solution.csv"
_TINY = "val/val_annotations.txt"
_ANEW = "unpack the held-out images anew, and remove what is not from there"


def _imagenet(root: Path, split: str) -> NamedSource:
    """Kaggle's folders; the archives as downloaded; class folders; or, for the held-out images, all in one folder as
    distributed. Of the last and of the archives, the development kit in `root` says which class each image has."""
    if (root / _KAGGLE).is_dir():
        return _kaggle(root, split)
    folder = root / split
    packed = None if folder.is_dir() else imagenet_tar.archive(root, split)
    if packed is not None:
        return imagenet_tar.training(packed) if packed.name == ARCHIVES["train"] else imagenet_tar.held_out(packed)
    images = [path.name for path in folder.glob("*") if is_image(path.name)]
    kit = truth(root) if images else None
    if kit is None:
        return FolderSource(folder)
    return annotated(root, lambda: _flat(root, split, images, *kit))


def _flat(root: Path, split: str, images: list[str], classes: list[str], labels: list[int]) -> Samples:
    order = by_number(root / split, images, len(labels), TRUTH, _ANEW)
    return classes, [(f"{split}/{images[at]}", label) for at, label in zip(order, labels, strict=True)]


def _kaggle(root: Path, split: str) -> NamedSource:
    """ILSVRC/Data/CLS-LOC with train/WNID and val/, and LOC_val_solution.csv: as Kaggle's archive unpacks."""
    if split not in ("train", "val"):
        raise DataError(f"{root}: Kaggle's ImageNet has the splits train and val, not {split!r}")
    training = root / _KAGGLE / "train"
    if split == "train":
        return FolderSource(training)
    return annotated(root, lambda: _solved(root, sorted(path.name for path in training.iterdir() if path.is_dir())))


def _solved(root: Path, classes: Sequence[str]) -> Samples:
    path = root / _SOLUTION
    rows = list(csv.reader(contents(path).decode().splitlines()))[1:]
    # The second column is the class and its boxes: "n01751748 111 108 230 366 ".
    wnid = {number(image): prediction.split()[0] for image, prediction, *_ in rows}
    if sorted(wnid) != list(range(1, len(rows) + 1)):
        raise DataError(f"{path}: not the official file: it does not name the images 1 to {len(rows)}, each once")
    classes = sorted({*classes, *wnid.values()})
    label = {name: at for at, name in enumerate(classes)}
    folder = root / _KAGGLE / "val"
    images = [one.name for one in folder.glob("*") if is_image(one.name)]
    order = by_number(folder, images, len(rows), path, _ANEW)
    return classes, [(f"{_KAGGLE}/val/{images[i]}", label[wnid[at]]) for at, i in enumerate(order, 1)]


def _tiny_imagenet(root: Path, split: str) -> NamedSource:
    """train/WNID/images/*.JPEG, and val/images/*.JPEG with val/val_annotations.txt."""
    if split == "train":
        return FolderSource(root / "train")
    return annotated(root, lambda: _tiny_held_out(root))


def _tiny_held_out(root: Path) -> Samples:
    classes = sorted(contents(root / "wnids.txt").decode().split())
    rows = [line.split("\t")[:2] for line in contents(root / _TINY).decode().splitlines() if line]
    labels = {image: classes.index(wnid) for image, wnid in rows}
    there = {path.name for path in (root / "val" / "images").glob("*") if is_image(path.name)}
    missing, extra = sorted(set(labels) - there), sorted(there - set(labels))
    why = f"the label of an image is that of its name in {_TINY}"
    require_none(root / "val" / "images", missing, extra, why, _ANEW)
    return classes, [(f"val/images/{image}", label) for image, label in sorted(labels.items())]


def _is_tiny(root: Path, train: str, val: str) -> bool:
    return (root / _TINY).is_file() and (root / "wnids.txt").is_file()


def _is_imagenet(root: Path, train: str, val: str) -> bool:
    packed = not (root / train).is_dir() and imagenet_tar.archive(root, train) is not None
    return packed or is_flat_imagenet(root, val) or (root / _KAGGLE).is_dir()


IMAGENET = Kind(
    "imagenet",
    _imagenet,
    f"ROOT/{ARCHIVES['train']}, ROOT/{ARCHIVES['val']} and ROOT/{KIT_ARCHIVE}; or ROOT/{{train}}/WNID/*.JPEG and "
    f"ROOT/{{val}}/*.JPEG with ROOT/{DEVKIT}; or Kaggle's ROOT/{_KAGGLE} with ROOT/{_SOLUTION}",
    _is_imagenet,
    tuple(ARCHIVES.values()),
)
TINY_IMAGENET = Kind(
    "tiny_imagenet",
    _tiny_imagenet,
    f"ROOT/train/WNID/images/*.JPEG, ROOT/val/images/*.JPEG, ROOT/{_TINY} and ROOT/wnids.txt",
    _is_tiny,
    named_splits=False,
)
