"""Data sets by their kind: `open_source` for one split, `open_pair` for training and held-out samples, `open_held_out`
for the latter alone, `kinds_at` for what a folder looks like."""

from pathlib import Path

from fastdeit.data.sources import kinds
from fastdeit.data.sources.kinds import Kind
from fastdeit.data.sources.source import DataError, NamedSource, require_same_classes


def open_source(use: str, root: str | Path, split: str) -> NamedSource:
    """One split of a data set; `use` as in `kinds.find`.

    split: the name of its folder or files under `root`, as its reader says; "train" or "val" where splits have no
    names of their own. Raises DataError with the path and what to do.
    """
    kind = _kind(use)
    return kind.open(_checked(kind, root, split), split)


def open_pair(use: str, root: str | Path, train: str = "train", val: str = "val") -> tuple[NamedSource, NamedSource]:
    """(training, held-out) samples of a data set, each as `open_source`; DataError also where their classes differ."""
    kind = _kind(use)
    training = open_source(use, root, train)
    place = _checked(kind, root, val)
    held_out = kind.held_out(training, place, val) if kind.held_out else kind.open(place, val)
    if kind.numbered and held_out.classes == training.classes[: len(held_out.classes)]:
        held_out.classes = training.classes
    require_same_classes(root, (train, training), (val, held_out))
    return training, held_out


def open_held_out(use: str, root: str | Path, train: str = "train", val: str = "val") -> NamedSource:
    """Held-out samples as `open_pair` gives them. The training split is read only where they depend on it."""
    return open_pair(use, root, train, val)[1] if _kind(use).held_out else open_source(use, root, val)


def layout(use: str, train: str = "train", val: str = "val") -> str:
    """What a data set of this kind looks like on disk, in one line; `train` and `val` are the names of the splits."""
    return _layout(_kind(use), train, val)


def kinds_at(root: str | Path, train: str = "train", val: str = "val") -> list[str]:
    """Names of the kinds of data set of which `root` shows the sign; none where it is no directory.

    Splits are looked for by their names: a pattern that may stand there instead has no sign. A folder may show several
    signs (class folders and their packed files beside them): then it is for the user to say which to read.
    """
    root = Path(root)
    return [kind.name for kind in kinds.shipped() if kind.sign(root, train, val)] if root.is_dir() else []


def _kind(use: str) -> Kind:
    try:
        return kinds.find(use)
    except ValueError as error:
        raise DataError(f"data source: {error}") from error


def _layout(kind: Kind, train: str = "train", val: str = "val") -> str:
    return kind.layout.format(train=train, val=val)


def _checked(kind: Kind, root: str | Path, split: str) -> Path:
    if not kind.named_splits and split not in ("train", "val"):
        raise DataError(f"data source {kind.name} has the splits train and val, not {split!r}")
    root = Path(root)
    if not root.is_dir():
        what = "not a directory" if root.exists() else "no such directory"
        raise DataError(f"{root}: {what}; the expected layout is {_layout(kind)}")
    return root
