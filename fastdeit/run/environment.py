"""The environment of a run: versions, devices, kernels and room on disks, as its `environment.json` has them."""

import os
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from fastdeit import cores, jsons, kernels
from fastdeit.data import compiled
from fastdeit.version import __version__

DALI_PACKAGES = ("nvidia-dali-cuda120", "nvidia-dali-cuda130")
PACKAGES = ("triton", "timm", "numpy", "safetensors", "pydantic")
APEX_SOURCE = "https://github.com/NVIDIA/apex"


def report() -> dict[str, Any]:
    """The environment as plain values that JSON can hold; sizes in bytes, None for what there is not."""
    return {
        "fastdeit": {"version": __version__, "code": code_version(Path(__file__).parents[2])},
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "machine": {
            "platform": platform.platform(),
            "cpu_cores": cores.available(),
            "memory": cores.memory(),
        },
        "torch": {"version": torch.__version__, "cuda": torch.version.cuda, "nccl": _nccl()},
        "gpus": _gpus(),
        "driver": _driver(),
        "packages": {name: _version(name) for name in PACKAGES},
        "dali": _dali(),
        "pixel_operations": compiled.status(),
        "apex": apex_status(),
        "kernels": [{"name": item.name, "backend": item.backend, "reason": item.reason} for item in kernels.info()],
        "native": kernels.native_status(),
        "space": {name: space(path) for name, path in _places().items()},
    }


def versions() -> dict[str, str | None]:
    """The versions that decide which numbers a run has; None for a package that is not there."""
    packages = {name: _version(name) for name in ("triton", "timm")}
    return {"fastdeit": __version__, "python": platform.python_version(), "torch": str(torch.__version__), **packages}


def read(path: Path) -> dict[str, Any] | None:
    """What the environment.json at `path` holds; None where it cannot be read."""
    try:
        found = jsons.read(path)
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict):
        return None
    earlier = found.get("earlier")
    starts = [each for each in earlier if isinstance(each, dict)] if isinstance(earlier, list) else []
    known = [each for each in starts if jsons.is_number(each.get("step", 0))]
    step = found["step"] if jsons.is_number(found.get("step")) else 0
    return {**found, "step": step, "earlier": known}


def with_history(now: dict[str, Any], step: int, before: dict[str, Any] | None) -> dict[str, Any]:
    """The report of a start at `step`, with those of earlier starts that something is left of, the oldest first.

    before  what environment.json holds; None for nothing
    """
    known = {} if before is None else before
    last = [{key: value for key, value in known.items() if key != "earlier"}] if known else []
    earlier = [each for each in (*known.get("earlier", []), *last) if each.get("step", 0) < step]
    return {**now, "step": step, "earlier": earlier}


def code_version(root: Path) -> str | None:
    """Commit of the checkout at `root`, `-dirty` when tracked files differ from it; None when `root` is no checkout."""
    if not (root / ".git").exists() or shutil.which("git") is None:
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    answer = subprocess.run(command, capture_output=True, text=True)
    return answer.stdout.strip() if answer.returncode == 0 else f"unknown ({answer.stderr.strip()})"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _nccl() -> str | None:
    if not torch.cuda.is_available():
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))


def _gpus() -> list[dict[str, Any]]:
    devices = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [{"name": d.name, "capability": f"{d.major}.{d.minor}", "memory": d.total_memory} for d in devices]


def _driver() -> str | None:
    if not torch.cuda.is_available() or shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode != 0:
        return f"unknown ({(answer.stderr or answer.stdout).strip()})"
    return answer.stdout.split("\n")[0].strip()


def _dali() -> dict[str, str] | None:
    for package in DALI_PACKAGES:
        if (found := _version(package)) is not None:
            backend = "gpu" if torch.cuda.is_available() else "cpu"
            return {"package": package, "version": found, "backend": backend}
    return None


def apex_status() -> str:
    """Whether NVIDIA apex is there; PyPI's package of that name is another project and breaks at first use."""
    spec = find_spec("apex")
    if spec is None:
        return f"not installed (optional; PyPI's apex is an unrelated project, NVIDIA apex is at {APEX_SOURCE})"
    # Looked up as a directory: asking for the submodule would run the package, whichever it is.
    if any((Path(folder) / "optimizers").is_dir() for folder in spec.submodule_search_locations or []):
        return "NVIDIA apex is installed"
    return (
        "the installed package apex is not NVIDIA's: it has no apex.optimizers. PyPI's apex is an unrelated project; "
        f"pip uninstall apex, and install NVIDIA apex from {APEX_SOURCE} if you want it"
    )


def _places() -> dict[str, Path]:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    places = {"runs": Path.cwd(), "cache": cache, "shared memory": Path("/dev/shm")}
    return {name: _existing(path) for name, path in places.items()}


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.exists())


def space(path: Path) -> dict[str, Any]:
    """Of the file system of an existing `path`: this path, and the `free` and `total` bytes."""
    usage = shutil.disk_usage(path)
    return {"path": str(path), "free": usage.free, "total": usage.total}
