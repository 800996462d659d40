"""`fastdeit bench overhead`: what is told is the ratio that it names, and it sees what is slow."""

import re
import time

import pytest
import torch

from fastdeit import cli
from fastdeit.bench import overhead
from fastdeit.bench.step import Cell
from fastdeit.data.logits import CachedLogits

CPU = torch.device("cpu")
TINY = Cell("step", "deit_digits_distilled_patch8_32", 2, 32, "fp32", "test_convnext")


def test_what_is_told_is_the_median_of_the_ratios_of_a_round():
    seconds = {
        "undistilled": [1.0, 2.0, 4.0],
        "cached": [1.1, 2.04, 4.0],
        "teacher": [1.0, 2.0, 4.0],
        "online": [2.2, 5.0, 8.0],
        "update": [0.5, 0.5, 0.5],
        "averaged_update": [0.504, 0.508, 0.52],
    }
    half = {name: [each / 2 for each in rounds] for name, rounds in seconds.items()}
    watching = {"guard": 0.001, "progress": 0.002, "log": 0.003}
    found = {"device": "cpu", "rounds": 3, "seconds": seconds, "cpu_seconds": half, "watching": watching}
    _, cached, online, rest, others = overhead.sentences(TINY, found)
    assert (
        "takes 1.020 of an undistilled step (by round 1.000 to 1.100, in CPU time 1.020); wanted: at most 1.05"
        in cached
    )
    assert "takes 1.100 of an undistilled step and the teacher's forward (by round 1.000 to 1.250" in online
    adds, log = "the average of the weights adds 0.40% to an undistilled step", "the log 0.50%"
    assert rest == (f"  {adds}, {log}, together 0.90%; wanted: at most 1%")
    assert others == (
        "  watching over a run takes 6000 us a step (guard 1000.0, progress 2000.0, log 3000.0), 0.60% of this one and "
        "less than 1% of steps longer than 600 ms"
    )


@pytest.mark.slow
def test_a_slow_cache_is_seen(monkeypatch):
    usual = CachedLogits.read
    reads = []

    def slow(self, epoch, index, copy, place):
        reads.append(int(place[0]) // len(place))
        time.sleep(0.3)
        return usual(self, epoch, index, copy, place)

    monkeypatch.setattr(CachedLogits, "read", slow)
    found = overhead.measure(TINY, 2, CPU)
    assert min(found["seconds"]["cached"]) > 0.3
    assert max(found["cpu_seconds"]["cached"]) < min(found["seconds"]["cached"])
    assert reads[:3] == [0, 1, 0], "another step each time"
    assert set(found["seconds"]) == {"undistilled", "update", "averaged_update", "cached", "online", "teacher"}
    assert all(len(rounds) == 2 for rounds in found["seconds"].values())


@pytest.mark.slow
def test_the_command_prints_every_ratio_beside_what_is_wanted(capsys):
    flags = f"--model {TINY.model} --batch 2 --image-size 32 --rounds 1 --device cpu --teacher {TINY.teacher}"
    assert cli.main(["bench", "overhead", *flags.split()]) == 0
    printed = capsys.readouterr().out
    assert re.findall(r"wanted: at most (\S+)", printed) == ["1.05", "1.15", "1%"]


def test_a_teacher_that_timm_does_not_have_is_refused(capsys):
    assert cli.main(["bench", "overhead", "--teacher", "regnety", "--device", "cpu"]) == 2
    assert "regnety" in capsys.readouterr().err
