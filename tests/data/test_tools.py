"""`check`: every sample decoded once, and a report of what is there and what is wrong with it."""

import os
import signal

import numpy as np
import pytest

from fastdeit.data.execute.decode import pixels
from fastdeit.data.sources import tools
from fastdeit.data.sources.folder import FolderSource
from fastdeit.data.sources.source import DataError
from fastdeit.data.sources.synthetic import SyntheticSource
from fastdeit.data.sources.tools import check


@pytest.fixture
def source(tmp_path, varied, make_image, encode):
    """Class a: 3 JPEGs, one of them twice; b: a grey PNG, a copy of a's, a broken file and the same broken file."""
    files = {
        "a/1.jpg": varied[1],
        "a/2.jpg": varied[2],
        "a/3.jpg": varied[1],
        "b/1.png": encode(make_image(0, 30, 20).convert("L"), "PNG"),
        "b/2.jpg": varied[2],
        "b/3.jpg": b"broken",
        "b/4.jpg": b"broken",
        "b/5.jpg": varied[2],
    }
    for name, data in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    return FolderSource(tmp_path)


def test_report(source, tmp_path):
    report = check(source, pixels, processes=1)
    sizes = sorted(len(source.read(i)) for i in (0, 1, 2, 3, 4, 7))
    assert report.samples == 8
    assert report.formats == {"JPEG RGB": 5, "PNG L": 1}
    assert report.duplicates == [
        [f"{tmp_path}/a/1.jpg", f"{tmp_path}/a/3.jpg"],
        [f"{tmp_path}/a/2.jpg", f"{tmp_path}/b/2.jpg", f"{tmp_path}/b/5.jpg"],
    ]
    assert [path for path, _ in report.bad] == [f"{tmp_path}/b/3.jpg", f"{tmp_path}/b/4.jpg"]
    assert not report.ok
    assert report.side[0] == 20
    assert (report.size[0], report.size[2]) == (sizes[0], sizes[-1])
    assert report.per_class == (3, 4, 5)
    assert report.empty == []


def test_report_as_text(source, tmp_path):
    lines = str(check(source, pixels, processes=1)).splitlines()
    assert lines[0] == "8 samples: 5 JPEG RGB, 1 PNG L"
    assert lines[3] == "samples of a class 3 to 5, median 4; classes 'a' to 'b'"
    assert lines[4] == "2 images occur more than once:"
    assert lines[5] == f"  {tmp_path}/a/1.jpg = {tmp_path}/a/3.jpg"
    assert lines[7] == "2 cannot be used:"
    assert lines[8].startswith(f"  {tmp_path}/b/3.jpg: no format")


class Junk(SyntheticSource):
    def read(self, index: int) -> np.ndarray:
        return np.zeros(9, np.uint8)


def test_every_bad_sample_is_in_the_text_and_other_long_lists_are_cut():
    source = Junk(30, 31)
    source.skipped = [("x", "left out")]
    report = check(source, pixels, processes=1)
    assert len(report.bad) == 31
    assert report.bad[0] == ("x", "left out")
    assert str(report).count("it starts with") == 30
    report.empty *= 25
    assert "\n  and 5 more\n31 cannot be used:\n  x: left out\n" in str(report)
    report.empty = report.empty[:1]
    assert report.side == report.size == (0, 0, 0)
    assert report.empty == ["class_0030"]


def test_number_of_processes_changes_nothing(monkeypatch):
    monkeypatch.setattr(tools, "_CHUNK", 8)
    source = SyntheticSource(60, 4, (16, 24))
    seen = []
    reports = [check(source, pixels, processes, lambda done, total: seen.append((done, total))) for processes in (1, 2)]
    assert reports[0] == reports[1]
    assert seen == 2 * [(min(done, 60), 60) for done in range(8, 65, 8)]
    assert reports[0].ok


class Killer(SyntheticSource):
    def read(self, index: int) -> np.ndarray:
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_is_an_error_and_no_hang():
    with pytest.raises(DataError, match="a process was killed while it decoded images, probably for lack of memory"):
        check(Killer(10, 2, (8, 8)), pixels, processes=2)


class Buggy(SyntheticSource):
    def read(self, index: int) -> np.ndarray:
        raise ZeroDivisionError


def test_an_error_of_the_program_is_not_taken_for_a_bad_file():
    with pytest.raises(ZeroDivisionError):
        check(Buggy(10, 2, (8, 8)), pixels, processes=1)
