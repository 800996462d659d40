"""What errors of reading do, by kind of reader: what passes is tried again, what the machine lacks stops with no file
called bad, the rest is the file's. Errors are made where the program asks the system."""

import errno
import os
import tarfile

import numpy as np
import pytest

from fastdeit.cli import exit_code
from fastdeit.data.execute.route import Encoded, file_of
from fastdeit.data.loader import EvalLoader, TrainLoader
from fastdeit.data.plan import plan
from fastdeit.data.sources import faults
from fastdeit.data.sources.datasets import open_source
from fastdeit.data.sources.packed import pack
from fastdeit.data.sources.source import DataError, MachineError, contents
from tests.data.test_sources_bad import KINDS, make

PASSING = [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ECONNRESET, "piece", "short"]
LACKING = {
    errno.EMFILE: "ulimit -n",
    errno.ENFILE: "too many files open",
    errno.ENOMEM: "no memory left",
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "quota",
}
NEVER_BETTER = [errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ENOTCONN]
OF_FILE = [errno.ENOENT, errno.EACCES, errno.EISDIR, errno.ELOOP, errno.EIO, "short"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory, encode, make_image):
    """A source of each kind with the same four images, of which nothing was read yet."""
    files = {name: encode(make_image(seed, 20, 16)) for seed, name in enumerate(("a.jpg", "b.jpg"))}
    return {kind: make(kind, tmp_path_factory.mktemp(kind), files) for kind in KINDS}


@pytest.fixture
def waits(monkeypatch):
    """The seconds that were waited, none of them in truth."""
    waited = []
    monkeypatch.setattr(faults.time, "sleep", waited.append)
    monkeypatch.setattr(faults, "_told", {})
    return waited


@pytest.fixture
def failing(monkeypatch, waits):
    """`failing(what, times, after)`: so many reads, after some others, fail with this error number, or bring a piece
    ("piece"), or a half and no more when they are asked for the rest ("short")."""
    truth = os.pread

    def fail(what, times, after=0):
        left, cut, passed = [times], [], [after]

        def pread(handle, size, offset):
            if cut:  # what comes after a first half: nothing
                cut.clear()
                return b""
            if not left[0] or passed[0] > 0:
                passed[0] -= 1
                return truth(handle, size, offset)
            left[0] -= 1
            if what == "piece":
                return truth(handle, max(size // 400, 1), offset)
            if what == "short":
                cut.append(True)
                return truth(handle, size // 2, offset)
            raise OSError(what, os.strerror(what))

        monkeypatch.setattr(os, "pread", pread)

    return fail


def fresh(source):
    if hasattr(source, "_cache"):  # a row group that was read before is not read again
        source._cache.clear()
    return source


@pytest.mark.parametrize("what", PASSING)
@pytest.mark.parametrize("kind", KINDS)
def test_what_passes_changes_nothing(sources, failing, waits, kind, what):
    source = fresh(sources[kind])
    expected = file_of(source, 1)
    fresh(source)
    failing(what, 2)
    again = file_of(source, 1)
    assert (again.data.tobytes(), again.route) == (expected.data.tobytes(), expected.route)
    assert waits[:1] == ([] if what == "piece" else [0.1])


@pytest.mark.parametrize("what", LACKING)
@pytest.mark.parametrize("kind", KINDS)
def test_what_the_machine_lacks_stops_and_blames_no_file(sources, failing, waits, kind, what):
    source = fresh(sources[kind])
    failing(what, 1)
    with pytest.raises(MachineError, match=f"{os.strerror(what)}: .*{LACKING[what]}.*; no file is at fault") as info:
        file_of(source, 1)
    assert str(info.value).startswith(source.path(1))
    assert waits == []
    assert isinstance(file_of(source, 1), Encoded)


@pytest.mark.parametrize("what", NEVER_BETTER)
@pytest.mark.parametrize("kind", KINDS)
def test_a_storage_that_stays_away_stops_after_its_tries(sources, failing, waits, capsys, kind, what):
    failing(what, 1000)
    with pytest.raises(MachineError, match="the storage does not answer"):
        file_of(fresh(sources[kind]), 1)
    assert sum(waits) > 20
    assert "trying again in 8 s" in capsys.readouterr().err


@pytest.mark.parametrize(("rank", "told"), [(None, [8, 16]), ("0", [8, 16]), ("3", [16])])
def test_threads_that_wait_for_a_storage_tell_it_once_and_other_processes_before_the_last_try(
    sources, failing, capsys, monkeypatch, rank, told
):
    """RANK stands for processes of a launcher, without which LOCAL_RANK is left over."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("LOCAL_RANK", rank or "3")
    if rank:
        monkeypatch.setenv("RANK", "11")
    failing(errno.ETIMEDOUT, 1000)
    for _ in range(3):
        with pytest.raises(MachineError):
            file_of(fresh(sources["folder"]), 1)
    lines = capsys.readouterr().err.splitlines()
    assert [line.rpartition("trying again in ")[2] for line in lines] == [f"{wait} s" for wait in told]


@pytest.mark.parametrize("what", OF_FILE)
@pytest.mark.parametrize("kind", KINDS)
def test_the_rest_is_the_file_s(sources, failing, kind, what):
    failing(what, 1000)
    reason = file_of(fresh(sources[kind]), 1)
    assert reason.startswith("the file cannot be read: ")
    assert ("though the file goes on" if what == "short" else os.strerror(what)) in reason


def test_memory_that_is_used_up_is_the_machine_s(sources, monkeypatch):
    def read(index):
        raise MemoryError

    monkeypatch.setattr(sources["folder"], "read", read)
    with pytest.raises(MachineError, match=r"0/b\.jpg cannot be read: MemoryError: this machine has no memory left"):
        file_of(sources["folder"], 1)


def test_a_list_of_labels_is_read_again_too(tmp_path, waits, monkeypatch):
    (tmp_path / "labels.txt").write_text("0")
    errors, truth = [OSError(errno.EIO, "x"), OSError(errno.EMFILE, "many")], type(tmp_path).read_bytes
    monkeypatch.setattr(type(tmp_path), "read_bytes", lambda path: _raised(errors) or truth(path))
    with pytest.raises(MachineError, match="ulimit"):
        contents(tmp_path / "labels.txt")
    assert len(waits) == 1
    assert contents(tmp_path / "labels.txt") == b"0"


def _raised(errors):
    if errors:
        raise errors.pop(0)


# ---- lists of samples, which are kept --------------------------------------------------------------------------------


@pytest.fixture
def listing_fails(monkeypatch, waits):
    """`listing_fails(error)`: the next opening of a shard by the reader of such files raises it."""

    def fail(*errors):
        left = list(errors)
        opened, tar_opened = os.open, tarfile.open

        def os_open(path, *options, **others):
            if str(path).endswith(".tfrecord"):
                _raised(left)
            return opened(path, *options, **others)

        monkeypatch.setattr(os, "open", os_open)
        monkeypatch.setattr(
            tarfile,
            "open",
            lambda *args, **others: ("r:" in others.values() and _raised(left)) or tar_opened(*args, **others),
        )

    return fail


@pytest.mark.parametrize("kind", ["tar", "tfrecord"])
def test_a_hiccup_leaves_no_shard_out_of_the_list(tmp_path, encode, make_image, listing_fails, kind):
    files = {"a.jpg": encode(make_image(0, 20, 16))}
    listing_fails(OSError(errno.EIO, "x"), OSError(errno.ESTALE, "y"))
    source = make(kind, tmp_path, files)
    assert (len(source), list(source.skipped)) == (2, [])


@pytest.mark.parametrize("what", [errno.EMFILE, errno.ENOMEM])
@pytest.mark.parametrize("kind", ["tar", "tfrecord"])
def test_a_list_made_while_the_machine_lacks_something_is_not_kept(
    tmp_path, encode, make_image, listing_fails, kind, what
):
    files = {"a.jpg": encode(make_image(0, 20, 16))}
    listing_fails(OSError(what, os.strerror(what)))
    with pytest.raises(MachineError, match=LACKING[what]):
        make(kind, tmp_path, files)
    kept = [path for path in tmp_path.iterdir() if path.name.startswith(".fastdeit-")]
    assert all(path.stat().st_size == 0 for path in kept)  # the lock alone
    source = make(kind, tmp_path, files)
    assert (len(source), list(source.skipped)) == (2, [])


@pytest.mark.parametrize("what", [errno.EMFILE, errno.EIO])
@pytest.mark.parametrize("kind", ["packed", "tfrecord", "arrow", "parquet"])
def test_a_set_is_opened_whole_or_not_at_all(tmp_path, encode, make_image, failing, kind, what):
    """Whichever read it is from which on all fail."""
    make(kind, tmp_path, {"a.jpg": encode(make_image(0, 20, 16))})
    (file,) = (path.name for path in tmp_path.glob("a.*"))
    outcomes = []
    for after in range(30):
        for kept in tmp_path.glob(".fastdeit-*"):
            kept.unlink()
        failing(what, 1000, after)
        try:
            outcomes.append(len(open_source(kind, tmp_path, file)))
        except DataError as error:
            outcomes.append(type(error))
    assert set(outcomes) == {2, MachineError if what == errno.EMFILE else DataError}


@pytest.mark.parametrize("kind", ["packed", "tfrecord", "arrow", "parquet"])
def test_a_piece_of_a_read_leaves_nothing_out(tmp_path, encode, make_image, failing, kind):
    make(kind, tmp_path, {"a.jpg": encode(make_image(0, 20, 16))})
    (file,) = (path.name for path in tmp_path.glob("a.*"))
    for after in range(9):
        for kept in tmp_path.glob(".fastdeit-*"):
            kept.unlink()
        failing("piece", 1, after)
        assert (len(open_source(kind, tmp_path, file)), file) == (2, file)


def test_packing_blames_no_file_for_what_the_machine_lacks(sources, failing, tmp_path):
    failing(errno.EMFILE, 1)
    with pytest.raises(MachineError, match=r"0/a\.jpg cannot be read: Too many open files"):
        pack(sources["folder"], tmp_path / "a.pack")
    assert list(tmp_path.iterdir()) == []


def test_the_machine_s_fault_is_a_failure_and_not_a_wrong_command():
    assert exit_code(MachineError("x")) == 1
    assert exit_code(DataError("x")) == 2


# ---- the stream ------------------------------------------------------------------------------------------------------


def batches(source):
    views, mixing = [plan.Augment(size=(16, 16))], plan.Mixing(group_size=4, mixup=0.0, cutmix=0.0)
    loader = TrainLoader(source, views, mixing, seed=3, batch_size=4, threads=1)
    return [batch for step in loader.batches(0, 2) for batch in step], loader.bad


def test_a_piece_of_a_read_does_not_change_the_batch(sources, failing):
    whole, _ = batches(sources["folder"])
    failing("piece", 4)
    got, bad = batches(sources["folder"])
    assert all(np.array_equal(a.images[0], b.images[0]) for a, b in zip(got, whole, strict=True))
    assert bad.count == 0


@pytest.mark.parametrize("make_batches", [batches, lambda source: list(EvalLoader(source, (8, 8), 1.0).batches())])
def test_a_process_without_handles_stops_its_loader(sources, failing, make_batches):
    failing(errno.EMFILE, 1000)
    with pytest.raises(MachineError, match="may not open more files"):
        make_batches(sources["folder"])
