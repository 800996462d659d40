"""The kinds of data sets: one table of their readers, by the name that `data.source` has in a recipe.

A reader is a module with a `Kind`. To add one, write the module and enter it in `READERS`; a reader of a third party is
named by its import path instead, and needs no entry. This module imports neither numpy nor a reader, so that reading a
recipe stays cheap.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fastdeit import plugins

if TYPE_CHECKING:
    from fastdeit.data.sources.source import NamedSource

READERS = {
    "folder": "fastdeit.data.sources.folder:FOLDER",
    "packed": "fastdeit.data.sources.packed:PACKED",
    "tar": "fastdeit.data.sources.tar:TAR",
    "tfrecord": "fastdeit.data.sources.tfrecord:TFRECORD",
    "parquet": "fastdeit.data.sources.hugging_face:PARQUET",
    "arrow": "fastdeit.data.sources.hugging_face:ARROW",
    "list": "fastdeit.data.sources.lists:LIST",
    "imagenet": "fastdeit.data.sources.imagenet:IMAGENET",
    "tiny_imagenet": "fastdeit.data.sources.imagenet:TINY_IMAGENET",
    "cifar10": "fastdeit.data.sources.cifar:CIFAR10",
    "cifar100": "fastdeit.data.sources.cifar:CIFAR100",
    "flowers102": "fastdeit.data.sources.public:FLOWERS102",
    "stanford_cars": "fastdeit.data.sources.public:STANFORD_CARS",
    "inat2018": "fastdeit.data.sources.public:INAT2018",
    "inat2019": "fastdeit.data.sources.public:INAT2019",
}
"""Import path of each `Kind`, in the order in which messages list them."""
GENERATED = ("synthetic", "digits")
"""What `data.source` may name besides: images that fastdeit makes itself, for which there is no directory to give."""

_NUMBERS = re.compile(r"-\d+-of-\d+")


def _no_sign(root: Path, train: str, val: str) -> bool:
    return False


@dataclass(frozen=True)
class Columns:
    """What the columns, or fields, of a data set are called that hold images and labels; None: as is usual."""

    image: str | None = None
    label: str | None = None


USUAL = Columns()


@dataclass(frozen=True)
class Kind:
    """A reader of data sets of one kind.

    name: as in `data.source`. open(root, split): the samples of one split; raises DataError with the path and what to
    do. layout: what such a data set looks like on disk, in one line, with {train} and {val} for the names of the
    splits. sign(root, train, val): whether the folder `root` is of this kind, judged by names that no other kind has;
    it opens no file. suffixes: how the names of its files end, where one file is a split of its own; in them,
    NUMBER-of-COUNT is written 00000-of-00001. named_splits: whether splits have names of their own; else they are
    "train" and "val". numbered: whether classes may be mere numbers, of which the last ones may have no held-out
    sample. columns: whether `open` takes `Columns` as a third argument. held_out(training, root, split): `open` for the
    held-out split, where that depends on the training split.
    """

    name: str
    open: "Callable[..., NamedSource]"
    layout: str
    sign: Callable[[Path, str, str], bool] = _no_sign
    suffixes: tuple[str, ...] = ()
    named_splits: bool = True
    numbered: bool = False
    columns: bool = False
    held_out: "Callable[[NamedSource, Path, str], NamedSource] | None" = None

    def has_file(self, name: str) -> bool:
        """Whether a file of this name is of this kind."""
        return _NUMBERS.sub("-00000-of-00001", name).endswith(self.suffixes)


def names() -> tuple[str, ...]:
    """All names that `data.source` knows; import paths come besides."""
    return (*READERS, *GENERATED)


def find(use: str) -> Kind:
    """The kind that `use` names: a name in `READERS`, or an import path `package.module:NAME`, of a `Kind` or of a
    function that is its `open`. Raises ValueError where there is none."""
    if ":" not in use and use not in READERS:
        raise ValueError(f"{use!r} must be one of {', '.join(READERS)}, or an import path package.module:KIND")
    found = plugins.load_shipped(READERS[use], "reader") if use in READERS else plugins.load(use, "reader")
    if isinstance(found, Kind):
        return found
    if not callable(found):
        raise ValueError(
            f"reader {use!r} is {found!r}, but has to be a fastdeit.data.sources.kinds.Kind or a function (root, split)"
        )
    return Kind(use, found, layout=f"what {use} reads")


def shipped() -> Iterator[Kind]:
    """The kinds in `READERS`, in their order."""
    return map(find, READERS)
