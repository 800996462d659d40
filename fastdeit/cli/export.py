"""`fastdeit export`."""

import argparse

from fastdeit.cli.parser import Verb
from fastdeit.errors import UsageError

_FORMATS = "safetensors", "deit", "timm", "torch", "onnx"


def _export(args: argparse.Namespace, argv: list[str]) -> None:
    if len(args.words) != 2:
        raise UsageError("name the weights and the file: fastdeit export ADDRESS OUT")
    args.address, args.out = args.words
    from fastdeit.verbs import export

    export.main(args)


EXPORT = Verb(
    "export",
    "weights as a file or folder for other programs",
    "ADDRESS OUT [section.field=value ...] [--format FORMAT] [--model NAME] [--fuse FUSION]",
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
_add("--format", choices=_FORMATS, help="default: what the ending of OUT says; a folder is for timm and the hub")
_add("--model", metavar="NAME", help="which model a bare file is of: one of fastdeit's, or timm:NAME")
_add(
    "--fuse",
    choices=("softmax", "logit", "class", "distillation", "none"),
    help="how a program answers for two heads, or none for both (default: as the run does)",
)

VERBS = {"export": EXPORT}
