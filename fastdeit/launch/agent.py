"""The processes of a run on one machine: torch's elastic agent, made to stop gracefully.

torch owns the protocol: rank assignment, the store where the workers meet, their environment, and the subprocesses.
What it does not offer is an ending whose exit code can be believed:

* A signal to torch's agent raises `SignalException`, so a run that saved and stopped looks like a crash. torch leaves
  the signals alone in a thread that is not the main one, so the agent runs in such a thread.
* When a worker of torch's agent ends early, its peers get a fixed 30 s, whatever they are writing, and the signal goes
  to whole process groups, where it also hits the helpers of the loader. torch has no setting for either. `_Agent`
  therefore replaces `_monitor_workers`, one of the methods that torch documents for those who extend its agent. Its
  own also says too little: of workers that end by its signal it keeps no exit code, so whether they saved is not known.
"""

import contextlib
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch.distributed import TCPStore
from torch.distributed.elastic.agent.server import WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.api import RunResult
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous import (
    RendezvousConnectionError,
    RendezvousError,
    RendezvousHandler,
    RendezvousParameters,
)
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler
from torch.distributed.elastic.rendezvous.static_tcp_rendezvous import StaticTCPRendezvous
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint

from fastdeit import signals
from fastdeit.errors import COMMON_CODES, FastdeitError, Interrupted, NonFiniteError, UsageError

HOST = "127.0.0.1"
KILL_SIGNAL = signal.SIGQUIT
# After one worker has failed the others cannot finish a step; they only get time to say what they saw.
PEER_GRACE_S = 5.0
POLL_S = 0.1
MEET_S = 600
"""Seconds for the launchers of several machines to meet: they may be started by hand, one after the other."""


def elastic(
    command: list[str],
    nproc: int,
    grace_s: float = 60.0,
    env: Mapping[str, str] | None = None,
    *,
    nnodes: int = 1,
    rdzv: str | None = None,
    max_restarts: int = 0,
) -> int:
    """Run `nproc` copies of `command` as ranks of one run, those of this machine, and return their exit code.

    nnodes        machines of the run, on each of which this is called
    rdzv          host:port where the launchers of several machines meet, on one of them
    max_restarts  how often all ranks are started anew after one has failed (code 1 below)

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
    with _environment(env or {}), _quiet_elastic():
        handler, address = _alone() if nnodes == 1 else _meeting(rdzv, nnodes)
        spec = WorkerSpec(
            role="worker",
            local_world_size=nproc,
            rdzv_handler=handler,
            entrypoint=command[0],
            args=tuple(argument.replace("$", "$$") for argument in command[1:]),  # the agent expands ${local_rank}
            max_restarts=max_restarts,
            monitor_interval=POLL_S,
            **address,
        )
        agent = _Agent(spec, grace_s, nnodes)
        with signals.handled(agent.on_signal, KILL_SIGNAL), ThreadPoolExecutor(1) as thread:
            try:
                thread.submit(_started_blocked, agent).result()
            except RendezvousError as error:
                raise FastdeitError(
                    f"the launchers of {nnodes} machines did not meet at {rdzv}: {str(error) or type(error).__name__}; "
                    "look for what the others have said, and give the same command on each"
                ) from error
            finally:
                handler.shutdown()
    code = verdict(agent.codes, agent.killed)
    agent.report(code)
    return code


def _alone() -> tuple[RendezvousHandler, dict[str, Any]]:
    """A rendezvous of this launcher with itself, and the address for its workers: nothing beyond this machine."""
    # Rendezvous and workers share one server, which has its port before anybody is told of it. PyTorch keeps a table of
    # a process's servers by port. On port 0 it leaves the entry of an earlier server of that port, and the rendezvous
    # would start a second server there instead of joining this one.
    listener = socket.create_server((HOST, 0))
    port = listener.getsockname()[1]
    server = {"is_master": True, "multi_tenant": True, "master_listen_fd": listener.detach()}
    store = TCPStore(HOST, port, world_size=1, **server)
    run_id = f"fastdeit-{os.getpid()}"
    handler = StaticTCPRendezvous(HOST, port, rank=0, world_size=1, run_id=run_id, timeout=60)
    handler.next_rendezvous()  # joins the server while `store` holds it
    del store
    return handler, {"master_addr": HOST, "master_port": port, "local_addr": HOST}


def _meeting(rdzv: str, nnodes: int) -> tuple["_Lasting", dict[str, Any]]:
    """torch's rendezvous of the launchers of several machines, at a store that one of them keeps at `rdzv`.

    Raises FastdeitError where there is no store within `MEET_S`.
    """
    host, port = parse_rendezvous_endpoint(rdzv, default_port=0)
    own = _own_address(host, port)
    settings = {"join_timeout": str(MEET_S), "last_call_timeout": "1", "read_timeout": "10", "local_addr": own}
    end, hosts = time.monotonic() + MEET_S, _is_here(host)
    while True:  # each try is short, so that a signal is obeyed in between
        parameters = RendezvousParameters("c10d", rdzv, "fastdeit", nnodes, nnodes, is_host=str(hosts), **settings)
        try:
            return _Lasting(get_rendezvous_handler(parameters)), {}
        except RendezvousConnectionError as error:
            hosts = _is_here(host) and not hosts  # another launcher of this machine may keep the store, or may have
            if time.monotonic() > end:
                raise FastdeitError(
                    f"nobody listens at {rdzv}, where the launchers of {nnodes} machines are to meet, or another "
                    "program does; HOST of --rdzv must be one of the machines, under the name that it has for the "
                    "others, and PORT free there"
                ) from error


class _Lasting:
    """A rendezvous that outlives its store.

    torch's agent asks at every look at its workers whether other machines wait to join, and ends all workers where the
    store does not answer. But the launcher that keeps the store may end before this one: its worker was faster to save
    and to exit. So from the first question without an answer on nobody waits. Workers that still need the store's
    machine notice themselves that it has gone.
    """

    def __init__(self, handler: RendezvousHandler) -> None:
        self._handler, self._answers = handler, True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handler, name)

    def num_nodes_waiting(self) -> int:
        """How many other launchers want to join."""
        if self._answers:
            try:
                return int(self._handler.num_nodes_waiting())
            except RendezvousConnectionError:
                self._answers = False  # asked once more, a machine that cannot be reached would cost 10 s a time
        return 0

    def shutdown(self) -> bool:
        """Let the other launchers know that this one has ended, where they can be told."""
        return self._answers and self._handler.shutdown()


def _addresses(host: str, port: int) -> list[tuple[Any, ...]]:
    """(family, address) of each that `host` has; none for one that is not known."""
    with contextlib.suppress(OSError, UnicodeError):
        return [(each[0], each[4]) for each in socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)]
    return []


def _is_here(host: str) -> bool:
    """Whether `host` is this machine: then one of its addresses can be bound here. torch compares names instead, and
    raises where this machine does not know its own, as in many containers."""
    for family, address in _addresses(host, 0):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as tried:
            tried.bind(address)
            return True
    return False


def _own_address(host: str, port: int) -> str | None:
    """The address of this machine that the others can reach; None where there is none. That is `host` where it is this
    machine: the others meet there, while here its name may stand for a loopback address, as Debian enters it. Else it
    is the address on the way to `host`. torch gives them the name of this machine instead, which they need not know."""
    if _is_here(host):
        return host
    for family, address in _addresses(host, port):
        with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as tried:
            tried.connect(address)  # of a datagram: nothing is sent
            return str(tried.getsockname()[0])
    return None


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

    def __init__(self, spec: WorkerSpec, grace_s: float, nnodes: int = 1) -> None:
        super().__init__(spec, DefaultLogsSpecs(log_dir=os.devnull))
        self._meets, self._restarts = nnodes > 1, 0
        self.codes: dict[int, int] = {}
        self.killed: set[int] = set()
        self._first_failure: int | None = None
        self._first_end: float | None = None  # of a worker that has not done its work, by `time.monotonic()`
        self._grace_s = grace_s
        self._deadline: float | None = None
        self._demand = signals.Demand()

    def on_signal(self, number: int, frame: object) -> None:
        """Handler of the signals to stop and of `KILL_SIGNAL`: note what is asked for; `_monitor_workers` does it."""
        if self._meets:
            # The agent's thread waits for the other machines. There are no workers yet, so there is nothing to save.
            os.write(2, f"fastdeit: {signal.Signals(number).name} received; nothing has begun\n".encode())
            os._exit(Interrupted.exit_code)
        if number == KILL_SIGNAL:
            self._demand.at_once = True
        else:
            self._demand.receive(number)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self._meets = False
        running = self._reap(worker_group)
        if not running:
            if any(self.codes.values()):
                self._restart_or_end()
                return RunResult(state=WorkerState.FAILED)
            return RunResult(state=WorkerState.SUCCEEDED, return_values=dict.fromkeys(self.codes))
        if self._demand.at_once or (self._deadline is not None and time.monotonic() > self._deadline):
            self._kill(running)
        elif self._deadline is None:
            self._stop_if_needed(running)
        return RunResult(state=WorkerState.HEALTHY)

    def _restart_or_end(self) -> None:
        """Let torch restart the workers after this, if that may help, or not."""
        failed = verdict(self.codes, self.killed) == FastdeitError.exit_code
        if not failed or self._demand.first is not None or self._demand.at_once:
            self._remaining_restarts = 0
        if self._remaining_restarts == 0:
            return
        self._restarts += 1
        most = self._restarts + self._remaining_restarts - 1
        self.report(FastdeitError.exit_code)
        _say(f"starting all ranks anew, from the newest checkpoint (restart {self._restarts} of {most})")
        self.codes, self.killed = {}, set()
        self._first_failure = self._first_end = self._deadline = None

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
            if code != 0 and self._first_end is None:
                self._first_end = time.monotonic()
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
        elif self._first_end is None or (0 in running and self._rank_0_follows()):
            return
        elif self._first_failure is not None:
            seconds = min(PEER_GRACE_S, self._grace_s)
        else:
            seconds = self._grace_s
        self._deadline = time.monotonic() + seconds
        for pid in running.values():
            # To the worker alone, not to its process group: its loader must go on feeding it until it has saved.
            os.kill(pid, signal.SIGTERM)

    def _rank_0_follows(self) -> bool:
        """Whether rank 0, which is running, may be about to come to the same end as others, and to say why."""
        common = set(self.codes.values()) <= COMMON_CODES | {0}
        return common and time.monotonic() - self._first_end < PEER_GRACE_S

    def _kill(self, running: dict[int, int]) -> None:
        for rank, pid in running.items():
            if rank not in self.killed:
                self.killed.add(rank)
                # torch starts each worker in a session of its own; the group takes the worker's helpers along.
                os.killpg(pid, signal.SIGKILL)

    def report(self, code: int) -> None:
        """Say why a run ended with `code` where the ranks have not: a failed rank's peers may be louder than it was."""
        if self._first_failure is not None:
            # Rank 0 has given the reason itself for an end that all ranks came to together: on its machine.
            if code == FastdeitError.exit_code or self.codes.get(0) != code:
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
def _quiet_elastic() -> Iterator[None]:
    """The agent's warnings describe its own bookkeeping; what matters of it is said by `report`."""
    names = "agent.server.api", "multiprocessing.api", "rendezvous.dynamic_rendezvous"
    loggers = [logging.getLogger(f"torch.distributed.elastic.{name}") for name in names]
    levels = {logger: logger.level for logger in loggers}
    for logger in levels:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
