"""ImageNet's archives as downloaded, of three classes: the same data set as unpacked, or refused by name."""

import io
import re
import tarfile

import numpy as np
import pytest
from scipy.io import savemat

from fastdeit import cli
from fastdeit.data.sources.datasets import open_pair, open_source
from fastdeit.data.sources.source import BadImage, DataError
from tests.data.layouts import as_train

TRAIN, VAL, KIT = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"
CLASSES = ("n01440764", "n01443537", "n02119789")
TRUTH = (2, 1, 3, 2)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FASTDEIT_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.delenv("RANK", raising=False)


def tar(members, mode="w"):
    """Bytes of a tar file of (name, bytes)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode, format=tarfile.GNU_FORMAT) as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def kit_files(classes=CLASSES, truth=TRUTH):
    """Files of the kit's folder data. ILSVRC2012_ID counts classes in another order; a group of them comes last."""
    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")]
    synsets = np.empty((len(classes) + 1, 1), fields)
    for at, wnid in enumerate(reversed(classes)):
        synsets[at, 0] = at + 1, wnid, "a word", 0
    synsets[-1, 0] = len(classes) + 1, "n00001740", "entity", len(classes)
    out = io.BytesIO()
    savemat(out, {"synsets": synsets})
    return {"meta.mat": out.getvalue(), "ILSVRC2012_validation_ground_truth.txt": "\n".join(map(str, truth)).encode()}


def kit(files=None, folder="ILSVRC2012_devkit_t12"):
    files = kit_files() if files is None else files
    return tar([(f"{folder}/readme.txt", b"x"), *((f"{folder}/data/{n}", data) for n, data in files.items())], "w:gz")


@pytest.fixture(scope="module")
def pictures(varied):
    """{class: {name: bytes}} of training images, and {name: bytes} of held-out ones, each in no order."""
    pictures = iter(varied)
    train = {wnid: {f"{wnid}_{at}.JPEG": next(pictures) for at in (10026, 2, 137)} for wnid in reversed(CLASSES)}
    # One name is in lower case, as some file systems make them: it comes last in the order of names.
    prefix = {2: "ilsvrc2012_val"}
    return train, {f"{prefix.get(at, 'ILSVRC2012_val')}_{at:08d}.JPEG": next(pictures) for at in (3, 1, 4, 2)}


@pytest.fixture
def parts(pictures):
    """The archives of the classes, by class."""
    return {wnid: tar(images.items()) for wnid, images in pictures[0].items()}


@pytest.fixture
def root(tmp_path, parts, pictures):
    """The three archives."""
    root = tmp_path / "downloaded"
    root.mkdir()
    (root / TRAIN).write_bytes(tar((f"{wnid}.tar", data) for wnid, data in parts.items()))
    (root / VAL).write_bytes(tar(pictures[1].items()))
    (root / KIT).write_bytes(kit())
    return root


def unpacked(folder, pictures):
    """The same data set in folders."""
    train, val = pictures
    images = {f"train/{wnid}/{name}": data for wnid, some in train.items() for name, data in some.items()}
    images |= {f"val/{name}": data for name, data in val.items()}
    for name, data in (images | {f"ILSVRC2012_devkit_t12/data/{n}": d for n, d in kit_files().items()}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def facts(source):
    samples = [(source.name(i), source.label(i), source.read(i).tobytes()) for i in range(len(source))]
    return list(source.classes), source.fingerprint, samples


@pytest.mark.filterwarnings("error")
def test_archives_are_the_data_set_that_they_unpack_to(root, tmp_path, pictures, capsys):
    train, val = as_train(root)
    assert capsys.readouterr().out == f"{root} holds data of kind imagenet: reading it with data.source=imagenet\n"
    assert (len(train), len(val), train.classes) == (9, 4, list(CLASSES))
    assert [(val.name(i), val.classes[val.label(i)]) for i in (0, 2)] == [
        ("val/ILSVRC2012_val_00000001.JPEG", "n01443537"),
        ("val/ILSVRC2012_val_00000003.JPEG", "n01440764"),
    ]
    assert train.path(0) == f"{root}/{TRAIN}:n01440764/n01440764_10026.JPEG"
    folders = open_pair("imagenet", unpacked(tmp_path / "unpacked", pictures))
    assert [facts(source) for source in (train, val)] == [facts(source) for source in folders]
    assert [facts(source) for source in as_train(root)] == [facts(source) for source in folders]  # from the kept list


def test_archives_are_packed_and_checked(root, tmp_path, capsys):
    train, val = as_train(root)
    assert cli.main(["data", "pack", str(root), str(tmp_path / "packed")]) == 0
    assert [facts(source) for source in as_train(tmp_path / "packed")] == [facts(train), facts(val)]
    assert cli.main(["data", "check", str(root), "--processes", "1"]) == 0
    assert cli.main(["data", "check", str(root / VAL), "--processes", "1"]) == 0
    assert f"{VAL}: 4 samples: 4 JPEG RGB" in capsys.readouterr().out


def test_one_half_may_be_unpacked(root, tmp_path, pictures):
    expected = [facts(source) for source in as_train(root)]
    both = unpacked(tmp_path / "unpacked", pictures)
    (both / "val").rename(both / "not_here")
    (both / VAL).write_bytes((root / VAL).read_bytes())
    assert [facts(source) for source in as_train(both)] == expected
    (both / "train").rename(both / "nor_here")
    (both / "not_here").rename(both / "val")
    (both / TRAIN).write_bytes((root / TRAIN).read_bytes())
    assert [facts(source) for source in as_train(both)] == expected
    (both / "ILSVRC2012_devkit_t12").rename(both / "kit")
    (both / KIT).write_bytes((root / KIT).read_bytes())
    assert [facts(source) for source in as_train(both)] == expected


def test_classes_are_those_of_the_archive_without_a_kit(root):
    (root / KIT).unlink()
    assert open_source("imagenet", root, "train").classes == list(CLASSES)
    with pytest.raises(DataError, match=rf"{VAL}: the development kit says which .*; put {KIT} beside it"):
        open_source("imagenet", root, "val")


def without(number):
    def change(root, parts, pictures):
        some = {name: data for name, data in parts.items() if name != CLASSES[number]}
        (root / TRAIN).write_bytes(tar((f"{wnid}.tar", data) for wnid, data in some.items()))

    return change


def cut(name, at):
    """The archive ends at byte `at`."""
    return lambda root, parts, pictures: (root / name).write_bytes((root / name).read_bytes()[:at])


def cut_behind(count):
    """The archive ends behind so many classes."""

    def change(root, parts, pictures):
        end = sum(512 + len(parts[wnid]) for wnid in list(parts)[:count])
        cut(TRAIN, end)(root, parts, pictures)

    return change


def part_cut(blocks):
    """The tar file of the second class in the archive ends early: what follows is the header of the third."""

    def change(root, parts, pictures):
        short = {**parts, CLASSES[1]: parts[CLASSES[1]][: blocks * 512]}
        (root / TRAIN).write_bytes(tar((f"{wnid}.tar", data) for wnid, data in short.items()))

    return change


def of_part(data):
    def change(root, parts, pictures):
        parts = {**parts, CLASSES[0]: data}
        (root / TRAIN).write_bytes(tar((f"{wnid}.tar", part) for wnid, part in parts.items()))

    return change


def with_kit(data):
    return lambda root, parts, pictures: (root / KIT).write_bytes(data() if callable(data) else data)


def held_out(change):
    return lambda root, parts, pictures: (root / VAL).write_bytes(tar(change(dict(pictures[1])).items()))


FIRST = "ILSVRC2012_val_00000001.JPEG"
MD5 = r"download it anew \(`md5sum .*` of the official one is [0-9a-f]{32}\)"
REFUSED = {
    "a class is missing": (
        without(1),
        rf"{TRAIN}: compared with the development kit, it misses 'n01443537\.tar'; {MD5}",
    ),
    "a class is too many": (
        with_kit(lambda: kit(kit_files(CLASSES[:2], (1, 2)))),
        r"it has 'n02119789\.tar', which the kit does not know",
    ),
    "cut in a class": (
        cut(TRAIN, 20_000),
        rf"{TRAIN}: n02119789\.tar: the tar file is cut short: it ends at byte 20000, inside this file; {MD5}",
    ),
    "cut behind a class": (cut_behind(2), rf"{TRAIN}: the tar file is cut short or damaged at byte.*; {MD5}"),
    "empty": (cut(TRAIN, 0), rf"{TRAIN}: not a tar file, or one that is cut short or damaged.*; {MD5}"),
    "a web page": (
        lambda root, parts, pictures: (root / TRAIN).write_bytes(b"<!DOCTYPE html>" * 99),
        rf"{TRAIN}: not a tar file",
    ),
    "the held-out one in its place": (
        lambda root, parts, pictures: (root / TRAIN).write_bytes((root / VAL).read_bytes()),
        rf"{TRAIN}: 0 classes in it; the training images of ImageNet are a tar file of WNID\.tar",
    ),
    "a class that ends in an image": (
        part_cut(3),
        rf"{TRAIN}:n01443537\.tar: n01443537_.*\.JPEG: the tar file is cut short",
    ),
    "a class without a byte": (of_part(b""), rf"{TRAIN}:n01440764\.tar: .*cut short or damaged"),
    "a class that is no tar file": (of_part(b"junk" * 500), rf"{TRAIN}:n01440764\.tar: .*cut short or damaged"),
    "a class without an image": (of_part(tar([("a.txt", b"x")])), rf"{TRAIN}:n01440764\.tar: no image in it"),
    "an image twice": (
        of_part(tar([("n01440764_1.JPEG", b"x"), ("n01440764_1.JPEG", b"y")])),
        rf"{TRAIN}:n01440764\.tar: n01440764_1\.JPEG is in it twice",
    ),
    "the kit of another task": (
        with_kit(lambda: kit(folder="ILSVRC2012_devkit_t3")),
        rf"{KIT}: it holds no ILSVRC2012_devkit_t12/data/meta\.mat, so it is not the .* tasks 1 and 2; download {KIT}",
    ),
    "a kit without labels": (
        with_kit(lambda: kit({"meta.mat": kit_files()["meta.mat"]})),
        r"it holds no ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth\.txt",
    ),
    "a kit that is cut": (with_kit(lambda: kit()[:-40]), rf"{KIT}: cut short or damaged.*; download it anew"),
    "a kit that is a web page": (with_kit(b"<!DOCTYPE html>" * 99), rf"{KIT}: cut short or damaged"),
    "a kit of no synsets": (
        with_kit(lambda: kit({**kit_files(), "meta.mat": b"\0" * 500})),
        r"meta\.mat: not the official MATLAB file",
    ),
    "labels that are no classes": (
        with_kit(lambda: kit(kit_files(truth=(1, 2, 9, 1)))),
        rf"{KIT}: not the development kit ILSVRC2012_devkit_t12, or a damaged one: KeyError\(9\)",
    ),
    "labels that are words": (with_kit(lambda: kit(kit_files(truth=("a", 1, 2, 3)))), "or a damaged one: ValueError"),
    "a held-out image is missing": (
        held_out(lambda images: images if images.pop(FIRST) else {}),
        rf"{VAL}: .* in ILSVRC2012_validation_ground_truth\.txt, which has 4, .* 1 are missing, as '{FIRST}'; {MD5}",
    ),
    "a held-out image is too many": (
        held_out(lambda images: images | {"ILSVRC2012_val_00000005.JPEG": b"x"}),
        r"1 are none of them: 'ILSVRC2012_val_00000005\.JPEG'",
    ),
    "held-out images are cut": (cut(VAL, 6_000), rf"{VAL}: ILSVRC2012_val_0000000\d\.JPEG: the tar file is cut short"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_whole_imagenet_is_refused_by_name(root, parts, pictures, name):
    change, message = REFUSED[name]
    change(root, parts, pictures)
    with pytest.raises(DataError, match=message) as refused:
        as_train(root)
    assert cli.exit_code(refused.value) == 2
    assert not [path for path in root.iterdir() if path.name.startswith(".") and path.stat().st_size > 20_000]


def test_every_shorter_archive_is_refused(root):
    """Wherever the download ended: in a header, in an image, behind one, behind a class."""
    whole = (root / TRAIN).read_bytes()
    last = len(whole.rstrip(b"\0"))
    for at in (*range(0, last, 1_777), *range(512, last, 512 * 7)):
        (root / TRAIN).write_bytes(whole[:at])
        with pytest.raises(DataError, match=re.escape(str(root / TRAIN))):
            open_source("imagenet", root, "train")


def test_what_is_no_image_is_left_out_and_told(root, parts):
    parts = {**parts, CLASSES[0]: tar([("./n01440764_1.JPEG", b"x"), ("a.txt", b"y"), ("._n01440764_1.JPEG", b"z")])}
    (root / TRAIN).write_bytes(tar([*((f"{wnid}.tar", data) for wnid, data in parts.items()), ("b.xml", b"x")]))
    with pytest.warns(UserWarning, match=rf"{TRAIN}: left out, .*: 1 \.xml, 1 \._\*, 1 \.txt"):
        train = open_source("imagenet", root, "train")
    assert (len(train), train.name(0)) == (7, "n01440764/n01440764_1.JPEG")


def test_an_archive_that_is_cut_in_use_is_a_bad_image(root):
    train = open_source("imagenet", root, "train")
    (root / TRAIN).write_bytes((root / TRAIN).read_bytes()[:3_000])
    with pytest.raises(BadImage, match="the tar file ends before the image does"):
        train.read(8)
