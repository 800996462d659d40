"""What this machine offers and what fastdeit makes of it: `fastdeit doctor`."""

import argparse
from typing import Any

from fastdeit.run import environment

GIB = 2**30
# A DeiT-Base checkpoint (weights, average, two optimizer moments) is about 1.4 GB, and several are kept.
DISK_WARNING_GIB = 10
# NCCL moves data between the processes of a machine through shared memory; Docker's default is 64 MB.
SHM_WARNING_GIB = 1


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
    print(render(environment.report()))


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
            "pixel operations": found["pixel_operations"],
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
            **{item["name"]: ": ".join(filter(None, (item["backend"], item["reason"]))) for item in found["kernels"]},
            "native kernels": found["native"],
        },
        "warnings": {str(number): text for number, text in enumerate(warnings(found), 1)} or {"-": "none"},
    }
    return "\n\n".join(_section(title, rows) for title, rows in sections.items())


def _section(title: str, rows: dict[str, str]) -> str:
    width = max(map(len, rows), default=0)
    return "\n".join([title, *(f"  {name:{width}}  {text}" for name, text in rows.items())])


def _gib(size: int) -> str:
    return f"{size / GIB:.1f} GiB"
