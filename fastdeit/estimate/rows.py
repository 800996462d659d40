"""How far the estimate is from what was measured: published rows of others, and this project's own rows.

A published row is a training speed that somebody else reports; `errors` is what `model.py` makes of it. The shares
in `gpus.GPUS` were judged with the first three rows of the RTX 3090 in view, so their errors are no proof;
those of other models and cards are.

Rows of `fastdeit bench` (benchmarks/README.md) on a known GPU calibrate: measured / modelled seconds of a step, the
geometric mean of all rows and its range, by GPU, design and precision. Published rows never do.
"""

import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fastdeit import jsons
from fastdeit.errors import UsageError
from fastdeit.estimate.designs import COMPILE_2_9, DESIGNS, UNFUSED, Design
from fastdeit.estimate.gpus import GPUS
from fastdeit.estimate.model import step
from fastdeit.estimate.networks import Network, ViT, Work

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
"""Of a checkout; an installed package has none."""


class Published(NamedTuple):
    """A published training speed in images/s of one GPU. `whole`: of a run with its input and communication."""

    gpu: str
    model: str
    batch: int
    vit: ViT
    design: Design
    speed: float
    whole: bool
    source: str


def _vit(dim: int, *, depth: int = 12, prefix: int = 1, patches: int = 196) -> ViT:
    return ViT(patches, prefix, 768, dim, depth, dim // 64, 4 * dim, 1000, pruned=False)


_TIMM = "timm, results/benchmark-train-amp-nchw-pt112-cu113-rtx3090.csv"
_NVS = "NVIDIA-BioNeMo/nvSubquadratic, benchmarks/README: "
_HOURS, _IMAGES, _PROCESSES = 53, 300 * 1_281_167, 8

PUBLISHED = (
    Published("RTX3090", "deit_tiny_patch16_224", 512, _vit(192), UNFUSED, 2290.53, False, _TIMM),
    Published("RTX3090", "deit_small_patch16_224", 384, _vit(384), UNFUSED, 1053.64, False, _TIMM),
    Published("RTX3090", "deit_base_patch16_224", 192, _vit(768), UNFUSED, 390.88, False, _TIMM),
    Published("RTX3090", "deit_base_patch16_384", 32, _vit(768, patches=576), UNFUSED, 96.37, False, _TIMM),
    Published("RTX3090", "vit_large_patch16_224", 64, _vit(1024, depth=24), UNFUSED, 117.08, False, _TIMM),
    Published("H100", "ViT-5-S", 256, _vit(384, prefix=2), COMPILE_2_9, 7716, False, f"{_NVS}torch 2.6, compiled"),
    Published(
        "H100", "ViT-5-B", 256, _vit(768, prefix=2), COMPILE_2_9, 256 / 0.1208, True, f"{_NVS}8 GPUs, 120.8 ms a step"
    ),
    Published(
        "V100",
        "deit_base_patch16_224",
        128,
        _vit(768),
        UNFUSED,
        _IMAGES / (_HOURS * 3600 * _PROCESSES),
        True,
        "arXiv:2012.12877: 300 epochs in 53 hours on 8 GPUs",
    ),
)


def modelled_speed(row: Published) -> float:
    """Images/s that the model gives for the step of a published row, its input and communication left out."""
    vit = row.vit
    values, outputs = vit.patches * vit.patch_values, vit.prefix * vit.classes
    network = Network(row.model, vit.parameters, vit.flops, values, outputs, own=False, vit=vit)
    return row.batch / sum(step(network, Work(row.batch, "fp16"), row.design, GPUS[row.gpu]))


def errors(*, whole: bool) -> list[float]:
    """(modelled - published) / published of the rows that are whole runs, or of the others."""
    return [modelled_speed(row) / row.speed - 1 for row in PUBLISHED if row.whole == whole]


MODELLED = "modelled"


class Calibration(NamedTuple):
    """Measured over modelled seconds of a step: the mean of so many rows, and the least and the largest of them."""

    factor: float = 1.0
    rows: int = 0
    low: float = 1.0
    high: float = 1.0

    def __str__(self) -> str:
        if self.rows == 0:
            return MODELLED
        spread = f"{self.low:.2f} to {self.high:.2f}, " if self.rows > 1 else ""
        return f"measured x{self.factor:.2f} ({spread}{self.rows} rows)"


NOT_CALIBRATED = Calibration()


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file of results. UsageError, with the place, for what is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = jsons.parsed(line)
        except ValueError as error:
            raise UsageError(f"{path}:{number} is no JSON: {error}") from error
        if not isinstance(row, dict):
            raise UsageError(f"{path}:{number} is no row of a benchmark, but {line[:40]}")
        yield row


def sound(row: dict[str, Any]) -> bool:
    """Whether a row is undamaged: it has an environment, which names the card, and times of every side."""
    seconds, environment = row.get("seconds"), row.get("environment")
    if not isinstance(seconds, dict) or not isinstance(environment, dict):
        return False
    if row.get("device") == "cuda" and not environment.get("gpus"):
        return False
    return all(isinstance(rounds, list) and rounds for rounds in seconds.values())


Size = tuple[int, int] | None


def calibrations(
    files: Iterable[Path], network: Callable[[str, Size], Network]
) -> dict[tuple[str, str, str], Calibration]:
    """By (GPU, design, precision), from the rows of these files; `network` is asked for the model of a row, with its
    image size where the row tells. Rows with a teacher do not count: its time cannot be told apart."""
    factors: dict[tuple[str, str, str], list[float]] = defaultdict(list)
    for path in files:
        for row in lines(path):
            if row.get("what") != "step" or not sound(row) or row.get("teacher"):
                continue
            gpu = _gpu_of(row)
            if gpu is None:
                continue
            for side, taken in row["seconds"].items():
                found = _modelled(row, side, network)
                if found is not None:
                    design, work, student = found
                    modelled = sum(step(student, work, design, GPUS[gpu]))
                    factors[gpu, design.name, work.precision].append(statistics.median(taken) / modelled)
    return {
        key: Calibration(statistics.geometric_mean(found), len(found), min(found), max(found))
        for key, found in factors.items()
    }


def _modelled(row: dict, side: str, network: Callable[[str, Size], Network]) -> tuple[Design, Work, Network] | None:
    """What the estimate has for a side of a row; None for a side that is no design of its."""
    # Rows that say nothing of it are older: float32, without drop-path and average of weights, and peers not tuned.
    complete = "drop_path" in row
    design = DESIGNS.get("fused" if side == "fastdeit" else side)
    if design is None or (design.peer and not complete):
        return None
    work = Work(row["batch"], row.get("precision", "fp32"), bool(row.get("drop_path")), bool(row.get("ema")))
    return design, work, network(row["model"], (row["image_size"],) * 2 if complete else None)


def _gpu_of(row: dict) -> str | None:
    """The GPU of `GPUS` that a row was measured on."""
    return known_gpu(row["environment"]["gpus"][0]["name"]) if row["device"] == "cuda" else None


def known_gpu(name: str) -> str | None:
    """The GPU of `GPUS` whose card names itself so. Cards on PCIe, parts of cards and superchips share names but not
    speeds."""
    if re.search(r"PCIe|\b(NVL|MIG|Laptop|Ti)\b", name, re.IGNORECASE):
        return None
    plain = name.replace("RTX ", "RTX")
    return next((gpu for gpu in GPUS if re.search(rf"(?<![A-Za-z0-9]){gpu}(?![A-Za-z0-9])", plain)), None)
