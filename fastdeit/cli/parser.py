"""What every verb of the command line is made of: its parser, and the errors of its arguments."""

import argparse
import json
import os
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any, NoReturn

from fastdeit import plugins
from fastdeit.errors import UsageError
from fastdeit.recipe import flags
from fastdeit.text import did_you_mean


class Parser(argparse.ArgumentParser):
    """argparse, raising UsageError instead of exiting, and with a guess at what an unknown flag was meant to be."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        action = super().add_argument(*names, **options)
        self.flags = [*getattr(self, "flags", []), *action.option_strings]
        return action

    def takes(self, argument: str) -> bool:
        """Whether there is an argument that is kept as `argument`."""
        return any(action.dest == argument for action in self._actions)

    def parse(self, argv: list[str]) -> argparse.Namespace:
        """The arguments in `argv`. Raises UsageError for a flag or a word that the verb does not know."""
        # Before argparse, which would rather name an argument that is missing.
        for word in takewhile(lambda word: word != "--", argv):
            if word.startswith("--") and word.partition("=")[0] not in self.flags:
                raise UsageError(self._no_flag(word, argv))
        # Intermixed: recipe, overrides and flags come in any order.
        args, unknown = self.parse_known_intermixed_args(argv)
        if unknown:
            if not unknown[0].startswith("-"):
                self.error(f"unexpected argument {unknown[0]!r}")
            raise UsageError(self._no_flag(unknown[0], argv))
        return args

    def _no_flag(self, given: str, argv: list[str]) -> str:
        """What to say of the unknown flag `given`, which may be `--flag=value`."""
        flag, equals, value = given.partition("=")
        if not equals:
            after = argv[argv.index(given) + 1 :][:1]
            value = next((word for word in after if not word.startswith("-") and "=" not in word), "")
        if self.takes("overrides") or self.takes("words"):
            hint = flags.typed_instead(flag, value)
            if hint is not None:
                return f"{self.prog} has no flag {flag}; {hint}"
        return f"{self.prog} has no flag {flag} (flags: {', '.join(self.flags)}){did_you_mean(flag, self.flags)}"

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


class Verb:
    """One verb: its parser and what it runs. `run(args, argv)` returns an exit code, None for 0.

    help      one line, for the list of verbs
    usage     what follows the verb's name on a command line, every flag included
    examples  whole command lines, most with what they do behind a `#`
    """

    def __init__(
        self,
        name: str,
        help: str,
        usage: str,
        run: Callable[[argparse.Namespace, list[str]], int | None],
        *,
        examples: Sequence[str] = (),
    ) -> None:
        self.name, self.help, self.run = name, help, run
        self.examples = tuple(examples)
        self.parser = Parser(
            prog=f"fastdeit {name}",
            usage=f"fastdeit {name} {usage}".rstrip(),
            description=help,
            epilog="\n".join(["examples:", *(f"  {example}" for example in examples)]) if examples else None,
        )

    def parse(self, argv: list[str]) -> argparse.Namespace:
        """Arguments of the verb. Overrides among the positionals become `overrides`, and so does `--data DIR`:
        data.root=DIR. `--trust` holds from here on."""
        args = self.parser.parse(argv)
        if getattr(args, "trust", False):
            plugins.trust()
        if "words" in args:
            words = args.words
            args.overrides = [word for word in words if is_override(word)]
            args.words = [path(word) for word in words if not is_override(word)]
            if getattr(args, "data", None) is not None:
                # In YAML's quotes: the name of a folder may be a number, or have a colon or a hash in it.
                args.overrides.append(f"data.root={json.dumps(args.data)}")
        return args


def add_overlays(parser: argparse.ArgumentParser) -> None:
    """The flag `--as NAME`, which may be repeated."""
    parser.add_argument(
        "--as",
        dest="overlays",
        action="append",
        default=[],
        metavar="NAME",
        help="apply a named group of settings to the recipe: public-code (all settings as in the public code), "
        "augreg-none to augreg-strong2, augreg-regularised",
    )


def add_trust(parser: argparse.ArgumentParser) -> None:
    """The flag `--trust`, of every verb that opens a run or weights."""
    parser.add_argument(
        "--trust",
        action="store_true",
        help="execute the code that a run or a file of weights names (a method, model, optimizer or reader of somebody "
        "else's); without it only what your own recipe or overrides name",
    )


def lay_over(args: argparse.Namespace, recipe: str, *, say: bool = False) -> None:
    """Add what `--data` implies to the command's own overrides, and put before them what `--as` stands for in the
    recipe: they win over that.

    say  print a line for each field that `--as` changes, once for all processes
    """
    if getattr(args, "data", None) is not None:
        from fastdeit.launch import launch
        from fastdeit.verbs import data

        args.overrides += data.implied(recipe, args.overrides, args.data, launch.told_by_launcher())
    if getattr(args, "overlays", None):
        from fastdeit.recipe import overlays

        if say and "RANK" not in os.environ:
            for line in overlays.differences(recipe, args.overlays, args.overrides):
                print(line, flush=True)
        args.overrides = [*overlays.overrides(recipe, args.overlays, args.overrides), *args.overrides]


def is_override(word: str) -> bool:
    """Whether `word` is `section.field=value`. The path `a/b=c` is none, and neither is the address `run@step=5`."""
    field, equals, _ = word.partition("=")
    return bool(equals) and not {"/", "@"} & set(field)


def one(words: list[str], what: str) -> str | None:
    """The only word of `words`, None where there is none. Raises UsageError for more than one."""
    if len(words) > 1:
        raise UsageError(f"expected one {what} and section.field=value overrides, got {' '.join(words)}")
    return words[0] if words else None


def required(words: list[str], what: str, otherwise: str) -> str:
    """The only word of `words`. Raises UsageError with the message `otherwise` where there is none, and for more."""
    word = one(words, what)
    if word is None:
        raise UsageError(otherwise)
    return word


def path(text: str) -> str:
    """A path with `~` for the home folder, which shells leave alone in `--flag=~/x`; a `type` of argparse.

    Raises UsageError for what no file system has.
    """
    if not text or "\0" in text or any(len(os.fsencode(part)) > _LONGEST_NAME for part in text.split("/")):
        shown = text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"
        raise UsageError(f"{shown!r} cannot be the name of a file or folder")
    return os.path.expanduser(text)


_LONGEST_NAME = 255  # bytes, on Linux


def positive(text: str) -> int:
    """The number in `text`, at least 1 and of at most 64 bits; a `type` of argparse."""
    value = natural(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


def natural(text: str) -> int:
    """The number in `text`, at least 0 and of at most 64 bits; a `type` of argparse."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    if value >= 2**63:
        raise argparse.ArgumentTypeError(f"a number of {len(str(value))} digits does not fit 64 bits")
    return value


positive.__name__ = natural.__name__ = "int"  # argparse names the type in its message


def add_recipe(verb: Verb, metavar: str = "RECIPE", what: str = "name of a recipe or a YAML file") -> None:
    """The arguments that name `what` has a recipe: a word, overrides and `--data`."""
    add = verb.parser.add_argument
    add("words", nargs="*", metavar=metavar, help=f"{what}, and overrides")
    add("--data", type=path, metavar="DIR", help="the data set's folder; short for data.root=DIR")
