"""Going on with a run by its name, what a start checks before it makes anything, and a guard that heals."""

import json
import math
import os
import pydoc
import re
import shlex
import shutil
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastdeit.cli import main as cli
from fastdeit.engine import checkpoint
from fastdeit.engine.dist import World
from fastdeit.engine.optim import Optimizer
from fastdeit.engine.schedule import decay_factor
from fastdeit.errors import FastdeitError, Interrupted, NonFiniteError, UsageError
from fastdeit.methods.supervised import Supervised
from fastdeit.recipe import resolve as recipes
from fastdeit.run import directory
from fastdeit.run.lock import locked
from fastdeit.training import alone, train
from tests.small_runs import StopAt, assert_same_weights, logged

RECIPE = """\
model: {name: "tests.small_runs:Tiny", image_size: 32}
method: {use: "tests.test_train_resume:Poisoned"}
data:
  {source: synthetic, synthetic_samples: 24, synthetic_classes: 4, flip: 0, mixup: 0, cutmix: 0, group_size: 4,
   repeats: 1, mean: [0.3, 0.4, 0.5], std: [0.2, 0.25, 0.3]}
optim: {lr: 1e-3, warmup_epochs: 0, weight_decay: 0.04, weight_decay_end: 0.4}
train: {epochs: 2, batch_size: 8, eval_every: 2}
engine: {device: cpu, precision: fp32, checkpoint_every: 0.3333, log_every: 100}
"""
STEPS_PER_EPOCH, TOTAL = 3, 6


class Poisoned(Supervised):
    """Its loss is not a number at the steps `bad`, which are counted from 1."""

    bad = ()

    def forward(self, batch):
        out = super().forward(batch)
        if int(batch.step.number) + 1 in self.bad and self.training:
            out.loss = out.loss * float("nan")
        return out


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    """An empty directory."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def recipe_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("recipes") / "small.yaml"
    path.write_text(RECIPE)
    return path


def small(recipe_file, *overrides):
    return recipes.load(str(recipe_file), overrides)


@pytest.fixture(scope="module")
def whole(recipe_file, tmp_path_factory):
    """The run that is never interrupted; copy it."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(small(recipe_file, "engine.keep_checkpoints=9"), run, World(torch.device("cpu")))
    return run


@pytest.fixture(scope="module")
def stopped(whole, tmp_path_factory):
    """`stopped(path)`: a copy of the run as it was at step 3."""

    def copy(path):
        run = shutil.copytree(whole, path)
        for step in range(STEPS_PER_EPOCH + 1, TOTAL + 1):
            shutil.rmtree(run / "checkpoints" / f"step_{step:08d}")
        return run

    return copy


def command_in(text, start):
    """The arguments of the `fastdeit` command in backticks after `start`."""
    found = re.search(rf"{re.escape(start)}[^`]*`fastdeit ([^`]*)`", text)
    assert found, text
    return shlex.split(found[1])


# ---- which run, by which recipe --------------------------------------------------------------------------------------


def test_a_run_goes_on_by_its_name_alone_with_the_command_that_it_gave(
    recipe_file, whole, tmp_path, capfd, monkeypatch
):
    factors, step = [], Optimizer.step
    monkeypatch.setattr(Optimizer, "step", lambda *args: (factors.append(args[-1]), step(*args)))
    own = shutil.copy(recipe_file, tmp_path / "mine.yaml")
    recipe = recipes.load(str(own))
    with pytest.raises(Interrupted) as stop:
        train(recipe, None, StopAt(2))
    (run,) = Path("runs").iterdir()
    assert command_in(str(stop.value), "go on with") == ["train", "--resume", str(run), "--trust"]
    assert command_in(capfd.readouterr().out, "if it is interrupted")[2:] == [str(run), "--trust"]
    own.unlink()
    assert cli(command_in(str(stop.value), "go on with")) == 0
    out = capfd.readouterr().out
    assert out.startswith(f"starting: {run}\nrecipe mine, run directory {run}\n")
    assert "resumed at step 2 of 6" in out
    assert_same_weights(whole, run, TOTAL)
    assert logged(whole) == logged(run)
    assert factors == [decay_factor(step, total=TOTAL, end=0.4 / 0.04) for step in range(TOTAL)]
    last = next(record for record in logged(run) if record["kind"] == "train")
    assert last["weight_decay"] == pytest.approx(0.4 - 0.18 * (1 + math.cos(math.pi * 5 / 6)))
    assert "; weight decay from 0.04 to 0.4; " in out
    assert json.loads((run / "summary.json").read_text())["step"] == TOTAL


def test_the_newest_run_of_a_recipe_is_the_newest_that_has_a_checkpoint(recipe_file, stopped, capsys):
    Path("runs").mkdir()
    first = stopped(Path("runs") / "2026-01-01_000000_small")
    (Path("runs") / "2026-01-02_000000_small" / "checkpoints").mkdir(parents=True)
    assert cli(["train", str(recipe_file), "--resume"]) == 0
    assert f"run directory {first}" in capsys.readouterr().out
    assert cli(["train", "--resume", str(recipe_file)]) == 0, "a recipe in the place of the run is the recipe"


@pytest.mark.parametrize("form", ["--resume RUN", "--run-dir RUN --resume", "RECIPE --run-dir RUN --resume"])
def test_settings_of_the_engine_may_change_and_are_kept(recipe_file, stopped, tmp_path, form):
    run = stopped(tmp_path / "run")
    words = form.replace("RUN", str(run)).replace("RECIPE", str(recipe_file)).split()
    assert cli(["train", *words, "engine.log_every=1"]) == 0
    assert [record["step"] for record in logged(run) if record["kind"] == "train"][-3:] == [4, 5, 6]
    assert directory.recipe_of(run).engine.log_every == 1


def test_the_command_of_a_run_is_given_again_where_it_leaves_numbers_to_the_data(recipe_file, whole, tmp_path, capfd):
    words = ["train", str(recipe_file), "--resume", "optim.warmup_epochs=null", "--run-dir"]
    assert cli([*words, "run"]) == 0
    assert directory.recipe_of(Path("run")).optim.warmup_epochs == 0.1
    assert cli([*words, "run"]) == 0
    assert "resumed at step 6 of 6" in capfd.readouterr().out
    assert cli([*words, str(shutil.copytree(whole, tmp_path / "other"))]) == 2
    assert "optim.warmup_epochs: the run has 0.0, asked for 0.1" in capfd.readouterr().err


REFUSED = {
    "--resume RUN optim.lr=2e-3 train.epochs=3": r"optim.lr: the run has 0.001, asked for 0.002\n.*train.epochs: the "
    r"run has 2, asked for 3\n.* `fastdeit train --from RUN optim.lr=0.002 train.epochs=3`",
    "RECIPE --run-dir RUN --resume train.seed=4": "train.seed: the run has 0, asked for 4",
    "--resume RUN model.freeze=[rows]": r"model.freeze: .*\n.* `fastdeit train --from RUN 'model.freeze=\[\"rows\"\]'`",
    "--resume RUN model.image_size=64 optim.lr=2e-3": r"model.image_size: .*\n.*\n.* `fastdeit train "
    r"\S+ model.weights=RUN`",
    "RECIPE --resume RUN": "--resume RUN takes the recipe from the run; leave out RECIPE",
    "--resume RUN --run-dir x": "--resume RUN says which run; leave out --run-dir x",
    "--resume RUN --from RUN": "--from begins a new run and --resume goes on with one; give one of the two",
    "RECIPE --from RUN": "--from RUN takes the recipe from the run; leave out RECIPE",
    "--resume nowhere": "there is no run nowhere; give a directory that has checkpoints/",
    "--resume empty": "empty has no checkpoint to go on from",
    "--run-dir empty --resume": "empty has no checkpoint to go on from",
    "--resume RUN/checkpoints/step_00000003": r"is one checkpoint; a run goes on from its newest: --resume RUN\. To go "
    r"on from this one, in a new run: --from RUN/checkpoints/step_00000003",
    "RECIPE --resume": "there is no run of recipe small with a checkpoint under runs/",
    "RECIPE --run-dir RUN": "RUN already holds a run; go on with `fastdeit train --resume RUN`, or choose another",
}


def test_what_is_no_request_is_refused_in_a_sentence_and_nothing_changes(recipe_file, stopped, tmp_path, capfd):
    run = stopped(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    before = {path: path.stat().st_mtime_ns for path in sorted(run.rglob("*"))}
    for form, expected in REFUSED.items():
        put = {"RUN": str(run), "RECIPE": str(recipe_file)}
        words = re.sub("RUN|RECIPE", lambda match, put=put: put[match[0]], form).split()
        assert cli(["train", *words, "--dry-run"]) == 2, form
        dry = capfd.readouterr().err
        assert cli(["train", *words]) == 2, form
        err = capfd.readouterr().err
        assert dry == err
        expected = re.sub("RUN|RECIPE", lambda match, put=put: re.escape(put[match[0]]), expected)
        assert re.search(expected, err.replace("fastdeit: ", "")), (form, err)
        assert "Traceback" not in err
    assert {path: path.stat().st_mtime_ns for path in sorted(run.rglob("*"))} == before
    assert sorted(os.listdir(tmp_path)) == ["empty", "run"]
    assert os.listdir("empty") == []


def test_a_run_that_another_process_trains_is_refused(stopped, tmp_path, capfd):
    run = stopped(tmp_path / "run")
    for words in (["--resume", str(run)], ["--resume", str(run), "--dry-run"]):
        with locked(run, pytest.fail):
            assert cli(["train", *words]) == 2
        assert f"run is being trained by process {os.getpid()} on {os.uname().nodename}" in capfd.readouterr().err


def test_a_log_without_a_checkpoint_is_kept_beside(recipe_file, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "kind": "train", "loss": 1.0}\n')
    train(small(recipe_file), run, World(torch.device("cpu")), resume=True)
    assert (run / "metrics-1.jsonl").read_text() == '{"step": 1, "kind": "train", "loss": 1.0}\n'
    assert logged(run)[0]["step"] == TOTAL
    assert "what it had measured is kept as" in capsys.readouterr().out


def test_weights_that_a_run_began_with_need_not_exist_any_more(recipe_file, whole, tmp_path):
    weights = shutil.copytree(whole, tmp_path / "weights")
    recipe, run = small(recipe_file, f"model.weights={weights}"), tmp_path / "run"
    with pytest.raises(Interrupted):
        train(recipe, run, StopAt(2))
    shutil.rmtree(weights)
    train(recipe, run, World(torch.device("cpu")), resume=True)
    assert checkpoint.newest_state(run / "checkpoints")["recipe"]["model"]["weights"] == str(weights)


# ---- a start that fails ----------------------------------------------------------------------------------------------

TAUGHT = 'method.use=distill method.teacher.recipe="TEACHER"'
FAILS = {
    "model.weights=nowhere": "nowhere",
    "engine.sinks=[wandb]": r"sinks: wandb needs a package that is not installed: pip install 'fastdeit\[wandb\]'",
    "model.num_classes=7": "model.num_classes is 7, but the data set has 4 classes",
    "train.best_by=low": "train.best_by low is no metric of this run, which has top1_fused, top1_class, ",
    "train.best_by=top1_class_ema": "train.best_by top1_class_ema is no metric of this run",
    "engine.device=auto engine.capture=graph": "engine.capture graph needs a CUDA device, not cpu",
    "engine.parallel=fsdp2 engine.reduce=bf16 train.accumulate=2": "fsdp2: with engine.reduce bf16 it would add up",
    "optim.layer_decay=0.5": "optim.layer_decay: ",
    "--run-dir FILE": "FILE: the run directory cannot be made or written to: Not a directory",
    "method.use=distill method.teacher.model=nothing": "nothing",
    f"{TAUGHT} model.weights=nowhere": "nowhere",
    f"{TAUGHT} model.num_classes=7": "model.num_classes is 7",
    TAUGHT: "unheard_of",
}


@pytest.mark.parametrize("overrides", FAILS)
def test_a_start_that_fails_leaves_no_directory(recipe_file, tmp_path, monkeypatch, capfd, overrides):
    monkeypatch.setattr("fastdeit.engine.metrics.find_spec", lambda name: None)
    teacher = recipe_file.with_name("teacher.yaml")
    teacher.write_text(RECIPE.replace("tests.small_runs:Tiny", "tests.small_runs:unheard_of"))
    words = [
        "train",
        str(recipe_file),
        *overrides.replace("TEACHER", str(teacher)).replace("FILE", str(teacher)).split(),
    ]
    said = []
    for more in ([], ["--dry-run"]):
        assert cli([*words, *more]) == 2
        said.append(capfd.readouterr().err)
    assert said[0] == said[1]
    assert re.search(FAILS[overrides].replace("FILE", str(teacher)), said[0])
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_noticed_before_anything_is_made(recipe_file, tmp_path, monkeypatch, capfd):
    usage = SimpleNamespace(free=500)
    monkeypatch.setattr(directory.shutil, "disk_usage", lambda path: usage)
    for more in ([], ["--dry-run"]):
        assert cli(["train", str(recipe_file), *more]) == 2
        assert "has 5e-07 GB free, and 4 checkpoints of this run need" in capfd.readouterr().err
    assert os.listdir(tmp_path) == []


# ---- the guard -------------------------------------------------------------------------------------------------------


def test_a_run_that_the_guard_stopped_goes_on_from_before(recipe_file, whole, tmp_path, monkeypatch):
    run, cpu = tmp_path / "run", World(torch.device("cpu"))
    monkeypatch.setattr(Poisoned, "bad", (2, 3, 4))
    with pytest.raises(NonFiniteError, match="gradients of the steps 2 to 4 are not finite, and nothing of these"):
        train(small(recipe_file), run, cpu)
    assert checkpoint.steps(run / "checkpoints") == [1], "neither in the row nor at the good step after it"
    with pytest.raises(NonFiniteError, match="steps 2 to 4"):
        train(small(recipe_file), run, cpu, resume=True)
    monkeypatch.setattr(Poisoned, "bad", ())
    train(small(recipe_file), run, cpu, resume=True)
    mine, theirs = (checkpoint.load(path / "checkpoints" / "step_00000006").tensors for path in (run, whole))
    assert all(torch.equal(tensor, theirs["model"][name]) for name, tensor in mine["model"].items())
    assert mine["engine"]["skipped"].item() == 0, "it went on from before the first bad step"


def test_a_checkpoint_is_not_made_in_a_row_of_bad_steps_but_after_it(recipe_file, tmp_path, monkeypatch):
    monkeypatch.setattr(Poisoned, "bad", (2, 3))
    train(small(recipe_file, "engine.keep_checkpoints=9"), tmp_path / "run", World(torch.device("cpu")))
    assert checkpoint.steps(tmp_path / "run" / "checkpoints") == [1, 4, 5, 6]


def test_the_advice_after_a_stop_is_accepted(recipe_file, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(Poisoned, "bad", (4, 5, 6))
    run = tmp_path / "run"
    with pytest.raises(NonFiniteError) as stop:
        train(small(recipe_file, "engine.precision=bf16"), run, World(torch.device("cpu")))
    other_precision = command_in(str(stop.value), "in another precision")
    fork = command_in(str(stop.value), "a new run with a lower learning rate")
    further = command_in(str(stop.value), "bad already")
    assert other_precision == ["train", "--resume", str(run), "engine.precision=fp32", "--trust"]
    assert fork[2:] == [f"{run}@step=3", "optim.lr=0.0005", "optim.clip_grad=1.0", "--trust"]
    assert further[2] == f"{run}@step=2"
    monkeypatch.setattr(Poisoned, "bad", ())
    assert cli(fork) == 0
    (forked,) = Path("runs").iterdir()
    assert json.loads((forked / "summary.json").read_text())["step"] == TOTAL
    capfd.readouterr()
    assert cli(other_precision) == 0
    assert "resumed at step 3" in capfd.readouterr().out


def test_a_stop_before_the_first_checkpoint_says_to_start_anew(recipe_file, tmp_path, monkeypatch):
    monkeypatch.setattr(Poisoned, "bad", (1, 2, 3))
    with pytest.raises(NonFiniteError, match=r"There is no checkpoint from before; start anew with a lower optim\.lr"):
        train(small(recipe_file), tmp_path / "run", World(torch.device("cpu")))


def test_an_error_names_the_settings_that_no_checkpoint_has_yet(recipe_file, stopped, tmp_path, monkeypatch):
    def broken(*args, **options):
        raise checkpoint.CheckpointError("no space left")

    run = stopped(tmp_path / "run")
    monkeypatch.setattr(checkpoint, "save", broken)
    with pytest.raises(FastdeitError) as error:
        train(small(recipe_file, "engine.precision=bf16"), run, World(torch.device("cpu")), resume=True)
    words = command_in(str(error.value), "go on with")
    assert words[:3] == ["train", "--resume", str(run)]
    assert "engine.precision=bf16" in words[3:]


# ---- signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [signal.SIGHUP, signal.SIGTERM])
def test_a_first_signal_is_answered_and_a_second_one_obeyed(first, capfd):
    world = World(torch.device("cpu"))
    with world.stop_on_signals():
        os.kill(os.getpid(), first)
        assert world.stop_requested()
        os.kill(os.getpid(), signal.SIGUSR1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    said = f"fastdeit: {first.name} received; saving after this step (Ctrl-C or a second SIGTERM: at once)\n"
    assert capfd.readouterr().err == said


@pytest.mark.parametrize("stop", range(1, TOTAL))
def test_a_run_that_is_stopped_after_any_step_ends_as_if_it_had_not_been(recipe_file, whole, stop):
    recipe = small(recipe_file, "engine.keep_checkpoints=9")
    with pytest.raises(Interrupted, match=f"step {stop} of {TOTAL}"):
        train(recipe, Path("run"), StopAt(stop))
    train(recipe, Path("run"), World(torch.device("cpu")), resume=True)
    assert_same_weights(Path("run"), whole, TOTAL)
    assert logged(Path("run")) == logged(whole)


DURING = {
    "an evaluation": ("fastdeit.run.parts.evaluate", STEPS_PER_EPOCH + 1),
    "the first step, which compiles": ("fastdeit.engine.step.Engine.step", 1),
    "a save": ("fastdeit.engine.checkpoint.save", 2),
}
"""What runs when the signal comes, and the step after which the run has stopped."""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("during", DURING)
def test_a_signal_during_anything_is_heard_and_costs_nothing(recipe_file, whole, monkeypatch, during, number):
    place, stop = DURING[during]
    module, _, name = place.rpartition(".")
    owner = pydoc.locate(module)
    real, sent = getattr(owner, name), []

    def interrupted(*args, **options):
        if not sent:
            sent.append(number)
            os.kill(os.getpid(), number)
        return real(*args, **options)

    recipe = small(recipe_file, "engine.keep_checkpoints=9", "train.eval_every=1")
    monkeypatch.setattr(owner, name, interrupted)
    with pytest.raises(Interrupted, match=f"step {stop} of {TOTAL}") as raised:
        alone(recipe, Path("run"))
    assert (raised.value.exit_code, sent) == (75, [number])
    assert sorted(path.name for path in Path("run/checkpoints").iterdir())[-1] == f"step_{stop:08d}"
    alone(recipe, Path("run"), resume=True)
    assert_same_weights(Path("run"), whole, TOTAL)


@pytest.mark.slow
def test_a_signal_while_inductor_compiles_is_heard_and_costs_nothing(recipe_file, tmp_path, monkeypatch):
    from torch._inductor import compile_fx  # what takes long to import, and no other test needs

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))  # nothing is compiled there yet
    compiles, sent = compile_fx.fx_codegen_and_compile, []

    def interrupted(*args, **options):
        if not sent:
            sent.append(signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)
        return compiles(*args, **options)

    recipe = small(recipe_file, "engine.keep_checkpoints=9", "engine.capture=compile")
    monkeypatch.setattr(compile_fx, "fx_codegen_and_compile", interrupted)
    with pytest.raises(Interrupted, match=f"step 1 of {TOTAL}") as raised:
        alone(recipe, Path("run"))
    assert (raised.value.exit_code, sent) == (75, [signal.SIGTERM])
    assert os.listdir("run/checkpoints") == ["step_00000001"]
    alone(recipe, Path("run"), resume=True)
    alone(recipe, Path("never stopped"))
    assert_same_weights(Path("run"), Path("never stopped"), TOTAL)


def test_a_run_beside_the_main_thread_takes_no_signals():
    failures = []

    def run():
        try:
            with World(torch.device("cpu")).stop_on_signals():
                pass
        except ValueError as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert failures == []


def test_a_run_that_is_stopped_at_once_says_how_to_go_on(recipe_file, tmp_path, monkeypatch):
    def interrupted(self, step):
        if step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("fastdeit.run.record.RunLog.step", interrupted)
    with pytest.raises(FastdeitError) as stop:
        train(small(recipe_file), tmp_path / "run", World(torch.device("cpu")))
    assert command_in(str(stop.value), "go on with") == ["train", "--resume", str(tmp_path / "run"), "--trust"]
    assert not isinstance(stop.value, UsageError)
    assert not (tmp_path / "run" / "lock.json").exists()


@pytest.mark.parametrize("kills", [1, 2])
def test_an_evaluation_that_was_made_again_before_a_kill_is_logged_once(recipe_file, tmp_path, kills):
    """The run is stopped at an evaluation's step before the evaluation; those that resume it evaluate, and die."""
    run, evaluated = tmp_path / "run", ["train.eval_every=1", "engine.checkpoint_every=2"]

    def begin(step, world):
        train(small(recipe_file, *evaluated), run, world, resume=step > 0)

    with pytest.raises(Interrupted):
        begin(0, StopAt(STEPS_PER_EPOCH))
    assert logged(run) == []
    for _ in range(kills):
        with pytest.raises(ZeroDivisionError):
            begin(STEPS_PER_EPOCH, Dies(torch.device("cpu")))
        assert [record["kind"] for record in logged(run)] == ["eval"]
    begin(STEPS_PER_EPOCH, World(torch.device("cpu")))
    assert [(record["kind"], record["step"]) for record in logged(run)] == [("eval", 3), ("train", 6), ("eval", 6)]
    train(small(recipe_file, *evaluated), tmp_path / "other", World(torch.device("cpu")))
    assert logged(run) == logged(tmp_path / "other")


class Dies(World):
    """A world that ends after the first step."""

    def stop_requested(self):
        return 1 / 0
