"""Public data sets whose labels stand apart from their pictures, in a form that no reader has: by which names they are
known, and the commands that write the lists of `lists.py` from what they hold.

One table. To read such a data set in place, write a reader (docs/data.md) and strike it out here.

The data set is somebody else's, and a user copies the command. So no name of a file becomes a part of a program there,
and Python runs isolated (-I): else it would import modules that lie in the data set.
"""

from dataclasses import dataclass
from pathlib import Path
from shlex import quote

_SEVERAL = (
    "its pictures have several labels, and classification needs one: write ROOT/train.csv and ROOT/val.csv with a line "
    "PATH,CLASS for each picture, or cut its objects out into ROOT/train/CLASS/ and ROOT/val/CLASS/"
)


@dataclass(frozen=True)
class Unread:
    """A layout: of the data set `name`, known by `signs`, patterns of paths all of which have to be there. lists: a
    shell command that writes train.csv in the root, and val.csv where there is a held-out split; None where its
    pictures have several labels."""

    name: str
    signs: tuple[str, ...]
    lists: str | None = None


UNREAD = (
    Unread("COCO", ("annotations/*_*20??.json",)),
    Unread("Roboflow's export for COCO", ("train/_annotations.coco.json",)),
    Unread("YOLO", ("images/train*", "labels/train*/*.txt")),
    Unread("YOLO", ("train/images", "train/labels/*.txt")),
    Unread("Pascal VOC", ("JPEGImages", "Annotations")),
    Unread("Open Images", ("*annotations-bbox.csv",)),
    Unread("Open Images", ("train/data", "train/labels/*.csv")),
    Unread("ADE20K", ("images/training", "annotations/training")),
    Unread("Cityscapes", ("leftImg8bit", "gt*")),
    Unread("SVHN's full numbers", ("train/digitStruct.mat",)),
    Unread("CelebA", ("list_attr_celeba.*",)),
    Unread(
        "CUB-200-2011",
        ("train_test_split.txt", "image_class_labels.txt", "images.txt"),
        """awk 'NR == FNR {train[$1] = $2; next} {split($2, part, "/"); print "images/" $2 "," part[1] > """
        """(train[$1] == 1 ? "train.csv" : "val.csv")}' train_test_split.txt images.txt""",
    ),
    Unread(
        "Oxford-IIIT Pet",
        ("annotations/trainval.txt", "annotations/test.txt", "images"),
        """awk '!/^#/ {name = $1; sub(/_[0-9]+$/, "", name); print "images/" $1 ".jpg," name > """
        """(FILENAME ~ /trainval/ ? "train.csv" : "val.csv")}' annotations/trainval.txt annotations/test.txt""",
    ),
    Unread(
        "Food-101",
        ("meta/train.txt", "meta/test.txt", "images"),
        "sed 's#\\(.*\\)/.*#images/&.jpg,\\1#' meta/train.txt > train.csv; "
        "sed 's#\\(.*\\)/.*#images/&.jpg,\\1#' meta/test.txt > val.csv",
    ),
    Unread(
        "FGVC-Aircraft",
        ("images_variant_trainval.txt", "images_variant_test.txt", "images"),
        "sed 's# #.jpg,#; s#^#images/#' images_variant_trainval.txt > train.csv; "
        "sed 's# #.jpg,#; s#^#images/#' images_variant_test.txt > val.csv",
    ),
    Unread(
        "DTD",
        ("labels/train1.txt", "labels/val1.txt", "labels/test1.txt"),
        "sed 's#\\(.*\\)/.*#images/&,\\1#' labels/train1.txt labels/val1.txt > train.csv; "
        "sed 's#\\(.*\\)/.*#images/&,\\1#' labels/test1.txt > val.csv",
    ),
    Unread(
        "Places365",
        ("places365_train_*.txt", "places365_val.txt", "val_*"),
        """awk -v at="$(ls -d data_*/)" '{print at substr($1, 2) "," $2}' places365_train_*.txt > train.csv; """
        """awk -v at="$(ls -d val_*/)" '{print at $1 "," $2}' places365_val.txt > val.csv""",
    ),
    Unread(
        "StyleGAN",
        ("dataset.json", "00000/img*"),
        """python -I -c 'import json; [print(*one, sep=",") for one in json.load(open("dataset.json"))["labels"]]' """
        "> train.csv",
    ),
    Unread(
        "iNaturalist 2017",
        ("train2017.json", "val2017.json", "train_val_images"),
        """for split in train val; do python -I -c 'import json, sys; all = json.load(sys.stdin); """
        """label = {one["image_id"]: one["category_id"] for one in all["annotations"]}; """
        """[print(one["file_name"], label[one["id"]], sep=",") for one in all["images"]]' < ${split}2017.json """
        """> $split.csv; done""",
    ),
    Unread(
        "SUN397",
        ("Training_01.txt", "Testing_01.txt"),
        "sed 's#^/\\(.*\\)/.*#&,\\1#; s#^/##' Training_01.txt > train.csv; "
        "sed 's#^/\\(.*\\)/.*#&,\\1#; s#^/##' Testing_01.txt > val.csv",
    ),
    Unread(
        "SUN397 without its partitions",
        ("ClassName.txt", "a/*/*.jpg"),
        "find ? -name '*.jpg' | sort | sed 's#\\(.*\\)/.*#&,\\1#' > train.csv",
    ),
)


def of_folder(root: Path) -> str | None:
    """What the folder is that is not read, and the way out, in a sentence; None where it is none in `UNREAD`."""
    try:
        found = next((one for one in UNREAD if all(_is_there(root, sign) for sign in one.signs)), None)
    except OSError:
        return None  # what is wrong with it is told by who opens it
    if found is None:
        return None
    where = f"{root} has the layout of {found.name}, which is not read: "
    if found.lists is None:
        return where + _SEVERAL.replace("ROOT", str(root))
    return f"{where}`cd {quote(str(root))} && ({found.lists})` writes lists of its pictures, which are then read there"


def _is_there(root: Path, sign: str) -> bool:
    return any(True for _ in root.glob(sign)) if "*" in sign or "?" in sign else (root / sign).exists()
