"""The command line: `fastdeit VERB ...`.

Every verb is a parser here and a function elsewhere, imported when the verb runs: `fastdeit --help` costs no torch.
Whatever goes wrong ends in an exit code that scripts can rely on (`exit_code`) and, where a person can do something
about it, in one message instead of a traceback.
"""

import argparse
import json
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
    ("fastdeit.recipe.resolve", "RecipeError"): UsageError.exit_code,
    ("fastdeit.data.sources.source", "DataError"): UsageError.exit_code,
    ("fastdeit.engine.checkpoint", "CheckpointError"): UsageError.exit_code,
    ("fastdeit.engine.capture", "CaptureError"): UsageError.exit_code,
    ("fastdeit.engine.dist", "DeviceError"): UsageError.exit_code,
    ("fastdeit.kernels.lint.lint", "LintError"): UsageError.exit_code,
    ("fastdeit.kernels._op", "ChoiceError"): UsageError.exit_code,
    ("fastdeit.kernels._op", "UnknownOpError"): UsageError.exit_code,
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
        epilog="verbs:\n" + "\n".join(f"  {name:13} {verb.help}" for name, verb in VERBS.items()) + "\n\n"
        "`fastdeit VERB --help` explains a verb. Exit codes: 0 done, 1 failed, 2 bad usage or configuration,\n"
        "3 stopped on non-finite losses, 75 interrupted and saved (run the same command with --resume).",
    )
    top.add_argument("--version", action="version", version=f"fastdeit {__version__}")
    if not argv or argv[0].startswith("-"):
        top.parse(argv)
        top.print_help(sys.stderr)
        return UsageError.exit_code
    name = next((name for name in (" ".join(argv[:2]), argv[0]) if name in VERBS), None)
    if name is None:
        family = [name for name in VERBS if name.startswith(f"{argv[0]} ")]
        known, word = family or list(VERBS), " ".join(argv[: 2 if family else 1])
        raise UsageError(f"there is no verb {word!r} (verbs: {', '.join(known)}){did_you_mean(word, known)}")
    verb = VERBS[name]
    return verb.run(verb.parse(argv[len(name.split()) :]), argv) or 0


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
            if getattr(args, "data", None) is not None:
                # In YAML's quotes: the name of a folder may be a number, or have a colon, a hash or a line break in it.
                args.overrides.append(f"data.root={json.dumps(args.data)}")
        return args


def _one(words: list[str], what: str) -> str | None:
    if len(words) > 1:
        raise UsageError(f"expected one {what} and section.field=value overrides, got {' '.join(words)}")
    return words[0] if words else None


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not a positive number")
    if value >= 2**63:
        raise argparse.ArgumentTypeError(f"a number of {len(str(value))} digits does not fit 64 bits")
    return value


_positive.__name__ = "int"  # argparse names the type in its message


def _train(args: argparse.Namespace, argv: list[str]) -> int:
    from fastdeit.launch import launch

    with launch.process_of_a_run():
        args.recipe = _one(args.words, "recipe") or DEFAULT_RECIPE
        if args.data is not None:
            from fastdeit.verbs import data as data_verbs

            args.overrides += data_verbs.implied(args.recipe, args.overrides, args.data)
        if "RANK" not in os.environ:
            if not args.words:
                print(
                    f"no recipe named: training {DEFAULT_RECIPE!r}, which needs no data. ImageNet: {IMAGENET_EXAMPLE}",
                    flush=True,
                )
            from fastdeit.recipe import resolve as recipe

            # Before any worker exists, so that a mistake is reported at once, and once.
            recipe.load(args.recipe, args.overrides)
        return launch.run(args, argv)


def _eval(args: argparse.Namespace, argv: list[str]) -> None:
    args.path = _one(args.words, "run or checkpoint")
    if args.path is None:
        raise UsageError("name a run or a checkpoint: fastdeit eval RUN_OR_CHECKPOINT")
    from fastdeit.run import evaluate

    evaluate.main(args)


def _bench(args: argparse.Namespace, argv: list[str]) -> None:
    from fastdeit.bench import command as bench

    bench.main(args)


def _data_check(args: argparse.Namespace, argv: list[str]) -> int:
    from fastdeit.verbs import data as data_verbs

    return data_verbs.check(args)


def _data_pack(args: argparse.Namespace, argv: list[str]) -> None:
    from fastdeit.verbs import data as data_verbs

    data_verbs.pack(args)


def _data_picture(args: argparse.Namespace, argv: list[str]) -> None:
    args.recipe = _one(args.words, "recipe")
    if args.recipe is None:
        raise UsageError(f"name a recipe: fastdeit data {argv[1]} RECIPE --out FILE.png")
    from fastdeit.verbs import pictures

    getattr(pictures, argv[1])(args)


def _recipes(args: argparse.Namespace, argv: list[str]) -> None:
    if args.action == "show" and args.name is None:
        raise UsageError("name a recipe: fastdeit recipes show NAME")
    from fastdeit.recipe import resolve as recipe

    if args.action == "show":
        print(recipe.text(args.name), end="")
        return
    summaries = recipe.summaries()
    width = max((len(name) for name, _ in summaries), default=0)
    for name, summary in summaries:
        print(f"{name:{width}}  {summary}")


def _doctor(args: argparse.Namespace, argv: list[str]) -> None:
    from fastdeit.verbs import doctor

    doctor.main(args)


def _kernels_bench(args: argparse.Namespace, argv: list[str]) -> None:
    from fastdeit.bench import kernels as bench_kernels

    bench_kernels.main(args)


def _kernels(args: argparse.Namespace, argv: list[str]) -> int | None:
    if args.action == "lint" and args.bounds:
        if args.arch or args.json or args.update_golden:
            raise UsageError("with --bounds nothing is compiled: it takes no flag but --op")
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
        from fastdeit.kernels.lint import bounds

        return bounds.main(args)
    if args.action == "lint":
        from fastdeit.kernels.lint import lint

        return lint.main(args)
    if args.arch or args.op or args.json or args.update_golden or args.bounds:
        raise UsageError("only lint takes flags: fastdeit kernels lint ...")
    from fastdeit import kernels

    print(kernels.format_info())
    return None


def _plan(args: argparse.Namespace, argv: list[str]) -> None:
    args.recipe = _one(args.words, "recipe")
    if args.recipe is None:
        raise UsageError("name a recipe: fastdeit plan RECIPE")
    from fastdeit.estimate import report

    report.main(args)


def _add_source(verb: Verb) -> None:
    add = verb.parser.add_argument
    add("--source", metavar="KIND", help="as data.source of a recipe (default: what the layout says)")
    add("--split", action="append", metavar="NAME", help="one split; may be repeated (default: train and val)")


def _add_recipe(verb: Verb) -> None:
    add = verb.parser.add_argument
    add("words", nargs="*", metavar="RECIPE", help="name of a recipe or a YAML file, and overrides")
    add("--data", metavar="DIR", help="the data set's folder; short for data.root=DIR")


def _training_verbs() -> dict[str, Verb]:
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
    add("--data", metavar="DIR", help="the data set's folder, whose kind is detected; short for data.root=DIR")
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
    add("--data", metavar="DIR", help="the data set's folder; short for data.root=DIR")

    return {"train": train, "eval": evaluate, "bench": _bench_verb()}


def _bench_verb() -> Verb:
    bench = Verb(
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
    add = bench.parser.add_argument
    whats = ("step", "forward", "train", "data", "suite", "calibrate")
    add("what", nargs="?", choices=whats, default="step", help="what to measure (default: step)")
    add("overrides", nargs="*", metavar="section.field=value", help="of data and train: overrides of the recipe")
    add(
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
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    add("--model", default="deit_tiny_patch16_224", metavar="NAME", help="default: deit_tiny_patch16_224")
    add("--batch", type=_positive, metavar="N", help="images per batch (default: 16, for data 64)")
    add("--image-size", type=_positive, metavar="N", help="pixels of a side (default: the model's)")
    add("--precision", choices=("fp32", "fp16", "bf16"), help="default: bf16, fp16 before sm_80, fp32 on a CPU")
    add(
        "--capture",
        action="append",
        choices=("none", "compile", "graph"),
        help="engine.capture of our side; may be repeated, for several (default: none; suite: also graph)",
    )
    add("--teacher", default="none", metavar="NAME", help="timm model that teaches in every step (default: none)")
    add("--ema", action="store_true", help="average the weights in every step")
    add("--recipe", default="deit_small", metavar="RECIPE", help="whose input to make (default: deit_small)")
    add("--eval", action="store_true", help="of data: the input of its evaluation instead of its training")
    add("--threads", type=_positive, metavar="N", help="threads or workers of each side (default: one per core)")
    add("--rounds", type=_positive, default=5, metavar="N", help="measurements of each side (default: 5)")
    add("--time-limit", type=_positive, metavar="MINUTES", help="begin no further cell of the suite after that")
    add("--out", metavar="FILE", help="append the rows to this file")
    add("--report", nargs="?", const=".", metavar="DIR", help="measure nothing: tables, and benchmarks.png in DIR")
    add("--results", action="append", metavar="FILE", help="rows for the report (default: benchmarks/results/*.jsonl)")
    return bench


def _data_verbs() -> dict[str, Verb]:
    check = Verb(
        "data check",
        "decode every sample of a data set and list what is wrong",
        "PATH [--source KIND] [--split NAME ...] [--processes N]",
        _data_check,
    )
    add = check.parser.add_argument
    add("path", metavar="PATH", help="the data set's folder, or one packed, tar, TFRecord, Parquet or Arrow file")
    _add_source(check)
    add("--processes", type=_positive, metavar="N", help="processes that decode (default: one per core)")

    pack = Verb(
        "data pack",
        "copy a data set into one verified file per split",
        "PATH OUT [--source KIND] [--split NAME ...] [--force]",
        _data_pack,
    )
    add = pack.parser.add_argument
    add("path", metavar="PATH", help="the data set's folder")
    add("out", metavar="OUT", help="folder for train.pack and val.pack, which --data then takes")
    _add_source(pack)
    add("--force", action="store_true", help="replace packed files that are there")

    show = Verb(
        "data show",
        "picture of one sample on its way to the model",
        "RECIPE [section.field=value ...] [--data DIR] --sample I [--epoch E] [--copy C] --out FILE.png",
        _data_picture,
    )
    _add_recipe(show)
    add = show.parser.add_argument
    add("--sample", type=int, required=True, metavar="I", help="number of the sample in the training split, from 0")
    add("--epoch", type=int, default=0, metavar="E", help="epoch, from 0 (default: 0)")
    add("--copy", type=int, default=0, metavar="C", help="which of its repeats in the epoch, from 0 (default: 0)")
    add("--out", required=True, metavar="FILE", help="the picture")

    preview = Verb(
        "data preview",
        "picture of the first training batch and of evaluation crops",
        "RECIPE [section.field=value ...] [--data DIR] [--rows R] [--columns C] --out FILE.png",
        _data_picture,
    )
    _add_recipe(preview)
    add = preview.parser.add_argument
    add("--rows", type=_positive, default=4, metavar="R", help="rows of training images (default: 4)")
    add("--columns", type=_positive, default=8, metavar="C", help="default: 8")
    add("--out", required=True, metavar="FILE", help="the picture")
    return {"data check": check, "data pack": pack, "data show": show, "data preview": preview}


def _looking_verbs() -> dict[str, Verb]:
    recipes = Verb("recipes", "list the recipes, or show one", "[show NAME]", _recipes)
    add = recipes.parser.add_argument
    add("action", nargs="?", choices=("show",), help="without it, list the recipes")
    add("name", nargs="?", metavar="NAME", help="recipe whose file to print")

    doctor = Verb("doctor", "what this machine offers, and which kernels will be used", "", _doctor)

    plan = Verb(
        "plan",
        "time, memory and cost of a recipe on GPUs that need not be there",
        "RECIPE [section.field=value ...] [--gpu NAME ...] [--count N ...] [--nodes M] [--price USD ...]\n"
        "       [--sharding ddp|fsdp] [--images N] [--json]",
        _plan,
    )
    add = plan.parser.add_argument
    add("words", nargs="*", metavar="RECIPE", help="name of a recipe or a YAML file, and overrides")
    add("--gpu", action="append", metavar="NAME", help="V100, A100, ...; may be repeated (default: V100 to H200)")
    add("--count", type=_positive, action="append", metavar="N", help="GPUs in all; may be repeated (default: 1 and 8)")
    add("--nodes", type=_positive, metavar="M", help="nodes that share them (default: as few as of 8 GPUs)")
    add("--price", type=float, action="append", metavar="USD", help="of a GPU for an hour, one for each --gpu in order")
    add("--sharding", choices=("ddp", "fsdp"), default="ddp", help="default: ddp, which is what train runs")
    add("--images", type=_positive, metavar="N", help="training images (default: what the data source tells)")
    add("--json", action="store_true", help="print everything as JSON")
    return {"recipes": recipes, "doctor": doctor, "plan": plan}


def _kernel_verbs() -> dict[str, Verb]:
    kernels = Verb(
        "kernels",
        "which kernels will be used and why, or what the compiler makes of them",
        "[info|lint] [--arch N ...] [--op NAME] [--json FILE] [--update-golden] [--bounds]",
        _kernels,
    )
    add = kernels.parser.add_argument
    add("action", nargs="?", choices=("info", "lint"), default="info", help="default: info")
    add(
        "--arch", type=_positive, nargs="+", metavar="N", help="compile for these: 90 is sm_90 (default: all supported)"
    )
    add("--op", metavar="NAME", help="compile the kernels of this op (default: of all)")
    add("--json", metavar="FILE", help="write all facts to this file")
    add("--update-golden", action="store_true", help="keep the instruction mixes in tests/golden/kernels")
    add("--bounds", action="store_true", help="check addresses instead of compiling, at huge sizes as well")

    timed = Verb(
        "kernels bench",
        "time every backend of every op, the reference and torch.compile of it, in turn",
        "[--op NAME ...] [--model NAME] [--batch N] [--dtype bf16|fp16|fp32] [--device auto|cpu|cuda] [--rounds N] "
        "[--out FILE] [--update-choices] [--predict]",
        _kernels_bench,
    )
    add = timed.parser.add_argument
    add("--op", action="append", metavar="NAME", help="time this op; may be repeated (default: all)")
    add("--model", default="deit_base_distilled_patch16_224", metavar="NAME", help="whose shapes (default: DeiT-B's)")
    add("--batch", type=_positive, default=64, metavar="N", help="images (default: 64)")
    add("--dtype", choices=("bf16", "fp16", "fp32"), default="bf16", help="of the operands (default: bf16)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")
    add("--rounds", type=_positive, default=5, metavar="N", help="measurements of each side (default: 5)")
    add("--out", metavar="FILE", help="append the rows to this file")
    add("--update-choices", action="store_true", help="make the fastest the default on such a card")
    add("--predict", action="store_true", help="run nothing: the bytes each op moves at best, and their time on GPUs")
    return {"kernels": kernels, "kernels bench": timed}


VERBS = _training_verbs() | _data_verbs() | _looking_verbs() | _kernel_verbs()
