"""`fastdeit export`: weights for other programs, as files that say what they are."""

import argparse
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from fastdeit import kernels
from fastdeit.errors import FastdeitError, UsageError
from fastdeit.methods.config import Fuse
from fastdeit.models import convert
from fastdeit.models.counterpart import counterpart, traceable
from fastdeit.recipe.resolve import Recipe
from fastdeit.run import build
from fastdeit.run.classification import named_scores
from fastdeit.run.settings import doubt, settings
from fastdeit.run.weights import KNOWN, Known, Weights, network, open_weights
from fastdeit.text import one_line
from fastdeit.verbs.formats import FORMATS

_MOST_IMAGES = 4096
"""Largest batch that an exported program takes."""
_TOLERANCE = 1e-3
"""Largest difference between a program's answers and the network's, relative to the largest of these."""


@dataclass(frozen=True)
class Job:
    """What is exported.

    out      the name that the file or folder will have
    network  with its weights, in eval mode, on the CPU
    known    what the file is to tell of it
    fuse     how a program answers for a network with two heads; None: with both
    """

    out: Path
    network: nn.Module
    known: Known
    fuse: Fuse | None


class Answer(nn.Module):
    """What a program computes: logits `[B, K]` of normalised images `[B, 3, H, W]`, or those of both heads.

    The softmax of the logits is the probability of each class, also where two heads are fused by the mean of their
    softmaxes: the logits are then the logarithms of that mean.
    """

    def __init__(self, inner: nn.Module, fuse: Fuse | None) -> None:
        super().__init__()
        self.inner, self.fuse = inner, fuse

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """The answer for images `x`."""
        logits = self.inner(x)
        if isinstance(logits, Tensor) or self.fuse is None:
            return logits
        if self.fuse == "logit":
            return (logits[0] + logits[1]) / 2
        return named_scores(logits, self.fuse)[self.fuse][1]


def main(args: argparse.Namespace) -> None:
    """`fastdeit export ADDRESS OUT`: OUT.safetensors, .pth, .pt2, .onnx, or a folder for timm and the hub."""
    out, kind = Path(args.out), args.format
    weights = open_weights(args.address)
    recipe = settings(weights, args.model, args.overrides)
    job = _job(out, weights, recipe, args.model, args.fuse)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        said = _written(job, kind)
    except (OSError, SafetensorError) as error:
        raise FastdeitError(f"{out}: cannot be written: {getattr(error, 'strerror', None) or error}") from error
    height, width = build.image_size(recipe)
    print(one_line(f"{weights.origin} -> {out} ({FORMATS[kind].words})"))
    print(
        f"input: float32 [batch, 3, {height}, {width}], normalised by mean {_short(job.known.mean)} and std "
        f"{_short(job.known.std)}, crop ratio {job.known.crop_ratio:g}"
    )
    if said:
        print(said)


def _written(job: Job, kind: str) -> str:
    """Write `job.out`. A file or folder takes its name when it is whole and checked; until then what had the name
    stays."""
    temporary = job.out.with_name(f".tmp-{job.out.name}")
    _remove(temporary)
    try:
        if FORMATS[kind].suffix:
            temporary.touch()  # torch tells a folder that cannot be written to in a RuntimeError
        else:
            temporary.mkdir()
        said = _WRITERS[kind](job, temporary)
        _take_place(temporary, job.out)
    finally:
        _remove(temporary)
    return said


def _take_place(temporary: Path, out: Path) -> None:
    """Give `out`'s name to what is at `temporary`. A folder that is in the way is renamed first, and goes last."""
    if not out.is_dir() or not any(out.iterdir()):
        os.replace(temporary, out)
        return
    before = out.with_name(f".tmp-before-{out.name}")
    _remove(before)
    os.rename(out, before)
    os.rename(temporary, out)
    shutil.rmtree(before)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _job(out: Path, weights: Weights, recipe: Recipe, model: str | None, fuse: str | None) -> Job:
    for note in (*weights.notes, doubt(weights)):
        if note is not None:
            print(one_line(f"{weights.origin}: {note}"))
    made = network(
        weights,
        name=model,
        image_size=build.image_size(recipe),
        grid=recipe.model.weights_grid,
        say=lambda note: print(one_line(note)),
    )
    size = build.image_size(recipe)
    known = replace(
        weights.known,
        name=recipe.model.name,
        timm=recipe.model.timm,
        image_size=size,
        num_classes=_classes(made, size),
        mean=recipe.data.mean,
        std=recipe.data.std,
        crop_ratio=recipe.data.eval_crop_ratio,
    )
    if fuse is not None and len(made.head_names) < 2:
        raise UsageError(f"--fuse {fuse}: {weights.origin} has one head, and there is nothing to fuse")
    if fuse is None:
        fuse = recipe.method.fuse
    return Job(out, made, known, None if fuse == "none" else fuse)


@torch.no_grad()
def _classes(model: nn.Module, size: tuple[int, int]) -> int:
    logits = model(torch.zeros(1, 3, *size))
    return (logits if isinstance(logits, Tensor) else logits[0]).shape[-1]


def _short(values: tuple[float, ...]) -> str:
    return f"({', '.join(f'{value:g}' for value in values)})"


# ---- formats ---------------------------------------------------------------------------------------------------------


def _safetensors(job: Job, out: Path) -> str:
    safetensors.torch.save_file(
        _dense(job.network), out, metadata={"format": "pt", KNOWN: json.dumps(asdict(job.known))}
    )
    return "the file tells its model, size, classes and normalisation to fastdeit"


def _deit(job: Job, out: Path) -> str:
    torch.save({"model": convert.deit_names(_dense(job.network))}, out)
    return ""


def _dense(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous().clone() for name, tensor in model.state_dict().items()}


def _timm(job: Job, out: Path) -> str:
    from timm.models import save_for_hf

    try:
        inner = counterpart(job.network).inner
    except ValueError as error:
        raise UsageError(f"{job.out}: {error}; export it as .safetensors, .pt2 or .onnx") from error
    known = job.known
    labels = {} if known.classes is None else {"label_names": list(known.classes)}
    data = {
        "input_size": (3, *known.image_size),
        "mean": known.mean,
        "std": known.std,
        "crop_pct": known.crop_ratio,
        "interpolation": "bicubic",
    }
    save_for_hf(inner, str(out), model_config=labels, data_config=data, safe_serialization=True)
    _safetensors(job, out / "model.safetensors")  # the same tensors, in a file that fastdeit knows as well
    heads = (
        "; timm's model answers with the mean of both heads' logits" if isinstance(job.fuse, str) and _two(job) else ""
    )
    return f"load it with timm.create_model('local-dir:{job.out}', pretrained=True){heads}"


def _two(job: Job) -> bool:
    return len(job.network.head_names) > 1


def _program(job: Job) -> nn.Module:
    """The answer as a module that can be traced: of our transformers timm's code, whose operators are PyTorch's own."""
    try:
        inner: nn.Module = traceable(job.network)
    except ValueError:
        inner = job.network
    return Answer(inner, job.fuse).eval()


def _torch(job: Job, out: Path) -> str:
    program = _traced(job)
    torch.export.save(program, out)
    loaded = torch.export.load(out).module()
    return _checked(job, lambda x: _listed(loaded(x)))


def _onnx(job: Job, out: Path) -> str:
    try:
        import onnxruntime
        import onnxscript  # noqa: F401  torch's exporter needs it
    except ImportError as error:
        raise UsageError(
            f"for ONNX {error.name} is needed, which is not installed: pip install 'fastdeit[export]'"
        ) from error
    names = ["logits"] if job.fuse is not None or not _two(job) else ["class", "distillation"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the exporter says of its own deprecations
        program = torch.onnx.export(
            _traced(job), input_names=["pixels"], output_names=names, dynamo=True, verbose=False, external_data=False
        )
    program.model.metadata_props["fastdeit"] = json.dumps(asdict(job.known))
    program.save(out)
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    return _checked(job, lambda x: [torch.from_numpy(each) for each in session.run(None, {"pixels": x.numpy()})])


def _traced(job: Job) -> torch.export.ExportedProgram:
    """The program for batches of any size up to `_MOST_IMAGES`."""
    batch = torch.export.Dim("batch", min=1, max=_MOST_IMAGES)
    example = torch.zeros(2, 3, *job.known.image_size)
    try:
        with torch.no_grad():
            return torch.export.export(_program(job), (example,), dynamic_shapes=({0: batch},))
    except Exception as error:
        if ":" not in (job.known.name or ""):
            raise
        # Its reasons are many, and those of a network of somebody else's are in that network's code.
        raise UsageError(
            f"{job.known.name}: torch.export cannot follow it for batches of any size ({type(error).__name__}: "
            f"{one_line(str(error).partition(chr(10))[0])}); a forward must not make a Python number of the size of "
            "the batch, so write x.shape[0] and not len(x). As .safetensors it can be exported as it is"
        ) from error


@torch.no_grad()
def _checked(job: Job, program: Callable[[Tensor], list[Tensor]]) -> str:
    """How far the program's answers for real pictures are from the network's. Raises FastdeitError beyond tolerance."""
    pixels = _real_pictures(job.known)
    expected = _listed(Answer(job.network, job.fuse)(pixels))
    found = program(pixels)
    worst = max(
        ((a - b).abs().max() / b.abs().max().clamp(min=1e-6)).item() for a, b in zip(found, expected, strict=True)
    )
    if not worst <= _TOLERANCE:
        raise FastdeitError(f"the exported program is wrong: its answers differ from the network's by {worst:.2g}")
    return f"checked on {len(pixels)} pictures: answers differ from the network's by at most {worst:.1g} of the largest"


def _listed(answer: Tensor | tuple[Tensor, ...]) -> list[Tensor]:
    return [answer] if isinstance(answer, Tensor) else list(answer)


def _real_pictures(known: Known) -> Tensor:
    """Photographs that scikit-learn brings, in three crops each, normalised `[6, 3, H, W]`."""
    crops = []
    for photograph in load_sample_images().images:
        x = torch.from_numpy(np.array(photograph)).permute(2, 0, 1)[None].float()
        for part in (x, x[..., :300, :300], x[..., 100:, 200:]):
            crops.append(torch.nn.functional.interpolate(part, known.image_size, mode="bilinear", antialias=True))
    images = torch.cat(crops).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    return kernels.pixels(images, mean=known.mean, std=known.std)


_WRITERS: Mapping[str, Callable[[Job, Path], str]] = {
    "safetensors": _safetensors,
    "deit": _deit,
    "timm": _timm,
    "torch": _torch,
    "onnx": _onnx,
}
"""(job, path) -> what is to be said, by the names of `formats.FORMATS`."""
