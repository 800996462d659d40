"""`data check`: what training would make of a data set; `data pack --normalise`: its pixels in plain files."""

import base64
import json
import os
import re
import shutil
import signal
from collections import Counter
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from fastdeit import cli, cores
from fastdeit.data.examine import fault, picture, pixels, read_by_both
from fastdeit.data.execute.decode import decoded
from fastdeit.data.loader import EvalLoader
from fastdeit.data.sources import packed
from fastdeit.data.sources.datasets import open_source
from fastdeit.data.sources.folder import FolderSource
from fastdeit.data.sources.parts import divided
from fastdeit.data.sources.source import BadImage, DataError, MachineError
from fastdeit.data.sources.synthetic import SyntheticSource
from fastdeit.run.record import RunLog
from fastdeit.text import one_line
from fastdeit.verbs.check import report, samples
from fastdeit.verbs.check.page import page
from tests.data import pictures


@pytest.fixture(scope="module")
def odd_files(make_image, encode):
    """Files that are read, by name, with what is odd about them and whether --normalise encodes them anew."""
    photo, turned = make_image(3, 30, 20), Image.Exif()
    turned[0x0112] = 6
    clear = photo.convert("P")
    clear.info["transparency"] = 3
    frames = [make_image(seed, 30, 20) for seed in (4, 5)]
    deep = Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257)
    return {
        "cmyk.jpg": (encode(photo.convert("CMYK")), ["CMYK, converted to RGB"], True),
        "palette.png": (encode(clear, "PNG"), ["a palette, read as the colours of its entries"], True),
        "alpha.png": (encode(photo.convert("RGBA"), "PNG"), ["transparency, which is dropped"], True),
        "colourkey.png": (
            encode(photo, "PNG", transparency=(1, 2, 3)),
            ["transparency, which is dropped"],
            True,
        ),
        "deep.png": (encode(deep, "PNG"), ["more than 8 bits a channel, read as 8"], True),
        "bits.png": (encode(photo.convert("1"), "PNG"), ["black and white, read as 0 and 255"], True),
        "scan.tiff": (encode(photo, "TIFF"), ["TIFF instead of JPEG, PNG or WebP"], True),
        "moving.webp": (
            encode(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
            ["several frames, of which the first is read"],
            True,
        ),
        "turned.jpg": (
            encode(photo, exif=turned),
            ["to be shown rotated or mirrored, which training does not do"],
            False,
        ),
        "png.jpg": (encode(photo, "PNG"), ["a PNG file that is called JPEG"], False),
    }


@pytest.fixture
def root(tmp_path, varied):
    """Two classes; train has 3 and 4 pictures, val 2 each."""
    names = "train/cat/0.jpg train/cat/1.jpg train/cat/2.jpg train/dog/0.jpg train/dog/1.jpg train/dog/2.jpg"
    names += " train/dog/3.jpg val/cat/0.jpg val/cat/1.jpg val/dog/0.jpg val/dog/1.jpg"
    for name, data in zip(names.split(), varied, strict=False):
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return tmp_path / "set"


@pytest.fixture
def check(capsys):
    """Exit code and stdout of `fastdeit data check`."""

    def run(*argv):
        code = cli.main(["data", "check", *map(str, argv)])
        return code, capsys.readouterr().out

    return run


# ---- one file --------------------------------------------------------------------------------------------------------


def test_what_is_odd_about_a_file_is_told(odd_files, make_image, encode):
    found = {name: picture(np.frombuffer(data, np.uint8), name).odd for name, (data, *_) in odd_files.items()}
    assert {name: [one.kind for one in odd] for name, odd in found.items()} == {
        name: kinds for name, (_, kinds, _) in odd_files.items()
    }
    assert {name: any(one.rewritten for one in odd) for name, odd in found.items()} == {
        name: rewritten for name, (*_, rewritten) in odd_files.items()
    }
    plain = np.frombuffer(encode(make_image(0, 9, 9)), np.uint8)
    assert [picture(plain, name).odd for name in ("a.JPG", "a.JPEG", "a")] == [(), (), ()]


def test_pixels_are_those_of_training(odd_files, memory):
    files = [data for data, *_ in odd_files.values()]
    loader = EvalLoader(memory(files), (20, 30), 1.0, threads=1)
    seen = {
        int(index): image
        for batch in loader.batches()
        for index, image in zip(batch.index, batch.images[0], strict=True)
    }
    for index, data in enumerate(files):
        assert np.array_equal(pixels(np.frombuffer(data, np.uint8)), seen[index].numpy())


def test_a_file_that_cannot_be_used_leaves_the_next_one_alone(memory, varied, encode, make_image):
    jpeg, cut = varied[0], encode(make_image(0, 90, 70), "BMP")[:9000]
    source = memory([jpeg, cut, jpeg, b"", b"text", jpeg])
    reasons = [fault(source, index) for index in range(6)]
    assert [reason is None for reason in reasons] == [True, False, True, False, False, True]
    assert "truncated" in reasons[1]
    with pytest.raises(BadImage, match="truncated"):
        pixels(source.read(1))


# ---- a split ---------------------------------------------------------------------------------------------------------


def split_of(source, processes=None):
    return report.split_of("train", source, samples.looked_at(source, processes))


def test_a_split(tmp_path, varied, make_image, encode):
    """Class a: 3 JPEGs, one of them twice; b: a grey PNG, a copy of a's twice, and two broken files."""
    grey = encode(make_image(0, 30, 20).convert("L"), "PNG")
    files = {"a/1.jpg": varied[1], "a/2.jpg": varied[2], "a/3.jpg": varied[1], "b/1.png": grey, "b/2.jpg": varied[2]}
    files |= {"b/3.jpg": b"broken", "b/4.jpg": b"broken", "b/5.jpg": varied[2]}
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    split = split_of(FolderSource(tmp_path))
    sizes = [len(data) for data in files.values() if data != b"broken"]
    assert (split.samples, split.formats, split.classes) == (8, {"JPEG RGB": 5, "PNG L": 1}, [("a", 3), ("b", 5)])
    assert split.side[0] == 20
    assert split.ratio[2] == max(split.widths / split.heights)
    assert split.size[::2] == (min(sizes), max(sizes))
    lines = "\n".join(split.lines()).replace(str(tmp_path), "").splitlines()
    assert lines[0] == "train: 8 samples: 5 JPEG RGB, 1 PNG L"
    assert lines[1] == "decoded by DALI 6"
    assert lines[5] == "samples of a class 3 to 5, median 4; classes 'a' to 'b'"
    assert lines[6:] == [
        "the same picture under different classes (1):",
        "  /a/2.jpg (a) = /b/2.jpg (b) = /b/5.jpg (b)",
        "the same picture more than once (1):",
        "  /a/1.jpg = /a/3.jpg",
        "cannot be used (2):",
        *(f"  /b/{i}.jpg: no format that Pillow reads: it starts with b'broken'" for i in (3, 4)),
    ]
    assert [finding.serious for finding in split.findings] == [True, False, True]


class Junk(SyntheticSource):
    def read(self, index: int) -> np.ndarray:
        return np.zeros(9, np.uint8)


def test_a_file_whose_header_is_sound_may_be_bad(memory, varied, encode, make_image):
    source = memory([varied[0], encode(make_image(0, 90, 70), "BMP")[:9000]])
    source.name = source.path
    ((index, reason),) = samples.looked_at(source).bad
    assert (index, "truncated" in reason) == (1, True)


def test_a_name_that_no_terminal_prints_is_written_out(capsys):
    RunLog.bad_image(SimpleNamespace(progress=None), "\udcff\x1b", "bad")
    assert capsys.readouterr().out == "image not used: \\udcff\\x1b: bad\n"


def test_every_serious_case_is_in_the_text_and_other_long_lists_are_cut():
    source = Junk(30, 60)
    source.skipped = [("x", "left out")]
    split = split_of(source)
    text = "\n".join(split.lines())
    assert text.count("it starts with") == 30
    assert "\n  class_0049\n  and 10 more\nclasses" not in text
    assert "classes without a sample (30):\n  class_0030\n" in text
    assert "\n  and 10 more" in text
    assert "cannot be used (31):\n  x: left out\n" in text
    assert split.side == split.ratio == split.size == (0, 0, 0)


def test_classes_that_differ_in_capitals_are_told():
    text = "\n".join(report.in_words(list(report._of_classes([("Cat", 1), ("b", 1), ("B", 2), ("cat", 1), ("d", 1)]))))
    assert text == "classes whose names differ in capitals alone (2):\n  'Cat' = 'cat'\n  'b' = 'B'"


def test_classes_that_are_not_balanced_are_told():
    classes = [("a", 100), ("b", 11), ("c", 9)]
    assert [finding.text for finding in report._of_classes(classes)] == [
        "classes are not balanced: 'a' has 100 samples, 'c' has 9"
    ]
    assert list(report._of_classes(classes[:2])) == []


def test_what_the_reader_left_out_is_told_by_extension():
    source = SyntheticSource(4, 2, (8, 8))
    source.left_out = {".gif": 3, ".txt": 5, ".heic": 2, ".git/": 1}
    pictures, others = split_of(source).findings[-2:]
    assert (pictures.entries, pictures.serious) == (["3 .gif", "2 .heic"], True)
    assert (others.entries, others.serious) == (["5 .txt", "1 .git/"], False)


@pytest.mark.slow
def test_the_number_of_processes_changes_nothing(monkeypatch):
    monkeypatch.setattr(samples, "_CHUNK", 8)
    source, seen = SyntheticSource(60, 4, (16, 24)), []
    found = [samples.looked_at(source, processes, lambda *done: seen.append(done)) for processes in (1, 2)]
    assert np.array_equal(found[0].facts, found[1].facts)
    assert found[0].formats == found[1].formats == {"JPEG RGB": 60}
    assert seen == 2 * [(min(done, 60), 60) for done in range(8, 65, 8)]


class Killer(SyntheticSource):
    def read(self, index: int) -> np.ndarray:
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_killed_process_is_an_error_and_no_hang(monkeypatch):
    monkeypatch.setattr(samples, "_CHUNK", 5)
    with pytest.raises(DataError, match="a process was killed while it decoded images, probably for lack of memory"):
        samples.looked_at(Killer(10, 2, (8, 8)), processes=2)


class Failing(SyntheticSource):
    def read(self, index: int) -> np.ndarray:
        raise self.error


@pytest.mark.parametrize(("error", "raised"), [(ZeroDivisionError(), ZeroDivisionError), (MemoryError(), MachineError)])
def test_an_error_of_the_program_or_the_machine_is_not_taken_for_a_bad_file(error, raised):
    source = Failing(10, 2, (8, 8))
    source.error = error
    with pytest.raises(raised):
        samples.looked_at(source)


def test_pictures_are_kept_of_the_first_ones_of_each_kind(memory, encode, make_image, monkeypatch):
    monkeypatch.setattr(samples, "_SHOWN", 2)
    monkeypatch.setattr(samples, "_parts", lambda source, chunks, _: (samples._look_at(source, one) for one in chunks))
    monkeypatch.setattr(samples, "_CHUNK", 3)
    grey, alpha = (encode(make_image(0, 300, 20).convert(mode), "PNG") for mode in ("1", "RGBA"))
    source = memory([grey, grey, grey, grey, alpha])
    source.name = source.path
    assert [bool(one.jpeg) for one in samples._look_at(source, range(3)).odd] == [True, True, False]
    found = samples.looked_at(source)
    assert [bool(one.jpeg) for one in found.odd] == [True, True, False, False, True]
    with Image.open(samples.io.BytesIO(found.odd[0].jpeg)) as small:
        assert small.size == (96, 6)


# ---- the data set ----------------------------------------------------------------------------------------------------


def test_a_sound_data_set(root, check):
    code, out = check(root)
    assert code == 0
    assert "train: 7 samples: 7 JPEG RGB" in out
    assert out.endswith("nothing would change a training\n")


def test_pictures_in_both_splits_are_found(root, check):
    shutil.copy(root / "train/cat/1.jpg", root / "val/cat/7.jpg")
    code, out = check(root)
    assert code == 1
    assert f"the same picture in train and in val, so that a score is not one of unseen pictures (1):\n  {root}/" in out
    assert f"{root}/train/cat/1.jpg = {root}/val/cat/7.jpg\nfound that would change a training: 1\n" in out
    assert check(root, "--split", "val")[0] == 0


def test_what_training_would_refuse_is_found_and_the_rest_looked_at(root, check):
    (root / "val/dog").rename(root / "val/wolf")
    code, out = check(root)
    assert code == 1
    assert re.search("training refuses this: .*the classes of train and val differ .*only in train: 'dog'", out)
    assert "train: 7 samples" in out
    assert "val: 4 samples" in out


def test_a_split_that_cannot_be_opened_leaves_the_other(root, check):
    shutil.rmtree(root / "val/dog")
    code, out = check(root)
    assert code == 1
    assert "training refuses this: " in out
    assert "only one class folder, 'cat'" in out
    assert "train: 7 samples" in out
    assert "val: " not in out.replace("/val: ", "")


def test_a_machine_that_fails_is_no_finding(root, check, monkeypatch, capsys):
    from fastdeit.data.sources import folder

    errors, walk = [MachineError("the storage does not answer")], os.walk

    def walk_again(*args, **options):
        if errors:
            raise errors.pop()
        return walk(*args, **options)

    monkeypatch.setattr(folder.os, "walk", walk_again)
    assert cli.main(["data", "check", str(root)]) == 1
    assert capsys.readouterr().err == "fastdeit: the storage does not answer\n"


def test_json_has_everything(root, check):
    (root / "train/dog/3.jpg").write_bytes(b"junk")
    (root / "train/cat" / os.fsdecode(b"\xff\n.jpg")).write_bytes(b"")
    code, out = check(root, "--json")
    facts = json.loads(out)
    assert (code, facts["ok"], facts["kind"], facts["findings"]) == (1, False, "folder", [])
    train = facts["splits"][0]
    assert train["classes"] == {"cat": 4, "dog": 4}
    assert train["formats"] == {"JPEG RGB": 6}
    assert set(train["side"]) == {"smallest", "median", "largest"}
    (bad,) = train["findings"]
    assert (bad["text"], bad["serious"], len(bad["entries"])) == ("cannot be used", True, 2)
    code, out = check(root)
    assert (code, out.count("\\udcff\\n.jpg: the file is empty")) == (1, 1)


@pytest.mark.parametrize("argv", [("--html", "none/a.html"), ("--html", ".")])
def test_a_page_that_cannot_be_written(root, capsys, monkeypatch, argv):
    monkeypatch.chdir(root)
    code = cli.main(["data", "check", ".", *argv])
    assert (code, "--html" in capsys.readouterr().err) == (2 if "none" in argv[1] else 1, True)


class Reader(HTMLParser):
    """Tags and attributes of a page, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.images, self.text = set(), [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        for name, value in attrs:
            assert not name.startswith("on")
            assert name not in ("href", "srcset")
            self.images += [value] if name == "src" else []

    def handle_data(self, data):
        self.text += data


EVIL = "<script>alert(1)<|script>", '"><img src=x onerror=alert(1)>', "&lt;b&gt;", "'-\u202e-\x1b[31m", "\udcff"


def test_the_page_stands_alone_and_escapes_every_name(tmp_path, check, odd_files, varied):
    root = tmp_path / "set<i>"
    for number, name in enumerate(EVIL):
        folder = root / "train" / f"{name}"
        folder.mkdir(parents=True)
        for file, (data, *_) in odd_files.items():
            (folder / f"{name}{file}").write_bytes(data)
        (folder / f"{name}.jpg").write_bytes(varied[number])
        (folder / f"{name}bad.jpg").write_bytes(b"<script>")
    assert check(root, "--split", "train", "--source", "folder", "--html", tmp_path / "a.html")[0] == 1
    written = (tmp_path / "a.html").read_text()
    seen = Reader(written)
    assert not seen.tags & {"script", "i"}
    assert "http" not in written.replace("http-equiv", "")
    for name in EVIL:
        assert one_line(name) in seen.text
    assert "\x1b" not in written
    assert len(seen.images) >= len(odd_files)
    for image in seen.images:
        kind, _, data = image.partition(",")
        assert kind == "data:image/jpeg;base64"
        assert base64.b64decode(data).startswith(b"\xff\xd8")
    assert "samples of each class; most: 12" in seen.text
    assert "shorter side in pixels: 20 to " in seen.text
    assert "default-src 'none'" in written


def test_how_each_odd_file_is_read_is_told(tmp_path, check, varied):
    """In words, in JSON and on the page: by DALI, or by Pillow and why, also where DALI refuses an ordinary header."""
    files = {"plain.jpg": varied[0], **pictures.odd(), **pictures.damaged(), **pictures.forgiven()}
    (tmp_path / "set/b").mkdir(parents=True)
    (tmp_path / "set/b/plain.jpg").write_bytes(varied[1])
    for at, data in enumerate(files.values()):
        (tmp_path / "set/a").mkdir(exist_ok=True)
        (tmp_path / f"set/a/{at}.png").write_bytes(data)
    expected = {}
    for at, data in enumerate(files.values()):
        why = decoded(np.frombuffer(data, np.uint8)).route.why
        expected[f"{tmp_path}/set/a/{at}.png"] = f"Pillow: {why}" if why else "DALI"
    pillow = {path for path, decoder in expected.items() if decoder != "DALI"}
    assert "Pillow: file that DALI refuses" in expected.values()
    assert len(pillow) >= len(pictures.odd())

    _, out = check(tmp_path / "set", "--json", "--html", tmp_path / "a.html")
    (facts,) = json.loads(out)["splits"]
    assert facts["decoders"] == Counter([*expected.values(), "DALI"])
    entries = {
        entry for one in facts["findings"] if one["text"].startswith("odd, but read: ") for entry in one["entries"]
    }
    assert entries <= {f"{path} (by {decoder})" for path, decoder in expected.items()}
    assert {entry.partition(" (by ")[0] for entry in entries} >= pillow
    (refused,) = (one["entries"] for one in facts["findings"] if "file that Pillow refuses" in one["text"])
    assert len(refused) >= 1
    page_text = Reader((tmp_path / "a.html").read_text()).text
    for decoder in set(expected.values()) - {"DALI"}:
        assert f"read by {decoder}" in page_text
        assert f"{decoder}{list(expected.values()).count(decoder)}" in page_text
    assert check(tmp_path / "set")[1].splitlines()[1].startswith("decoded by ")


def test_a_page_of_nothing_usable():
    source = Junk(3, 3)
    found = report.Report("x", "folder", [split_of(source)], [])
    assert "cannot be used (3)" in page(found)
    assert "some findings" in page(found)


# ---- pack --normalise ------------------------------------------------------------------------------------------------


def test_normalise_encodes_the_odd_ones_anew_with_the_pixels_of_training(
    tmp_path, root, odd_files, capsys, monkeypatch
):
    threads, pack = [], packed.pack

    def seen(*args, **options):
        threads.append(options["threads"])
        pack(*args, **options)

    monkeypatch.setattr(packed, "pack", seen)
    monkeypatch.setattr(cores, "available", lambda: 3)
    for name, (data, *_) in odd_files.items():
        (root / "train/cat" / name).write_bytes(data)
    (root / "train/cat/bare").write_bytes(odd_files["scan.tiff"][0])
    cut = {
        f"cut{at}.tiff": data[:-100] for at, data in enumerate((odd_files["scan.tiff"][0], pictures.ordinary()["jpeg"]))
    }
    told = {**pictures.damaged(), **pictures.forgiven()}
    only_one_reads = {f"{at}.jpg": data for at, data in enumerate(told.values(), start=10)}
    for name, data in (cut | only_one_reads).items():
        (root / "train/cat" / name).write_bytes(data)
    assert cli.main(["data", "pack", str(root), str(tmp_path / "packed"), "--normalise"]) == 0
    assert threads == [3, 3]
    out = capsys.readouterr().out
    before, after = open_source("folder", root, "train"), open_source("packed", tmp_path / "packed", "train")
    assert after.fingerprint == before.fingerprint
    rewritten = {name: kinds for name, (_, kinds, anew) in odd_files.items() if anew} | {"bare": ["TIFF instead of"]}
    refuse = dict.fromkeys(pictures.damaged(), "DALI refuses") | dict.fromkeys(pictures.forgiven(), "Pillow ref")
    rewritten |= {file: [f"file that {refuse[name]}"] for file, name in zip(only_one_reads, told, strict=True)}
    for index in range(len(before)):
        name, old, new = before.name(index), before.read(index), after.read(index)
        file = name.rpartition("/")[2]
        if file in rewritten:
            assert after.name(index) == (name if file == "bare" else f"{name}.png")
            assert np.array_equal(pixels(old), pixels(new))
            assert read_by_both(new, after.name(index)).odd == ()
            (line,) = (line for line in out.splitlines() if f"encoded anew: {root}/train/{name}: " in line)
            assert rewritten[file][0] in line
            assert line.endswith(f"; {len(old):,} bytes, as PNG {len(new):,}")
        else:
            assert after.name(index) == name
            assert old.tobytes() == new.tobytes()
    assert out.count("encoded anew") == len(rewritten)
    labels = np.arange(len(before))  # which sample it is
    for source in (before, after):
        source._labels = labels
    sides = [[part.label(i) for i in range(len(part))] for one in (before, after) for part in divided(one, "50%")]
    assert sides[:2] == sides[2:]
    assert all(f"copied as it is, since it cannot be used: {root}/train/cat/{name}: " in out for name in cut)


def test_without_normalise_all_bytes_are_copied(tmp_path, root, odd_files):
    (root / "train/cat/scan.tiff").write_bytes(odd_files["scan.tiff"][0])
    assert cli.main(["data", "pack", str(root), str(tmp_path / "packed")]) == 0
    before, after = open_source("folder", root, "train"), open_source("packed", tmp_path / "packed", "train")
    assert all(before.read(i).tobytes() == after.read(i).tobytes() for i in range(len(before)))
