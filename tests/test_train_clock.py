"""The clock of a run: `seconds` of every record, over start-up, teachers, resumed processes and forks."""

import json
import time

import pytest
import torch

from fastdeit.engine.dist import World
from fastdeit.errors import Interrupted
from fastdeit.recipe import resolve as recipes
from fastdeit.run import clock, fork
from fastdeit.training import train
from tests.small_runs import StopAt

RECIPE = """\
model: {name: "tests.small_runs:Tiny", image_size: 32}
method: {use: supervised}
data:
  {source: synthetic, synthetic_samples: 16, synthetic_classes: 4, flip: 0, mixup: 0, cutmix: 0, group_size: 4,
   repeats: 1, mean: [0.3, 0.4, 0.5], std: [0.2, 0.25, 0.3]}
optim: {lr: 1e-3, warmup_epochs: 0}
train: {epochs: 2, batch_size: 8, eval_every: 1}
engine: {device: cpu, precision: fp32, log_every: 1}
"""


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_clock_begins_with_the_command_and_goes_on_through_resumes_but_not_through_forks(tmp_path, monkeypatch):
    (tmp_path / "small.yaml").write_text(RECIPE)
    recipe, run, cpu = recipes.load(str(tmp_path / "small.yaml")), tmp_path / "run", World(torch.device("cpu"))
    with pytest.raises(Interrupted):
        train(recipe, run, StopAt(2), began=time.monotonic() - 1000)
    first = records(run)
    assert [1000 <= record["seconds"] < 1100 for record in first] == [True] * len(first)
    assert first == sorted(first, key=lambda record: record["seconds"])
    with open(run / "metrics.jsonl", "a") as log:  # a step that its process did not live to save
        print(json.dumps({"step": 3, "kind": "train", "seconds": 1500.0}), file=log)
    monkeypatch.setattr(clock.time, "time", lambda now=time.time: now() + 9000)  # the next morning

    train(recipe, run, cpu, resume=True, began=time.monotonic() - 200)
    last = records(run)
    assert last[: len(first)] == first
    judged = [record for record in last if record["kind"] == "eval"]
    assert [record["step"] for record in judged] == [2, 4]
    assert [1700 <= record["seconds"] < 1800 for record in judged] == [True, True]
    summary = json.loads((run / "summary.json").read_text())
    assert summary["seconds"] == pytest.approx(judged[-1]["seconds"], abs=60)
    # 9,000 s after the checkpoint, without the 500 that a process worked and the 200 before this one's steps.
    assert summary["paused_seconds"] == pytest.approx(9000 - 500 - 200, abs=60)

    origin = fork.opened(f"{run}@step=2", print)
    train(recipes.override(origin.recipe, ["train.epochs=3"]), tmp_path / "fork", cpu, origin=origin)
    assert max(record["seconds"] for record in records(tmp_path / "fork")) < 100


def test_a_run_whose_teacher_is_trained_first_has_its_time(tmp_path):
    for name, seconds in (("teacher", 30.0), ("teacher_2", 40.0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps({"step": 1, "seconds": seconds}) + "\n")
    assert clock.Clock.going_on(tmp_path, time.monotonic()).seconds == pytest.approx(70, abs=1)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 0, "seconds": 75.0}) + "\n")
    assert clock.Clock.going_on(tmp_path, time.monotonic()).seconds == pytest.approx(75, abs=1)
