"""`fastdeit kernels`, `kernels lint`, `kernels bench` and `kernels tune`."""

import argparse
import os

from fastdeit.cli.parser import Verb, path, positive
from fastdeit.errors import UsageError


def _kernels_bench(args: argparse.Namespace, argv: list[str]) -> None:
    from fastdeit.bench import places

    places.check(args)
    from fastdeit.bench import kernels as bench_kernels

    bench_kernels.main(args)


def _kernels_tune(args: argparse.Namespace, argv: list[str]) -> None:
    from fastdeit.bench import places

    places.check(args)
    from fastdeit.bench import tune

    tune.main(args)


def _kernels(args: argparse.Namespace, argv: list[str]) -> None:
    from fastdeit import kernels

    print(kernels.format_info())


def _kernels_lint(args: argparse.Namespace, argv: list[str]) -> int:
    if args.bounds:
        if args.arch or args.json or args.update_golden:
            raise UsageError("with --bounds nothing is compiled: it takes no flag but --op")
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
        from fastdeit.kernels.lint import bounds

        return bounds.main(args)
    from fastdeit.kernels.lint import lint

    return lint.main(args)


KERNELS = Verb(
    "kernels",
    "which kernels will be used here, and why",
    "",
    _kernels,
    examples=["FASTDEIT_KERNELS=reference fastdeit kernels  # what a forced choice does"],
)

LINT = Verb(
    "kernels lint",
    "what the compiler makes of every Triton kernel; needs no GPU",
    "[--arch N ...] [--op NAME] [--json FILE] [--update-golden] [--bounds]",
    _kernels_lint,
    examples=["fastdeit kernels lint --arch 80 90 --op attention  # one op, compiled for A100 and H100"],
)
_add = LINT.parser.add_argument
_add("--arch", type=positive, nargs="+", metavar="N", help="compile for these: 90 is sm_90 (default: all supported)")
_add("--op", metavar="NAME", help="compile the kernels of this op (default: of all)")
_add("--json", type=path, metavar="FILE", help="write all facts to this file")
_add("--update-golden", action="store_true", help="keep the instruction mixes in tests/golden/kernels")
_add("--bounds", action="store_true", help="check addresses instead of compiling, at huge sizes as well")

BENCH = Verb(
    "kernels bench",
    "time every backend of every op, the reference and torch.compile of it, in turn",
    "[--op NAME ...] [--model NAME] [--batch N] [--dtype bf16|fp16|fp32] [--device auto|cpu|cuda] [--rounds N] "
    "[--out FILE] [--update-choices] [--predict]",
    _kernels_bench,
    examples=["fastdeit kernels bench --op attention --batch 256  # one op, at the shapes of DeiT-B"],
)
_add = BENCH.parser.add_argument
_add("--op", action="append", metavar="NAME", help="time this op; may be repeated (default: all)")
_add("--model", default="deit_base_distilled_patch16_224", metavar="NAME", help="whose shapes (default: DeiT-B's)")
_add("--batch", type=positive, default=64, metavar="N", help="images (default: 64)")
_add("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="of the operands (default: bf16)")
_add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
_add("--rounds", type=positive, default=5, metavar="N", help="measurements of each side (default: 5)")
_add("--out", type=path, metavar="FILE", help="append the rows to this file")
_add("--update-choices", action="store_true", help="make the fastest the default on such a card")
_add("--predict", action="store_true", help="run nothing: the bytes each op moves at best, and their time on GPUs")

TUNE = Verb(
    "kernels tune",
    "try every backend out in a step of a model, and keep the fastest that is right for runs on this card",
    "[--model NAME] [--batch N] [--dtype bf16|fp16|fp32] [--device auto|cpu|cuda] [--graph] [--budget SECONDS]",
    _kernels_tune,
    examples=["fastdeit kernels tune --model deit_small_patch16_224 --batch 128  # before the first run on a new card"],
)
_add = TUNE.parser.add_argument
_add("--model", default="deit_base_distilled_patch16_224", metavar="NAME", help="whose shapes (default: DeiT-B's)")
_add("--batch", type=positive, default=64, metavar="N", help="images of a process and micro-batch (default: 64)")
_add("--dtype", choices=("bf16", "fp16", "fp32"), help="engine.precision of the runs (default: 16 bit on a GPU)")
_add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
_add("--graph", action="store_true", help="for runs with engine.capture=graph, where launches do not count")
_add("--budget", type=float, default=600.0, metavar="SECONDS", help="begin no trial after these (default: 600)")

VERBS = KERNELS, LINT, BENCH, TUNE
