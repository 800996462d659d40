"""`fastdeit eval`, `published`, `predict` and `show attention`: what weights are worth, and what they see."""

import argparse
import os
from pathlib import Path

from fastdeit.cli.parser import Verb, add_trust, path, positive, required
from fastdeit.errors import UsageError


def _check(args: argparse.Namespace) -> None:
    """Say what is wrong with the address before the import of torch."""
    from fastdeit.run import chosen

    chosen.check(args.address, args.overrides, args.model)


def _eval(args: argparse.Namespace, argv: list[str]) -> int | None:
    otherwise = "name the weights: fastdeit eval ADDRESS --data DIR, where ADDRESS is a run, a file or timm:NAME"
    args.address = required(args.words, "address of weights", otherwise)
    if args.images is not None:
        _check(args)
        args.top = 5
        from fastdeit.verbs import predict

        return predict.main(args)
    from fastdeit.launch import launch

    processes = launch.Processes(args.nproc)
    with launch.process_of_a_run(processes):
        if "RANK" not in os.environ:  # else the others are told of a mistake: `verbs.evaluate` finds it
            _check(args)
        return launch.run(args, argv, _evaluate, processes)


def _evaluate(args: argparse.Namespace) -> None:
    from fastdeit.verbs import evaluate

    evaluate.main(args)


def _published(args: argparse.Namespace, argv: list[str]) -> int | None:
    from fastdeit.run import published

    try:
        rows = published.published(args.words)
    except ValueError as error:
        raise UsageError(str(error)) from error
    if args.data is None:
        given = [*args.overrides, *(["--json"] if args.json else []), *(["--nproc"] if args.nproc else [])]
        if given:
            raise UsageError(f"{given[0]} belongs to an evaluation, which needs a data set; add --data DIR")
        print(published.listing(rows))
        return None
    if not Path(args.data).is_dir():
        raise UsageError(f"--data {args.data}: there is no such folder")
    published.check_overrides(args.overrides)
    from fastdeit.launch import launch

    processes = launch.Processes(args.nproc)
    with launch.process_of_a_run(processes):
        return launch.run(args, argv, _measure, processes)


def _measure(args: argparse.Namespace) -> None:
    from fastdeit.verbs import published

    published.main(args)


def _predict(args: argparse.Namespace, argv: list[str]) -> None:
    args.address, *args.images = args.words or [None]
    if args.address is None or not args.images:
        raise UsageError("name the weights and a picture: fastdeit predict ADDRESS PICTURE ...")
    _check(args)
    from fastdeit.verbs import predict

    predict.main(args)


def _attention(args: argparse.Namespace, argv: list[str]) -> None:
    if len(args.words) != 2:
        raise UsageError("name the weights and a picture: fastdeit show attention ADDRESS PICTURE --out FILE.png")
    args.address, args.picture = args.words
    _check(args)
    from fastdeit.verbs import attention

    attention.main(args)


EVAL = Verb(
    "eval",
    "accuracy, loss and calibration of weights on held-out images",
    "ADDRESS [section.field=value ...] [--data DIR] [--model NAME] [--nproc N] [--json] [--trust]\n"
    "       [--classes FILE.csv] [--confusion FILE.png] [--calibration FILE.png]\n"
    "       fastdeit eval ADDRESS --images PICTURE ...",
    _eval,
    examples=[
        "fastdeit eval runs/RUN@best --data /path/to/imagenet",
        "fastdeit eval timm:deit_tiny_patch16_224 --data /path/to/imagenet --classes classes.csv",
    ],
)
_add = EVAL.parser.add_argument
_add("words", nargs="*", metavar="ADDRESS", help="a run, RUN@best, RUN@ema, a checkpoint, a file or timm:NAME")
_add("--data", type=path, metavar="DIR", help="the data set's folder, of which only the held-out split is read")
_add("--model", metavar="NAME", help="which model a bare file is of: one of fastdeit's, or timm:NAME")
_add("--nproc", type=positive, metavar="N", help="processes on this machine, one per GPU (default: 1)")
_add("--json", action="store_true", help="print everything as JSON")
_add("--classes", type=path, metavar="FILE", help="write the accuracy of every class to this CSV file")
_add("--confusion", type=path, metavar="FILE", help="write the confusion matrix, as FILE.csv and FILE.png")
_add("--calibration", type=path, metavar="FILE", help="write accuracy by confidence, as FILE.csv and FILE.png")
_add("--images", type=path, nargs="+", metavar="PICTURE", help="print the classes of these pictures instead")
add_trust(EVAL.parser)

PUBLISHED = Verb(
    "published",
    "accuracy of the weights that timm publishes, on your ImageNet and as published",
    "[NAME ...] [section.field=value ...] [--data DIR] [--nproc N] [--json]",
    _published,
    examples=[
        "fastdeit published  # the table of published numbers",
        "fastdeit published 'deit*' 'cait_*_224' --data /path/to/imagenet",
    ],
)
_add = PUBLISHED.parser.add_argument
_add("words", nargs="*", metavar="NAME", help="timm's names, or patterns such as 'deit3*' (default: all of the table)")
_add("--data", type=path, metavar="DIR", help="ImageNet's folder, of which only the held-out split is read")
_add("--nproc", type=positive, metavar="N", help="processes on this machine, one per GPU (default: 1)")
_add("--json", action="store_true", help="print a line of JSON for each model")

PREDICT = Verb(
    "predict",
    "classes of pictures",
    "ADDRESS PICTURE ... [section.field=value ...] [--model NAME] [--top K] [--json] [--trust]",
    _predict,
    examples=["fastdeit predict runs/RUN cat.jpg dog.jpg --top 3"],
)
_add = PREDICT.parser.add_argument
_add("words", nargs="*", metavar="ADDRESS PICTURE", help="weights as for eval; pictures, or folders of them")
_add("--model", metavar="NAME", help="which model a bare file is of: one of fastdeit's, or timm:NAME")
_add("--top", type=positive, default=5, metavar="K", help="likeliest classes to print (default: 5)")
_add("--json", action="store_true", help="print the answers as JSON")
add_trust(PREDICT.parser)

ATTENTION = Verb(
    "show attention",
    "picture of where a transformer looks, and which patches it finds alike",
    "ADDRESS PICTURE [section.field=value ...] [--model NAME] [--block N] [--trust] --out FILE.png",
    _attention,
    examples=["fastdeit show attention runs/RUN cat.jpg --out attention.png"],
)
_add = ATTENTION.parser.add_argument
_add("words", nargs="*", metavar="ADDRESS PICTURE", help="weights as for eval, and a picture")
_add("--model", metavar="NAME", help="which model a bare file is of: one of fastdeit's, or timm:NAME")
_add("--block", type=int, metavar="N", help="block to look into, from 0 (default: the last)")
_add("--out", type=path, required=True, metavar="FILE", help="the picture")
add_trust(ATTENTION.parser)

VERBS = EVAL, PUBLISHED, PREDICT, ATTENTION
