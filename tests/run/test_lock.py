"""The lock of a run directory, with real processes: one owner, a dead one's place taken, nothing kept by a child."""

import errno
import fcntl
import json
import os
import signal
from contextlib import contextmanager

import pytest

from fastdeit.errors import UsageError
from fastdeit.run.lock import NAME, locked
from tests.faults.faulty import die, in_child


@contextmanager
def owner(path):
    """Another process that holds the lock of `path`; its process id."""
    held, tell = os.pipe()
    child = os.fork()
    if child == 0:
        with locked(path, print):
            os.write(tell, b".")
            signal.pause()
    os.read(held, 1)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(held)
        os.close(tell)


def test_a_second_process_is_refused_with_the_name_of_the_first(tmp_path):
    with owner(tmp_path) as pid:
        words = rf"^{tmp_path} is being trained by process {pid} on {os.uname().nodename} \(since \d{{4}}-.*; stop that"
        with pytest.raises(UsageError, match=words), locked(tmp_path, pytest.fail):
            pass
        assert json.loads((tmp_path / NAME).read_text())["pid"] == pid, "the refused has changed nothing"


def test_a_second_time_in_one_process_is_refused_too(tmp_path):
    with locked(tmp_path, pytest.fail), pytest.raises(UsageError, match=f"process {os.getpid()} "):
        locked(tmp_path, pytest.fail).__enter__()


def test_the_place_of_a_killed_process_is_taken_and_it_is_said(tmp_path):
    with owner(tmp_path) as pid:
        pass
    said = []
    with locked(tmp_path, said.append):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()
    (line,) = said
    assert f"process {pid} on {os.uname().nodename}" in line
    assert "has died while it trained here; this process takes over" in line


@pytest.mark.parametrize("since", ["1970-01-01T00:00:00", "2999-01-01T00:00:00"])
def test_the_clock_decides_nothing(tmp_path, since):
    """Whoever holds the lock holds it, and whoever is dead is dead, though the clock was moved between the two."""
    with owner(tmp_path) as pid:
        path = tmp_path / NAME
        path.write_text(json.dumps(json.loads(path.read_text()) | {"since": since}))
        moment = 0 if since < "2000" else 2**35
        os.utime(path, (moment, moment))
        with pytest.raises(UsageError, match=f"by process {pid} on .* \\(since {since}"), locked(tmp_path, pytest.fail):
            pass
    said = []
    with locked(tmp_path, said.append):
        pass
    assert "has died while it trained here" in said[0]


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt, SystemExit])
def test_it_is_given_back_however_the_block_ends(tmp_path, error):
    with pytest.raises(error) if error else locked(tmp_path / "..", print), locked(tmp_path, pytest.fail):
        if error:
            raise error
    assert not (tmp_path / NAME).exists()
    with locked(tmp_path, pytest.fail):
        pass


def test_a_child_that_outlives_its_owner_does_not_keep_the_lock(tmp_path):
    told, tell = os.pipe()

    def with_a_child():
        with locked(tmp_path, print):
            child = os.fork()
            if child == 0:
                signal.pause()
            os.write(tell, child.to_bytes(4, "little"))
            die()

    in_child(with_a_child)
    orphan = int.from_bytes(os.read(told, 4), "little")
    try:
        said = []
        with locked(tmp_path, said.append):
            assert len(said) == 1
    finally:
        os.kill(orphan, signal.SIGKILL)


def test_a_lock_that_is_given_back_between_opening_and_locking_is_taken_anew(tmp_path, monkeypatch):
    calls = []

    def flock(descriptor, operation):
        calls.append(descriptor)
        if len(calls) == 1:
            (tmp_path / NAME).unlink()  # as the owner does that has just ended
        return original(descriptor, operation)

    original = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path, pytest.fail):
        assert (tmp_path / NAME).exists()
        monkeypatch.setattr(fcntl, "flock", original)
        with pytest.raises(UsageError):
            locked(tmp_path, print).__enter__()
    assert len(calls) == 2


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def flock(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    said = []
    with locked(tmp_path, said.append), locked(tmp_path, said.append):
        pass
    assert "has no locks (No locks available), so nobody else may train here" in said[0]
    assert f"process {os.getpid()} on" in said[1]
    assert "may be training here" in said[1]
