"""Shared by all tests: one compute thread, so that results do not depend on the core count, and `ranks`."""

import os
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from process_of_ranks import be_rank

torch.set_num_threads(1)
TIMEOUT_S = 120


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
            context.Process(target=be_rank, args=(function, rank, size, rendezvous, arguments, results), daemon=True)
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
