"""How the kinds of data sets lie on disk: in words, for messages, and as signs by which a folder is recognised.

A sign is the existence of a file or a folder whose name no other kind has; nothing is opened. A folder may show several
signs (class folders and their packed files beside them): then it is for the user to say which to read.
"""

from collections.abc import Callable
from pathlib import Path

from fastdeit.data import shards
from fastdeit.data.cifar import CIFAR10, CIFAR100, Layout

LAYOUTS: dict[str, str] = {
    "folder": "ROOT/{train}/CLASS/*.jpg and ROOT/{val}/CLASS/*.jpg",
    "packed": "ROOT/{train}.pack and ROOT/{val}.pack, made by `fastdeit data pack`",
    "tar": "ROOT/{train}/*.tar and ROOT/{val}/*.tar, or ROOT/{train}-*.tar and ROOT/{val}-*.tar, with KEY.jpg and "
    "KEY.cls or KEY.json in them",
    "tfrecord": "ROOT/{train}-00000-of-01024 ... and ROOT/{val}-00000-of-00128 ..., the same as NAME-{train}.tfrecord"
    "-00000-of-01024 ..., or in the folders ROOT/{train} and ROOT/{val}",
    "parquet": "ROOT/{train}-*.parquet and ROOT/{val}-*.parquet, or the same in ROOT/data, with columns image, label",
    "arrow": "ROOT/{train}/*.arrow and ROOT/{val}/*.arrow, or ROOT/NAME-{train}.arrow and ROOT/NAME-{val}.arrow",
    "imagenet": "ROOT/{train}/WNID/*.JPEG and ROOT/{val}/*.JPEG with ROOT/ILSVRC2012_devkit_t12",
    "cifar10": "ROOT/cifar-10-batches-bin or ROOT/cifar-10-batches-py",
    "cifar100": "ROOT/cifar-100-binary or ROOT/cifar-100-python",
    "flowers102": "ROOT/jpg, ROOT/imagelabels.mat and ROOT/setid.mat",
    "stanford_cars": "ROOT/cars_train, ROOT/cars_test and ROOT/devkit, with cars_test_annos_withlabels.mat in ROOT or "
    "ROOT/devkit",
    "inat2018": "ROOT/train2018.json, ROOT/val2018.json and ROOT/train_val2018",
    "inat2019": "ROOT/train2019.json, ROOT/val2019.json and ROOT/train_val2019",
}


def layout(kind: str, train: str = "train", val: str = "val") -> str:
    """What `kind` looks like on disk, in one line; `train` and `val` are the names of the splits."""
    return LAYOUTS[kind].format(train=train, val=val)


def kinds_at(root: str | Path, train: str = "train", val: str = "val") -> list[str]:
    """The kinds of data set of which `root` shows the sign; none where it is no directory.

    A split of shards, or of TFRecord, Parquet or Arrow files, is looked for by its name, `train`; see `tar.shards` and
    `parquet.files` for the patterns that may stand there instead of a name, which have no sign.
    """
    root = Path(root)
    return [kind for kind, sign in _SIGNS.items() if sign(root, train, val)] if root.is_dir() else []


def _has(*names: str) -> Callable[[Path, str, str], bool]:
    return lambda root, train, val: all((root / name).exists() for name in names)


def _cifar(layout: Layout) -> Callable[[Path, str, str], bool]:
    names = layout.binary, layout.python
    return lambda root, train, val: root.name in names or any((root / name).is_dir() for name in names)


def _holds(folder: Path, glob: str) -> bool:
    return any(True for _ in folder.glob(glob))


def _folder(root: Path, train: str, val: str) -> bool:
    return any(entry.is_dir() for entry in (root / train).glob("*")) and not _imagenet(root, train, val)


def _imagenet(root: Path, train: str, val: str) -> bool:
    return (root / "ILSVRC2012_devkit_t12").is_dir() and _holds(root / val, "*.JPEG")


def _tar(root: Path, train: str, val: str) -> bool:
    return _holds(root / train, "*.tar") or _holds(root, f"{Path(train).name}[-_.]*tar")


def _parquet(root: Path, train: str, val: str) -> bool:
    name = Path(train).name
    files = ((place, glob) for place in (root, root / "data") for glob in (f"{name}-*.parquet", f"{name}.parquet"))
    return _holds(root / train, "*.parquet") or any(_holds(*file) for file in files)


def _saved_split(root: Path) -> bool:
    """Whether `root` is one split of a data set of kind arrow; to open it says what to do."""
    return (root / "state.json").is_file() and (root / "dataset_info.json").is_file()


_SIGNS: dict[str, Callable[[Path, str, str], bool]] = {
    "folder": _folder,
    "packed": lambda root, train, val: any((root / f"{split}.pack").is_file() for split in (train, val)),
    "tar": _tar,
    "tfrecord": lambda root, train, val: shards.any_of(root, train, shards.TFRECORD),
    "parquet": _parquet,
    "arrow": lambda root, train, val: shards.any_of(root, train, shards.ARROW) or _saved_split(root),
    "imagenet": _imagenet,
    "cifar10": _cifar(CIFAR10),
    "cifar100": _cifar(CIFAR100),
    "flowers102": _has("setid.mat", "imagelabels.mat"),
    "stanford_cars": _has("devkit/cars_meta.mat"),
    "inat2018": _has("train2018.json"),
    "inat2019": _has("train2019.json"),
}
