"""What a killed save left behind is removed, and nothing else."""

import errno
import os
import socket
import time

import pytest

from fastdeit.engine import _fault, checkpoint
from fastdeit.engine.checkpoint import CheckpointError
from tests.faults.faulty import assert_intact, in_child, never, save


def abandoned(root, pid, start, host=None):
    path = root / f".tmp-step_00000001-0a1b2c3d-{pid}-{start}-{host or socket.gethostname()}"
    path.mkdir()
    (path / "model.safetensors").write_bytes(b"half")
    return path


def test_sweep_removes_what_the_dead_left_and_nothing_else(tmp_path, prepare):
    prepare(tmp_path, (1,))
    me = os.getpid()
    started = checkpoint._start_of(me)
    dead = os.fork()
    if dead == 0:
        os._exit(0)
    os.waitid(os.P_PID, dead, os.WEXITED | os.WNOWAIT)
    zombie = abandoned(tmp_path, dead, 1)
    reused = abandoned(tmp_path, me, started + 1)
    living = abandoned(tmp_path, me, started)
    foreign = abandoned(tmp_path, me, started, "another-host.example")
    foreign_old = abandoned(tmp_path, dead, 1, "old-host")
    os.utime(foreign_old, (time.time() - 90000,) * 2)
    strangers = [".tmp-step_00000001", ".tmp-mine", "x.tmp-step_00000001-0a1b2c3d-1-1-h", "notes"]
    for name in strangers:
        (tmp_path / name).mkdir()
    checkpoint.sweep(tmp_path)
    os.waitpid(dead, 0)
    assert not any(path.exists() for path in (zombie, reused, foreign_old))
    assert sorted(os.listdir(tmp_path)) == sorted([living.name, foreign.name, "step_00000001", *strangers])
    checkpoint.sweep(tmp_path / "absent")


def test_sweep_leaves_a_save_in_progress_alone(tmp_path):
    """Sweeping at every point of a save, in another process, does not disturb it."""

    def sweep(name):
        assert in_child(lambda: checkpoint.sweep(tmp_path)) == 0

    with _fault.inject(sweep):
        save(tmp_path, 1)
    assert_intact(checkpoint.newest(tmp_path, never), 1)


def test_sweep_that_cannot_remove_says_so(tmp_path):
    path = abandoned(tmp_path, os.getpid(), 1)

    def fail(name):
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    with _fault.inject(fail), pytest.raises(CheckpointError, match=f"{path} could not be removed"):
        checkpoint.sweep(tmp_path)
