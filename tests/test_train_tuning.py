"""Whole runs whose first step tries the kernels out: what they write down, and whose choice a resumed run has."""

import json
import shutil

import pytest
import torch

from fastdeit.engine.dist import World
from fastdeit.errors import Interrupted
from fastdeit.kernels import _tried
from fastdeit.kernels._op import Op
from fastdeit.kernels.trial import candidates
from fastdeit.recipe import resolve as recipes
from fastdeit.training import train
from tests.small_runs import StopAt, assert_same_weights, stored

RECIPE = """\
model: {name: deit_digits_distilled_patch8_32, image_size: 32, drop_path: 0.1}
method: {use: supervised}
data:
  {source: synthetic, synthetic_samples: 48, synthetic_classes: 10, group_size: 16, eval_crop_ratio: 1.0}
optim: {lr: 1e-3, warmup_epochs: 0.5, min_lr: 1e-5}
train: {epochs: 1, batch_size: 16}
engine: {device: cpu, precision: fp32, autotune: on, checkpoint_every: 0.34, keep_checkpoints: 3}
"""
FIRST, TOTAL = 1, 3


def checkpoint_of(run):
    return run / "checkpoints" / f"step_{FIRST:08d}"


@pytest.fixture
def fastest(monkeypatch, tmp_path):
    """`fastest(name)`: the candidate of that name is the fastest from now on. Nothing is compiled."""
    monkeypatch.setenv("FASTDEIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Op, "inductor", property(lambda op: op.native))

    def choose(name):
        def clock(candidate, call):
            call()
            return 1.0 if candidate == name else 2.0 if candidate == "reference" else 3.0

        monkeypatch.setattr(candidates, "with_launches", lambda device: clock)
        monkeypatch.setattr(candidates, "of_a_step", lambda device, timed: clock)

    return choose


def test_a_run_keeps_its_kernels_whatever_is_found_later(fastest, tmp_path, capsys):
    (tmp_path / "small.yaml").write_text(RECIPE)
    recipe, cpu = recipes.load(str(tmp_path / "small.yaml"), []), World(torch.device("cpu"))
    fastest("reference")
    train(recipe, tmp_path / "whole", cpu, resume=False)
    assert _tried.current() is None
    said = capsys.readouterr().out
    assert said.count("kernels: ") == 1
    assert "fused_adamw reference" in said
    assert "; the whole step default; stored in " in said
    assert f"stored in {tmp_path / 'cache'}" in said
    found = json.loads((tmp_path / "whole" / "environment.json").read_text())["kernels"]
    row = next(row for row in found if row["name"] == "fused_adamw")
    assert row["backend"] == "reference"
    assert row["reason"].startswith("fastest of reference, aten here")

    fastest("aten")
    (tmp_path / "resumed" / "checkpoints").mkdir(parents=True)
    shutil.copytree(checkpoint_of(tmp_path / "whole"), checkpoint_of(tmp_path / "resumed"))
    shutil.rmtree(tmp_path / "cache")
    train(recipe, tmp_path / "resumed", cpu, resume=True)
    assert_same_weights(tmp_path / "whole", tmp_path / "resumed", TOTAL)

    with pytest.raises(Interrupted):
        train(recipe, tmp_path / "other", StopAt(FIRST), resume=False)
    assert "fused_adamw aten" in capsys.readouterr().out
    mine, theirs = (stored(tmp_path / run, FIRST)["model.safetensors"] for run in ("whole", "other"))
    assert any(not torch.equal(mine[name], theirs[name]) for name in mine)  # the choice does change bits
