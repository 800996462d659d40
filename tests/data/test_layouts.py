"""The layouts that people have: each is read with the right labels, or refused with a sentence that says the way out.

`SETS` and `REFUSED` are the matrix; a layout is a function that writes it below a folder. Samples are files of a few
bytes: what counts is which are found, and their labels.
"""

import errno
import gzip
import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import warnings
from itertools import product
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from fastdeit import cli
from fastdeit.data.sources.datasets import advice, open_pair, open_source
from fastdeit.data.sources.folder import FolderSource
from fastdeit.data.sources.source import DataError
from fastdeit.verbs import data as data_verbs
from tests.data.layouts import NAMES, NUMBERS, as_train, files, folders, labels
from tests.data.writers import tfrecord

pyarrow = pytest.importorskip("pyarrow")
from pyarrow import parquet  # noqa: E402


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FASTDEIT_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.delenv("RANK", raising=False)


def tar(path, *labels, json_field=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for at, label in enumerate(labels):
            text = json.dumps({json_field: label, "filename": "x"}).encode() if json_field else b"%d" % label
            for end, data in (("jpg", b"%d" % at), ("json" if json_field else "cls", text)):
                info = tarfile.TarInfo(f"n0144_{at}.{end}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


def hub(path, labels, image="image", label="label", plain=False, kind=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [b"%d" % at for at in range(len(labels))]
    images = rows if plain else [{"bytes": row, "path": None} for row in rows]
    table = {image: images, label: pyarrow.array(labels, kind), "other": ["x"] * len(labels)}
    parquet.write_table(pyarrow.table(table), path)


def pair(root, write, train="train", val="val", **options):
    write(root / train, [0, 1, 1], **options)
    write(root / val, [1, 0], **options)


ANIMALS = (["cat", "cat", "dog", "dog"], ["cat", "cat", "dog", "dog"])
FINE = ["data.image_column=img", "data.label_column=fine_label"]


def hub_of(kind, values=("cat", "dog")):
    def write(root):
        for name, numbers in (("train", (0, 1, 1)), ("validation", (1, 0))):
            hub(root / "data" / f"{name}-00000-of-00001.parquet", [values[i] for i in numbers], kind=kind)

    return write


def hashed(root):
    """Names as the hub gave them for some time, with a hash behind the number."""
    for number, part in enumerate(([0], [1, 1])):
        hub(root / "data" / f"train-0000{number}-of-00002-6c29b7fd1ee4c0d3.parquet", part)
    hub(root / "data" / "test-00000-of-00001-0123456789abcdef.parquet", [1, 0])


def mixed_widths(root):
    hub(root / "train-00000-of-00002.parquet", [0], kind=pyarrow.int32())
    hub(root / "train-00001-of-00002.parquet", [1, 1], kind=pyarrow.int64())
    hub(root / "val.parquet", [1, 0])


def published_shards(root):
    tar(root / "imagenet1k-train-0000.tar", 0, 1)
    tar(root / "imagenet1k-train-0001.tar", 1)
    tar(root / "imagenet1k-validation-00.tar", 1, 0)


def records(root):
    tfrecord(root / "imagenet2012-train.tfrecord-00000-of-00001", [b"a", b"b", b"c"], [0, 1, 1])
    tfrecord(root / "imagenet2012-validation.tfrecord-00000-of-00001", [b"d", b"e"], [1, 0])


SETS = {
    "folders": (lambda root: folders(root, "train", "val"), [], ANIMALS),
    **{
        f"folders, {name}": (lambda root, name=name: folders(root, "train", name), [], ANIMALS)
        for name in ("valid", "validation", "test", "dev")
    },
    "folders, val beside test": (lambda root: folders(root, "train", "val", "test"), [], ANIMALS),
    "folders, test chosen": (lambda root: folders(root, "train", "valid", "test"), ["data.val=test"], ANIMALS),
    "folders, a class called train": (
        lambda root: files(root, *(f"{split}/{name}/1.jpg" for split in ("train", "val") for name in ("bus", "train"))),
        [],
        (["bus", "train"], ["bus", "train"]),
    ),
    "folders, test without classes": (
        lambda root: (folders(root, "train", "valid"), files(root, "test/1.jpg")),
        [],
        ANIMALS,
    ),
    "parquet": (lambda root: pair(root, hub, "train.parquet", "val.parquet"), [], NUMBERS),
    "parquet, names with a hash": (hashed, [], NUMBERS),
    "parquet, columns of CIFAR-100": (
        lambda root: pair(root, hub, "train.parquet", "test.parquet", image="img", label="fine_label"),
        FINE,
        NUMBERS,
    ),
    "parquet, images as bytes": (lambda root: pair(root, hub, "train.parquet", "val.parquet", plain=True), [], NUMBERS),
    "parquet, dictionary": (hub_of(pyarrow.dictionary(pyarrow.int8(), pyarrow.string())), [], NAMES),
    "parquet, large strings": (hub_of(pyarrow.large_string()), [], NAMES),
    "parquet, names as bytes": (hub_of(pyarrow.binary(), (b"cat", b"dog")), [], NAMES),
    "parquet, int8": (hub_of(pyarrow.int8(), (0, 1)), [], NUMBERS),
    "parquet, widths that differ": (mixed_widths, [], NUMBERS),
    "shards as published": (published_shards, [], NUMBERS),
    "shards in braces": (
        published_shards,
        [
            "data.source=tar",
            "data.train=imagenet1k-train-{0000..0001}.tar",
            "data.val=imagenet1k-validation-{00..00}.tar",
        ],
        NUMBERS,
    ),
    "shards with JSON labels": (
        lambda root: pair(root, lambda path, some: tar(path, *some, json_field="cls"), "train-0.tar", "val-0.tar"),
        ["data.label_column=cls"],
        NUMBERS,
    ),
    "shards with names": (
        lambda root: [
            tar(root / f"{split}-0.tar", *some, json_field="label")
            for split, some in zip(("train", "val"), NAMES, strict=True)
        ],
        [],
        NAMES,
    ),
    "records of TFDS": (records, [], NUMBERS),
}


@pytest.mark.parametrize("name", SETS)
@pytest.mark.filterwarnings("error")
def test_what_is_read_has_the_right_labels(tmp_path, name):
    write, overrides, expected = SETS[name]
    write(tmp_path)
    train, val = as_train(tmp_path, *overrides)
    assert (labels(train), labels(val)) == expected
    assert len({train.read(i).tobytes() for i in range(len(train))}) == len(train) or name.startswith(("sha", "par"))


def alone(name):
    return lambda root: files(root, name)


def named_hub(path, labels):
    hub(path, [("cat", "cat ")[label] for label in labels])


def of_class_folders(path, labels):
    with tarfile.open(path, "w") as archive:
        for at, label in enumerate(labels):
            archive.addfile(tarfile.TarInfo(f"{label}/{at}.jpg"))


def of_different_types(root):
    hub(root / "train-00000-of-00002.parquet", [0, 1])
    hub(root / "train-00001-of-00002.parquet", ["cat", "dog"])
    hub(root / "val.parquet", [0, 1])


TWO = r"nothing is called val, but there are valid and test: say which is held out by data\.val=valid or data\.val=test"
REFUSED = {
    "two held-out splits": (lambda root: folders(root, "train", "valid", "test"), [], TWO),
    "a single folder of classes": (
        lambda root: folders(root, "."),
        [],
        r"itself holds one split of kind folder: hold a share of it out by data\.val=10%",
    ),
    "a folder too many": (
        lambda root: folders(root, "imagenet/train", "imagenet/val"),
        [],
        r"/imagenet holds data of kind folder: give that folder",
    ),
    "a folder too many, beside one that is not read": (
        lambda root: (folders(root, "imagenet/train", "imagenet/val"), files(root, "coco/annotations/a_b2017.json")),
        [],
        r"/imagenet holds data of kind folder: give that folder",
    ),
    "two folders too many": (
        lambda root: pair(root, hub, "default/1.0/train/0000.parquet", "default/1.0/test/0000.parquet"),
        [],
        r"/default/1\.0 holds data of kind parquet: give that folder",
    ),
    "splits of other names": (
        lambda root: folders(root, "Train", "Val"),
        [],
        r"nothing in .* is called train, but its folders 'Train', 'Val' may be splits: .*data\.train=NAME.*--split",
    ),
    "classes in which the splits lie": (
        lambda root: files(root, *(f"{name}/{split}/1.jpg" for name in ("cat", "dog") for split in ("train", "val"))),
        [],
        r"the folders of .* each hold one called train, but classes lie in splits, as train/CLASS: .* puts",
    ),
    "flat splits": (
        lambda root: files(root, *(f"{split}/{i}.jpg" for split in ("train", "test") for i in (1, 2))),
        ["data.val=10%"],
        r"no class folders; .* or named with their classes in a list \(data\.source=list\)",
    ),
    "flat splits of other names": (
        lambda root: files(root, *(f"{split}/{i}.jpg" for split in ("train2017", "val2017", "images") for i in (1, 2))),
        ["data.val=10%"],
        r"no subfolder 'train'; the expected layout is",
    ),
    "pictures and masks": (
        lambda root: files(
            root, *(f"{split}/{part}/1.png" for split in ("train", "val") for part in ("images", "masks"))
        ),
        [],
        r"its folders 'images', 'masks' are named as splits, or as pictures and what is known of them, and not",
    ),
    "no held-out split": (
        lambda root: folders(root, "train"),
        [],
        r"no subfolder 'val'; .*; if there is no held-out split, hold a share of train out by data\.val=10%",
    ),
    "a split two folders down": (
        lambda root: folders(root, "GTSRB/Training"),
        [],
        r"/GTSRB/Training itself holds one split: give that folder, and hold a share of it out by data\.val=10%",
    ),
    "a split in a folder": (
        lambda root: folders(root, "photos"),
        [],
        r"/photos itself holds one split: give that folder, and hold a share of it out by data\.val=10%",
    ),
    "names that look alike": (
        lambda root: files(root, "train/\u00e9/1.jpg", "train/b/1.jpg", "val/e\u0301/1.jpg", "val/b/1.jpg"),
        [],
        r"some look alike, but one split has them in Unicode's form NFC and the other in NFD: rename those",
    ),
    **{
        f"classes of one split that look alike, {kind}": (
            lambda root, write=write: write(root),
            [],
            r"the classes '.*' and '.*' look alike, but differ in spaces or in Unicode's form .*; give both the same",
        )
        for kind, write in {
            "folders": lambda root: files(
                root, *(f"{split}/{name}/1.jpg" for split in ("train", "val") for name in ("\u00e9", "e\u0301"))
            ),
            "names with a space": lambda root: pair(root, named_hub, "train.parquet", "val.parquet"),
        }.items()
    },
    "a tar file of class folders": (
        lambda root: pair(root, of_class_folders, "train.tar", "val.tar"),
        [],
        r"no image with a label in 1 tar file; .*; unpack tar files whose folders, or whose own names, say the classes",
    ),
    "one part of 294": (
        lambda root: (hub(root / "train-00000-of-00294.parquet", [0, 1]), hub(root / "val.parquet", [0, 1])),
        [],
        r"1 of 294 files, as train-00000-of-00294\.parquet: numbers 1 to 293 are missing; complete the data set, or",
    ),
    "a part of the held-out split": (
        lambda root: (hub(root / "train.parquet", [0, 1]), hub(root / "validation-00001-of-00002.parquet", [0, 1])),
        [],
        r"1 of 2 files, as validation-00001-of-00002\.parquet: number 0 is missing",
    ),
    "shards with a gap": (
        lambda root: [tar(root / f"train-{i:04d}.tar", 0, 1) for i in (0, 1, 3)] + [tar(root / "val-0.tar", 0, 1)],
        [],
        r"of the files train-NUMBER, number 2 is missing; complete the data set, or name the files .* by a glob",
    ),
    "shards without the first": (
        lambda root: [tar(root / f"train/{i:04d}.tar", 0, 1) for i in (2, 3)] + [tar(root / "val-0.tar", 0, 1)],
        [],
        r"of the files NUMBER, number 1 is missing",
    ),
    "labels of different types": (
        of_different_types,
        [],
        r"column 'label' is of different types in train-00000-of-00002\.parquet \(int64\) and .*\(string\); write",
    ),
    "columns of other names": (
        lambda root: pair(root, hub, "train.parquet", "val.parquet", image="img", label="fine"),
        [],
        r"no column image and no column label; there are .*: name the right one by data\.image_column=img and data\.l",
    ),
    "columns of a folder": (
        lambda root: folders(root, "train", "val"),
        ["data.image_column=img"],
        r": a data set of kind folder has no columns; leave out data\.image_column and data\.label_column",
    ),
    "a zip archive": (
        alone("imagenet.zip"),
        [],
        r"imagenet\.zip is a zip archive, .*`python -m zipfile -e .*/imagenet",
    ),
    "a compressed tar": (
        alone("train/a.tar.gz"),
        [],
        r"a\.tar\.gz is a compressed tar archive, .*`mkdir FOLDER && tar -xf .*/train/a",
    ),
    "an LMDB database": (
        alone("train_lmdb/data.mdb"),
        [],
        r"data\.mdb is an LMDB database, .*`fastdeit data pack ROOT OUT",
    ),
    "RecordIO": (
        alone("train.rec"),
        [],
        r"train\.rec is MXNet's RecordIO, .*`fastdeit data pack ROOT OUT --source mine",
    ),
    "FFCV": (alone("train_400.beton"), [], r"train_400\.beton is FFCV's format, .*`fastdeit data pack ORIGINAL OUT`"),
    "MDS": (alone("train/shard.00000.mds"), [], r"shard\.00000\.mds is MosaicML's MDS format, .* mosaicml-streaming"),
    "MNIST's files": (
        alone("MNIST/raw/train-images-idx3-ubyte.gz"),
        [],
        r"train-images-idx3-ubyte\.gz is MNIST's IDX format, .*`fastdeit data pack ROOT OUT --source mine",
    ),
    "SVHN's files": (
        alone("train_32x32.mat"),
        [],
        r"train_32x32\.mat is SVHN's MATLAB format, .*`fastdeit data pack ROOT",
    ),
    "STL-10's files": (
        alone("stl10_binary/train_X.bin"),
        [],
        r"train_X\.bin is STL-10's binary format, .*`fastdeit data",
    ),
    "a pickle": (
        alone("train.pkl"),
        [],
        r"train\.pkl is a pickle, .*: it may run any program .*`fastdeit data pack ROOT",
    ),
    "LitData": (alone("train/chunk-0-12.bin"), [], r"chunk-0-12\.bin is LitData's format, .*by the package litdata"),
    "MDS, compressed": (alone("train/shard.00000.mds.zstd"), [], "MosaicML's MDS format"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_refused_with_the_way_out(tmp_path, name):
    write, overrides, message = REFUSED[name]
    write(tmp_path)
    with pytest.raises(DataError, match=message) as refused:
        as_train(tmp_path, *overrides)
    assert cli.exit_code(refused.value) == 2
    assert str(tmp_path) in str(refused.value)


FOREIGN = [name for name, (_, _, message) in REFUSED.items() if "fastdeit data" in message or "`" in message]


@pytest.mark.parametrize("name", FOREIGN)
def test_the_verbs_name_a_foreign_format_in_a_folder_and_alone(tmp_path, capsys, name):
    REFUSED[name][0](tmp_path)
    (file,) = (path for path in tmp_path.rglob("*") if path.is_file())
    commands = [["train", "deit_tiny", "--data", tmp_path], ["train", "deit_tiny", "--data", file]]
    commands += [["data", *verb, place] for verb in (["check"], ["pack"]) for place in (tmp_path, file)]
    for command in (command + ["out"] * ("pack" in command) for command in commands):
        assert cli.main([str(word) for word in command]) == 2
        assert f"{file} is " in capsys.readouterr().err


def test_the_command_that_exchanges_classes_and_splits_does_so(tmp_path):
    root = tmp_path / "my images"
    files(root, *(f"{name}/{split}/1.jpg" for name in ("cat", "big dog") for split in ("train", "val")))
    with pytest.raises(DataError) as refused:
        as_train(root)
    subprocess.run(re.search("`(cd .*)` puts them so", str(refused.value))[1], shell=True, check=True)
    assert list(map(labels, as_train(root))) == [["big dog", "cat"]] * 2


@pytest.mark.parametrize("kind", ["zip", "gztar", "xztar"])
def test_the_command_that_unpacks_does_so(tmp_path, monkeypatch, capsys, kind):
    folders(tmp_path / "set", "train", "val")
    archive = shutil.make_archive(str(tmp_path / "my images" / "all"), kind, tmp_path / "set")
    assert cli.main(["train", "deit_tiny", "--data", archive]) == 2
    command = re.search("unpack it: `(.*?)`", capsys.readouterr().err)[1]
    monkeypatch.chdir(tmp_path)
    subprocess.run(command.replace("FOLDER", "unpacked"), shell=True, check=True)
    expected = [source.fingerprint for source in open_pair("folder", tmp_path / "set")]
    assert [source.fingerprint for source in as_train(tmp_path / "unpacked")] == expected


def record_io(path, records):
    """A RecordIO file as `im2rec` packs it: records of (label, image), of which those with MAGIC in them in parts."""
    magic = struct.pack("<I", 0xCED7230A)
    with open(path, "wb") as file:
        for number, (label, image) in enumerate(records):
            header = (1, 0.0) if isinstance(label, list) else (0, float(label))
            labels = np.array(label, "<f4").tobytes() if isinstance(label, list) else b""
            parts = (struct.pack("<IfQQ", *header, number, 0) + labels + image).split(magic)
            for at, part in enumerate(parts):
                flag = 0 if len(parts) == 1 else 1 if at == 0 else 3 if at == len(parts) - 1 else 2
                file.write(magic + struct.pack("<I", flag << 29 | len(part)) + part + bytes(-len(part) % 4))


def documented(monkeypatch, mark):
    """The module `mine` of docs/data.md that has `mark` in it."""
    text = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    module = ModuleType("mine")
    monkeypatch.setitem(sys.modules, "mine", module)
    (code,) = (part.partition("```")[0] for part in text.split("```python\n") if mark in part)
    exec(code, module.__dict__)
    return module


def test_the_reader_in_the_documentation_converts_recordio(tmp_path, monkeypatch, varied):
    """`data pack --source mine:read`, as the message says. One image has the mark of a record in it, at a multiple of
    four bytes, where writers split it."""
    documented(monkeypatch, "class RecordIO")
    marked = varied[3] + bytes(-len(varied[3]) % 4) + struct.pack("<I", 0xCED7230A) + b"tail"
    sets = {
        "train": [(1, varied[0]), (0, varied[1]), ([2.0], varied[2]), (1, marked)],
        "val": [(0, varied[4]), (2, b"x")],
    }
    for split, records in sets.items():
        record_io(tmp_path / f"{split}.rec", records)
    for words in ([str(tmp_path)], [str(tmp_path / "train.rec")]):
        assert cli.main(["data", "pack", *words, str(tmp_path / "out"), "--source", "mine:read", "--force"]) == 0
    for packed, records in zip(as_train(tmp_path / "out"), sets.values(), strict=True):
        assert [packed.read(i).tobytes() for i in range(len(packed))] == [image for _, image in records]
        assert labels(packed) == [str(int(np.ravel(label)[0])) for label, _ in records]
    (tmp_path / "val.rec").write_bytes((tmp_path / "val.rec").read_bytes()[:-9])
    with pytest.raises(DataError, match=r"val\.rec: damaged or cut short at byte \d+"):
        open_source("mine:read", tmp_path, "val")


@pytest.mark.parametrize("packer", [bytes, gzip.compress])
def test_the_reader_in_the_documentation_converts_arrays(tmp_path, monkeypatch, packer):
    module = documented(monkeypatch, "class Arrays")
    noise = np.random.default_rng(0)
    pictures, numbers = noise.integers(0, 256, (5, 32, 32, 3), np.uint8), np.array([0, 1, 2, 2, 1], np.uint8)
    sets = {"train": slice(3), "val": slice(3, 5)}
    ending = ".gz" if packer is gzip.compress else ""
    for name, part in zip(("train", "t10k"), sets.values(), strict=True):
        for what, array in (("images-idx3", pictures[part, ..., 0]), ("labels-idx1", numbers[part])):
            head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
            (tmp_path / f"{name}-{what}-ubyte{ending}").write_bytes(packer(head + array.tobytes()))
    for name, part in zip(("train", "test"), sets.values(), strict=True):
        found = {"X": pictures[part].transpose(1, 2, 3, 0), "y": np.where(numbers[part], numbers[part], 10)[:, None]}
        savemat(tmp_path / f"{name}_32x32.mat", found)
    for reader, expected in (("mnist", pictures[..., 0]), ("svhn", pictures)):
        assert cli.main(["data", "pack", str(tmp_path), str(tmp_path / reader), "--source", f"mine:{reader}"]) == 0
        for packed, part in zip(as_train(tmp_path / reader), sets.values(), strict=True):
            assert labels(packed) == [str(number) for number in numbers[part]]
            found = [np.asarray(Image.open(io.BytesIO(packed.read(i)))) for i in range(len(packed))]
            assert np.array_equal(found, expected[part])
    (tmp_path / f"t10k-labels-idx1-ubyte{ending}").unlink()
    with pytest.raises(DataError, match="not the images and the labels of val, but 1 files"):
        module.mnist(tmp_path, "val")


def test_class_numbers_that_are_sorted_as_text_are_told(tmp_path):
    """torchvision sorts folders so, timm does not, and ImageNetV2 has such folders: weights may count otherwise."""
    names = ["0", "1", "2", "10", "11"]
    files(tmp_path, *(f"{split}/{name}/1.jpg" for split in ("train", "val") for name in names))
    with pytest.warns(UserWarning, match=r"sorted as text, .* '11' comes before '2' .*: .* data\.classes=FILE"):
        train, _ = as_train(tmp_path)
    assert train.classes == ["0", "1", "10", "11", "2"]
    (tmp_path / "names.txt").write_text("\n".join(names))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train, val = as_train(tmp_path, f"data.classes={tmp_path}/names.txt")
    assert [[source.label(i) for i in range(5)] for source in (train, val)] == [[0, 1, 3, 4, 2]] * 2
    assert train.classes == val.classes == names


def test_a_split_of_another_name_is_said(tmp_path, capsys):
    folders(tmp_path, "train", "dev")
    assert data_verbs.implied("deit_tiny", [], str(tmp_path)) == ["data.val=dev"]
    assert capsys.readouterr().out == f"{tmp_path} has no split val: holding out dev with data.val=dev\n"
    with pytest.warns(UserWarning, match=r"nothing is called val: dev is held out \(data\.val=dev\)"):
        open_pair("folder", tmp_path)
    assert data_verbs.implied("deit_tiny", ["data.val=dev"], str(tmp_path)) == []


# class numbers of a file


def test_class_numbers_may_come_from_a_file(tmp_path):
    files(
        tmp_path / "images", *(f"{split}/{name}/1.jpg" for split in ("train", "val") for name in ("cat", "dog", "eel"))
    )
    (tmp_path / "map.txt").write_text("eel\ncat\n\nowl\n")
    with pytest.warns(UserWarning, match=r"map\.txt does not name 'dog': 1 images of these classes are left out"):
        train, val = as_train(tmp_path / "images", f"data.classes={tmp_path}/map.txt")
    assert (train.classes, labels(train), [train.label(i) for i in (0, 1)]) == (
        ["eel", "cat", "owl"],
        ["cat", "eel"],
        [1, 0],
    )
    assert labels(val) == ["cat", "eel"]
    assert val.read(1).tobytes() == b"val/eel/1.jpg"
    (tmp_path / "map.txt").write_text("\ufeffcat\r\ndog\r\neel\r\n")
    whole = open_source("folder", tmp_path / "images", "train", classes=str(tmp_path / "map.txt"))
    assert whole.fingerprint == FolderSource(tmp_path / "images" / "train").fingerprint


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "map.txt",
            "owl\nelk\n",
            r"map\.txt: none of its 2 classes, as 'owl', 'elk', has an image; the data set has 'cat'",
        ),
        ("map.txt", "cat\ncat\n", r"map\.txt: 'cat' stands there twice"),
        ("map.txt", "cat\n", r"map\.txt: no file of class names, a line each: 1 of them"),
        ("map.pkl", "cat\ndog\n", r"map\.pkl: a pickle is not read"),
        ("map.txt", None, r"map\.txt: cannot be read: No such file"),
    ],
)
def test_files_of_class_names_that_cannot_be_used(tmp_path, name, text, message):
    folders(tmp_path, "train", "val")
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        as_train(tmp_path, f"data.classes={tmp_path}/{name}")


@pytest.mark.filterwarnings("error")
def test_check_reads_a_single_folder_and_other_columns(tmp_path, capsys):
    folders(tmp_path, ".")
    cli.main(["data", "check", str(tmp_path), "--processes", "1"])
    assert ".: 4 samples" in capsys.readouterr().out


def test_folders_of_others_are_passed_over_by_advice(tmp_path, monkeypatch):
    """A root such as /home: nobody may look into the folders of somebody else."""
    for name in ("alice/x", "bob/deep/x"):
        (tmp_path / name).mkdir(parents=True)
    for split, label in product(("train", "val"), ("cat", "dog")):
        files(tmp_path / "carol" / "set" / split / label, "a.jpg")

    def refusing(real, *refused):
        def look(path, *args, **options):
            if f"{path}/".startswith(refused):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
            return real(path, *args, **options)

        return look

    monkeypatch.setattr(os, "stat", refusing(os.stat, f"{tmp_path}/alice/x/", f"{tmp_path}/alice/t"))
    monkeypatch.setattr(os, "listdir", refusing(os.listdir, f"{tmp_path}/bob/deep/"))
    assert advice(tmp_path) == f"{tmp_path}/carol/set holds data of kind folder: give that folder"
