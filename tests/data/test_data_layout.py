"""Kinds of data sets are recognised by their layout, and only where it is unmistakable."""

import pytest

from fastdeit.data.datasets import KINDS
from fastdeit.data.layout import LAYOUTS, kinds_at, layout


@pytest.fixture
def root(tmp_path):
    """A folder with these files; a name that ends in / is a folder."""

    def root(*names):
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir() if name.endswith("/") else path.touch()
        return tmp_path

    return root


SIGNS = [
    ("folder", ["train/a/1.jpg", "val/a/1.jpg"]),
    ("packed", ["train.pack", "val.pack"]),
    ("packed", ["val.pack"]),
    ("tar", ["train/0.tar", "val/0.tar"]),
    ("tar", ["train-0000.tar", "val-0000.tar"]),
    ("tfrecord", ["train-00000-of-00001", "validation-00000-of-00001"]),
    ("tfrecord", ["imagenet-train.tfrecord-00000-of-00001", "imagenet-val.tfrecord-00000-of-00001"]),
    ("tfrecord", ["train/0.tfrecord", "val/0.tfrecord"]),
    ("parquet", ["data/train-00000-of-00001.parquet"]),
    ("parquet", ["train.parquet"]),
    ("parquet", ["train/0.parquet"]),
    ("arrow", ["train/data-00000-of-00001.arrow", "train/state.json", "val/data-00000-of-00001.arrow"]),
    ("arrow", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow"]),
    ("arrow", ["parquet-train.arrow", "parquet-validation.arrow"]),
    ("imagenet", ["train/n01440764/1.JPEG", "val/1.JPEG", "ILSVRC2012_devkit_t12/"]),
    ("cifar10", ["cifar-10-batches-bin/"]),
    ("cifar10", ["cifar-10-batches-py/"]),
    ("cifar100", ["cifar-100-python/"]),
    ("flowers102", ["setid.mat", "imagelabels.mat", "jpg/1.jpg"]),
    ("stanford_cars", ["devkit/cars_meta.mat"]),
    ("inat2018", ["train2018.json"]),
    ("inat2019", ["train2019.json"]),
]


@pytest.mark.parametrize(("kind", "names"), SIGNS)
def test_each_kind_shows_its_own_sign_alone(root, kind, names):
    assert kinds_at(root(*names)) == [kind]


def test_every_kind_has_a_sign_and_a_layout():
    assert {kind for kind, _ in SIGNS} == set(LAYOUTS) == set(KINDS)


def test_cifar_is_recognised_from_inside_its_folder(root):
    assert kinds_at(root("cifar-10-batches-bin/batches.meta.txt") / "cifar-10-batches-bin") == ["cifar10"]


def test_several_kinds_are_all_named(root):
    assert kinds_at(root("train/a/1.jpg", "train.pack")) == ["folder", "packed"]


@pytest.mark.parametrize(
    "names",
    [
        [],
        ["train/1.jpg"],
        ["other/a/1.jpg"],
        ["trained.pack"],
        ["trained.tar"],
        ["val-0.tar"],
        ["cache-train.arrow"],
        ["state.json"],
    ],
)
def test_anything_else_is_no_data_set(root, names):
    assert kinds_at(root(*names)) == []


def test_what_is_no_folder_is_no_data_set(root):
    path = root("train.pack")
    assert kinds_at(path / "train.pack") == []
    assert kinds_at(path / "cifar-10-batches-bin") == []


def test_splits_may_have_other_names(root):
    path = root("fit/a/1.jpg", "test/a/1.jpg")
    assert kinds_at(path) == []
    assert kinds_at(path, "fit", "test") == ["folder"]
    assert kinds_at(path, str(path / "fit"), "test") == ["folder"]


def test_layout_names_the_splits():
    assert layout("folder", "fit", "test") == "ROOT/fit/CLASS/*.jpg and ROOT/test/CLASS/*.jpg"
