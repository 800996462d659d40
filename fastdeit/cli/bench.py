"""`fastdeit bench step`, `forward`, `train`, `data`, `overhead`, `suite`, `calibrate`, `count`, `parity`, `report`."""

import argparse

from fastdeit.bench.names import ARCHS, CAPTURES, DATA_PEERS, PARITY_CASES, STEP_PEERS
from fastdeit.cli.parser import Verb, path, positive


def _rate(text: str) -> float:
    """The number in `text`, in [0, 1); a `type` of argparse."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{value:g} is no rate: it must be at least 0 and below 1")
    return value


_rate.__name__ = "float"  # argparse names the type in its message


def _bench(args: argparse.Namespace, argv: list[str]) -> None:
    from fastdeit.bench import places

    places.check(args)  # before the import of torch, so that a mistake is said at once
    from fastdeit.bench import command as bench

    bench.main(args)


def _verb(what: str, help: str, usage: str, example: str) -> Verb:
    verb = Verb(f"bench {what}", help, usage, _bench, examples=[example])
    verb.parser.set_defaults(what=what)
    return verb


def _add_measuring(verb: Verb) -> None:
    """What every measurement has."""
    _add_rounds(verb)
    verb.parser.add_argument("--out", type=path, metavar="FILE", help="append the rows to this file")


def _add_rounds(verb: Verb) -> None:
    add = verb.parser.add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    add("--rounds", type=positive, default=5, metavar="N", help="measurements of each side (default: 5)")


def _add_peers(verb: Verb, default: str) -> None:
    verb.parser.add_argument(
        "--peer",
        action="append",
        choices=(*STEP_PEERS, "all", "none"),
        help=f"what to measure beside it; may be repeated; timm_compile has FlashAttention (default: {default})",
    )


def _add_cell(verb: Verb, model: str = "deit_tiny_patch16_224") -> None:
    """Which network, and at which size."""
    add = verb.parser.add_argument
    add("--model", default=model, metavar="NAME", help=f"default: {model}")
    add("--batch", type=positive, metavar="N", help="images per batch (default: 16)")
    add("--image-size", type=positive, metavar="N", help="pixels of a side (default: the model's)")
    add("--precision", choices=("fp32", "fp16", "bf16"), help="default: bf16, fp16 before sm_80, fp32 on a CPU")


def _add_capture(verb: Verb, default: str) -> None:
    verb.parser.add_argument(
        "--capture",
        action="append",
        choices=CAPTURES,
        help=f"engine.capture of our side; may be repeated, for several (default: {default})",
    )


def _add_training(verb: Verb) -> None:
    add = verb.parser.add_argument
    add("--teacher", default="none", metavar="NAME", help="timm model that teaches in every step (default: none)")
    add("--ema", action="store_true", help="average the weights in every step")


def _add_input(verb: Verb) -> None:
    """Whose input to make."""
    add = verb.parser.add_argument
    add("overrides", nargs="*", metavar="section.field=value", help="overrides of the recipe")
    add("--recipe", type=path, default="deit_small", metavar="RECIPE", help="whose input to make (default: deit_small)")
    add("--threads", type=positive, metavar="N", help="threads or workers of each side (default: one per core)")


_MEASURING = "[--device auto|cpu|cuda] [--rounds N] [--out FILE]"
_CELL = "[--model NAME] [--batch N] [--image-size N] [--precision fp32|fp16|bf16]"
_CAPTURE = "[--capture none|compile|graph ...]"

STEP = _verb(
    "step",
    "speed of a training step, against timm's in the same run",
    f"{_CELL}\n       {_CAPTURE} [--teacher NAME|none] [--ema] [--peer NAME ...]\n       {_MEASURING}",
    "fastdeit bench step --model deit_small_patch16_224 --batch 256 --ema --peer all  # against every peer",
)
_add_cell(STEP)
_add_capture(STEP, "none")
_add_training(STEP)
_add_peers(STEP, "timm")
_add_measuring(STEP)

FORWARD = _verb(
    "forward",
    "speed of inference, against timm's in the same run",
    f"{_CELL}\n       {_CAPTURE} [--peer NAME ...] {_MEASURING}",
    "fastdeit bench forward --model deit_small_patch16_224 --batch 64 --peer all  # against every peer",
)
FORWARD.parser.set_defaults(teacher="none", ema=False)
_add_cell(FORWARD)
_add_capture(FORWARD, "none")
_add_peers(FORWARD, "timm")
_add_measuring(FORWARD)

TRAIN = _verb(
    "train",
    "speed of training from JPEG files, and of the same steps without input",
    f"[section.field=value ...] [--recipe RECIPE] [--threads N]\n       {_CELL}\n       {_CAPTURE} "
    f"[--teacher NAME|none] [--ema] [--peer NAME ...]\n       {_MEASURING}",
    "fastdeit bench train --recipe deit_tiny data.erase=0 --peer timm  # with timm's loader and step",
)
_add_input(TRAIN)
_add_cell(TRAIN)
_add_capture(TRAIN, "none")
_add_training(TRAIN)
_add_peers(TRAIN, "timm")
_add_measuring(TRAIN)

DATA = _verb(
    "data",
    "speed of the input pipeline from JPEG files on, against another",
    "[section.field=value ...] [--recipe RECIPE] [--eval] [--threads N] [--batch N]\n       [--peer NAME] "
    + _MEASURING,
    "fastdeit bench data --recipe deit_small --peer all  # against timm, deit, torchvision and DALI's own operators",
)
_add_input(DATA)
_add = DATA.parser.add_argument
_add("--eval", action="store_true", help="the input of evaluation instead of training")
_add("--batch", type=positive, metavar="N", help="images per batch (default: 64)")
_add("--peer", choices=(*DATA_PEERS, "all", "none"), default="timm", help="what to measure with it (default: timm)")
_add_measuring(DATA)

OVERHEAD = _verb(
    "overhead",
    "what a teacher, a cache of its answers, the average and the log add to a step",
    f"{_CELL}\n       [--teacher NAME] [--device auto|cpu|cuda] [--rounds N]",
    "fastdeit bench overhead --model deit_base_distilled_patch16_224 --batch 256 --teacher regnety_160  # on a GPU",
)
_add_cell(OVERHEAD, model="deit_tiny_distilled_patch16_224")
_add = OVERHEAD.parser.add_argument
_add("--teacher", default="regnety_002", metavar="NAME", help="timm model that teaches (default: regnety_002)")
_add_rounds(OVERHEAD)

SUITE = _verb(
    "suite",
    "speed of many steps and forwards of DeiT, the most important first",
    f"[--time-limit MINUTES] {_CAPTURE} [--peer NAME ...]\n       {_MEASURING}",
    "fastdeit bench suite --time-limit 20 --out rows.jsonl  # as much of it as begins within 20 minutes",
)
SUITE.parser.add_argument(
    "--time-limit", type=positive, metavar="MINUTES", help="begin no further cell of the suite after that"
)
_add_capture(SUITE, "none, and on a GPU graph")
_add_peers(SUITE, "all")
_add_measuring(SUITE)

CALIBRATE = _verb(
    "calibrate",
    "rates of this machine that `fastdeit plan` rests on",
    f"[--batch N] {_MEASURING}",
    "fastdeit bench calibrate --out rows.jsonl  # matrix products, attention, LayerNorm, MLP, a teacher",
)
CALIBRATE.parser.add_argument("--batch", type=positive, metavar="N", help="images (default: 256, on a CPU 2)")
_add_measuring(CALIBRATE)

PARITY = _verb(
    "parity",
    "the same training by fastdeit and by timm, step by step: how far they come apart",
    "[--peer timm] [--case NAME ...] [--steps N] [--batch N] [--image-size N]\n       [--out FILE]",
    "fastdeit bench parity --peer timm --case hard  # without --case all ways of training, some minutes",
)
_add = PARITY.parser.add_argument
_add("--peer", choices=("timm",), default="timm", help="what to compare with (default: timm)")
_add("--case", action="append", choices=PARITY_CASES, help="may be repeated (default: all)")
_add("--steps", type=positive, default=50, metavar="N", help="a multiple of 5 (default: 50)")
_add("--batch", type=positive, default=16, metavar="N", help="images per batch, a multiple of 4 (default: 16)")
_add("--image-size", type=positive, default=64, metavar="N", help="pixels of a side, a multiple of 32 (default: 64)")
_add("--out", type=path, metavar="FILE", help="append the rows to this file")

COUNT = _verb(
    "count",
    "launches, bytes, FLOPs and memory of a step; needs no GPU",
    "[--model NAME ...] [--batch N] [--drop-path P] [--arch N ...] [--json] [--update-golden]",
    "fastdeit bench count --model deit_base_distilled_patch16_224 --arch 90  # ours in every form, and timm's",
)
_add = COUNT.parser.add_argument
_add("--model", action="append", metavar="NAME", help="may be repeated (default: DeiT-B, S and Ti, distilled)")
_add("--batch", type=positive, metavar="N", help="images of a step (default: 256)")
_add("--drop-path", type=_rate, default=0.1, metavar="P", help="rate of drop-path (default: 0.1)")
_add(
    "--arch",
    type=int,
    choices=ARCHS,
    action="append",
    metavar="N",
    help="80, 90 or 100; may be repeated (default: 90)",
)
_add("--json", action="store_true", help="print a row of JSON for each model and architecture")
_add("--update-golden", action="store_true", help="keep our counts in tests/golden/counts")

REPORT = _verb(
    "report",
    "what was measured, as tables and a picture",
    "[DIR] [--results FILE ...]",
    "fastdeit bench report docs  # tables on the terminal, and docs/benchmarks.png",
)
_add = REPORT.parser.add_argument
_add("folder", nargs="?", type=path, default=".", metavar="DIR", help="where benchmarks.png goes (default: here)")
_add(
    "--results", type=path, action="append", metavar="FILE", help="rows to report (default: benchmarks/results/*.jsonl)"
)

VERBS = STEP, FORWARD, TRAIN, DATA, OVERHEAD, SUITE, CALIBRATE, PARITY, COUNT, REPORT
