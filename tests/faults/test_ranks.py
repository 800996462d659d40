"""Whole runs of two real processes that come to harm: hung, stopped and killed ranks, restarts, signals, srun, nodes.

Each waits for events. The time-outs are safety nets.
"""

import contextlib
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from tests.faults.forked import Command
from tests.faulty_ranks import RECIPE
from tests.small_runs import assert_same_weights

pytestmark = pytest.mark.slow
TOTAL, NET_S = 18, 300


@pytest.fixture
def started(tmp_path):
    """`started(*words, fault=..., **env)` is a process of `fastdeit train` in `tmp_path`."""
    (tmp_path / "r.yaml").write_text(RECIPE)
    (tmp_path / "faults").mkdir()
    processes = []

    def start(*words, fault="", launcher=(sys.executable,), **env):
        new = os.environ | {
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "FAULTS": str(tmp_path / "faults"),
            "FAULT": fault,
            **env,
        }
        alone = launcher == (sys.executable,) and "--nproc" not in words
        if alone:  # it starts no others, so nothing is lost where it is forked
            processes.append(Command(["train", "r.yaml", *words], tmp_path, new, f"command_{len(processes)}"))
            return processes[-1]
        command = [*launcher, "-m", "fastdeit", "train", "r.yaml", *words]
        process = subprocess.Popen(
            command, cwd=tmp_path, env=new, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def ended(process):
    out, err = process.communicate(timeout=NET_S)
    return process.returncode, out, err


def comes(path):
    end = time.monotonic() + NET_S
    while not path.exists():
        assert time.monotonic() < end, f"{path} does not come"
        time.sleep(0.02)


def says(process, text):
    """Wait until the process has said this on stderr."""
    assert any(text in line for line in process.stderr), f"it ended without: {text}"


def processes_of(launcher):
    """The ids of a launcher and of its workers."""
    found = [launcher.pid]
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has ended
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            found += [int(stat.parent.name)] if parent == launcher.pid else []
    return found


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run of two processes that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    (folder / "r.yaml").write_text(RECIPE)
    (folder / "faults").mkdir()
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "FAULTS": str(folder / "faults")}
    command = [sys.executable, "-m", "fastdeit", "train", "r.yaml", "--nproc", "2", "--run-dir", "run"]
    subprocess.run(command, cwd=folder, env=env, check=True, timeout=NET_S)
    return folder / "run"


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("hang 0 4", r"rank 0 hangs \(process \d+ on .*; rank 1 waited for it"),
        ("stop 1 4", r"rank 1 hangs: it says nothing at all.*; rank 0 waited for it"),
    ],
)
def test_a_rank_that_hangs_is_named_and_the_run_fails(started, fault, told):
    code, _, err = ended(started("--nproc", "2", "engine.timeout_s=4", fault=fault))
    assert code == 1
    assert re.search(rf"^fastdeit: {told}", err, re.M), err
    assert "its stacks:" in err


def test_a_run_that_is_started_anew_ends_as_if_nothing_had_happened(started, whole, tmp_path):
    """Before its first checkpoint, between two and after the last of an epoch; each rank, by each kind of end."""
    fault = "kill 0 0,kill 1 2,raise 0 7,hang 1 9"
    code, _, err = ended(started("--nproc", "2", "--max-restarts", "4", "engine.timeout_s=4", fault=fault))
    assert code == 0, err
    assert err.count("starting all ranks anew") == 4
    assert [f"rank {rank} failed first" in err for rank in (0, 1)] == [True, True]
    told = r"rank 1 hangs \(process \d+ on .*\): at the computation of a step for .*faulty_ranks.py:\d+ \(hang\)"
    assert re.search(rf"^fastdeit: {told}", err, re.M), err
    assert "ZeroDivisionError" in err
    (run,) = (tmp_path / "runs").iterdir()
    assert_same_weights(whole, run, TOTAL)


def test_torchrun_restarts_from_the_newest_checkpoint_too(started, whole, tmp_path):
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--max-restarts=1", "--standalone")
    code, _, err = ended(started("--run-dir", "run", fault="kill 1 8", launcher=launcher))
    assert code == 0, err
    assert_same_weights(whole, tmp_path / "run", TOTAL)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_torchrun_saves(started, tmp_path, number):
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone")
    process = started("--run-dir", "run", fault="pause all all", launcher=launcher)
    comes(tmp_path / "faults" / "1.3")
    process.send_signal(number)
    _, _, err = ended(process)
    assert "interrupted at step" in err


def srun(rank, port):
    return {
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "MASTER_PORT": str(port),
    }


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_under_srun_a_signal_to_one_process_saves_and_all_end_with_75(started, whole, tmp_path, number):
    port = free_port()
    both = [started("--run-dir", "run", fault="pause all all", **srun(rank, port)) for rank in (0, 1)]
    comes(tmp_path / "faults" / "1.3")
    both[1].send_signal(number)
    found = [ended(process) for process in both]
    assert [code for code, _, _ in found] == [75, 75], found
    assert ["interrupted at step" in err for _, _, err in found] == [True, False]
    both = [started("--run-dir", "run", "--resume", **srun(rank, port)) for rank in (0, 1)]
    assert [ended(process)[0] for process in both] == [0, 0]
    assert_same_weights(whole, tmp_path / "run", TOTAL)


def test_under_srun_one_process_speaks_and_the_dead_one_is_named(started):
    port = free_port()
    both = [started(fault="kill 1 4", **srun(rank, port)) for rank in (0, 1)]
    (code, out, err), (theirs, silent, _) = (ended(process) for process in both)
    assert (code, theirs, silent) == (1, -signal.SIGKILL, "")
    assert "recipe r, run directory" in out
    assert re.search(r"rank 1 of 2 ended or cannot be reached any more \(process \d+ on", err), err


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("stop 0 4", r"rank 0 hangs \(process \d+ on .*\): its store has not answered for \d+ s"),
        ("hold 0 4", r"rank 0 hangs: it says nothing at all.*; rank 1 waited for it"),
        ("stop 1 4", r"rank 1 hangs: it says nothing at all.*; rank 0 waited for it"),
    ],
)
def test_under_srun_a_rank_that_cannot_speak_is_named(started, fault, told):
    """Under srun rank 0 has the store by which the others find out who hangs."""
    port, hangs = free_port(), int(fault.split()[1])
    both = [started("engine.timeout_s=4", fault=fault, **srun(rank, port)) for rank in (0, 1)]
    code, _, err = ended(both[1 - hangs])
    assert code == 1
    assert re.search(rf"^fastdeit: {told}", err, re.M), err
    assert "its stacks:" in err
    if fault.startswith("hold"):
        code, _, err = ended(both[hangs])
        assert code == 1
        assert re.search(r"File .*faulty_ranks.py", err), err


DIFFERS = {
    "no run": (["--resume", "run", "--trust"], RECIPE, r"rank 1 on \S+: --resume: there is no run run"),
    "none to begin with": (["r.yaml", "--run-dir", "run", "--resume"], RECIPE, "differ in the checkpoints of run: "),
    "another recipe": (["r.yaml"], RECIPE.replace("flip: 0", "flip: 0.5"), r"differ in data\.flip: 0\.5, and 0\.0; "),
    "a mistake": (["r.yaml"], RECIPE.replace("flip", "flop"), r"rank 1 on \S+: r\.yaml:4: data\.flop: unknown field"),
    "no data": (["r.yaml", "data.source=folder", "data.root=here"], RECIPE, r"process 1: \S+ folder: here: no such"),
    "no weights": (["eval", "run", "--trust"], RECIPE, r"rank 1 on \S+: run: there is no run; "),
}


@pytest.mark.parametrize("what", DIFFERS)
def test_a_machine_that_has_something_else_ends_the_start_of_all_in_a_sentence(whole, tmp_path, what):
    """Two folders stand for two machines."""
    words, theirs, told = DIFFERS[what]
    port, verb = free_port(), [] if words[0] == "eval" else ["train"]
    for folder, recipe in ((tmp_path / "0", RECIPE), (tmp_path / "1", theirs)):
        folder.mkdir()
        (folder / "r.yaml").write_text(recipe)
    shutil.copytree(whole, tmp_path / "0" / "run")
    for name in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / "0" / "here" / name).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(tmp_path / "0" / "here" / name / "1.png")
    both = [Command([*verb, *words], tmp_path / str(rank), os.environ | srun(rank, port), "command") for rank in (0, 1)]
    (code, _, err), (theirs, _, silent) = (ended(process) for process in both)
    assert (code, theirs, silent) == (2, 2, ""), (err, silent)
    assert re.search(told, err), err
    assert err.count("\n") == 1
    assert not (tmp_path / "1" / "run").exists()


@pytest.mark.parametrize("bad", [(0, 1), (1,)], ids=["all", "process 1"])
def test_data_without_a_usable_picture_end_in_a_message_on_all_processes_and_on_one(tmp_path, bad):
    """Two folders stand for two machines, whose files have the same names and sizes."""
    port, picture = free_port(), io.BytesIO()
    Image.new("RGB", (9, 9)).save(picture, "PNG")
    for rank in (0, 1):
        folder = tmp_path / str(rank)
        for name in [f"{split}/{label}" for split in ("train", "val") for label in "ab"]:
            (folder / "here" / name).mkdir(parents=True)
            for number in range(16):
                content = bytes(len(picture.getvalue())) if rank in bad else picture.getvalue()
                (folder / "here" / name / f"{number:02d}.png").write_bytes(content)
        (folder / "r.yaml").write_text(RECIPE.replace("tests.faulty_ranks:Faulty", "supervised"))
    words = ["train", "r.yaml", "data.source=folder", "data.root=here", "engine.timeout_s=4"]
    both = [Command(words, tmp_path / str(rank), os.environ | srun(rank, port), "command") for rank in (0, 1)]
    found = [ended(process) for process in both]
    assert [code for code, _, _ in found] == [1, 1]
    for rank in bad:
        assert re.search(r"of 32 images cannot be used, more than max_bad_fraction .*; repair", found[rank][2]), found
    if 0 not in bad:
        assert re.search(r"rank 1 (of 2 ended|\(process \d+ on \S+\) has failed)", found[0][2]), found
    assert not any("Traceback" in err for _, _, err in found)


def test_under_srun_eval_evaluates_once(whole, tmp_path):
    port, words = free_port(), ["eval", whole, "--json", "--trust"]
    both = [Command(words, tmp_path, os.environ | srun(rank, port), f"eval_{rank}") for rank in (0, 1)]
    (code, out, err), (theirs, silent, _) = (ended(process) for process in both)
    assert (code, theirs, silent) == (0, 0, ""), err
    assert json.loads(out)["images"] == 4


def test_under_srun_a_taken_port_ends_both(started):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        both = [started(**srun(rank, port)) for rank in (0, 1)]
        found = [ended(process) for process in both]
    assert [code for code, _, _ in found] == [1, 1]
    assert f"port {port} of localhost is taken" in found[0][2]
    assert "is not rank 0 of this run: the port is taken" in found[1][2]


def test_two_launchers_meet_as_two_machines_do_and_one_signal_stops_both(started, whole, tmp_path):
    words = "--nproc", "1", "--nnodes", "2", "--rdzv", f"localhost:{free_port()}", "--run-dir", "run"
    both = [started(*words, fault="wait all 3,pause all all") for _ in range(2)]
    comes(tmp_path / "faults" / "wait.1.3")
    both[1].send_signal(signal.SIGTERM)
    says(both[1], "SIGTERM received; the workers have")
    (tmp_path / "faults" / "go.3").touch()
    found = [ended(process) for process in both]
    assert [code for code, _, _ in found] == [75, 75], found
    both = [started(*words, "--resume") for _ in range(2)]
    assert [ended(process)[0] for process in both] == [0, 0]
    assert_same_weights(whole, tmp_path / "run", TOTAL)


def test_a_launcher_that_waits_for_another_machine_obeys(started):
    process = started("--nproc", "1", "--nnodes", "2", "--rdzv", f"localhost:{free_port()}")
    assert process.stdout.readline().startswith("starting")
    time.sleep(3)  # it waits, or is about to: either way it obeys
    process.send_signal(signal.SIGTERM)
    code, _, err = ended(process)
    assert code == 75
    assert "nothing has begun" in err or "nothing is lost" in err


def test_under_nohup_a_run_outlives_its_terminal_and_a_signal_to_all_saves(started, whole, tmp_path):
    """A scheduler or a container signals every process at once, and the launcher passes on what it has got."""
    fault, faults = "wait all 3,wait all 8", tmp_path / "faults"
    launcher = started("--nproc", "2", "--run-dir", "run", fault=fault, launcher=("nohup", sys.executable))
    for step, number in ((3, signal.SIGHUP), (8, signal.SIGTERM)):
        for rank in (0, 1):
            comes(faults / f"wait.{rank}.{step}")
        everyone = processes_of(launcher)
        assert len(everyone) == 3
        for process in everyone:
            os.kill(process, number)
        (faults / f"go.{step}").touch()
    code, _, err = ended(launcher)
    assert code == 75
    assert err.count("SIGTERM received; the workers have") == 1
    assert "interrupted at step" in err
    assert "SIGHUP" not in err
    port = free_port()
    both = [started("--run-dir", "run", "--resume", **srun(rank, port)) for rank in (0, 1)]
    assert [ended(process)[0] for process in both] == [0, 0]
    assert_same_weights(whole, tmp_path / "run", TOTAL)


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGUSR1])
def test_a_single_process_saves_at_every_signal(started, tmp_path, number):
    process = started("--run-dir", "run", fault="pause all all")
    comes(tmp_path / "faults" / "0.3")
    process.send_signal(number)
    code, _, err = ended(process)
    assert code == 75
    assert f"{number.name} received" in err
    assert "interrupted at step" in err
