"""How the processes of a run find each other: at a store of torch's, by the address in MASTER_ADDR and MASTER_PORT.

torch would wait for half an hour, deaf to signals, for a process that never comes, for a port that another program
holds, or for one that another run holds. Here every wait is in Python, so that a signal is obeyed, says what it waits
for, and ends with a sentence that names who is missing or in the way.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from torch.distributed import DistNetworkError, DistStoreError, PrefixStore, Store, TCPStore

from fastdeit.text import lines

ANSWER_S = 20.0
"""Seconds for what listens at the address to answer as the main process of this run would."""
DECLINE_S = 60.0
"""Seconds that a process which cannot take part waits to tell the others why."""
TELL_S = 5.0
"""Seconds after which it also says so itself: the others may never come, and a user must not wait in silence."""
NOTE_S = 60.0
_POLL_S = 0.05


class RendezvousError(RuntimeError):
    """The processes of a run have not come together; the message says why."""


class DeclinedError(RendezvousError):
    """Some process of the run cannot take part; the message has its reason."""


@dataclass(frozen=True)
class Place:
    """Where this process is among those of the run, and where they meet.

    run    names this attempt at this run, for all of its processes, and for those of no other at the same address
    hosts  whether the main process keeps the store; else a launcher does (torch's agent)
    """

    rank: int
    size: int
    host: str
    port: int
    run: str
    hosts: bool

    @classmethod
    def of(cls, env: Mapping[str, str]) -> "Place":
        """As torchrun's variables say, and SLURM's, which tell apart the steps of a job and its restarts.

        Raises RendezvousError where one is missing or is no number.
        """
        slurm = [env.get(f"SLURM_{name}", "") for name in ("JOB_ID", "STEP_ID", "RESTART_COUNT")]
        run = [env.get("TORCHELASTIC_RUN_ID", ""), env.get("TORCHELASTIC_RESTART_COUNT", "0"), *slurm]
        hosts = env.get("TORCHELASTIC_USE_AGENT_STORE") != str(True)
        try:
            rank, size, port = (int(env[name]) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
            if not 0 <= rank < size:
                raise ValueError(f"RANK={rank} is not one of WORLD_SIZE={size}")
            return cls(rank, size, env["MASTER_ADDR"], port, "/".join(run), hosts)
        except (KeyError, ValueError) as error:
            missing = f"{error.args[0]} is not set" if isinstance(error, KeyError) else str(error)
            raise RendezvousError(
                f"the environment says that this is one of several processes, but {missing}; start with --nproc, "
                "torchrun or srun, or unset RANK and WORLD_SIZE"
            ) from None

    def connect(self, timeout: timedelta) -> Store:
        """A connection of its own to the store that is there: one connection answers one thread at a time."""
        store = TCPStore(self.host, self.port, self.size, False, timeout, wait_for_workers=False)
        return PrefixStore(f"fastdeit/{self.run}", store)


def meet(place: Place, problem: str | None, limit: timedelta, say: Callable[[str], None]) -> Store:
    """The store at which all processes of the run have met, with the keys of this attempt.

    problem  why this process cannot take part: then no process does
    limit    of the whole meeting

    Raises RendezvousError on every process that can still be told.
    """
    end = time.monotonic() + limit.total_seconds()
    store = _opened(place, end, limit, say)
    own = {"host": socket.gethostname(), "pid": os.getpid(), "problem": problem}
    at = f"{place.host}:{place.port}"
    try:
        found = _come(store, place, own, end, at, limit, say)
        problems = {each["problem"]: (rank, each["host"]) for rank, each in reversed(list(enumerate(found)))}
        problems.pop(None, None)
        if problems:
            _read_by_all(store, place)
    except DistNetworkError:
        raise RendezvousError(
            f"rank 0 has left {at} while the processes met there; look for what it has said"
        ) from None
    if problems:
        first = sorted((rank, host, why) for why, (rank, host) in problems.items())
        raise DeclinedError("\n".join(f"rank {rank} on {host}: {why}" for rank, host, why in first))
    return store


@contextlib.contextmanager
def before(env: Mapping[str, str]) -> Iterator[None]:
    """Around what a process of several does before it meets the others: where that fails, they are told why, and do not
    wait for this process. It waits for them for DECLINE_S seconds: who began at the same time has come by then."""
    try:
        yield
    except Exception as error:
        if "RANK" in env and env.get("WORLD_SIZE", "1") != "1":
            problem = str(error) or type(error).__name__
            text = (
                f"fastdeit: rank {env['RANK']} cannot take part: {'; '.join(lines(problem))}\n"
                f"fastdeit: it waits up to {DECLINE_S:g} s for the other processes, to tell them; unset RANK and "
                "WORLD_SIZE if there are none"
            )
            late = threading.Timer(TELL_S, lambda: print(text, file=sys.stderr, flush=True))
            late.daemon = True
            late.start()
            # Whatever is wrong with the meeting, this error is the one to be told.
            with contextlib.suppress(Exception):
                meet(Place.of(env), problem, timedelta(seconds=DECLINE_S), lambda text: None)
            late.cancel()
        raise


def _come(
    store: Store,
    place: Place,
    own: Mapping[str, Any],
    end: float,
    at: str,
    limit: timedelta,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """What each process has said of itself, by rank, once all have."""
    store.set(f"here/{place.rank}", json.dumps(own))
    missing = list(range(place.size))

    def together() -> bool:
        missing[:] = [rank for rank in missing if not store.check([f"here/{rank}"])]
        return not missing

    _wait(
        together, end, lambda: f"waiting at {at} for {ranks(missing)} of {place.size}", say if place.rank == 0 else None
    )
    if missing:
        raise RendezvousError(
            f"{ranks(missing)} of {place.size} did not come to {at} within {limit.total_seconds():g} s; look for what "
            "they have said, or unset RANK and WORLD_SIZE if this is to be the only process"
        )
    return [json.loads(store.get(f"here/{rank}")) for rank in range(place.size)]


def _read_by_all(store: Store, place: Place) -> None:
    """Say that this process knows why the run cannot begin. One that keeps the store waits until the others know it
    too, since they read it there."""
    store.set(f"read/{place.rank}", "")
    if place.hosts and place.rank == 0:
        keys = [f"read/{rank}" for rank in range(place.size)]
        _wait(lambda: store.check(keys), time.monotonic() + ANSWER_S, lambda: "", None)


def keep(env: Mapping[str, str], name: str, value: str) -> None:
    """Keep `value` for the next attempts at this run, where a launcher has a store that outlives this one."""
    if _launched(env):
        _of_all_attempts(env).set(name, value)


def kept(env: Mapping[str, str], name: str) -> str | None:
    """What an earlier attempt at this run has kept as `name`; None where there is none, or was no earlier attempt."""
    if not _launched(env) or env.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        return None
    store = _of_all_attempts(env)
    return store.get(name).decode() if store.check([name]) else None


def _launched(env: Mapping[str, str]) -> bool:
    """Whether torch's launcher has started this process. Without a rank its other variables are left over from a shell
    that it has started."""
    return "TORCHELASTIC_RUN_ID" in env and "RANK" in env


def _of_all_attempts(env: Mapping[str, str]) -> Store:
    host, port, size = env["MASTER_ADDR"], int(env["MASTER_PORT"]), int(env["WORLD_SIZE"])
    return PrefixStore("fastdeit/kept", TCPStore(host, port, size, False, wait_for_workers=False))


def ranks(numbers: list[int]) -> str:
    """`rank 3`, `ranks 1, 2`."""
    listed = ", ".join(map(str, numbers[:8])) + (f" and {len(numbers) - 8} more" if len(numbers) > 8 else "")
    return f"rank{'s' if len(numbers) > 1 else ''} {listed}"


def _opened(place: Place, end: float, limit: timedelta, say: Callable[[str], None]) -> Store:
    at = f"{place.host}:{place.port}"
    if place.hosts and place.rank == 0:
        try:
            store = TCPStore(place.host, place.port, place.size, True, limit, wait_for_workers=False)
        except DistNetworkError as error:
            raise RendezvousError(_not_opened(place, str(error))) from None
        store.set("fastdeit/run", place.run)
        return PrefixStore(f"fastdeit/{place.run}", store)

    def listens() -> bool:
        try:
            socket.create_connection((place.host, place.port), timeout=1).close()
        except OSError:
            return False
        return True

    if not _wait(listens, end, lambda: f"rank {place.rank} waits for rank 0 at {at}", say if place.rank == 1 else None):
        raise RendezvousError(
            f"rank {place.rank} found nobody at {at} within {limit.total_seconds():g} s: rank 0 should listen there. "
            "Look for what it has said, and whether a firewall stands between"
        )
    store = _answer(lambda: TCPStore(place.host, place.port, place.size, False, limit, wait_for_workers=False))
    foreign = (
        f"what listens at {at} is not rank 0 of this run: the port is taken by another program or another run; set "
        "MASTER_PORT to a free one"
    )
    if store is None:
        raise RendezvousError(foreign)
    if place.hosts:
        try:
            store.wait(["fastdeit/run"], timedelta(seconds=ANSWER_S))
        except DistStoreError:
            raise RendezvousError(foreign) from None
        if store.get("fastdeit/run").decode() != place.run:
            raise RendezvousError(foreign)
    return PrefixStore(f"fastdeit/{place.run}", store)


def _not_opened(place: Place, error: str) -> str:
    if "EADDRINUSE" in error:
        return (
            f"port {place.port} of {place.host} is taken by another program or another run; set MASTER_PORT to a free "
            "one, the same for all processes"
        )
    return f"the port {place.port} of {place.host} cannot be opened: {error.splitlines()[0]}"


def _answer(connect: Callable[[], Store]) -> Store | None:
    """What `connect` returns, or None where that takes longer than ANSWER_S, or fails.

    In a thread: torch has no limit for a listener that says nothing, and does not look for signals.
    """
    found: list[Store] = []

    def run() -> None:
        with contextlib.suppress(RuntimeError):
            found.append(connect())

    thread = threading.Thread(target=run, daemon=True, name="fastdeit-connect")
    thread.start()
    thread.join(ANSWER_S)
    return found[0] if found else None


def _wait(done: Callable[[], bool], end: float, describe: Callable[[], str], say: Callable[[str], None] | None) -> bool:
    """Whether `done` before `end`; `say` what it waits for now and then."""
    note = time.monotonic() + NOTE_S
    while not done():
        now = time.monotonic()
        if now > end:
            return False
        if say is not None and now > note:
            say(describe())
            note = now + NOTE_S
        time.sleep(_POLL_S)
    return True
