"""`fastdeit export`."""

import argparse
from pathlib import Path

from fastdeit.cli.parser import Verb, add_trust, path
from fastdeit.errors import UsageError
from fastdeit.verbs.formats import FORMATS, by_name, check_place


def _export(args: argparse.Namespace, argv: list[str]) -> None:
    if len(args.words) != 2:
        raise UsageError("name the weights and the file: fastdeit export ADDRESS OUT")
    args.address, args.out = args.words[0], path(args.words[1])
    from fastdeit.run import chosen

    # Before the import of torch, so that a mistake is said at once.
    chosen.check(args.address, args.overrides, args.model)
    args.format = args.format or by_name(args.out)
    if args.fuse is not None and not FORMATS[args.format].program:
        what = FORMATS[args.format].words
        raise UsageError(f"--fuse {args.fuse}: {what} has both heads; only .pt2 and .onnx fuse them")
    check_place(Path(args.out), args.format, args.force)
    from fastdeit.verbs import export

    export.main(args)


EXPORT = Verb(
    "export",
    "weights as a file or folder for other programs",
    "ADDRESS OUT [section.field=value ...] [--format FORMAT] [--model NAME]\n"
    "       [--fuse FUSION] [--force] [--trust]",
    _export,
    examples=[
        "fastdeit export runs/RUN@best model.onnx",
        "fastdeit export runs/RUN@ema folder --format timm  # timm.create_model('local-dir:folder')",
    ],
)
_add = EXPORT.parser.add_argument
_add(
    "words",
    nargs="*",
    metavar="ADDRESS OUT",
    help="weights as for eval (RUN@ema for the average); OUT.safetensors, .pth, .pt2, .onnx, or a folder",
)
_add("--format", choices=tuple(FORMATS), help="default: what the ending of OUT says; a folder is for timm and the hub")
_add("--model", metavar="NAME", help="which model a bare file is of: one of fastdeit's, or timm:NAME")
_add(
    "--fuse",
    choices=("softmax", "logit", "class", "distillation", "none"),
    help="how a program answers for two heads, or none for both (default: as the run does)",
)
_add("--force", action="store_true", help="replace a file or an exported folder that is there")
add_trust(EXPORT.parser)

VERBS = (EXPORT,)
