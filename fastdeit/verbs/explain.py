"""`fastdeit explain`: a field of a recipe in words."""

import argparse
import textwrap
from collections.abc import Iterator

from fastdeit.errors import UsageError
from fastdeit.recipe import describe, flags
from fastdeit.recipe.describe import Field
from fastdeit.text import did_you_mean

WIDTH = 100


def main(args: argparse.Namespace) -> None:
    """Print what `args.word` is: a field, a section, a flag of another script; for None, which sections there are."""
    print("\n".join(explained(args.word)))


def explained(word: str | None) -> Iterator[str]:
    """Lines about `word`. Raises UsageError for what is neither a field, nor a section, nor anybody's flag."""
    if word is None:
        for section in describe.SECTIONS:
            first = next(describe.tables(section))
            line = (
                "What is trained for: it depends on method.use"
                if section == "method"
                else _first_sentence(first.meaning)
            )
            yield f"{section:8} {line}"
        yield "\n`fastdeit explain SECTION` lists the fields of a section, `fastdeit explain SECTION.FIELD` tells more."
    elif word in describe.SECTIONS:
        yield from _section(word)
    elif (flag := flags.named(word)) is not None and "." not in word:
        yield f"{word}, in timm's or DeiT's training script: {flags.written(flag, '')}"
        yield ""
        yield from explained(flag.ours) if "." in flag.ours else [f"a flag of fastdeit train: {flag.ours}"]
    else:
        yield from _field(word)


def _section(section: str) -> Iterator[str]:
    for number, table in enumerate(describe.tables(section)):
        yield ("\n" if number else "") + (f"{section}, with {table.choice}" if table.choice else section)
        width = max(len(field.path) for field in table.fields)
        for field in table.fields:
            yield f"  {field.path:{width}}  {textwrap.shorten(_first_sentence(field.meaning), WIDTH - 20)}"


def _first_sentence(text: str) -> str:
    return " ".join(text.split()).partition("; ")[0].partition(". ")[0].removesuffix(".")


def _field(word: str) -> Iterator[str]:
    """About the field `word`, which may lack its section."""
    section = word.partition(".")[0]
    wanted = [section] if section in describe.SECTIONS else describe.SECTIONS
    known: dict[str, list[tuple[str, Field]]] = {}
    for name in wanted:
        for table in describe.tables(name):
            for field in table.fields:
                known.setdefault(field.path, []).append((table.choice, field))
    found = [path for path in known if _fits(word, path)]
    if not found:
        close = did_you_mean(word, known) or did_you_mean(word, describe.SECTIONS)
        hint = close or f"; the sections are {', '.join(describe.SECTIONS)}"
        raise UsageError(f"there is no field {word!r}{hint}")
    for number, path in enumerate(found):
        # What several methods or optimizers have alike is said once.
        alike: dict[Field, list[str]] = {}
        for choice, field in known[path]:
            alike.setdefault(field, []).append(choice)
        for field, choices in alike.items():
            yield from ([""] if number or field != next(iter(alike)) else [])
            yield from _about(field, [choice for choice in choices if choice])


def _fits(word: str, path: str) -> bool:
    """Whether `word` is the field's path, any name in the place of NAME, or the end of it."""
    names, given = path.split("."), word.split(".")
    if len(given) > len(names) or (len(given) > 1 and len(given) < len(names)):
        return False
    return all(name in (part, "NAME") for part, name in zip(given, names[-len(given) :], strict=True))


def _about(field: Field, choices: list[str]) -> Iterator[str]:
    yield field.path + (f", with {' or '.join(choices)}" if choices else "")
    yield from textwrap.wrap(field.meaning, WIDTH, initial_indent="  ", subsequent_indent="  ")
    rows = [("values", field.type), ("default", field.default)]
    rows += [("elsewhere", line) for line in flags.theirs(field.path)]
    for title, text in rows:
        yield f"  {title:9}  {text.replace('`', '')}"
