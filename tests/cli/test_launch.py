"""The launcher: exit codes, signals, grace, orphans. Workers are small scripts without torch."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastdeit import signals
from fastdeit.errors import UsageError
from fastdeit.launch import agent, launch
from fastdeit.launch.agent import elastic, verdict
from fastdeit.launch.began import process_began
from fastdeit.launch.launch import Processes

WORKER = """
import atexit, contextlib, os, signal, sys, time
from pathlib import Path
from fastdeit.launch import launch

mode, folder = sys.argv[1], Path(sys.argv[2])
rank = os.environ["RANK"]
stop = []
if mode == "slow":
    if rank == "0":
        os.kill(os.getppid(), signal.SIGTERM)
    while signal.SIGTERM not in signal.sigpending():  # one that is not blocked ends this process
        time.sleep(0.01)
with launch.process_of_a_run(launch.Processes()):
    if mode != "follow":
        signal.signal(signal.SIGTERM, signal.SIG_IGN if mode == "deaf" else lambda *_: stop.append(1))
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    words = [str(os.getpid()), *(os.environ[name] for name in names), *sys.argv[3:]]
    (folder / f"{rank}.launcher").write_text(str(os.getppid()))
    (folder / f"{rank}.part").write_text(" ".join(words))
    (folder / f"{rank}.part").rename(folder / f"{rank}.up")
    if mode in ("fail", "follow", "late", "outlive"):
        # The other one is asked to stop when this one ends, and is there to hear it.
        while not (folder / f"{1 - int(rank)}.up").exists():
            time.sleep(0.01)
    if mode == "fail":
        code = int(sys.argv[3 + int(rank)])
        if code < 0:
            os.kill(os.getpid(), -code)
        if code:
            sys.exit(code)
    if mode == "follow":
        if rank == sys.argv[4]:  # the launcher sees the end of the other one meanwhile
            atexit.register(time.sleep, 0.3) if sys.argv[5] == "shuts down" else time.sleep(0.3)
        sys.exit(int(sys.argv[3]))
    if mode == "outlive" and rank == "1":  # the launcher of rank 0, which is another machine's
        launcher = Path(f"/proc/{(folder / '0.launcher').read_text()}/stat")
        with contextlib.suppress(OSError):  # it is no more
            while " Z " not in launcher.read_text():
                time.sleep(0.01)
    if mode == "outlive":
        sys.exit(int(sys.argv[3]))
    if mode == "again" and rank == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] in sys.argv[4:]:
        sys.exit(int(sys.argv[3]))
    if mode == "late" and rank == "0":
        sys.exit(75)
    if mode in ("stop", "deaf") and rank == "0":
        while not (folder / "1.up").exists():
            time.sleep(0.01)
        for name in sys.argv[3:]:
            os.kill(os.getppid(), getattr(signal, name))
            time.sleep(0.3)
    while mode in ("stop", "slow", "deaf", "wait", "late") and not stop:
        time.sleep(0.01)
    if mode == "late":
        time.sleep(1)  # still writing the checkpoint when rank 0 has gone
    if mode in ("stop", "slow", "wait", "late"):
        (folder / f"{rank}.saved").write_text(str(len(stop)))
        sys.exit(75)
"""
LAUNCHER = """
import sys
from fastdeit.launch import agent, launch
sys.exit(agent.elastic([sys.executable, *sys.argv[1:]], 2, grace_s=20, env=launch.worker_environment(0.0)))
"""
ONE_OF_TWO_MACHINES = """
import sys
from fastdeit.launch import agent, launch
command = [sys.executable, *sys.argv[2:]]
sys.exit(agent.elastic(command, 1, grace_s=20, env=launch.worker_environment(0.0), nnodes=2, rdzv=sys.argv[1]))
"""


@pytest.fixture
def worker(tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    return script


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """Workers started anywhere find the package under test."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))


def run(worker: Path, mode: str, *more: str, grace_s: float = 20.0, max_restarts: int = 0) -> int:
    command = [sys.executable, str(worker), mode, str(worker.parent), *more]
    return elastic(command, 2, grace_s, launch.worker_environment(0.0), max_restarts=max_restarts)


def wait_for(condition, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)


def listens(port: int) -> bool:
    with socket.socket() as tried:
        return tried.connect_ex(("localhost", port)) == 0


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_all_done_is_0_and_ranks_find_their_place(worker, capfd):
    before = dict(os.environ), signal.getsignal(signal.SIGTERM)
    assert run(worker, "done", "data.root=$HOME/${local_rank}") == 0
    found = [(worker.parent / f"{rank}.up").read_text().split() for rank in (0, 1)]
    assert [words[1:5] for words in found] == [["0", "0", "2", "2"], ["1", "1", "2", "2"]]
    assert found[0][5] == found[1][5] == "127.0.0.1"
    assert found[0][6] == found[1][6] != "0"
    assert found[1][7] == "data.root=$HOME/${local_rank}", "arguments must reach the workers as they were given"
    assert (dict(os.environ), signal.getsignal(signal.SIGTERM)) == before
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("codes", "expected", "message"),
    [
        ("3 0", 3, ""),
        ("0 3", 3, "fastdeit: rank 1 failed first: exit code 3\n"),
        ("0 1", 1, "fastdeit: rank 1 failed first: exit code 1\n"),
        ("0 -9", 1, "fastdeit: rank 1 failed first: killed by SIGKILL (often the kernel's out-of-memory killer)\n"),
        ("2 2", 2, ""),
    ],
)
def test_failure_of_a_worker_is_the_runs(worker, capfd, codes, expected, message):
    assert run(worker, "fail", *codes.split()) == expected
    assert capfd.readouterr().err == message


@pytest.mark.parametrize(
    ("code", "slower", "does"),
    [("2", "0", "ends"), ("75", "1", "shuts down"), pytest.param("75", "0", "ends", marks=pytest.mark.slow)],
)
def test_all_workers_may_come_to_the_same_end_one_after_the_other(worker, capfd, code, slower, does):
    """The end of a faster one cuts neither the end of rank 0 short, which says why, nor the shutdown of a Python."""
    assert run(worker, "follow", code, slower, does) == int(code)
    assert capfd.readouterr().err == ""


@pytest.mark.slow
def test_a_launcher_that_outlives_that_of_rank_0_ends_as_its_worker(worker):
    """The store of both is gone then, with the launcher that was there first."""
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
    rdzv = f"localhost:{port}"
    command = [sys.executable, "-c", ONE_OF_TWO_MACHINES, rdzv, str(worker), "outlive", str(worker.parent), "2"]
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: listens(port), seconds=100)
    both = [first, subprocess.Popen(command, stderr=subprocess.PIPE, text=True)]
    said = [process.communicate(timeout=100)[1] for process in both]
    assert [process.returncode for process in both] == [2, 2], said
    ours = [[line for line in err.splitlines() if line.startswith("fastdeit: ")] for err in said]
    assert ours == [[], ["fastdeit: rank 1 failed first: exit code 2"]], "rank 0 has said why itself"


def test_a_failure_is_started_anew_as_often_as_allowed(worker, capfd):
    assert run(worker, "again", "1", "0", max_restarts=1) == 0
    err = capfd.readouterr().err
    assert "rank 1 failed first: exit code 1" in err
    assert "starting all ranks anew, from the newest checkpoint (restart 1 of 1)" in err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("code", "attempts", "expected", "restarts"),
    [("1", "0 1", 0, 2), ("1", "0 1 2 3", 1, 2), ("2", "0", 2, 0), ("3", "0", 3, 0), ("75", "0", 75, 0)],
)
def test_only_a_failure_is_started_anew(worker, capfd, code, attempts, expected, restarts):
    assert run(worker, "again", code, *attempts.split(), max_restarts=2) == expected
    assert capfd.readouterr().err.count("starting all ranks anew") == restarts


@pytest.mark.slow
def test_a_run_that_is_asked_to_stop_is_not_started_anew(worker, capfd):
    assert run(worker, "deaf", "SIGTERM", grace_s=0.3, max_restarts=2) == 1
    assert "starting all ranks anew" not in capfd.readouterr().err


def test_verdict():
    assert verdict({0: 0, 1: 75}, set()) == 75
    assert verdict({0: 1, 1: 3}, set()) == 3, "the peer's 1 is the connection it lost"
    assert verdict({0: 75, 1: 1}, set()) == 1
    assert verdict({0: 75, 1: -9}, {1}) == 1, "a killed rank has not saved"
    assert verdict({0: 3, 1: -9}, {1}) == 3
    assert verdict({0: -15, 1: 0}, set()) == 1


def test_sigterm_to_the_launcher_is_75(worker, capfd, monkeypatch):
    monkeypatch.setattr(signals, "REPEAT_S", 3600)
    assert run(worker, "stop", "SIGTERM", "SIGTERM") == 75
    assert [(worker.parent / f"{rank}.saved").read_text() for rank in (0, 1)] == ["1", "1"], (
        "told once, however often we are"
    )
    err = capfd.readouterr().err
    assert err.startswith("fastdeit: SIGTERM received; the workers have 20 s")
    assert err.count("\n") == 1


def test_a_port_that_an_earlier_launch_had_is_used_again(monkeypatch):
    create, ports = socket.create_server, []

    def same_port(address):
        listener = create(address if not ports else ports[0])
        ports.append(listener.getsockname())
        return listener

    monkeypatch.setattr(socket, "create_server", same_port)
    for _ in range(2):
        handler, _ = agent._alone()
        handler.shutdown()
        del handler  # and with it the server
    assert ports == [ports[0]] * 2


def test_a_signal_at_the_start_waits_until_workers_can_hear_it(worker, capfd):
    assert run(worker, "slow") == 75
    assert "SIGTERM received while not training; nothing is lost" in capfd.readouterr().err


def test_a_worker_gone_early_leaves_its_peer_the_time_to_save(worker):
    assert run(worker, "late") == 75
    assert (worker.parent / "1.saved").exists()


def test_deaf_workers_are_killed_after_the_grace(worker, capfd):
    assert run(worker, "deaf", "SIGTERM", grace_s=0.3) == 1
    assert "rank 0, 1 killed (still running 0.3 s after being asked to stop)" in capfd.readouterr().err


@pytest.mark.parametrize(
    "names",
    [("SIGTERM", "SIGTERM"), ("SIGQUIT",), pytest.param(("SIGHUP", "SIGINT"), marks=pytest.mark.slow)],
    ids=" ".join,
)
def test_a_second_signal_kills_at_once_and_so_does_sigquit(worker, capfd, monkeypatch, names):
    monkeypatch.setattr(signals, "REPEAT_S", 0)
    assert run(worker, "deaf", *names) == 1
    assert "rank 0, 1 killed (on request)" in capfd.readouterr().err


@pytest.mark.slow
def test_what_the_parent_ignores_stays_ignored(worker, capfd):
    """As under nohup: the worker sends SIGHUP first, and only the SIGTERM after it is obeyed."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run(worker, "stop", "SIGHUP", "SIGTERM") == 75
    finally:
        signal.signal(signal.SIGHUP, before)
    assert capfd.readouterr().err.startswith("fastdeit: SIGTERM received")


@pytest.fixture
def disposition():
    """`disposition(number, handler)` for the time of a test."""
    before = {}

    def put(number, handler):
        before.setdefault(number, signal.signal(number, handler))

    yield put
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("ignored", [signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGTERM])
def test_a_process_of_a_run_leaves_ignored_signals_alone_but_for_sigterm(ignored, disposition):
    disposition(ignored, signal.SIG_IGN)
    with launch.process_of_a_run(launch.Processes()):
        handled = {number for number in signals.STOP_SIGNALS if signal.getsignal(number) is launch._exit_idle}
    assert handled == set(signals.STOP_SIGNALS) - ({ignored} - {signal.SIGTERM})
    assert signal.getsignal(ignored) is signal.SIG_IGN


@pytest.mark.parametrize(
    ("received", "repeat_s", "at_once"),
    [
        ("SIGINT SIGINT", 3600, True),
        ("SIGUSR1 SIGINT", 3600, True),
        ("SIGTERM SIGTERM", 0, True),
        ("SIGTERM SIGTERM", 3600, False),  # of one `scancel`: to the group, and passed on by the parent in it
        ("SIGHUP SIGHUP", 0, False),
        ("SIGUSR1 SIGTERM SIGTERM", 0, False),  # the time limit of a job that is still saving
        ("SIGUSR1 SIGHUP", 0, False),
    ],
)
def test_what_a_second_signal_asks_for(received, repeat_s, at_once, monkeypatch):
    monkeypatch.setattr(signals, "REPEAT_S", repeat_s)
    demand, numbers = signals.Demand(), [signal.Signals[name] for name in received.split()]
    for number in numbers:
        assert not demand.at_once
        demand.receive(number)
    assert (demand.first, demand.at_once) == (numbers[0], at_once)


def test_workers_do_not_outlive_an_agent_that_breaks(worker, monkeypatch):
    def broken(agent, running):
        pids.extend(running.values())
        raise RuntimeError("a defect of the launcher")

    pids = []
    monkeypatch.setattr(agent._Agent, "_stop_if_needed", broken)
    with pytest.raises(RuntimeError, match="a defect of the launcher"):
        run(worker, "wait")
    assert len(pids) == 2
    assert not any(map(alive, pids))


@pytest.mark.slow
def test_ctrl_c_and_death_of_a_real_launcher(tmp_path):
    """Ctrl-C goes to a whole process group; SIGKILL gives the launcher no chance to tell its workers."""
    folders = [tmp_path / "interrupt", tmp_path / "kill"]
    launchers = []
    for folder in folders:
        folder.mkdir()
        (folder / "worker.py").write_text(WORKER)
        command = [sys.executable, "-c", LAUNCHER, str(folder / "worker.py"), "wait", str(folder)]
        launchers.append(subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True))
    try:
        wait_for(lambda: all((folder / f"{rank}.up").exists() for folder in folders for rank in (0, 1)))
        pids = [int((folder / f"{rank}.up").read_text().split()[0]) for folder in folders for rank in (0, 1)]
        assert all(map(alive, pids))
        launchers[1].kill()
        os.killpg(launchers[0].pid, signal.SIGINT)
        err = launchers[0].communicate(timeout=20)[1]
        assert launchers[0].returncode == 75
        assert "Traceback" not in err
        assert err.startswith("fastdeit: SIGINT received")
        wait_for(lambda: not any(map(alive, pids)), seconds=5)
    finally:
        for process in launchers:
            process.kill()
            process.wait()
            process.stderr.close()


def test_die_with_parent_notices_that_the_parent_is_gone():
    code = "from fastdeit.launch import launch; launch.die_with_parent(1 << 22); print('survived')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "")


def test_interrupted_before_training_is_75():
    code = (
        "import os, signal\nfrom fastdeit.launch import launch\n"
        "with launch.process_of_a_run(launch.Processes()):\n    os.kill(os.getpid(), signal.SIGINT)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 75
    assert done.stderr == "fastdeit: SIGINT received while not training; nothing is lost\n"


TORCHRUN = {
    "RANK": "3",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "1",
}
SLURM_BATCH = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "123456"}
SRUN = SLURM_BATCH | {
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}


def test_when_a_process_began():
    before = time.monotonic()
    with subprocess.Popen(["sleep", "60"]) as process:
        assert before - 0.02 < process_began(process.pid) < time.monotonic() + 0.02
        process.kill()
    assert process_began() < before - 0.02, "this interpreter has been running for a while"
    now = time.monotonic()
    assert process_began(1 << 22) >= now, "there is no such process"


def test_a_worker_takes_the_beginning_of_its_launcher():
    assert launch.launcher_began(launch.worker_environment(12.345678901), 99.0) == 12.345678901
    assert launch.launcher_began(SRUN, 99.0) == 99.0
    now = time.monotonic()
    assert launch.launcher_began({"TORCHELASTIC_RUN_ID": "none"}, now) == pytest.approx(process_began(os.getppid()))


def test_ranks_given_from_outside():
    assert launch.rank_environment({}) is None
    assert launch.rank_environment(TORCHRUN | {"HOME": "/"}) == TORCHRUN
    assert launch.rank_environment(SLURM_BATCH) is None, "a batch script is no rank; --nproc works in it"
    assert launch.rank_environment(SLURM_BATCH | {"SLURM_STEP_NUM_TASKS": "1"}) is None
    assert launch.rank_environment(SRUN) == {
        "RANK": "5",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "8",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu03",
        "MASTER_PORT": str(20000 + 123456 % 12000),
    }
    steps = [launch.rank_environment(SRUN | {"SLURM_STEP_ID": str(step)})["MASTER_PORT"] for step in range(3)]
    jobs = [launch.rank_environment(SRUN | {"SLURM_JOB_ID": str(123456 + n)})["MASTER_PORT"] for n in range(1, 4)]
    assert len({*steps, *jobs}) == 6, "steps of a job, and jobs, that share a machine do not share a port"
    assert launch.rank_environment(SRUN | TORCHRUN) == TORCHRUN, "torchrun inside a SLURM step is nearer"
    kept = launch.rank_environment(SRUN | {"MASTER_ADDR": "x", "MASTER_PORT": "5", "SLURM_STEP_TASKS_PER_NODE": "5,3"})
    assert (kept["MASTER_ADDR"], kept["MASTER_PORT"], "LOCAL_WORLD_SIZE" in kept) == ("x", "5", False)


@pytest.mark.parametrize(
    ("env", "told"),
    [
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE='4' is set, perhaps left over .* unset RANK and WORLD_SIZE"),
        (TORCHRUN | {"RANK": "4"}, "RANK=4 does not fit WORLD_SIZE=4"),
        (TORCHRUN | {"LOCAL_RANK": "2"}, "LOCAL_RANK=2 does not fit LOCAL_WORLD_SIZE=2"),
        (TORCHRUN | {"WORLD_SIZE": "four"}, "WORLD_SIZE='four' in the environment is not a number"),
        (TORCHRUN | {"MASTER_PORT": "-1"}, "MASTER_PORT='-1'"),
        (TORCHRUN | {"MASTER_PORT": "99999"}, "MASTER_PORT=99999 in the environment is no port"),
        ({"SLURM_STEP_NUM_TASKS": "x"}, "SLURM_STEP_NUM_TASKS='x'"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "but SLURM_PROCID, SLURM_LOCALID"),
    ],
    ids=str,
)
def test_an_environment_that_makes_no_sense_explains_itself(env, told):
    with pytest.raises(UsageError, match=told):
        launch.rank_environment(env)


def test_a_process_of_srun_knows_its_rank_and_a_launcher_under_srun_has_none(monkeypatch):
    for name, value in SRUN.items():
        monkeypatch.setenv(name, value)
    for name in TORCHRUN:
        monkeypatch.setenv(name, "to be put back")
        monkeypatch.delenv(name)
    with launch.process_of_a_run(Processes(4, 2, "gpu03:29500")):
        assert "RANK" not in os.environ
    with launch.process_of_a_run(Processes()):
        assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("5", "8")


@pytest.mark.parametrize("missing", ["LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_half_a_rank_is_refused(missing):
    env = {name: value for name, value in TORCHRUN.items() if name != missing}
    with pytest.raises(UsageError, match=f"RANK is set but {missing} is not"):
        launch.rank_environment(env)


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("n1", "n1"),
        ("a,b", "a"),
        ("a[03-07,9],b1", "a03"),
        ("a[12,15]", "a12"),
        ("r1n[2]-ib,c", "r1n2-ib"),
        ("a-b[1-2]", "a-b1"),
    ],
)
def test_first_host(nodelist, first):
    assert launch._first_host(nodelist) == first


def test_nproc_under_another_launcher():
    for asked in (Processes(), Processes(1), Processes(2), Processes(2, 2, "a:1")):
        launch.check_processes(asked, TORCHRUN | {"GROUP_WORLD_SIZE": "2"})
    launch.check_processes(Processes(7, 3, "a:1"), {"RANK": "0"})
    with pytest.raises(UsageError, match="--nproc 8 disagrees"):
        launch.check_processes(Processes(8), TORCHRUN)
    with pytest.raises(UsageError, match=r"--nproc 8 disagrees .* started 1 on this machine"):
        launch.check_processes(Processes(8), {"RANK": "0", "WORLD_SIZE": "1"})
    with pytest.raises(UsageError, match="--nnodes 3 disagrees"):
        launch.check_processes(Processes(2, 3, "a:1"), TORCHRUN | {"GROUP_WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (Processes(2, 2), "several machines need both"),
        (Processes(2, 1, "a:1"), "several machines need both"),
        (Processes(2, 2, "a"), "is not HOST:PORT"),
        (Processes(2, 2, "tcp://a:1"), "is not HOST:PORT"),
        (Processes(2, 2, "a:99999"), "is not HOST:PORT"),
    ],
)
def test_what_several_machines_need(asked, told):
    with pytest.raises(UsageError, match=told):
        asked.check()
    Processes(2, 2, "[fe80::1]:29500").check()


def test_a_machine_is_known_by_its_addresses():
    """Its own name need not be known, by itself or by others."""
    assert agent._is_here("127.0.0.1")
    assert agent._is_here("localhost")
    assert not any(map(agent._is_here, ("192.0.2.1", "no-such-host.invalid", "x" * 300)))
    assert agent._own_address("127.0.0.1", 29500) == "127.0.0.1"
    assert agent._own_address("no-such-host.invalid", 29500) is None


def test_where_the_launchers_meet_is_known_to_the_others_by_that_name(monkeypatch):
    """Debian enters a machine's own name as 127.0.1.1: what is bound or connected there is no address for others."""
    here = [(socket.AF_INET, ("127.0.1.1", 29500))]
    monkeypatch.setattr(agent, "_addresses", lambda host, port: here if host == "node1" else [])
    assert agent._own_address("node1", 29500) == "node1"


def test_settings_from_the_environment():
    assert launch.grace_seconds({}) == 60
    assert launch.grace_seconds({"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "90"}) == 90
    for wrong in ("soon", "-1", "nan", "inf"):
        with pytest.raises(UsageError, match=f"TORCH_ELASTIC_SHUTDOWN_TIMEOUT='{wrong}'"):
            launch.grace_seconds({"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": wrong})
