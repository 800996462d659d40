"""YAML in which every value keeps its place, and a list of everything found wrong with it.

A recipe must be what it looks like: the document is read as the parser's events, never as Python objects, and tags,
anchors, aliases, directives, repeated keys and second documents are refused. Types are YAML 1.2's, as ruamel.yaml
resolves them: `5e-4` is a number, `no` is a word.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import AliasEvent, DocumentStartEvent, ScalarEvent, SequenceStartEvent
from ruamel.yaml.nodes import ScalarNode

MAX_DEPTH = 20

# ---- problems and places ---------------------------------------------------------------------------------------------

FieldPath = tuple[str | int, ...]


class Place(NamedTuple):
    """Where something was written: a file and a line counted from 1, or an override (line 0)."""

    source: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" if self.line else self.source


NOWHERE = Place("")
"""Of mappings that nobody wrote, such as the section around an overridden field."""


@dataclass(frozen=True)
class Item:
    """A YAML value with its place: a scalar, a list of items, or a dict of items."""

    value: Any
    place: Place


class Problems:
    """Everything found wrong, until it is raised at once."""

    def __init__(self) -> None:
        self.found: list[tuple[Place, str]] = []
        self._unread: set[FieldPath] = set()
        self.incomplete = False
        """The base could not be read: what is absent may stand there."""

    def add(self, place: Place, path: FieldPath, problem: str) -> None:
        field = dotted(path)
        self.found.append((place, f"{field}: {problem}" if field else problem))

    def skip(self, path: FieldPath) -> None:
        """The value at `path` could not be read; that is reported, so nothing more is to be said of it."""
        if path:
            self._unread.add(path)

    def skips(self, path: FieldPath) -> bool:
        return any(path[:length] in self._unread for length in range(1, len(path) + 1))

    def text(self) -> str:
        """One line per problem, in the order of the files' lines."""
        return "\n".join(dict.fromkeys(f"{place}: {problem}" for place, problem in sorted(self.found)))

    def skips_within(self, path: FieldPath) -> bool:
        return any(unread[: len(path)] == path for unread in self._unread)


class _Stop(Exception):
    """Reading cannot go on behind this; the problem is already recorded."""


def dotted(path: FieldPath) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")


def shown(value: Any) -> str:
    """A value as a person would write it, cut where it gets long."""
    if isinstance(value, dict):
        return "a mapping"
    written = repr(value) if isinstance(value, str) else json.dumps(value)
    return shorter(written)


def shorter(written: str) -> str:
    return written if len(written) <= 60 else f"{written[:57]}..."


def meant(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    close = get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f"; did you mean {close[0]!r}?" if close else ""


# ---- reading YAML ----------------------------------------------------------------------------------------------------


class Reader:
    """One YAML document as an `Item`, from the parser's events.

    Refused, because a recipe must be what it looks like: tags, anchors, aliases, directives, repeated keys, several
    documents. `line_numbers=False` is for overrides, which are one line.
    """

    def __init__(
        self, text: str, source: str, problems: Problems, line_numbers: bool = True, path: FieldPath = ()
    ) -> None:
        self.text, self.source, self.problems, self.line_numbers, self.path = text, source, problems, line_numbers, path
        self.yaml = YAML(typ="safe", pure=True)

    def document(self) -> Item | None:
        """The document, or None when it cannot be read (recorded among the problems)."""
        try:
            return self._document()
        except _Stop:
            pass
        except MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            self.problems.add(self._place(mark), self.path, f"is not valid YAML: {error.problem or error.context}")
        except YAMLError as error:
            # Characters that YAML does not allow: an offset, and no line.
            offset = getattr(error, "position", 0) or 0
            line = self.text.count("\n", 0, offset) + 1 if self.line_numbers else 0
            reason = getattr(error, "reason", None) or str(error).splitlines()[0]
            self.problems.add(Place(self.source, line), self.path, f"is not valid YAML: {reason}")
        self.problems.skip(self.path)
        return None

    def _document(self) -> Item | None:
        self.events = self.yaml.parse(self.text)
        next(self.events)  # start of the stream
        start = next(self.events)
        if not isinstance(start, DocumentStartEvent):
            return Item(None, Place(self.source, 1 if self.line_numbers else 0))
        if start.version or start.tags:
            self._refuse(start, self.path, "YAML directives (%), as before this line, are not allowed")
            raise _Stop
        item = self._item(next(self.events), self.path)
        next(self.events)  # end of the document
        after = next(self.events)
        if isinstance(after, DocumentStartEvent):
            self._refuse(after, self.path, "a recipe is one YAML document; a second one starts here")
        return item

    def _item(self, event: Any, path: FieldPath) -> Item | None:
        """The value that starts with `event`; None for one that was refused."""
        if len(path) - len(self.path) > MAX_DEPTH:
            self._refuse(event, path, f"is nested deeper than {MAX_DEPTH} levels")
            raise _Stop
        if isinstance(event, AliasEvent):
            self._refuse(event, path, f"aliases are not allowed (*{event.anchor}); write the value out")
            return None
        if event.anchor is not None:
            self._refuse(event, path, f"anchors are not allowed (&{event.anchor}); write the value where it is used")
        if event.tag is not None:
            self._refuse(event, path, f"tags are not allowed ({event.tag})")
        place = self._place(event.start_mark)
        if isinstance(event, ScalarEvent):
            return self._scalar(event, place, path)
        if isinstance(event, SequenceStartEvent):
            entries = [self._item(entry, (*path, index)) for index, entry in enumerate(self._until_end())]
            if None in entries:
                self.problems.skip(path)
                return None
            return Item(entries, place)
        return self._mapping(place, path)

    def _until_end(self) -> Iterator[Any]:
        """Events of this collection's entries; the consumer takes what belongs to an entry itself."""
        for event in self.events:
            if type(event).__name__ in ("SequenceEndEvent", "MappingEndEvent"):
                return
            yield event

    def _mapping(self, place: Place, path: FieldPath) -> Item:
        entries: dict[str, Item] = {}
        lines: dict[str, int] = {}
        for event in self._until_end():
            at = self._place(event.start_mark)
            key = self._key(event, path)
            value = self._item(next(self.events), (*path, key or "?"))
            if key is None:
                continue
            if key in lines:
                first = f", first on line {lines[key]}" if self.line_numbers else ""
                self.problems.add(at, (*path, key), f"is given twice{first}")
                continue
            lines[key] = at.line
            if value is not None:
                # The line of the key: what a reader looks for when the value starts further down.
                entries[key] = Item(value.value, at)
        return Item(entries, place)

    def _key(self, event: Any, path: FieldPath) -> str | None:
        """A field name; None, and a problem, for anything else in its place."""
        item = self._item(event, (*path, "?"))
        if item is None or isinstance(item.value, str):
            return item and item.value
        self.problems.add(item.place, path, f"field names must be text, got {shown(plain(item))}")
        return None

    def _scalar(self, event: Any, place: Place, path: FieldPath) -> Item | None:
        tag = str(self.yaml.resolver.resolve(ScalarNode, event.value, event.implicit)).rpartition(":")[2]
        value: Any = event.value
        try:
            if tag == "null":
                value = None
            elif tag in ("bool", "int", "float"):
                construct = getattr(self.yaml.constructor, f"construct_yaml_{tag}")
                value = construct(ScalarNode(f"tag:yaml.org,2002:{tag}", event.value))
        except ValueError:
            return self._refuse(event, path, f"is a number of more digits than Python reads, {shorter(event.value)}")
        if isinstance(value, float) and not abs(value) < float("inf"):
            return self._refuse(event, path, f"must be a finite number, got {event.value}")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            return self._refuse(event, path, f"must fit 64 bits, got {shorter(event.value)}")
        if isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):
            return self._refuse(event, path, f"must be Unicode text, got {shown(value)}")
        return Item(value, place)

    def _refuse(self, event: Any, path: FieldPath, problem: str) -> None:
        self.problems.add(self._place(event.start_mark), path, problem)
        self.problems.skip(path)

    def _place(self, mark: Any) -> Place:
        return Place(self.source, mark.line + 1 if self.line_numbers and mark is not None else 0)


def plain(item: Item) -> Any:
    if isinstance(item.value, dict):
        return {key: plain(inner) for key, inner in item.value.items()}
    if isinstance(item.value, list):
        return [plain(inner) for inner in item.value]
    return item.value


def as_item(value: Any, place: Place) -> Item:
    if isinstance(value, dict):
        return Item({key: as_item(inner, place) for key, inner in value.items()}, place)
    if isinstance(value, list):
        return Item([as_item(inner, place) for inner in value], place)
    return Item(value, place)
