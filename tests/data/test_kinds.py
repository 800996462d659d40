"""Kinds of data sets: one table, readers of third parties beside it, folders recognised where it is unmistakable."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from fastdeit.data.sources import kinds
from fastdeit.data.sources.datasets import kinds_at, layout, open_pair, open_source
from fastdeit.data.sources.kinds import READERS, Kind
from fastdeit.data.sources.source import DataError
from fastdeit.data.sources.synthetic import SyntheticSource


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
    ("imagenet", ["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"]),
    ("imagenet", ["ILSVRC2012_img_train.tar", "val/n01440764/1.JPEG"]),
    ("imagenet", ["train/n01440764/1.JPEG", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"]),
    ("imagenet", ["train/n01440764/1.JPEG", "val/1.JPEG", "ILSVRC2012_devkit_t12.tar.gz"]),
    ("folder", ["train/a/1.JPEG", "val/a/1.JPEG", "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"]),
    ("imagenet", ["ILSVRC/Data/CLS-LOC/train/n01440764/1.JPEG", "LOC_val_solution.csv"]),
    ("tiny_imagenet", ["train/n01440764/images/1.JPEG", "val/val_annotations.txt", "wnids.txt"]),
    ("list", ["train.csv", "val.csv"]),
    ("list", ["train.jsonl"]),
    ("list", ["train/metadata.csv", "train/1.jpg"]),
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
    assert {kind for kind, _ in SIGNS} == set(READERS)


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


def test_the_table_calls_each_reader_as_it_calls_itself():
    assert [kind.name for kind in kinds.shipped()] == list(READERS)
    assert kinds.names() == (*READERS, "synthetic", "digits")


def test_the_names_cost_no_numpy():
    code = "import sys, fastdeit.data.sources.kinds as kinds; kinds.names(); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"numpy", "torch", "PIL", "pyarrow"} & set(loaded)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.pack", "packed"),
        ("train-0001.tar", "tar"),
        ("train-00003-of-00128", "tfrecord"),
        ("a-train.tfrecord-00003-of-00128", "tfrecord"),
        ("train-00003-of-00128.tfrecords", "tfrecord"),
        ("a.parquet", "parquet"),
        ("train-00003-of-00128.arrow", "arrow"),
        ("train.csv", "list"),
        ("a.jpg", None),
        ("of-1", None),
    ],
)
def test_files_show_their_kind_by_the_end_of_their_names(name, kind):
    assert [found.name for found in kinds.shipped() if found.has_file(name)] == [kind] * (kind is not None)


def by_function(root: Path, split: str) -> SyntheticSource:
    return SyntheticSource(8 if split == "train" else 4, classes=2)


def fewer_held_out(training: SyntheticSource, root: Path, split: str) -> SyntheticSource:
    return SyntheticSource(len(training) // 4, classes=2)


MINE = Kind("mine", by_function, "ROOT/{train}.mine and ROOT/{val}.mine", named_splits=False, held_out=fewer_held_out)
NOTHING = 3


def test_a_reader_of_ones_own_is_a_kind_or_a_function(tmp_path):
    train, val = open_pair("tests.data.test_kinds:by_function", tmp_path, "any", "thing")
    assert (len(train), len(val)) == (4, 4)
    train, val = open_pair("tests.data.test_kinds:MINE", tmp_path)
    assert (len(train), len(val)) == (8, 2)
    assert layout("tests.data.test_kinds:MINE", "a", "b") == "ROOT/a.mine and ROOT/b.mine"
    said = f"{tmp_path}: a data set of kind mine has the splits train and val, not 'test'"
    with pytest.raises(DataError, match=said):
        open_source("tests.data.test_kinds:MINE", tmp_path, "test")
    with pytest.raises(
        DataError, match=r"no such directory; the expected layout is ROOT/train\.mine and ROOT/val\.mine"
    ):
        open_source("tests.data.test_kinds:MINE", tmp_path / "no", "train")


@pytest.mark.parametrize(
    ("use", "message"),
    [
        ("zip", "data source: 'zip' must be one of folder, packed, .*, or an import path package.module:KIND"),
        ("synthetic", "data source: 'synthetic' must be one of folder"),
        ("no_such_module:KIND", "cannot be imported: No module named 'no_such_module'"),
        ("tests.data.test_kinds:NONE", "cannot be imported: module 'tests.data.test_kinds' has no attribute 'NONE'"),
        (":NONE", "is not an import path"),
        ("tests.data.test_kinds:NOTHING", r"is 3, but has to be a fastdeit\.data\.sources\.kinds\.Kind or a function"),
    ],
)
def test_what_is_no_reader(tmp_path, use, message):
    with pytest.raises(DataError, match=message):
        open_source(use, tmp_path, "train")


@pytest.mark.parametrize("name", ["parquet", "arrow"])
def test_kinds_that_need_pyarrow_say_so_and_hide_no_other(root, monkeypatch, name):
    monkeypatch.setitem(sys.modules, f"fastdeit.data.sources.{name}", None)
    path = root(f"train.{name}", f"val.{name}")
    assert kinds_at(path) == [name]
    with pytest.raises(DataError, match=rf"^{name.capitalize()} files need pyarrow: pip install fastdeit\[parquet\]"):
        open_source(name, path, "train")


def test_the_reader_in_the_documentation_reads(root, monkeypatch, varied):
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    module = ModuleType("mine")
    monkeypatch.setitem(sys.modules, "mine", module)
    exec(text.partition("```python\n")[2].partition("```")[0], module.__dict__)
    path = root()
    for split, rows in (("train", ("b.jpg,cat", "a.jpg,dog", "c.jpg,cat")), ("val", ("d.jpg,dog", "e.jpg,cat"))):
        (path / f"{split}.csv").write_text("\n".join(rows))
    for name, data in zip("abcde", varied, strict=False):
        (path / f"{name}.jpg").write_bytes(data)
    for use in ("mine:read", "mine:CSV"):
        train, val = open_pair(use, path)
        assert [(train.classes[train.label(i)], train.name(i)) for i in (0, 1)] == [("cat", "b.jpg"), ("dog", "a.jpg")]
        assert (len(train), len(val), train.read(1).tobytes()) == (3, 2, varied[0])
