"""`fastdeit bench parity`: the comparison finds a difference where there is one, and none where there is none."""

import json

import pytest
import torch

from fastdeit import cli
from fastdeit.bench import parity, parity_peer
from fastdeit.recipe import resolve as recipes

# float32 rounds differently in the two orders of summation; after a few steps that is all there is.
ROUNDING = 2e-6


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in parity.CASES])
def test_fifty_steps_are_timm_s(name):
    row = parity.compare(name, steps=50, batch=8, image_size=64)
    assert row["loss"] < ROUNDING
    assert row["weights"] < 5e-4
    assert row["average"] < 5e-4
    assert row["losses"][-1] < 0.8 * row["losses"][0]  # there was something to learn


def test_five_steps_are_timm_s():
    row = parity.compare("hard", steps=5, batch=4, image_size=32)
    assert row["loss"] < ROUNDING
    assert row["weights"] < 5e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting", ["optim.weight_decay=0.5", "method.smoothing=0.0", "optim.ema_decay=0.9", "optim.min_lr=0.0"]
)
def test_another_setting_shows(setting, monkeypatch):
    made = parity_peer.Peer

    def changed(recipe, *given):
        return made(recipes.override(recipe, [setting]), *given)

    monkeypatch.setattr(parity, "Peer", changed)
    row = parity.compare("clip", steps=10, batch=4, image_size=32)
    assert max(row["loss"] / ROUNDING, row["weights"] / 5e-4, row["average"] / 5e-4) > 1


@pytest.mark.slow
def test_the_verb(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    words = ["--case", "finetune", "--steps", "5", "--batch", "4", "--image-size", "32", "--out", str(out)]
    assert cli.main(["bench", "parity", *words]) == 0
    assert "finetune    5 steps, loss " in capsys.readouterr().out
    row = json.loads(out.read_text())
    assert (row["what"], row["case"], row["steps"], row["image_size"]) == ("parity", "finetune", 5, 48)
    assert len(row["losses"]) == len(row["peer_losses"]) == 5


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--steps", "7"], "--steps 7: must be a multiple of 5"),
        (["--batch", "6"], "--batch 6: must be a multiple of 4"),
        (["--image-size", "48"], "--image-size 48: must be a multiple of 32"),
        (["--case", "other"], "--case"),
    ],
)
def test_bad_words(words, reason, capsys):
    assert cli.main(["bench", "parity", *words]) == 2
    assert reason in capsys.readouterr().err


def test_given_drop_path():
    drop = parity_peer.GivenDropPath(0.25)
    drop.uniforms = torch.tensor([0.1, 0.25, 0.9])
    x = torch.ones(3, 2, 2)
    assert drop(x)[:, 0, 0].tolist() == pytest.approx([0.0, 4 / 3, 4 / 3])
    assert torch.equal(drop.eval()(x), x)
