"""The processes of a run on one machine: torch's elastic agent, made to stop gracefully.

torch owns the protocol: rank assignment, the store where the workers meet, their environment, and the subprocesses.
What it does not offer is an ending whose exit code can be believed:

* A signal to torch's agent raises `SignalException`, so a run that saved and stopped looks like a crash. torch leaves
  the signals alone in a thread that is not the main one, so the agent runs in such a thread.
* When a worker of torch's agent ends early, its peers get a fixed 30 s, whatever they are writing, and the signal goes
  to whole process groups, where it also hits the helpers of the loader. torch has no setting for either. `_Agent`
  therefore replaces `_monitor_workers`, one of the methods that torch documents for those who extend its agent.
"""

import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

from torch.distributed import TCPStore
from torch.distributed.elastic.agent.server import WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.api import RunResult
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous

from fastdeit import signals
from fastdeit.errors import FastdeitError, Interrupted, NonFiniteError, UsageError

HOST = "127.0.0.1"
KILL_SIGNAL = signal.SIGQUIT
# After one worker has failed the others cannot finish a step; they only get time to say what they saw.
PEER_GRACE_S = 5.0
POLL_S = 0.1


def elastic(command: list[str], nproc: int, grace_s: float = 60.0, env: Mapping[str, str] | None = None) -> int:
    """Run `nproc` copies of `command` as the ranks of one run and return the exit code of the whole.

    Each copy finds RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in its environment, besides `env`.

    A first signal of `signals.listened` is passed on to every worker as one SIGTERM: they have `grace_s` seconds to
    save and exit 75. After that, or when a further signal asks for it (`signals.Demand`), or at a SIGQUIT, they are
    killed. The result is

    * 3 or 2 when a worker said so: the 1 of its peers is then only the lost connection;
    * else 1 when any worker failed or had to be killed;
    * else 75 when any worker was interrupted and saved;
    * else 0.

    Must be called from the main thread, the only one that can receive signals.
    """
    run_id = f"fastdeit-{os.getpid()}"
    # A multi-tenant store on port 0 takes a free port and keeps it; rendezvous and workers share this very server.
    store = TCPStore(HOST, 0, world_size=1, is_master=True, multi_tenant=True)
    spec = WorkerSpec(
        role="worker",
        local_world_size=nproc,
        rdzv_handler=StaticTCPRendezvous(HOST, store.port, rank=0, world_size=1, run_id=run_id, timeout=60),
        entrypoint=command[0],
        args=tuple(argument.replace("$", "$$") for argument in command[1:]),  # the agent expands ${local_rank}
        max_restarts=0,
        monitor_interval=POLL_S,
        master_addr=HOST,
        master_port=store.port,
        local_addr=HOST,
    )
    agent = _Agent(spec, grace_s)
    with _environment(env or {}), _signals_to(agent), _quiet_elastic(), ThreadPoolExecutor(1) as thread:
        thread.submit(_started_blocked, agent).result()
    code = verdict(agent.codes, agent.killed)
    agent.report(code)
    return code


def verdict(codes: Mapping[int, int], killed: set[int]) -> int:
    """Exit code of a run from those of its ranks; `killed` are the ranks whose code is the launcher's doing."""
    own = {code for rank, code in codes.items() if rank not in killed}
    for code in (NonFiniteError.exit_code, UsageError.exit_code):
        if code in own:
            return code
    if killed or own - {0, Interrupted.exit_code}:
        return FastdeitError.exit_code
    return Interrupted.exit_code if Interrupted.exit_code in own else 0


def _started_blocked(agent: "_Agent") -> None:
    """Run the agent in a thread that has the signals to stop blocked.

    The workers inherit that. A signal that reaches one before it has installed its handlers waits in the kernel,
    however long the worker takes to get there (`launch.process_of_a_run`). It would otherwise end the worker.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, signals.STOP_SIGNALS)
    agent.run()


class _Agent(LocalElasticAgent):
    """See the module. `codes` maps a rank to its exit code (negative: the signal that ended it)."""

    def __init__(self, spec: WorkerSpec, grace_s: float) -> None:
        super().__init__(spec, DefaultLogsSpecs(log_dir=os.devnull))
        self.codes: dict[int, int] = {}
        self.killed: set[int] = set()
        self._first_failure: int | None = None
        self._grace_s = grace_s
        self._deadline: float | None = None
        self._demand = signals.Demand()

    def on_signal(self, number: int, frame: object) -> None:
        """Handler of the signals to stop and of `KILL_SIGNAL`: note what is asked for; `_monitor_workers` does it."""
        if number == KILL_SIGNAL:
            self._demand.at_once = True
        else:
            self._demand.receive(number)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        running = self._reap(worker_group)
        if not running:
            if any(self.codes.values()):
                return RunResult(state=WorkerState.FAILED)
            return RunResult(state=WorkerState.SUCCEEDED, return_values=dict.fromkeys(self.codes))
        if self._demand.at_once or (self._deadline is not None and time.monotonic() > self._deadline):
            self._kill(running)
        elif self._deadline is None:
            self._stop_if_needed(running)
        return RunResult(state=WorkerState.HEALTHY)

    def _reap(self, worker_group: WorkerGroup) -> dict[int, int]:
        """Note the workers that have ended; return the process ids of the others, by rank."""
        running = {}
        for worker in worker_group.workers:
            rank = worker.global_rank
            if rank in self.codes:
                continue
            code = _exit_code(worker.id)
            if code is None:
                running[rank] = worker.id
                continue
            self.codes[rank] = code
            if code not in (0, Interrupted.exit_code) and self._first_failure is None and rank not in self.killed:
                self._first_failure = rank
        return running

    def _stop_if_needed(self, running: dict[int, int]) -> None:
        if self._demand.first is not None:
            seconds = self._grace_s
            _say(
                f"{self._demand.first.name} received; the workers have {seconds:g} s to save and stop "
                "(Ctrl-C or a second SIGTERM kills them now)"
            )
        elif self._first_failure is not None:
            seconds = min(PEER_GRACE_S, self._grace_s)
        elif Interrupted.exit_code in self.codes.values():
            seconds = self._grace_s
        else:
            return
        self._deadline = time.monotonic() + seconds
        for pid in running.values():
            # To the worker alone, not to its process group: its loader must go on feeding it until it has saved.
            os.kill(pid, signal.SIGTERM)

    def _kill(self, running: dict[int, int]) -> None:
        for rank, pid in running.items():
            if rank not in self.killed:
                self.killed.add(rank)
                # torch starts each worker in a session of its own; the group takes the worker's helpers along.
                os.killpg(pid, signal.SIGKILL)

    def report(self, code: int) -> None:
        """Say why a run ended with `code` where the ranks have not: a failed rank's peers may be louder than it was."""
        if self._first_failure is not None:
            # Rank 0 has given the reason itself for an end that all ranks came to together.
            if code == FastdeitError.exit_code or self.codes[0] != code:
                _say(f"rank {self._first_failure} failed first: {_describe(self.codes[self._first_failure])}")
        elif self.killed:
            ranks = ", ".join(map(str, sorted(self.killed)))
            why = (
                "on request" if self._demand.at_once else f"still running {self._grace_s:g} s after being asked to stop"
            )
            _say(f"rank {ranks} killed ({why}); the run said at its start how to go on from its last checkpoint")


def _exit_code(pid: int) -> int | None:
    """Exit code of a child process, negative for the signal that ended it; None while it runs.

    The child stays a zombie, so that its process id stays its own; torch collects it when the agent shuts down.
    """
    ended = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if ended is None:
        return None
    return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


def _describe(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name
    return f"killed by {name}" + (" (often the kernel's out-of-memory killer)" if name == "SIGKILL" else "")


def _say(message: str) -> None:
    print(f"fastdeit: {message}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _environment(extra: Mapping[str, str]) -> Iterator[None]:
    """`extra` in `os.environ`, which the agent copies for every worker, for the time of the block."""
    before = {name: os.environ.get(name) for name in extra}
    os.environ.update(extra)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _signals_to(agent: _Agent) -> Iterator[None]:
    """Hand the signals of the launcher to `agent`, for the time of the block."""
    numbers = (*signals.listened(), KILL_SIGNAL)
    before = {number: signal.signal(number, agent.on_signal) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _quiet_elastic() -> Iterator[None]:
    """The agent's warnings describe its own bookkeeping; what matters of it is said by `report`."""
    names = "torch.distributed.elastic.agent.server.api", "torch.distributed.elastic.multiprocessing.api"
    levels = {logger: logger.level for logger in map(logging.getLogger, names)}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
