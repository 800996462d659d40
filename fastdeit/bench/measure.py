"""What all benchmarks share: interleaved rounds, timers, the rates of the machine, and the environment of a row.

A round times every side once, the order alternating, so that a machine whose speed drifts slows all of them. The
protocol stands in benchmarks/README.md.
"""

import json
import math
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from fastdeit.run.environment import report

Timer = Callable[[], tuple[float, float]]
"""Runs what it times and returns (seconds, CPU seconds)."""

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLASSES = 1000
WARM_CALLS = {"cpu": 1, "cuda": 3}
"""Calls that allocate and compile, and are not measured."""
_LEAST_SECONDS = 0.2
_LEAST_GRAPHED_MS = 20.0
_COPY_BYTES = {"cpu": 2**24, "cuda": 2**28}


class CannotRun(RuntimeError):
    """A side does not exist on this machine; the message says why."""


def reason(error: Exception) -> str:
    """One line for the field `failed` of a row."""
    first = str(error).strip().split("\n")[0][:300]
    return first if isinstance(error, CannotRun) else f"{type(error).__name__}: {first}"


@contextmanager
def noting(failed: dict[str, str], name: str) -> Iterator[None]:
    """What the block raises becomes the reason of the side `name` in `failed`; the other sides go on."""
    try:
        yield
    except Exception as error:
        failed[name] = reason(error)


# ---- timers ----------------------------------------------------------------------------------------------------------


def timed(run: Callable[[], Any], device: torch.device, warm: int = 0) -> Timer:
    """Timer of one call, the device's work included. The first calls, at least `warm`, are not measured.

    On a GPU a measurement is the mean of as many calls as take 0.2 s, queued without waiting in between.
    """

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def measure(count: int) -> tuple[float, float]:
        wait()
        began, used = time.perf_counter(), time.process_time()
        for _ in range(count):
            run()
        wait()
        return (time.perf_counter() - began) / count, (time.process_time() - used) / count

    for _ in range(max(warm, WARM_CALLS[device.type])):
        run()
    count = 1 if device.type == "cpu" else max(1, round(_LEAST_SECONDS / measure(1)[0]))
    return lambda: measure(count)


def repeated(calls: Sequence[Callable[[], Any]], device: torch.device) -> Timer:
    """Timer of the mean over `calls`, which do the same on different memory; on a GPU they are one CUDA graph, so that
    launches do not count."""
    if device.type == "cuda":
        return _graphed(calls)
    calls[0]()  # compiles, allocates

    def measured() -> tuple[float, float]:
        began, used = time.perf_counter(), time.process_time()
        for call in calls:
            call()
        return (time.perf_counter() - began) / len(calls), (time.process_time() - used) / len(calls)

    return measured


def _graphed(calls: Sequence[Callable[[], Any]]) -> Timer:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def replays(count: int) -> float:
        begin.record()
        for _ in range(count):
            graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    count = max(1, round(_LEAST_GRAPHED_MS / max(replays(1), 1e-3)))

    def measured() -> tuple[float, float]:
        used = time.process_time()
        seconds = replays(count) / 1e3
        return seconds / (count * len(calls)), (time.process_time() - used) / (count * len(calls))

    return measured


def interleave(
    sides: dict[str, Timer],
    rounds: int,
    device: torch.device,
    failed: dict[str, str] | None = None,
    discard: int = 0,
) -> dict[str, Any]:
    """Seconds and CPU seconds of every side in every round, the first `discard` rounds left out.

    failed: where given, a side that raises is taken out of `sides` and its reason noted there; else the error passes.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(discard + rounds):
        for name in list(sides) if number % 2 == 0 else list(reversed(sides)):
            try:
                wall, cpu = sides[name]()
            except Exception as error:
                if failed is None:
                    raise
                failed[name] = reason(error)
                for kept in (sides, seconds, cpu_seconds):
                    del kept[name]
                continue
            if number >= discard:
                seconds[name].append(wall)
                cpu_seconds[name].append(cpu)
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "rounds": rounds, "device": device.type}


# ---- rates of the machine --------------------------------------------------------------------------------------------


def copy_timer(device: torch.device) -> tuple[Timer, int]:
    """Timer of a copy of random bytes larger than any cache of a GPU, and the bytes it reads and writes."""
    source = torch.randint(256, (_COPY_BYTES[device.type],), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return repeated([lambda: target.copy_(source)], device), 2 * source.numel()


def products_timer(shapes: Sequence[tuple[int, int, int]], dtype: torch.dtype, device: torch.device) -> Timer:
    """Timer of the library's products `[M, K] @ [K, N]` of normal random matrices, one for each (M, N, K)."""
    pairs = [
        (torch.randn(m, k, device=device).to(dtype), torch.randn(n, k, device=device).to(dtype).t())
        for m, n, k in shapes
    ]
    return repeated([lambda: [left @ right for left, right in pairs]], device)


def flops_of_products(shapes: Sequence[tuple[int, int, int]]) -> int:
    """FLOPs of the products of `products_timer`, 2 for each multiply-add."""
    return sum(2 * math.prod(shape) for shape in shapes)


# ---- rows ------------------------------------------------------------------------------------------------------------


def median(row: dict[str, Any], name: str, of: str = "seconds") -> float:
    """Median over the rounds of what the side `name` took: `seconds` or `cpu_seconds`."""
    return statistics.median(row[of][name])


def append(row: dict[str, Any], out: str | None) -> None:
    """Add the row to the file `out`, if there is one, and say so."""
    if out is None:
        return
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(f"row appended to {path}", flush=True)


def environment() -> dict[str, Any]:
    """What a reader needs to repeat a row; no paths, no host."""
    found = report()
    kept = {name: found[name] for name in ("fastdeit", "torch", "gpus", "driver", "packages", "dali")}
    processor = {"cores": len(os.sched_getaffinity(0)), "model": _cpu_model()}
    time_stamp = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return kept | {"python": found["python"]["version"], "processor": processor, "time": time_stamp}


def _cpu_model() -> str | None:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), None)


def clocks(device: torch.device) -> dict[str, float] | None:
    """What the GPU runs at now, in MHz, degrees Celsius and W; None on a CPU, and where the driver does not tell."""
    fields = {"sm_mhz": "clocks.sm", "memory_mhz": "clocks.mem", "celsius": "temperature.gpu", "watt": "power.draw"}
    if device.type != "cuda" or shutil.which("nvidia-smi") is None:
        return None
    card = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    asked = [f"--id={card}", f"--query-gpu={','.join(fields.values())}", "--format=csv,noheader,nounits"]
    answer = subprocess.run(["nvidia-smi", *asked], capture_output=True, text=True)
    try:
        return dict(zip(fields, map(float, answer.stdout.strip().split(", ")), strict=True))
    except ValueError:
        return None
