"""`fastdeit chaos`: what it finds, that it would find a loss, and that it finds none in twenty kills."""

import io
import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastdeit import cli
from fastdeit.chaos import command, compare, damage, judge, victim
from fastdeit.chaos.faults import AT_START, Fault, Undisturbed, plan
from fastdeit.chaos.lives import Life
from fastdeit.engine import checkpoint
from tests.faults.faulty import in_child
from tests.faulty_ranks import RECIPE

NET_S = 900
RUN = Undisturbed(steps=60, start_s=1.0, step_s=0.01, largest=4096)


# ---- the plan --------------------------------------------------------------------------------------------------------


def test_the_plan_follows_from_the_seed():
    assert plan(3, 20, 2, RUN) == plan(3, 20, 2, RUN)
    assert plan(3, 20, 2, RUN) != plan(4, 20, 2, RUN)


@pytest.mark.parametrize("nproc", [1, 2])
def test_the_plan_has_all_kinds_in_the_order_of_their_steps(nproc):
    faults = plan(0, 20, nproc, RUN)
    kinds = Counter(fault.kind for fault in faults)
    launchers = 2 if nproc > 1 else 0
    assert kinds == {"kill": 20 - launchers, "hang": 4, "signal": 4, "disk": 4} | ({"launcher": 2} if launchers else {})
    steps = [fault.step for fault in faults if fault.step != AT_START]
    assert steps == sorted(steps)
    assert max(steps) < RUN.steps - 1
    assert {fault.rank for fault in faults if fault.kind == "hang"} == set(range(nproc))
    assert any(fault.points for fault in faults), "no kill falls into a save"
    assert any(fault.step == AT_START for fault in faults), "no kill falls into a start"


# ---- it would find a loss --------------------------------------------------------------------------------------------


def seen(*steps):
    """What one process has seen: (step, [[epoch, index, copy], ...], digest) in the order in which it was told."""
    found = compare.Seen()
    for step, samples, digest in steps:
        found.add(0, {"step": step, "samples": samples, "digest": digest})
    return found


WHOLE = (0, [[0, 4, 0], [0, 1, 0]], "a"), (1, [[0, 2, 0], [0, 3, 0]], "b")


@pytest.mark.parametrize(
    ("steps", "lost", "repeated", "other"),
    [
        (WHOLE, 0, 0, []),
        ((WHOLE[0], WHOLE[1], WHOLE[1]), 0, 0, []),  # made again after a kill
        (WHOLE[:1], 2, 0, [1]),
        ((WHOLE[0], (1, [[0, 2, 0], [0, 4, 0]], "b")), 1, 1, []),
        ((WHOLE[0], (1, [[0, 2, 0], [0, 3, 0]], "c")), 0, 0, [1]),
        ((*WHOLE, (2, [[0, 1, 0]], "d")), 0, 1, [2]),
    ],
)
def test_lost_and_repeated_samples_are_counted(steps, lost, repeated, other):
    assert compare.lost_and_repeated(seen(*steps), seen(*WHOLE)) == (lost, repeated)
    assert compare.other_batches(seen(*steps), seen(*WHOLE)) == other
    assert seen(*steps).made == len(steps)


def run_with(folder, value, best=0.0, line=1.0):
    state = {"record": {"best": best, "seconds": random.random()}}
    checkpoint.save(folder / "checkpoints", 5, {"model": {"w": value}, "optim": {"m": torch.ones(3)}}, state)
    record = {"step": 5, "loss": line, "images_per_second": random.random()}
    (folder / "metrics.jsonl").write_text(json.dumps(record) + "\n")
    return folder


def test_one_bit_of_a_tensor_the_record_or_the_log_is_a_difference(tmp_path):
    value = torch.tensor([1.0, float("nan")])
    one = run_with(tmp_path / "one", value)
    assert compare.other_tensors(run_with(tmp_path / "same", value), one) == ({"model": 1, "optim": 1}, [])
    bit = value.clone()
    bit.view(torch.int32)[0] ^= 1
    other = run_with(tmp_path / "other", bit, best=1.0, line=2.0)
    assert compare.other_tensors(other, one)[1] == ["model: w", "record: best"]
    assert compare.other_lines(tmp_path / "same", one) == (1, [])
    assert compare.other_lines(other, one) == (1, [1])
    (one / "checkpoints" / ".tmp-x").mkdir()
    assert compare.leftovers(one) == [".tmp-x"]


def test_a_spoilt_checkpoint_is_refused_and_nothing_of_it_executed(tmp_path, prepare):
    hows, rng = set(), random.Random(0)
    for number in range(24):
        root, canary = tmp_path / str(number), tmp_path / "canary"
        prepare(root, (1, 2))
        told = damage.spoil(root, rng, canary)
        hows.add(told.partition(" in ")[0])
        named = []
        assert checkpoint.newest(root, lambda path, reason, named=named: named.append(path.name)).step == 1, told
        assert named == ["step_00000002"]
        assert not canary.exists()
        assert damage.spoil(root, rng, canary) is None, "the only sound one is left alone"
    assert hows == {"a flipped bit", "a cut", "a pickle"}


@pytest.mark.parametrize(
    ("fault", "codes", "told"),
    [
        (Fault("kill", 0, 4), {0: -9}, {"kill": 1}),
        (Fault("kill", 1, 4), {0: 1, 1: -9}, {"kill": 1}),
        (Fault("kill", 1, 4), {0: 0, 1: -9}, None),
        (Fault("kill", 0, 4), {0: 1}, None),
        (Fault("launcher", 0, 4), {-1: -9}, {"launcher": 1}),
        (Fault("hang", 0, 4), {0: 75}, {"hang": 1}),
        (Fault("hang", 0, 4), {0: -9, 1: 1}, {"hang": 1}),
        (Fault("signal", 0, 4, signal="SIGTERM"), {0: 75, 1: 75}, {"signal": 1}),
        (Fault("signal", 0, 4, signal="SIGTERM"), {0: 1}, None),
        (Fault("disk", 0, 4, limit=9), {0: 1}, {"disk": 1}),
        (Fault("disk", 0, 4, limit=9), {0: 75}, None),
        (Fault("signal", 0, 4, signal="SIGINT"), {0: 0}, {}),
        (None, {0: 0}, {}),
        (None, {0: 1}, None),
    ],
)
def test_a_life_that_ends_otherwise_is_a_problem(fault, codes, told):
    outcome = judge.Outcome()
    judge.judge(outcome, fault, Life(codes))
    assert bool(outcome.problems) == (told is None)
    assert outcome.survived == (told or {})
    assert outcome.late == (told == {} and fault is not None)


@pytest.mark.parametrize("life", [Life({0: -9}, orphans=1), Life({0: -9}, silent=True)])
def test_orphans_and_silence_are_problems(life):
    outcome = judge.Outcome()
    judge.judge(outcome, Fault("kill", 0, 4), life)
    assert outcome.problems
    assert not outcome.survived


def test_a_spoilt_checkpoint_that_is_used_is_a_problem():
    outcome = judge.Outcome()
    assert not judge.judge_spoilt(outcome, "a cut in x", Life({}, "starting: r.yaml")), "it looked at no checkpoint"
    told = "checkpoint x is damaged (...); skipped\nresumed at step 3"
    assert judge.judge_spoilt(outcome, "a cut in x", Life({}, told))
    assert (outcome.refused, outcome.problems) == (["a cut in x"], [])
    assert judge.judge_spoilt(outcome, "a cut in y", Life({}, "resumed at step 4"))
    assert "a cut in y was not noticed" in outcome.problems[0]


@pytest.mark.parametrize(
    ("last", "refused", "told"),
    [
        ("checkpoint x is damaged (...); skipped\nresumed at step 1", 1, None),
        ("resumed at step 2", 0, "was not noticed"),
        ("starting: r.yaml", 0, "no life came to look at it"),
    ],
)
def test_the_last_life_judges_what_was_spoilt_before_it(tmp_path, prepare, monkeypatch, last, refused, told):
    prepare(tmp_path / "run" / "checkpoints", (1, 2))
    lives = iter([Life({0: -9}), Life({0: 0}, last)])
    host = SimpleNamespace(live=lambda command, fault: next(lives))
    monkeypatch.setattr(command, "plan", lambda *_: [Fault("kill", 0, 4)])
    args = SimpleNamespace(seed=1, kills=1, nproc=1, recipe="r.yaml", overrides=[])
    outcome = command._through_faults(args, host, RUN, tmp_path / "run", tmp_path, lambda text: None)
    assert len(outcome.refused) == refused
    assert [problem for problem in outcome.problems if told is None or told not in problem] == []
    assert bool(outcome.problems) == (told is not None)


@pytest.mark.parametrize(
    ("words", "told"),
    [([], "name the recipe"), (["digits"], "digits trains a teacher first"), (["no_such"], "no_such")],
)
def test_what_cannot_be_interrupted_is_refused_at_once(words, told, capsys):
    assert cli.main(["chaos", *words]) == 2
    assert told in capsys.readouterr().err


def test_what_a_process_unpickles_is_counted(tmp_path):
    torch.save([1], tmp_path / "file")
    os.mkfifo(tmp_path / "pipe.0")
    pipe = os.open(tmp_path / "pipe.0", os.O_RDWR | os.O_NONBLOCK)
    data = pickle.dumps("x" * 100)

    def unpickles():
        victim._Witness(str(tmp_path / "pipe"), None).watch()
        pickle.loads(data)
        pickle.load(io.BytesIO(data))
        pickle.Unpickler(io.BytesIO(data)).load()
        torch.load(tmp_path / "file")

    assert in_child(unpickles) == 0
    told = [json.loads(line) for line in os.read(pipe, 1 << 16).splitlines()]
    os.close(pipe)
    counted = [record["pickle"] for record in told if "pickle" in record]
    assert counted[:3] == [len(data)] * 3
    assert counted[3] == (tmp_path / "file").stat().st_size


# ---- it finds none ---------------------------------------------------------------------------------------------------


def chaos(folder, recipe, *words):
    (folder / "r.yaml").write_text(recipe)
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "TMPDIR": str(folder), "FAULTS": str(folder)}
    command = [sys.executable, "-m", "fastdeit", "chaos", "r.yaml", *words, "--json"]
    done = subprocess.run(command, cwd=folder, env=env, text=True, capture_output=True, timeout=NET_S)
    return done.returncode, json.loads(done.stdout) if done.stdout else done.stderr


LONGER = RECIPE.replace("tests.faulty_ranks:Faulty", "supervised").replace("epochs: 3", "epochs: 10")
LONGER = LONGER.replace("log_every: 100", "log_every: 7")


@pytest.mark.slow
def test_twenty_kills_and_what_comes_with_them_lose_nothing(tmp_path):
    code, found = chaos(tmp_path, LONGER, "optim.ema_decay=0.9", "--kills", "20")
    assert code == 0, found
    assert found["problems"] == []
    survived = found["survived"]
    assert survived["kill"] >= 15, "most kills came too late, so this proved little"
    assert {"kill", "hang", "signal", "disk"} == set(survived)
    assert sum(survived.values()) + found["late"] == 32
    assert found["bad_inputs_refused"]
    assert found["steps_made_again"] > 0
    assert (found["steps"], found["samples"]) == (60, 480)
    assert found["samples_lost"] == found["samples_repeated"] == found["pickle_bytes"] == found["orphans"] == 0
    assert {"model", "ema", "optim", "engine"} <= set(found["tensors"])
    assert found["metrics"] > 5
    assert not list(tmp_path.glob("fastdeit-chaos-*")), "the scratch folder is left"


@pytest.mark.slow
def test_two_processes_their_launcher_and_checkpoints_in_the_background_lose_nothing(tmp_path):
    words = "engine.log_every=3", "engine.async_checkpoints=true"
    code, found = chaos(tmp_path, LONGER, *words, "--kills", "5", "--nproc", "2")
    assert code == 0, found
    assert found["survived"]["launcher"] == 1
    assert found["metrics"] > 20, "lines of the log, each the mean of three steps, between saves every two"
    assert found["survived"]["kill"] >= 3
    assert found["samples_lost"] == found["samples_repeated"] == found["orphans"] == 0


@pytest.mark.slow
def test_a_method_that_forgets_something_is_found(tmp_path):
    """It keeps a number in no checkpoint, so a resumed run is another one."""
    recipe = LONGER.replace('use: "supervised"', 'use: "tests.forgetful:Forgets"')
    code, found = chaos(tmp_path, recipe, "--kills", "3")
    assert code == 1, found
    assert any("model: " in name for name in found["tensors_that_differ"])
    assert found["batches_that_differ"] == []
    assert Path(found["folder"]).is_dir(), "what differs is kept"
    shutil.rmtree(found["folder"])
