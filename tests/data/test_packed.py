"""One file for a whole data set: the same samples as the original, and damage is named."""

import os
import threading

import numpy as np
import pytest

from fastdeit.data.plan import order
from fastdeit.data.sources import packed
from fastdeit.data.sources.folder import FolderSource
from fastdeit.data.sources.index import Strings, seal, unseal
from fastdeit.data.sources.packed import PackedSource, pack
from fastdeit.data.sources.source import BadImage, DataError
from fastdeit.data.sources.synthetic import SyntheticSource
from fastdeit.text import one_line
from fastdeit.verbs.normalise import Normalised


@pytest.fixture
def folder(tmp_path, varied):
    for i, data in enumerate([*varied[:6], b""]):
        path = tmp_path / "images" / "aé"[i % 2] / f"{i}\udcff.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return FolderSource(tmp_path / "images")


@pytest.fixture
def out(tmp_path):
    return tmp_path / "train.pack"


def test_a_pack_is_its_source(folder, out):
    pack(folder, out)
    ours = PackedSource(out)
    assert len(ours) == len(folder) == 7
    assert (ours.classes, ours.fingerprint) == (folder.classes, folder.fingerprint)
    for i in range(len(folder)):
        assert ours.read(i).tobytes() == folder.read(i).tobytes()
        assert (ours.label(i), ours.name(i)) == (folder.label(i), folder.name(i))
        assert ours.path(i) == f"{out}:{folder.name(i)}"


def test_packing_a_pack_gives_the_same_file(folder, out, tmp_path):
    pack(folder, out)
    pack(PackedSource(out), tmp_path / "again.pack")
    assert (tmp_path / "again.pack").read_bytes() == out.read_bytes()


@pytest.mark.parametrize("wrapped", [lambda source: source, Normalised])
def test_annotations_are_not_left_behind(folder, out, wrapped):
    folder.annotations = lambda index: {"boxes": np.zeros((1, 4))}
    with pytest.raises(DataError, match=r"the data set has annotations \(boxes\), .*; train on the data set as it is"):
        pack(wrapped(folder), out)
    assert not out.exists()


def test_progress_counts_the_samples(folder, out):
    seen = []
    pack(folder, out, lambda *counts: seen.append(counts))
    assert seen == [(done, 7) for done in range(1, 8)]


class Paired(SyntheticSource):
    """Eight samples, of which the first of two is there when the second is being read."""

    def __init__(self):
        super().__init__(8, 2, (8, 8))
        self.second = [threading.Event() for _ in range(4)]

    def read(self, index):
        if index % 2:
            self.second[index // 2].set()
        else:
            assert self.second[index // 2].wait(60)
        return super().read(index)

    def written(self, done, total):
        assert done > 1 or not self.second[3].wait(0.1), "the last one is read before the second is written"


def test_threads_read_a_few_ahead_and_the_file_is_in_order(out, tmp_path):
    source = Paired()
    pack(source, out, source.written, threads=2)
    pack(SyntheticSource(8, 2, (8, 8)), tmp_path / "alone.pack")
    assert out.read_bytes() == (tmp_path / "alone.pack").read_bytes()


@pytest.mark.parametrize("threads", [1, 3])
def test_an_unreadable_sample_is_named_and_leaves_no_file(folder, out, threads):
    os.unlink(folder.path(3))
    with pytest.raises(DataError, match=r"cannot be read: .*No such file.*; repair or delete it") as info:
        pack(folder, out)
    assert one_line(folder.path(3)) in str(info.value), "the name is no UTF-8"
    assert os.listdir(out.parent) == ["images"]


def test_a_failed_pack_leaves_the_old_one(folder, out):
    pack(folder, out)
    before = out.read_bytes()

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(SyntheticSource(5, 2, (8, 8)), out, stop)
    assert out.read_bytes() == before
    assert sorted(os.listdir(out.parent)) == ["images", "train.pack"]


def test_a_place_that_cannot_be_written_is_named(folder, tmp_path):
    with pytest.raises(
        DataError, match=r"nowhere/x\.pack: the packed file cannot be written: No such file or directory"
    ):
        pack(folder, tmp_path / "nowhere" / "x.pack")


def test_every_changed_byte_is_found(folder, out):
    """Of the marks, the index and the footer when the file is opened, of a sample when that sample is read."""
    pack(folder, out)
    sound, source = out.read_bytes(), PackedSource(out)
    starts = source._offset
    index_at = int(starts[-1])
    end = len(sound)
    for at in [*range(16), *range(index_at, end - 32, 40), *range(end - 32, end)]:
        out.write_bytes(sound[:at] + bytes([sound[at] ^ 0x90]) + sound[at + 1 :])
        with pytest.raises(DataError, match=r"train\.pack: .*(pack|copy)"):
            PackedSource(out)
    for i in np.flatnonzero(np.diff(starts)).tolist():
        at = int(starts[i] + starts[i + 1]) // 2
        out.write_bytes(sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :])
        damaged = PackedSource(out)
        with pytest.raises(BadImage, match="checksum"):
            damaged.read(i)
        others = [j for j in range(7) if j != i]
        assert all(np.array_equal(damaged.read(j), folder.read(j)) for j in others)


@pytest.mark.parametrize("keep", [0, 7, 13, 16, 40, 0.3, 0.9, -1, -17, -32])
def test_a_file_cut_short_is_refused(folder, out, keep):
    pack(folder, out)
    sound = out.read_bytes()
    out.write_bytes(sound[: int(keep * len(sound)) if isinstance(keep, float) else keep])
    with pytest.raises(DataError, match=r"train\.pack: (not a packed data set|the packed file is cut short)"):
        PackedSource(out)


def test_a_file_cut_while_in_use_costs_samples_not_the_process(folder, out):
    pack(folder, out)
    source = PackedSource(out)
    os.truncate(out, int(source._offset[4]) + 5)
    assert np.array_equal(source.read(3), folder.read(3))
    with pytest.raises(BadImage, match="changed"):
        source.read(4)
    out.unlink()
    with pytest.raises(OSError, match="No such file"):
        source.read(0)


def test_another_format_version_is_told_apart_from_damage(folder, out, monkeypatch):
    monkeypatch.setattr(packed, "VERSION", 7)
    pack(folder, out)
    monkeypatch.undo()
    with pytest.raises(DataError, match="packed in format 7, but this release reads 1"):
        PackedSource(out)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.mkdir(), "Is a directory"),
        (lambda path: path.write_text("<!DOCTYPE html>"), "not a packed data set: it starts with b'<!DOCTYPE html>'"),
        (lambda path: path.write_bytes(bytes(1000)), "not a packed data set"),
    ],
)
def test_what_is_no_pack_is_one_sentence(out, make, message):
    make(out)
    with pytest.raises(DataError, match=message):
        PackedSource(out)


def test_a_long_index_is_small_and_needs_no_replay():
    """A tenth of ImageNet's names in one block of bytes: no Python object for each. A step is found without those
    before it."""
    n = 128_117
    names = Strings.of(f"n{i // 1282:08d}/n{i // 1282:08d}_{i:07d}.JPEG" for i in range(n))
    label = np.arange(n) // 1282
    index = unseal(seal({"names": np.frombuffer(names.blob, np.uint8), "label": label}))
    again = Strings(index["names"].tobytes())
    assert len(again) == n
    assert again[n - 1] == names[n - 1] == "n00000099/n00000099_0128116.JPEG"
    assert len(again.blob) + again._ends.nbytes + label.nbytes < 7e6
    assert order.epoch(0, 299, n, 1024, 3).sample.max() < n


def test_strings_keep_any_name():
    names = ["a", "é/\udcff\n", " ", "x" * 300]
    strings = Strings.of(names)
    assert list(strings) == names
    assert len(Strings.of([])) == 0
    with pytest.raises(IndexError):
        strings[4]
