"""From one command to the processes of a run, and to an exit code that can be believed.

A process is a *worker* when something has given it a rank: this launcher, torchrun, or srun. It then trains, in this
process. Without a rank, `--nproc 1` trains in this process too, and `--nproc N` starts N workers with the same command
line (`agent.py`); so do `--nnodes` and `--max-restarts`. This module imports no torch: a worker sees to its signals
before the seconds which that takes.
"""

import argparse
import ctypes
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fastdeit import signals
from fastdeit.errors import Interrupted, UsageError
from fastdeit.launch.began import process_began

GRACE_S = 60.0
GRACE_VARIABLE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"  # torch's own name for it
LAUNCHER_VARIABLE = "FASTDEIT_LAUNCHER_PID"
BEGAN_VARIABLE = "FASTDEIT_BEGAN"
_WORKER = (
    "import sys; n = int(sys.argv[1]) + 2; sys.path[:] = sys.argv[2:n]; del sys.argv[1:n]; "
    "module = sys.argv.pop(1); import runpy; runpy.run_module(module, run_name='__main__', alter_sys=True)"
)
_LAST_PORT = 65535
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class Processes:
    """Which processes a command asks for.

    nproc         on each machine; None: not said
    nnodes        machines, each of which runs the same command
    rdzv          host:port where the launchers of several machines meet: one of them, and a port that is free there
    max_restarts  how often all are started anew after one has failed
    """

    nproc: int | None = None
    nnodes: int = 1
    rdzv: str | None = None
    max_restarts: int = 0

    @property
    def launched(self) -> bool:
        """Whether they need a launcher: else the command's own process is the only one."""
        return (self.nproc or 1) > 1 or self.nnodes > 1 or self.max_restarts > 0

    def check(self) -> None:
        """Raises UsageError for numbers that do not go together."""
        if (self.nnodes > 1) != (self.rdzv is not None):
            raise UsageError(
                "several machines need both --nnodes N and --rdzv HOST:PORT, where HOST is one of them; give the same "
                "command on each"
            )
        said = re.fullmatch(r"([\w.-]+|\[[\w.:]+\]):(\d{1,5})", self.rdzv or "")
        if self.rdzv is not None and not (said and 0 < int(said[2]) <= _LAST_PORT):
            raise UsageError(f"--rdzv {self.rdzv!r} is not HOST:PORT, such as node1:29500")


def run(
    args: argparse.Namespace, argv: list[str], work: Callable[[argparse.Namespace], None], processes: Processes
) -> int:
    """Do `work(args)` in this process, or `fastdeit argv` in new ones; return the exit code.

    Must be called in `process_of_a_run`. In this process the errors of `work` come through as exceptions. `args.began`
    is the start of the command, by `time.monotonic()`; a worker gets that of its launcher.
    """
    if "RANK" in os.environ:
        check_processes(processes, os.environ)
        args.began = launcher_began(os.environ, args.began)
    elif processes.launched:
        from fastdeit.launch.agent import elastic

        return elastic(
            worker_command(argv),
            processes.nproc or 1,
            grace_s=grace_seconds(os.environ),
            env=worker_environment(args.began),
            nnodes=processes.nnodes,
            rdzv=processes.rdzv,
            max_restarts=processes.max_restarts,
        )
    work(args)
    return 0


@contextmanager
def process_of_a_run(processes: Processes) -> Iterator[None]:
    """What a process of a training run does first, before torch is loaded: find its rank (`rank_environment`), make
    sure that it ends with its launcher, that it ends cleanly while it starts, and that threads without work sleep.

    Under srun each process of a step is a rank, unless it is told to meet launchers of other machines (`--nnodes`).
    `fastdeit.training` has signal handlers of its own for as long as there is something to save.
    """
    processes.check()
    ranks = None if processes.nnodes > 1 and "RANK" not in os.environ else rank_environment(os.environ)
    os.environ.update(ranks or {})
    if "RANK" in os.environ and "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent(int(os.environ.get(LAUNCHER_VARIABLE, os.getppid())))
    # Of OpenMP, which reads it when torch is loaded. A thread that has come to the end of an operation sleeps until the
    # others have, too. By default it keeps its processor busy meanwhile, which on a machine with other work is the one
    # that the others wait for: measured (docs/log.md), steps take 20 times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    before = {number: signal.signal(number, _exit_idle) for number in signals.listened()}
    # The launcher has started this process with these signals blocked: one that came before now is delivered here.
    blocked = signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.STOP_SIGNALS)
    try:
        yield
    finally:
        for number, handler in before.items():
            # A worker of the launcher has come to its end here. It is asked to stop once more if another worker was
            # faster, and must not die of that while it says why it ends, and Python shuts down. A mask would not keep
            # the signal away: it is of one thread, and libraries have others.
            signal.signal(number, signal.SIG_IGN if number in blocked else handler)


def _exit_idle(number: int, frame: object) -> None:
    if os.environ.get("RANK", "0") == "0":
        os.write(2, f"fastdeit: {signal.Signals(number).name} received while not training; nothing is lost\n".encode())
    # Not an exception: this may interrupt any import, and libraries catch what their optional imports raise.
    os._exit(Interrupted.exit_code)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent, process `parent`, ends for whatever reason (Linux only).

    Ranks whose launcher was killed would otherwise train on unseen, holding the GPUs of the next run.
    """
    if not sys.platform.startswith("linux"):
        return
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:  # it ended before the request was in place
        os.kill(os.getpid(), signal.SIGKILL)


def rank_environment(env: Mapping[str, str]) -> dict[str, str] | None:
    """The ranks of a worker (RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT), else None.

    The names are torchrun's. Under srun (a step of more than one task) they are derived from SLURM's; MASTER_ADDR and
    MASTER_PORT that are already set are kept. LOCAL_WORLD_SIZE is absent when nothing tells it.

    Raises UsageError for a rank without the rest, for the rest without a rank, and for what is no number.
    """
    if "RANK" in env:
        missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in env]
        if missing:
            raise UsageError(f"RANK is set but {', '.join(missing)} is not; {_START}")
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE")
        local_rank = env.get("LOCAL_RANK", "0" if env["WORLD_SIZE"] == "1" else None)
        if local_rank is None:
            raise UsageError(f"RANK is set but LOCAL_RANK is not; {_START}")
        return _checked({name: env[name] for name in names if name in env} | {"LOCAL_RANK": local_rank})
    # Only srun sets SLURM_STEP_NUM_TASKS. A batch script has SLURM_PROCID and SLURM_NTASKS too, but is no rank.
    if _number(env, "SLURM_STEP_NUM_TASKS", "1") > 1:
        return _checked(_slurm_ranks(env))
    if env.get("WORLD_SIZE", "1") != "1":
        raise UsageError(
            f"WORLD_SIZE={env['WORLD_SIZE'][:40]!r} is set, perhaps left over from another launch, but RANK is not; "
            f"{_START}"
        )
    left_over = {name: env[name] for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE") if name in env}
    _checked({"LOCAL_RANK": "0"} | left_over)  # they are read all the same
    return None


_START = "start with --nproc, torchrun or srun, or unset RANK and WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE"


def _number(env: Mapping[str, str], name: str, default: str) -> int:
    value = env.get(name, default)
    if not re.fullmatch(r"\d{1,9}", value):
        raise UsageError(f"{name}={value[:40]!r} in the environment is not a number; {_START}")
    return int(value)


def _checked(ranks: dict[str, str]) -> dict[str, str]:
    """`ranks`, whose numbers are numbers and go together; else UsageError."""
    number = {name: _number(ranks, name, "1") for name in ranks if name != "MASTER_ADDR"}
    if not 0 < number.get("MASTER_PORT", 1) <= _LAST_PORT:
        raise UsageError(
            f"MASTER_PORT={number['MASTER_PORT']} in the environment is no port (1 to {_LAST_PORT}); {_START}"
        )
    for part, whole in (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE")):
        if whole in number and number[part] >= number[whole]:
            raise UsageError(f"{part}={number[part]} does not fit {whole}={number[whole]} in the environment; {_START}")
    return ranks


def _slurm_ranks(env: Mapping[str, str]) -> dict[str, str]:
    needed = "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID"
    if missing := [name for name in needed if name not in env]:
        raise UsageError(f"SLURM_STEP_NUM_TASKS is set but {', '.join(missing)} is not; start with srun, or unset it")
    # Every rank must come to the same port; jobs that share a node to different ones, and so the steps of a job. Below
    # 32768, where Linux begins to give ports to whoever asks for any.
    port = 20000 + (_number(env, "SLURM_JOB_ID", "0") + 1009 * _number(env, "SLURM_STEP_ID", "0")) % 12000
    ranks = {
        "RANK": env["SLURM_PROCID"],
        "LOCAL_RANK": env["SLURM_LOCALID"],
        "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"],
        "MASTER_ADDR": env.get("MASTER_ADDR") or _first_host(env["SLURM_STEP_NODELIST"]),
        "MASTER_PORT": env.get("MASTER_PORT") or str(port),
    }
    # "8(x2),4": tasks on each node in order; only a uniform step tells every rank its own node's number.
    uniform = re.fullmatch(r"(\d+)(\(x\d+\))?", env.get("SLURM_STEP_TASKS_PER_NODE", ""))
    return ranks | ({"LOCAL_WORLD_SIZE": uniform[1]} if uniform else {})


def _first_host(nodelist: str) -> str:
    """First host of a SLURM node list: `a[03-07,9],b1` -> `a03`."""
    return re.sub(r"^([^\[,]*)(?:\[([^\],-]*)[^\]]*\])?([^,\[]*).*$", r"\1\2\3", nodelist)


def check_processes(processes: Processes, ranks: Mapping[str, str]) -> None:
    """When another launcher has given the ranks, `--nproc` and `--nnodes` may only repeat what it did.

    Raises UsageError when they say something else.
    """
    started = {
        "--nproc": (processes.nproc or 1, ranks.get("LOCAL_WORLD_SIZE", ranks.get("WORLD_SIZE")), "on this machine"),
        "--nnodes": (processes.nnodes, ranks.get("GROUP_WORLD_SIZE"), "groups of processes"),
    }
    for flag, (asked, known, what) in started.items():
        if known is not None and asked > 1 and asked != int(known):
            raise UsageError(
                f"{flag} {asked} disagrees with the launcher of this process, which started {known} {what}; leave "
                f"{flag} out under torchrun or srun"
            )


def told_by_launcher() -> bool:
    """Whether this process is a worker of a launcher of ours, which has read the same command before."""
    return "RANK" in os.environ and LAUNCHER_VARIABLE in os.environ


def worker_environment(began: float) -> dict[str, str]:
    """What the workers find in their environment besides their ranks; `began` as of `launcher_began`."""
    return {LAUNCHER_VARIABLE: str(os.getpid()), BEGAN_VARIABLE: repr(began)}


def worker_command(argv: list[str], module: str = "fastdeit") -> list[str]:
    """The command of a worker: `fastdeit argv` with the modules of this process, and none of the current folder.

    module  what is run as `python -m` runs it

    `python -m fastdeit` would search that folder first, and execute a random.py that happens to lie there.
    """
    own = str(Path(__file__).parents[2])
    path = [entry for entry in sys.path if entry]
    path += [] if own in path else [own]
    return [sys.executable, "-c", _WORKER, str(len(path)), *path, module, *argv]


def launcher_began(env: Mapping[str, str], began: float) -> float:
    """When the command of a worker was started, by `time.monotonic()`: its launcher, or torchrun, on this machine.

    srun tells no worker when it began: then it is `began`, the start of this process.
    """
    if BEGAN_VARIABLE in env:
        return float(env[BEGAN_VARIABLE])
    return process_began(os.getppid()) if "TORCHELASTIC_RUN_ID" in env else began


def grace_seconds(env: Mapping[str, str]) -> float:
    """Seconds the workers have to save once asked to stop. Raises UsageError when the setting is no such number."""
    value = env.get(GRACE_VARIABLE, str(GRACE_S))
    try:
        seconds = float(value)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise UsageError(f"{GRACE_VARIABLE}={value!r} is not a number of seconds")
    return seconds
