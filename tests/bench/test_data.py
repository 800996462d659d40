"""`fastdeit bench data`: rows that say what was measured, and CPU time that counts wherever it is used."""

import json
import time
from contextlib import nullcontext
from multiprocessing import get_context
from types import SimpleNamespace

import pytest
import torch

from fastdeit import cli
from fastdeit.bench import data, data_peers, report
from fastdeit.bench.data import Side
from fastdeit.data.plan.plan import Augment
from fastdeit.recipe import resolve as recipes
from fastdeit.run import build

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
    own, all_of_us = time.process_time(), data.cpu_seconds()
    worker.start()
    assert done.wait(60)
    all_of_us, own = data.cpu_seconds() - all_of_us, time.process_time() - own
    stop.set()
    worker.join()
    assert all_of_us > own + BURNT / 2


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(data, "WARM_BATCHES", 1)
    monkeypatch.setattr(data, "TIMED_BATCHES", 1)
    monkeypatch.setattr(data, "IMAGES", 8)


@pytest.mark.slow
def test_a_row_has_all_that_is_needed_to_read_it(short, tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    flags = f"--peer dali --batch 4 --rounds 2 --threads 1 --device cpu --out {out}"
    assert cli.main(["bench", "data", *flags.split()]) == 0
    row = json.loads(out.read_text())
    names = ["fastdeit", "fastdeit_uint8", "fastdeit_decoder", "dali", "dali_uint8"]
    assert list(row["seconds"]) == list(row["cpu_seconds"]) == list(row["work"]) == names
    assert all(len(rounds) == 2 and min(rounds) > 0 for rounds in row["seconds"].values())
    assert (row["recipe"], row["augment"]) == ("deit_small", "rand-m9-mstd0.5-inc1")
    assert (row["batch"], row["images"], row["threads"]) == (4, 4, 1)
    assert "per CPU-second" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "facts", "said"),
    [
        (
            "data.augment=three_augment data.crop=simple data.erase=0",
            {"augment": "three_augment", "crop": "simple", "erase": 0.0, "evaluation": False},
            "data of deit_small, data.augment=three_augment, data.crop=simple, data.erase=0 on cpu, batch 4",
        ),
        (
            "--eval --recipe deit_base data.eval_crop_ratio=1.0",
            {"recipe": "deit_base", "eval_crop_ratio": 1.0, "evaluation": True},
            "data of deit_base, data.eval_crop_ratio=1.0, evaluation on cpu, batch 4",
        ),
    ],
)
def test_a_row_says_which_input_it_is(short, tmp_path, capsys, flags, facts, said):
    out = tmp_path / "rows.jsonl"
    common = f"--peer none --batch 4 --rounds 1 --threads 1 --device cpu --out {out}"
    assert cli.main(["bench", "data", *flags.split(), *common.split()]) == 0
    row = json.loads(out.read_text())
    assert facts.items() <= row.items()
    assert list(row["seconds"]) == ["fastdeit", "fastdeit_uint8", "fastdeit_loader", "fastdeit_decoder"]
    assert list(row["decoder_share"]) == list(row["decoder_cpu_share"]) == list(row["seconds"])[:-1]
    assert ("crop" in row) != row["evaluation"]
    assert said in capsys.readouterr().out
    assert report.cell(row) == said.removeprefix("data of ").replace(" on cpu", "") + ", 1 threads"


def test_a_peer_that_cannot_run_says_why_and_the_others_go_on(short, tmp_path, capsys, monkeypatch):
    def broken():
        raise OSError("no such codec")
        yield

    monkeypatch.setitem(data_peers._SIDES, "dali", lambda setting: Side("nothing", broken))
    monkeypatch.setitem(data_peers._PEERS, "dali", ["deit", "dali", "torchvision"])
    out = tmp_path / "rows.jsonl"
    flags = f"--peer dali data.crop=simple data.augment=none --batch 4 --rounds 2 --threads 1 --device cpu --out {out}"
    assert cli.main(["bench", "data", *flags.split()]) == 0
    row = json.loads(out.read_text())
    assert list(row["seconds"]) == ["fastdeit", "torchvision"]
    assert row["failed"] == {
        "deit": "facebookresearch/deit has the simple crop with 3-Augment only",
        "dali": "OSError: no such codec",
    }
    assert list(row["ratio"]) == ["torchvision"]
    printed = capsys.readouterr().out
    assert "deit         cannot run: facebookresearch/deit has" in printed
    assert "dali         cannot run: OSError: no such codec" in printed


def test_without_ours_nothing_is_compared(monkeypatch, tmp_path):
    def broken():
        raise OSError("no")

    sides = {"fastdeit": broken, "timm": lambda: (1.0, 1.0)}
    facts = {"recipe": "r", "images": 8, "batch": 4, "failed": {}}
    monkeypatch.setattr(data_peers, "sides", lambda args, device: nullcontext((sides, facts)))
    out = tmp_path / "rows.jsonl"
    assert cli.main(["bench", "data", "--device", "cpu", "--rounds", "1", "--out", str(out)]) == 0
    row = json.loads(out.read_text())
    assert (row["ratio"], row["failed"]) == ({}, {"fastdeit": "OSError: no"})


def test_a_side_is_compared_with_ours_that_ends_at_the_same_place(monkeypatch, tmp_path):
    seconds = {"fastdeit": 2.0, "fastdeit_uint8": 1.0, "timm": 6.0, "timm_uint8": 4.0}
    sides = {name: lambda value=value: (value, value / 2) for name, value in seconds.items()}
    facts = {"recipe": "r", "images": 8, "batch": 4, "failed": {}}
    monkeypatch.setattr(data_peers, "sides", lambda args, device: nullcontext((sides, facts)))
    out = tmp_path / "rows.jsonl"
    assert cli.main(["bench", "data", "--device", "cpu", "--rounds", "2", "--out", str(out)]) == 0
    row = json.loads(out.read_text())
    assert row["ratio"] == row["cpu_ratio"] == {"timm": 3.0, "timm_uint8": 4.0}


def test_a_row_says_what_the_decoder_alone_takes_of_each_side_of_ours(monkeypatch, tmp_path, capsys):
    seconds = {"fastdeit": 4.0, "fastdeit_uint8": 2.5, "fastdeit_decoder": 2.0, "timm": 8.0}
    cpu_seconds = {"fastdeit": 8.0, "fastdeit_uint8": 4.0, "fastdeit_decoder": 3.0, "timm": 15.0}
    sides = {name: lambda name=name: (seconds[name], cpu_seconds[name]) for name in seconds}
    facts = {"recipe": "r", "images": 8, "batch": 4, "work": {}, "failed": {}}
    monkeypatch.setattr(data_peers, "sides", lambda args, device: nullcontext((sides, facts)))
    out = tmp_path / "rows.jsonl"
    assert cli.main(["bench", "data", "--device", "cpu", "--rounds", "1", "--out", str(out)]) == 0
    row = json.loads(out.read_text())
    assert row["decoder_share"] == {"fastdeit": 0.5, "fastdeit_uint8": 0.8}
    assert row["decoder_cpu_share"] == {"fastdeit": 0.375, "fastdeit_uint8": 0.75}
    assert list(row["ratio"]) == ["timm"]
    printed = capsys.readouterr().out
    assert "1.00 per CPU-second); the decoder alone takes 50.0% of its time (37.5% of its CPU time)\n" in printed
    lines = [line.split(" | ") for line in report.tables([row])]
    (column,) = (line.index("of its CPU time the decoder") for line in lines if line[0] == "| cell")
    assert [line[column] for line in lines if "batch 4" in line[0]] == ["37.5%", "75.0%", "", ""]


def test_the_stream_goes_on_beyond_what_is_timed(short, tmp_path, monkeypatch):
    taken = []
    monkeypatch.setattr(data, "TIMED_BATCHES", 3)
    counted = Side("counted", lambda: (taken.append(i) for i in range(99)))
    monkeypatch.setitem(data_peers._SIDES, "fastdeit", lambda setting: counted)
    args = SimpleNamespace(threads=3, batch=4, peer="none", recipe="deit_tiny", overrides=[], eval=False)
    with data_peers.sides(args, torch.device("cpu")) as (sides, facts):
        sides["fastdeit"]()
    assert len(taken) == data.WARM_BATCHES + data.TIMED_BATCHES
    assert facts["images"] == data.TIMED_BATCHES * 4
    setting = data.Setting(recipes.load("deit_tiny", ["data.threads=3"]), torch.device("cpu"))
    assert setting.steps >= len(taken) + 2 * 3


def test_repeated_files_are_those_of_their_class(short, tmp_path):
    data._write(tmp_path, 20)
    files = sorted(tmp_path.rglob("*.jpg"), key=lambda path: path.name)
    assert len(files) == 20
    assert files[3].read_bytes() == files[11].read_bytes() != files[4].read_bytes()
    assert files[3].parent == files[11].parent


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--peer dali data.augment=v0", "deit_small has nothing to be compared with: DALI has no augment v0"),
        ("--peer timm data.augment=trivial", "nothing to be compared with: timm has no augment trivial"),
        ("data.threads=4", "data.threads is set by the benchmark (by flags: --batch, --threads)"),
        ("--eval train.batch_size=4", "train.batch_size is set by the benchmark"),
        ("data.crop=smple", "did you mean simple?"),
        ("--recipe deit_smal", "did you mean deit_small"),
        ("--batch 3", "must be even"),
    ],
)
def test_what_cannot_be_compared(short, capsys, argv, message):
    assert cli.main(["bench", "data", *argv.split()]) == 2
    assert message in capsys.readouterr().err


def test_ours_makes_images_of_the_size_that_peers_make(short):
    args = SimpleNamespace(threads=1, batch=4, recipe="deit_small_progressive", overrides=[], eval=False)
    with data.opened(args, torch.device("cpu")) as setting:
        assert build.augmentations(setting.recipe, 0)[0].size == setting.size == (224, 224)


def test_several_views_of_a_sample_are_nobodys(short, capsys, monkeypatch):
    monkeypatch.setattr(data.build, "augmentations", lambda recipe: (Augment(), Augment(stream="second")))
    assert cli.main(["bench", "data", "--peer", "none"]) == 2
    assert "recipe deit_small: its method wants several views of a sample" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("step data.augment=none", "unexpected argument 'data.augment=none'"),
        ("forward --eval", "fastdeit bench forward has no flag --eval"),
    ],
)
def test_other_benchmarks_have_no_such_input(capsys, argv, message):
    assert cli.main(["bench", *argv.split()]) == 2
    assert message in capsys.readouterr().err
