"""`fastdeit bench report`: what rows of any age say, and nothing that they do not."""

import json

import pytest

from fastdeit import cli
from fastdeit.bench import cells as bench_cells
from fastdeit.bench import report as bench_report
from fastdeit.estimate import rows as estimate_rows

CARD = {"gpus": [{"name": "NVIDIA H200"}], "fastdeit": {"code": "abc123"}, "time": "2026-11-22T00:00:00+00:00"}
HERE = {
    "gpus": [],
    "fastdeit": {"code": None},
    "processor": {"cores": 2, "model": "EPYC"},
    "time": "2026-11-21T00:00:00+00:00",
}


def row(**changes):
    sides = {"fastdeit": [1.0, 2.0, 4.0], "fastdeit_graph": [1.0, 1.0, 1.0], "timm": [3.0, 3.0, 4.0]}
    given = {"what": "step", "device": "cuda", "model": "deit_base_patch16_224", "batch": 256, "images": 256}
    given |= {"image_size": 224, "precision": "bf16", "teacher": "regnety_160", "ema": True, "drop_path": 0.1}
    given |= {"seconds": sides, "cpu_seconds": sides, "environment": CARD, "failed": {"accelerate": "it broke"}}
    given |= {"flops": dict.fromkeys(sides, 4e12), "matrix_flops_per_s": 8e12}
    return given | {"peak_bytes": dict.fromkeys(sides, 3 * 2**30)} | changes


def report(tmp_path, capsys, *rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in rows))
    assert cli.main(["bench", "report", str(tmp_path / "out"), "--results", str(path)]) == 0
    return capsys.readouterr().out


def cells(printed, side):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed.splitlines() if f"| {side} |" in line]


def test_tables_and_the_picture(tmp_path, capsys):
    forward = row(what="forward", teacher=None, ema=False, device="cpu", environment=HERE)
    forward["cpu_seconds"] = {"fastdeit": [4.0, 4.0], "fastdeit_graph": [1.0, 1.0], "timm": [4.0, 6.0]}
    printed = report(tmp_path, capsys, row(), forward)
    name = "deit_base_patch16_224, batch 256, 224 px, bf16, teacher regnety_160, EMA"
    assert "\n## step on NVIDIA H200\n" in printed
    assert cells(printed, "fastdeit")[1] == [name, "fastdeit", "128.0", "", "", "25.0%", "3.00", "4.00", "abc123"]
    compared = "fastdeit 1.50 (1.00 to 3.00); fastdeit_graph 3.00 (3.00 to 4.00)"
    assert cells(printed, "timm")[1] == [name, "timm", "85.3", compared, "", "16.7%", "3.00", "1.33", "abc123"]
    assert "accelerate cannot run in 1 of these cells: it broke" in printed
    assert "\n## forward on CPU (EPYC, 2 cores)\n\nThese are figures of a CPU" in printed
    assert cells(printed, "timm")[0][0] == "deit_base_patch16_224, batch 256, 224 px, bf16"
    assert cells(printed, "timm")[0][4] == "fastdeit 1.25 (1.00 to 1.50); fastdeit_graph 5.00 (4.00 to 6.00)"
    assert (tmp_path / "out" / "benchmarks.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["benchmarks.png"]


def test_the_least_flattering_ratio_is_told_first(tmp_path, capsys):
    seconds = {"timm": [4.0], "fastdeit": [2.0], "timm_compile": [1.0], "accelerate": [3.0]}
    found = row(seconds=seconds, flops=dict.fromkeys(seconds, 1.0))
    printed = report(tmp_path, capsys, found)
    table = [line for line in printed.splitlines() if line.startswith("| deit_base")]
    assert [line.split(" | ")[1] for line in table] == ["fastdeit", "timm_compile", "accelerate", "timm"]
    assert [item.peer for item in bench_report.comparisons(found)] == ["timm_compile", "accelerate", "timm"]


def test_what_is_drawn(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    titles, points = [], []
    monkeypatch.setattr(Axes, "set_title", lambda self, text, **options: titles.append(text))
    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, x, *rest, **how: points.append(x) or plot(self, x, *rest, **how))
    bench_report.draw([row(), row(device="cpu", environment=HERE), row(seconds={})], tmp_path / "a.png")
    assert titles == [f"step on CPU (EPYC, 2 cores)\n{bench_cells.CPU_NOTE}", "step on NVIDIA H200"]
    assert points == [[1.0, 3.0], 1.5, [3.0, 4.0], 3.0] * 2


def test_the_newest_row_of_a_cell_counts(tmp_path, capsys):
    later = row(seconds={"fastdeit": [0.5]}, environment=CARD | {"time": "2026-12-01T00:00:00+00:00"})
    for rows in ((row(), later), (later, row())):
        printed = report(tmp_path, capsys, *rows, row(batch=64))
        assert [line[2] for line in cells(printed, "fastdeit")] == ["512.0", "128.0"]
        assert "1 rows left out: a newer row of the same cell is there" in printed


def test_older_rows_are_read_or_counted(tmp_path, capsys):
    sides = {"fastdeit": [0.5, 1.0], "timm": [1.0, 2.0]}
    common = {"seconds": sides, "device": "cpu", "batch": 16, "images": 16, "environment": HERE}
    first = common | {"what": "step", "model": "deit_tiny_patch16_224", "ratio": {"timm": 2.0}}
    printed = report(tmp_path, capsys, first, common | {"what": "data"}, common | {"what": "data"}, {"what": "flight"})
    cell = "deit_tiny_patch16_224, batch 16, fp32"
    assert cells(printed, "timm") == [[cell, "timm", "10.7", "2.00 (2.00 to 2.00)", "", "", "", "2.00", "?"]]
    assert "2 rows left out: older rows of data, without recipe, work" in printed
    assert "1 rows left out: rows of 'flight' are not known" in printed


def test_a_side_of_data_is_compared_with_ours_that_ends_at_the_same_place(tmp_path, capsys):
    sides = {"fastdeit": [2.0], "fastdeit_uint8": [1.0], "timm": [6.0], "timm_uint8": [4.0]}
    data = {"what": "data", "device": "cpu", "recipe": "deit_small", "batch": 4, "images": 8, "threads": 1, "work": {}}
    printed = report(tmp_path, capsys, data | {"seconds": sides, "cpu_seconds": sides, "environment": HERE})
    assert cells(printed, "timm")[0][3] == "3.00 (3.00 to 3.00)"
    assert cells(printed, "timm_uint8")[0][2:5] == ["2.0", "4.00 (4.00 to 4.00)", "2.0"]


def test_kernels_and_calibration(tmp_path, capsys):
    common = {"device": "cuda", "model": "deit_base", "batch": 64, "environment": CARD, "failed": {"apex": "not there"}}
    kernel = {"what": "kernel", "op": "mlp", "dtype": "bf16", "bytes": 100, "copy_bytes": 200}
    kernel |= {"seconds": {"triton": [1e-6], "copy": [1e-6]}}
    part = {"what": "calibrate", "part": "gemm", "precision": "bf16", "seconds": {"qkv_forward": [0.5], "copy": [1.0]}}
    part |= {"flops": {"qkv_forward": 3e12}, "bytes": {"qkv_forward": None, "copy": 2e9}}
    printed = report(tmp_path, capsys, common | kernel, common | part)
    assert cells(printed, "triton")[0][2:4] == ["1.0", "50.0%"]
    assert cells(printed, "qkv_forward")[0][2:5] == ["500000.0", "6", ""]
    assert cells(printed, "copy")[0][2:5] == ["1000000.0", "", "2"]
    assert "apex cannot run in 1 of these cells: not there" in printed
    assert not (tmp_path / "out").exists()  # nothing to draw


def test_a_cell_in_which_nothing_ran_is_told(tmp_path, capsys):
    printed = report(tmp_path, capsys, row(seconds={}, failed={"fastdeit": "OutOfMemoryError: no room"}))
    assert "fastdeit cannot run in 1 of these cells: OutOfMemoryError: no room" in printed


def test_the_rows_of_this_project_are_readable():
    paths = sorted(estimate_rows.RESULTS.glob("*.jsonl"))
    rows, skipped = bench_report.read(paths)
    assert rows
    assert all("without" in why or "newer" in why for why in skipped)
    assert list(bench_report.tables(rows))


@pytest.mark.parametrize(
    ("text", "message"),
    [("{}\nnonsense\n", "rows.jsonl:2 is no JSON"), ("[1, 2]\n", "rows.jsonl:1 is no row of a benchmark, but [1, 2]")],
)
def test_a_file_that_holds_no_rows(tmp_path, capsys, text, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    assert cli.main(["bench", "report", "--results", str(path)]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "changes",
    [
        {"seconds": 5},
        {"seconds": {"fastdeit": []}},
        {"seconds": {"fastdeit": 1.0}},
        {"environment": None},
        {"environment": {"gpus": []}},
    ],
)
def test_damaged_rows_are_counted(tmp_path, capsys, changes):
    printed = report(tmp_path, capsys, row(batch=64), row(**changes))
    assert "1 rows left out: damaged rows of step" in printed
    assert cells(printed, "fastdeit")


def test_a_folder_that_cannot_be_written(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row()) + "\n")
    assert cli.main(["bench", "report", str(path / "docs"), "--results", str(path)]) == 2
    assert "docs cannot be written: " in capsys.readouterr().err


def test_files_that_are_not_there(tmp_path, capsys, monkeypatch):
    assert cli.main(["bench", "report", str(tmp_path), "--results", str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl cannot be read" in capsys.readouterr().err
    monkeypatch.setattr(estimate_rows, "RESULTS", tmp_path)
    assert cli.main(["bench", "report", str(tmp_path)]) == 2
    assert "name files with --results FILE" in capsys.readouterr().err
