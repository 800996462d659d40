"""`fastdeit data check` and `fastdeit data pack`, and what `--data` means where it is no folder of images.

A data set is named by its path. Its kind is read from the layout (`data/datasets.py`) as long as only one kind
fits; where several do, or none, the user is asked.
"""

import argparse
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fastdeit import cores
from fastdeit.data.sources import kinds, packed
from fastdeit.data.sources.datasets import advice, held_out_name, kinds_at, open_pair, open_source
from fastdeit.data.sources.share import is_share, share
from fastdeit.data.sources.source import DataError, MachineError, NamedSource
from fastdeit.errors import FastdeitError, UsageError
from fastdeit.recipe import resolve as recipes
from fastdeit.text import one_line
from fastdeit.verbs import progress

if TYPE_CHECKING:
    from fastdeit.verbs.normalise import Normalised

_ALONE = ".", "."  # the folder itself as training and as held-out split
_WILDCARD = re.compile(r"[-_.]*[{*?\[]")

Opened = TypeVar("Opened")
Named = list[tuple[str, NamedSource]]


def check(args: argparse.Namespace) -> int:
    """`fastdeit data check PATH`: a report of every split; 1 if something was found that would change a training."""
    refused: list[DataError] = []

    def tried(kind: str, root: Path, splits: Sequence[str], **options: Any) -> tuple[str, Named]:
        """The splits as training opens them, or else those that can be opened, with what training would say."""
        try:
            return kind, _matched(kind, root, splits, **options)
        except MachineError:
            raise
        except DataError as error:
            found = [(split, source) for split in splits if (source := _opened(kind, root, split, **options))]
            if not found or len(splits) == 1 or kind not in kinds_at(root, splits[-1], splits[-1]):
                raise  # there is nothing of that name: nothing is wrong with the data, but with the command
            refused.append(error)
            return kind, found

    kind, opened = _open(args, tried)
    from fastdeit.verbs.check import page, report, samples  # with torch and DALI, which a mistake need not wait for

    splits, looked = [], []
    for name, source in opened:
        with progress.shown(f"checking {name}") as report_progress:
            found = samples.looked_at(source, args.processes, report_progress)
        looked.append((name, source, found))
        splits.append(report.split_of(name, source, found))
        if not args.json:
            print(*map(one_line, splits[-1].lines()), sep="\n", flush=True)
    whole = report.Report(args.path, kind, splits, [*map(report.refusal, refused), *report.across(looked)])
    if args.json:
        print(json.dumps(whole.facts(), allow_nan=False))
    else:
        print(*map(one_line, whole.lines()), sep="\n", flush=True)
    if args.html is not None:
        _write_page(Path(args.html), page.page(whole))
    return 0 if whole.ok else 1


def _opened(kind: str, root: Path, split: str, **options: Any) -> NamedSource | None:
    try:
        return open_source(kind, root, split, **options)
    except MachineError:
        raise
    except DataError:
        return None


def _write_page(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise FastdeitError(f"--html {path}: the page cannot be written: {error.strerror or error}") from error


def pack(args: argparse.Namespace) -> None:
    """`fastdeit data pack PATH OUT`: every split as OUT/SPLIT.pack."""
    out = Path(args.out)
    sources = _open(args, _matched)
    names = ["val" if is_share(split) else _stem(Path(split).name) for split, _ in sources]
    if len(set(names)) < len(names) or "" in names:
        raise UsageError(
            f"the splits {', '.join(split for split, _ in sources)} would become the files {', '.join(names)}; give "
            "splits whose names, up to the first wildcard, differ"
        )
    targets = [out / (name + packed.SUFFIX) for name in names]
    present = [str(target) for target in targets if target.exists()]
    if present and not args.force:
        raise UsageError(f"{', '.join(present)}: already there; --force replaces it")
    for _, source in sources:
        packed.require_no_annotations(source)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{out}: the folder for the packed files cannot be made: {error.strerror}") from error
    if args.normalise:
        from fastdeit.verbs.normalise import Normalised
    for (split, source), target in zip(sources, targets, strict=True):
        began = time.monotonic()
        if args.normalise:
            source = Normalised(source)
        with progress.shown(f"packing {split}") as report_progress:
            # Pictures are decoded on all processors; bytes alone come as fast from one thread.
            packed.pack(source, target, report_progress, threads=cores.available() if args.normalise else 1)
        if args.normalise:
            _say_rewritten(source)
        seconds = max(time.monotonic() - began, 1e-3)
        size = target.stat().st_size / 2**20
        print(
            f"{target}: {len(source):,} images, {size:,.1f} MiB in {seconds:,.1f} s "
            f"({len(source) / seconds:,.0f} images/s, {size / seconds:,.0f} MiB/s)",
            flush=True,
        )


def _say_rewritten(source: "Normalised") -> None:
    for _, one in sorted(source.rewritten.items()):
        print(one_line(f"encoded anew: {one}"))
    for _, (path, reason) in sorted(source.unusable.items()):
        print(one_line(f"copied as it is, since it cannot be used: {path}: {reason}"))


def implied(recipe: str, overrides: Sequence[str], root: str | None, told: bool = False) -> list[str]:
    """The override data.source=KIND where `--data root` is unmistakably of another kind than the class folders that a
    recipe without a source of its own expects, and data.val=NAME where its held-out split is called otherwise; each
    said in a line by the first process, unless it has been `told` already, by the launcher.

    Raises UsageError where several kinds fit, and for a file, which can only be one split of two; DataError where
    several splits may be the held-out one.
    """
    path = Path(root or "")
    chosen = any(override.startswith("data.source=") for override in overrides)
    if root is not None and path.is_file() and not chosen:
        known = advice(path)
        why = known or f"--data {root} is a file; give the folder that holds both splits: --data {path.parent}"
        raise UsageError(why)
    if root is None or not path.is_dir():
        return []
    data, words = recipes.load(recipe, overrides).data, []
    kind, found = data.source, kinds_at(path, data.train, data.val)
    if kind == "folder" and not chosen and found and "folder" not in found:
        kind = _only(found, root, "data.source=KIND")
        words.append(f"data.source={kind}")
        _say(told, f"{root} holds data of kind {kind}: reading it with data.source={kind}")
    val = data.val if kind in kinds.GENERATED else held_out_name(kind, path, data.val)
    if val != data.val:
        words.append(f"data.val={val}")
        _say(told, f"{root} has no split {data.val}: holding out {val} with data.val={val}")
    return words


def _say(told: bool, text: str) -> None:
    if not told and os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def _only(found: list[str], path: str, option: str) -> str:
    if len(found) == 1:
        return found[0]
    known = None if found else advice(path)
    if known:
        raise UsageError(known)
    what = f"holds {' and '.join(found)}" if found else "is none of the data sets that are recognised by their layout"
    raise UsageError(f"{path} {what}; say how to read it with {option}: {', '.join(found or kinds.READERS)}")


def _open(args: argparse.Namespace, opened: Callable[..., Opened]) -> Opened:
    """What `opened` makes of kind, folder and names of the splits that the arguments ask for."""
    path = Path(args.path)
    options = {"columns": kinds.Columns(args.image_column, args.label_column), "classes": args.classes}
    if args.source is not None:
        _require_reader(args.source)
    if not path.exists():
        raise UsageError(f"{path}: no such file or directory")
    if path.is_file():
        if args.split:
            raise UsageError(f"--split does not go with {path}, which is a file")
        return opened(args.source or _kind_of_file(path), path.parent, [path.name], **options)
    kind, splits = _splits(path, args.source, args.split)
    try:
        return opened(kind, path, splits, **options)
    except DataError as error:
        alone = not is_share(splits[-1]) and kind not in kinds_at(path, splits[-1], splits[-1])
        hint = "; if there is only one split, or others, name them: --split NAME" if alone else ""
        raise type(error)(f"{error}{hint}") from error


def _splits(path: Path, source: str | None, named: Sequence[str] | None) -> tuple[str, Sequence[str]]:
    """(kind, names) of the splits at `path`: those that are named, or of which a share is, else the training and the
    held-out one, else the folder itself as a single one."""
    if any(map(is_share, named or ())):
        named = _of_share(named)
    if named:
        return source or _only(kinds_at(path, named[0], named[-1]), str(path), "--source"), named
    if source is None and not kinds_at(path) and kinds_at(path, *_ALONE):
        return _only(kinds_at(path, *_ALONE), str(path), "--source"), _ALONE[:1]
    kind = source or _only(kinds_at(path), str(path), "--source")
    return kind, ("train", held_out_name(kind, path))


def _of_share(named: Sequence[str]) -> tuple[str, str]:
    """(training split, share of it that is held out) of such names, in whatever order; UsageError for any others."""
    whole, shares = [name for name in named if not is_share(name)], [name for name in named if is_share(name)]
    if len(shares) > 1 or len(whole) > 1:
        raise UsageError(f"--split {' --split '.join(named)}: give a share, as 10%, alone or with its split")
    try:
        share(shares[0])
    except ValueError as error:
        raise UsageError(f"--split {error}") from error
    return (*whole, "train")[0], shares[0]


def _require_reader(use: str) -> None:
    try:
        kinds.find(use)
    except ValueError as error:
        raise UsageError(f"--source {use}: {error}") from error


def _kind_of_file(path: Path) -> str:
    """The kind of one file by its name; UsageError if it is of none."""
    found = [kind for kind in kinds.shipped() if kind.has_file(path.name)]
    if found:  # of several, that of the longest ending: ImageNet's archives are no shards
        return max(found, key=lambda kind: max(map(len, kind.suffixes))).name
    foreign = advice(path)
    if foreign:
        raise UsageError(foreign)
    known = ", ".join(suffix for kind in kinds.shipped() for suffix in kind.suffixes)
    raise UsageError(f"{path}: a file of no known kind ({known}); give the data set's folder")


def _stem(name: str) -> str:
    """What names the packed split: a file's name, or a pattern, up to its numbers, wildcards and suffix."""
    stem = _WILDCARD.split(name)[0] or "train"
    for kind in kinds.shipped():
        for suffix in kind.suffixes:
            stem = stem.removesuffix(suffix)
    return stem


def _matched(kind: str, root: Path, splits: Sequence[str], **options: Any) -> Named:
    """(name, samples) of splits. Two are a training and a held-out split and have to have the same classes."""
    if len(splits) == 2:
        return list(zip(splits, open_pair(kind, root, *splits, **options), strict=True))
    return [(split, open_source(kind, root, split, **options)) for split in splits]
