"""Parquet files as the Hugging Face hub has them: rows in any order, class names from the metadata."""

import json
import pickle
import sys

import pytest

from fastdeit.data.sources.datasets import open_pair, open_source
from fastdeit.data.sources.source import BadImage, DataError

pyarrow = pytest.importorskip("pyarrow")
from pyarrow import parquet as pq  # noqa: E402

from fastdeit.data.sources import parquet  # noqa: E402
from fastdeit.data.sources.parquet import ParquetSource, files  # noqa: E402


def rows(images):
    return [{"bytes": data, "path": f"{at}.jpg"} for at, data in enumerate(images)]


def write(path, images, labels, names=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table({"image": rows(images), "label": labels})
    if names:
        features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=3, write_page_checksum=True, compression="none")


@pytest.fixture
def hub(tmp_path, varied):
    names = ["cat", "dog", "eel"]
    write(tmp_path / "data" / "train-00000-of-00002.parquet", varied[:7], [0, 1, 2, 0, 1, 2, 0], names)
    write(tmp_path / "data" / "train-00001-of-00002.parquet", varied[7:12], [1, 2, 0, 1, 2], names)
    write(tmp_path / "data" / "val-00000-of-00001.parquet", varied[12:14], [0, 1], names)
    return tmp_path


def test_rows_in_any_order(hub, varied):
    train, val = open_pair("parquet", hub)
    assert (len(train), len(val)) == (12, 2)
    assert train.classes == val.classes == ["cat", "dog", "eel"]
    for i in (11, 0, 6, 7, 2, 3, 11):
        assert train.read(i).tobytes() == varied[i]
        assert train.label(i) == i % 3
    assert train.path(8) == f"{hub}/data/train-00001-of-00002.parquet:1"
    assert val.read(1).tobytes() == varied[13]


def test_names_in_another_order_are_refused(hub, varied):
    write(hub / "odd.parquet", varied[:2], [0, 1], ["dog", "cat", "eel"])
    with pytest.raises(DataError, match="the classes of train and odd are the same, but in another order"):
        open_pair("parquet", hub, val="odd")


def test_files_of_a_split_have_one_list_of_names(hub, varied):
    """A file may go without; in none may a number mean another class."""
    write(hub / "data" / "train-00000-of-00002.parquet", varied[:2], [0, 1])
    assert open_pair("parquet", hub)[0].classes == ["cat", "dog", "eel"]
    write(hub / "data" / "train-00000-of-00002.parquet", varied[:2], [0, 1], ["dog", "cat", "eel"])
    with pytest.raises(
        DataError, match=r"train-00000-of-00002\.parquet and .*train-00001.* number their classes differently \('dog'"
    ):
        open_pair("parquet", hub)


def test_labels_without_names_are_numbers(tmp_path, varied):
    write(tmp_path / "a.parquet", varied[:3], [2, 0, 1])
    assert open_source("parquet", tmp_path, "a").classes == ["0", "1", "2"]


def test_labels_may_be_names(tmp_path, varied):
    write(tmp_path / "a.parquet", varied[:3], ["eel", "cat", "eel"])
    source = open_source("parquet", tmp_path, "a")
    assert source.classes == ["cat", "eel"]
    assert [source.label(i) for i in range(3)] == [1, 0, 1]


@pytest.mark.parametrize("label", ["nan", "1.0", "-1", "", " "])
def test_names_that_are_none(tmp_path, varied, label):
    """What `astype(str)` makes of a missing label, and of numbers."""
    write(tmp_path / "a.parquet", varied[:3], ["cat", "dog", label])
    with pytest.raises(DataError, match=f"column 'label' holds '{label}', which is neither a class number nor a name"):
        open_source("parquet", tmp_path, "a")


def test_names_that_do_not_cover_the_labels_are_not_used(tmp_path, varied):
    write(tmp_path / "a.parquet", varied[:3], [2, 0, 1], names=["cat", "dog"])
    assert open_source("parquet", tmp_path, "a").classes == ["0", "1", "2"]


@pytest.fixture
def reads(monkeypatch):
    """Row groups that are read."""
    seen, read = [], pq.ParquetFile.read_row_group
    monkeypatch.setattr(
        pq.ParquetFile, "read_row_group", lambda self, group, **rest: seen.append(group) or read(self, group, **rest)
    )
    return seen


def test_a_row_group_is_read_once_while_it_is_kept(hub, reads, monkeypatch):
    source = open_source("parquet", hub, "train")
    for _ in range(2):
        assert [len(source.read(i)) > 0 for i in range(len(source))] == [True] * 12
    assert reads == [0, 1, 2, 0, 1]
    monkeypatch.setattr(parquet, "_CACHE_BYTES", 1)
    for i in (0, 1, 3, 4, 0):
        source.read(i)
    assert reads[5:] == [1, 0]  # 0 was in the cache, of which one group is left
    assert len(source._cache) == 1


def test_a_source_can_be_sent_to_another_process(hub, varied):
    source = open_source("parquet", hub, "train")
    source.read(3)
    again = pickle.loads(pickle.dumps(source))
    assert again.fingerprint == source.fingerprint
    assert again.read(9).tobytes() == varied[9]


def test_files_of_a_split(tmp_path, varied):
    for name in ("train/b", "train/a", "test-1", "data/val-0", "whole", "data/part"):
        write(tmp_path / f"{name}.parquet", varied[:2], [0, 1])
    expected = {
        "train": ["train/a.parquet", "train/b.parquet"],
        "test": ["test-1.parquet"],
        "val": ["data/val-0.parquet"],
        "whole": ["whole.parquet"],
        "part": ["data/part.parquet"],
        "t*/*.parquet": ["train/a.parquet", "train/b.parquet"],
    }
    assert {split: files(tmp_path, split) for split in expected} == expected
    with pytest.raises(DataError, match=r"no Parquet file of split 'dev'; looked for dev/\*\.parquet, dev-\*\.parquet"):
        files(tmp_path, "dev")


def test_rows_without_an_image(tmp_path, varied):
    write(tmp_path / "a.parquet", [varied[0], None, varied[1]], [0, 1, 1])
    source = open_source("parquet", tmp_path, "a")
    with pytest.raises(BadImage, match="the row has no image bytes"):
        source.read(1)
    assert source.read(2).tobytes() == varied[1]
    table = pyarrow.table({"image": pyarrow.array([rows([varied[0]])[0], None]), "label": [0, 1]})
    pq.write_table(table, tmp_path / "b.parquet")
    with pytest.raises(BadImage, match="the row has no image bytes"):
        open_source("parquet", tmp_path, "b").read(1)


IMAGES = rows([b"1", b"2"])


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"img": IMAGES, "label": [0, 1]}, r"a\.parquet: no column image; there are \['img', 'label'\]"),
        ({"image": IMAGES, "fine": [0, 1]}, "no column label; there are"),
        ({"image": ["x", "y"], "label": [0, 1]}, "column image is no struct of bytes and path, but string"),
        ({"image": IMAGES, "label": [0, None]}, "1 rows have no 'label'"),
        ({"image": IMAGES, "label": [0.0, 1.0]}, "column 'label' holds double, not class numbers or names"),
        ({"image": IMAGES, "label": [[0], [1]]}, "column 'label' holds list<.*>, not class numbers or names"),
        ({"image": IMAGES, "label": [{"id": 0}, {"id": 1}]}, "column 'label' holds struct<.*>, not class numbers"),
        ({"image": IMAGES, "label": [-1, -1]}, r"labels from -1 to -1, .*\(-1 marks a split without labels\)"),
        ({"image": IMAGES, "label": [0, 1 << 40]}, "labels from 0 to 1099511627776"),
        ({"image": IMAGES, "label": [0, 0]}, "every label is 0"),
        ({"image": IMAGES[:0], "label": pyarrow.array([], "int64")}, "no column|is no struct|no rows in a.parquet"),
    ],
)
def test_columns_that_cannot_be_used(tmp_path, columns, message):
    pq.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=message):
        open_source("parquet", tmp_path, "a")


def test_no_rows(tmp_path):
    image = pyarrow.array([], pyarrow.struct({"bytes": pyarrow.binary(), "path": pyarrow.string()}))
    pq.write_table(pyarrow.table({"image": image, "label": pyarrow.array([], "int64")}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"no rows in a\.parquet"):
        open_source("parquet", tmp_path, "a")


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: b"<html>" * 9, lambda data: data[:-20], None])
def test_damaged_files(tmp_path, varied, damage):
    path = tmp_path / "a.parquet"
    if damage is None:
        path.mkdir()
    else:
        write(path, varied[:4], [0, 1, 0, 1])
        path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"a\.parquet: the Parquet file cannot be read: "):
        ParquetSource(tmp_path, ["a.parquet"])


def test_a_damaged_row_group_costs_its_rows(tmp_path, varied):
    path = tmp_path / "a.parquet"
    write(path, varied[:6], [0, 1] * 3)
    source = ParquetSource(tmp_path, ["a.parquet"])
    data = bytearray(path.read_bytes())
    data[data.index(varied[1]) + 99] ^= 1
    path.write_bytes(data)
    for i in range(3):
        with pytest.raises(OSError, match="CRC checksum verification failed"):
            source.read(i)
    assert source.read(3).tobytes() == varied[3]


def test_without_pyarrow_the_message_says_what_to_install(hub, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastdeit.data.sources.parquet", None)
    monkeypatch.delattr("fastdeit.data.sources.parquet")
    with pytest.raises(DataError, match=r"pip install fastdeit\[parquet\]"):
        open_source("parquet", hub, "train")
