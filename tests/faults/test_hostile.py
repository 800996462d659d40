"""Hostile files, of which every hash is right, so that only the parsing protects: nothing is executed or crashes."""

import json
import os
import pickle
import random

import pytest
import torch

from fastdeit.engine import checkpoint
from fastdeit.engine.checkpoint import CheckpointError
from tests.faults.faulty import assert_intact


def rewrite_manifest(path, change):
    manifest = json.loads((path / "manifest.json").read_bytes())
    change(manifest)
    (path / "manifest.json").write_bytes(checkpoint._encode(manifest))


def forge(path, data):
    """Put `data` in the place of model.safetensors, with a manifest that vouches for it."""
    (path / "model.safetensors").write_bytes(data)
    entry = {"bytes": len(data), "sha256": checkpoint._hash(data)}
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
    listed = {"bytes": len(data), "sha256": checkpoint._hash(data)}
    rewrite_manifest(path, lambda manifest: manifest["files"].update({name: listed}))
    with pytest.raises(CheckpointError, match="which is not the name of a checkpoint file"):
        checkpoint.load(path)


MANIFESTS = {
    "another format": (lambda m: m.update(format=3), "has format 3; this version of fastdeit reads format 1 and 2"),
    "no format": (lambda m: m.pop("format"), "has format None"),
    "another step": (lambda m: m.update(step=7), "that of step 7"),
    "step not a number": (lambda m: m.update(step="1"), "that of step '1'"),
    "state not a dict": (lambda m: m.update(state=[]), "no state"),
    "files not a dict": (lambda m: m.update(files=[]), "no list of files"),
    "entry not a dict": (lambda m: m["files"].update({"model.safetensors": 3}), "no size or no hash for model"),
    "no hash": (lambda m: m["files"]["model.safetensors"].pop("sha256"), "no size or no hash for model"),
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
    with pytest.raises(CheckpointError, match=r"manifest\.json (is not JSON|does not match|has format None)"):
        checkpoint.load(path)


def test_a_huge_manifest_is_not_read(tmp_path, prepare):
    path = prepare(tmp_path, (1,))
    os.truncate(path / "manifest.json", 1 << 40)
    with pytest.raises(CheckpointError, match=r"manifest\.json is larger than"):
        checkpoint.load(path)
