"""What the model of `fastdeit plan` expects of a step that is counted: the preset that a trial would choose on the GPUs
of an architecture, and how many times as fast as timm's compiled step that is. Nothing here is measured."""

from collections.abc import Mapping
from typing import NamedTuple

from fastdeit.bench.count import Count, Counted, CountError, ours
from fastdeit.bench.measure import CLASSES
from fastdeit.estimate import activations, interval, memory, presets
from fastdeit.estimate import designs as estimate_designs
from fastdeit.estimate import model as estimate
from fastdeit.estimate.designs import TIMM_COMPILE, Design
from fastdeit.estimate.gpus import GPU, GPUS
from fastdeit.estimate.networks import Network, Work
from fastdeit.estimate.options import with_options
from fastdeit.estimate.presets import Preset
from fastdeit.estimate.subject import network


class Expected(NamedTuple):
    """On a GPU: the preset, the backends by op, whether activations are kept (as engine.keep_activations auto does),
    and the ratio to timm_compile with its 5th and 95th percentile."""

    gpu: str
    preset: str
    forms: Mapping[str, str]
    keep_activations: bool
    ratio: float
    low: float
    high: float


def of(cell: Counted, arch: int) -> list[Expected]:
    """For each GPU of the architecture that the model knows and on which there is a preset to choose, the newest
    last."""
    size = cell.image_size, cell.image_size
    student = network(cell.model, None, size, CLASSES, cell.drop_path)
    work = Work(cell.batch, cell.precision, cell.drop_path > 0, cell.ema)
    gpus = [gpu for gpu in GPUS.values() if gpu.arch == f"sm_{arch}"]
    found = (_on(gpu, student, work) for gpu in gpus)
    return [expected for expected in found if expected is not None]


def _on(gpu: GPU, student: Network, work: Work) -> Expected | None:
    keep = memory.total(memory.peak(student, work, _designs(gpu, student, work, True)[-1], world=1, parallel="ddp"))
    kept = keep <= activations.SHARE * gpu.memory
    found: list[Preset] = presets.modelled(student, work, _designs(gpu, student, work, kept), gpu)
    if not found:
        return None
    drawn = [interval.steps(student, work, design, gpu) for design in (TIMM_COMPILE, *(p.design for p in found))]
    seconds = [[sum(step) for step in steps] for steps in drawn]
    ratios = [peer / min(mine) for peer, *mine in zip(*seconds, strict=True)]
    peer, mine = (sum(estimate.step(student, work, design, gpu)) for design in (TIMM_COMPILE, found[0].design))
    return Expected(gpu.name, found[0].name, found[0].forms, kept, peer / mine, *interval.interval(ratios))


def _designs(gpu: GPU, student: Network, work: Work, keep: bool) -> list[Design]:
    options = {"keep_activations": keep, "residual": "fp32", "products": "precision"}
    return [with_options(design, gpu, **options) for design in estimate_designs.compared(gpu, work.precision, student)]


def counted(cell: Counted, arch: int) -> Count:
    """Our step in the preset that is expected on the newest GPU of the architecture. Raises CountError where none is
    expected, otherwise as `count.ours`."""
    expected = of(cell, arch)
    if not expected:
        raise CountError(f"the model expects no preset of {cell.precision} on sm_{arch}")
    forms = expected[-1].forms
    choices = {"": "auto", **forms, "layer_norm_mlp": forms["mlp"]}
    return ours(cell, arch, choices, keep=expected[-1].keep_activations)


def words(expected: Expected) -> str:
    """One line for people."""
    forms = ", ".join(f"{op}={backend}" for op, backend in expected.forms.items())
    kept = ", activations kept" if expected.keep_activations else ""
    return (
        f"modelled, {expected.gpu}: a trial is expected to choose the preset {expected.preset} ({forms}{kept}), "
        f"{expected.ratio:.2f} ({expected.low:.2f} to {expected.high:.2f}) times as fast as timm_compile"
    )
