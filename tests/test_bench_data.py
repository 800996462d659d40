"""`fastdeit bench data`: every side makes the model's input, and CPU time counts wherever it is used."""

import io
import json
import time
from contextlib import nullcontext
from multiprocessing import get_context
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fastdeit import bench_data, cli
from fastdeit import recipe as recipes
from fastdeit.data.source import SyntheticSource

BURNT = 0.2


def burn(done, stop):
    while time.process_time() < BURNT:
        pass
    done.set()
    stop.wait()


def test_cpu_time_of_worker_processes_counts():
    context = get_context("fork")
    done, stop = context.Event(), context.Event()
    worker = context.Process(target=burn, args=(done, stop), daemon=True)
    own, all_of_us = time.process_time(), bench_data.cpu_seconds()
    worker.start()
    assert done.wait(60)
    all_of_us, own = bench_data.cpu_seconds() - all_of_us, time.process_time() - own
    stop.set()
    worker.join()
    assert all_of_us > own + BURNT / 2


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(bench_data, "WARM_BATCHES", 1)
    monkeypatch.setattr(bench_data, "TIMED_BATCHES", 1)
    monkeypatch.setattr(bench_data, "IMAGES", 8)


@pytest.fixture
def small(tmp_path):
    """Input of 64 x 64 pixels from 8 files, 4 a batch."""
    bench_data._write_images(tmp_path, 8)
    overrides = [f"data.root={tmp_path}", "train.batch_size=4", "data.group_size=4", "data.repeats=1", "data.threads=1"]
    recipe = recipes.load("deit_tiny", [*overrides, "model.image_size=64"])
    return bench_data.Setting(recipe, torch.device("cpu"))


@pytest.mark.parametrize("name", ["fastdeit", "timm", "torchvision", "dali"])
def test_every_side_ends_with_the_models_input(short, small, name):
    stream = bench_data._STREAMS[name](small)
    images = next(stream)
    stream.close()
    assert (images.dtype, images.shape) == (torch.float32, (4, 3, 64, 64))
    assert 0.3 < images.std() < 2.5
    assert abs(images.mean()) < 1.5


def test_a_row_has_all_that_is_needed_to_read_it(short, tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    flags = f"--peer dali --batch 4 --rounds 2 --threads 1 --device cpu --out {out}"
    assert cli.main(["bench", "data", *flags.split()]) == 0
    row = json.loads(out.read_text())
    assert list(row["seconds"]) == list(row["cpu_seconds"]) == list(row["work"]) == ["fastdeit", "dali"]
    assert all(len(rounds) == 2 and min(rounds) > 0 for rounds in row["seconds"].values())
    assert (row["recipe"], row["augment"]) == ("deit_small", "rand-m9-mstd0.5-inc1")
    assert (row["batch"], row["images"], row["threads"]) == (4, 4, 1)
    assert "per CPU-second" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "shape"), [("fastdeit_uint8", (4, 64, 64, 3)), ("timm_uint8", (4, 3, 64, 64))])
def test_the_hosts_part_ends_with_bytes(short, small, name, shape):
    stream = bench_data._STREAMS[name](small)
    images = next(stream)
    stream.close()
    assert (images.dtype, images.shape) == (torch.uint8, shape)


def test_a_side_is_compared_with_ours_that_ends_at_the_same_place(monkeypatch, tmp_path):
    seconds = {"fastdeit": 2.0, "fastdeit_uint8": 1.0, "timm": 6.0, "timm_uint8": 4.0}
    sides = {name: lambda value=value: (value, value / 2) for name, value in seconds.items()}
    monkeypatch.setattr(bench_data, "sides", lambda args, device: nullcontext((sides, {"images": 8, "batch": 4})))
    out = tmp_path / "rows.jsonl"
    assert cli.main(["bench", "data", "--device", "cpu", "--rounds", "2", "--out", str(out)]) == 0
    row = json.loads(out.read_text())
    assert row["ratio"] == row["cpu_ratio"] == {"timm": 3.0, "timm_uint8": 4.0}


def test_the_stream_goes_on_beyond_what_is_timed(short, tmp_path, monkeypatch):
    taken = []
    monkeypatch.setitem(bench_data._STREAMS, "fastdeit", lambda setting: (taken.append(i) for i in range(99)))
    args = SimpleNamespace(threads=3, batch=4, peer="none", recipe="deit_tiny")
    with bench_data.sides(args, torch.device("cpu")) as (sides, facts):
        sides["fastdeit"]()
    assert len(taken) == bench_data.WARM_BATCHES + bench_data.TIMED_BATCHES
    assert facts["images"] == bench_data.TIMED_BATCHES * 4
    setting = bench_data.Setting(recipes.load("deit_tiny", ["data.threads=3"]), torch.device("cpu"))
    assert setting.steps >= len(taken) + 2 * 3


def test_repeated_files_are_those_of_their_class(short, tmp_path):
    bench_data._write_images(tmp_path, 20)
    files = sorted((tmp_path / "train").rglob("*.jpg"), key=lambda path: path.name)
    assert len(files) == 20
    assert files[3].read_bytes() == files[11].read_bytes() != files[4].read_bytes()
    assert files[3].parent == files[11].parent


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["data", "--recipe", "three.yaml"],
            "the peers only have the random resized crop and augment rand-",
        ),
        (["data", "--recipe", "simple.yaml"], "not crop simple, augment rand-m9-mstd0.5-inc1"),
        (["data", "--recipe", "jitter.yaml"], "color_jitter 0.4"),
        (["data", "--recipe", "deit_smal"], "did you mean 'deit_small'?"),
        (["data", "--batch", "3"], "must be even"),
    ],
)
def test_what_cannot_be_compared(short, tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    for name, data in (
        ("three", "augment: three_augment"),
        ("simple", "crop: simple"),
        ("jitter", "augment: none, color_jitter: 0.4"),
    ):
        (tmp_path / f"{name}.yaml").write_text(f"base: deit_tiny\ndata: {{{data}}}\n")
    assert cli.main(["bench", *argv]) == 2
    assert message in capsys.readouterr().err


def test_posterize_of_timm_keeps_a_bit_and_is_left_as_it_was():
    from timm.data import auto_augment

    image = Image.open(io.BytesIO(SyntheticSource(2, classes=2, size=(16, 16)).read(0)))
    before = auto_augment.NAME_TO_OP["PosterizeIncreasing"]
    with bench_data._posterize_keeps_a_bit():
        kept = auto_augment.NAME_TO_OP["PosterizeIncreasing"](image, 0)
    assert set(np.unique(np.asarray(kept))) <= {0, 128}
    assert auto_augment.NAME_TO_OP["PosterizeIncreasing"] is before
