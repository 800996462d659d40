"""Data sets by their kind: `open_source` for one split, `open_pair` for training and held-out samples, `open_held_out`
for the latter alone, `kinds_at` for what a folder looks like, `held_out_name` for what its held-out split is called."""

import os
from collections.abc import Iterator, Sequence
from itertools import chain, islice, pairwise
from pathlib import Path
from shlex import quote

from fastdeit.data.sources import foreign, kinds, lists, unread
from fastdeit.data.sources.kinds import USUAL, Columns, Kind
from fastdeit.data.sources.names import is_litter
from fastdeit.data.sources.notices import say
from fastdeit.data.sources.parts import divided, numbered_by
from fastdeit.data.sources.share import is_share
from fastdeit.data.sources.source import (
    DataError,
    MachineError,
    NamedSource,
    listed,
    require_distinct,
    require_same_classes,
)

HELD_OUT = ("val", "valid", "validation", "test", "dev")
"""What held-out splits are usually called."""
_TRAIN, _VAL, _ROOT = "train", "val", "."
_LOOKED_AT = 100  # entries of a folder, to give advice
_SHARE = "data.val=10%"
_DIGITS = 20  # of a number that may be the name of a class


def open_source(
    use: str, root: str | Path, split: str, *, columns: Columns = USUAL, classes: str | None = None
) -> NamedSource:
    """One split of a data set; `use` as in `kinds.find`.

    split    the name of its folder or files under `root`, as its reader says; "train" or "val" where splits have no
             names of their own
    columns  what its columns are called, where it has any
    classes  a file of class names, a line each, in the order of the labels, by which samples are numbered
             (`parts.numbered_by`)

    Raises DataError with the path and what to do.
    """
    kind = _kind(use)
    source = _classed(_opened(kind, _checked(kind, root, split), split, columns), classes)
    _look_at_classes(root, source.classes)
    return source


def open_pair(
    use: str,
    root: str | Path,
    train: str = _TRAIN,
    val: str = _VAL,
    *,
    columns: Columns = USUAL,
    classes: str | None = None,
) -> tuple[NamedSource, NamedSource]:
    """(training, held-out) samples of a data set, each as `open_source`; DataError also where their classes differ.

    val: a split, as `held_out_name` has it, or a share of the training split, as in "10%": then the name of each sample
    alone decides on which side it is (`parts.divided`). With a share, a root that has classes or files of one split
    only, and nothing called `train`, is the training split itself.
    """
    kind = _kind(use)
    if is_share(val):
        place = _checked(kind, root, train)
        return divided(open_source(use, root, _whole(kind, place, train), columns=columns, classes=classes), val)
    training = _opened(kind, _checked(kind, root, train), train, columns)
    val = _said(root, val, held_out_name(use, root, val))
    place = _checked(kind, root, val)
    try:
        held_out = kind.held_out(training, place, val) if kind.held_out else _opened(kind, place, val, columns)
    except MachineError:
        raise
    except DataError as error:
        if not kind.named_splits or not kind.sign(place, train, train) or kind.sign(place, val, val):
            raise
        raise DataError(f"{error}; if there is no held-out split, hold a share of {train} out by {_SHARE}") from error
    if kind.numbered and held_out.classes == training.classes[: len(held_out.classes)]:
        held_out.classes = training.classes
    training, held_out = _classed(training, classes), _classed(held_out, classes)
    _look_at_classes(root, training.classes)
    require_same_classes(root, (train, training), (val, held_out))
    return training, held_out


def open_held_out(
    use: str,
    root: str | Path,
    train: str = _TRAIN,
    val: str = _VAL,
    *,
    columns: Columns = USUAL,
    classes: str | None = None,
) -> NamedSource:
    """Held-out samples as `open_pair` gives them. The training split is read only where they depend on it."""
    if _kind(use).held_out or is_share(val):
        return open_pair(use, root, train, val, columns=columns, classes=classes)[1]
    val = _said(root, val, held_out_name(use, root, val))
    return open_source(use, root, val, columns=columns, classes=classes)


def held_out_name(use: str, root: str | Path, val: str = _VAL) -> str:
    """What the held-out split is called: `val`; but where that is the default and nothing is called so, the one name of
    `HELD_OUT` that there is. DataError where there are two: that is for the user to decide."""
    kind, root = _kind(use), Path(root)
    if val != _VAL or not kind.named_splits or not root.is_dir():
        return val
    there = [name for name in HELD_OUT if kind.sign(root, name, name)]
    if len(there) > 1 and _VAL not in there:
        names = " and ".join(there)
        options = " or ".join(f"data.val={name}" for name in there)
        raise DataError(f"{root}: nothing is called val, but there are {names}: say which is held out by {options}")
    return there[0] if there else val


def layout(use: str, train: str = _TRAIN, val: str = _VAL) -> str:
    """What a data set of this kind looks like on disk, in one line; `train` and `val` are the names of the splits."""
    return _layout(_kind(use), train, val)


def kinds_at(root: str | Path, train: str = _TRAIN, val: str = _VAL) -> list[str]:
    """Names of the kinds of data set of which `root` shows the sign; none where it is no directory.

    Splits are looked for by their names: a pattern that may stand there instead has no sign. A folder may show several
    signs (class folders and their packed files beside them): then it is for the user to say which to read.
    """
    root = Path(root)
    if not root.is_dir():
        return []
    return [
        kind.name
        for kind in kinds.shipped()
        if kind.sign(root, _whole(kind, root, train) if is_share(val) else train, val)
    ]


def kinds_of_held_out(root: str | Path, train: str = _TRAIN, val: str = _VAL) -> list[str]:
    """As `kinds_at`, by the held-out split alone (`held_out_name`): the training split has to be there only where a
    share of it is held out."""
    root = Path(root)
    if is_share(val) or not root.is_dir():
        return kinds_at(root, train, val)
    names = HELD_OUT if val == _VAL else (val,)
    return [kind.name for kind in kinds.shipped() if any(kind.sign(root, name, name) for name in names)]


def advice(root: str | Path, train: str = _TRAIN, val: str = _VAL) -> str | None:
    """What to do about a place that is none of the data sets that are read, in a sentence; None where nothing in it is
    known: a public data set or files of another format that are not read, the classes of one split without a held-out
    one, a data set further down, splits of other names, or lists of other names."""
    root = Path(root)
    if not root.is_dir():
        return foreign.of_file(root)
    if known := unread.of_folder(root):
        return known
    alone = [kind.name for kind in kinds.shipped() if not is_share(val) and kind.sign(root, _ROOT, _ROOT)]
    if alone:
        return f"{root} itself holds one split of kind {alone[0]}: hold a share of it out by {_SHARE}"
    return _further_down(root, train, val) or foreign.of_folder(root, train, val) or _lists(root)


def _further_down(root: Path, train: str, val: str) -> str | None:
    """What to do about a folder of which a folder is a data set, or whose folders are splits of other names."""
    inner = _folders(root)
    known = {folder: text for folder in _inner(root) if (text := unread.of_folder(folder))}
    for folder in _inner(root):
        if folder.parent not in known and (found := _kinds_in(folder, train, val)):
            return f"{folder} holds data of kind {found[0]}: give that folder"
    if known:
        return next(iter(known.values()))
    if (root / train).is_dir():
        return None
    if inner and all((one / train).is_dir() for one in inner):
        return (
            f"the folders of {root} each hold one called {train}, but classes lie in splits, as {train}/CLASS: "
            f'`cd {quote(str(root))} && for one in */*/; do one=${{one%/}}; mkdir -p "${{one#*/}}" && '
            'mv "$one" "${one#*/}/${one%%/*}"; done` puts them so'
        )
    splits = [one.name for one in inner if _kinds_in(one, _ROOT, _ROOT)]
    alone = [str(root / name) for name in splits] or [
        str(one) for one in _inner(root) if one not in inner and _kinds_in(one, _ROOT, _ROOT)
    ]
    if len(alone) == 1:
        return f"{alone[0]} itself holds one split: give that folder, and hold a share of it out by {_SHARE}"
    if not splits:
        return None
    return (
        f"nothing in {root} is called {train}, but its folders {listed(splits)} may be splits: say which they are by "
        "data.train=NAME and data.val=NAME; `data check` and `data pack` take --split NAME for each"
    )


def _lists(root: Path) -> str | None:
    """What to do about a folder with files that may be lists of its images, of other names than splits have."""
    try:
        found = sorted(path.name for path in islice(root.iterdir(), _LOOKED_AT) if lists.is_list(path.name))
    except OSError:
        return None
    if not found:
        return None
    return (
        f"{listed(found)} in {root} may be a list of its images: add data.source=list data.train={found[0]}, and "
        f"data.val=FILE or {_SHARE}"
    )


def _inner(root: Path) -> Iterator[Path]:
    """The folders in a folder, and those in these."""
    inner = _folders(root)
    return chain(inner, chain.from_iterable(map(_folders, inner)))


def _kinds_in(folder: Path, train: str, val: str) -> list[str]:
    try:
        return kinds_at(folder, train, val)
    except (OSError, DataError):
        return []  # somebody else's, who lets nobody look into it


def _folders(folder: Path) -> list[Path]:
    try:
        entries = list(islice(folder.iterdir(), _LOOKED_AT))
    except OSError:
        return []  # what is wrong with it is told by who opens it
    return sorted(entry for entry in entries if os.path.isdir(entry) and not is_litter(entry.name))


def _kind(use: str) -> Kind:
    try:
        return kinds.find(use)
    except ValueError as error:
        raise DataError(f"data source: {error}") from error


def _layout(kind: Kind, train: str = _TRAIN, val: str = _VAL) -> str:
    if is_share(val):
        return f"{kind.layout.format(train=train, val=train)}, of which {val} are held out"
    return kind.layout.format(train=train, val=val)


def _whole(kind: Kind, root: Path, train: str) -> str:
    """The split of which a share is held out: `train`, or the root itself where nothing is called so."""
    alone = train == _TRAIN and not kind.sign(root, train, train) and kind.sign(root, _ROOT, _ROOT)
    return _ROOT if alone else train


def _opened(kind: Kind, root: Path, split: str, columns: Columns) -> NamedSource:
    if kind.columns:
        return kind.open(root, split, columns)
    if columns != USUAL:
        raise DataError(
            f"{root}: a data set of kind {kind.name} has no columns; leave out data.image_column and data.label_column"
        )
    return kind.open(root, split)


def _classed(source: NamedSource, classes: str | None) -> NamedSource:
    return source if classes is None else numbered_by(source, classes)


def _look_at_classes(root: str | Path, classes: Sequence[str]) -> None:
    """DataError where two of them look alike; a warning where they are numbers in the order of texts."""
    require_distinct(root, classes)
    numbers = [int(name) for name in classes if name.isascii() and name.isdigit() and len(name) < _DIGITS]
    first = next((one for one in pairwise(numbers) if one[0] > one[1]), None)
    if len(numbers) == len(classes) and first is not None:
        say(
            f"{root}: classes are called by numbers and sorted as text, as in torchvision, so that '{first[0]}' comes "
            f"before '{first[1]}' and the number of a class is not its name: for weights that count otherwise, "
            "data.classes=FILE names the classes in their order"
        )


def _said(root: str | Path, val: str, called: str) -> str:
    if called != val:
        say(f"{root}: nothing is called {val}: {called} is held out (data.val={called})")
    return called


def _checked(kind: Kind, root: str | Path, split: str) -> Path:
    if not kind.named_splits and split not in (_TRAIN, _VAL):
        raise DataError(f"{root}: a data set of kind {kind.name} has the splits train and val, not {split!r}")
    root = Path(root)
    if not root.is_dir():
        what = "not a directory" if root.exists() else "no such directory"
        raise DataError(f"{root}: {what}; the expected layout is {_layout(kind)}")
    return root
