import errno
import io
import os
import warnings
import zlib

import numpy as np
import pytest
import torchvision
from PIL import Image

from fastdeit.data.sources.datasets import open_pair
from fastdeit.data.sources.folder import FolderSource
from fastdeit.data.sources.source import DataError, MachineError
from fastdeit.data.sources.synthetic import SyntheticSource
from tests.data.conftest import sides


@pytest.fixture
def folder(tmp_path, jpeg):
    """Two classes, nested folders, odd names, files that are no images."""

    def write(*names: str):
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(jpeg)
        return tmp_path

    return write


@pytest.mark.filterwarnings("ignore:.*left out")
def test_folder_lists_what_torchvision_lists(folder, tmp_path_factory):
    root = folder("b/2.JPG", "b/10.png", "b/deep/er/x.jpeg", "b/deep/a.webp", "a/z.jpg", "a/Z.jpg", "a/é.bmp")
    folder("a/notes.txt", "b/x.svg", "stray.jpg")
    (root / "a" / "folder.jpg").mkdir()
    (root / "a" / "dangling.jpg").symlink_to(root / "nowhere")
    folder("b/m/1.jpg", "b/a/1.jpg", "b/z/1.jpg", "b/k/1.jpg", "a/other/2.jpg")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "3.jpg").touch()
    (root / "b" / "link").symlink_to(elsewhere)
    expected = torchvision.datasets.ImageFolder(root)
    ours = FolderSource(root)
    assert [(ours.path(i), ours.label(i)) for i in range(len(ours))] == expected.samples
    assert list(ours.classes) == expected.classes == ["a", "b"]


def test_read_returns_the_bytes(folder, jpeg):
    ours = FolderSource(folder("a/1.jpg", "b/1.jpg"))
    assert ours.read(1).tobytes() == jpeg
    assert ours.read(1).dtype == np.uint8


def test_fingerprint_follows_names_and_classes(folder):
    first = FolderSource(folder("one/a/1.jpg", "one/b/1.jpg") / "one").fingerprint
    assert FolderSource(folder("two/a/1.jpg", "two/b/1.jpg") / "two").fingerprint == first
    assert FolderSource(folder("three/a/1.jpg", "three/b/2.jpg") / "three").fingerprint != first
    assert FolderSource(folder("four/a/1.jpg", "four/c/1.jpg") / "four").fingerprint != first


@pytest.mark.parametrize(
    ("files", "root", "message"),
    [
        ([], "gone", r"gone: no such directory; the expected layout is ROOT/train/CLASS/\*\.jpg"),
        (["file/a.jpg"], "file/a.jpg", r"a\.jpg: not a directory"),
        (["flat/1.jpg"], "flat", r"flat: no class folders; the expected layout"),
        (["one/a/1.jpg"], "one", r"one: only one class folder, 'a'; classification needs two or more"),
        (
            ["empty/a/x.txt", "empty/b/y.txt"],
            "empty",
            r"empty: 2 class folders, but no image in any .*unpacked completely",
        ),
        (["half/a/1.jpg", "half/b/y.txt"], "half", r"half: no image in class folder 'b' .*; add images or delete"),
    ],
)
def test_unusable_folders_are_one_sentence(folder, tmp_path, files, root, message):
    folder(*files)
    with pytest.raises(DataError, match=message):
        FolderSource(tmp_path / root)


def test_a_link_back_is_refused_and_not_followed_for_ever(folder):
    root = folder("a/1.jpg", "b/deep/1.jpg")
    (root / "b" / "deep" / "up").symlink_to("../..")
    with pytest.raises(DataError, match=r"b/deep/up/b: the same folder as .*/b, by a link, so that its .* remove"):
        FolderSource(root)


@pytest.mark.parametrize("links", [{"cat/x": "dog", "dog/y": "cat"}, {"eel": "cat"}, {"cat/x": "dog/deep"}])
def test_folders_that_link_into_each_other_are_refused_and_not_multiplied(folder, links):
    root = folder("cat/1.jpg", "dog/1.jpg", "dog/deep/1.jpg")
    for name, target in links.items():
        (root / name).symlink_to(root / target)
    with pytest.raises(DataError, match=r"the same folder as .*, by a link, so that its images would count twice"):
        FolderSource(root)


def test_what_programs_leave_behind_is_neither_class_nor_image_and_told_once(folder, monkeypatch):
    root = folder("cat/1.jpg", "cat/._1.jpg", "cat/.ipynb_checkpoints/1.jpg", "dog/1.jpg", "dog/__MACOSX/2.jpg")
    with pytest.warns(UserWarning, match="left out"):
        before = FolderSource(root).fingerprint
    folder("cat/.DS_Store", "cat/Thumbs.db", "cat/a.txt", "cat/b.TXT", "dog/README", "dog/x.gz", "stray.jpg")
    (root / "dog" / "README").write_bytes(b"no picture")
    folder(*(f"{name}/1.jpg" for name in (".ipynb_checkpoints", ".git", "__MACOSX", "lost+found", "@eaDir")))
    with pytest.warns(UserWarning, match=r"left out, because they are no images in a class folder: 2 ") as told:
        source = FolderSource(root)
    assert (list(source.classes), len(source), source.fingerprint, len(told)) == (["cat", "dog"], 2, before, 1)
    once = [".DS_Store", "Thumbs.db", "README", ".gz", ".jpg", "._*", ".git/", "lost+found/", "@eaDir/"]
    assert source.left_out == dict.fromkeys(once, 1) | {".txt": 2, ".ipynb_checkpoints/": 2, "__MACOSX/": 2}
    monkeypatch.setenv("RANK", "1")
    with warnings.catch_warnings(action="error"):
        FolderSource(root)


def test_files_without_an_extension_are_known_by_their_headers(tmp_path, make_image, encode):
    photo = make_image(0, 20, 30)
    kinds = ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000"]
    pictures = {f"n0144_{at}": encode(photo, kind) for at, kind in enumerate(kinds)}
    pictures |= {"2024.01.31": encode(photo), "cut": encode(photo)[:-30], "bomb": encode(photo, "PNG")}
    head = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + pictures["bomb"][24:29]
    pictures["bomb"] = pictures["bomb"][:12] + head + zlib.crc32(head).to_bytes(4, "big") + pictures["bomb"][33:]
    others = {
        "Makefile": b"BMP:\n",
        "LICENSE": b"P5 is a licence",
        "list": b"",
        "db": bytes(900),
        "a.dat": encode(photo),
    }
    others |= {"eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "h5": b"\x89HDF\r\n\x1a\n" + bytes(90)}
    for folder in ("cat", "dog/deep"):
        (tmp_path / folder).mkdir(parents=True)
        for name, data in (pictures | others | {".hidden": encode(photo), "z.jpg": encode(photo)}).items():
            (tmp_path / folder / name).write_bytes(data)
        os.mkfifo(tmp_path / folder / "pipe")
    with pytest.warns(UserWarning, match="left out") as told:
        source = FolderSource(tmp_path)
    expected = sorted([*pictures, "z.jpg"])
    names = [source.name(i) for i in range(len(source))]
    assert names == [f"{folder}/{name}" for folder in ("cat", "dog/deep") for name in expected]
    assert source.left_out == {name: 2 for name in (*others, ".hidden", "pipe") if name != "a.dat"} | {".dat": 2}
    assert str(told[0].message) == (
        f"{tmp_path}: 24 files without an extension are read, because their headers are of images"
    )
    assert len(told) == 2


def test_only_files_without_an_extension_are_opened(folder, monkeypatch):
    root = folder("cat/1.jpg", "cat/2.txt", "cat/3", "dog/1.png", "dog/2.xml", "dog/.DS_Store", "dog/Thumbs.db")
    seen, opened = [], Image.open
    monkeypatch.setattr(Image, "open", lambda path, **options: seen.append(path) or opened(path, **options))
    with pytest.warns(UserWarning, match="1 files without an extension"):
        assert len(FolderSource(root)) == 3
    assert seen == [f"{root}/cat/3"]


@pytest.mark.parametrize(
    ("odd", "expected", "looks"),
    [([], 100, 64), ([1], 99, 100), ([99], 99, 100), ([50], 100, 64), (range(100), 0, 64), (range(99), 1, 100)],
)
def test_of_many_files_without_an_extension_the_ends_speak_for_all(folder, monkeypatch, odd, expected, looks):
    root = folder("cat/1.jpg", "dog/1.jpg", *(f"cat/{at:03d}" for at in range(100)))
    for at in odd:
        (root / "cat" / f"{at:03d}").write_bytes(b"no picture")
    seen, opened = [], Image.open
    monkeypatch.setattr(Image, "open", lambda path, **options: seen.append(path) or opened(path, **options))
    with pytest.warns(UserWarning, match="without an extension|left out"):
        source = FolderSource(root)
    names = [source.name(i) for i in range(len(source))]
    assert (len(names) - 2, len(seen), names) == (expected, looks, sorted(names))


def test_a_folder_of_classes_may_have_no_extension_at_all(folder):
    root = folder("cat/1", "cat/2", "dog/1", "dog/2", "dog/3")
    with pytest.warns(UserWarning, match="5 files without an extension"):
        train, val = open_pair("folder", root, val="50%")
    assert len(train) + len(val) == 5


def test_a_machine_that_cannot_open_files_leaves_none_out(folder, monkeypatch):
    root = folder("cat/1", "dog/1")

    def refused(*names, **options):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Image, "open", refused)
    with pytest.raises(MachineError, match=r"cat/1 cannot be read: Too many open files"):
        FolderSource(root)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list everything")
def test_a_folder_that_may_not_be_listed_is_an_error(folder):
    root = folder("a/1.jpg", "b/deep/1.jpg", "b/2.jpg")
    (root / "b" / "deep").chmod(0)
    with pytest.raises(DataError, match="b/deep: the folder cannot be listed: Permission denied"):
        FolderSource(root)


def test_train_and_val(folder):
    root = folder("train/a/1.jpg", "train/b/1.jpg", "train/b/2.jpg", "val/a/1.jpg", "val/b/1.jpg")
    train, val = open_pair("folder", root)
    assert (len(train), len(val)) == (3, 2)
    folder("val/d/1.jpg", "val/e/1.jpg")
    with pytest.raises(DataError, match=r"train and val differ \(only in val: 'd', 'e'\); make them the same"):
        open_pair("folder", root)
    folder("train/c/1.jpg")
    with pytest.raises(
        DataError, match=r"train and val differ \(only in train: 'c'; only in val: 'd', 'e'\); make them"
    ):
        open_pair("folder", root)


@pytest.mark.parametrize("part", ["train", "val"])
def test_missing_part_names_the_layout(folder, part):
    root = folder(*(f"{kept}/{name}/1.jpg" for kept in {"train", "val"} - {part} for name in "ab"))
    with pytest.raises(DataError, match=rf"no subfolder '{part}'; the expected layout is ROOT/train/CLASS/\*\.jpg"):
        open_pair("folder", root)


def test_synthetic_is_deterministic_and_its_classes_differ(make_image):
    one, two, other = SyntheticSource(50, 4, (60, 80)), SyntheticSource(50, 4, (60, 80)), SyntheticSource(50, 4, seed=1)
    assert len(one) == 50
    assert [one.label(i) for i in range(6)] == [0, 1, 2, 3, 0, 1]
    assert sides(one.read(3)) == (80, 60)
    assert sides(other.read(3)) == (500, 375)
    assert one.read(7).tobytes() == two.read(7).tobytes() != one.read(3).tobytes()
    assert one.fingerprint == two.fingerprint != other.fingerprint
    means = np.array([[_pixels(one, 4 * i + label).mean((0, 1)) for i in range(5)] for label in range(4)])
    within = means.std(axis=1).mean()
    assert means.mean(axis=1).std(axis=0).mean() > within / 2
    with pytest.raises(DataError, match="2 classes"):
        SyntheticSource(5, 1)


def _pixels(synthetic: SyntheticSource, index: int) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(synthetic.read(index))))
