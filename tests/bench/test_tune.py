"""`fastdeit kernels tune` on the CPU, with a clock of its own and nothing compiled."""

import json

import pytest

from fastdeit import cli
from fastdeit.kernels import _tried
from fastdeit.kernels._op import OPS, Op
from fastdeit.kernels.trial import candidates

COMMAND = ["kernels", "tune", "--model", "deit_digits_distilled_patch8_32", "--batch", "2", "--device", "cpu"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a clock by which each candidate is faster than the one before it."""
    seconds = {}

    def clock(name, call):
        call()
        return seconds.setdefault(name, 1 / (1 + len(seconds)))

    monkeypatch.setenv("FASTDEIT_CACHE", str(tmp_path))
    monkeypatch.setattr(Op, "inductor", property(lambda op: op.native))
    monkeypatch.setattr(candidates, "with_launches", lambda device: clock)
    monkeypatch.setattr(candidates, "of_a_step", lambda device, timed: clock)
    return tmp_path / "kernels"


def test_a_table_of_all_ops_of_a_step(cache, capsys):
    assert cli.main(COMMAND) == 0
    out = capsys.readouterr().out
    (file,) = cache.glob("*.json")
    rows, (whole,) = map(json.loads(file.read_text()).get, ("rows", "wholes"))
    ops = {row["op"] for row in rows}
    assert ops == {
        *("patchify", "layer_norm", "attention", "query_attention", "add_layer_norm", "mlp"),
        *("distillation_loss", "global_norm", "fused_adamw"),
    }
    assert ops < set(OPS)
    assert out.startswith("kernels: ")
    assert out.splitlines()[0].endswith(f"stored in {file}")
    for row in rows:
        assert f"\n{row['op']}: up to {row['shape'][0]} rows, " in out
    assert out.count("  chosen\n") == len(rows) + 1
    assert out.count("  reference ") == len(rows) + 1
    assert list(whole["seconds"]) == ["default", "reference"]  # inductor is the fastest of every op here
    assert "\na forward and backward as a whole, by preset\n  reference " in out
    assert whole["preset"] == "reference"  # by this clock
    assert "only with engine.autotune=on" in out
    assert _tried.current() is None
    assert cli.main([*COMMAND, "--budget", "1e9"]) == 0  # again, whatever is known
    assert f"; stored in {file}" in capsys.readouterr().out


def test_a_budget_of_zero_says_what_that_means(cache, capsys):
    assert cli.main([*COMMAND, "--budget", "0"]) == 0
    assert capsys.readouterr().out.startswith(
        "kernels: nothing was tried; the budget of 0 s left no time, hence PyTorch's own operations, for patchify, "
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--budget", "-1"], "--budget -1: give seconds, 0 or more"),
        (["--budget", "nan"], "--budget nan: give seconds, 0 or more"),
        (["--graph"], "--graph: a CUDA graph needs a CUDA device"),
        (["--model", "deit_huge"], "deit_huge"),
    ],
)
def test_bad_usage(cache, flags, message, capsys):
    assert cli.main([*COMMAND, *flags]) == 2
    assert message in capsys.readouterr().err
