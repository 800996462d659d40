"""`fastdeit bench train`: steps on what the pipelines bring, and our share of the speed without input."""

import json

import pytest
import torch

from fastdeit import cli
from fastdeit.bench import (
    cells,
    data,
    data_peers,
    measure,
    peers,
    report,
    step,
    train,
)
from fastdeit.bench import (
    command as bench,
)
from fastdeit.bench.step import LR
from fastdeit.engine.step import Engine

TINY = "--image-size 32 --batch 4 --rounds 2 --threads 1 --device cpu"


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(data, "WARM_BATCHES", 1)
    monkeypatch.setattr(data, "TIMED_BATCHES", 2)
    monkeypatch.setattr(data, "IMAGES", 8)


@pytest.mark.slow
def test_a_row_has_all_that_is_needed_to_read_it(short, tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    flags = f"train data.erase=0 {TINY} --ema --peer timm --peer timm_compile_graph --out {out}"
    assert cli.main(["bench", *flags.split()]) == 0
    row = json.loads(out.read_text())
    sides = ["fastdeit", "fastdeit_resident", "timm"]
    assert list(row["seconds"]) == list(row["cpu_seconds"]) == list(row["work"]) == sides
    assert all(len(rounds) == 2 and min(rounds) > 0 for rounds in row["seconds"].values())
    assert (row["what"], row["model"], row["batch"], row["images"]) == ("train", "deit_tiny_patch16_224", 4, 8)
    assert (row["image_size"], row["precision"], row["ema"], row["threads"]) == (32, "fp32", True, 1)
    assert (row["recipe"], row["overrides"], row["erase"]) == ("deit_small", ["data.erase=0"], 0.0)
    assert row["failed"] == {"timm_compile_graph": "a CUDA graph needs a CUDA device"}
    assert list(row["ratio"]) == ["timm"]
    share = measure.median(row, "fastdeit_resident") / measure.median(row, "fastdeit")
    printed = capsys.readouterr().out
    assert f"{share:.1%} of its speed without input" in printed
    assert printed.count("without input") == 1
    assert "32 px, fp32, EMA, input of deit_small, data.erase=0, 2 interleaved rounds" in printed
    assert cells.CPU_NOTE in printed

    table = "\n".join(report.tables([row]))
    assert f"| {share:.1%} |" in table
    assert "EMA, input of deit_small, data.erase=0, 1 thread | timm |" in table
    assert [(item.ours, item.peer) for item in report.comparisons(row)] == [("fastdeit", "timm")]


@pytest.mark.slow
def test_every_batch_of_a_stream_is_trained_on_and_the_resident_side_repeats_one(short, monkeypatch):
    ours, theirs, streamed = [], [], []
    monkeypatch.setattr(Engine, "step", lambda engine, batches, lr: ours.append((batches[0].index.tolist(), lr)))
    monkeypatch.setattr(peers, "step_of", lambda *args: (lambda images: theirs.append(images.sum().item()), 1.0))

    def stream():
        for number in range(9):
            streamed.append(number)
            yield torch.full((4, 3, 32, 32), float(number))

    side = data.Side("counts", stream)
    monkeypatch.setattr(data_peers, "timm", lambda setting: side)
    args = cli.VERBS["bench train"].parser.parse_args([*TINY.split(), "--rounds", "1"])
    device = torch.device("cpu")
    row = train.measure(args, bench.cell(args, device), ["none"], ["timm"], device)
    assert row["work"] == {"fastdeit": data.OURS, "fastdeit_resident": "none", "timm": "counts"}

    # Built: one step on the first batch. Then in each measurement 1 that warms, 2 that count, in the stream's order.
    ones = 3.0 * 4 * 32 * 32
    assert theirs == [0.0, 0.0, 1 * ones, 2 * ones]
    assert streamed == [0, 0, 1, 2]
    indices = [index for index, lr in ours]
    assert {lr for _, lr in ours} == {LR}
    assert len(indices) == 1 + 3 + 3
    first, fed, resident = indices[0], indices[1:4], indices[4:]
    assert fed[0] == first
    assert len({tuple(index) for index in fed}) == 3
    assert resident == [first] * 3


def test_a_measurement_gives_every_worker_its_share(monkeypatch):
    monkeypatch.setattr(data, "TIMED_BATCHES", 16)
    args = cli.VERBS["bench data"].parser.parse_args(["--batch", "4"])
    for threads, timed in ((1, 16), (2, 16), (12, 24), (16, 16), (64, 64)):
        args.threads = threads
        with data.opened(args, torch.device("cpu")) as setting:
            assert setting.timed == timed
            assert setting.steps >= timed + data.WARM_BATCHES + 2 * threads
            assert data.facts(setting, [])["images"] == 4 * timed


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("train model.image_size=64", "model.image_size is set by the benchmark"),
        ("train train.batch_size=8", "train.batch_size is set by the benchmark"),
        ("train data.erase=2", "data.erase"),
        ("train --peer dali", "invalid choice: 'dali' (choose from"),
        ("train --model convnet_digits", "convnet_digits is no vision transformer"),
        ("train --recipe deit_smal", "did you mean deit_small"),
    ],
)
def test_mistakes(argv, message, capsys):
    assert cli.main(["bench", *argv.split(), "--device", "cpu"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.card
def test_every_side_on_a_card(short):
    device = torch.device("cuda", 0)
    args = cli.VERBS["bench train"].parser.parse_args(["--image-size", "32", "--batch", "16", "--rounds", "2"])
    row = train.measure(args, bench.cell(args, device), step.CAPTURES, ["timm", "timm_compile"], device)
    ours = {step.name_of(capture) for capture in step.CAPTURES}
    assert row["failed"] == {}
    assert row["seconds"].keys() == ours | {name + train.RESIDENT for name in ours} | {"timm", "timm_compile"}
