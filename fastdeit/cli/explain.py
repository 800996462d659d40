"""`fastdeit explain`."""

import argparse

from fastdeit.cli.parser import Verb


def _explain(args: argparse.Namespace, argv: list[str]) -> None:
    from fastdeit.verbs import explain

    explain.main(args)


EXPLAIN = Verb(
    "explain",
    "what a field of a recipe means, and what timm and DeiT call it",
    "[SECTION | FIELD | FLAG]",
    _explain,
    examples=[
        "fastdeit explain data.crop",
        "fastdeit explain optim  # all fields of a section",
        "fastdeit explain drop-path  # what stands for a flag of timm's or DeiT's training script",
    ],
)
EXPLAIN.parser.add_argument(
    "word", nargs="?", metavar="FIELD", help="section.field, a section, or a flag of timm's or DeiT's (default: list)"
)

VERBS = (EXPLAIN,)
