"""`fastdeit bench`."""

import argparse

from fastdeit.cli.parser import Verb, positive


def _bench(args: argparse.Namespace, argv: list[str]) -> None:
    from fastdeit.bench import command as bench

    bench.main(args)


BENCH = Verb(
    "bench",
    "speed of a training step, of inference or of the data pipeline, against others in the same run",
    "[step|forward|train|data|suite|calibrate] [--peer NAME ...] [--device auto|cpu|cuda] [--batch N]\n"
    "       [--rounds N] [--out FILE]; step, forward, train: [--model NAME] [--image-size N]\n"
    "       [--precision fp32|fp16|bf16] [--capture none|compile|graph ...]; step, train: [--teacher NAME|none]\n"
    "       [--ema];\n"
    "       data, train: [--recipe RECIPE] [section.field=value ...] [--threads N]; data: [--eval];\n"
    "       suite: [--time-limit MINUTES];\n"
    "       fastdeit bench --report [DIR] [--results FILE ...]",
    _bench,
)
_add = BENCH.parser.add_argument
_WHATS = ("step", "forward", "train", "data", "suite", "calibrate")
_add("what", nargs="?", choices=_WHATS, default="step", help="what to measure (default: step)")
_add("overrides", nargs="*", metavar="section.field=value", help="of data and train: overrides of the recipe")
_add(
    "--peer",
    action="append",
    choices=(
        *("timm", "timm_compile", "timm_compile_cudnn", "accelerate", "timm_compile_graph"),
        *("deit", "torchvision", "dali", "all", "none"),
    ),
    help="what to measure side by side with it; may be repeated. step, forward, train: timm, timm_compile (with "
    "FlashAttention), timm_compile_cudnn, accelerate, timm_compile_graph; data: one of timm, deit, torchvision, "
    "dali (default: timm, for suite all)",
)
_add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
_add("--model", default="deit_tiny_patch16_224", metavar="NAME", help="default: deit_tiny_patch16_224")
_add("--batch", type=positive, metavar="N", help="images per batch (default: 16, for data 64)")
_add("--image-size", type=positive, metavar="N", help="pixels of a side (default: the model's)")
_add("--precision", choices=("fp32", "fp16", "bf16"), help="default: bf16, fp16 before sm_80, fp32 on a CPU")
_add(
    "--capture",
    action="append",
    choices=("none", "compile", "graph"),
    help="engine.capture of our side; may be repeated, for several (default: none; suite: also graph)",
)
_add("--teacher", default="none", metavar="NAME", help="timm model that teaches in every step (default: none)")
_add("--ema", action="store_true", help="average the weights in every step")
_add("--recipe", default="deit_small", metavar="RECIPE", help="whose input to make (default: deit_small)")
_add("--eval", action="store_true", help="of data: the input of its evaluation instead of its training")
_add("--threads", type=positive, metavar="N", help="threads or workers of each side (default: one per core)")
_add("--rounds", type=positive, default=5, metavar="N", help="measurements of each side (default: 5)")
_add("--time-limit", type=positive, metavar="MINUTES", help="begin no further cell of the suite after that")
_add("--out", metavar="FILE", help="append the rows to this file")
_add("--report", nargs="?", const=".", metavar="DIR", help="measure nothing: tables, and benchmarks.png in DIR")
_add("--results", action="append", metavar="FILE", help="rows for the report (default: benchmarks/results/*.jsonl)")

VERBS = {"bench": BENCH}
