"""What `data check` found: the facts of each split, and findings, of which some would change a training."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastdeit.data.sources.source import NamedSource
from fastdeit.verbs.check.samples import Odd, Samples

_LISTED = 20
_UNBALANCED = 10
_PICTURES = ".heic", ".heif", ".jxl", ".svg", ".dng", ".nef", ".cr2", ".cr3", ".arw", ".raf", ".orf", ".rw2"
"""Extensions of pictures that Pillow does not know."""


@dataclass(frozen=True)
class Finding:
    """Something that people want to know. text: what, without a full stop; entries: each case; serious: whether a
    training, or what its score means, would be another without it."""

    text: str
    entries: Sequence[str] = ()
    serious: bool = False


@dataclass(frozen=True)
class Split:
    """One split. classes: name and number of samples of each, in the order of the labels; formats: samples of each
    format and colour mode; decoders: samples that each decoder reads; side, ratio, size as (smallest, median, largest)
    of the usable samples: shorter side in pixels, width over height, encoded size in bytes; odd: samples by what is odd
    about them, and (path, picture) of the first ones; widths, heights: of each usable sample."""

    name: str
    samples: int
    classes: Sequence[tuple[str, int]]
    formats: Mapping[str, int]
    decoders: Mapping[str, int]
    side: tuple[int, int, int]
    ratio: tuple[float, float, float]
    size: tuple[int, int, int]
    findings: Sequence[Finding]
    odd: Mapping[str, int] = field(default_factory=dict)
    sheet: Sequence[tuple[str, Odd]] = ()
    widths: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32), compare=False)
    heights: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32), compare=False)

    def lines(self) -> Iterator[str]:
        """The split in words."""
        formats = ", ".join(f"{count} {name}" for name, count in self.formats.items())
        counts = [count for _, count in self.classes]
        yield f"{self.name}: {self.samples} samples: {formats or 'none usable'}"
        yield f"decoded by {', by '.join(f'{name} {count}' for name, count in self.decoders.items()) or 'nothing'}"
        yield "shorter side {0} to {2} pixels, median {1}".format(*self.side)
        yield "width over height {0:.2f} to {2:.2f}, median {1:.2f}".format(*self.ratio)
        yield "encoded size {0} to {2} bytes, median {1}".format(*self.size)
        ends = self.classes[0][0], self.classes[-1][0]
        spread = summary(np.array(counts))
        yield "samples of a class {0} to {2}, median {1}; classes {3!r} to {4!r}".format(*spread, *ends)
        yield from in_words(self.findings)


@dataclass(frozen=True)
class Report:
    """A data set. findings: those that concern no single split."""

    path: str
    kind: str
    splits: Sequence[Split]
    findings: Sequence[Finding]

    @property
    def ok(self) -> bool:
        """Whether nothing was found that would change a training."""
        return not any(finding.serious for finding in self.all_findings())

    def all_findings(self) -> Iterator[Finding]:
        """Those of the data set, then those of each split."""
        yield from self.findings
        for split in self.splits:
            yield from split.findings

    def lines(self) -> Iterator[str]:
        """What concerns no single split, and whether anything would change a training."""
        yield from in_words(self.findings)
        serious = sum(max(len(finding.entries), 1) for finding in self.all_findings() if finding.serious)
        yield f"found that would change a training: {serious}" if serious else "nothing would change a training"

    def facts(self) -> dict[str, Any]:
        """Everything but pictures, for JSON."""
        return {
            "path": self.path,
            "kind": self.kind,
            "ok": self.ok,
            "findings": [asdict(finding) for finding in self.findings],
            "splits": [
                {
                    "name": split.name,
                    "samples": split.samples,
                    "classes": dict(split.classes),
                    "formats": dict(split.formats),
                    "decoders": dict(split.decoders),
                    **{key: summarised(getattr(split, key)) for key in ("side", "ratio", "size")},
                    "odd": dict(split.odd),
                    "findings": [asdict(finding) for finding in split.findings],
                }
                for split in self.splits
            ],
        }


def split_of(name: str, source: NamedSource, found: Samples) -> Split:
    """What is to be said of one split."""
    labels = np.fromiter(map(source.label, range(len(source))), np.int64, len(source))
    counts = np.bincount(labels, minlength=len(source.classes)).tolist()
    classes = list(zip(source.classes, counts, strict=True))
    usable, odd = found.usable, _by_kind(found.odd)
    return Split(
        name=name,
        samples=len(source),
        classes=classes,
        formats=dict(found.formats.most_common()),
        decoders=dict(found.decoders.most_common()),
        side=summary(np.minimum(usable["width"], usable["height"])),
        ratio=summary(usable["width"] / np.maximum(usable["height"], 1)),
        size=summary(usable["size"]),
        findings=[*_of_samples(source, found, labels), *_of_classes(classes)],
        odd={kind: len(some) for kind, some in odd.items()},
        sheet=[(source.path(one.index), one) for one in found.odd if one.jpeg],
        widths=usable["width"],
        heights=usable["height"],
    )


def across(splits: Sequence[tuple[str, NamedSource, Samples]]) -> list[Finding]:
    """Pictures that are in several splits: a held-out score is then not one of unseen pictures."""
    findings = []
    for at, (name, source, found) in enumerate(splits):
        for other, others, seen in splits[at + 1 :]:
            pairs = _in_both(found, seen)
            if pairs:
                entries = [f"{source.path(i)} = {others.path(j)}" for i, j in pairs]
                text = f"the same picture in {name} and in {other}, so that a score is not one of unseen pictures"
                findings.append(Finding(text, entries, serious=True))
    return findings


def refusal(error: Exception) -> Finding:
    """What training says where it does not begin."""
    first, *rest = str(error).splitlines()
    return Finding(f"training refuses this: {first}", rest, serious=True)


def in_words(findings: Sequence[Finding]) -> Iterator[str]:
    """Findings as lines. Of those that change no training, the first entries."""
    for finding in findings:
        if not finding.entries:
            yield finding.text
            continue
        shown = finding.entries if finding.serious else finding.entries[:_LISTED]
        yield f"{finding.text} ({len(finding.entries)}):"
        yield from (f"  {entry}" for entry in shown)
        if len(shown) < len(finding.entries):
            yield f"  and {len(finding.entries) - len(shown)} more"


def summary(values: NDArray[np.generic]) -> tuple[Any, Any, Any]:
    """(smallest, median, largest), zeros of nothing; the median of integers is one."""
    if not len(values):
        return 0, 0, 0
    kind = int if np.issubdtype(values.dtype, np.integer) else float
    return kind(values.min()), kind(np.median(values)), kind(values.max())


def summarised(three: tuple[Any, Any, Any]) -> dict[str, Any]:
    """A summary by name."""
    return dict(zip(("smallest", "median", "largest"), three, strict=True))


def _of_samples(source: NamedSource, found: Samples, labels: NDArray[np.int64]) -> Iterator[Finding]:
    groups = _equal(found)
    torn = [group for group in groups if len(set(labels[group].tolist())) > 1]
    if torn:
        entries = [" = ".join(f"{source.path(i)} ({source.classes[labels[i]]})" for i in group) for group in torn]
        yield Finding("the same picture under different classes", entries, serious=True)
    same = [group for group in groups if len(set(labels[group].tolist())) == 1]
    if same:
        yield Finding("the same picture more than once", [" = ".join(map(source.path, group)) for group in same])
    for kind, some in _by_kind(found.odd).items():
        yield Finding(f"odd, but read: {kind}", [f"{source.path(one.index)} (by {one.decoder})" for one in some])
    yield from _left_out(getattr(source, "left_out", {}))
    bad = [*source.skipped, *((source.path(i), reason) for i, reason in found.bad)]
    if bad:
        yield Finding("cannot be used", [f"{path}: {reason}" for path, reason in bad], serious=True)


def _left_out(counts: Mapping[str, int]) -> Iterator[Finding]:
    """What the reader passed over, by extension or name: pictures that it does not take, and the rest."""
    known = {*Image.registered_extensions(), *_PICTURES}
    for serious in (True, False):
        entries = [f"{count} {name}" for name, count in counts.items() if (name in known) == serious]
        if entries:
            what = "pictures that are not read" if serious else "entries that are no pictures"
            yield Finding(f"{what}, by extension or name", entries, serious)


def _of_classes(classes: Sequence[tuple[str, int]]) -> Iterator[Finding]:
    empty = [name for name, count in classes if not count]
    if empty:
        yield Finding("classes without a sample", empty)
    spelt: dict[str, list[str]] = {}
    for name, _ in classes:
        spelt.setdefault(name.casefold(), []).append(name)
    alike = [" = ".join(map(repr, names)) for names in spelt.values() if len(names) > 1]
    if alike:
        yield Finding("classes whose names differ in capitals alone", alike)
    (fewest, small), (most, large) = (choose(classes, key=lambda one: one[1]) for choose in (min, max))
    if large >= _UNBALANCED * max(small, 1):
        yield Finding(f"classes are not balanced: {most!r} has {large} samples, {fewest!r} has {small}")


def _by_kind(odd: Sequence[Odd]) -> dict[str, list[Odd]]:
    kinds: dict[str, list[Odd]] = {}
    for one in odd:
        for kind in one.kinds:
            kinds.setdefault(kind, []).append(one)
    return kinds


def _equal(found: Samples) -> list[NDArray[np.int64]]:
    """Groups of numbers of usable samples with equal digests, in order of their first member."""
    usable = np.flatnonzero(found.facts["width"] > 0)
    _, group, counts = np.unique(found.facts["digest"][usable], return_inverse=True, return_counts=True)
    order = np.argsort(group, kind="stable")
    groups = np.split(usable[order], np.cumsum(counts)[:-1])
    return sorted((members for members in groups if len(members) > 1), key=lambda members: members[0])


def _in_both(found: Samples, other: Samples) -> list[tuple[int, int]]:
    """Numbers of equal samples, the first of each in either; a picture once."""
    first, second = (
        dict(reversed([(digest, i) for i, digest in enumerate(one.facts["digest"].tolist()) if digest]))
        for one in (found, other)
    )
    return [(i, second[digest]) for digest, i in first.items() if digest in second][::-1]
