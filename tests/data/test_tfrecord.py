"""TFRecord files, read in any order: by another writer, features in any layout, damaged, numbered from 0 or from 1."""

import gzip
import os
import pickle
import re
import warnings

import numpy as np
import pytest

from fastdeit.data.sources import tfrecord as module
from fastdeit.data.sources.datasets import open_pair, open_source
from fastdeit.data.sources.source import BadImage, DataError
from fastdeit.data.sources.tfrecord import TFRecordSource, files
from tests.data.writers import entry, example, feature, field, length, masked, record, tfrecord, varint

# Two records by the Python package tfrecord 1.14 (protobuf 7.36): with the names of the slim scripts, and of TFDS.
OTHER_WRITER = bytes.fromhex(
    "a0000000000000002a5572250a9d010a1e0a0e696d6167652f66696c656e616d65120c0a0a0a086e30312e4a5045470a1f0a0d696d6167652f65"
    "6e636f646564120e0a0c0a0affd820706963747572650a260a16696d6167652f6f626a6563742f62626f782f786d696e120c120a0a080000003f"
    "0000803e0a160a0c696d6167652f68656967687412061a040a02f7020a1a0a11696d6167652f636c6173732f6c6162656c12051a030a01033600"
    "4f363d000000000000006049f1ec0a3b0a110a05696d61676512080a060a04746664730a160a0966696c655f6e616d6512090a070a05612e6a70"
    "670a0e0a056c6162656c12051a030a01006181ed83"
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTDEIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path):
    (tmp_path / "data").mkdir()
    return tmp_path / "data"


def write(path, *records):
    path.write_bytes(b"".join(record(data) for data in records))
    return path


def sample(image, label, **more):
    return example({"image/encoded": image, "image/class/label": label, **more})


@pytest.fixture
def imagenet(root, varied):
    """Three training files and a held-out one, with class numbers 1 to 4."""
    for number in range(3):
        part = varied[3 * number : 3 * number + 3]
        tfrecord(root / f"train-{number:05d}-of-00003", part, [1 + (3 * number + i) % 4 for i in range(3)])
    tfrecord(root / "validation-00000-of-00001", varied[9:11], [3, 2])
    return root


def test_a_file_by_another_writer(root):
    (root / "a.tfrecord").write_bytes(OTHER_WRITER)
    source = TFRecordSource(root, ["a.tfrecord"])
    assert [source.read(i).tobytes() for i in (1, 0)] == [b"tfds", b"\xff\xd8 picture"]
    assert [source.label(i) for i in (0, 1)] == [3, 0]


def test_records_in_any_order(imagenet, varied):
    train, val = open_pair("tfrecord", imagenet)
    assert (len(train), len(val)) == (9, 2)
    for i in (8, 0, 4, 3, 8, 5):
        assert train.read(i).tobytes() == varied[i]
        assert train.label(i) == i % 4
    assert train.path(7) == f"{imagenet}/train-00002-of-00003:1"
    assert train.name(7) == "train-00002-of-00003:1"
    assert (val.label(0), val.path(1)) == (2, f"{imagenet}/validation-00000-of-00001:1")


def test_features_in_any_order_size_and_number(root):
    """Whatever lies where the windows end through which the files are looked at."""
    noise = np.random.default_rng(0)
    records, images = [], []
    for i in range(400):
        images.append(noise.bytes(int(noise.choice([0, 1, 100, 127, 128, 4000, 4096, 20_000]))))
        features = {f"feature {k}": noise.bytes(int(noise.integers(0, 400))) for k in range(noise.integers(0, 20))}
        features |= {"f" * int(noise.integers(1, 300)): 1.5, "image/encoded": images[-1], "image/class/label": i % 300}
        names = noise.permutation(sorted(features))
        records.append(example({name: features[name] for name in names}))
    write(root / "a.tfrecord", *records)
    source = TFRecordSource(root, ["a.tfrecord"])
    assert not source.skipped
    assert [source.label(i) for i in range(400)] == [i % 300 for i in range(400)]
    assert all(source.read(i).tobytes() == image for i, image in enumerate(images))


def test_passing_over_what_nobody_wants_changes_nothing(root, monkeypatch):
    """In records of every make, sound ones and damaged ones, wherever windows and files end."""
    noise = np.random.default_rng(0)
    names = ["image/encoded", "image/class/label", "image", "label", "image/width", "label/first", "n" * 45, "n" * 140]
    values = [b"", b"?" * 40, b"?" * 140, b"?" * 20_000, 0, 1, 130, 999_999, 1_000_000, -1, 1 << 28, 0.5]
    values += [[b"x", b"y"], [1, 2], bytearray(b""), bytearray(field(3, b"\x08\x05")), bytearray(field(3, b""))]
    paths = [root / f"{kind}-{number}" for kind in ("sound", "odd", "damaged") for number in range(15)]
    for path in paths:
        sound, records = path.name.startswith("sound"), []
        for _ in range(20):
            features = {
                "image/encoded": noise.bytes(noise.integers(300)),
                "image/class/label": int(noise.integers(1000)),
            }
            for name in noise.permutation(names)[: noise.integers(8)]:
                value = values[noise.integers(len(values))]
                features[name] = features.get(name, value) if sound else value
            order = noise.permutation(sorted(features))[0 if sound else noise.integers(2) :]
            data = bytearray(example({name: features[name] for name in order}))
            for at in noise.integers(0, min(len(data), 300), 2) if path.name.startswith("damaged") else ():
                data[at] = noise.integers(256)
            records.append(bytes(data))
        write(path, *records)
    passed, pass_over = [], module._behind_unwanted
    monkeypatch.setattr(
        module, "_behind_unwanted", lambda *place: passed.append(pass_over(*place) - place[1]) or place[1] + passed[-1]
    )
    found = [(list(rows), skipped) for rows, skipped in map(module._listed, map(str, paths))]
    monkeypatch.setattr(module, "_behind_unwanted", lambda window, at, last, features: at)
    for path, (rows, skipped) in zip(paths, found, strict=True):
        parsed, why = module._listed(str(path))
        assert np.array_equal(rows, parsed), path
        assert skipped == why
    assert sum(size > 0 for size in passed) > 200


IMAGE, LABEL = entry("image/encoded", feature(b"picture")), entry("image/class/label", feature(1))
TFDS = entry("image", feature(b"picture")) + entry("label", feature(1))
LONG = field(3, bytes(5000)) + field(1, 5) + varint(6 << 3 | 1) + bytes(8) + varint(7 << 3 | 5) + bytes(4)


@pytest.mark.parametrize(
    "data",
    [
        field(1, LABEL + IMAGE),
        field(1, LABEL) + field(1, IMAGE),
        field(2, b"?") + field(1, IMAGE + LABEL) + LONG,
        field(1, LONG[5000:] + IMAGE + field(2, b"?") + LABEL + LONG),
        field(1, field(1, field(2, feature(b"picture")) + field(1, b"image/encoded")) + LABEL),
        field(1, IMAGE + entry("image/class/label", field(3, field(1, 1)))),
        field(1, IMAGE + entry("image/class/label", field(3, field(1, b"\x81\x80\x00")))),
        field(1, IMAGE + entry("image/class/label", feature(b"1") + feature(1))),
        field(1, entry("image", feature(b"no")) + entry("label", feature(b"one")) + IMAGE + LABEL),
        field(1, entry("n" * 200, b"") + entry("", b"") + IMAGE + LABEL),
    ],
)
def test_whatever_the_wire_format_allows(root, data):
    write(root / "a.tfrecord", data, sample(b"other", 0))
    source = TFRecordSource(root, ["a.tfrecord"])
    assert (source.read(0).tobytes(), source.label(0)) == (b"picture", 1)


def leave_out(root, *records):
    """Reasons by name for records between sound ones."""
    sound = [sample(b"sound", label) for label in (0, 1, 2)]
    write(root / "a.tfrecord", *sound[:2], *records, *sound[2:])
    with pytest.warns(UserWarning, match=r"data: \d+ entries of TFRecord files are left out:\n"):
        source = TFRecordSource(root, ["a.tfrecord"])
    assert [(source.read(i).tobytes(), source.label(i)) for i in range(len(source))] == [
        (b"sound", i) for i in range(3)
    ]
    assert source.name(2) == f"a.tfrecord:{2 + len(records)}"
    return {path.removeprefix(f"{root}/a.tfrecord:"): reason for path, reason in source.skipped}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "no feature image/encoded and no feature image; there are none"),
        (example({"image/class/label": 1}), "no feature image/encoded .* there are 'image/class/label'"),
        (example({"image/encoded": b"x"}), "no feature image/class/label and no feature label; there are 'image/enc"),
        (example({"jpg": b"x", "é": b"x"}), "there are 'jpg', 'é'$"),
        (example({str(i): 1 for i in range(100)}), "there are '0', '1', '2', '3', '4'$"),
        (sample(7, 1), "feature image/encoded holds integers, not bytes"),
        (sample(bytearray(b""), 1), "feature image/encoded holds nothing"),
        (sample(bytearray(field(1, b"")), 1), "feature image/encoded holds 0 values, not one"),
        (sample([b"x", b"y"], 1), "feature image/encoded holds 2 values, not one"),
        (sample(b"x", b"1"), "feature image/class/label holds bytes, not integers"),
        (sample(b"x", 1.0), "feature image/class/label holds floats, not integers"),
        (sample(b"x", [1, 2]), "feature image/class/label holds several values, not one"),
        (sample(b"x", list(range(500))), "several values|no tf.train.Example"),
        (sample(b"x", bytearray(field(3, b""))), "feature image/class/label holds no values, not one"),
        (sample(b"x", -1), "its label -1 is not a class number"),
        (sample(b"x", -(1 << 63)), "its label -9223372036854775808 is not"),
        (sample(b"x", 1 << 40), r"its label 1099511627776 is not a class number \(0 to 999999\)"),
        (sample(b"x", 1)[:-1], "no tf.train.Example, or a damaged one"),
        (sample(b"x", 1)[1:], "no tf.train.Example"),
        (b"<!DOCTYPE html><html>404</html>", "no tf.train.Example"),
        (b"\0" * 100, "no tf.train.Example|no feature"),
        (b"\xff" * 100, "no tf.train.Example"),
        (field(1, varint(10) + varint(1 << 60)), "no tf.train.Example"),
        (field(1, b"\x0a\x05\x0a\x7fimage"), "no tf.train.Example"),
        (field(1, LABEL + entry("image/encoded", field(1, b"\x0a\x7fpicture"))), "no tf.train.Example"),
        (field(1, IMAGE + entry("image/class/label", b"\x1a\x7f\x0a\x01\x01")), "no tf.train.Example"),
        (field(1, b"\x0a"), "no tf.train.Example|no feature"),
        (field(1, b"\x0a\x05\x0a\x06abc" + IMAGE + LABEL), "no tf.train.Example"),
        (field(1, b"\x0a\x82\x01\x0a\x85\x01" + bytes(127) + IMAGE + LABEL), "no tf.train.Example"),
        (field(1, TFDS + b"\x0a\x20\x0a\x02xx"), "no tf.train.Example"),
    ],
)
def test_records_that_cannot_be_used(root, data, reason):
    reasons = leave_out(root, data)
    assert list(reasons) == ["2"]
    assert re.search(reason, reasons["2"]), reasons


def test_names_are_numbers_and_not_what_a_record_says(root):
    name = "../../etc/passwd"
    write(root / "a.tfrecord", sample(b"x", 0, **{"image/filename": name.encode()}), example({name: 1}), sample(b"", 1))
    with pytest.warns(UserWarning, match=f"a.tfrecord:1: no feature .* there are '{name}'"):
        source = TFRecordSource(root, ["a.tfrecord"])
    assert [source.name(i) for i in range(2)] == ["a.tfrecord:0", "a.tfrecord:2"]


# damaged files


def whole(images):
    return [record(sample(image, i % 2)) for i, image in enumerate(images)]


@pytest.mark.parametrize("cut", [1, 4, 5, 60, 3000])
def test_a_cut_tail_costs_the_records_in_it(root, varied, cut):
    records = whole(varied[:4])
    data = b"".join(records)[:-cut]
    (root / "a.tfrecord").write_bytes(data)
    with pytest.warns(UserWarning, match=rf"cut short: it ends at byte {len(data)}, inside a record"):
        source = TFRecordSource(root, ["a.tfrecord"])
    count = sum(sum(map(len, records[: i + 1])) <= len(data) for i in range(4))
    assert count >= 2
    assert [source.read(i).tobytes() for i in range(len(source))] == varied[:count]


def test_a_tail_of_less_than_a_head(root, varied):
    (root / "a.tfrecord").write_bytes(b"".join(whole(varied[:3])) + length(5)[:7])
    with pytest.warns(UserWarning, match="cut short: .* inside a record's length"):
        assert len(TFRecordSource(root, ["a.tfrecord"])) == 3


@pytest.mark.parametrize(
    "head",
    [
        length(100)[:8] + b"abcd",
        bytes(12),
        b"<!DOCTYPE html>",
        (1 << 60).to_bytes(8, "little") + b"abcd",
        b"\xff" * 12,
    ],
)
def test_a_damaged_length_costs_what_comes_after_it(root, varied, head):
    records = whole(varied[:5])
    at = sum(map(len, records[:3]))
    data = b"".join(records)
    (root / "a.tfrecord").write_bytes(data[:at] + head + data[at + len(head) :])
    with pytest.warns(UserWarning, match=f"damaged at byte {at} of {len(data)}: the length of a record does not match"):
        assert len(TFRecordSource(root, ["a.tfrecord"])) == 3


@pytest.mark.parametrize("size", [-1, -16, -28, 1 << 60, (1 << 63) - 1, 1 << 31])
def test_lengths_that_lie(root, varied, size):
    """With the right checksum: a negative one leads back for ever, an absurd one beyond the end."""
    (root / "a.tfrecord").write_bytes(b"".join(whole(varied[:3])) + length(size) + bytes(100))
    with pytest.warns(UserWarning, match=f"inside a record of {size % 2**64} bytes"):
        assert len(TFRecordSource(root, ["a.tfrecord"])) == 3


def test_a_record_larger_than_protocol_buffers(root, varied):
    """Sparse: 2 GiB of nothing."""
    first, second, third = whole(varied[:3])
    with open(root / "a.tfrecord", "wb") as file:
        file.write(first + second + length(1 << 31))
        file.seek((1 << 31) + 4, os.SEEK_CUR)
        file.write(third)
    with pytest.warns(UserWarning, match="a.tfrecord:2: a record of 2147483648 bytes is more than"):
        source = TFRecordSource(root, ["a.tfrecord"])
    assert source.read(2).tobytes() == varied[2]


@pytest.mark.parametrize("at", [5, 300, -5, -1])
def test_damaged_data_are_found_when_they_are_read(root, varied, at):
    path = root / "a.tfrecord"
    path.write_bytes(b"".join(whole(varied[:3])))
    source = TFRecordSource(root, ["a.tfrecord"])
    data = bytearray(path.read_bytes())
    begin, end = (sum(map(len, whole(varied[:n]))) for n in (1, 2))
    data[begin + 12 + at if at > 0 else end + at] ^= 4
    path.write_bytes(data)
    with pytest.raises(BadImage, match=r"have changed \(checksum mismatch\)"):
        source.read(1)
    assert [source.read(i).tobytes() for i in (0, 2)] == [varied[0], varied[2]]


def test_no_damage_ends_in_another_exception(root, varied):
    noise = np.random.default_rng(0)
    path = root / "a.tfrecord"
    for _ in range(10):
        # Checksums are right, so that what is parsed is the damage.
        records = [bytearray(sample(image[:50], i % 3, **{"image/height": 4})) for i, image in enumerate(varied[:120])]
        for one in records:
            for at in noise.integers(0, len(one), 2):
                one[at] = noise.integers(0, 256)
        write(path, *records, sample(b"sound", 0), sample(b"sound", 1))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            source = TFRecordSource(root, ["a.tfrecord"])
        assert len(source) + len(source.skipped) == 122
        assert all(source.read(i).size <= 200 for i in range(len(source)))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the TFRecord file is empty"),
        (b"text", "not a TFRecord file, or one that is damaged: it starts with b'text'"),
        (b"<!DOCTYPE html>" * 100, "not a TFRecord file, .* starts with b'<!DOCTYPE ht'"),
        (bytes(10_000), "not a TFRecord file"),
        (
            gzip.compress(bytes(5000), mtime=0),
            "compressed with gzip; only a plain TFRecord file can be read in any order",
        ),
        (b"\x78\x9c" + bytes(500), "compressed with zlib"),
        (None, "the TFRecord file cannot be read: Is a directory"),
        ("pipe", "the TFRecord file cannot be read: Illegal seek|is empty"),
    ],
)
def test_nothing_usable_is_an_error_with_the_reasons(root, data, reason):
    path = root / "train.tfrecord"
    if data is None:
        path.mkdir()
    elif data == "pipe":
        os.mkfifo(path)
    else:
        path.write_bytes(data)
    with pytest.raises(DataError, match=r"data: no image with a label in 1 TFRecord file; a record is a tf\.") as info:
        open_source("tfrecord", root, "train")
    assert re.search(reason, str(info.value))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(imagenet):
    os.chmod(imagenet / "train-00001-of-00003", 0)
    with pytest.warns(UserWarning, match="00001-of-00003: the TFRecord file cannot be read: Permission denied"):
        assert len(open_source("tfrecord", imagenet, "train")) == 6


def test_a_file_that_vanishes_or_is_cut_while_in_use(imagenet):
    names = files(imagenet, "train")
    source = TFRecordSource(imagenet, names)
    os.truncate(imagenet / names[0], 600)
    (imagenet / names[1]).unlink()
    with pytest.raises(BadImage, match="ends before the record does"):
        source.read(0)
    with pytest.raises(OSError, match="No such file"):
        source.read(4)
    with pytest.raises(DataError, match=r"00001-of-00003: the tfrecord file cannot be read: No such file"):
        TFRecordSource(imagenet, names)


def test_a_source_can_be_sent_to_another_process(imagenet, varied):
    source = open_source("tfrecord", imagenet, "train")
    again = pickle.loads(pickle.dumps(source))
    assert again.fingerprint == source.fingerprint
    assert again.read(5).tobytes() == varied[5]


# the list of records


@pytest.fixture
def scans(monkeypatch):
    """Files that are gone through."""
    seen, samples = [], module._samples
    monkeypatch.setattr(module, "_samples", lambda path, skipped: seen.append(path) or samples(path, skipped))
    return seen


def test_files_are_gone_through_once_while_they_are_the_same(imagenet, scans):
    first = open_source("tfrecord", imagenet, "train")
    assert open_source("tfrecord", imagenet, "train").fingerprint == first.fingerprint
    assert len(scans) == 3
    os.utime(imagenet / "train-00001-of-00003", ns=(1, 1))
    open_source("tfrecord", imagenet, "train")
    assert len(scans) == 6
    (kept,) = imagenet.glob(".fastdeit-tfrecord-*")
    kept.write_bytes(kept.read_bytes()[:-9])
    assert open_source("tfrecord", imagenet, "train").fingerprint == first.fingerprint
    assert len(scans) == 9


def test_other_labels_are_other_data(root):
    made = []
    for labels in ([0, 1, 1], [0, 1, 0]):
        tfrecord(root / "a.tfrecord", [b"x", b"y", b"z"], labels)
        made.append(TFRecordSource(root, ["a.tfrecord"]).fingerprint)
        os.unlink(root / "a.tfrecord")
    assert made[0] != made[1]


def test_what_was_left_out_is_said_at_every_start(root, scans):
    write(root / "a.tfrecord", sample(b"x", 0), sample(b"y", 1), b"")
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"a\.tfrecord:2: no feature"):
            assert [path for path, _ in TFRecordSource(root, ["a.tfrecord"]).skipped] == [f"{root}/a.tfrecord:2"]
    assert len(scans) == 1


def test_the_writer_of_these_tests_is_the_other_one(root):
    features = {"image": b"tfds", "file_name": b"a.jpg", "label": 0}
    assert record(example(features)) == OTHER_WRITER[-77:]
    assert masked(example(features)) == OTHER_WRITER[-4:]
