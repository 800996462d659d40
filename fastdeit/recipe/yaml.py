"""YAML in which every value keeps the file and line it stands in, and a list of everything found wrong with it.

A recipe must be what it looks like: the document is read as the parser's events, never as Python objects, and tags,
anchors, aliases, directives, repeated keys and second documents are refused. Types are YAML 1.2's, as ruamel.yaml
resolves them: `5e-4` is a number, `no` is a word.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    CollectionEndEvent,
    DocumentStartEvent,
    Event,
    ScalarEvent,
    SequenceStartEvent,
)
from ruamel.yaml.nodes import ScalarNode

from fastdeit.text import one_line, shorten

MAX_DEPTH = 20
MAX_VALUES = 25_000
"""Names, values and sections of a document: a recipe has a few hundred, and the 21,841 weights of ImageNet-21k's
classes in `method.class_weights` at most."""
MAX_SHOWN = 50
"""Problems that are told; of more, how many there are."""
MAX_TOLD = 2000
"""Characters of a problem that are told."""
_OF_A_VALUE = 60

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

    def __str__(self) -> str:
        return format_value(plain(self))

    def without(self, *keys: str) -> "Item":
        """A mapping without these fields; anything else as it is."""
        if not isinstance(self.value, dict):
            return self
        return Item({key: item for key, item in self.value.items() if key not in keys}, self.place)


class Problems:
    """Everything found wrong, until it is raised at once."""

    def __init__(self) -> None:
        self.found: list[tuple[Place, str]] = []
        self._unreadable: set[FieldPath] = set()
        self.incomplete = False
        """The base could not be read: what is absent may stand there."""

    def add(self, place: Place, path: FieldPath, problem: str) -> None:
        """Record a problem of the field at `path`, which stands at `place`."""
        field = dotted(path)
        self.found.append((place, shorten(f"{field}: {problem}" if field else problem, MAX_TOLD)))

    def mark_unreadable(self, path: FieldPath) -> None:
        """Say no more of the value at `path`: it could not be read, and that is among the problems."""
        if path:
            self._unreadable.add(path)

    def is_unreadable(self, path: FieldPath) -> bool:
        """Whether the value at `path`, or one around it, could not be read."""
        return any(path[:length] in self._unreadable for length in range(1, len(path) + 1))

    def has_unreadable(self, path: FieldPath) -> bool:
        """Whether the value at `path`, or one inside it, could not be read."""
        return any(unreadable[: len(path)] == path for unreadable in self._unreadable)

    def text(self) -> str:
        """One line per problem, in the order of the files' lines."""
        told = list(dict.fromkeys(one_line(f"{place}: {problem}") for place, problem in sorted(self.found)))
        more = len(told) - MAX_SHOWN
        return "\n".join(told[:MAX_SHOWN] + [f"and {more} more problems"] * (more > 0))


class _Stop(Exception):
    """Reading cannot go on behind this; the problem is already recorded."""


def dotted(path: FieldPath) -> str:
    """A path as people write it: `optim.betas[0]`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")


def format_value(value: Any) -> str:
    """A value as a person would write it, cut off where it gets long."""
    if isinstance(value, dict):
        return "a mapping"
    return shorten(repr(value) if isinstance(value, str) else json.dumps(value), _OF_A_VALUE)


# ---- reading YAML ----------------------------------------------------------------------------------------------------


class Reader:
    """One YAML document as an `Item`, from the parser's events and their marks.

    The parser's events and not the documents of its loaders, because those resolve aliases, recurse and stop at the
    first mistake. `line_numbers=False` is for overrides, which are one line; `path` is where their value belongs.
    """

    def __init__(
        self, text: str, source: str, problems: Problems, line_numbers: bool = True, path: FieldPath = ()
    ) -> None:
        self.text, self.source, self.problems, self.line_numbers, self.path = text, source, problems, line_numbers, path
        self.yaml = YAML(typ="safe", pure=True)
        self.values = 0

    def document(self) -> Item | None:
        """The document, or None when it cannot be read (recorded among the problems)."""
        try:
            return self._document()
        except _Stop:
            pass
        except MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line, reason = mark.line if mark else -1, error.problem or error.context
            self.problems.add(self._place(line), self.path, f"is not valid YAML: {reason}")
        except YAMLError as error:
            # Characters that YAML does not allow: an offset, and no line.
            line = self.text.count("\n", 0, getattr(error, "position", 0) or 0)
            reason = getattr(error, "reason", None) or str(error).splitlines()[0]
            self.problems.add(self._place(line), self.path, f"is not valid YAML: {reason}")
        self.problems.mark_unreadable(self.path)
        return None

    def _document(self) -> Item | None:
        self.events = self.yaml.parse(self.text)
        next(self.events)  # start of the stream
        start = next(self.events)
        if not isinstance(start, DocumentStartEvent):
            return Item(None, self._place(0))
        if start.version or start.tags:
            self._refuse(start, self.path, "YAML directives (%), as before this line, are not allowed")
            raise _Stop
        item = self._item(next(self.events), self.path)
        next(self.events)  # end of the document
        after = next(self.events)
        if isinstance(after, DocumentStartEvent):
            self._refuse(after, self.path, "a recipe is one YAML document; a second one starts here")
        return item

    def _item(self, event: Event, path: FieldPath) -> Item | None:
        """The value that starts with `event`; None for one that was refused."""
        if len(path) - len(self.path) > MAX_DEPTH:
            self._refuse(event, path, f"is nested deeper than {MAX_DEPTH} levels")
            raise _Stop
        self.values += 1
        if self.values > MAX_VALUES:
            self._refuse(event, self.path, f"has more than {MAX_VALUES} names and values, which no recipe needs")
            raise _Stop
        if isinstance(event, AliasEvent):
            self._refuse(event, path, f"aliases are not allowed (*{event.anchor}); write the value out")
            return None
        if event.anchor is not None:
            self._refuse(event, path, f"anchors are not allowed (&{event.anchor}); write the value where it is used")
        if event.tag is not None:
            self._refuse(event, path, f"tags are not allowed ({event.tag})")
        if isinstance(event, ScalarEvent):
            return self._scalar(event, path)
        place = self._place(event.start_mark.line)
        if not isinstance(event, SequenceStartEvent):
            return Item(self._mapping(path), place)
        entries = [self._item(entry, (*path, index)) for index, entry in enumerate(self._until_end())]
        if None in entries:
            self.problems.mark_unreadable(path)
            return None
        return Item(entries, place)

    def _until_end(self) -> Iterator[Event]:
        """Events of this collection's entries; the consumer takes what belongs to an entry itself."""
        return takewhile(lambda event: not isinstance(event, CollectionEndEvent), self.events)

    def _mapping(self, path: FieldPath) -> dict[str, Item]:
        entries: dict[str, Item] = {}
        places: dict[str, Place] = {}
        for event in self._until_end():
            place = self._place(event.start_mark.line)
            key = self._key(event, path)
            value = self._item(next(self.events), (*path, key or "?"))
            if key in places:
                first = f", first on line {places[key].line}" if self.line_numbers else ""
                self.problems.add(place, (*path, key), f"is given twice{first}")
            elif key is not None:
                places[key] = place
                if value is not None:
                    # The line of the key: what a reader looks for when the value starts further down.
                    entries[key] = Item(value.value, place)
        return entries

    def _key(self, event: Event, path: FieldPath) -> str | None:
        """A field name; None, and a problem, for anything else in its place."""
        item = self._item(event, (*path, "?"))
        if item is None or isinstance(item.value, str):
            return item and item.value
        self.problems.add(item.place, path, f"field names must be text, got {item}")
        return None

    def _scalar(self, event: ScalarEvent, path: FieldPath) -> Item | None:
        tag = str(self.yaml.resolver.resolve(ScalarNode, event.value, event.implicit)).rpartition(":")[2]
        value: Any = event.value
        try:
            if tag == "null":
                value = None
            elif tag in ("bool", "int", "float"):
                construct = getattr(self.yaml.constructor, f"construct_yaml_{tag}")
                value = construct(ScalarNode(f"tag:yaml.org,2002:{tag}", event.value))
        except ValueError:
            return self._refuse(
                event, path, f"is a number of more digits than Python reads, {shorten(event.value, _OF_A_VALUE)}"
            )
        if isinstance(value, float) and not abs(value) < float("inf"):
            return self._refuse(event, path, f"must be a finite number, got {event.value}")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            return self._refuse(event, path, f"must fit 64 bits, got {shorten(event.value, _OF_A_VALUE)}")
        if isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):
            return self._refuse(event, path, f"must be Unicode text, got {format_value(value)}")
        return Item(value, self._place(event.start_mark.line))

    def _refuse(self, event: Event, path: FieldPath, problem: str) -> None:
        self.problems.add(self._place(event.start_mark.line), path, problem)
        self.problems.mark_unreadable(path)

    def _place(self, line: int) -> Place:
        """The line that ruamel.yaml counts from 0."""
        return Place(self.source, line + 1 if self.line_numbers else 0)


# ---- trees of items --------------------------------------------------------------------------------------------------


def plain(item: Item) -> Any:
    """The value without its places."""
    if isinstance(item.value, dict):
        return {key: plain(inner) for key, inner in item.value.items()}
    if isinstance(item.value, list):
        return [plain(inner) for inner in item.value]
    return item.value


def as_item(value: Any, place: Place) -> Item:
    """The value with `place` for every part of it."""
    if isinstance(value, dict):
        return Item({key: as_item(inner, place) for key, inner in value.items()}, place)
    if isinstance(value, list):
        return Item([as_item(inner, place) for inner in value], place)
    return Item(value, place)


def is_written(root: Item, path: FieldPath) -> bool:
    """Whether the tree has a value at `path`, whose indices of lists exist."""
    for part in path:
        if isinstance(part, str) and (not isinstance(root.value, dict) or part not in root.value):
            return False
        root = root.value[part]
    return True


def place_of(root: Item, path: FieldPath) -> Place:
    """Where the value at `path` stands, or else the innermost section around it that is written somewhere."""
    place = root.place
    for part in path:
        if isinstance(root.value, dict) and part not in root.value:
            return place
        root = root.value[part]
        place = root.place if root.place != NOWHERE else place
    inside = first_place(root)
    return place if inside == NOWHERE else inside


def first_place(item: Item) -> Place:
    """Place of the item, or that of the first field inside for a section that only overrides made."""
    while item.place == NOWHERE and isinstance(item.value, dict) and item.value:
        item = next(iter(item.value.values()))
    return item.place
