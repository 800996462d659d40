"""Shared by all tests: one compute thread, so that results do not depend on the machine's core count, and forked
ranks."""

import os
import traceback
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

torch.set_num_threads(1)
TIMEOUT_S = 120


def _rank(function, rank, size, rendezvous, arguments, results):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank))
    try:
        dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=size)
        results.put((rank, function(rank, size, *arguments), None))
        dist.destroy_process_group()
    except BaseException:
        results.put((rank, None, traceback.format_exc()))


@pytest.fixture
def ranks(tmp_path: Path):
    """`ranks(size, function, *arguments)` -> [function(rank, size, *arguments) of every rank], over gloo.

    Ranks are forked from a server that has torch loaded and has never run it: that costs 0.2 s where an interpreter
    costs several, and unlike a fork of this process it cannot inherit a lock that one of its threads held.
    """

    def run(size, function, *arguments):
        context = get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed", "fastdeit.kernels"])
        results = context.Queue()
        rendezvous = tmp_path / f"rendezvous_{os.urandom(4).hex()}"
        processes = [
            context.Process(target=_rank, args=(function, rank, size, rendezvous, arguments, results), daemon=True)
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        answers = {}
        try:
            for _ in processes:
                rank, value, error = results.get(timeout=TIMEOUT_S)
                assert error is None, f"rank {rank} failed:\n{error}"
                answers[rank] = value
        finally:
            for process in processes:
                process.kill()
                process.join()
        return [answers[rank] for rank in range(size)]

    return run
