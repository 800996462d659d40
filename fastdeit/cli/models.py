"""`fastdeit models`."""

import argparse

from fastdeit.cli.parser import Verb


def _models(args: argparse.Namespace, argv: list[str]) -> None:
    from fastdeit.verbs import models

    models.main(args)


MODELS = Verb(
    "models",
    "list the models with parameters, GFLOP and patch size",
    "[PATTERN]",
    _models,
    examples=[
        "fastdeit models distilled  # names that have this in them",
        "fastdeit models 'timm:deit3_small*'  # of timm, which model.timm=NAME trains",
    ],
)
MODELS.parser.add_argument(
    "pattern",
    nargs="?",
    default="",
    metavar="PATTERN",
    help="part of a name, or a pattern with * and ?; behind timm: one of timm's (default: all of ours)",
)

VERBS = (MODELS,)
