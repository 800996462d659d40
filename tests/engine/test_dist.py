"""What the processes of a run decide together."""

import os
import signal
import time

import pytest
import torch

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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signals_raise_a_flag_and_handlers_come_back(number):
    before = signal.getsignal(number)
    world = World(CPU)
    with world.stop_on_signals():
        assert not world.stop_requested()
        os.kill(os.getpid(), number)
        assert world.stop_requested()
    assert signal.getsignal(number) is before


def test_second_interrupt_acts_at_once():
    world = World(CPU)
    with world.stop_on_signals():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


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
