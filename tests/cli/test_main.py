"""The command line: what is parsed, what is refused and how, and the exit codes."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import fastdeit
from fastdeit import bench, cli, run, verbs
from fastdeit import recipe as recipes
from fastdeit.engine import checkpoint
from fastdeit.errors import FastdeitError, Interrupted, NonFiniteError, UsageError
from fastdeit.recipe import resolve as recipe

for name in ("fastdeit.verbs.data", "fastdeit.run.places"):  # they keep the `resolve` that `calls` replaces for a test
    importlib.import_module(name)
ROOT = Path(fastdeit.__file__).parent.parent


@pytest.fixture(autouse=True)
def no_rank(monkeypatch):
    for name in ("RANK", "SLURM_STEP_NUM_TASKS", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def calls(monkeypatch):
    """What the verbs hand to the modules behind them; `calls.error` is raised by train."""
    seen = SimpleNamespace(args=None, loaded=[], error=None)

    def main(args):
        seen.args = args
        if seen.error is not None:
            raise seen.error

    for package, name in (
        (fastdeit, "training"),
        (verbs, "evaluate"),
        (verbs, "predict"),
        (bench, "command"),
        (verbs, "doctor"),
    ):
        monkeypatch.setattr(package, name, SimpleNamespace(main=main), raising=False)

    def read(args, say):
        seen.loaded.append((args.recipe, args.overrides))
        return SimpleNamespace(recipe=None, goes_on=True, run_dir=None, resume=False)

    nothing = SimpleNamespace(check=lambda *given: None, check_complete=lambda *given: None, load=lambda *given: None)
    for package, name, instead in (
        (recipes, "resolve", nothing),
        (run, "chosen", nothing),
        (run, "request", SimpleNamespace(read=read)),
    ):
        monkeypatch.setattr(package, name, instead, raising=False)
    return seen


def fails(capsys, *argv):
    assert cli.main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("fastdeit: ")
    assert err.count("\n") == 1
    return err


CELL = "--model", "--batch", "--image-size", "--precision"
MEASURING = "--device", "--rounds", "--out"


def test_flags_are_pinned():
    """A flag is a promise: adding or dropping one is a decision, made here too."""
    columns = ["--image-column", "--label-column", "--classes"]
    assert {name: verb.parser.flags[2:] for name, verb in cli.VERBS.items()} == {
        "train": [
            *("--data", "--nproc", "--nnodes", "--rdzv", "--max-restarts", "--run-dir", "--resume", "--from", "--as"),
            *("--trust", "--dry-run"),
        ],
        "submit": ["--data", "--as", "--hours", "--nproc", "--nnodes", "--run-dir", "--slurm", "--trust"],
        "cache": ["--data", "--as", "--teacher", "--top-k", "--out", "--epochs", "--nproc", "--trust"],
        "eval": [
            *("--data", "--model", "--nproc", "--json", "--classes", "--confusion", "--calibration", "--images"),
            "--trust",
        ],
        "published": ["--data", "--nproc", "--json"],
        "predict": ["--model", "--top", "--json", "--trust"],
        "show attention": ["--model", "--block", "--out", "--trust"],
        "export": ["--format", "--model", "--fuse", "--force", "--trust"],
        "recipes": [],
        "recipes show": ["--resolved", "--as"],
        "explain": [],
        "models": [],
        "plan": ["--as", "--gpu", "--count", "--nodes", "--price", "--images", "--json", "--trust"],
        "runs list": [],
        "runs diff": [],
        "runs curves": ["--out"],
        "experiments list": [],
        "experiments run": ["--data", "--seeds", "--out"],
        "runs time": ["--metric", "--target"],
        "data check": ["--source", "--split", *columns, "--processes", "--json", "--html"],
        "data pack": ["--source", "--split", *columns, "--normalise", "--force"],
        "data show": ["--data", "--trust", "--sample", "--epoch", "--copy", "--out"],
        "data preview": ["--data", "--trust", "--rows", "--columns", "--out"],
        "data make": ["--out", "--from", "--packages"],
        "doctor": [],
        "chaos": ["--data", "--kills", "--seed", "--nproc", "--keep", "--json"],
        "kernels": [],
        "kernels lint": ["--arch", "--op", "--json", "--update-golden", "--bounds"],
        "kernels bench": [
            *("--op", "--model", "--batch", "--dtype", "--device", "--rounds", "--out", "--update-choices"),
            "--predict",
        ],
        "kernels tune": ["--model", "--batch", "--dtype", "--device", "--graph", "--budget"],
        "bench step": [*CELL, "--capture", "--teacher", "--ema", "--peer", *MEASURING],
        "bench forward": [*CELL, "--capture", "--peer", *MEASURING],
        "bench train": ["--recipe", "--threads", *CELL, "--capture", "--teacher", "--ema", "--peer", *MEASURING],
        "bench data": ["--recipe", "--threads", "--eval", "--batch", "--peer", *MEASURING],
        "bench overhead": [*CELL, "--teacher", "--device", "--rounds"],
        "bench suite": ["--time-limit", "--capture", "--peer", *MEASURING],
        "bench calibrate": ["--batch", *MEASURING],
        "bench parity": ["--peer", "--case", "--steps", "--batch", "--image-size", "--out"],
        "bench count": ["--model", "--batch", "--drop-path", "--arch", "--json", "--update-golden"],
        "bench report": ["--results"],
        "completion": [],
    }


@pytest.mark.parametrize("verb", list(cli.VERBS))
def test_usage_line_names_every_flag(verb):
    parser = cli.VERBS[verb].parser
    told = re.findall(r"(?<![\w-])--?[\w-]+", parser.usage)
    assert [flag for flag in parser.flags if flag not in told] == ["-h", "--help"]


def test_train_in_any_order(calls):
    argv = ["train", "optim.lr=1e-3", "--nproc", "1", "mine.yaml", "--data", "/images", "train.epochs=2", "--resume"]
    assert cli.main(argv) == 0
    args = calls.args
    assert (args.recipe, args.nproc, args.run_dir, args.resume) == ("mine.yaml", 1, None, "")
    assert args.overrides == ["optim.lr=1e-3", "train.epochs=2", 'data.root="/images"']
    assert calls.loaded == [("mine.yaml", args.overrides)]


@pytest.mark.parametrize("name", ["a #b", "12", "null", "a: b", "[x]", "%x", " x ", "ü", 'a"b'])
def test_a_data_folder_may_have_any_name(calls, name):
    assert cli.main(["train", "deit_tiny", "--data", name]) == 0
    assert recipe.load("deit_tiny", calls.args.overrides).data.root == name


def test_train_without_a_recipe_says_what_it_does(calls, capsys):
    assert cli.main(["train", "train.epochs=1"]) == 0
    assert (calls.args.recipe, calls.args.overrides) == ("digits", ["train.epochs=1"])
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert "'digits'" in out
    assert "fastdeit train deit_base_distilled --data /path/to/imagenet --nproc 8" in out
    assert cli.main(["train", "digits"]) == 0
    assert capsys.readouterr().out == "starting: digits\n"


def test_a_worker_neither_repeats_the_line_nor_the_check(calls, capsys, monkeypatch):
    for name, value in {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["train"]) == 0
    assert (calls.args.recipe, calls.loaded, capsys.readouterr().out) == ("digits", [], "")


def test_eval_and_bench(calls):
    assert cli.main(["eval", "a.pth", "--images", "1.png", "2.png"]) == 0
    assert (calls.args.address, calls.args.images, calls.args.top) == ("a.pth", ["1.png", "2.png"], 5)
    assert cli.main(["eval", "runs/a", "--data=/images", "data.val=test"]) == 0
    assert (calls.args.address, calls.args.overrides) == ("runs/a", ["data.val=test", 'data.root="/images"'])
    assert cli.main(["bench", "forward"]) == 0
    assert vars(calls.args) == {
        "began": calls.args.began,
        "what": "forward",
        "peer": None,
        "device": "auto",
        "model": "deit_tiny_patch16_224",
        "batch": None,
        "image_size": None,
        "precision": None,
        "capture": None,
        "teacher": "none",
        "ema": False,
        "rounds": 5,
        "out": None,
    }
    assert cli.main(["bench", "data", "--batch", "4", "--peer", "none"]) == 0
    assert (calls.args.what, calls.args.batch, calls.args.peer) == ("data", 4, "none")
    assert cli.main(["bench", "data", "--eval", "data.flip=0", "--recipe", "deit_tiny", "data.erase=0"]) == 0
    assert (calls.args.eval, calls.args.overrides) == (True, ["data.flip=0", "data.erase=0"])
    assert cli.main(["bench", "report", "--results", "a.jsonl"]) == 0
    assert (calls.args.folder, calls.args.results) == (".", ["a.jsonl"])
    assert cli.main(["bench", "suite", "--capture", "none", "--capture", "graph"]) == 0
    assert (calls.args.what, calls.args.capture) == ("suite", ["none", "graph"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["trian"], "did you mean train"),
        (["--versoin"], "did you mean --version"),
        (
            ["xyzzy"],
            "verbs: train, submit, cache, eval, published, predict, show attention, export, recipes, recipes show,",
        ),
        (["data"], "there is no verb 'data' (verbs: data check, data pack, data show, data preview, data make)"),
        (["data", "chek"], "there is no verb 'data chek'"),
        (["data", "chek", "x"], "did you mean data check"),
        (["train", "--resme"], "did you mean --resume"),
        (["train", "--rundir=x"], "did you mean --run-dir"),
        (["train", "digits", "imagenet"], "expected one recipe"),
        (["train", "--nproc", "0"], "0 is not a positive number"),
        (["train", "--nproc", "two"], "invalid int value: 'two'"),
        (["train", "--data"], "--data: expected one argument"),
        (["train", "--res"], "no flag --res"),
        (["eval"], "name the weights: fastdeit eval"),
        (["bench"], "there is no verb 'bench' (verbs: bench step, bench forward, bench train, bench data,"),
        (["bench", "stp"], "did you mean bench step"),
        (["kernels", "--op", "mlp"], "fastdeit kernels has no flag --op"),
        (["kernels", "lint", "--bounds", "--arch", "80"], "with --bounds nothing is compiled"),
        (["kernels", "lint", "--arch"], "--arch: expected at least one argument"),
        (["doctor", "now"], "unexpected argument 'now' (see fastdeit doctor --help)"),
    ],
)
def test_bad_usage_is_2_in_one_line(calls, capsys, argv, message):
    assert message in fails(capsys, *argv)
    assert calls.args is None


def test_no_verb_is_bad_usage_with_help(capsys):
    assert cli.main([]) == 2
    assert "this machine:\n  doctor" in capsys.readouterr().err


def foreign(module, name, base=Exception):
    return type(name, (base,), {"__module__": module})


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (FastdeitError("x"), 1),
        (UsageError("x"), 2),
        (NonFiniteError("x"), 3),
        (Interrupted("x"), 75),
        (foreign("fastdeit.recipe.resolve", "RecipeError")("x"), 2),
        (foreign("fastdeit.data.sources.source", "DataError", ValueError)("x"), 2),
        (foreign("elsewhere", "Sub", foreign("fastdeit.engine.checkpoint", "CheckpointError"))("x"), 2),
    ],
)
def test_errors_for_people(calls, capsys, error, code):
    calls.error = error
    assert cli.main(["train", "digits"]) == code
    assert capsys.readouterr().err == "fastdeit: x\n"


def test_the_foreign_errors_exist():
    """The table names them as text."""
    for module, name in cli._EXIT_CODES:
        source = (ROOT / module.replace(".", "/")).with_suffix(".py").read_text()
        assert f"\nclass {name}(" in source


def test_every_line_says_who_speaks(calls, capsys):
    calls.error = foreign("fastdeit.recipe.resolve", "RecipeError")("a.yaml:1: one\na.yaml:2: two")
    assert cli.main(["train", "digits"]) == 2
    assert capsys.readouterr().err == "fastdeit: a.yaml:1: one\nfastdeit: a.yaml:2: two\n"


def test_recipes(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(recipe, "SHIPPED", tmp_path)
    (tmp_path / "small.yaml").write_text("about: {summary: a small one}\n")
    (tmp_path / "larger.yaml").write_text("# why\nabout: {summary: a larger one}\n")
    assert cli.main(["recipes"]) == 0
    assert capsys.readouterr().out == "larger  a larger one\nsmall   a small one\n"
    assert cli.main(["recipes", "show", "larger"]) == 0
    assert capsys.readouterr().out == "# why\nabout: {summary: a larger one}\n"
    assert "did you mean small?" in fails(capsys, "recipes", "show", "smal")
    assert "recipes show NAME" in fails(capsys, "recipes", "show")
    assert "unexpected argument 'list'" in fails(capsys, "recipes", "list")


def test_any_other_error_keeps_its_traceback(calls, capsys):
    calls.error = ValueError("elsewhere's DataError is not ours")
    assert cli.main(["train", "digits"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert err.endswith("fastdeit: failed with ValueError, see above\n")


def test_ctrl_c_is_1_without_traceback(calls, capsys):
    calls.error = KeyboardInterrupt()
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().err == "fastdeit: interrupted\n"


@pytest.mark.parametrize(
    ("error", "err"),
    [
        (UsageError("x"), ""),
        (Interrupted("x"), ""),
        (NonFiniteError("x"), ""),
        (FastdeitError("x"), "fastdeit: rank 3: x\n"),
    ],
)
def test_what_all_ranks_find_is_said_by_rank_0(calls, capsys, monkeypatch, error, err):
    ranks = {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    for name, value in ranks.items():
        monkeypatch.setenv(name, value)
    calls.error = error
    assert cli.main(["train", "digits"]) == error.exit_code
    assert capsys.readouterr().err == err


HELP = """
import sys
from fastdeit import bench, cli, run, verbs
from fastdeit import recipe as recipes
for argv in (["--help"], ["train", "--help"], ["bench", "step", "--help"], ["bench", "--help"], ["--version"]):
    assert cli.main(argv) == 0
print(*sys.modules)
"""


def test_help_and_version_load_nothing_that_takes_long():
    """Measured: 3.6 times an interpreter that does nothing; with numpy it would be 12 times, with torch 160."""
    done = subprocess.run([sys.executable, "-c", HELP], cwd=ROOT, capture_output=True, text=True, check=True)
    *_, version, modules = done.stdout.splitlines()
    assert version == f"fastdeit {fastdeit.__version__}"
    assert "fastdeit.cli" in modules.split()
    heavy = {"torch", "numpy", "scipy", "PIL", "pydantic", "ruamel.yaml", "rich", "matplotlib", "timm", "triton"}
    assert not heavy & set(modules.split())


LOOK = """
import sys
from fastdeit import cli
for argv, code in (
    (["recipes"], 0), (["recipes", "show", "digits"], 0), (["recipes", "show", "digits", "--resolved"], 0),
    (["explain"], 0), (["explain", "optim"], 0), (["explain", "alpha"], 0), (["explain", "drop-path"], 0),
    (["completion", "bash"], 0), (["runs", "list", "."], 0),
    (["train", "digit"], 2), (["train", "digits", "--epochs", "3"], 2), (["trian"], 2), (["train", "no.yaml"], 2),
):
    assert cli.main(argv) == code, argv
print(*sys.modules)
"""
REFUSED = """
import sys
from fastdeit import cli
for overrides in (
    ["optim.lr=-1"], ["optim.lrr=1"], ["optim.nesterov=true"], ["optim.name=adam"], ["optim.name=sgd", "optim.lr=x"],
    ["optim.name=lamb", "optim.lr=1", "optim.betas=1"], ["optim.name=muon", "optim.lr=1", "optim.momentum=2"],
    ["method.use=distil"], ["method.alpha=2"], ["method.smoothin=0"], ["method.teacher.model=a"],
    ["method.use=supervised", "method.loss=bce"], ["method.use=supervised", "method.class_weights=all"],
    ["data.flip=2"], ["data.augment=rand-m9-x1"], ["data.augment=trivial", "data.color_jitter=0.4"],
    ["data.views.main.color_jitter=2", "data.augment=original"], ["data.views.local.size=96"], ["data.source=x"],
    ["train.batch_size=3"], ["train.epochs=1"], ["engine.precision=int4"], ["model.image_size=0"],
    ["modle.name=x"], ["x"], ["model.name=deit_tini"], ["method.teacher={model: deit_tini, weights: x}"],
):
    for verb in ("train", "plan"):
        assert cli.main([verb, "digits", *overrides]) == 2, overrides
print(*sys.modules)
"""
PLACES = """
import sys
from fastdeit import cli
for line in (
    "train --resume nowhere", "train --resume {run} optim.lr=-1", "train --resume {run} optim.lr=2",
    "train --from nowhere", "train --from {run}@step=7", "train --from {run} optim.lr=x", "train --from timm:x",
    "train --resume {run} --dry-run optim.lr=2", "train digits --dry-run optim.lr=-1", "train --resume . ",
    "train deit_tiny", "train deit_tiny --data nowhere", "train digits model.weights=nowhere",
    "train digits method.teacher=nowhere", "train deit_base_384", "train --resume {run} --nproc 2 optim.lr=2",
    "eval nowhere", "eval {run}@bets", "eval {run} optim.lr=x", "predict nowhere x.png", "predict {run} x.png x=1",
    "show attention nowhere x.png --out y.png", "export nowhere x.pth", "export {run} x.gguf",
    "export {run} {run}/recipe.yaml --format deit",
    "export {run} y.pth --fuse class", "export {run} y.pth optim.lr=x",
    "data show digitz --sample 0 --out x.png", "data show digits --sample 0 --out x.gif",
    "data preview nowhere.pth --out x.png", "data preview {run} optim.lr=x --out x.png",
    "data preview deit_tiny --out x.png", "data preview deit_tiny --data nowhere --out x.png", "data check nowhere",
    "bench train --recipe nope", "bench data --recipe digits optim.lr=x", "plan digits --gpu H300",
    "eval {run}/w.pth optim.lr=x", "eval {run}/w.pth --model deit_tini", "predict {run}/w.pth x.png data.crop=1",
    "eval timm:x data.mean=1", "show attention {run}/w.pth x.png --model deit_tini --out y.png",
    "export {run}/w.pth x.pth --model deit_tini", "export {run}/w.pth x.pth modle.name=x", "models deit_tini",
    "bench step --model deit_tini", "bench count --model deit_tini", "bench forward --out {run}",
    "bench parity --out {run}", "kernels bench --model deit_tini", "kernels bench --out {run}",
    "kernels tune --model deit_tini",
    "plan digits --gpu H200 --price 1 2", "runs list nowhere", "runs diff a b", "runs curves a",
):
    line = line.format(run=sys.argv[1])
    assert cli.main(line.split()) == 2, line
print(*sys.modules)
"""
HEAVY = {"torch", "numpy", "scipy", "PIL", "matplotlib", "timm", "triton", "nvidia.dali", "sklearn", "safetensors"}


@pytest.mark.parametrize("code", [LOOK, REFUSED], ids=["looking around", "refused recipes"])
def test_looking_around_and_mistakes_load_nothing_that_takes_long(code):
    """Seconds of a start are torch's; without it, numpy and scipy there are tenths, most of them pydantic's."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "fastdeit.recipe.resolve" in done.stdout.split()
    assert not HEAVY & set(done.stdout.splitlines()[-1].split())


def test_mistakes_in_places_are_said_without_torch(tmp_path):
    """Such as a run that is not there, or an override that its recipe does not take. Data sources take numpy."""
    state = {
        "identity": {"train": "t", "val": "v", "classes": ["a"]},
        "record": {"phase": "all"},
        "steps": 9,
        "steps_per_epoch": 3,
        "lineage": [],
    }
    state["recipe"] = recipe.load("digits").model_dump(mode="json")
    checkpoint.save(tmp_path / "run" / "checkpoints", 5, {"model": {"w": torch.ones(1)}}, state)
    for name in ("recipe.yaml", "w.pth"):
        (tmp_path / "run" / name).touch()
    words = [sys.executable, "-c", PLACES, str(tmp_path / "run")]
    done = subprocess.run(
        words, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    assert (done.returncode, "Traceback" in done.stderr) == (0, False), done.stderr[-800:]
    assert not HEAVY - {"numpy", "PIL"} & set(done.stdout.splitlines()[-1].split())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
