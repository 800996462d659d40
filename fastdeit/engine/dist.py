"""The processes of a run: who this one is, and the few things all of them decide together."""

import json
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastdeit import signals
from fastdeit.engine.rendezvous import Place, RendezvousError, meet
from fastdeit.engine.watch import START_S, LostError, Watch, of_collectives


class DeviceError(RuntimeError):
    """The device that was asked for is not there."""


class DisagreementError(RuntimeError):
    """The processes of a run have something different that has to be the same; the message names it."""


@dataclass
class World:
    """This process among the processes of the run, as torchrun's environment variables describe it."""

    device: torch.device
    rank: int = 0
    size: int = 1
    _stop: bool = field(default=False, repr=False)
    _control: dist.ProcessGroup | None = field(default=None, repr=False)
    _watch: Watch | None = field(default=None, repr=False)

    @property
    def main(self) -> bool:
        """Whether this process is the one that logs and writes."""
        return self.rank == 0

    def at(self, place: str, *, patient: bool | None = None) -> None:
        """Say that this process is at `place` now: one that says nothing for `engine.timeout_s` seconds hangs.

        patient  whether it may stay there for as long as a start may take (`watch.START_S`); None: as before. The
                 time-out of the collectives follows: it is half as long again, in case that the watch itself hangs.
        """
        watch = self._watch
        if watch is None:
            return
        before = watch.patient
        watch.at(place, patient=before if patient is None else patient)
        if watch.patient != before:
            timeout = timedelta(seconds=of_collectives(watch.limit_s()))
            _set_timeout(timeout, dist.group.WORLD)
            _set_timeout(timeout, self._control)

    def first(self, value: Any) -> Any:
        """The value of the first process that has one which is true, on every process; else the main process's."""
        values = self.all(value)
        return next(filter(None, values), values[0])

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def broadcast(self, tensor: Tensor) -> Tensor:
        """The main process's values, in place; `tensor` is contiguous and of any dtype."""
        if self.size > 1:
            dist.broadcast(tensor.view(torch.uint8), src=0)
        return tensor

    def gather(self, rows: Tensor) -> Tensor:
        """The rows `[n, ...]` of all processes, in the order of the processes; n may differ, and be zero."""
        if self.size == 1:
            return rows
        shapes = self.all(tuple(rows.shape))
        longest = max(shape[0] for shape in shapes)
        padded = rows.new_zeros(longest, *max(shape[1:] for shape in shapes))
        padded[: len(rows)] = rows.reshape(-1, *padded.shape[1:])
        parts = [torch.empty_like(padded) for _ in shapes]
        dist.all_gather(parts, padded)
        return torch.cat([part[: shape[0]] for part, shape in zip(parts, shapes, strict=True)])

    def same(self, value: Any) -> Any:
        """The main process's value, on every process."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self._control)
        return values[0]

    def all(self, value: Any) -> list[Any]:
        """The values of all processes, in the order of the processes, on every process."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self._control)
        return values

    def agree(self, what: str, value: Any) -> None:
        """Raise DisagreementError, on every process, unless all have the same value of `what`."""
        values = self.all(value)
        if any(other != values[0] for other in values):
            listed = "; ".join(f"process {rank}: {other}" for rank, other in enumerate(values))
            raise DisagreementError(f"the processes differ in {what}, and so would their results: {listed}")

    def synchronize(self) -> None:
        """Wait for the device, so that a clock read next to it is honest."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def barrier(self) -> None:
        """Wait until every process has come here."""
        if self.size > 1:
            dist.barrier(group=self._control)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process goes through the body alone, then the others."""
        if not self.main:
            self.barrier()
        try:
            yield
        finally:
            if self.main:
                self.barrier()

    def stop_requested(self) -> bool:
        """Whether any process was asked to stop; every process gets the same answer.

        The flag travels over gloo, so that a GPU is never waited for.
        """
        if self.size == 1:
            return self._stop
        flag = torch.tensor([int(self._stop)])
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self._control)
        return bool(flag.item())

    @contextmanager
    def stop_on_signals(self) -> Iterator[None]:
        """The signals of `signals.listened` raise a flag that the loop reads at every step. A second one may ask for
        more (`signals.Demand`): then KeyboardInterrupt is raised.

        Of several processes their launcher speaks, and it alone decides about a second signal. Under srun there is
        none: the main process speaks, and each process obeys. Beside the main thread, where Python takes no signals,
        nothing is changed.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        launched, demand = self.size > 1 and "TORCHELASTIC_RUN_ID" in os.environ, signals.Demand()

        def request(number: int, frame: FrameType | None) -> None:
            self._stop = True
            if launched:
                return
            if demand.first is None and self.main:
                name = signal.Signals(number).name
                # Not print: a handler may interrupt one.
                told = f"fastdeit: {name} received; saving after this step (Ctrl-C or a second SIGTERM: at once)\n"
                os.write(2, told.encode())
            demand.receive(number)
            if demand.at_once:
                raise KeyboardInterrupt

        with signals.handled(request):
            yield


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """`auto`, `cpu` or `cuda` as a device; raises DeviceError when it is not there.

    A process that sees one GPU alone takes it, whatever its place on the machine: so SLURM's `--gpus-per-task=1` gives
    them out. Whether two processes have got the same one, `world` finds out.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError("engine.device is cuda, but torch finds no CUDA device; use engine.device=cpu or auto")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count > 1:
        raise DeviceError(f"process {local_rank} has no GPU: {count} found; use --nproc {count}")
    return torch.device("cuda", min(local_rank, count - 1))


@contextmanager
def world(device: str, timeout_s: float = START_S) -> Iterator[World]:
    """Join the other processes (gloo on CPU, NCCL on GPU) for the time of a run; alone when the environment names none.

    timeout_s  see `World.at`

    Raises DeviceError where a process has no device, RendezvousError where they do not come together, and LostError in
    the block where others have ended.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield World(_device(device))
        return
    place = Place.of(os.environ)
    chosen = problem = None
    try:
        chosen = _device(device)
    except DeviceError as error:
        problem = str(error)
    start = timedelta(seconds=START_S)
    store = meet(place, problem, start, lambda text: print(f"fastdeit: {text}", file=sys.stderr, flush=True))
    first = json.loads(store.get("here/0"))
    keeper = f"process {first['pid']} on {first['host']}" if place.hosts else None
    watch = Watch(place.rank, place.size, place.connect(start), timeout_s, keeper=keeper)
    with watch.running():
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        longest = timedelta(seconds=of_collectives(watch.limit_s()))
        try:
            dist.init_process_group(backend, store=store, rank=place.rank, world_size=place.size, timeout=longest)
            control = dist.new_group(backend="gloo", timeout=longest)
            joined = World(chosen, place.rank, place.size, _control=control, _watch=watch)
            _refuse_shared(joined)
            yield joined
        except BaseException as error:
            # This process fails already. The SIGTERM that a launcher sends to the peers of the first one that did must
            # not turn that into an interruption; so it stays out until the process has ended.
            signal.pthread_sigmask(signal.SIG_BLOCK, signals.STOP_SIGNALS)
            watch.fails()
            if isinstance(error, RuntimeError) and "connectFullMesh" in str(error):
                raise RendezvousError(_unconnected(error)) from error
            if isinstance(error, RuntimeError) and _CONNECTION.search(str(error)):
                raise LostError(_lost(error, watch)) from error
            raise
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


_CONNECTION = re.compile(r"[Cc]onnection (closed|reset|refused)|[Bb]roken pipe|[Tt]imed out|NCCL")
"""What gloo and NCCL say when a peer has gone."""


def _unconnected(error: RuntimeError) -> str:
    """Why gloo could not connect the processes that have met, in words."""
    return (
        f"the processes have met, but cannot be connected ({str(error).splitlines()[0]}): "
        f"{socket.gethostname()} or another machine does not know the address of its own name. Enter it in /etc/hosts, "
        "or set GLOO_SOCKET_IFNAME to the network interface that the machines share, such as eth0"
    )


def _lost(error: RuntimeError, watch: Watch) -> str:
    """Why a collective has failed, in words."""
    first = str(error).splitlines()[0]
    if "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ:  # else it is left over from a shell
        told = f"the connection to the other processes is lost ({first}); the launcher says which one ended first"
    else:
        told = watch.lost() or f"a collective failed, though all processes are alive: {first}"
    limit_s = watch.limit_s()
    if (stopped_s := watch.stopped_s()) > limit_s:
        told += (
            f". This process did not run for {stopped_s:.0f} s, as in a job that is suspended: a collective fails "
            f"after {of_collectives(limit_s):.0f} s here, and this time counts"
        )
    return told


def _device(name: str) -> torch.device:
    local_rank = int(os.environ.get("LOCAL_RANK", 0)) if "RANK" in os.environ else 0  # else it is left over
    chosen = pick_device(name, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    return chosen


def _refuse_shared(world: World) -> None:
    """Raise DeviceError, on every process, where two have the same GPU."""
    own = None
    if world.device.type == "cuda":
        own = socket.gethostname(), str(torch.cuda.get_device_properties(world.device).uuid)
    found = world.all(own)
    for rank, each in enumerate(found):
        if each is not None and each in found[:rank]:
            raise DeviceError(
                f"processes {found.index(each)} and {rank} have the same GPU of {each[0]}; start as many processes as "
                "there are GPUs (--nproc), and give each its own"
            )


def _set_timeout(timeout: timedelta, group: dist.ProcessGroup | None) -> None:
    """For what `group` begins from now on. The public name came with PyTorch 2.14."""
    change = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout
    change(timeout, group)
