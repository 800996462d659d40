"""The command line: `fastdeit VERB ...`.

Every verb has its parser in a file of this package and its work elsewhere, imported when the verb runs: `fastdeit
--help` costs no torch. Whatever goes wrong ends in an exit code that scripts can rely on (`exit_code`) and, where a
person can do something about it, in one message instead of a traceback.
"""

import errno
import os
import re
import sys
import time
import traceback
from collections.abc import Mapping, Sequence

from fastdeit.cli import (
    bench,
    cache,
    chaos,
    completion,
    data,
    doctor,
    evaluate,
    experiments,
    explain,
    export,
    kernels,
    models,
    plan,
    recipes,
    runs,
    submit,
    train,
)
from fastdeit.cli.parser import Parser, Verb
from fastdeit.errors import COMMON_CODES, FastdeitError, UsageError
from fastdeit.launch.began import process_began
from fastdeit.text import did_you_mean, lines, shorten
from fastdeit.version import __version__

# As `fastdeit --help` lists them.
_COMPLETION = completion.verb(lambda: VERBS)
_GROUPS: dict[str, Sequence[Verb]] = {
    "train and judge": (*train.VERBS, *submit.VERBS, *cache.VERBS, *evaluate.VERBS, *export.VERBS),
    "find out before": (*recipes.VERBS, *explain.VERBS, *models.VERBS, *plan.VERBS),
    "look at runs": (*runs.VERBS, *experiments.VERBS),
    "data": data.VERBS,
    "this machine": (*doctor.VERBS, *chaos.VERBS, *kernels.VERBS, *bench.VERBS, _COMPLETION),
}
GROUPS = {title: {verb.name: verb for verb in verbs} for title, verbs in _GROUPS.items()}
VERBS = {name: verb for verbs in GROUPS.values() for name, verb in verbs.items()}

# The layers below define their own exceptions; named here, not imported, because importing them would import torch.
# They mean that something the user gave cannot be worked with; train turns those of a running loop into FastdeitError.
_EXIT_CODES = {
    ("fastdeit.plugins", "Untrusted"): UsageError.exit_code,
    ("fastdeit.recipe.resolve", "RecipeError"): UsageError.exit_code,
    ("fastdeit.data.sources.source", "DataError"): UsageError.exit_code,
    ("fastdeit.data.sources.source", "MachineError"): FastdeitError.exit_code,
    ("fastdeit.engine.disk", "DiskError"): FastdeitError.exit_code,
    ("fastdeit.engine.checkpoint", "CheckpointError"): UsageError.exit_code,
    ("fastdeit.engine.metrics", "MetricsError"): UsageError.exit_code,
    ("fastdeit.engine.capture", "CaptureError"): UsageError.exit_code,
    ("fastdeit.engine.groups", "GradientError"): UsageError.exit_code,
    ("fastdeit.engine.dist", "DeviceError"): UsageError.exit_code,
    ("fastdeit.engine.dist", "DisagreementError"): UsageError.exit_code,
    ("fastdeit.engine.rendezvous", "DeclinedError"): UsageError.exit_code,
    ("fastdeit.engine.rendezvous", "RendezvousError"): FastdeitError.exit_code,
    ("fastdeit.engine.replicas", "DriftError"): FastdeitError.exit_code,
    ("fastdeit.engine.watch", "LostError"): FastdeitError.exit_code,
    ("fastdeit.kernels.lint.lint", "LintError"): UsageError.exit_code,
    ("fastdeit.kernels._op", "ChoiceError"): UsageError.exit_code,
    ("fastdeit.kernels._asked", "UnknownOpError"): UsageError.exit_code,
    ("fastdeit.kernels.trial.candidates", "BrokenDevice"): FastdeitError.exit_code,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: that of the process) and return its exit code."""
    began = process_began() if argv is None else time.monotonic()
    if argv is None:
        # Of Python 3.11 and later: no process that this one starts searches the current folder for modules.
        os.environ.setdefault("PYTHONSAFEPATH", "1")
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(argv, began)
    except SystemExit as stop:  # argparse, after --help or --version
        return int(stop.code or 0)
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FastdeitError.exit_code
    except KeyboardInterrupt:
        print("fastdeit: interrupted", file=sys.stderr)
        return FastdeitError.exit_code
    except Exception as error:
        return _report(error)


def exit_code(error: BaseException) -> int | None:
    """Exit code of an error with a message for the user; None for any other, whose traceback is needed."""
    if isinstance(error, FastdeitError):
        return error.exit_code
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:  # whatever was to be looked for there
        return UsageError.exit_code
    return next(
        (code for cls in type(error).__mro__ if (code := _EXIT_CODES.get((cls.__module__, cls.__qualname__)))), None
    )


def _report(error: Exception) -> int:
    code = exit_code(error)
    rank = _rank(os.environ)
    if code not in COMMON_CODES or rank == "0":
        who = "fastdeit" if rank == "0" else f"fastdeit: rank {rank}"
        if code is None:
            print("\n".join(lines("".join(traceback.format_exception(error)).rstrip())), file=sys.stderr)
        message = str(error) if code is not None else f"failed with {type(error).__name__}, see above"
        if code is not None and isinstance(error, OSError):
            message = f"{shorten(str(error.filename), 100)}: no file can have a name of this length"
        print("\n".join(f"{who}: {line}" for line in lines(message or type(error).__name__)), file=sys.stderr)
    return FastdeitError.exit_code if code is None else code


def _rank(env: Mapping[str, str]) -> str:
    """This process's rank, as it was given; "0" where the environment describes no process of several: then nobody else
    would say what is wrong."""
    rank, size = (env.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    numbers = all(re.fullmatch("[0-9]{1,9}", text) for text in (rank, size))
    return rank if numbers and int(rank) < int(size) else "0"


def _dispatch(argv: list[str], began: float) -> int:
    if not argv or argv[0].startswith("-"):
        top = _top()
        top.parse(argv)
        top.print_help(sys.stderr)
        return UsageError.exit_code
    name = next((name for name in (" ".join(argv[:2]), argv[0]) if name in VERBS), None)
    if name is None:
        family = {name: verb for name, verb in VERBS.items() if name.startswith(f"{argv[0]} ")}
        if family and argv[1:] in (["-h"], ["--help"]):
            print(_listed({f"verbs of {argv[0]}": family}) + _ENDING)
            return 0
        known, word = family or VERBS, " ".join(argv[: 2 if family else 1])
        raise UsageError(f"there is no verb {word!r} (verbs: {', '.join(known)}){did_you_mean(word, known)}")
    verb = VERBS[name]
    args = verb.parse(argv[len(name.split()) :])
    args.began = began
    return verb.run(args, argv) or 0


def _top() -> Parser:
    top = Parser(
        prog="fastdeit",
        usage="fastdeit VERB ...",
        description="Train DeiT-family vision transformers fast, and get the same result every time.",
        epilog=f"{_listed(GROUPS)}{_ENDING} Exit codes: 0 done, 1 failed, 2 bad\nusage or configuration, "
        "3 stopped on non-finite losses, 75 interrupted and saved (`fastdeit train\n--resume RUN` goes on).",
    )
    top.add_argument("--version", action="version", version=f"fastdeit {__version__}")
    return top


_ENDING = "\n\n`fastdeit VERB --help` explains a verb and shows examples."


def _listed(groups: Mapping[str, Mapping[str, Verb]]) -> str:
    """The verbs of `groups` with what they do, under the names of the groups."""
    width = max(len(name) for verbs in groups.values() for name in verbs)
    return "\n\n".join(
        "\n".join([f"{title}:", *(f"  {name:{width}}  {verb.help}" for name, verb in verbs.items())])
        for title, verbs in groups.items()
    )
