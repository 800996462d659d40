"""What the benchmarks run on: the first GPU, or the CPU where there is none."""

from functools import cache

import pytest

from fastdeit.bench import cells, measure
from fastdeit.engine.dist import pick_device

DEVICE = pick_device("auto")


def pytest_report_header() -> str:
    return f"benchmarks on {DEVICE}" + (f": {cells.CPU_NOTE}" if DEVICE.type == "cpu" else "")


@pytest.fixture
def environment():
    """That of a row of `fastdeit bench`, looked up once."""
    return _environment()


@cache
def _environment():
    return measure.environment()
