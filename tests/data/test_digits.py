import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdeit.data.sources import digits
from fastdeit.data.sources.datasets import open_pair
from fastdeit.data.sources.source import DataError
from tests.data.conftest import sides

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_two_processes_at_once_write_one_complete_folder(tmp_path):
    code = "from fastdeit.data.sources import digits; print(digits.prepare())"
    env = {**os.environ, "FASTDEIT_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT)}
    running = [subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True) for _ in "ab"]
    printed = [process.communicate(timeout=60)[0].strip() for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert printed == [str(tmp_path / "digits-1")] * 2
    assert [entry.name for entry in tmp_path.iterdir()] == ["digits-1"]

    train, val = open_pair("folder", tmp_path / "digits-1")
    assert (len(train), len(val)) == (1438, 359)
    assert list(train.classes) == [str(digit) for digit in range(10)]
    assert sides(train.read(0)) == (32, 32)
    shares = np.bincount([val.label(i) for i in range(len(val))]) / 179.7
    assert (abs(shares - 0.2) < 0.01).all()
    names = {Path(source.path(i)).name for source in (train, val) for i in range(len(source))}
    assert len(names) == 1797
    assert train.fingerprint == "f0734e05c89d20292c8cd87cc0b17406"

    before = (tmp_path / "digits-1").stat().st_mtime_ns
    assert digits.prepare(tmp_path) == tmp_path / "digits-1"
    assert (tmp_path / "digits-1").stat().st_mtime_ns == before


def test_the_loser_of_the_race_uses_the_winners_folder(tmp_path, monkeypatch):
    def write(scratch: Path):
        (scratch / "mine").touch()
        (tmp_path / "digits-1").mkdir()
        (tmp_path / "digits-1" / "theirs").touch()

    monkeypatch.setattr(digits, "_write", write)
    root = digits.prepare(tmp_path)
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == [
        "digits-1",
        "digits-1/theirs",
    ]
    assert root == tmp_path / "digits-1"


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file/cache: the digits .* Not a directory; set FASTDEIT_CACHE=FOLDER"):
        digits.prepare(tmp_path / "file" / "cache")

    def full(root):
        (root / "train").mkdir()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(digits, "_write", full)
    with pytest.raises(DataError, match=r"cache: the digits cannot be written there: No space left on device"):
        digits.prepare(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_pictures_are_the_digits(tmp_path):
    from sklearn.datasets import load_digits

    _, val = open_pair("folder", digits.prepare(tmp_path))
    data = load_digits()
    for index in range(0, len(val), 60):
        original = int(Path(val.path(index)).stem)
        assert data.target[original] == val.label(index)
        small = np.asarray(Image.open(val.path(index)).resize((8, 8), Image.Resampling.BOX), dtype=float)
        assert np.corrcoef(small.reshape(-1), data.images[original].reshape(-1))[0, 1] > 0.95
