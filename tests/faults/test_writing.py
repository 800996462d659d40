"""Kills, full disks and interrupts while a checkpoint is written or removed: the last good one is found."""

import errno
import os
import random
import resource
import select
import signal
import time
from functools import partial

import pytest

from fastdeit.engine import _fault, checkpoint
from fastdeit.engine.checkpoint import CheckpointError
from tests.faults import faulty
from tests.faults.faulty import Nth, assert_intact, die, in_child, leftovers, never, points


@pytest.fixture(params=[False, True], ids=["waited for", "in the background"])
def save(request):
    return partial(faulty.save, background=request.param)


def test_everything_is_synced_before_the_rename_and_the_rename_after_it(tmp_path, save):
    names = points(lambda: save(tmp_path / "root", 1))
    temporary = names[-3].removeprefix("fsync ")
    assert temporary.startswith(".tmp-step_00000001-")
    assert names == [
        "mkdir root",
        f"fsync {tmp_path.name}",
        "write model.safetensors",
        "fsync model.safetensors",
        "write optim.safetensors",
        "fsync optim.safetensors",
        "write manifest.json",
        "fsync manifest.json",
        f"fsync {temporary}",
        "rename step_00000001",
        "fsync root",
    ]


# ---- kills ---------------------------------------------------------------------------------------


def save_for_ever(save, root, first, out):
    for step in range(first, 10**6):
        save(root, step)
        os.write(out, b"%08d" % step)
        checkpoint.prune(root, keep_last=2)


@pytest.mark.slow
def test_sigkill_at_random_times_costs_nothing_that_was_saved(tmp_path, save):
    rng = random.Random(0)
    save(tmp_path, 0)
    began = time.perf_counter()
    save(tmp_path, 1)
    duration = time.perf_counter() - began
    last, awaited, torn = 1, 0, 0
    for _ in range(40):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                save_for_ever(save, tmp_path, last + 1, writer)
            finally:
                os._exit(1)
        os.close(writer)
        # The kill must fall anywhere in a save or a prune, however slow the disk is just now: so wait for none, one or
        # two saves, and then a random part of one more.
        reported = b""
        for _ in range(rng.randrange(3)):
            began = time.perf_counter()
            reported += os.read(reader, 8)
            duration = time.perf_counter() - began
            awaited += 1
        select.select([], [], [], rng.uniform(0, duration))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        reported += os.read(reader, 1 << 20)
        os.close(reader)
        saved = int(reported[-8:]) if reported else last
        torn += bool(leftovers(tmp_path))
        found = checkpoint.newest(tmp_path, never)
        # At most the step in flight is further than what was reported.
        assert saved <= found.step <= saved + 1
        assert_intact(found, found.step)
        assert len(checkpoint.steps(tmp_path)) >= 2
        checkpoint.sweep(tmp_path)
        assert leftovers(tmp_path) == []
        last = found.step
    assert last > awaited > 20
    assert torn >= 5, "the kills missed the saves, so this proved nothing"


def replace_damaged(root, save):
    """Save step 2 where a damaged step 2 lies."""
    damaged = root / "step_00000002" / "model.safetensors"
    if damaged.exists():
        damaged.write_bytes(b"damaged")
    save(root, 2)


def prune_to_one(root, save=None):
    checkpoint.prune(root, keep_last=1)


# name: (steps there before, what runs, steps one of which must be newest afterwards)
OPERATIONS = {
    "first save": ((), lambda root, save: save(root, 1), (None, 1)),
    "save": ((1,), lambda root, save: save(root, 2), (1, 2)),
    "replace a damaged one": ((1, 2), replace_damaged, (1, 2)),
    "prune": ((1, 2, 3), prune_to_one, (3,)),
}


@pytest.mark.parametrize(
    "operation", [pytest.param(name, marks=[pytest.mark.slow] * (name != "save")) for name in OPERATIONS]
)
def test_sigkill_at_every_point_leaves_a_resumable_run(tmp_path, operation, prepare, save):
    before, action, allowed = OPERATIONS[operation]
    rehearsal = tmp_path / "rehearsal"
    prepare(rehearsal, before)
    names = points(lambda: action(rehearsal, save))
    assert len(names) >= 8
    for n in range(len(names)):
        root = tmp_path / str(n)
        prepare(root, before)

        def killed(root=root, n=n):
            with _fault.inject(Nth(n, lambda name: die())):
                action(root, save)

        assert in_child(killed) == signal.SIGKILL, names[n]
        reported = []
        found = checkpoint.newest(root, lambda path, reason, reported=reported: reported.append(path.name))
        assert (found and found.step) in allowed, names[n]
        assert set(reported) <= {"step_00000002"} if operation == "replace a damaged one" else not reported
        if found:
            assert_intact(found, found.step)
        checkpoint.sweep(root)
        assert leftovers(root) == [], names[n]
        action(root, save)
        assert_intact(checkpoint.newest(root, never), allowed[-1])


# ---- disk errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_disk_error_at_every_point_of_a_save_is_one_clear_error(tmp_path, number, prepare, save):
    (tmp_path / "rehearsal").mkdir()
    names = points(lambda: save(tmp_path / "rehearsal", 2))
    assert {name.split()[0] for name in names} == {"mkdir", "write", "fsync", "rename"}
    for n, name in enumerate(names):
        root = tmp_path / str(n)
        prepare(root, (1,))

        def fail(point):
            raise OSError(number, os.strerror(number))

        with (
            _fault.inject(Nth(n, fail)),
            pytest.raises(CheckpointError, match=rf"step 2 was not saved to .*{os.strerror(number)}"),
        ):
            save(root, 2)
        assert leftovers(root) == [], name
        found = checkpoint.newest(root, never)
        # Once renamed it is whole; only its survival of a power cut was not confirmed.
        assert_intact(found, 2 if n == len(names) - 1 else 1)
        save(root, 2)
        assert_intact(checkpoint.newest(root, never), 2)


def test_a_disk_error_in_prune_is_clear_and_costs_no_kept_checkpoint(tmp_path, prepare):
    prepare(tmp_path / "rehearsal", (1, 2))
    names = points(lambda: prune_to_one(tmp_path / "rehearsal"))
    assert {name.split()[0] for name in names} == {"rename", "unlink"}
    for n in range(len(names)):
        root = tmp_path / str(n)
        prepare(root, (1, 2))

        def fail(point):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        with (
            _fault.inject(Nth(n, fail)),
            pytest.raises(CheckpointError, match=r"step_00000001 could not be removed.*Read-only"),
        ):
            prune_to_one(root)
        assert_intact(checkpoint.newest(root, never), 2)


@pytest.mark.parametrize("limit", [100, 5000])
def test_a_file_that_cannot_grow_is_an_error(tmp_path, limit, prepare, save):
    """A real failing write inside safetensors, for which a limit on file sizes stands in for a full disk."""
    prepare(tmp_path, (1,))

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(CheckpointError, match="step 2 was not saved"):
            save(tmp_path, 2)

    assert in_child(limited) == 0
    assert leftovers(tmp_path) == []
    assert_intact(checkpoint.newest(tmp_path, never), 1)


def test_an_interrupt_in_a_save_leaves_nothing_behind(tmp_path, prepare, save):
    prepare(tmp_path, (1,))

    def interrupt(name):
        raise KeyboardInterrupt

    with _fault.inject(Nth(3, interrupt)), pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2)
    assert leftovers(tmp_path) == []
    assert_intact(checkpoint.newest(tmp_path, never), 1)
