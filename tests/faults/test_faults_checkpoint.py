"""Kills, full disks, damaged and hostile files: the last good checkpoint is found, and nothing else is ever loaded."""

import errno
import json
import os
import pickle
import random
import resource
import select
import shutil
import signal
import socket
import time

import pytest
import torch

from fastdeit.engine import _fault, checkpoint
from fastdeit.engine.checkpoint import CheckpointError

torch.set_num_threads(1)


def tensors(value):
    return {"model": {"w": torch.full((64, 64), float(value))}, "optim": {"m": torch.full((32,), float(value))}}


def save(root, step):
    return checkpoint.save(root, step, tensors(step), {"step": step})


def never(path, reason):
    raise AssertionError(f"{path} reported as damaged: {reason}")


@pytest.fixture(scope="module")
def prepare(tmp_path_factory):
    """`prepare(root, steps)` copies sound checkpoints of some of steps 1 to 3 to `root`; copies cost no fsync."""
    archive = tmp_path_factory.mktemp("archive")
    for step in (1, 2, 3):
        save(archive, step)

    def copy(root, steps):
        for step in steps:
            shutil.copytree(archive / f"step_{step:08d}", root / f"step_{step:08d}")
        root.mkdir(exist_ok=True)
        return root / f"step_{max(steps, default=0):08d}"

    return copy


def assert_intact(found, step):
    """The checkpoint is the one of `step`, whole."""
    assert found.step == found.state["step"] == step
    for file, group in tensors(step).items():
        for name, tensor in group.items():
            assert torch.equal(found.tensors[file][name], tensor)


def leftovers(root):
    return [name for name in os.listdir(root) if not name.startswith("step_")]


def in_child(action):
    """Run `action` in a forked child and return its wait status."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Nth:
    """A fault at the n-th point: the callback `fault`, called with the point's name."""

    def __init__(self, n, fault):
        self.n, self.fault, self.names = n, fault, []

    def __call__(self, name):
        self.names.append(name)
        if len(self.names) - 1 == self.n:
            self.fault(name)


def points(action):
    """Names of the fault points `action` passes."""
    seen = Nth(-1, None)
    with _fault.inject(seen):
        action()
    return seen.names


def test_everything_is_synced_before_the_rename_and_the_rename_after_it(tmp_path):
    names = points(lambda: save(tmp_path / "root", 1))
    temporary = names[-3].removeprefix("fsync ")
    assert temporary.startswith(".tmp-step_00000001-")
    assert names == [
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


def save_for_ever(root, first, out):
    for step in range(first, 10**6):
        save(root, step)
        os.write(out, b"%08d" % step)
        checkpoint.prune(root, keep_last=2)


def test_sigkill_at_random_times_costs_nothing_that_was_saved(tmp_path):
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
                save_for_ever(tmp_path, last + 1, writer)
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


def replace_damaged(root):
    """Save step 2 where a damaged step 2 lies."""
    damaged = root / "step_00000002" / "model.safetensors"
    if damaged.exists():
        damaged.write_bytes(b"damaged")
    save(root, 2)


def prune_to_one(root):
    checkpoint.prune(root, keep_last=1)


# name: (steps there before, what runs, steps one of which must be newest afterwards)
OPERATIONS = {
    "first save": ((), lambda root: save(root, 1), (None, 1)),
    "save": ((1,), lambda root: save(root, 2), (1, 2)),
    "replace a damaged one": ((1, 2), replace_damaged, (1, 2)),
    "prune": ((1, 2, 3), prune_to_one, (3,)),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_sigkill_at_every_point_leaves_a_resumable_run(tmp_path, operation, prepare):
    before, action, allowed = OPERATIONS[operation]
    rehearsal = tmp_path / "rehearsal"
    prepare(rehearsal, before)
    names = points(lambda: action(rehearsal))
    assert len(names) >= 8
    for n in range(len(names)):
        root = tmp_path / str(n)
        prepare(root, before)

        def killed(root=root, n=n):
            with _fault.inject(Nth(n, lambda name: die())):
                action(root)

        assert in_child(killed) == signal.SIGKILL, names[n]
        reported = []
        found = checkpoint.newest(root, lambda path, reason, reported=reported: reported.append(path.name))
        assert (found and found.step) in allowed, names[n]
        assert set(reported) <= {"step_00000002"} if operation == "replace a damaged one" else not reported
        if found:
            assert_intact(found, found.step)
        checkpoint.sweep(root)
        assert leftovers(root) == [], names[n]
        action(root)
        assert_intact(checkpoint.newest(root, never), allowed[-1])


# ---- disk errors ---------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_disk_error_at_every_point_of_a_save_is_one_clear_error(tmp_path, number, prepare):
    names = points(lambda: save(tmp_path / "rehearsal", 2))
    assert {name.split()[0] for name in names} == {"write", "fsync", "rename"}
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
def test_a_file_that_cannot_grow_is_an_error(tmp_path, limit, prepare):
    """A real failing write inside safetensors, for which a limit on file sizes stands in for a full disk."""
    prepare(tmp_path, (1,))

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        with pytest.raises(CheckpointError, match="step 2 was not saved"):
            save(tmp_path, 2)

    assert in_child(limited) == 0
    assert leftovers(tmp_path) == []
    assert_intact(checkpoint.newest(tmp_path, never), 1)


def test_an_interrupt_in_a_save_leaves_nothing_behind(tmp_path, prepare):
    prepare(tmp_path, (1,))

    def interrupt(name):
        raise KeyboardInterrupt

    with _fault.inject(Nth(3, interrupt)), pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2)
    assert leftovers(tmp_path) == []
    assert_intact(checkpoint.newest(tmp_path, never), 1)


# ---- damage --------------------------------------------------------------------------------------


def truncate_to(fraction):
    return lambda path: os.truncate(path, int(path.stat().st_size * fraction))


def flip(position):
    """Flip one bit at a fraction of the file."""

    def damage(path):
        data = bytearray(path.read_bytes())
        index = min(len(data) - 1, int(len(data) * position))
        data[index] ^= 1 << index % 8
        path.write_bytes(data)

    return damage


def from_another_run(path):
    other = path.parent.parent / "another"
    checkpoint.save(other, 2, tensors(9), {"step": 2})
    shutil.copy(other / "step_00000002" / path.name, path)
    shutil.rmtree(other)


def by_a_directory(path):
    path.unlink()
    path.mkdir()


def by_a_pipe(path):
    path.unlink()
    os.mkfifo(path)


def by_a_link(path):
    moved = path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(moved)


DAMAGES = {
    "emptied": truncate_to(0),
    "halved": truncate_to(0.5),
    "last byte gone": lambda path: os.truncate(path, path.stat().st_size - 1),
    "byte added": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "missing": lambda path: path.unlink(),
    "from another run": from_another_run,
    "replaced by a directory": by_a_directory,
    "replaced by a pipe": by_a_pipe,
    "replaced by a link": by_a_link,
    **{f"bit flipped at {position}": flip(position) for position in (0, 0.01, 0.3, 0.5, 0.7, 0.9, 1)},
}


@pytest.mark.parametrize("name", ["model.safetensors", "optim.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_detected_named_and_skipped(tmp_path, name, damage, prepare):
    path = prepare(tmp_path, (1, 2))
    DAMAGES[damage](path / name)
    if (name, damage) == ("manifest.json", "from another run"):
        name = "model.safetensors"  # an intact manifest that tells of other files
    with pytest.raises(CheckpointError, match=rf"{path} cannot be used: .*{name}"):
        checkpoint.load(path)
    reported = []
    found = checkpoint.newest(tmp_path, lambda *report: reported.append(report))
    assert_intact(found, 1)
    assert [where for where, _ in reported] == [path]
    assert name in reported[0][1]


def test_every_byte_of_the_manifest_counts(tmp_path):
    path = checkpoint.save(tmp_path, 1, {"model": {}}, {"lr": 1e-05, "text": "aB", "flag": True, "none": None})
    manifest = path / "manifest.json"
    data = manifest.read_bytes()
    for index in range(len(data) * 2):
        damaged = bytearray(data)
        # Bit 5 turns the case of a letter, which JSON takes for the same number in 1e-05.
        damaged[index // 2] ^= 0x20 if index % 2 else 1 << index // 2 % 5
        manifest.write_bytes(damaged)
        with pytest.raises(CheckpointError):
            checkpoint.load(path)
    manifest.write_bytes(data)
    checkpoint.load(path)


def test_swapped_files_are_detected(tmp_path):
    path = checkpoint.save(tmp_path, 1, {"model": {"w": torch.ones(4)}, "ema": {"w": torch.zeros(4)}}, {})
    (path / "model.safetensors").rename(path / "x")
    (path / "ema.safetensors").rename(path / "model.safetensors")
    (path / "x").rename(path / "ema.safetensors")
    with pytest.raises(CheckpointError, match="hash differs"):
        checkpoint.load(path)


def test_when_nothing_verifies_the_error_names_all(tmp_path, prepare):
    prepare(tmp_path, (1, 2))
    for name in ("step_00000001", "step_00000002"):
        os.truncate(tmp_path / name / "optim.safetensors", 5)
    (tmp_path / "step_00000003").mkdir()
    reported = []
    with pytest.raises(CheckpointError, match="none of the 3 checkpoints") as error:
        checkpoint.newest(tmp_path, lambda path, reason: reported.append(path.name))
    assert reported == ["step_00000003", "step_00000002", "step_00000001"]
    for line in (
        "step_00000003: manifest.json cannot be read: No such file or directory",
        "step_00000002: optim.safetensors has 5 bytes",
        "step_00000001: optim.safetensors has 5 bytes",
    ):
        assert line in str(error.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_unreadable_file_is_named(tmp_path, prepare):
    path = prepare(tmp_path, (1,))
    (path / "model.safetensors").chmod(0)
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read: Permission denied"):
        checkpoint.load(path)


# ---- hostile files: every hash is right, so only the parsing protects ----------------------------


def rewrite_manifest(path, change):
    manifest = json.loads((path / "manifest.json").read_bytes())
    change(manifest)
    (path / "manifest.json").write_bytes(checkpoint._encode(manifest))


def forge(path, data):
    """Put `data` in the place of model.safetensors, with a manifest that vouches for it."""
    (path / "model.safetensors").write_bytes(data)
    entry = {"bytes": len(data), "blake2b": checkpoint._hash(data)}
    rewrite_manifest(path, lambda manifest: manifest["files"].update({"model.safetensors": entry}))


def safetensors(header, data=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + data


def entry(dtype="F32", shape=(1,), offsets=(0, 4)):
    return {"w": {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}}


class Canary:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_is_not_executed(tmp_path, protocol, prepare):
    canary = tmp_path / "executed"
    data = pickle.dumps(Canary(canary), protocol=protocol)
    torch.save(Canary(canary), tmp_path / "weights.pt")
    path = prepare(tmp_path, (1,))
    for forged in (data, (tmp_path / "weights.pt").read_bytes(), safetensors(data)):
        forge(path, forged)
        with pytest.raises(CheckpointError, match=r"model.safetensors is not a safetensors file"):
            checkpoint.load(path)
    assert not canary.exists()
    pickle.loads(data)
    assert canary.exists(), "the canary does not sing, so this proved nothing"


HOSTILE = {
    "nothing": b"",
    "header length 2**63": (2**63).to_bytes(8, "little") + b"{}",
    "header length 2**64 - 1": b"\xff" * 8 + b"{}",
    "header longer than the file": (1000).to_bytes(8, "little") + b"{}",
    "header not JSON": safetensors(b"{]"),
    "header not UTF-8": safetensors(b'{"\xff": 1}'),
    "deep header": safetensors(b"[" * 100000),
    "negative shape": safetensors(entry(shape=(-1,)), bytes(4)),
    "overflowing shape": safetensors(entry(shape=(2**40, 2**40)), bytes(4)),
    "empty but overflowing shape": safetensors(entry(shape=(0, 2**63), offsets=(0, 0))),
    "shape larger than the data": safetensors(entry(shape=(2,)), bytes(4)),
    "offsets beyond the end": safetensors(entry(offsets=(0, 8)), bytes(4)),
    "offsets reversed": safetensors(entry(offsets=(4, 0)), bytes(4)),
    "unknown dtype": safetensors(entry(dtype="C128"), bytes(16)),
    "dtype torch has not": safetensors(entry(dtype="F4", shape=(2,), offsets=(0, 1)), bytes(1)),
    "bytes after the data": safetensors(entry(), bytes(400)),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_tensor_file_is_an_error_not_a_crash(tmp_path, name, prepare):
    path = prepare(tmp_path, (1, 2))
    forge(path, HOSTILE[name])
    reported = []
    assert_intact(checkpoint.newest(tmp_path, lambda *report: reported.append(report)), 1)
    assert [where for where, _ in reported] == [path]
    assert "model.safetensors is not a safetensors file" in reported[0][1]
    assert "\n" not in reported[0][1]


def test_random_headers_are_errors_not_crashes(tmp_path, prepare):
    """One byte of a real header replaced, hash and all: it parses to something or it is a CheckpointError."""
    path = prepare(tmp_path, (1,))
    data = (path / "optim.safetensors").read_bytes()
    rng = random.Random(0)
    rejected = 0
    for _ in range(300):
        damaged = bytearray(data)
        damaged[rng.randrange(90)] = rng.randrange(256)
        forge(path, bytes(damaged))
        try:
            checkpoint.load(path)
        except CheckpointError:
            rejected += 1
    assert rejected > 150


EVIL_NAMES = ("../outside.safetensors", "/etc/hostname", "a/b.safetensors", "model.pt", "model.safetensors\n", "", "..")


@pytest.mark.parametrize("name", EVIL_NAMES)
def test_a_file_name_that_leads_elsewhere_is_refused(tmp_path, name, prepare):
    path = prepare(tmp_path / "root", (1,))
    data = (path / "model.safetensors").read_bytes()
    (tmp_path / "root" / "outside.safetensors").write_bytes(data)
    listed = {"bytes": len(data), "blake2b": checkpoint._hash(data)}
    rewrite_manifest(path, lambda manifest: manifest["files"].update({name: listed}))
    with pytest.raises(CheckpointError, match="which is not the name of a checkpoint file"):
        checkpoint.load(path)


MANIFESTS = {
    "another format": (lambda m: m.update(format=2), "has format 2; this version reads format 1"),
    "no format": (lambda m: m.pop("format"), "has format None"),
    "another step": (lambda m: m.update(step=7), "that of step 7"),
    "step not a number": (lambda m: m.update(step="1"), "that of step '1'"),
    "state not a dict": (lambda m: m.update(state=[]), "no state"),
    "files not a dict": (lambda m: m.update(files=[]), "no list of files"),
    "entry not a dict": (lambda m: m["files"].update({"model.safetensors": 3}), "no size or no hash for model"),
    "no hash": (lambda m: m["files"]["model.safetensors"].pop("blake2b"), "no size or no hash for model"),
    "negative size": (lambda m: m["files"]["model.safetensors"].update(bytes=-1), "the manifest says -1"),
    "size without end": (lambda m: m["files"]["model.safetensors"].update(bytes=2**70), "the manifest says"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_that_makes_no_sense_is_refused(tmp_path, name, prepare):
    change, message = MANIFESTS[name]
    path = prepare(tmp_path, (1,))
    rewrite_manifest(path, change)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(path)


@pytest.mark.parametrize(
    "text", [b"", b"null", b"[]", b"3", b"{}", b"[" * 100000, b'{"a":' * 100000, b"\xff\xfe", b"\0"]
)
def test_a_manifest_that_is_none_is_refused(tmp_path, text, prepare):
    path = prepare(tmp_path, (1,))
    (path / "manifest.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json (is not JSON|does not match)"):
        checkpoint.load(path)


def test_a_huge_manifest_is_not_read(tmp_path, prepare):
    path = prepare(tmp_path, (1,))
    os.truncate(path / "manifest.json", 1 << 40)
    with pytest.raises(CheckpointError, match=r"manifest\.json is larger than"):
        checkpoint.load(path)


# ---- sweep ---------------------------------------------------------------------------------------


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
