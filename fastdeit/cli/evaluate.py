"""`fastdeit eval`."""

import argparse

from fastdeit.cli.parser import Verb, one, path
from fastdeit.errors import UsageError


def _eval(args: argparse.Namespace, argv: list[str]) -> None:
    args.path = one(args.words, "run or checkpoint")
    if args.path is None:
        raise UsageError("name a run or a checkpoint: fastdeit eval RUN_OR_CHECKPOINT")
    from fastdeit.run import evaluate

    evaluate.main(args)


EVAL = Verb(
    "eval",
    "accuracy of a run or a checkpoint on the held-out images",
    "RUN_OR_CHECKPOINT [section.field=value ...] [--data DIR]",
    _eval,
    examples=["fastdeit eval runs/RUN --data /path/to/imagenet"],
)
_add = EVAL.parser.add_argument
_add("words", nargs="*", metavar="RUN_OR_CHECKPOINT", help="run directory or checkpoint directory, and overrides")
_add("--data", type=path, metavar="DIR", help="the data set's folder; short for data.root=DIR")

VERBS = {"eval": EVAL}
