"""`fastdeit runs`, `models`, `completion` and `train --dry-run`: what is there, and what would be."""

import fcntl
import json
import os
import shlex
import shutil
import subprocess

import pytest
import torch
from PIL import Image

from fastdeit import cli, models
from fastdeit.cli import completion
from fastdeit.errors import UsageError
from fastdeit.estimate import gpus
from fastdeit.recipe import resolve as recipes
from fastdeit.run import directory, fork, overview
from fastdeit.run.request import Request
from fastdeit.verbs import dry_run
from fastdeit.verbs import models as models_verb
from fastdeit.verbs import runs as runs_verbs
from tests.painted_runs import RECIPE as PAINTED
from tests.painted_runs import paint

SYNTHETIC = ["data.source=synthetic", "data.synthetic_samples=640", "data.synthetic_classes=7", "data.group_size=8"]


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """`runs(name, *overrides, steps=, top1=, summary=)` writes a run into runs/ of the working folder."""
    monkeypatch.chdir(tmp_path)

    def write(name, *overrides, steps=3, top1=50.0, summary=None):
        path = tmp_path / "runs" / name
        path.mkdir(parents=True)
        (path / "recipe.yaml").write_text(recipes.dump(recipes.load("digits", overrides)))
        records = [
            {"step": step, "kind": "train", "epoch": step / 2, "loss": 2 / step, "lr": 1e-3}
            for step in range(1, steps + 1)
        ]
        records.append(
            {"step": steps, "kind": "eval", "epoch": steps / 2, "images": 9, "bad_images": 0, "top1_fused": top1}
        )
        (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        if summary is not None:
            (path / "summary.json").write_text(json.dumps(summary))
        return path

    return write


def said(capsys, *argv):
    assert cli.main(argv) == 0
    return capsys.readouterr().out


def test_a_list_says_how_far_each_run_is(runs, capsys):
    runs("a", summary={"best": 61.5, "best_by": "top1_class", "finished": True})
    os.utime(runs("b", "train.epochs=7"), (1, 1))
    (runs("c") / "metrics.jsonl").unlink()
    (runs("d") / "recipe.yaml").write_text("{[")
    runs("f", "train.steps=9")
    (runs("e").parent / "not_a_run").mkdir()
    with open(overview.RUNS / "e" / "lock.json", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (overview.RUNS / "d" / "lock.json").touch()  # of a process that has died
        rows = {line.split()[0]: line.split()[1:] for line in said(capsys, "runs", "list").splitlines()}
    assert rows.pop("run") == ["model", "epoch", "step", "best", "state", "age"]
    model = "deit_digits_distilled_patch8_32"
    assert rows.pop("a") == [model, "1.5", "of", "30", "3", "top1_class", "61.5", "finished", "now"]
    assert rows.pop("b")[1:9] == ["1.5", "of", "7", "3", "top1_fused", "50", "(last)", "interrupted"]
    assert rows.pop("c") == [model, "0", "of", "30", "0", "-", "interrupted", "now"]
    assert rows.pop("d") == ["?", "1.5", "of", "?", "3", "top1_fused", "50", "(last)", "interrupted", "now"]
    assert rows.pop("e")[-2:] == ["running", "now"]
    assert rows.pop("f")[1:6] == ["1.5", "3", "of", "9", "top1_fused"]
    assert rows == {}


def test_ages():
    assert [runs_verbs.age(seconds) for seconds in (3, 61, 7300, 200_000)] == ["now", "1 min", "2 h", "2 d"]


def test_a_diff_has_the_fields_that_differ_and_what_was_measured(runs, capsys):
    runs("a", "about.summary=x")
    runs("b", "optim.lr=5e-4", "optim.name=sgd", "data.flip=0.5", "train.best_by=null", top1=52.5, steps=4)
    fields, measured = said(capsys, "runs", "diff", "a", "runs/b").split("\n\n")
    rows = {line.split()[0]: line.split()[1:] for line in fields.splitlines()}
    assert rows.pop("field") == ["a", "b"]
    assert rows["optim.lr"] == ["0.001", "0.0005"]
    assert rows["optim.momentum"] == ["-", "0.9"]
    assert rows["optim.eps"] == ["1e-08", "-"]
    assert rows["data.flip"] == ["0.0", "0.5"]
    assert not {name for name in rows if name.startswith(("about", "model", "train"))}
    rows = {line.split()[0]: line.split()[1:] for line in measured.splitlines()}
    assert rows["top1_fused"] == ["50", "52.5", "+2.5"]
    assert rows["steps"] == ["3", "4"]
    assert said(capsys, "runs", "diff", "a", "a").startswith("the recipes are the same\n")


def test_curves_of_several_runs_are_one_picture(runs, capsys, tmp_path):
    runs("a")
    runs("b", steps=60)
    assert said(capsys, "runs", "curves", "a", "b", "--out", "both.png") == "picture in both.png\n"
    with Image.open(tmp_path / "both.png") as picture:
        assert picture.format == "PNG"
        colours = {colour for _, colour in picture.convert("RGB").getcolors(2**20)}
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)} <= colours, "a line for each run"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["list", "nowhere"], "there is no folder nowhere"),
        (["diff", "a"], "the following arguments are required: B"),
        (["diff", "a", "bb"], "bb does not exist; did you mean b?"),
        (["diff", "a", "runs"], "runs is no run: it has neither recipe.yaml nor metrics.jsonl"),
        (["curves", "a", "--out", "x.jpg"], "give a name that ends in .png"),
        (["curves", "a", "--out", "no/x.png"], "there is no folder no"),
        (["curves", "b"], "there is no metrics.jsonl yet"),
        (["curves", "c"], "there is no loss, evaluation or lr to draw yet"),
    ],
)
def test_runs_that_cannot_be_shown(runs, capsys, argv, message):
    runs("a")
    (runs("b") / "metrics.jsonl").unlink()
    (runs("c") / "metrics.jsonl").write_text("")
    assert cli.main(["runs", *argv]) == 2
    assert message in capsys.readouterr().err


# ---- models ----------------------------------------------------------------------------------------------------------


def test_models_are_listed_with_what_they_cost(capsys):
    rows = [line.split() for line in said(capsys, "models", "deit_tiny_patch*").splitlines()]
    assert rows[0] == ["model", "parameters", "GFLOP", "image", "patch"]
    assert rows[1] == ["deit_tiny_patch16_224", "5.72", "M", "2.33", "224x224", "16"]
    assert rows[2] == []
    assert models_verb.described("convnet_digits")[-1] == "-"
    assert models_verb.fitting("", models.MODELS, "") == list(models.MODELS)
    assert len(models_verb.fitting("distilled", models.MODELS, "")) == 5


def test_models_of_timm_are_listed_by_pattern(capsys):
    assert said(capsys, "models", "timm:deit_tiny*").split("\n\n")[0].split() == [
        "deit_tiny_distilled_patch16_224",
        "deit_tiny_patch16_224",
    ]
    assert "deit_tiny_patch16_224.fb_in1k\n" in said(capsys, "models", "timm:deit_tiny_patch16_224.")
    assert cli.main(["models", "deit_tini"]) == 2
    assert "no model is called deit_tini; did you mean deit_tiny" in capsys.readouterr().err


# ---- train --dry-run -------------------------------------------------------------------------------------------------


def test_a_dry_run_says_what_would_run_and_writes_nothing(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["train", "deit_tiny", "--dry-run", "--nproc", "2", *SYNTHETIC, "train.batch_size=64", "engine.device=cpu"]
    facts, recipe = said(capsys, *argv).split("\n\n# the recipe in full\n")
    assert "device    2 processes on the CPU, " in facts
    assert "data      640 training and 64 held-out images of 7 classes" in facts
    assert "model     deit_tiny_patch16_224: 5.53 M parameters" in facts
    assert "run       300 epochs of 10 steps, 3,000 in all, of 64 images; 300 evaluations" in facts
    assert "GiB a process besides the libraries (modelled, not measured)" in facts
    assert "synthetic_samples: 640\n" in recipe
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "refusal"),
    [
        (["method.fuse=class"], "method.fuse class: VisionTransformer has one head, and there is nothing to choose"),
        (["method.class_weights=[1, 2]"], "class_weights has 2 numbers, but the data set has 7 classes"),
        (["train.best_by=xx"], "train.best_by xx is no metric of this run, which has top1_class, top5_class"),
        (["model.timm=resnet10t", "model.drop_path_mode=linear", "train.best_by=x"], "train.best_by x is no metric of"),
    ],
)
def test_a_dry_run_builds_the_method(words, refusal, capsys):
    """What a start refuses, a dry run refuses as well."""
    argv = ["train", "deit_tiny", *SYNTHETIC, "train.batch_size=64", "model.image_size=32", "engine.device=cpu"]
    assert cli.main([*argv, *words, "--dry-run"]) == 2
    assert refusal in capsys.readouterr().err


def test_a_dry_run_on_a_known_card_estimates_its_time(monkeypatch):
    monkeypatch.setattr(dry_run, "pick_device", lambda device: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    asked = Request(recipes.load("deit_tiny", [*SYNTHETIC, "train.batch_size=64"]))
    lines = list(dry_run.lines(asked, 1))
    first, second = (line for line in lines if line.startswith("estimate"))
    assert f" of {gpus.GPUS['H100'].memory / 2**30:,.0f} GiB of a GPU (modelled, not measured)" in first
    assert "hours (speed is " in second


def test_a_dry_run_says_where_a_run_begins_that_does_not_begin_anew(run, tmp_path):
    recipe, origin = directory.recipe_of(run), fork.opened(str(run), print)

    def begins(*overrides, **asked):
        request = Request(recipes.override(recipe, overrides), **asked)
        return [line for line in dry_run.lines(request, 1) if line.startswith("begins")]

    assert begins() == begins(run_dir=tmp_path / "new", resume=True) == []
    assert begins("train.epochs=3", origin=origin) == [f"begins    at step 2, as a fork of {run} at step 2"]
    assert begins(run_dir=run, resume=True) == [f"begins    at step 2: {run} goes on"]
    with pytest.raises(UsageError, match="nothing is left to train"):
        begins(origin=origin)


GOING_ON = {
    "other images": (["--resume", "RUN", "data.root=OTHER"], "data (classes): the run has"),
    "a fork, other images": (["--from", "RUN", "train.epochs=3", "data.root=OTHER"], "the data there has 3 classes"),
    "another network": (["--from", "RUN", "train.epochs=3", "model.name=deit_digits_patch8_32"], "does not fit, in"),
    "other weights": (["--from", "RUN", "train.epochs=3", "model.weights=x.pth"], "says what a run begins with"),
    "another optimizer": (
        ["--from", "RUN", "train.epochs=3", "optim={name: sgd, lr: 0.1, warmup_epochs: 0}"],
        "cannot go on with the state of",
    ),
    "a damaged run": (["--resume", "DAMAGED"], "checkpoints in DAMAGED/checkpoints can be used"),
}


@pytest.mark.parametrize("case", GOING_ON)
def test_a_dry_run_refuses_what_no_checkpoint_goes_on_with_in_the_words_of_a_start(run, tmp_path, capsys, case):
    words, message = GOING_ON[case]
    places = {"RUN": run, "OTHER": tmp_path / "other", "DAMAGED": tmp_path / "damaged"}
    paint(places["OTHER"], names=("blue", "red"))
    shutil.copytree(run, places["DAMAGED"])
    for file in places["DAMAGED"].glob("checkpoints/*/model.safetensors"):
        file.write_bytes(file.read_bytes()[:-9])
    for name, place in places.items():
        words, message = [word.replace(name, str(place)) for word in words], message.replace(name, str(place))
    words += ["--run-dir", str(tmp_path / "fork")] if "--from" in words else []
    assert cli.main(["train", *words, "--dry-run"]) != 0
    told = capsys.readouterr().err
    assert message in told
    assert cli.main(["train", *words]) != 0
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["deit_tiny"], "needs images: add --data ROOT"),
        (["deit_tiny", *SYNTHETIC, "--nproc", "7"], "on 7 processes: batch size 1024 cannot be split into groups of 8"),
        (["deit_tiny", *SYNTHETIC, "model.num_classes=8"], "model.num_classes is 8, but the data set has 7 classes"),
        (["deit_tiny", *SYNTHETIC, "model.name=deit_tini"], "there is no model 'deit_tini'; did you mean deit_tiny"),
        (["deit_base_384", *SYNTHETIC], "recipe deit_base_384: model.weights: is required, because it goes on from"),
        (["deit_tiny", *SYNTHETIC, "model.weights=nowhere"], "model.weights: nowhere: there is no nowhere"),
        (["deit_tiny", *SYNTHETIC, "model.freeze=[blocks.99]"], "model.freeze: 'blocks.99': blocks has no '99'"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would(capsys, argv, message):
    assert cli.main(["train", *argv, "--dry-run"]) == 2
    assert message in capsys.readouterr().err


DISTILL = "{use: distill, alpha: 0.5, tau: 1, teacher: ADDRESS}"


def test_a_dry_run_opens_weights_as_a_start_would(run, bare, data, tmp_path, write, capsys):
    """And says what it finds; of weights that would have to be downloaded it says that."""
    (tmp_path / "other").mkdir()
    other = paint(tmp_path / "other" / "data", names=("blue", "red"))
    (tmp_path / "cut.safetensors").write_bytes(bare.read_bytes()[:-9])
    recipe = write(PAINTED)

    def dry(*overrides, root=data, code=0):
        assert cli.main(["train", recipe, f"data.root={root}", *overrides, "--dry-run"]) == code, overrides
        return capsys.readouterr().err if code else capsys.readouterr().out

    def teacher(address):
        return f"method={DISTILL.replace('ADDRESS', str(address))}"

    assert f"weights   weights of {run}, step 2: all tensors fit" in dry(f"model.weights={run}")
    assert "heads initialised anew" in dry(f"model.weights={run}", root=other)
    assert "say it with model.weights_grid=" in dry(f"model.weights={bare}", "model.image_size=32", code=2)
    assert "is damaged" in dry(f"model.weights={tmp_path}/cut.safetensors", code=2)
    assert "it needs blocks.4.norm1.weight" in dry(f"model.weights={run}", "model.name=deit_tiny_patch16_224", code=2)
    assert "the weights know 3 classes, but the data set has 2" in dry(teacher(run), root=other, code=2)
    assert "nothing tells which model" in dry(teacher(bare), code=2)
    assert "weights   timm:test_vit: would be downloaded" in dry("model.weights=timm:test_vit")
    assert "method.teacher.weights: timm:test_vit: the weights know 1000 classes, but" in dry(
        teacher("timm:test_vit"), code=2
    )
    nowhere = "timm:vit_small_patch16_18x2_224"
    assert f"method.teacher.weights: {nowhere}: timm publishes no weights" in dry(teacher(nowhere), code=2)
    assert "model.weights: timm:nope: timm " in dry("model.weights=timm:nope", code=2)


def test_a_recipe_that_needs_weights_is_refused_before_anything_is_made(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fastdeit.launch.launch.run", lambda args, argv, work, processes: 0)
    assert cli.main(["train", "deit_base_384", *SYNTHETIC]) == 2
    assert "give model.weights=RUN or model.weights=FILE" in capsys.readouterr().err
    assert cli.main(["train", "deit_base_384", *SYNTHETIC, "model.weights=timm:deit_base_patch16_384"]) == 0
    assert cli.main(["train", "deit_base_384", *SYNTHETIC, "model.needs_weights=false"]) == 0
    assert cli.main(["recipes", "show", "deit_base_384", "--resolved"]) == 0


# ---- time to a target ------------------------------------------------------------------------------------------------


def judged(step, seconds, **metrics):
    return {
        "step": step,
        "kind": "eval",
        "epoch": step / 2,
        "seconds": seconds,
        "images": 9,
        "bad_images": 0,
        **metrics,
    }


def test_the_row_of_a_run_is_of_its_first_evaluation_at_the_target(runs, capsys):
    summary = {"images_per_second": 5.0, "data_wait_percent": 1.5, "paused_seconds": 7.0, "lineage": []}
    run = runs("a", summary=summary)
    (run / "recipe.yaml").write_text(recipes.dump(recipes.load("vit_small_90", ["train.seed=2", "engine.threads=3"])))
    (run / "environment.json").write_text(
        '{"gpus": ["one"], "space": {}, "python": {"version": "3", "executable": "/here"}}'
    )
    both = [(2, 10.0, 60.0, 61.0), (4, 20.5, 70.0, 80.0), (6, 30.0, 90.0, 70.0)]
    lines = [
        judged(step, seconds, top1_fused=top1, top1_class=99.0, held_out_loss=100 - top1, top1_fused_ema=averaged)
        | {"lower_is_better": ["held_out_loss"]}
        for step, seconds, top1, averaged in both
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def row(*argv):
        return json.loads(said(capsys, "runs", "time", "a", *argv))

    assert row("--target", "70") == {
        "run": "runs/a",
        "seconds": 20.5,
        "metric": "top1_fused",
        "target": 70.0,
        "reached": 70.0,
        "epoch": 2.0,
        "step": 4,
        "paused_seconds": 7.0,
        "images_per_second": 5.0,
        "data_wait_percent": 1.5,
        "recipe": {"train.seed": 2, "engine.threads": 3},
        "lineage": [],
        "environment": {"gpus": ["one"], "python": {"version": "3"}},
    }
    assert row("--metric", "top1_ema", "--target", "75")["seconds"] == 20.5
    assert row("--metric", "top1_class", "--target", "75")["seconds"] == 10.0
    missed = row("--metric", "top1", "--target", "90.5")
    assert [missed[name] for name in ("seconds", "reached", "epoch", "step")] == [None] * 4
    loss = row("--metric", "held_out_loss", "--target", "30")
    assert (loss["seconds"], loss["reached"]) == (20.5, 30.0), "for a loss, at most"


def test_what_has_no_time_to_a_target_is_refused(runs, capsys):
    run = runs("a")
    for line, metric, message in (
        (None, "top1", "another version of fastdeit has written them"),
        ({"step": 1, "kind": "train"}, "top1", "has no evaluation yet"),
        (judged(1, 2.0, top1_class=1.0), "top_1", "has no metric top_1; did you mean top1"),
        (judged(1, 2.0, knn_top1=1.0), "top1", "has no metric top1; did you mean knn_top1"),
        (judged(1, 2.0), "top1", "it has none"),
    ):
        if line is not None:
            (run / "metrics.jsonl").write_text(json.dumps(line) + "\n")
        assert cli.main(["runs", "time", "a", "--metric", metric, "--target", "1"]) == 2
        assert message in capsys.readouterr().err


# ---- completion ------------------------------------------------------------------------------------------------------


def completed(*lines):
    """What bash offers for the last word of each command line."""
    code = [completion.script("bash", cli.VERBS)]
    for line in lines:
        words = line.split(" ")
        code.append(f"COMP_WORDS=({' '.join(map(shlex.quote, words))}); COMP_CWORD={len(words) - 1}")
        code.append('COMPREPLY=(); _fastdeit; echo "${COMPREPLY[*]}"')
    done = subprocess.run(["bash", "-c", "\n".join(code)], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return [line.split() for line in done.stdout.splitlines()]


def test_bash_completes_verbs_flags_values_and_recipes():
    offered = completed(
        "fastdeit b",
        "fastdeit bench st",
        "fastdeit bench step --pre",
        "fastdeit bench step --precision ",
        "fastdeit train --res",
        "fastdeit train deit_tiny_",
        "fastdeit recipes ",
        "fastdeit kernels ",
        "fastdeit completion ",
        "fastdeit doctor x",
    )
    assert offered[:6] == [
        ["bench"],
        ["step"],
        ["--precision"],
        ["fp32", "fp16", "bf16"],
        ["--resume"],
        ["deit_tiny_distilled", "deit_tiny_distilled_1000ep", "deit_tiny_soft"],
    ]
    assert "show" in offered[6]
    assert {"lint", "bench", "--help"} <= set(offered[7])
    assert offered[8:] == [["bash", "zsh"], []]


def test_zsh_runs_the_same():
    assert completion.script("zsh", cli.VERBS).endswith(completion.script("bash", cli.VERBS))
    assert completion.script("zsh", cli.VERBS).startswith("autoload")
