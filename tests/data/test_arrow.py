"""Arrow files as the `datasets` library has them on disk: rows in any order, class names, damage."""

import json
import os
import pickle
import re
import struct
import sys
import warnings
from contextlib import suppress

import numpy as np
import pytest

from fastdeit.data.sources.datasets import open_pair, open_source
from fastdeit.data.sources.source import BadImage, DataError
from tests.data.writers import arrow, arrow_table, features, saved

pyarrow = pytest.importorskip("pyarrow")

from pyarrow import parquet  # noqa: E402

from fastdeit.data.sources.arrow import ArrowSource, _Bodies, _Message  # noqa: E402

NAMES = ["cat", "dog", "eel"]
IMAGE = pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()})


@pytest.fixture
def disk(tmp_path, varied):
    """What DatasetDict.save_to_disk writes: two files of training rows and one of held-out rows."""
    for split, first, counts in (("train", 0, (7, 5)), ("validation", 12, (2,))):
        parts = [f"data-{part:05d}-of-{len(counts):05d}.arrow" for part in range(len(counts))]
        saved(tmp_path / split, parts, NAMES)
        for part, count in zip(parts, counts, strict=True):
            labels = [i % 3 for i in range(first, first + count)]
            arrow(tmp_path / split / part, varied[first : first + count], labels, NAMES)
            first += count
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
    return tmp_path


def column(*images):
    return pyarrow.array([image and {"bytes": image, "path": None} for image in images], IMAGE)


def write(path, columns, rows=3, **options):
    return arrow_table(path, pyarrow.table(columns), rows, **options)


def test_rows_in_any_order(disk, varied):
    train, val = open_pair("arrow", disk)
    assert (len(train), len(val)) == (12, 2)
    assert train.classes == val.classes == NAMES
    for i in (11, 0, 6, 7, 2, 3, 11):
        assert train.read(i).tobytes() == varied[i]
        assert train.label(i) == i % 3
    assert train.path(8) == f"{disk}/train/data-00001-of-00002.arrow:1"
    assert train.name(8) == "train/data-00001-of-00002.arrow:1"
    assert val.read(1).tobytes() == varied[13]


def test_an_image_is_read_alone(disk, varied, monkeypatch):
    source = open_source("arrow", disk, "train")
    read, seen = os.pread, []
    monkeypatch.setattr(os, "pread", lambda handle, size, at: seen.append(size) or read(handle, size, at))
    source.read(5)
    assert seen == [len(varied[5])]


def test_columns_of_other_types_and_in_another_order(tmp_path, varied):
    label = pyarrow.array([2, 0, 1, 1], "uint8")
    large = column(*varied[:4]).cast(pyarrow.struct({"bytes": pyarrow.large_binary(), "path": pyarrow.string()}))
    columns = {
        "tags": [["a"], None, ["b", "c"], []],
        "label": label,
        "box": pyarrow.array([[1.0] * 4] * 4, pyarrow.list_(pyarrow.float32(), 4)),
        "image": large,
        "nothing": pyarrow.nulls(4),
    }
    write(tmp_path / "train.arrow", columns)
    source = open_source("arrow", tmp_path, "train")
    assert [source.read(i).tobytes() for i in range(4)] == varied[:4]
    assert [source.label(i) for i in range(4)] == [2, 0, 1, 1]


def test_slices_empty_batches_and_the_file_format(tmp_path, varied):
    table = pyarrow.table({"image": column(*varied[:8]), "label": [0, 1] * 4})
    with pyarrow.ipc.new_file(str(tmp_path / "train.arrow"), table.schema) as stream:
        for part in (table[1:3], table[:0], table[3:8]):
            stream.write_table(part)
        stream.write_batch(pyarrow.record_batch([column(), pyarrow.array([], "int64")], schema=table.schema))
    source = open_source("arrow", tmp_path, "train")
    assert [source.read(i).tobytes() for i in range(7)] == varied[1:8]
    assert not source.skipped


# dictionaries


def encoded_column(items, kind, index="int8"):
    return pyarrow.array(items, kind).dictionary_encode().cast(pyarrow.dictionary(getattr(pyarrow, index)(), kind))


def inside(column):
    return pyarrow.StructArray.from_arrays([column, pyarrow.nulls(len(column), "string")], ["bytes", "path"])


def with_dictionaries(varied, width, nested):
    """Five rows with three pictures, one row without; a dictionary in every column, also in one that nobody reads."""
    images = encoded_column([varied[i] if i is not None else None for i in (2, 0, None, 1, 0)], width, "int32")
    return {
        "other": encoded_column(["x", None, "y", "x", "x"], pyarrow.string(), "int16"),
        "label": encoded_column(["eel", "cat", "cat", "eel", "cat"], pyarrow.string()),
        "image": inside(images) if nested else images,
    }


def written(tmp_path, table, form):
    """The training split of a table, which is written in two parts."""
    if form == "parquet":
        parquet.write_table(table, tmp_path / "train.parquet", row_group_size=3)
    else:
        opened = {"stream": pyarrow.ipc.new_stream, "file": pyarrow.ipc.new_file}[form]
        with opened(str(tmp_path / "train.arrow"), table.schema) as stream:
            stream.write_table(table, max_chunksize=2)
    return open_source("parquet" if form == "parquet" else "arrow", tmp_path, "train")


@pytest.mark.parametrize("width", [pyarrow.binary(), pyarrow.large_binary()], ids=str)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("form", ["stream", "file", "parquet"])
def test_columns_with_dictionaries(tmp_path, varied, width, nested, form):
    source = written(tmp_path, pyarrow.table(with_dictionaries(varied, width, nested)), form)
    assert source.classes == ["cat", "eel"]
    assert [source.label(i) for i in range(5)] == [1, 0, 0, 1, 0]
    assert [source.read(i).tobytes() for i in (0, 1, 3, 4)] == [varied[i] for i in (2, 0, 1, 0)]
    with pytest.raises(BadImage, match="the row has no image bytes"):
        source.read(2)
    assert not source.skipped


LONG = "a name of more than twelve letters"


def of_views(varied, label):
    """Five rows, one without a picture, as Polars writes them: up to 12 bytes stand in the view itself."""
    names = ["cat", LONG, LONG, "cat", LONG]
    images = [varied[0], b"twelve bytes", None, varied[1], b"x"]
    return {"label": label(names), "image": pyarrow.array(images, pyarrow.binary_view())}, names, images


def dictionary_of_views(names):
    places = pyarrow.array([("cat", LONG).index(name) for name in names], "int8")
    return pyarrow.DictionaryArray.from_arrays(places, pyarrow.array(["cat", LONG], pyarrow.string_view()))


@pytest.mark.parametrize(
    "label",
    [lambda names: pyarrow.array(names, pyarrow.string_view()), dictionary_of_views],
    ids=["names", "dictionary"],
)
@pytest.mark.parametrize("form", ["stream", "nested stream", "file", "parquet"])
def test_columns_of_views(tmp_path, varied, label, form):
    if form == "parquet" and label is dictionary_of_views:
        label = pyarrow.array  # Arrow writes none to Parquet
    columns, names, images = of_views(varied, label)
    if form == "nested stream":
        columns["image"] = inside(columns["image"])
    source = written(tmp_path, pyarrow.table(columns), form.split()[-1])
    assert [source.classes[source.label(i)] for i in range(5)] == names
    assert [source.read(i).tobytes() for i in (0, 1, 3, 4)] == [images[i] for i in (0, 1, 3, 4)]
    with pytest.raises(BadImage, match="the row has no image bytes"):
        source.read(2)
    assert not source.skipped


@pytest.mark.parametrize(
    "damage",
    [
        lambda size, head, number, place: (-1, head, number, place),
        lambda size, head, number, place: (1 << 30, head, number, place),
        lambda size, head, number, place: (size, head, 2, place),
        lambda size, head, number, place: (size, head, -1, place),
        lambda size, head, number, place: (size, head, number, 1 << 30),
        lambda size, head, number, place: (size, head, number, -1),
    ],
)
def test_views_that_lead_out_of_the_batch(tmp_path, varied, damage):
    columns, _, images = of_views(varied, pyarrow.array)
    path = write(tmp_path / "train.arrow", columns, 2)
    data = path.read_bytes()
    sound = len(images[3]), images[3][:4], 0, len(images[0])  # a slice has the buffers of the whole
    assert data.count(struct.pack("<i4sii", *sound)) == 1
    path.write_bytes(data.replace(struct.pack("<i4sii", *sound), struct.pack("<i4sii", *(damage(*sound)))))
    assert len(left(path, "compressed or damaged: images lie outside of it; rows from 2 on")) == 2


def two_batches(path, varied, **options):
    """The second batch has other dictionaries, which begin as those of the first do."""
    batches = [
        pyarrow.record_batch(
            {
                "image": encoded_column(varied[: 2 + more], pyarrow.binary()),
                "label": encoded_column(["cat", "dog", "eel", "fox"][: 2 + more], pyarrow.string()),
            }
        )
        for more in (0, 2)
    ]
    schema = batches[0].schema
    with pyarrow.ipc.new_stream(str(path), schema, options=pyarrow.ipc.IpcWriteOptions(**options)) as stream:
        for batch in batches:
            stream.write_batch(batch)


def test_dictionaries_that_are_replaced(tmp_path, varied):
    two_batches(tmp_path / "train.arrow", varied)
    source = open_source("arrow", tmp_path, "train")
    assert [source.read(i).tobytes() for i in range(6)] == [*varied[:2], *varied[:4]]
    assert [source.classes[source.label(i)] for i in range(6)] == ["cat", "dog", "cat", "dog", "eel", "fox"]


def test_dictionaries_that_grow_are_refused_by_name(tmp_path, varied):
    two_batches(tmp_path / "train.arrow", varied, emit_dictionary_deltas=True)
    with pytest.warns(
        UserWarning, match="a dictionary .* is stored in parts, .* without deltas; rows from 2 on are lost"
    ):
        assert len(open_source("arrow", tmp_path, "train")) == 2


@pytest.mark.parametrize("damage", [b"\7", b"\xff"])
def test_an_index_beyond_its_dictionary(tmp_path, varied, damage):
    columns = {"image": encoded_column(varied[:3], pyarrow.binary()), "label": [0, 1, 1]}
    path = write(tmp_path / "a.arrow", columns)
    data = path.read_bytes()
    at = data.rindex(b"\0\1\2" + bytes(5))
    path.write_bytes(data[:at] + damage + data[at + 1 :])
    with pytest.raises(DataError, match="compressed or damaged: images lie outside of their dictionary"):
        ArrowSource(tmp_path, ["a.arrow"])


# classes


def test_names_in_dataset_info(tmp_path, varied):
    arrow(tmp_path / "train" / "data.arrow", varied[:3], [2, 0, 1])
    (tmp_path / "train" / "dataset_info.json").write_text(json.dumps({"features": features(NAMES)}))
    assert open_source("arrow", tmp_path, "train").classes == NAMES


@pytest.mark.parametrize(
    "info", ["", "[]", "{}", '{"features": 1}', "[" * 100_000, '{"features": {"label": {"names": ["cat"]}}}']
)
def test_names_that_are_none_are_not_used(tmp_path, varied, info):
    arrow(tmp_path / "train" / "data.arrow", varied[:3], [2, 0, 1])
    (tmp_path / "train" / "dataset_info.json").write_text(info)
    assert open_source("arrow", tmp_path, "train").classes == ["0", "1", "2"]


def test_names_in_another_order_are_refused(disk, varied):
    arrow(disk / "odd.arrow", varied[:2], [0, 1], ["dog", "cat", "eel"])
    with pytest.raises(DataError, match="the classes of train and odd are the same, but in another order"):
        open_pair("arrow", disk, val="odd")


def test_files_of_a_split_have_one_list_of_names(disk, varied):
    arrow(disk / "train" / "data-00001-of-00002.arrow", varied[:2], [0, 1], NAMES[::-1])
    with pytest.raises(DataError, match=r"data-00000-of-00002\.arrow and .*data-00001.* number their classes differen"):
        open_pair("arrow", disk)


def test_labels_may_be_names(tmp_path, varied):
    arrow(tmp_path / "a.arrow", varied[:4], ["eel", "cat", "eel", "cat"])
    source = open_source("arrow", tmp_path, "a")
    assert source.classes == ["cat", "eel"]
    assert [source.label(i) for i in range(4)] == [1, 0, 1, 0]


def test_a_last_class_without_a_held_out_row(tmp_path, varied):
    arrow(tmp_path / "train.arrow", varied[:3], [0, 1, 2])
    arrow(tmp_path / "val.arrow", varied[:2], [0, 1])
    train, val = open_pair("arrow", tmp_path)
    assert train.classes == val.classes == ["0", "1", "2"]


def test_other_labels_are_other_data(tmp_path, varied):
    made = []
    for labels in ([0, 1, 1], [0, 1, 0]):
        arrow(tmp_path / "a.arrow", varied[:3], labels)
        made.append(ArrowSource(tmp_path, ["a.arrow"]).fingerprint)
    assert made[0] != made[1]


ROWS = column(b"1", b"2")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"img": ROWS, "label": [0, 1]}, r"a\.arrow: no column image; there are \['img', 'label'\]"),
        ({"image": ROWS, "fine": [0, 1]}, "no column label; there are"),
        ({"image": ["x", "y"], "label": [0, 1]}, "column image is no struct of bytes and path, but string"),
        ({"image": [{"bytes": "x"}, {"bytes": "y"}], "label": [0, 1]}, "column image is no struct of bytes and path"),
        ([("image", ROWS), ("label", [0, 1]), ("label", [1, 0])], "column image or label is there twice; there are"),
        ({"image": ROWS, "label": [0, None]}, "1 rows have no 'label'"),
        (
            {"image": ROWS, "label": [0.0, 1.0]},
            "column 'label' holds double, not class numbers or names; pandas makes floats of whole numbers where one",
        ),
        ({"image": ROWS, "label": [[0], [1]]}, "column 'label' holds list<.*>, not class numbers or names"),
        ({"image": ROWS, "label": [-1, -1]}, r"labels from -1 to -1, .*\(-1 marks a split without labels\)"),
        ({"image": ROWS, "label": [0, 1 << 40]}, "labels from 0 to 1099511627776"),
        (
            {"image": ROWS, "label": pyarrow.array([0, (1 << 64) - 1], "uint64")},
            r"holds uint64 that are no class numbers",
        ),
        ({"image": ROWS, "label": [0, 0]}, "every label is 0"),
        ({"image": column(), "label": pyarrow.array([], "int64")}, r"no rows in a\.arrow"),
    ],
)
def test_columns_that_cannot_be_used(tmp_path, columns, message):
    if isinstance(columns, list):
        columns = pyarrow.Table.from_arrays([pyarrow.array(one) for _, one in columns], [name for name, _ in columns])
    arrow_table(tmp_path / "a.arrow", columns if isinstance(columns, pyarrow.Table) else pyarrow.table(columns))
    with pytest.raises(DataError, match=message):
        open_source("arrow", tmp_path, "a")


def test_files_with_labels_of_different_types(tmp_path, varied):
    arrow(tmp_path / "train-0-of-2.arrow", varied[:2], [0, 1])
    arrow(tmp_path / "train-1-of-2.arrow", varied[:2], ["cat", "dog"])
    with pytest.raises(
        DataError,
        match=r"column 'label' is of different types in train-0-of-2\.arrow \(int64\) and train-1-of-2\.arrow \(str",
    ):
        open_source("arrow", tmp_path, "train")


def test_rows_without_an_image(tmp_path, varied):
    images = [*varied[:2], None, b"", None, varied[3]]
    rows = [{"bytes": image, "path": "../../etc/passwd"} for image in images]
    write(tmp_path / "a.arrow", {"image": pyarrow.array([*rows, None], IMAGE), "label": [0, 1] * 3 + [1]}, rows=10)
    source = open_source("arrow", tmp_path, "a")
    for i in (2, 4, 6):
        with pytest.raises(BadImage, match="the row has no image bytes"):
            source.read(i)
    assert [source.read(i).tobytes() for i in (0, 1, 3, 5)] == [*varied[:2], b"", varied[3]]
    assert source.name(5) == "a.arrow:5"


# damaged files


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cut short: it ends at byte 0"),
        (b"text", "cut short: it ends at byte 4"),
        (b"<html>" * 9, "no Arrow message, .* at byte 0 of 54: it starts with b'<html><h'"),
        (bytes(1000), "no Arrow message, or a damaged one, at byte 0 of 1000"),
        (b"\xff\xff\xff\xff" + bytes(100), "it holds nothing"),
        (b"\xff\xff\xff\xff\x08\0\0\0" + bytes(100), "cut short or damaged: it ends at byte 108"),
        (b"\xff" * 8 + bytes(100), "cut short or damaged: it ends at byte 108, inside the message at byte 0"),
        (b"ARROW1\0\0", "cut short: it ends at byte 8"),
        (None, "Is a directory"),
        ("pipe", "Illegal seek"),
    ],
)
def test_files_that_are_none(tmp_path, data, message):
    path = tmp_path / "a.arrow"
    if data is None:
        path.mkdir()
    elif data == "pipe":
        os.mkfifo(path)
    else:
        path.write_bytes(data)
    with pytest.raises(DataError, match=rf"a\.arrow: the Arrow file cannot be read: .*{message}"):
        ArrowSource(tmp_path, ["a.arrow"])


def places(path):
    """Where each message starts, and where the end mark does."""
    data = path.read_bytes()
    reader, found = pyarrow.BufferReader(data), []
    while reader.tell() < len(data) - 8:
        found.append(reader.tell())
        pyarrow.ipc.read_message(reader)
    return [*found, len(data) - 8], data


@pytest.fixture
def four(tmp_path, varied):
    """A file of four batches of three rows."""
    return arrow(tmp_path / "a.arrow", varied[:12], [0, 1, 2] * 4, NAMES)


def left(path, message):
    with pytest.warns(UserWarning, match=r"1 parts of Arrow files are left out:\n"):
        source = ArrowSource(path.parent, [path.name])
    ((where, reason),) = source.skipped
    assert where == str(path)
    assert re.search(message, reason), reason
    return source


@pytest.mark.parametrize("cut", [1, 8, 9, 400])
def test_a_cut_tail_costs_the_batches_in_it(four, varied, cut):
    found, data = places(four)
    assert len(found) == 6
    four.write_bytes(data[:-cut])
    count = 12 if cut <= 8 else 9
    source = left(four, f"cut short.*ends at byte {len(data) - cut}, .*; rows from {count} on are lost")
    assert [source.read(i).tobytes() for i in range(len(source))] == varied[:count]


@pytest.mark.parametrize(
    ("at", "damage", "message"),
    [
        (0, b"<html><html>", "no Arrow message, or a damaged one, at byte"),
        (0, bytes(8), "no Arrow message, or a damaged one"),
        (4, b"\xff\xff\xff\x7f", "inside the message at byte"),
        (4, b"\x10\0\0\0", "inside the message|no Arrow message|compressed or damaged"),
        (8, b"\xff\xff\xff\xff", "inside the message|compressed or damaged"),
        (8, bytes(280), "inside the message|compressed or damaged|no Arrow message"),
    ],
)
def test_a_damaged_message_costs_what_comes_after_it(four, varied, at, damage, message):
    found, data = places(four)
    at += found[3]
    four.write_bytes(data[:at] + damage + data[at + len(damage) :])
    source = left(four, message + ".*; rows from 6 on are lost")
    assert [source.read(i).tobytes() for i in range(6)] == varied[:6]


@pytest.mark.parametrize("size", [-1, -1024, 1 << 60, (1 << 63) - 1])
def test_bodies_that_lie_about_their_size(four, size):
    """A negative one leads back for ever, an absurd one beyond the end."""
    found, data = places(four)
    body = found[4] - found[3] - 8 - int.from_bytes(data[found[3] + 4 : found[3] + 8], "little")
    at = data.index(body.to_bytes(8, "little"), found[3])
    four.write_bytes(data[:at] + size.to_bytes(8, "little", signed=True) + data[at + 8 :])
    assert len(left(four, "cut short or damaged.*rows from 6 on")) == 6


@pytest.mark.parametrize("damage", [(-5).to_bytes(4, "little", signed=True), (1 << 30).to_bytes(4, "little")])
def test_offsets_that_lead_out_of_the_batch(four, varied, damage):
    found, data = places(four)
    ends = np.cumsum([0, *map(len, varied[6:9])]).astype("<i4").tobytes()
    at = data.index(ends, found[3])
    for place in (at, at + 4, at + 12):
        four.write_bytes(data[:place] + damage + data[place + 4 :])
        assert len(left(four, "compressed or damaged: images lie outside of it; rows from 6 on")) == 6


def test_a_buffer_that_is_too_short_for_its_rows(four):
    found, data = places(four)
    at = data.index(struct.pack("<qq", 0, 16), found[3])  # place and size of the four offsets of three images
    four.write_bytes(data[: at + 8] + struct.pack("<q", 12) + data[at + 16 :])
    assert len(left(four, "compressed or damaged: a buffer is too short for its rows; rows from 6 on")) == 6


def test_a_buffer_that_is_not_in_the_file():
    """What Arrow decompresses lies elsewhere; it must not be taken for a place in the file."""
    bodies = _Bodies("a", [_Message(3, bytes(16), 1000, 100), _Message(3, bytes(32), 5000, 60)])
    assert [bodies.place(bodies.stream[at : at + 60]) for at in (16, 56, 148)] == [1000, 1040, 5000]
    for buffer in (bodies.stream[15:20], bodies.stream[110:120], bodies.stream[147:150], pyarrow.py_buffer(bytes(9))):
        with pytest.raises(pyarrow.ArrowInvalid, match="a buffer lies outside of it"):
            bodies.place(buffer)


def test_labels_that_are_no_text(tmp_path, varied):
    path = arrow(tmp_path / "a.arrow", varied[:3], ["cat", "dog", "cat"])
    path.write_bytes(path.read_bytes().replace(b"catdogcat", b"cat\xff\xffgcat"))
    with pytest.raises(DataError, match=r"no rows in a\.arrow\n.* is compressed or damaged: Invalid.*UTF8"):
        ArrowSource(tmp_path, ["a.arrow"])


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
def test_compressed_batches(tmp_path, varied, codec):
    options = pyarrow.ipc.IpcWriteOptions(compression=codec)
    write(tmp_path / "a.arrow", {"image": column(*varied[:4]), "label": [0, 1] * 2}, options=options)
    with pytest.raises(DataError, match=r"no rows in a\.arrow\n.* is compressed or damaged: "):
        ArrowSource(tmp_path, ["a.arrow"])


def test_no_damage_ends_in_another_exception(four):
    noise = np.random.default_rng(0)
    found, data = places(four)
    for _ in range(400):
        changed = bytearray(data)
        first = int(noise.choice(found[:-1]))
        for at in noise.integers(first, first + 330, noise.integers(1, 4)):
            changed[at] = noise.integers(0, 256)
        four.write_bytes(changed[: noise.choice([len(data), noise.integers(0, len(data))])])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                source = ArrowSource(four.parent, [four.name])
            except DataError:
                continue
        for i in range(len(source)):
            with suppress(BadImage):
                assert source.read(i).size <= len(data)


def test_a_file_that_vanishes_or_is_cut_while_in_use(disk):
    source = open_source("arrow", disk, "train")
    os.truncate(disk / "train" / "data-00000-of-00002.arrow", 900)
    (disk / "train" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(BadImage, match="the Arrow file ends before the image does"):
        source.read(1)
    with pytest.raises(OSError, match="No such file"):
        source.read(9)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(four):
    os.chmod(four, 0)
    with pytest.raises(DataError, match=r"a\.arrow: the Arrow file cannot be read: Permission denied"):
        ArrowSource(four.parent, [four.name])


def test_a_source_can_be_sent_to_another_process(disk, varied):
    source = open_source("arrow", disk, "train")
    again = pickle.loads(pickle.dumps(source))
    assert again.fingerprint == source.fingerprint
    assert again.read(9).tobytes() == varied[9]


def test_without_pyarrow_the_message_says_what_to_install(disk, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastdeit.data.sources.arrow", None)
    monkeypatch.delattr("fastdeit.data.sources.arrow")
    with pytest.raises(DataError, match=r"Arrow files need pyarrow: pip install fastdeit\[parquet\]"):
        open_source("arrow", disk, "train")


def test_one_split_on_its_own_is_advised_upon(disk):
    with pytest.raises(DataError, match=r"train: this is one split, saved on its own; give the folder .* name 'train'"):
        open_source("arrow", disk / "train", "train")
