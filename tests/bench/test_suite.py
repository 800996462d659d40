"""`fastdeit bench suite` and `bench calibrate`, and the same grid under pytest-benchmark."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastdeit import cli
from fastdeit.bench import (
    calibrate,
    kernels,
    peers,
    step,
    suite,
)
from fastdeit.bench import (
    cells as bench_cells,
)
from fastdeit.bench.step import Cell
from fastdeit.kernels import _op, _triton
from fastdeit.kernels.optimizer import apex

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
ROOT = Path(__file__).parents[2]


def cells(*models):
    return [Cell("forward", f"deit_{model}_patch16_224", 2, 32, "fp32") for model in models]


@pytest.fixture
def small(monkeypatch, tmp_path):
    monkeypatch.setattr(suite, "grid", lambda device: iter(cells("tiny", "tiny_distilled")))
    return str(tmp_path / "rows.jsonl")


@pytest.mark.slow
def test_a_cell_without_room_is_recorded_and_the_suite_goes_on(small, monkeypatch, capsys):
    def full(wanted, device):
        if "distilled" in wanted.model:
            return peers.side(wanted, device, name="timm")
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(peers.PEERS, "timm", full)
    monkeypatch.setitem(step.OURS, "fastdeit", full)
    forgotten = []
    monkeypatch.setattr(suite, "forget", forgotten.append)
    argv = ["bench", "suite", "--device", "cpu", "--rounds", "1", "--peer", "timm", "--out", small]
    assert cli.main(argv) == 0
    first, second = map(json.loads, Path(small).read_text().splitlines())
    assert first["failed"] == dict.fromkeys(("fastdeit", "timm"), "OutOfMemoryError: CUDA out of memory")
    assert (first["seconds"], first["flops"], first["ratio"]) == ({}, {}, {})
    assert list(second["seconds"]) == ["fastdeit", "timm"]
    assert forgotten == [CPU, CPU]
    assert bench_cells.CPU_NOTE in capsys.readouterr().out


@pytest.mark.slow
def test_no_cell_begins_after_the_time_limit(small, monkeypatch, capsys):
    clock = iter([0.0, 1.0, 61.0])
    monkeypatch.setattr(suite, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    argv = ["bench", "suite", "--device", "cpu", "--rounds", "1", "--peer", "none", "--time-limit", "1", "--out", small]
    assert cli.main(argv) == 0
    assert len(Path(small).read_text().splitlines()) == 1
    assert "1 minutes are over; not measured:\n  forward of deit_tiny_distilled" in capsys.readouterr().out


def test_the_grid_on_a_card_begins_with_what_tells_most(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    grid = list(suite.grid(CUDA))
    assert len(set(grid)) == len(grid) == 3 * 2 * 2 * 2 * 2
    assert grid[0] == Cell("step", "deit_base_patch16_224", 256, 224, "bf16", None, True)
    assert grid[1] == Cell("step", "deit_base_distilled_patch16_224", 256, 224, "bf16", "regnety_160", True)
    assert [cell.model for cell in grid[2:6:2]] == ["deit_small_patch16_224", "deit_tiny_patch16_224"]
    assert {(cell.batch, cell.image_size) for cell in grid} == {(256, 224), (64, 224), (256, 384), (64, 384)}
    assert suite.captures(grid[0], CUDA) == ("none", "graph")
    assert suite.captures(grid[-1], CUDA) == ("none",)
    assert suite.peers(grid[0], bench_cells.STEP_PEERS) == [*bench_cells.STEP_PEERS]
    assert suite.peers(grid[-1], bench_cells.STEP_PEERS) == [*bench_cells.STEP_PEERS[:-2]]
    sides = list(bench_cells.builders(("none", "graph"), bench_cells.STEP_PEERS))
    assert sides == ["fastdeit", *bench_cells.STEP_PEERS, "fastdeit_graph"]


def test_the_grid_on_a_cpu_is_small():
    grid = list(suite.grid(CPU))
    assert {(cell.batch, cell.image_size, cell.precision) for cell in grid} == {(8, 224, "fp32")}
    assert {cell.what for cell in grid} == {"step", "forward"}
    assert {cell.teacher for cell in grid} == {None, "regnety_002"}
    assert suite.captures(grid[0], CPU) == ("none",)


@pytest.mark.slow
def test_calibration_is_a_row_a_part(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setitem(suite.TEACHERS, "cpu", "test_resnet")
    out = tmp_path / "rows.jsonl"
    argv = ["bench", "calibrate", "--device", "cpu", "--batch", "1", "--rounds", "2", "--out", str(out)]
    assert cli.main(argv) == 0
    rows = {row["part"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert list(rows) == ["gemm", "attention", "layer_norm", "mlp", "teacher"]
    gemm = rows["gemm"]
    assert len(gemm["seconds"]) == 12 + 1
    assert gemm["flops"]["fc1_weight_gradient"] == gemm["flops"]["fc2_forward"] == 2 * 198 * 192 * 768
    assert {"library", "reference"} <= set(rows["attention"]["seconds"])
    assert set(rows["attention"]["failed"]) == {"flash", "cudnn", "efficient"}
    for part in ("layer_norm", "mlp"):
        assert rows[part]["bytes"]["reference"] > 0
    assert rows["mlp"]["flops"]["reference"] == 3 * 2 * (2 * 198 * 192 * 768)
    convnet = ["eager", "eager_channels_last", "compile", "compile_channels_last"]
    assert list(rows["teacher"]["flops"]) == convnet
    printed = capsys.readouterr().out
    assert "flash                  cannot run: the CPU has one attention kernel" in printed
    assert "TFLOP/s" in printed


def test_attention_of_the_library_is_that_of_ours():
    torch.manual_seed(0)
    qkv = torch.randn(2, 5, 3 * 128, requires_grad=True)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = calibrate._trained(qkv, 2, None)
    ours = torch.autograd.grad(out := calibrate.kernels.kernels.attention(qkv, 2), qkv, out.detach())[0]
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("direction", ["forward", "input_gradient", "weight_gradient"])
def test_products_have_the_flops_they_claim(direction):
    from torch.utils.flop_counter import FlopCounterMode

    side = calibrate._product(direction, 6, 4, 2, torch.float32, CPU)
    with FlopCounterMode(display=False) as counter:
        side.call()
    assert counter.get_total_flops() == side.flops


def test_apex_is_measured_on_a_card_and_told_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(_triton, "_arch_of", lambda device: 90)
    monkeypatch.setattr(apex, "_kernels", lambda: None)
    sides = dict(kernels._sides("fused_adamw", CUDA))
    with pytest.raises(kernels.bench_measure.CannotRun, match="NVIDIA apex with its CUDA extensions"):
        sides["apex"](None)
    monkeypatch.setattr(apex, "_kernels", lambda: object())
    called = []
    monkeypatch.setattr(kernels, "_chosen", lambda op, chosen, work: called.append((op.name, chosen)))
    dict(kernels._sides("fused_adamw", CUDA))["apex"](None)
    assert called == [("fused_adamw", "apex")]
    assert "apex" not in dict(kernels._sides("fused_adamw", CPU))
    assert "apex" in {backend.name for backend in _op.OPS["fused_adamw"].backends}


@pytest.mark.slow
def test_the_pytest_benchmarks_collect_and_one_runs(tmp_path):
    results = tmp_path / "benchmark.json"
    chosen = "forward and not distilled and fastdeit"
    command = [sys.executable, "-m", "pytest", "-q", "benchmarks", "-k", chosen, f"--benchmark-json={results}"]
    # pytest-benchmark measures nothing in a worker of pytest-xdist, which this may be, but that is none.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^1 passed, \d+ deselected", done.stdout, re.MULTILINE)
    (found,) = json.loads(results.read_text())["benchmarks"]
    assert found["group"] == "forward of deit_tiny_patch16_224, batch 8, 224 px"
    assert found["extra_info"]["side"] == "fastdeit"
    assert found["extra_info"]["images_per_s"] == pytest.approx(8 / found["stats"]["median"])
    assert found["extra_info"]["environment"]["torch"]["version"] == torch.__version__
