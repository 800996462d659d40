"""What this machine offers and what fastdeit makes of it: `fastdeit doctor`, and every run's `environment.json`."""

import argparse
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import fastdeit
from fastdeit import kernels

GIB = 2**30
# A DeiT-Base checkpoint (weights, average, two optimizer moments) is about 1.4 GB, and several are kept.
DISK_WARNING_GIB = 10
# NCCL moves data between the processes of a machine through shared memory; Docker's default is 64 MB.
SHM_WARNING_GIB = 1
DALI_PACKAGES = ("nvidia-dali-cuda120", "nvidia-dali-cuda130")
PACKAGES = ("triton", "timm", "numpy", "safetensors", "pydantic")
APEX_SOURCE = "https://github.com/NVIDIA/apex"


@dataclass(frozen=True)
class Space:
    """Free and total bytes of the file system that holds `path`."""

    path: str
    free: int
    total: int


def report() -> dict[str, Any]:
    """The environment as plain values that JSON can hold; sizes in bytes, None for what there is not."""
    return {
        "fastdeit": {"version": fastdeit.__version__, "code": code_version(Path(fastdeit.__file__).parent.parent)},
        "python": {"version": platform.python_version(), "executable": sys.executable},
        "machine": {
            "platform": platform.platform(),
            "cpu_cores": len(os.sched_getaffinity(0)),
            "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        },
        "torch": {"version": torch.__version__, "cuda": torch.version.cuda, "nccl": _nccl()},
        "gpus": _gpus(),
        "driver": _driver(),
        "packages": {name: _version(name) for name in PACKAGES},
        "dali": _dali(),
        "apex": apex_status(),
        "kernels": [{"name": item.name, "backend": item.backend, "reason": item.reason} for item in kernels.info()],
        "space": {name: vars(space(path)) for name, path in _places().items()},
    }


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


def space(path: Path) -> Space:
    """Room on the file system of an existing path."""
    usage = shutil.disk_usage(path)
    return Space(str(path), usage.free, usage.total)


def warnings(found: dict[str, Any]) -> list[str]:
    """What in a report is going to hurt, one sentence each."""
    said = []
    for name in ("runs", "cache"):
        place = found["space"][name]
        if place["free"] < DISK_WARNING_GIB * GIB:
            said.append(
                f"only {_gib(place['free'])} free at {place['path']} ({name}); a run at ImageNet scale wants "
                f"{DISK_WARNING_GIB} GiB"
            )
    shm = found["space"]["shared memory"]
    if shm["total"] < SHM_WARNING_GIB * GIB:
        said.append(
            f"{shm['path']} has only {_gib(shm['total'])}, too little for NCCL between several GPUs; start the "
            "container with --shm-size=8g"
        )
    if found["dali"] is None:
        said.append("NVIDIA DALI is not installed, so no images can be read: pip install nvidia-dali-cuda120")
    if found["apex"].startswith("the installed package"):
        said.append(found["apex"])
    return said


def main(args: argparse.Namespace) -> None:
    """Print the report for reading. A missing GPU is a fact, not a failure."""
    print(render(report()))


def render(found: dict[str, Any]) -> str:
    """The report as text, in sections."""
    machine, torch_found, dali = found["machine"], found["torch"], found["dali"]
    code = f" ({found['fastdeit']['code']})" if found["fastdeit"]["code"] else ""
    cuda = (
        f"CUDA {torch_found['cuda']}, NCCL {torch_found['nccl']}"
        if found["gpus"]
        else f"built for CUDA {torch_found['cuda']}"
    )
    gpus = [f"{gpu['name']}, sm_{gpu['capability'].replace('.', '')}, {_gib(gpu['memory'])}" for gpu in found["gpus"]]
    sections = {
        "software": {
            "fastdeit": found["fastdeit"]["version"] + code,
            "python": f"{found['python']['version']} ({found['python']['executable']})",
            "torch": f"{torch_found['version']} ({cuda})",
            **{name: number or "not installed" for name, number in found["packages"].items()},
            "DALI": f"{dali['version']} ({dali['package']}), decodes on the {dali['backend'].upper()}"
            if dali
            else "not installed",
            "apex": found["apex"],
        },
        "machine": {
            "platform": machine["platform"],
            "CPU": f"{machine['cpu_cores']} cores, {_gib(machine['memory'])} memory",
            **{f"GPU {index}": gpu for index, gpu in enumerate(gpus)},
            **(
                {"driver": found["driver"] or "unknown"}
                if gpus
                else {"GPU": "none that torch can use; everything runs on the CPU"}
            ),
            **{
                name: f"{_gib(place['free'])} free of {_gib(place['total'])} at {place['path']}"
                for name, place in found["space"].items()
            },
        },
        "kernels": {
            item["name"]: ": ".join(filter(None, (item["backend"], item["reason"]))) for item in found["kernels"]
        },
        "warnings": {str(number): text for number, text in enumerate(warnings(found), 1)} or {"-": "none"},
    }
    return "\n\n".join(_section(title, rows) for title, rows in sections.items())


def _section(title: str, rows: dict[str, str]) -> str:
    width = max(map(len, rows), default=0)
    return "\n".join([title, *(f"  {name:{width}}  {text}" for name, text in rows.items())])


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
