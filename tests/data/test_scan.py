"""Several files are listed at a time, by threads or by processes, and nothing of it shows."""

import io
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from fastdeit.data.sources import scan as module
from fastdeit.data.sources import tar, tfrecord
from fastdeit.data.sources.scan import scanned
from tests.data.scan_jobs import PATHS, fails, hangs_behind_the_first, killed, meets, modules, session, until, who
from tests.data.writers import tfrecord as tfrecord_file

ROOT = Path(__file__).parents[2]


@pytest.fixture
def processes(monkeypatch):
    """Two processes list whatever there is; those that were started are in the list."""
    started = []

    class Recorded(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            started.append(self)

    monkeypatch.setattr(module.os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(module, "_MUCH", 0)
    monkeypatch.setattr(module.subprocess, "Popen", Recorded)
    return started


def test_files_are_read_together_and_come_in_their_order():
    paths, last_is_done = PATHS[:8], threading.Event()

    def scan(path):
        if path == paths[0] and not last_is_done.wait(20):
            raise TimeoutError
        if path == paths[-1]:
            last_is_done.set()
        return path

    assert list(scanned(paths, scan)) == paths


def test_an_error_of_the_program_is_raised():
    with pytest.raises(ZeroDivisionError):
        list(scanned(PATHS, fails))


def test_processes_share_the_files_and_these_come_in_their_order(processes):
    found = list(scanned(PATHS, who))
    assert [path for path, _ in found] == PATHS
    assert {pid for _, pid in found} <= {process.pid for process in processes}
    assert len(processes) == 2


def test_each_process_reads_several_files_at_a_time(processes, tmp_path):
    assert list(scanned(PATHS, partial(meets, str(tmp_path)))) == PATHS


def test_processes_list_what_threads_list(processes, monkeypatch, tmp_path):
    """Samples, and reasons why others are left out, of sound and damaged files."""
    names = [str(number) for number in range(9)]
    for name in names:
        tfrecord_file(tmp_path / "records" / name, [b"x" * int(name), b"y"], [1, int(name)])
        (tmp_path / "tars").mkdir(exist_ok=True)
        with tarfile.open(tmp_path / "tars" / name, "w") as archive:
            for member in ("a.jpg", "a.cls", f"\udce9{name}.jpg"):
                entry = tarfile.TarInfo(member)
                entry.size = 1
                archive.addfile(entry, io.BytesIO(name.encode()))
    for folder in ("records", "tars"):
        os.truncate(tmp_path / folder / "3", 100)
        (tmp_path / folder / "6").unlink()

    def lists():
        yield tfrecord._index(str(tmp_path / "records"), names)
        yield tar._index(tmp_path / "tars", names, "label")

    by_processes = list(lists())
    assert len(processes) == 4
    monkeypatch.setattr(module, "_MUCH", 1 << 60)
    for found, expected in zip(by_processes, lists(), strict=True):
        assert len(expected["label"]) >= 7
        assert len(expected["skipped"]) > 50
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[key], expected[key]) for key in found)


def test_ctrl_c_in_a_terminal_does_not_reach_such_a_process(processes):
    assert os.getsid(0) not in scanned(PATHS, session)


def test_such_a_process_loads_no_torch(processes):
    assert all("fastdeit.data.sources.scan" in found and "torch" not in found for found in scanned(PATHS, modules))


@pytest.mark.parametrize(
    ("size", "cores", "files", "others"),
    [(8 << 30, 2, 5, True), ((8 << 30) - 1, 2, 5, False), (8 << 30, 1, 5, False), (8 << 30, 2, 4, False)],
)
def test_processes_are_for_what_repays_their_start(tmp_path, monkeypatch, size, cores, files, others):
    """Sparse files: nothing of them is read."""
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda pid: set(range(cores)))
    paths = [str(tmp_path / str(number)) for number in range(files)]
    for path in paths:
        Path(path).touch()
    os.truncate(paths[0], size)
    assert (os.getpid() not in {pid for _, pid in scanned(paths, who)}) == others


def test_a_file_that_is_not_there_is_left_to_the_scan(tmp_path):
    assert list(scanned([str(tmp_path / str(number)) for number in range(9)], os.path.exists)) == [False] * 9


def test_what_a_killed_process_was_to_do_is_done_here(processes):
    with pytest.warns(UserWarning, match="a process that lists files has ended; what it had is listed here"):
        assert list(scanned(PATHS, partial(killed, os.getpid()))) == PATHS
    assert [process.returncode for process in processes] == [-signal.SIGKILL] * 2


@pytest.mark.parametrize("at_once", [True, False])
def test_without_any_process_left_all_is_done_here(processes, monkeypatch, at_once):
    class Ended(module.subprocess.Popen):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.wait()

    monkeypatch.setattr(module, "_PROCESS", "raise SystemExit")
    if at_once:
        monkeypatch.setattr(module.subprocess, "Popen", Ended)
    with pytest.warns(UserWarning, match="has ended"):
        found = list(scanned(PATHS, who))
    assert found == [(path, os.getpid()) for path in PATHS]


def test_where_no_process_can_be_started_all_is_done_here(processes, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/dev/null/python")
    with pytest.warns(UserWarning, match="0 of 2 processes to list files could be started: .* Not a directory"):
        found = list(scanned(PATHS, who))
    assert found == [(path, os.getpid()) for path in PATHS]


@pytest.mark.filterwarnings("error")
def test_an_error_in_a_process_is_raised_here_and_printed_nowhere(processes, capfd):
    """What comes before it is found all the same, and the process goes on."""
    found = scanned(PATHS, fails)
    assert [next(found) for _ in PATHS[:8]] == [1] * 8
    with pytest.raises(ZeroDivisionError):
        list(found)
    assert capfd.readouterr().err == ""


def test_processes_end_with_a_caller_that_wants_no_more(processes):
    found = scanned(PATHS, hangs_behind_the_first)
    assert next(found) == PATHS[0]
    assert [process.poll() for process in processes] == [None, None]
    found.close()
    assert [process.returncode for process in processes] == [-signal.SIGKILL] * 2


SCRIPT = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from tests.data import scan_jobs
from fastdeit.data.sources import scan
print("the script runs", flush=True)
scan._MUCH, scan.os.sched_getaffinity = 0, lambda pid: {{0, 1}}
for found in scan.scanned(scan_jobs.PATHS, scan_jobs.SCAN):
    print(found, flush=True)
"""


def script(tmp_path, scan):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT.replace("SCAN", scan))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, path], start_new_session=True, **pipes)


def test_a_script_without_a_guard_runs_once(tmp_path):
    out, errors = script(tmp_path, "who").communicate()
    first, *others = out.splitlines()
    assert (first, errors) == ("the script runs", "")
    assert [re.match(r"\('(.*)', \d+\)$", line)[1] for line in others] == PATHS


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_processes_end_with_their_starter(tmp_path, number):
    """In the middle of a file, or while they wait for one."""
    with script(tmp_path, "outlives_its_starter") as starter:
        assert starter.stdout.readline() == "the script runs\n"
        pids = {int(re.search(r"(\d+)\)$", starter.stdout.readline())[1]) for _ in range(8)}
        os.killpg(starter.pid, number)  # as Ctrl-C in a terminal does
        _, errors = starter.communicate()
    # The signal reaches all of them at once: on a busy machine the starter may hear of its processes' end first.
    expected = {-number, 1} if number == signal.SIGINT else {-number}
    assert starter.returncode in expected
    assert ("Traceback" in errors) == (number == signal.SIGINT)
    for pid in pids:
        until(partial(ended, pid))


def ended(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True
