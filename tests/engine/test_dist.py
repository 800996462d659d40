"""What the processes of a run decide together."""

import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch

from fastdeit import signals
from fastdeit.engine import dist
from fastdeit.engine.dist import DeviceError, World, pick_device

CPU = torch.device("cpu")


def together(rank, size, folder):
    world = World(CPU, rank, size)
    world._stop = rank == 1
    with world.main_first():
        if world.main:
            time.sleep(0.2)  # what the others would overtake if they did not wait
        (folder / f"{time.monotonic_ns()}_{rank}").touch()
    total = world.sum(torch.tensor([float(rank + 1)])).item()
    return world.same(f"said by {rank}"), world.stop_requested(), total


def test_processes_agree(ranks, tmp_path):
    assert ranks(3, together, tmp_path) == [("said by 0", True, 6.0)] * 3
    order = [name.split("_")[1] for name in sorted(os.listdir(tmp_path)) if name[0].isdigit()]
    assert order[0] == "0"
    assert sorted(order) == ["0", "1", "2"]


def disagree(rank, size, values):
    world = World(CPU, rank, size)
    try:
        world.agree("taste", values[rank])
    except RuntimeError as error:
        return str(error)
    return None


def test_a_difference_between_processes_is_found_by_all(ranks):
    assert ranks(2, disagree, ["sweet", "sweet"]) == [None, None]
    told = "the processes differ in taste, and so would their results: process 0: sweet; process 1: sour"
    assert ranks(2, disagree, ["sweet", "sour"]) == [told, told]


def alone_stops(rank, size):
    return World(CPU, rank, size).stop_requested()


def test_nobody_stops_unasked(ranks):
    assert ranks(2, alone_stops) == [False, False]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_signals_raise_a_flag_and_handlers_come_back(number):
    before = signal.getsignal(number)
    world = World(CPU)
    with world.stop_on_signals():
        assert not world.stop_requested()
        os.kill(os.getpid(), number)
        assert world.stop_requested()
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("second", [signal.SIGINT, signal.SIGTERM])
def test_second_signal_acts_at_once(second, monkeypatch):
    monkeypatch.setattr(signals, "REPEAT_S", 0)
    with World(CPU).stop_on_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), second)


def test_a_rank_of_a_launcher_leaves_a_second_signal_to_it_and_one_of_srun_does_not(monkeypatch, capfd):
    monkeypatch.setattr(signals, "REPEAT_S", 0)
    world = World(CPU, rank=0, size=2)
    with world.stop_on_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert "SIGTERM received" in capfd.readouterr().err, "nobody else says it under srun"
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    world = World(CPU, rank=0, size=2)
    with world.stop_on_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    assert world._stop
    assert capfd.readouterr().err == ""


def test_a_signal_that_the_parent_ignores_is_not_heard():
    world, before = World(CPU), signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with world.stop_on_signals():
            os.kill(os.getpid(), signal.SIGHUP)
            assert not world.stop_requested()
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_device_that_is_not_there_is_named(monkeypatch):
    monkeypatch.setattr(dist.torch.cuda, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == CPU
    with pytest.raises(DeviceError, match=r"engine\.device=cpu"):
        pick_device("cuda")
    monkeypatch.setattr(dist.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dist.torch.cuda, "device_count", lambda: 2)
    assert pick_device("auto", 1) == torch.device("cuda", 1)
    with pytest.raises(DeviceError, match="--nproc 2"):
        pick_device("auto", 2)
    monkeypatch.setattr(dist.torch.cuda, "device_count", lambda: 1)
    assert pick_device("auto", 3) == torch.device("cuda", 0), "the only one that it sees, as with --gpus-per-task=1"


def test_two_processes_with_one_gpu_are_refused(monkeypatch):
    """On each machine a GPU may have the number that one of another machine has."""
    monkeypatch.setattr(dist.torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="GPU-1"))
    monkeypatch.setattr(dist.socket, "gethostname", lambda: "n1")
    answers = [("n1", "GPU-1"), ("n2", "GPU-1"), ("n1", "GPU-2")]
    monkeypatch.setattr(
        dist.dist, "all_gather_object", lambda found, own, group: found.__setitem__(slice(None), answers)
    )
    world = World(torch.device("cuda", 0), 0, 3)
    dist._refuse_shared(world)
    answers[2] = ("n1", "GPU-1")
    with pytest.raises(DeviceError, match="processes 0 and 2 have the same GPU of n1; start as many processes as"):
        dist._refuse_shared(world)


@pytest.mark.parametrize(("rank", "place"), [(None, 0), ("0", 3)])
def test_a_local_rank_without_a_rank_is_left_over(monkeypatch, rank, place):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    asked = []
    monkeypatch.setattr(dist, "pick_device", lambda name, local_rank: asked.append(local_rank) or CPU)
    dist._device("cpu")
    assert asked == [place]
