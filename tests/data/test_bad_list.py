"""The list of images that cannot be used: one for all processes, kept over a resume, and how many it may have."""

import errno
import json
import os

import numpy as np
import pytest

from fastdeit.data import bad
from fastdeit.data.bad import BadImages, BadList, allowed
from fastdeit.data.examine import fault
from fastdeit.data.loader import EvalLoader, TrainLoader
from fastdeit.data.plan import plan
from fastdeit.data.sources.source import DataError, MachineError


@pytest.mark.parametrize(
    ("images", "fraction", "most"),
    [
        *((9, 0.001, 1), (30, 0.001, 3), (500, 0.001, 5), (999, 0.001, 5), (7_000, 0.001, 7)),
        *((1_281_167, 0.001, 1281), (500, 0.1, 50), (500, 0, 0), (1_281_167, 0, 0), (4, 1.0, 4)),
    ],
)
def test_how_many_may_be_bad(images, fraction, most):
    assert allowed(images, fraction) == most
    judged = BadImages(range(images), fraction, None)
    if most < images:
        judged.check(most)
    with pytest.raises(DataError, match=f"{most + 1} of {images} images cannot be used"):
        judged.check(most + 1)


def test_all_may_never_be_bad(memory):
    with pytest.raises(DataError, match="1 of 1 images"):
        BadImages(memory([b""]), 1.0, lambda *_: None).add(0, "empty")


def test_processes_tell_each_image_once_and_count_together(tmp_path, memory, varied):
    source = memory([b"", *varied[:6], b"x"])
    views, mixing = [plan.Augment(size=(16, 16))], plan.Mixing(group_size=4, mixup=0.0, cutmix=0.0)
    told, lists = [], [BadList("train") for _ in range(2)]
    for rank, shared in enumerate(lists):
        shared.keep_in(tmp_path)
        options = {"seed": 2, "batch_size": 8, "rank": rank, "world": 2, "threads": 1, "max_bad_fraction": 0.5}
        loader = TrainLoader(source, views, mixing, **options, bad_list=shared, on_bad=lambda *why: told.append(why))
        assert len(list(loader.batches(0, 4))) == 4
        assert set(loader.bad.reasons) == {"memory:0", "memory:7"}
    assert sorted(path for path, _ in told) == ["memory:0", "memory:7"]
    lines = [json.loads(line) for line in (tmp_path / bad.FILE).read_text().splitlines()]
    found = {"memory:0": "the file is empty", "memory:7": dict(told)["memory:7"]}
    expected = [{"split": "train", "index": int(path[-1]), "path": path, "reason": why} for path, why in found.items()]
    assert sorted(lines, key=lambda line: line["index"]) == expected
    assert [len(one) for one in lists] == [2, 2]


def test_the_limit_is_that_of_all_processes(tmp_path, memory, varied):
    """A tenth of 20 may be bad. Each of three processes meets one."""
    source = memory([b"", b"", b"", *varied[:17]])

    def evaluate(rank):
        shared = BadList("val")
        shared.keep_in(tmp_path)
        options = {"rank": rank, "world": 3, "threads": 1, "bad_list": shared, "on_bad": lambda *_: None}
        return sum(len(batch) for batch in EvalLoader(source, (8, 8), 1.0, **options).batches())

    assert [evaluate(0), evaluate(1)] == [6, 6]
    with pytest.raises(DataError, match="3 of 20 images") as info:
        evaluate(2)
    assert str(info.value).count("the file is empty") == 3


def test_two_that_append_see_what_the_other_has(tmp_path):
    one, other, held_out = BadList("train"), BadList("train"), BadList("val")
    for each in (one, other, held_out):
        each.keep_in(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert one.add(3, "a", "x")
    assert not other.add(3, "a", "x")
    assert held_out.add(3, "v", "x")
    assert other.add(4, "b", "y")
    assert (len(one), len(other), len(held_out)) == (1, 2, 1)
    one.refresh()
    assert one.entries() == [("a", "x"), ("b", "y")]


def test_a_line_that_was_cut_is_passed_over(tmp_path):
    (tmp_path / bad.FILE).write_bytes(b'{"split": "train", "index": 1, "path": "a", "rea')
    shared, after = BadList("train"), BadList("train")
    shared.keep_in(tmp_path)
    assert shared.add(2, "b", "y")
    after.keep_in(tmp_path)
    assert after.entries() == [("b", "y")]


def test_a_resume_goes_on_with_the_list_and_strikes_out_what_is_mended(tmp_path, memory, varied):
    source = memory([b"", b"", b"", *varied[:7]])
    before, held_out = BadList("train"), BadList("val")
    for each in (before, held_out):
        each.keep_in(tmp_path)
        for index in (0, 1):
            each.add(index, f"memory:{index}", "the file is empty")
    before.add(99, "of another set", "x")
    before.add(2, "where it was before", "x")
    source.images[1] = np.frombuffer(varied[9], np.uint8)
    after = BadList("train")
    after.keep_in(tmp_path)
    assert after.mended(source, lambda index: fault(source, index)) == ["memory:1", "of another set"]
    assert after.entries() == [("memory:0", "the file is empty"), ("memory:2", "x")]
    told = []
    BadImages(source, 0.5, lambda *why: told.append(why), after).add(0, "the file is empty")
    assert told == []
    assert after.add(1, "memory:1", "again")
    read = [BadList("train"), BadList("val")]
    for each in read:
        each.keep_in(tmp_path)
    assert [len(each) for each in read] == [3, 2]
    assert sorted(path.name for path in tmp_path.iterdir()) == [bad.FILE]


def test_without_the_run_directory_a_process_keeps_its_own(tmp_path):
    shared = BadList("train")
    shared.keep_in(tmp_path / "elsewhere")
    assert shared.add(0, "a", "x")
    assert len(shared) == 1


def test_a_list_that_cannot_be_written_is_the_machine_s_fault(tmp_path, monkeypatch):
    shared = BadList("train")
    shared.keep_in(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(MachineError, match=r"bad_images.jsonl: the list .* cannot be kept: No space left on device"):
        shared.add(0, "a", "x")
