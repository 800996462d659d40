"""Files of a few bytes that would take gigabytes to read, or that no parser can follow: refused with a sentence.

Sizes are real where a file may have a hole, and limits are lowered where it would have to be written.
"""

import gzip
import io
import json
import math
import os
import struct
import subprocess
import sys
import tarfile
import zipfile
from functools import cache
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdeit import jsons
from fastdeit.data.execute import pillow, route
from fastdeit.data.logits import Cache
from fastdeit.data.sources import imagenet_kit, packed
from fastdeit.data.sources.folder import FolderSource
from fastdeit.data.sources.index import seal, unseal
from fastdeit.data.sources.source import BadImage, DataError, contents
from fastdeit.data.sources.tar import TarSource
from fastdeit.engine import metrics
from fastdeit.errors import UsageError
from fastdeit.estimate import rows as measured
from fastdeit.experiments import rows as trained
from fastdeit.run import environment, hub, lock, overview
from tests.faults import decoding_memory
from tests.faults.decoding_memory import SAVED, SIDE, peak_of, saved

GIB = 1 << 30


@pytest.fixture
def table(tmp_path):
    """`table(image, label)` writes a Parquet file of these columns and returns a function that opens it."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet as pq

    from fastdeit.data.sources.parquet import ParquetSource

    def write(image, label):
        columns = {"image": image, "label": label}
        options = {"compression": "zstd", "dictionary_pagesize_limit": GIB, "store_schema": False}
        pq.write_table(pyarrow.table(columns), tmp_path / "a.parquet", **options)
        return lambda: ParquetSource(tmp_path, ["a.parquet"])

    return write


def repeated(values, count):
    pyarrow = pytest.importorskip("pyarrow")
    return pyarrow.DictionaryArray.from_arrays(np.arange(count, dtype=np.int32) % len(values), values)


def test_an_image_that_a_row_group_has_once_is_in_memory_once(table):
    pyarrow = pytest.importorskip("pyarrow")
    image = np.random.default_rng(0).bytes(1 << 20)
    source = table(repeated([image], 200), np.arange(200) % 2)()
    before = pyarrow.total_allocated_bytes()
    assert source.read(150).tobytes() == image
    assert pyarrow.total_allocated_bytes() - before < 4 << 20


def test_rows_without_end_are_not_listed(table):
    pyarrow = pytest.importorskip("pyarrow")
    opened = table(pyarrow.nulls(1_000_000, pyarrow.binary()), np.zeros(1_000_000, np.int64))
    with pytest.raises(
        DataError, match=r"a\.parquet: 1,000,000 rows in .* bytes, so most of them hold no image; write"
    ):
        opened()


def test_a_row_group_that_is_too_large_is_refused_by_its_metadata(table, monkeypatch):
    opened = table([bytes(1 << 20), b"x"], [0, 1])
    monkeypatch.setattr("fastdeit.data.sources.parquet._MAX_GROUP", 1 << 20)
    with pytest.raises(DataError, match=r"a\.parquet: column 'image' of row group 0 has .* smaller row groups"):
        opened()


def test_a_row_group_that_is_as_large_as_its_file_is_read(table, monkeypatch):
    """As pandas writes it: all images in one group, which no compression makes smaller."""
    image = np.random.default_rng(0).bytes(1 << 20)
    opened = table([image, image[::-1]], [0, 1])
    monkeypatch.setattr("fastdeit.data.sources.parquet._MAX_GROUP", 1 << 20)
    monkeypatch.setattr("fastdeit.data.sources.parquet._MAX_DICTIONARY", 1 << 19)
    assert opened().read(1).tobytes() == image[::-1]


def test_a_row_group_that_is_too_large_is_refused_while_it_is_read(table, monkeypatch):
    """One image in many rows again, where the image is so large that Arrow could not have it in a dictionary."""
    opened = table(repeated([bytes(1 << 20)], 8), np.arange(8) % 2)
    monkeypatch.setattr("fastdeit.data.sources.parquet._MAX_DICTIONARY", 1 << 19)
    assert opened().read(7).tobytes() == bytes(1 << 20)
    monkeypatch.setattr("fastdeit.data.sources.parquet._MAX_GROUP", 6 << 20)
    with pytest.raises(BadImage, match="its row group has more than 6,291,456 bytes of images"):
        opened().read(7)


@pytest.mark.parametrize("rows", [8, 200], ids=["pages", "names"])
def test_labels_that_are_too_long_are_refused(table, monkeypatch, rows):
    names = ["a" * (1 << 12), "b" * (1 << 12)]
    opened = table([np.random.default_rng(0).bytes(1 << 10)] * rows, repeated(names, rows))
    assert opened().classes == names
    monkeypatch.setattr("fastdeit.data.sources.parquet._MAX_LABELS", 1 << (12 if rows == 8 else 19))
    with pytest.raises(DataError, match=r"a\.parquet: column 'label' has .* bytes, more than labels can have .*NAME"):
        opened()


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK])
def test_a_tar_header_of_gigabytes_is_not_read(tmp_path, kind):
    with open(tmp_path / "a.tar", "wb") as file:
        for name, data in (("0.png", b"x"), ("0.cls", b"0"), ("1.png", b"x"), ("1.cls", b"1")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.write(info.tobuf() + data.ljust(512, b"\0"))
        info = tarfile.TarInfo("x")
        info.type, info.size = kind, 4 * GIB
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.truncate(5 * GIB)
    with pytest.warns(UserWarning, match=r"a\.tar: .*a header at byte 4096 has 4,294,967,296 bytes"):
        assert len(TarSource(tmp_path, ["a.tar"])) == 2


def test_an_image_of_gigabytes_is_not_read(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(b"x")
    os.truncate(tmp_path / "a" / "0.png", 1 << 40)
    source = FolderSource(tmp_path)
    with pytest.raises(BadImage, match="it has 1,099,511,627,776 bytes; no image has more than"):
        source.read(0)
    assert source.read(1).tobytes() == b"x"


def test_a_list_of_gigabytes_is_not_read(tmp_path):
    (tmp_path / "train.csv").touch()
    os.truncate(tmp_path / "train.csv", 1 << 40)
    with pytest.raises(DataError, match=r"train\.csv: has 1,099,511,627,776 bytes, and no list of images"):
        contents(tmp_path / "train.csv")


def test_a_kit_that_unpacks_to_gigabytes_is_not_unpacked(tmp_path):
    info = tarfile.TarInfo(f"{imagenet_kit.DEVKIT}/readme.txt")
    info.size = 8 * GIB
    (tmp_path / imagenet_kit.KIT_ARCHIVE).write_bytes(gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 20)))
    with pytest.raises(DataError, match=r"it unpacks to more than 67,108,864 bytes; download it anew"):
        imagenet_kit.truth(tmp_path)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_picture_of_a_few_bytes_and_most_pixels_takes_less_than_a_gibibyte():
    """A GIF with a canvas of as many pixels as are decoded: 144 bytes."""
    out, side = io.BytesIO(), math.isqrt(route.MAX_PIXELS)
    Image.new("L", (64, 64)).save(out, "GIF")
    data = bytearray(out.getvalue())
    data[6:10] = struct.pack("<HH", side, side)
    encoded = route.routed(np.frombuffer(data, np.uint8))
    assert (encoded.route.width, encoded.route.height) == (side, side)
    assert peak_of(lambda: pillow.pixels(encoded)) < GIB


@cache
def peaks():
    """{format: (bytes that decoding a picture takes at its peak, bytes of the file)}"""
    done = subprocess.run([sys.executable, "-m", decoding_memory.__name__], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", SAVED)
def test_decoding_a_picture_takes_no_more_memory_than_its_limit_counts(name, monkeypatch):
    """With a limit that the picture just keeps, and with one that it breaks by a pixel."""
    (peak, size), data = peaks()[name], saved(name, SIDE)
    limit = SIDE**2 * route._BYTES.get(name, route._BYTES_OF_OTHERS)
    assert peak <= limit + size
    monkeypatch.setattr(route, "MAX_MEMORY", limit)
    route.routed(data)
    monkeypatch.setattr(route, "MAX_MEMORY", limit - 1)
    with pytest.raises(
        BadImage, match=rf"1024 x 1024 pixels, which would take more than .* GiB .*: of {name}, \d+ are"
    ):
        route.routed(data)


def test_the_page_says_how_large_a_picture_may_be():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    for pixels in (route.MAX_PIXELS, *(route.MAX_MEMORY // needed for needed in route._BYTES.values())):
        assert f"{pixels:,} " in page


def archive(save, **arrays):
    out = io.BytesIO()
    save(out, **arrays)
    return out.getvalue()


def with_shape(count):
    """An archive of an array of 4 numbers that says it has `count`."""
    out, head = io.BytesIO(), f"{{'descr': '<f8', 'fortran_order': False, 'shape': ({count},), }}".ljust(117) + "\n"
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("offset.npy", b"\x93NUMPY\1\0" + len(head).to_bytes(2, "little") + head.encode() + bytes(32))
    return out.getvalue()


SEALED = {
    "deflated": archive(np.savez_compressed, offset=np.zeros(1 << 20)),
    "a shape of terabytes": with_shape("9000000000000"),
    "a shape that overflows": with_shape("9000000000000000000"),
    "objects": archive(np.savez, offset=np.array([object], object)),
    "no archive": b"PK\3\4 and nothing",
    "nothing": b"",
}


def test_a_pack_with_a_right_seal_and_half_an_index_is_refused(tmp_path):
    sealed, mark = seal({"offset": np.zeros(1)}), packed._MARK.pack(packed._MAGIC, packed.VERSION)
    (tmp_path / "a.pack").write_bytes(mark + sealed + packed._FOOTER.pack(len(mark), len(sealed), mark))
    with pytest.raises(
        DataError, match=r"a\.pack: the index of the packed file is damaged: it has no classes and no crc"
    ):
        packed.PackedSource(tmp_path / "a.pack")


@pytest.mark.parametrize("name", SEALED)
def test_an_index_with_a_right_seal_and_a_wrong_inside_is_refused(name):
    data = SEALED[name]
    with pytest.raises(ValueError, match=r"."):
        unseal(blake2b(data, digest_size=16).digest() + data)


JSON = {
    "deep": lambda path: path.write_bytes(b"[" * 100_000),
    "deep object": lambda path: path.write_bytes(b'{"a":' * 100_000),
    "huge": lambda path: (path.touch(), os.truncate(path, 1 << 40)),
}


@pytest.mark.parametrize("name", JSON)
def test_json_that_cannot_be_followed_is_what_is_damaged(tmp_path, name):
    """Every file of a run, a cache and a folder of weights that is JSON as a whole."""
    for file in ("any.json", "summary.json", "environment.json", "cache.json", "config.json", lock.NAME):
        JSON[name](tmp_path / file)
    (tmp_path / "recipe.yaml").write_text("name: mine\n")
    with pytest.raises(ValueError, match=r"it is nested too deep|it has more than 16 MiB"):
        jsons.read(tmp_path / "any.json")
    assert environment.read(tmp_path / "environment.json") is None
    assert overview.read(tmp_path).summary == {}
    assert lock._read(tmp_path / lock.NAME) is None
    with pytest.raises(DataError, match=r"cache\.json is damaged"):
        Cache.open(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json is damaged"):
        hub.described(tmp_path / "model.safetensors")


def test_lines_of_json_that_cannot_be_followed_are_damaged_lines(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + b"[" * 100_000 + b'\n{"step": 2}\n')
    assert [record["step"] for record in metrics.read(path)] == [1, 2]
    assert "metrics.jsonl:2 is not a metrics record; skipped" in caplog.text
    with pytest.raises(UsageError, match=r"metrics\.jsonl:2 is no JSON: it is nested too deep"):
        list(measured.lines(path))
    with pytest.raises(UsageError, match=r"metrics\.jsonl is no file of rows of an experiment \(it is nested too deep"):
        trained.read(path)


def test_a_recipe_of_a_run_that_cannot_be_followed_is_left_empty(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "recipe.yaml").write_text("[" * 600)
    assert overview.read(tmp_path).recipe == {}
    os.truncate(tmp_path / "recipe.yaml", 1 << 40)
    assert overview.read(tmp_path).recipe == {}
