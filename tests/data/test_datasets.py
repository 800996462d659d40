"""Public data sets in the layouts of their authors, a few images each: written here, found and labelled there."""

import io
import json
import pickle
import tarfile

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from fastdeit.data.sources.datasets import open_pair, open_source
from fastdeit.data.sources.folder import FolderSource
from fastdeit.data.sources.kinds import READERS
from fastdeit.data.sources.packed import pack
from fastdeit.data.sources.source import DataError
from tests.data.conftest import sides


@pytest.fixture
def write(tmp_path, varied):
    """Image files: the i-th name of all is the i-th of `varied`."""
    count = 0

    def write(*names):
        nonlocal count
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(varied[count])
            count += 1
        return tmp_path

    return write


def listing(source):
    """{class name: names of its samples}."""
    found = {}
    for i in range(len(source)):
        found.setdefault(source.classes[source.label(i)], []).append(source.name(i))
    return found


def pixels(source, index):
    with Image.open(io.BytesIO(source.read(index))) as image:
        return np.asarray(image)


# CIFAR


@pytest.fixture
def rows():
    noise = np.random.default_rng(0)
    return {name: noise.integers(0, 256, (4, 3072), dtype=np.uint8) for name in ("a", "b", "c", "d", "e", "val")}


def cifar10(root, rows, form):
    """Labels of batch k: k, k + 1, k + 2, k + 3; of the test batch 6, 7, 8, 9."""
    names = [f"class{number}" for number in range(10)]
    files = dict(zip([*(f"data_batch_{k}" for k in range(1, 6)), "test_batch"], rows.values(), strict=True))
    folder = root / {"binary": "cifar-10-batches-bin", "python": "cifar-10-batches-py"}[form]
    folder.mkdir()
    if form == "binary":
        (folder / "batches.meta.txt").write_text("\n".join(names) + "\n\n")
    else:
        (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": [name.encode() for name in names]}))
    for k, (file, data) in enumerate(files.items(), 1):
        labels = list(range(k, k + 4))
        if form == "binary":
            table = np.concatenate((np.array(labels, np.uint8)[:, None], data), axis=1)
            (folder / f"{file}.bin").write_bytes(table.tobytes())
        else:
            batch = pickle.dumps({b"data": data, b"labels": labels, b"batch_label": b"x"}, protocol=3)
            (folder / file).write_bytes(batch.replace(b"numpy._core.", b"numpy.core."))  # as in the official files
    return folder


def cifar100(root, rows, form):
    """Fine labels 10 to 13 and 96 to 99."""
    names = [f"fine{number}" for number in range(100)]
    folder = root / {"binary": "cifar-100-binary", "python": "cifar-100-python"}[form]
    folder.mkdir()
    if form == "binary":
        (folder / "fine_label_names.txt").write_text("\n".join(names) + "\n")
    else:
        (folder / "meta").write_bytes(pickle.dumps({b"fine_label_names": [name.encode() for name in names]}))
    for file, data, first in (("train", rows["a"], 10), ("test", rows["val"], 96)):
        labels = list(range(first, first + 4))
        if form == "binary":
            table = np.concatenate((np.zeros((4, 1), np.uint8), np.array(labels, np.uint8)[:, None], data), axis=1)
            (folder / f"{file}.bin").write_bytes(table.tobytes())
        else:
            batch = {b"data": data, b"fine_labels": labels, b"coarse_labels": [0] * 4}
            (folder / file).write_bytes(pickle.dumps(batch))
    return folder


@pytest.mark.parametrize("form", ["binary", "python"])
@pytest.mark.parametrize("inside", [False, True])
def test_cifar10(tmp_path, rows, form, inside):
    folder = cifar10(tmp_path, rows, form)
    train, val = open_pair("cifar10", folder if inside else tmp_path)
    assert (len(train), len(val)) == (20, 4)
    assert train.classes == val.classes == [f"class{number}" for number in range(10)]
    assert [train.label(i) for i in (0, 3, 4, 19)] == [1, 4, 2, 8]
    assert [val.label(i) for i in range(4)] == [6, 7, 8, 9]
    assert np.array_equal(pixels(train, 5), rows["b"][1].reshape(3, 32, 32).transpose(1, 2, 0))
    assert np.array_equal(pixels(val, 3), rows["val"][3].reshape(3, 32, 32).transpose(1, 2, 0))
    assert train.read(7).tobytes() == train.read(7).tobytes()
    assert sides(train.read(7)) == (32, 32)
    assert train.path(5) == f"{folder}/data_batch_2:1"


@pytest.mark.parametrize("form", ["binary", "python"])
def test_cifar100_has_the_fine_labels(tmp_path, rows, form):
    cifar100(tmp_path, rows, form)
    train, val = open_pair("cifar100", tmp_path)
    assert (len(train), len(val), len(train.classes)) == (4, 4, 100)
    assert [train.label(i) for i in range(4)] == [10, 11, 12, 13]
    assert val.classes[val.label(3)] == "fine99"
    assert np.array_equal(pixels(train, 2), rows["a"][2].reshape(3, 32, 32).transpose(1, 2, 0))


def test_both_forms_of_cifar_are_the_same_data_set(tmp_path, rows):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    cifar10(tmp_path / "one", rows, "binary")
    cifar10(tmp_path / "two", rows, "python")
    one, two = (open_source("cifar10", tmp_path / name, "train") for name in ("one", "two"))
    assert one.fingerprint == two.fingerprint != open_source("cifar10", tmp_path / "one", "val").fingerprint


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("file", ["batches.meta", "data_batch_3"])
def test_a_pickle_that_runs_a_program_is_refused(tmp_path, rows, file):
    folder = cifar10(tmp_path, rows, "python")
    (folder / file).write_bytes(pickle.dumps({b"data": Payload(tmp_path / "canary")}))
    with pytest.raises(DataError, match=rf"{file}: not an official CIFAR file.*asks for (io|_io)\.open"):
        open_source("cifar10", tmp_path, "train")
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    ("form", "file", "damage", "message"),
    [
        ("binary", "data_batch_2.bin", lambda data: data[:-1], r"data_batch_2\.bin: 12291 bytes are no whole number"),
        ("binary", "data_batch_2.bin", lambda data: b"", "0 bytes are no whole number"),
        ("binary", "data_batch_2.bin", lambda data: b"\xff" + data[1:], "not 10 classes"),
        ("binary", "batches.meta.txt", lambda data: data[:20], "not 10 classes"),
        ("python", "data_batch_2", lambda data: data[:-300], "not an official CIFAR file, or a damaged one"),
        ("python", "data_batch_2", lambda data: b"<!DOCTYPE html>", "not an official CIFAR file"),
        ("python", "data_batch_2", lambda data: pickle.dumps({}), "not an official CIFAR file"),
        ("python", "data_batch_2", lambda data: pickle.dumps([1]), "not an official CIFAR file"),
        ("python", "data_batch_2", lambda data: data.replace(b"labels", b"lapels"), "not an official CIFAR file"),
        ("python", "data_batch_2", lambda data: pickle.dumps({b"data": 1, b"labels": [1]}), "no rows of 3072 pixels"),
        ("python", "data_batch_2", lambda data: pickle.dumps({b"data": 1, b"labels": 1}), "no rows of 3072 pixels"),
        ("python", "batches.meta", lambda data: pickle.dumps({b"label_names": [1, 2]}), "no list of class names"),
    ],
)
def test_damaged_cifar(tmp_path, rows, form, file, damage, message):
    path = cifar10(tmp_path, rows, form) / file
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=message):
        open_source("cifar10", tmp_path, "train")


def test_missing_cifar(tmp_path, rows):
    with pytest.raises(DataError, match=r"neither cifar-100-binary/fine_label_names\.txt nor cifar-100-python/meta"):
        open_source("cifar100", tmp_path, "train")
    (cifar10(tmp_path, rows, "binary") / "test_batch.bin").unlink()
    with pytest.raises(DataError, match=r"test_batch\.bin: cannot be read: No such file"):
        open_pair("cifar10", tmp_path)


# lists of files


@pytest.fixture
def flowers(tmp_path, write):
    write(*(f"jpg/image_{number:05d}.jpg" for number in range(1, 7)))
    savemat(tmp_path / "imagelabels.mat", {"labels": np.array([[77, 1, 102, 1, 5, 102]], np.uint8)})
    savemat(tmp_path / "setid.mat", {"trnid": [[6, 2]], "valid": [[3]], "tstid": [[5, 1, 4]]})
    return tmp_path


def test_flowers102_trains_on_both_of_its_smaller_parts(flowers, varied):
    train, val = open_pair("flowers102", flowers)
    assert listing(train) == {"1": ["jpg/image_00002.jpg"], "102": ["jpg/image_00003.jpg", "jpg/image_00006.jpg"]}
    assert listing(val) == {f"{k}": [f"jpg/image_{n:05d}.jpg"] for k, n in ((77, 1), (1, 4), (5, 5))}
    assert len(train.classes) == 102
    assert train.read(2).tobytes() == varied[5]


def annotations(*rows):
    table = np.zeros((1, len(rows)), [("bbox_x1", "O"), ("class", "O"), ("fname", "O")])
    for at, (file, number) in enumerate(rows):
        table[0, at] = (4, number, file)
    return {"annotations": table}


@pytest.fixture
def cars(tmp_path, write):
    write("cars_train/00001.jpg", "cars_train/00002.jpg", "cars_test/00001.jpg")
    (tmp_path / "devkit").mkdir()
    names = np.array([["AM General Hummer SUV 2000", "Acura RL Sedan 2012"]], dtype=object)
    savemat(tmp_path / "devkit" / "cars_meta.mat", {"class_names": names})
    savemat(tmp_path / "devkit" / "cars_train_annos.mat", annotations(("00001.jpg", 2), ("00002.jpg", 1)))
    savemat(tmp_path / "cars_test_annos_withlabels.mat", annotations(("00001.jpg", 2)))
    return tmp_path


@pytest.mark.parametrize("place", [".", "devkit"])
def test_stanford_cars(cars, place):
    (cars / "cars_test_annos_withlabels.mat").rename(cars / place / "cars_test_annos_withlabels.mat")
    train, val = open_pair("stanford_cars", cars)
    assert listing(train) == {
        "Acura RL Sedan 2012": ["cars_train/00001.jpg"],
        "AM General Hummer SUV 2000": ["cars_train/00002.jpg"],
    }
    assert listing(val) == {"Acura RL Sedan 2012": ["cars_test/00001.jpg"]}


def coco(*images):
    """(file, category) of every image; ids are no list positions, and in no order."""
    return {
        "images": [{"id": 90 - at, "file_name": file} for at, (file, _) in enumerate(images)],
        "annotations": [{"id": at, "image_id": 90 - at, "category_id": of} for at, (_, of) in enumerate(images)][::-1],
        "categories": [{"id": 12, "name": "Fringilla coelebs"}, {"id": 3, "name": "Abies alba"}],
    }


@pytest.mark.parametrize("year", [2018, 2019])
def test_inaturalist(tmp_path, write, year):
    files = [f"train_val{year}/{name}.jpg" for name in ("Aves/12/a", "Plantae/3/b", "Aves/12/c")]
    write(*files)
    (tmp_path / f"train{year}.json").write_text(json.dumps(coco((files[0], 12), (files[1], 3))))
    (tmp_path / f"val{year}.json").write_text(json.dumps(coco((files[2], 12))))
    train, val = open_pair(f"inat{year}", tmp_path)
    assert train.classes == ["Abies alba", "Fringilla coelebs"]
    assert listing(train) == {"Fringilla coelebs": [files[0]], "Abies alba": [files[1]]}
    assert listing(val) == {"Fringilla coelebs": [files[2]]}


def devkit(root, truth):
    """Three leaves and one group above them; ids are in no order of names."""
    folder = root / "ILSVRC2012_devkit_t12" / "data"
    folder.mkdir(parents=True)
    synsets = np.zeros((4, 1), [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")])
    for at, row in enumerate([(1, "n03", "x", 0), (2, "n01", "y", 0), (3, "n02", "z", 0), (4, "n00", "group", 3)]):
        synsets[at, 0] = row
    savemat(folder / "meta.mat", {"synsets": synsets})
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text("".join(f"{number}\n" for number in truth))


def test_imagenet_with_val_as_distributed(tmp_path, write):
    write("train/n02/a.JPEG", "train/n01/b.JPEG", "train/n03/c.JPEG", "train/n01/d.JPEG")
    write(*(f"val/ILSVRC2012_val_{number:08d}.JPEG" for number in (3, 1, 2)))
    devkit(tmp_path, [2, 1, 2])
    train, val = open_pair("imagenet", tmp_path)
    assert train.classes == val.classes == ["n01", "n02", "n03"]
    assert listing(val) == {
        "n01": ["val/ILSVRC2012_val_00000001.JPEG", "val/ILSVRC2012_val_00000003.JPEG"],
        "n03": ["val/ILSVRC2012_val_00000002.JPEG"],
    }
    write("val/ILSVRC2012_val_00000004.JPEG")
    with pytest.raises(DataError, match=r"1 are none of them: 'ILSVRC2012_val_00000004\.JPEG'; unpack"):
        open_pair("imagenet", tmp_path)


def test_the_label_of_a_flat_image_is_that_of_its_number(tmp_path, write):
    """One image removed and a file of macOS added would leave the count right, and shift every label behind."""
    write("train/n01/a.JPEG", "train/n02/b.JPEG", "train/n03/c.JPEG")
    write(*(f"val/ILSVRC2012_val_{number:08d}.JPEG" for number in (1, 2, 3)), "val/._ILSVRC2012_val_00000001.JPEG")
    devkit(tmp_path, [2, 1, 3])
    assert len(open_source("imagenet", tmp_path, "val")) == 3
    (tmp_path / "val" / "ILSVRC2012_val_00000002.JPEG").unlink()
    with pytest.raises(DataError, match=r"has 3, but .* 1 are missing, as 'ILSVRC2012_val_00000002\.JPEG'; unp"):
        open_source("imagenet", tmp_path, "val")
    write("val/other.JPEG", "val/ILSVRC2012_val_00000003.jpg")
    with pytest.raises(DataError, match=r"1 are missing.* and 2 are none of them: 'ILSVRC2012_val_00000003\.jpg', 'ot"):
        open_source("imagenet", tmp_path, "val")


def test_imagenet_with_val_in_class_folders_is_a_folder(tmp_path, write):
    root = write("train/n01/a.JPEG", "train/n02/b.JPEG", "val/n01/c.JPEG", "val/n02/d.JPEG")
    train, val = open_pair("imagenet", root)
    folders = open_pair("folder", root)
    assert [train.fingerprint, val.fingerprint] == [source.fingerprint for source in folders]
    assert listing(val) == {"n01": ["n01/c.JPEG"], "n02": ["n02/d.JPEG"]}


@pytest.mark.parametrize("kind", ["folder", "imagenet"])
def test_flat_val_without_the_devkit_says_how_to_sort_it(write, kind):
    root = write("train/n01/a.JPEG", "train/n02/b.JPEG", "val/ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(
        DataError,
        match=r"val: no class folders.* one folder for each class, or named .* in a list .*; "
        r".* put ILSVRC2012_devkit_t12\.tar\.gz",
    ):
        open_pair(kind, root)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("setid.mat", b"", "not the official MATLAB file, or a damaged one"),
        ("setid.mat", b"<!DOCTYPE html>" * 50, "not the official MATLAB file"),
        ("setid.mat", None, r"setid\.mat: cannot be read: No such file"),
        ("setid.mat", {"trnid": [[1]]}, "KeyError"),
        ("setid.mat", {"trnid": [[9]], "valid": [[1]]}, "the annotation files are not the official ones"),
        ("setid.mat", {"trnid": "x", "valid": [[1]]}, "the annotation files are not the official ones"),
        ("imagelabels.mat", {"labels": [[0] * 6]}, "classes beyond the 102 there are"),
        ("imagelabels.mat", {"labels": [[103] * 6]}, "classes beyond the 102 there are"),
        ("imagelabels.mat", {"labels": [["x"]]}, "the annotation files are not the official ones"),
        ("jpg/image_00002.jpg", None, r"image_00002\.jpg: no such file, .*; unpack the images into"),
    ],
)
def test_damaged_annotations(flowers, name, data, message):
    (flowers / name).unlink()
    if isinstance(data, dict):
        savemat(flowers / name, data)
    elif data is not None:
        (flowers / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        open_source("flowers102", flowers, "train")


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"images": 1}', "[" * 100_000, '{"images": [], "annotations": [], "categories": []}']
)
def test_damaged_json(tmp_path, text):
    (tmp_path / "train2018.json").write_text(text)
    with pytest.raises(DataError, match="the annotation files"):
        open_source("inat2018", tmp_path, "train")


# every kind by its name


def tar(path, labels):
    with tarfile.open(path, "w") as archive:
        for at, label in enumerate(labels):
            for end, data in (("jpg", b"x"), ("cls", b"%d" % label)):
                info = tarfile.TarInfo(f"{at}.{end}")
                info.size = len(data)
                archive.addfile(info, io.BytesIO(data))


def test_tar_whose_last_class_has_no_held_out_sample(tmp_path):
    tar(tmp_path / "train-0.tar", [0, 1, 2])
    tar(tmp_path / "val-0.tar", [0, 1])
    train, val = open_pair("tar", tmp_path)
    assert train.classes == val.classes == ["0", "1", "2"]
    with pytest.raises(DataError, match=r"val and train differ \(only in train: '2'\)"):
        open_pair("tar", tmp_path, train="val", val="train")


def test_packed_pair(tmp_path, write):
    root = write("train/a/1.jpg", "train/b/2.jpg", "val/a/3.jpg", "val/b/4.jpg", "odd/a/5.jpg", "odd/c/6.jpg")
    for split in ("train", "val", "odd"):
        pack(FolderSource(root / split), root / f"{split}.pack")
    train, val = open_pair("packed", root)
    assert (listing(train), listing(val)) == tuple(listing(source) for source in open_pair("folder", root))
    assert len(open_source("packed", root, "val.pack")) == 2
    with pytest.raises(DataError, match=r"train and odd differ \(only in train: 'b'; only in odd: 'c'\)"):
        open_pair("packed", root, val="odd")


@pytest.mark.parametrize("kind", READERS)
def test_no_such_place(tmp_path, kind):
    with pytest.raises(DataError, match="nowhere: no such directory"):
        open_pair(kind, tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="file: not a directory"):
        open_pair(kind, tmp_path / "file")
    with pytest.raises(DataError, match=str(tmp_path)):
        open_pair(kind, tmp_path)


def test_what_there_is_to_choose_from(tmp_path):
    with pytest.raises(DataError, match="data source: 'folders' must be one of folder, packed, tar, tfrecord, parquet"):
        open_source("folders", tmp_path, "train")
    said = f"{tmp_path}: a data set of kind cifar10 has the splits train and val, not 'test'"
    with pytest.raises(DataError, match=said):
        open_source("cifar10", tmp_path, "test")
