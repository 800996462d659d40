"""Of those that want a list at the same time one makes it, whatever becomes of it, and nobody waits without need."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np
import pytest

from fastdeit.data.sources import shards
from fastdeit.data.sources.shards import cached

ROOT = Path(__file__).parents[2]
STARTER = """
import os, sys, time
from pathlib import Path
import numpy as np
from fastdeit.data.sources.shards import cached

root, marks, count = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])

def build():
    (marks / f"builds-{os.getpid()}").touch()
    while len(list(marks.glob("starts-*"))) < count:
        time.sleep(0.01)
    time.sleep(0.5)  # for the others to come as far as this, if they can
    return {"found": np.arange(3)}

(marks / f"starts-{os.getpid()}").touch()
print(cached(root, ["a"], "test", "key", build)["found"])
"""


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTDEIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("RANK", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def root(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a").write_bytes(b"samples")
    return tmp_path / "data"


@pytest.fixture
def marks(tmp_path):
    (tmp_path / "marks").mkdir()
    return tmp_path / "marks"


def block(root):
    """What is at the place of the list beside the files cannot be written, as nothing can in a read-only folder."""
    (root / ".fastdeit-test-key" / "in the way").mkdir(parents=True)


def start(root, marks, count):
    command = [sys.executable, "-c", STARTER, root, marks, str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(condition):
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.01)
    raise TimeoutError


def builds(marks):
    return len(list(marks.glob("builds-*")))


@pytest.mark.parametrize("writable", [True, False])
def test_of_several_processes_one_lists_and_the_others_take_its_list(root, marks, cache, writable):
    if not writable:
        block(root)
    processes = [start(root, marks, 4) for _ in range(4)]
    assert [process.communicate() for process in processes] == [("[0 1 2]\n", "")] * 4
    assert builds(marks) == 1
    assert len(list(root.iterdir())) == 2
    assert cache.exists() != writable


def test_a_killed_lister_holds_nobody_up(root, marks):
    first = start(root, marks, 2)
    until(lambda: builds(marks) == 1)
    second = start(root, marks, 3)
    until(lambda: waits_for_a_lock(second.pid))
    assert builds(marks) == 1
    first.kill()
    first.communicate()
    until(lambda: builds(marks) == 2)
    (marks / "starts-3").touch()
    assert second.communicate() == ("[0 1 2]\n", "")
    assert first.returncode == -signal.SIGKILL


def waits_for_a_lock(pid):
    """By the kernel's table of locks, in which `->` stands before one that is waited for."""
    return any("->" in line and str(pid) in line.split() for line in open("/proc/locks"))


def in_threads(*functions):
    """Results of functions that run at the same time."""
    results = [None] * len(functions)

    def run(number, function):
        results[number] = function()

    threads = [threading.Thread(target=run, args=each, daemon=True) for each in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert not any(thread.is_alive() for thread in threads)
    return results


def test_threads_of_a_process_wait_for_each_other(root):
    together, built = threading.Barrier(4), []

    def build():
        built.append(threading.get_ident())
        time.sleep(0.5)
        return {"found": np.arange(3)}

    def thread():
        together.wait()
        return cached(root, ["a"], "test", "key", build)["found"].tolist()

    assert in_threads(*[thread] * 4) == [[0, 1, 2]] * 4
    assert len(built) == 1


@pytest.mark.parametrize("writable", [True, False])
def test_lists_of_different_data_do_not_wait_for_each_other(tmp_path, writable):
    """Nor do two lists of the same folder; each is made only while the others are."""
    together = threading.Barrier(3, timeout=20)

    def build():
        together.wait()
        return {"found": np.arange(3)}

    def of(name, key):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "a").touch()
        if not writable:
            (tmp_path / name / f".fastdeit-test-{key}" / "in the way").mkdir(parents=True)
        return lambda: len(cached(tmp_path / name, ["a"], "test", key, build))

    assert in_threads(of("one", "key"), of("other", "key"), of("other", "other")) == [2, 2, 2]


@pytest.fixture
def build():
    def build():
        build.count += 1
        return {"found": np.arange(3)}

    build.count = 0
    return build


def test_a_list_left_empty_by_a_killed_lister_is_made_anew(root, build):
    (root / ".fastdeit-test-key").touch()
    for _ in range(2):
        assert cached(root, ["a"], "test", "key", build)["found"].tolist() == [0, 1, 2]
    assert build.count == 1


@pytest.mark.parametrize("error", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_in_a_folder_that_cannot_be_written_the_cache_is_locked(root, cache, build, monkeypatch, error):
    refuse(monkeypatch, root, error)
    locked = locks(monkeypatch)
    assert cached(root, ["a"], "test", "key", build)["found"].tolist() == [0, 1, 2]
    assert list(cache.iterdir()) == [Path(path) for path in locked]
    assert cached(root, ["a"], "test", "key", build)["found"].tolist() == [0, 1, 2]
    assert (build.count, len(locked)) == (1, 1)


def refuse(monkeypatch, folder, error):
    """Nothing can be opened to write in `folder`."""
    real = os.open

    def refusing(path, flags, *args, **kwargs):
        if flags & os.O_ACCMODE != os.O_RDONLY and Path(path).is_relative_to(folder):
            raise OSError(error, os.strerror(error))
        return real(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refusing)


def locks(monkeypatch, refused=()):
    """Paths of files as they are locked; ENOLCK for those in the folder `refused`."""
    locked, real = [], fcntl.flock

    def flock(handle, operation):
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        if path.parent in refused:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
        locked.append(str(path))
        real(handle, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    return locked


def test_where_the_folder_has_no_locks_the_cache_is_locked(root, cache, build, monkeypatch):
    """The list is beside the files all the same."""
    locked = locks(monkeypatch, [root])
    cached(root, ["a"], "test", "key", build)
    assert [Path(path).parent for path in locked] == [cache]
    assert (root / ".fastdeit-test-key").stat().st_size > 0


def test_without_any_locks_everybody_lists(root, cache, monkeypatch):
    """Neither waits for the other."""
    locks(monkeypatch, [root, cache])
    together = threading.Barrier(2, timeout=20)

    def build():
        together.wait()
        return {"found": np.arange(3)}

    assert in_threads(*[lambda: len(cached(root, ["a"], "test", "key", build))] * 2) == [2, 2]


def test_without_any_locks_a_long_listing_says_that_too(root, cache, monkeypatch, said):
    locks(monkeypatch, [root, cache])

    def build():
        until(lambda: said().endswith("\n"))
        return {"found": np.arange(3)}

    cached(root, ["a"], "test", "key", build)
    why = "as does every process, since no file can be locked"
    assert said() == f"{root}: listing the samples of 1 test file, {why}; later starts read the list\n"


def test_where_nothing_can_be_kept_everybody_lists(root, build, monkeypatch):
    block(root)
    monkeypatch.setenv("FASTDEIT_CACHE", "/dev/null/cache")
    for count in (1, 2):
        message = (
            r"data: the list of samples cannot be kept \(/dev/null/cache: Not a directory\), .* set FASTDEIT_CACHE"
        )
        with pytest.warns(UserWarning, match=message):
            assert cached(root, ["a"], "test", "key", build)["found"].tolist() == [0, 1, 2]
        assert build.count == count
    monkeypatch.setenv("RANK", "9")
    monkeypatch.setenv("LOCAL_RANK", "1")
    with warnings.catch_warnings(action="error"):
        cached(root, ["a"], "test", "key", build)


@pytest.fixture
def said(monkeypatch, capsys):
    """said() -> what stderr got so far; everything is said at once."""
    monkeypatch.setattr(shards, "_PATIENCE_S", 0)
    parts = []

    def said():
        parts.append(capsys.readouterr().err)
        return "".join(parts)

    return said


def test_a_listing_that_takes_long_says_so(root, said):
    def build():
        until(lambda: said().endswith("\n"))
        return {"found": np.arange(3)}

    cached(root, ["a"], "test", "key", build)
    assert said() == f"{root}: listing the samples of 1 test file; later starts read the list\n"


def test_who_waits_long_says_so(root, said, monkeypatch):
    building = threading.Event()

    def build():
        monkeypatch.setattr(shards, "_PATIENCE_S", 0)
        building.set()
        until(lambda: said().endswith("\n"))
        return {"found": np.arange(3)}

    def second():
        assert building.wait(20)
        return len(cached(root, ["a"], "test", "key", build))

    monkeypatch.setattr(shards, "_PATIENCE_S", 60)
    assert in_threads(lambda: len(cached(root, ["a"], "test", "key", build)), second) == [2, 2]
    assert said() == f"{root}: waiting for another process, which lists the samples of 1 test file\n"


@pytest.mark.parametrize(("rank", "says"), [("0", True), ("1", False)])
def test_of_a_run_one_process_says_it(root, said, monkeypatch, rank, says):
    monkeypatch.setenv("RANK", rank)

    def build():
        if says:
            until(said)
        time.sleep(0.3)
        return {"found": np.arange(3)}

    cached(root, ["a"], "test", "key", build)
    assert bool(said()) == says


def test_a_short_listing_says_nothing(root, build, capsys):
    cached(root, ["a"], "test", "key", build)
    assert capsys.readouterr() == ("", "")
    assert not [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]


def test_a_listing_that_fails_lets_the_next_one_go_on(root, build):
    def fails():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cached(root, ["a"], "test", "key", fails)
    assert in_threads(lambda: len(cached(root, ["a"], "test", "key", build))) == [2]
