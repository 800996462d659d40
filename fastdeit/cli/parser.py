"""What every verb of the command line is made of: its parser, and the errors of its arguments."""

import argparse
import json
from collections.abc import Callable
from typing import Any, NoReturn

from fastdeit.errors import UsageError
from fastdeit.text import did_you_mean


class Parser(argparse.ArgumentParser):
    """argparse, raising UsageError instead of exiting, and with a guess at what an unknown flag was meant to be."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        action = super().add_argument(*names, **options)
        self.flags = [*getattr(self, "flags", []), *action.option_strings]
        return action

    def parse(self, argv: list[str]) -> argparse.Namespace:
        """The arguments in `argv`. Raises UsageError for a flag or a word that the verb does not know."""
        # Intermixed: recipe, overrides and flags come in any order.
        args, unknown = self.parse_known_intermixed_args(argv)
        if unknown:
            if not unknown[0].startswith("-"):
                self.error(f"unexpected argument {unknown[0]!r}")
            flag = unknown[0].split("=")[0]
            raise UsageError(
                f"{self.prog} has no flag {flag} (flags: {', '.join(self.flags)}){did_you_mean(flag, self.flags)}"
            )
        return args

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


class Verb:
    """One verb: its parser and what it runs. `run(args, argv)` returns an exit code, None for 0."""

    def __init__(
        self, name: str, help: str, usage: str, run: Callable[[argparse.Namespace, list[str]], int | None]
    ) -> None:
        self.help = help
        self.run = run
        self.parser = Parser(prog=f"fastdeit {name}", usage=f"fastdeit {name} {usage}", description=help)

    def parse(self, argv: list[str]) -> argparse.Namespace:
        """Arguments of the verb. Positionals with '=' become `overrides`, and so does `--data DIR`: data.root=DIR."""
        args = self.parser.parse(argv)
        if "words" in args:
            words = args.words
            args.overrides = [word for word in words if "=" in word]
            args.words = [word for word in words if "=" not in word]
            if getattr(args, "data", None) is not None:
                # In YAML's quotes: the name of a folder may be a number, or have a colon, a hash or a line break in it.
                args.overrides.append(f"data.root={json.dumps(args.data)}")
        return args


def one(words: list[str], what: str) -> str | None:
    """The only word of `words`, None where there is none. Raises UsageError for more than one."""
    if len(words) > 1:
        raise UsageError(f"expected one {what} and section.field=value overrides, got {' '.join(words)}")
    return words[0] if words else None


def positive(text: str) -> int:
    """The number in `text`, at least 1 and of at most 64 bits; a `type` of argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    if value >= 2**63:
        raise argparse.ArgumentTypeError(f"a number of {len(str(value))} digits does not fit 64 bits")
    return value


positive.__name__ = "int"  # argparse names the type in its message


def add_recipe(verb: Verb) -> None:
    """The arguments that name a recipe: RECIPE, overrides and `--data`."""
    add = verb.parser.add_argument
    add("words", nargs="*", metavar="RECIPE", help="name of a recipe or a YAML file, and overrides")
    add("--data", metavar="DIR", help="the data set's folder; short for data.root=DIR")
