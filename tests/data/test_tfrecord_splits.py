"""TFRecord files of a data set: how its classes are numbered and named, and which files are those of a split."""

import pytest

from fastdeit.data.sources.datasets import open_pair, open_source
from fastdeit.data.sources.source import DataError
from fastdeit.data.sources.tfrecord import files
from tests.data.writers import tfrecord


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTDEIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path):
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


# classes


def numbered(root, train, val=(0, 1)):
    for split, labels in (("train", train), ("val", val)):
        tfrecord(root / f"{split}-00000-of-00001", [b"x"] * len(labels), labels)


def both(root):
    return [[(one.classes[one.label(i)], one.label(i)) for i in range(len(one))] for one in open_pair("tfrecord", root)]


def test_numbers_from_0(root):
    numbered(root, [0, 2, 1], [2, 1])
    assert both(root) == [[("0", 0), ("2", 2), ("1", 1)], [("2", 2), ("1", 1)]]


def test_numbers_from_1_keep_their_names(root):
    numbered(root, [1, 3, 2], [3, 2])
    assert both(root) == [[("1", 0), ("3", 2), ("2", 1)], [("3", 2), ("2", 1)]]
    assert open_pair("tfrecord", root)[0].classes == ["1", "2", "3"]


def test_held_out_images_count_as_those_of_training_do(root):
    numbered(root, [0, 1, 2], [1, 2])
    train, val = open_pair("tfrecord", root)
    assert [val.label(i) for i in range(2)] == [1, 2]
    assert train.classes == val.classes == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("train", "val", "message"),
    [
        (
            [1, 2, 3],
            [0, 1],
            "class numbers from 0 to 1, but those of the training split are from 1 on; a file labels.txt",
        ),
        ([2, 3, 4], [2, 3], "the smallest class number is neither 0 nor 1, .* a file labels.txt beside the records"),
        ([0, 1], [0, 1, 2], "the classes of train and val differ .*only in val: '2'"),
        ([0, 0], [0, 1], "every label is 0; classification needs two or more classes"),
        ([1, 1], [1, 2], "every label is 1; classification needs two or more classes"),
    ],
)
def test_numbers_that_do_not_say_what_the_classes_are(root, train, val, message):
    numbered(root, train, val)
    with pytest.raises(DataError, match=message):
        open_pair("tfrecord", root)


def test_a_part_of_a_split_may_begin_anywhere(root):
    numbered(root, [5, 7, 6])
    source = open_source("tfrecord", root, "train")
    assert source.classes == [str(number) for number in range(8)]
    assert [source.label(i) for i in range(3)] == [5, 7, 6]
    assert source.first is None


SLIM = "0:background\n1:tench\n2:goldfish\n3:shark\n"
NAMES = ["tench", "goldfish", "shark"]


@pytest.mark.parametrize(
    ("file", "text", "train", "labels", "classes"),
    [
        ("label.labels.txt", "tench\ngoldfish\nshark\n", [1, 2], [1, 2], NAMES),
        ("label.labels.txt", "tench\r\ngoldfish\r\nshark", [0, 2], [0, 2], NAMES),
        ("labels.txt", "0:tench\n1:goldfish\n2:shark", [1, 2], [1, 2], NAMES),
        ("labels.txt", "1:tench\n2:goldfish\n3:shark", [2, 3], [1, 2], NAMES),
        ("labels.txt", SLIM, [2, 3], [1, 2], NAMES),
        ("labels.txt", SLIM, [0, 3], [0, 3], ["background", *NAMES]),
        ("labels.txt", "0:dog\n1:a: cat", [0, 1], [0, 1], ["dog", "a: cat"]),
    ],
)
def test_names_beside_the_records_say_where_numbers_start(root, file, text, train, labels, classes):
    numbered(root, train, train)
    (root / file).write_text(text)
    for source in open_pair("tfrecord", root):
        assert source.classes == classes
        assert [source.label(i) for i in range(2)] == labels


@pytest.mark.parametrize("place", ["", "train"])
def test_names_may_lie_beside_the_records_or_in_the_root(root, place):
    tfrecord(root / "train" / "train-00000-of-00001", [b"x", b"y"], [0, 1])
    (root / place / "labels.txt").write_text("0:cat\n1:dog\n")
    assert open_source("tfrecord", root, "train").classes == ["cat", "dog"]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("labels.txt", "cat\ndog\n", "labels.txt: a line is not NUMBER:NAME"),
        ("labels.txt", "0:cat\n0:dog\n1:eel\n", "labels.txt: the class numbers are not consecutive"),
        ("labels.txt", "0:cat\n2:dog\n", "labels.txt: the class numbers are not consecutive"),
        ("labels.txt", "-1:cat\n0:dog\n1:eel\n", "labels.txt: the class numbers are not consecutive"),
        ("labels.txt", "", "labels.txt: a line is not NUMBER:NAME"),
        ("labels.txt", "0:cat\n1:\n", "labels.txt: a class has no name"),
        ("label.labels.txt", "cat\n\ndog\n", "label.labels.txt: a class has no name"),
        ("label.labels.txt", "c\0at\ndog\n", "a class has no name, or one with a NUL"),
        ("label.labels.txt", "cat\n", r"numbers from 0 to 1, but .*label.labels.txt names those from 0 to 0"),
        ("labels.txt", "1:cat\n2:dog\n", r"numbers from 0 to 1, but .*labels.txt names those from 1 to 2"),
    ],
)
def test_names_that_cannot_be_used(root, file, text, message):
    numbered(root, [0, 1])
    (root / file).write_text(text)
    with pytest.raises(DataError, match=message):
        open_source("tfrecord", root, "train")


def test_a_list_of_names_that_cannot_be_read(root):
    numbered(root, [0, 1])
    (root / "labels.txt").mkdir()
    with pytest.raises(DataError, match=r"labels\.txt: cannot be read: Is a directory"):
        open_source("tfrecord", root, "train")


# files of a split


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


@pytest.mark.parametrize(
    ("names", "split", "found"),
    [
        (["train-00000-of-00002", "train-00001-of-00002", "val-00000-of-00001"], "train", [0, 1]),
        (["train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001"], "validation", [2]),
        (["validation-00000-of-00001", "val-00000-of-00001"], "val", [1]),
        (["x-train.tfrecord-00000-of-00001", "x-validation.tfrecord-00000-of-00001"], "train", [0]),
        (["x-train.tfrecord-00000-of-00001", "x-validation.tfrecord-00000-of-00001"], "validation", [1]),
        (["x_train-0001.tfrecord", "x_val-0001.tfrecord"], "train", [0]),
        (["train-1-of-11", *(f"train-{i}-of-11" for i in (0, *range(2, 11)))], "train", [1, 0, *range(2, 11)]),
        (["train.tfrecord", "val.tfrecords", "trained.tfrecord"], "train", [0]),
        (["train/b.tfrecord", "train/a.tfrecords", "train/README", "train/.hidden.tfrecord"], "train", [1, 0]),
        (["train/train-00000-of-00001", "val/val-00000-of-00001"], "val", [1]),
        (["train-00000-of-00001.tfrecord"], "train", [0]),
        (["a-00000-of-00002", "a-00001-of-00002"], "a-0000?-of-*", [0, 1]),
        (["a-00000-of-00002"], "a-00000-of-00002", [0]),
        (["sub/any name"], "sub/any name", [0]),
        (["train-00000-of-00001", "train-00000-of-00001.parquet", "train-00000-of-00001.arrow"], "train", [0]),
    ],
)
def test_files_of_a_split(root, names, split, found):
    touch(root, *names)
    assert files(root, split) == [names[i] for i in found]


def test_a_split_may_be_an_absolute_path(root):
    touch(root, "train/a.tfrecord", "b.tfrecord")
    for split in (root / "train", root / "t*/*"):
        assert files(root, str(split)) == [f"{root}/train/a.tfrecord"]
    assert files(root, str(root / "b.tfrecord")) == [f"{root}/b.tfrecord"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train-00001-of-00003", "train-00000-of-00003"], "2 of 3 files, as .*: number 2 is missing"),
        (["train-00001-of-00003", "train-00002-of-00003"], "number 0 is missing; complete the data set"),
        (["train-00000-of-00001", "train-00001-of-00001"], "2 of 1 files, as .*: train-00001-of-00001 is one too many"),
        (["train-00000-of-99999999999"], "1 of 99999999999 files, as .*: numbers 1 to 99999999998 are missing"),
        (["train-00000-of-00000"], "is one too many"),
        (
            ["train-00000-of-00002", "train-00001-of-00002", "train-1-of-00002"],
            "train-00001-of-00002 and train-1-of-00002 are the same part of the data set",
        ),
        (
            ["train-00000-of-00001", "train-00000-of-00002"],
            "belong to different sets of files; choose one set by a glob",
        ),
        (["train-00000-of-00001", "x-train-00000-of-00001"], "belong to different sets of files"),
        (["train-00000-of-00001", "train.tfrecord"], "belong to different sets of files"),
        (["train/a-0-of-1", "train/b-0-of-1"], "train: a-0-of-1 and b-0-of-1 belong to different sets"),
        (["val-0-of-1", "fit-0000.tfrecord"], "no TFRecord file of split 'train'; looked for .* given by a glob"),
    ],
)
def test_sets_of_files_that_are_not_complete(root, names, message):
    touch(root, *names)
    with pytest.raises(DataError, match=message):
        files(root, "train")
