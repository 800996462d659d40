"""`fastdeit runs list`, `runs diff`, `runs curves` and `runs time`."""

import argparse

from fastdeit.cli.parser import Verb, path


def _runs(args: argparse.Namespace, argv: list[str]) -> None:
    from fastdeit.verbs import runs

    getattr(runs, f"show_{argv[1]}")(args)


def _time(args: argparse.Namespace, argv: list[str]) -> None:
    from fastdeit.verbs import time_to

    time_to.main(args)


LIST = Verb(
    "runs list",
    "the runs in a folder: recipe, how far, best, state, age",
    "[DIR]",
    _runs,
    examples=["fastdeit runs list", "fastdeit runs list /shared/experiments"],
)
LIST.parser.add_argument("folder", nargs="?", type=path, default="runs", metavar="DIR", help="default: runs")

DIFF = Verb(
    "runs diff",
    "fields of the recipes and metrics in which two runs differ",
    "A B",
    _runs,
    examples=["fastdeit runs diff runs/first runs/second"],
)
_add = DIFF.parser.add_argument
_add("a", type=path, metavar="A", help="run directory, or its name in runs/")
_add("b", type=path, metavar="B", help="the other")

CURVES = Verb(
    "runs curves",
    "picture of loss, accuracy and learning rate of several runs",
    "RUN ... [--out FILE.png]",
    _runs,
    examples=["fastdeit runs curves runs/first runs/second --out both.png"],
)
_add = CURVES.parser.add_argument
_add("runs", nargs="+", type=path, metavar="RUN", help="run directory, or its name in runs/")
_add("--out", type=path, default="curves.png", metavar="FILE", help="the picture (default: curves.png)")

TIME = Verb(
    "runs time",
    "how long a run took to reach an accuracy, as a row of JSON",
    "RUN --target VALUE [--metric NAME]",
    _time,
    examples=["fastdeit runs time runs/record --metric top1 --target 76.7"],
)
_add = TIME.parser.add_argument
_add("run", type=path, metavar="RUN", help="run directory, or its name in runs/")
_add(
    "--metric",
    default="top1",
    metavar="NAME",
    help="as in metrics.jsonl; top1 and top5 are those of the method's answer, top1_ema of its average (default: top1)",
)
_add("--target", type=float, required=True, metavar="VALUE", help="in the metric's unit, for top1 per cent")

VERBS = LIST, DIFF, CURVES, TIME
