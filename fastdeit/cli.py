"""The command line: `fastdeit VERB ...`.

Every verb is a parser here and a function elsewhere, imported when the verb runs: `fastdeit --help` costs no torch.
Whatever goes wrong ends in an exit code that scripts can rely on (`exit_code`) and, where a person can do something
about it, in one message instead of a traceback.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

from fastdeit import __version__
from fastdeit.errors import FastdeitError, Interrupted, NonFiniteError, UsageError

DEFAULT_RECIPE = "digits"
IMAGENET_EXAMPLE = "fastdeit train deit_small_distilled --data /path/to/imagenet --nproc 8"

# The layers below define their own exceptions; named here, not imported, because importing them would import torch.
# They mean that something the user gave cannot be worked with; train turns those of a running loop into FastdeitError.
_EXIT_CODES = {
    ("fastdeit.recipe", "RecipeError"): UsageError.exit_code,
    ("fastdeit.data.source", "DataError"): UsageError.exit_code,
    ("fastdeit.engine.checkpoint", "CheckpointError"): UsageError.exit_code,
    ("fastdeit.engine.dist", "DeviceError"): UsageError.exit_code,
}
# Every rank comes to these together, so that rank 0 can speak for all.
_COMMON_CODES = {UsageError.exit_code, NonFiniteError.exit_code, Interrupted.exit_code}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: that of the process) and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(argv)
    except SystemExit as stop:  # argparse, after --help or --version
        return int(stop.code or 0)
    except KeyboardInterrupt:
        print("fastdeit: interrupted", file=sys.stderr)
        return FastdeitError.exit_code
    except Exception as error:
        return _report(error)


def exit_code(error: BaseException) -> int | None:
    """Exit code of an error with a message for the user; None for any other, whose traceback is needed."""
    if isinstance(error, FastdeitError):
        return error.exit_code
    return next(
        (code for cls in type(error).__mro__ if (code := _EXIT_CODES.get((cls.__module__, cls.__qualname__)))), None
    )


def _report(error: Exception) -> int:
    code = exit_code(error)
    rank = os.environ.get("RANK", "0")
    if code not in _COMMON_CODES or rank == "0":
        who = "fastdeit" if rank == "0" else f"fastdeit: rank {rank}"
        if code is None:
            traceback.print_exception(error)
        message = str(error) if code is not None else f"failed with {type(error).__name__}, see above"
        print("\n".join(f"{who}: {line}" for line in message.splitlines() or [type(error).__name__]), file=sys.stderr)
    return FastdeitError.exit_code if code is None else code


def _dispatch(argv: list[str]) -> int:
    top = _Parser(
        prog="fastdeit",
        usage="fastdeit VERB ...",
        description="Train DeiT-family vision transformers fast, and get the same result every time.",
        epilog="verbs:\n" + "\n".join(f"  {name:9} {verb.help}" for name, verb in VERBS.items()) + "\n\n"
        "`fastdeit VERB --help` explains a verb. Exit codes: 0 done, 1 failed, 2 bad usage or configuration,\n"
        "3 stopped on non-finite losses, 75 interrupted and saved (run the same command with --resume).",
    )
    top.add_argument("--version", action="version", version=f"fastdeit {__version__}")
    if not argv or argv[0].startswith("-"):
        top.parse(argv)
        top.print_help(sys.stderr)
        return UsageError.exit_code
    if argv[0] not in VERBS:
        raise UsageError(f"there is no verb {argv[0]!r} (verbs: {', '.join(VERBS)}){did_you_mean(argv[0], VERBS)}")
    verb = VERBS[argv[0]]
    return verb.run(verb.parse(argv[1:]), argv) or 0


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'train'?` when one of `known` is close to `word`, else nothing."""
    from difflib import get_close_matches

    close = get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


class _Parser(argparse.ArgumentParser):
    """argparse, raising UsageError instead of exiting, and with a guess at what an unknown flag was meant to be."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        action = super().add_argument(*names, **options)
        self.flags = [*getattr(self, "flags", []), *action.option_strings]
        return action

    def parse(self, argv: list[str]) -> argparse.Namespace:
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
        self.parser = _Parser(prog=f"fastdeit {name}", usage=f"fastdeit {name} {usage}", description=help)

    def parse(self, argv: list[str]) -> argparse.Namespace:
        """Arguments of the verb. Positionals with '=' become `overrides`, and so does `--data DIR`: data.root=DIR."""
        args = self.parser.parse(argv)
        if "words" in args:
            words = args.words
            args.overrides = [word for word in words if "=" in word]
            args.words = [word for word in words if "=" not in word]
            if args.data is not None:
                args.overrides.append(f"data.root={args.data}")
        return args


def _one(words: list[str], what: str) -> str | None:
    if len(words) > 1:
        raise UsageError(f"expected one {what} and section.field=value overrides, got {' '.join(words)}")
    return words[0] if words else None


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    return value


_positive.__name__ = "int"  # argparse names the type in its message


def _train(args: argparse.Namespace, argv: list[str]) -> int:
    from fastdeit import launch

    with launch.process_of_a_run():
        args.recipe = _one(args.words, "recipe") or DEFAULT_RECIPE
        if "RANK" not in os.environ:
            if not args.words:
                print(
                    f"no recipe named: training {DEFAULT_RECIPE!r}, which needs no data. ImageNet: {IMAGENET_EXAMPLE}",
                    flush=True,
                )
            from fastdeit import recipe

            # Before any worker exists, so that a mistake is reported at once, and once.
            recipe.load(args.recipe, args.overrides)
        return launch.run(args, argv)


def _eval(args: argparse.Namespace, argv: list[str]) -> None:
    args.path = _one(args.words, "run or checkpoint")
    if args.path is None:
        raise UsageError("name a run or a checkpoint: fastdeit eval RUN_OR_CHECKPOINT")
    from fastdeit import evaluate

    evaluate.main(args)


def _bench(args: argparse.Namespace, argv: list[str]) -> None:
    from fastdeit import bench

    bench.main(args)


def _recipes(args: argparse.Namespace, argv: list[str]) -> None:
    if args.action == "show" and args.name is None:
        raise UsageError("name a recipe: fastdeit recipes show NAME")
    from fastdeit import recipe

    if args.action == "show":
        print(recipe.text(args.name), end="")
        return
    summaries = recipe.summaries()
    width = max((len(name) for name, _ in summaries), default=0)
    for name, summary in summaries:
        print(f"{name:{width}}  {summary}")


def _doctor(args: argparse.Namespace, argv: list[str]) -> None:
    from fastdeit import doctor

    doctor.main(args)


def _verbs() -> dict[str, Verb]:
    train = Verb(
        "train",
        "train a model by a recipe",
        "[RECIPE] [section.field=value ...] [--data DIR] [--nproc N] [--run-dir DIR] [--resume]",
        _train,
    )
    add = train.parser.add_argument
    add(
        "words",
        nargs="*",
        metavar="RECIPE",
        help=f"name of a recipe or a YAML file (default: {DEFAULT_RECIPE}), and overrides",
    )
    add("--data", metavar="DIR", help="folder with the training and held-out images; short for data.root=DIR")
    add("--nproc", type=_positive, metavar="N", help="processes on this machine, one per GPU (default: 1)")
    add("--run-dir", metavar="DIR", help="where the run is kept (default: a new dated directory in runs/)")
    add("--resume", action="store_true", help="continue the run from its newest intact checkpoint")

    evaluate = Verb(
        "eval",
        "accuracy of a run or a checkpoint on the held-out images",
        "RUN_OR_CHECKPOINT [section.field=value ...] [--data DIR]",
        _eval,
    )
    add = evaluate.parser.add_argument
    add("words", nargs="*", metavar="RUN_OR_CHECKPOINT", help="run directory or checkpoint directory, and overrides")
    add("--data", metavar="DIR", help="folder with the held-out images; short for data.root=DIR")

    bench = Verb(
        "bench",
        "speed of a training step or of the data pipeline",
        "[step|data] [--peer timm|none] [--device auto|cpu|cuda] [--model NAME] [--batch N] [--rounds N] [--out FILE]",
        _bench,
    )
    add = bench.parser.add_argument
    add("what", nargs="?", choices=("step", "data"), default="step", help="what to measure (default: step)")
    add("--peer", choices=("timm", "none"), default="timm", help="what to measure side by side with it (default: timm)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    add("--model", default="deit_tiny_patch16_224", metavar="NAME", help="default: deit_tiny_patch16_224")
    add("--batch", type=_positive, default=16, metavar="N", help="images per step (default: 16)")
    add("--rounds", type=_positive, default=5, metavar="N", help="measurements of each side (default: 5)")
    add("--out", metavar="FILE", help="append the rows to this file")

    recipes = Verb("recipes", "list the recipes, or show one", "[show NAME]", _recipes)
    add = recipes.parser.add_argument
    add("action", nargs="?", choices=("show",), help="without it, list the recipes")
    add("name", nargs="?", metavar="NAME", help="recipe whose file to print")

    doctor = Verb("doctor", "what this machine offers, and which kernels will be used", "", _doctor)
    return {"train": train, "eval": evaluate, "bench": bench, "recipes": recipes, "doctor": doctor}


VERBS = _verbs()
