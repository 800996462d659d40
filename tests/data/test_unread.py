"""Public data sets that are not read: each is refused by name, and the command in the message makes it one that is."""

import json
import re
import shutil
import subprocess

import pytest

from fastdeit import cli
from fastdeit.data.sources import unread
from fastdeit.data.sources.source import DataError
from fastdeit.data.sources.unread import UNREAD
from tests.data.layouts import as_train, files, labels


def texts(root, **lines):
    """Text files, by path in the root."""
    for name, text in lines.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def coco(root):
    files(root, *(f"{split}2017/{i:012d}.jpg" for split in ("train", "val") for i in (1, 2)))
    texts(root, **{f"annotations/{what}_train2017.json": "{}" for what in ("instances", "captions")})


def cub(root):
    names = [f"{name}/{name[4:]}_{i}.jpg" for name in ("001.Albatross", "002.Auk") for i in (1, 2)]
    files(root, *(f"images/{name}" for name in names))
    texts(
        root,
        **{
            "images.txt": "".join(f"{i} {name}\n" for i, name in enumerate(names, 1)),
            "image_class_labels.txt": "1 1\n2 1\n3 2\n4 2\n",
            "train_test_split.txt": "1 1\n2 0\n3 1\n4 0\n",
        },
    )


def pets(root):
    files(root, *(f"images/{name}_{i}.jpg" for name in ("Maine_Coon", "beagle") for i in (1, 10)))
    files(root, *(f"annotations/trimaps/{name}_1.png" for name in ("Maine_Coon", "beagle")))
    head = "#Image CLASS-ID SPECIES BREED ID\n"
    texts(
        root,
        **{
            "annotations/trainval.txt": f"{head}Maine_Coon_1 24 1 10\nbeagle_1 5 2 4\n",
            "annotations/test.txt": "Maine_Coon_10 24 1 10\nbeagle_10 5 2 4\n",
        },
    )


def food(root):
    files(root, *(f"images/{name}/{i}.jpg" for name in ("apple_pie", "waffles") for i in (1, 2)))
    texts(root, **{f"meta/{name}.txt": f"apple_pie/{i}\nwaffles/{i}\n" for i, name in ((1, "train"), (2, "test"))})
    texts(root, **{"meta/train.json": "{}", "meta/classes.txt": "apple_pie\nwaffles\n"})


def aircraft(root):
    files(root, *(f"images/{i:07d}.jpg" for i in range(4)))
    texts(
        root,
        **{
            "images_variant_trainval.txt": "0000001 F/A-18\n0000000 Model B200\n",
            "images_variant_test.txt": "0000002 Model B200\n0000003 F/A-18\n",
        },
    )


def dtd(root):
    parts = {"train": 1, "val": 2, "test": 3}
    files(root, *(f"images/{name}/{name}_{i}.jpg" for name in ("banded", "dotted") for i in parts.values()))
    for part, i in parts.items():
        texts(root, **{f"labels/{part}1.txt": f"banded/banded_{i}.jpg\ndotted/dotted_{i}.jpg\n"})


def places(root):
    files(root, "val_256/Places365_val_00000001.jpg", "val_256/Places365_val_00000002.jpg")
    files(root, "data_256/a/abbey/00000001.jpg", "data_256/b/bar/00000001.jpg")
    texts(
        root,
        **{
            "places365_train_standard.txt": "/a/abbey/00000001.jpg 0\n/b/bar/00000001.jpg 1\n",
            "places365_val.txt": "Places365_val_00000001.jpg 1\nPlaces365_val_00000002.jpg 0\n",
        },
    )


def sun(root):
    files(root, *(f"{name}/sun_{i}.jpg" for name in ("a/abbey", "c/cabin/outdoor") for i in (1, 2)))
    texts(
        root,
        **{f"{part}_01.txt": f"/a/abbey/sun_{i}.jpg\n/c/cabin/outdoor/sun_{i}.jpg\n" for part, i in SUN_PARTS.items()},
    )


SUN_PARTS = {"Training": 1, "Testing": 2}


def inat(root):
    files(root, *(f"train_val_images/Aves/{name}/{i}.jpg" for name in ("Anas", "Bubo") for i in (1, 2)))
    for split, i in (("train", 1), ("val", 2)):
        images = [
            {"id": 7 + at, "file_name": f"train_val_images/Aves/{n}/{i}.jpg"} for at, n in ((0, "Anas"), (1, "Bubo"))
        ]
        found = {
            "images": images,
            "annotations": [{"image_id": 8, "category_id": 1}, {"image_id": 7, "category_id": 0}],
        }
        texts(root, **{f"{split}2017.json": json.dumps(found)})


def stylegan(root):
    names = [f"0000{i % 2}/img{i}.png" for i in range(8)]
    files(root, *names)
    texts(root, **{"dataset.json": json.dumps({"labels": [[name, i % 2] for i, name in enumerate(names)]})})


def beside(*pictures, **found):
    """Pictures, and files that are known of them."""
    return lambda root: (files(root, *pictures), texts(root, **found))


BOTH = ("train", "val")
SETS = {
    "COCO": coco,
    "Roboflow's export for COCO": beside("train/1.jpg", "valid/1.jpg", **{"train/_annotations.coco.json": ""}),
    "YOLO": beside(*(f"images/{split}/1.jpg" for split in BOTH), **{"labels/train/1.txt": "", "labels/val/1.txt": ""}),
    "Pascal VOC": beside("JPEGImages/1.jpg", "SegmentationClass/1.png", **{"Annotations/1.xml": ""}),
    "Open Images": beside("train/1.jpg", "validation/1.jpg", **{"train-annotations-bbox.csv": ""}),
    "ADE20K": beside(
        *(f"{part}/{split}/1.png" for part in ("images", "annotations") for split in ("training", "validation"))
    ),
    "Cityscapes": beside(*(f"{part}/{split}/ulm/1.png" for part in ("leftImg8bit", "gtFine") for split in BOTH)),
    "SVHN's full numbers": beside("train/1.png", "test/1.png", **{"train/digitStruct.mat": ""}),
    "CelebA": beside("img_align_celeba/1.jpg", **{"list_attr_celeba.txt": ""}),
    "CUB-200-2011": cub,
    "Oxford-IIIT Pet": pets,
    "Food-101": food,
    "FGVC-Aircraft": aircraft,
    "DTD": dtd,
    "Places365": places,
    "StyleGAN": stylegan,
    "iNaturalist 2017": inat,
    "SUN397": sun,
    "SUN397 without its partitions": beside(
        *(f"{name}/sun_{i}.jpg" for name in ("a/abbey", "c/cabin/outdoor") for i in range(4)), **{"ClassName.txt": ""}
    ),
}
LABELS = {
    "CUB-200-2011": (["001.Albatross", "002.Auk"], ["001.Albatross", "002.Auk"]),
    "Oxford-IIIT Pet": (["Maine_Coon", "beagle"], ["Maine_Coon", "beagle"]),
    "Food-101": (["apple_pie", "waffles"], ["apple_pie", "waffles"]),
    "FGVC-Aircraft": (["F/A-18", "Model B200"], ["Model B200", "F/A-18"]),
    "DTD": (["banded", "dotted"] * 2, ["banded", "dotted"]),
    "Places365": (["0", "1"], ["1", "0"]),
    "StyleGAN": (["0"] * 4 + ["1"] * 4, None),
    "iNaturalist 2017": (["0", "1"], ["0", "1"]),
    "SUN397 without its partitions": (["a/abbey"] * 4 + ["c/cabin/outdoor"] * 4, None),
    "SUN397": (["a/abbey", "c/cabin/outdoor"], ["a/abbey", "c/cabin/outdoor"]),
}


def test_the_table_is_tested_whole():
    assert set(SETS) == {one.name for one in UNREAD}
    assert set(LABELS) == {one.name for one in UNREAD if one.lists}


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("below", ["", "my sets/"])
def test_a_public_set_is_refused_by_name_and_its_command_makes_lists(tmp_path, name, below):
    """Also with data.val=10%, by which folders of pictures and masks would else be classes; and from a folder above."""
    root = tmp_path / below
    SETS[name](root)
    for overrides in ([], ["data.val=10%"]):
        with pytest.raises(
            DataError, match=re.escape(f"{root} has the layout of {name}, which is not read: ")
        ) as refused:
            as_train(tmp_path, *overrides)
        assert cli.exit_code(refused.value) == 2
    if name not in LABELS:
        assert f"write {root}/train.csv and {root}/val.csv with a line PATH,CLASS for each picture" in str(
            refused.value
        )
        return
    command = re.search("which is not read: `(.*)` writes lists", str(refused.value))[1]
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    expected = LABELS[name]
    if expected[1] is None:
        with pytest.raises(DataError, match=r"hold a share of train out by data\.val=10%"):
            as_train(root)
        train, val = as_train(root, "data.val=50%")
        assert sorted(labels(train) + labels(val)) == expected[0]
        return
    train, val = as_train(root)
    assert (labels(train), labels(val)) == expected
    for source in (train, val):
        assert [source.read(i).tobytes().decode() for i in range(len(source))] == list(
            map(source.name, range(len(source)))
        )


@pytest.mark.parametrize(
    ("make", "trap"),
    [(stylegan, "json.py"), (inat, "json.py"), (places, "data_;touch executed;#e/1.jpg")],
    ids=["StyleGAN", "iNaturalist", "Places365"],
)
def test_a_command_for_a_set_executes_nothing_that_lies_in_the_set(tmp_path, make, trap):
    """A user copies it, and the set is somebody else's: Python would import a module there, sed has a flag e."""
    make(tmp_path)
    for folder in tmp_path.glob("data_*"):
        shutil.rmtree(folder)
    texts(tmp_path, **{trap: "open('executed', 'w')"})
    command = re.search("`(.*)` writes lists", unread.of_folder(tmp_path))[1]
    subprocess.run(command, shell=True, check=False, cwd=tmp_path, stderr=subprocess.DEVNULL)
    assert (tmp_path / "train.csv").exists()
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("classes", "beside"), [("ab", "ClassName.txt"), (["00000", "00001"], "dataset.json")], ids=["letters", "numbers"]
)
def test_classes_that_are_called_as_the_folders_of_a_public_set_are_read(tmp_path, classes, beside):
    files(tmp_path, *(f"{name}/{i}.jpg" for name in classes for i in range(8)), beside)
    train, val = as_train(tmp_path, "data.val=50%")
    assert sorted(labels(train) + labels(val)) == sorted([*classes] * 8)
