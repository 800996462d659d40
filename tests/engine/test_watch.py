"""Hung and dead processes of a run: who is named, and that all end."""

import io
import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from datetime import timedelta

import pytest
import torch
from torch.distributed import HashStore, TCPStore

from fastdeit.engine import dist, rendezvous, watch
from fastdeit.engine.rendezvous import DeclinedError, Place, RendezvousError, meet
from fastdeit.engine.watch import LostError, Watch, hung, verdict

SOON = timedelta(seconds=60)


def report(count, place="the batch of a step", line="read.py:3 (read)"):
    return {"count": count, "place": place, "line": line, "host": "n1", "pid": 7}


@pytest.mark.parametrize(
    ("counts", "culprits", "told"),
    [
        (
            {0: 9, 1: 8, 2: 9},
            [1],
            "rank 1 hangs (process 7 on n1): at the batch of a step for 60 s, in read.py:3 (read)",
        ),
        ({0: 9, 2: 9}, [1], "rank 1 hangs: it says nothing at all, so it is stopped or its machine is; ranks 0, 2"),
        ({0: 8, 1: 8, 2: 9}, [0, 1], "; rank 2 waited for it"),
        ({0: 9, 1: 9, 2: 9}, [0, 1, 2], "all 3 ranks have been at the batch of a step for 60 s, and none is behind"),
    ],
    ids=["behind", "silent", "two", "none"],
)
def test_who_hangs(counts, culprits, told):
    found = {rank: report(count) for rank, count in counts.items()}
    assert hung(found, 3) == culprits
    assert told in verdict(found, culprits, 3, 60.0)


def test_the_time_out_is_long_where_it_has_to_be():
    each = Watch(0, 1, HashStore(), 5.0)
    assert each.limit_s() == watch.START_S
    each.at("the batch of a step", patient=False)
    assert each.limit_s() == 5.0
    each.at("a checkpoint", patient=True)
    assert each.limit_s() == watch.START_S
    assert Watch(0, 1, HashStore(), 2 * watch.START_S).limit_s() == 2 * watch.START_S


def test_a_rank_that_does_not_move_is_named_with_its_stacks_and_all_leave(capfd):
    """Three ranks of one process: rank 1 stays in the batch, the others are a place further and wait."""
    store, left = HashStore(), []
    store.set("here/0", "{}")
    watches = [Watch(rank, 3, store, 0.2, leave=lambda code, rank=rank: left.append((rank, code))) for rank in range(3)]
    with watches[0].running(), watches[1].running(), watches[2].running():
        for each in watches:
            each.at("the batch of a step", patient=False)
        watches[0].at("the backward of a step", patient=False)
        watches[2].at("the backward of a step", patient=False)
        end = time.monotonic() + 60
        while len(left) < 3 and time.monotonic() < end:
            time.sleep(0.02)
    assert sorted(left) == [(0, 1), (1, 1), (2, 1)]
    assert left[0] == (1, 1), "the launcher names the one that ends first"
    err = capfd.readouterr().err
    assert err.count("its stacks:") == 3
    assert "in test_a_rank_that_does_not_move_is_named" in err, "the stack of the main thread"
    told = [line for line in err.splitlines() if line.startswith("fastdeit: rank 1 hangs (")]
    assert len(told) == 1
    assert told[0].endswith("; ranks 0, 2 waited for it")


def test_a_rank_that_has_failed_is_not_waited_for_with_the_patience_of_a_start(capfd):
    store, left = HashStore(), []
    waits = Watch(0, 2, store, 0.2, leave=left.append)
    with waits.running():
        waits.at("the start", patient=True)
        time.sleep(0.5)
        assert left == [], "a start may take an hour"
        Watch(1, 2, store, 0.2).fails()
        end = time.monotonic() + 60
        while not left and time.monotonic() < end:
            time.sleep(0.02)
    assert left == [1]
    told = capfd.readouterr().err
    assert f"fastdeit: rank 1 (process {os.getpid()} on {socket.gethostname()}) has failed; look for what" in told


def test_of_several_that_fail_the_first_is_named():
    """The others fail because it has gone."""
    store = HashStore()
    for rank in (1, 0, 2):
        Watch(rank, 3, store, 0.2).fails()
    assert json.loads(store.get("failed"))["rank"] == 1


def test_time_in_which_this_process_was_stopped_is_no_hang(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a launcher's, which says who ended")
    monkeypatch.setenv("RANK", "0")
    now = [0.0]
    each = Watch(0, 1, HashStore(), 20.0, clock=lambda: now[0])
    each.at("the batch of a step", patient=False)

    def turns(*seconds):
        for each_s in seconds:
            now[0] += each_s
            each._turn()
        return each._stays()

    assert not turns(1.0, 3600.0, 1.0)
    assert each.stopped_s() == 3600.0
    assert not turns(*[4.0] * 4), "turns on a busy machine are long, and count"
    assert turns(4.0)
    each.at("the computation of a step", patient=False)
    assert not each._stays()
    now[0] += 100.0
    assert each.stopped_s() == 100.0, "known before the next turn: a collective fails at once"
    error = RuntimeError("Timed out waiting 30000ms for recv")
    assert dist._lost(error, each).endswith(
        "did not run for 100 s, as in a job that is suspended: a collective fails after 30 s here, and this time counts"
    )
    each._turn()
    each.at("an evaluation", patient=True)
    assert "did not run" not in dist._lost(error, each), "the stops of before have failed no collective of now"
    now[0] += 100.0
    assert "did not run" not in dist._lost(error, each), "too short a stop for the collectives of an evaluation"


class Silent:
    """A store of a process that is stopped: `check` does not answer."""

    def __init__(self):
        self.goes_on = threading.Event()

    def set(self, key, value):
        pass

    def check(self, keys):
        self.goes_on.wait()
        return False


@pytest.mark.parametrize(
    ("keeper", "patient", "told"),
    [
        ("process 7 on n1", True, "rank 0 hangs (process 7 on n1): its store has not answered for"),
        (None, False, "the launcher hangs: its store has not answered for"),
        (None, True, None),
    ],
    ids=["rank 0", "launcher", "launcher alone"],
)
def test_a_store_that_does_not_answer_names_who_keeps_it(keeper, patient, told, capfd, monkeypatch):
    monkeypatch.setattr(watch, "_LOST_S", 0.1)
    store, left = Silent(), threading.Event()
    each = Watch(1, 2, store, 0.1, keeper=keeper, leave=lambda code: left.set())
    with each.running():
        each.at("the batch of a step", patient=patient)
        assert left.wait(60 if told else 0.5) == bool(told)
        store.goes_on.set()
    err = capfd.readouterr().err
    assert (told or "") in err
    assert ("its stacks:" in err) == bool(told)


# ---- the meeting -----------------------------------------------------------------------------------------------------


def place(port, rank=0, run="job 1", hosts=True):
    return Place(rank, 2, "127.0.0.1", port, run, hosts)


@pytest.fixture
def listener():
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_taken_port_explains_itself_to_the_main_process(listener):
    with pytest.raises(
        RendezvousError, match=f"port {listener} of 127.0.0.1 is taken .* set MASTER_PORT to a free one"
    ):
        meet(place(listener), None, SOON, print)


def test_a_port_that_another_program_has_does_not_hold_the_others(listener, monkeypatch):
    monkeypatch.setattr(rendezvous, "ANSWER_S", 0.1)
    with pytest.raises(RendezvousError, match="is not rank 0 of this run: the port is taken"):
        meet(place(listener, rank=1), None, SOON, print)


@pytest.mark.parametrize("theirs", [None, "job 2"])
def test_the_store_of_another_run_is_not_joined(theirs, monkeypatch):
    monkeypatch.setattr(rendezvous, "ANSWER_S", 0.1)
    store = TCPStore("127.0.0.1", 0, 2, True, SOON, wait_for_workers=False)
    if theirs is not None:
        store.set("fastdeit/run", theirs)
    with pytest.raises(RendezvousError, match="another run; set MASTER_PORT"):
        meet(place(store.port, rank=1), None, SOON, print)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def test_whoever_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(rendezvous, "NOTE_S", 0.0)
    said, port = [], free_port()
    with pytest.raises(RendezvousError, match=rf"rank 1 of 2 did not come to 127.0.0.1:{port} within 0\.2 s"):
        meet(place(port), None, timedelta(seconds=0.2), said.append)
    assert said[0] == f"waiting at 127.0.0.1:{port} for rank 1 of 2"
    with pytest.raises(RendezvousError, match=rf"rank 1 found nobody at 127.0.0.1:{port} within 0\.2 s"):
        meet(place(port, rank=1), None, timedelta(seconds=0.2), said.append)


def test_what_one_process_lacks_all_are_told():
    port, errors = free_port(), []

    def join(rank, problem):
        try:
            meet(place(port, rank), problem, SOON, print)
        except RendezvousError as error:
            errors.append(str(error))

    threads = [threading.Thread(target=join, args=each) for each in ((0, None), (1, "process 1 has no GPU"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [f"rank 1 on {socket.gethostname()}: process 1 has no GPU"] * 2


@pytest.mark.parametrize("declines", [0, 1])
def test_a_process_that_fails_before_the_meeting_tells_the_others(declines):
    """They would wait for an hour."""
    port, errors = free_port(), {}

    def prepare(rank):
        env = {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        try:
            with rendezvous.before(env):
                if rank == declines:
                    raise ValueError("there is no run here")
            meet(Place.of(env), None, SOON, print)
        except Exception as error:
            errors[rank] = error

    threads = [threading.Thread(target=prepare, args=[rank]) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert repr(errors[declines]) == "ValueError('there is no run here')"
    assert type(errors[1 - declines]) is DeclinedError
    assert str(errors[1 - declines]) == f"rank {declines} on {socket.gethostname()}: there is no run here"


@pytest.mark.parametrize("rank", ["0", "1"])
def test_a_process_that_fails_before_the_meeting_says_why_where_nobody_comes(monkeypatch, rank):
    """As with RANK and WORLD_SIZE left over from a launch: it was silent for a minute, and rank 1 for good. What is
    wrong with the meeting does not take the place of the error."""
    said, heard = io.StringIO(), threading.Event()

    def alone(*_):
        heard.wait(SOON.total_seconds())
        raise OverflowError("no such port")

    monkeypatch.setattr(rendezvous, "TELL_S", 0)
    monkeypatch.setattr(rendezvous, "meet", alone)
    monkeypatch.setattr(sys, "stderr", said)
    monkeypatch.setattr(said, "flush", heard.set)
    env = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    with pytest.raises(ValueError, match="there is no run here"), rendezvous.before(env):
        raise ValueError("there is no run here")
    assert said.getvalue().startswith(f"fastdeit: rank {rank} cannot take part: there is no run here\n")
    assert "unset RANK and WORLD_SIZE" in said.getvalue()


def test_who_keeps_the_store_waits_until_the_others_have_read_why(monkeypatch):
    """A slow process would find the store gone, and say nothing of what is wrong."""
    port, errors, come = free_port(), {}, rendezvous._come

    def slow(store, place, own, *others):
        if place.rank == 1:
            store.set("here/1", json.dumps(own))
            time.sleep(0.5)
        return come(store, place, own, *others)

    def join(rank):
        try:
            meet(place(port, rank), "it has no GPU" if rank else None, SOON, print)
        except RendezvousError as error:
            errors[rank] = str(error)

    monkeypatch.setattr(rendezvous, "_come", slow)
    threads = [threading.Thread(target=join, args=[rank]) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == dict.fromkeys(range(2), f"rank 1 on {socket.gethostname()}: it has no GPU")


def test_a_rank_0_that_leaves_is_told():
    stores = [TCPStore("127.0.0.1", 0, 2, True, SOON, wait_for_workers=False)]
    stores[0].set("fastdeit/run", place(0).run)
    port, timer = stores[0].port, threading.Timer(0.3, stores.clear)
    timer.start()
    with pytest.raises(RendezvousError, match=rf"rank 0 has left 127\.0\.0\.1:{port} while the processes met there"):
        meet(place(port, rank=1), None, SOON, print)
    timer.join()


def test_a_signal_is_heard_while_processes_wait_for_each_other():
    class Heard(Exception):
        pass

    def hear(number, frame):
        raise Heard

    before = signal.signal(signal.SIGTERM, hear)
    timer = threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM))
    try:
        timer.start()
        with pytest.raises(Heard):
            meet(place(free_port()), None, SOON, print)
    finally:
        timer.join()
        signal.signal(signal.SIGTERM, before)


RANK = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "n1", "MASTER_PORT": "5"}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"MASTER_PORT": None}, "'MASTER_PORT' is not set|MASTER_PORT is not set"),
        ({"RANK": None}, "RANK is not set"),
        ({"RANK": "2"}, "RANK=2 is not one of WORLD_SIZE=2"),
        ({"RANK": "first"}, "'first'"),
    ],
    ids=lambda value: str(value),
)
def test_a_leftover_of_another_launch_explains_itself(changes, told, monkeypatch):
    for name, value in (RANK | changes).items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(RendezvousError, match=f"{told}.*unset RANK and WORLD_SIZE"), dist.world("cpu"):
        pass


def test_attempts_and_steps_of_a_job_are_told_apart():
    env = RANK | {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}
    names = [
        Place.of(RANK).run,
        *(Place.of(env | more).run for more in ({}, {"SLURM_STEP_ID": "1"}, {"SLURM_RESTART_COUNT": "1"})),
        Place.of(RANK | {"TORCHELASTIC_RESTART_COUNT": "1"}).run,
    ]
    assert len(set(names)) == len(names)


# ---- whole processes -------------------------------------------------------------------------------------------------


def joined(rank, size, port, folder, work):
    """`work(world, folder)` in a world of this process and others; what it raised, as text."""
    torch.distributed.destroy_process_group()  # the fixture's
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    error = None
    try:
        with dist.world("cpu", 1.0) as world:
            return work(world, folder)
    except (LostError, RendezvousError) as raised:
        error = f"{type(raised).__name__}: {raised}"
    finally:
        torch.distributed.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    return error


def agreed(world, folder):
    world.at("the batch of a step", patient=False)
    world.at("a checkpoint", patient=True)
    return world.first([] if world.main else [world.rank]), world.stop_requested()


def test_processes_join_and_agree(ranks, tmp_path):
    assert ranks(2, joined, free_port(), tmp_path, agreed) == [([1], False)] * 2


@pytest.mark.slow
def test_the_rank_that_died_is_named_without_a_launcher():
    """Under srun nobody else says which one it was."""
    context, port = multiprocessing.get_context("spawn"), free_port()
    results = context.Queue()
    processes = [context.Process(target=dies, args=(rank, port, results)) for rank in range(2)]
    for process in processes:
        process.start()
    told = results.get(timeout=120)
    for process in processes:
        process.join()
    assert told.startswith("rank 1 of 2 ended or cannot be reached any more (process ")
    assert processes[1].exitcode == -signal.SIGKILL


def dies(rank, port, results):
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        with dist.world("cpu", 60.0) as world:
            world.stop_requested()
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            world.stop_requested()
    except LostError as error:
        results.put(str(error))
