"""The grid of `fastdeit bench suite` under pytest-benchmark: one benchmark for each cell and side, grouped by cell.

Sides run one after the other here, so that a drifting machine is part of their ratio; `fastdeit bench` interleaves
them. What this is good for: `--benchmark-save` and `--benchmark-compare` between two commits.
"""

from dataclasses import asdict

import pytest
import torch

from benchmarks.conftest import DEVICE
from fastdeit.bench import cells, suite
from fastdeit.bench.measure import CannotRun, reason

ROUNDS = {"cpu": 3, "cuda": 20}
CELLS = list(suite.grid(DEVICE))
ON_CPU = {"timm_compile": "torch.compile takes a minute a cell on a CPU; `fastdeit bench suite` has it"}


def sides():
    """(cell, name of the side, its builder)."""
    for cell in CELLS:
        peers = suite.peers(cell, cells.STEP_PEERS)
        for name, build in cells.builders(suite.captures(cell, DEVICE), peers).items():
            yield pytest.param(cell, name, build, id=f"{cell}-{name}".replace(" ", "_"))


@pytest.mark.parametrize(("cell", "name", "build"), list(sides()))
def test_speed(benchmark, environment, cell, name, build):
    benchmark.group = str(cell)
    if DEVICE.type == "cpu" and name in ON_CPU:
        pytest.skip(ON_CPU[name])
    torch.manual_seed(0)
    try:
        side = build(cell, DEVICE)
        side.run()
    except Exception as error:  # skipped with its reason; the others go on
        if name.startswith("fastdeit") and not isinstance(error, CannotRun):
            raise
        pytest.skip(reason(error))

    def run():
        side.run()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(run, rounds=ROUNDS[DEVICE.type], warmup_rounds=max(side.warm - 1, 0))
    speed = cell.batch / benchmark.stats.stats.median
    benchmark.extra_info |= asdict(cell) | {"side": name, "images_per_s": speed, "environment": environment}


@pytest.fixture(autouse=True)
def _clean():
    yield
    suite.forget(DEVICE)
