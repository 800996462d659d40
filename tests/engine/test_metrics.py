"""metrics.jsonl loses no whole line and gains no wrong one; sinks may fail without harm."""

import errno
import json
import logging
import math
import sys

import numpy as np
import pytest
import torch

from fastdeit.engine import _fault, metrics
from fastdeit.engine.metrics import MetricsError, MetricsLog, Tolerant


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / "metrics.jsonl"


def fill(path, steps):
    log = MetricsLog(path)
    for step in steps:
        log.write(step, kind="train", loss=1 / (step + 1))
    log.close()


def test_a_record_is_on_disk_when_write_returns(path):
    log = MetricsLog(path)
    log.write(step=3, kind="train", epoch=0.5, loss=6.9, note="a\nb\r\u2028c", parts={"a": [1, None, True]})
    assert path.read_bytes().count(b"\n") == 1
    assert metrics.read(path) == [
        {
            "step": 3,
            "kind": "train",
            "epoch": 0.5,
            "loss": 6.9,
            "note": "a\nb\r\u2028c",
            "parts": {"a": [1, None, True]},
        }
    ]
    log.close()


def test_non_finite_values_stay_what_they_are(path):
    log = MetricsLog(path)
    log.write(1, loss=math.nan, norm=math.inf)
    (record,) = metrics.read(path)
    assert math.isnan(record["loss"])
    assert record["norm"] == math.inf


@pytest.mark.parametrize("value", [torch.tensor(1.0), np.float32(1.0), np.ones(2), object()])
def test_values_that_are_not_json_are_refused_by_name_and_leave_no_trace(path, value):
    log = MetricsLog(path)
    with pytest.raises(MetricsError, match=f"'loss' is a {type(value).__name__}"):
        log.write(1, lr=0.1, loss=value)
    assert path.read_bytes() == b""


def test_reopening_appends(path):
    fill(path, range(3))
    fill(path, range(3, 5))
    assert [record["step"] for record in metrics.read(path)] == [0, 1, 2, 3, 4]


def test_truncate_drops_later_steps_only_and_writing_goes_on(path):
    fill(path, range(10))
    before = path.read_bytes().splitlines(keepends=True)
    log = MetricsLog(path)
    log.truncate(4)
    assert path.read_bytes() == b"".join(before[:5])
    log.write(5, loss=0.0)
    assert [record["step"] for record in metrics.read(path)] == [0, 1, 2, 3, 4, 5]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("cut", range(1, 40, 3))
def test_a_torn_last_line_is_ignored_and_never_continued(path, cut):
    fill(path, range(3))
    data = path.read_bytes()
    path.write_bytes(data[:-cut])
    whole = [record["step"] for record in metrics.read(path)]
    assert whole == [0, 1]
    log = MetricsLog(path)
    log.write(7, loss=0.0)
    assert [record["step"] for record in metrics.read(path)] == [*whole, 7]
    log.truncate(1)
    assert [record["step"] for record in metrics.read(path)] == whole


def test_a_damaged_line_is_named_and_skipped(path, caplog):
    fill(path, range(2))
    with path.open("ab") as file:
        file.write(b"\x00\x00\n[1]\n" + json.dumps({"step": 2}).encode() + b"\n")
    with caplog.at_level(logging.WARNING):
        assert [record["step"] for record in metrics.read(path)] == [0, 1, 2]
    assert [f"{path}:3", f"{path}:4"] == [record.getMessage().split(" ")[0] for record in caplog.records]


def test_of_many_damaged_lines_some_are_named_and_the_rest_are_counted(path, caplog):
    path.parent.mkdir()
    path.write_bytes(b"\n" * 1000)
    assert metrics.read(path) == []
    assert len(caplog.records) == 11
    assert caplog.records[-1].getMessage() == f"{path}: 990 more lines are none either; skipped"


def fail(name):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_the_log_as_it_was(path):
    fill(path, range(4))
    before = path.read_bytes()
    log = MetricsLog(path)
    for action in (lambda: log.write(4, loss=1.0), lambda: log.truncate(1)):
        with _fault.inject(fail), pytest.raises(OSError, match="No space left"):
            action()
        assert path.read_bytes() == before
    log.write(4, loss=1.0)
    assert [record["step"] for record in metrics.read(path)] == [0, 1, 2, 3, 4]


def test_part_of_a_line_is_taken_back(path):
    """A disk that fills up in the middle of a line, for which a limit on the file's size stands in."""
    resource = pytest.importorskip("resource")
    fill(path, range(4))
    before = path.read_bytes()
    log = MetricsLog(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 10, hard))
    try:
        with pytest.raises(OSError, match="no space left for a line"):
            log.write(4, loss=1.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before


# ---- sinks ---------------------------------------------------------------------------------------


class Broken:
    """A sink that works `good` times."""

    def __init__(self, good):
        self.good, self.calls = good, 0

    def write(self, step, **values):
        self.calls += 1
        if self.calls > self.good:
            raise ConnectionError("server is gone")

    def close(self):
        raise ConnectionError("still gone")


def test_a_failing_sink_is_reported_once_and_left_alone(path, caplog):
    broken = Broken(good=2)
    outputs = [Tolerant("wandb", broken), MetricsLog(path)]
    with caplog.at_level(logging.WARNING):
        for step in range(6):
            for output in outputs:
                output.write(step, loss=1.0)
        for output in outputs:
            output.close()
    assert broken.calls == 3
    assert [record["step"] for record in metrics.read(path)] == list(range(6))
    assert len(caplog.records) == 1
    assert "metrics sink wandb failed" in caplog.text
    assert "ConnectionError: server is gone" in caplog.text


def test_a_sink_failing_to_close_is_reported(caplog):
    sink = Tolerant("wandb", Broken(good=9))
    sink.write(1, loss=1.0)
    sink.close()
    sink.close()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "still gone" in caplog.text


def test_a_sink_does_not_swallow_an_interrupt():
    class Interrupted(Broken):
        def write(self, step, **values):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Tolerant("wandb", Interrupted(0)).write(1)


def test_an_unknown_sink_is_refused(tmp_path):
    with pytest.raises(MetricsError, match="unknown metrics sink 'tensorbord'; known are tensorboard, wandb"):
        metrics.open_sinks(["tensorbord"], tmp_path, {})


@pytest.mark.parametrize(("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_missing_package_is_an_error_at_start_with_the_remedy(tmp_path, monkeypatch, name, module):
    # None in sys.modules is how Python marks a module that cannot be imported.
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MetricsError, match=rf"pip install 'fastdeit\[{name}\]'"):
        metrics.open_sinks([name], tmp_path, {})


def test_no_sinks(tmp_path):
    assert metrics.open_sinks([], tmp_path, {}) == []


def test_tensorboard_holds_the_numbers_and_forgets_undone_steps(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, loss in ((0, 1.0), (2, 5.0)):
        (sink,) = metrics.open_sinks(["tensorboard"], tmp_path, {}, step=start)
        for step in range(start + 1, 5):
            sink.write(step, kind="train", loss=loss, note="text", done=True)
        sink.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert events.Tags()["scalars"] == ["train/loss"]
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1), (2, 1), (3, 5), (4, 5)]
