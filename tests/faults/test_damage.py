"""Files of a checkpoint that changed after it was written: each is detected, named and skipped."""

import os
import shutil

import pytest
import torch

from fastdeit.engine import checkpoint
from fastdeit.engine.checkpoint import CheckpointError
from tests.faults.faulty import assert_intact, tensors


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
