"""`fastdeit bench parity`: the same training, step by step, by fastdeit and by timm.

Both sides begin with the same weights and are given the same batches: mixed images, labels, and the uniforms of
drop-path. Ours is the engine of a run (`stepping.Stepper`); the peer's is timm's model, losses, optimizer, schedule and
average of weights (`parity_peer.py`). A row has, for each case, the largest relative difference of the loss over all
steps, and those of the weights and of their average at the end.
"""

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from fastdeit.batch import Labels
from fastdeit.bench import measure
from fastdeit.bench.parity_peer import Peer
from fastdeit.errors import UsageError
from fastdeit.recipe import resolve as recipes
from fastdeit.stepping import Stepper

CLASSES, EPOCHS = 10, 5
TEACHER = "resnet10t"


@dataclass(frozen=True)
class Case:
    """A way of training that both sides follow.

    model      ours and timm's
    overrides  of the recipe deit_tiny
    loss       the peer's, a key of `parity_peer.LOSSES`
    start      pixels of a side at which the weights were made, where that is not the size trained at: the positions
               are resized
    """

    model: str
    overrides: tuple[str, ...]
    loss: str
    start: int | None = None


_DISTILLED = "deit_tiny_distilled_patch16_224"
_TAUGHT = ("method.use=distill", "method.alpha=0.3", "method.tau=3.0", f"method.teacher.timm={TEACHER}")
_LAMB = ("optim.name=lamb", "optim.lr=3e-3", "optim.weight_decay=0.05")
_FINE_TUNING = ("optim.lr=5e-5", "optim.min_lr=5e-5", "optim.weight_decay=1e-8", "model.drop_path=0.0")
CASES = {
    "supervised": Case("deit_tiny_patch16_224", (), "supervised"),
    "soft": Case(_DISTILLED, (*_TAUGHT, "method.distillation=soft"), "soft"),
    "hard": Case(_DISTILLED, (*_TAUGHT, "method.distillation=hard"), "hard"),
    "bce_lamb": Case("deit_tiny_patch16_224", ("method.loss=bce", "method.smoothing=0.0", *_LAMB), "bce"),
    "cosub": Case(
        "deit_tiny_patch16_224", ("method.use=cosub", "method.smoothing=0.0", "model.drop_path=0.2", *_LAMB), "cosub"
    ),
    "accumulate": Case("deit_tiny_patch16_224", ("train.accumulate=2",), "supervised"),
    "clip": Case("deit_tiny_patch16_224", ("optim.clip_grad=1.0",), "supervised"),
    "finetune": Case("deit_tiny_patch16_224", _FINE_TUNING, "supervised", start=64),
}
"""By the name that `--case` takes."""


def main(args: argparse.Namespace) -> None:
    """Compare the cases that are asked for; print a line and append a row for each."""
    if args.steps % EPOCHS:
        raise UsageError(f"--steps {args.steps}: must be a multiple of {EPOCHS}, the epochs of the schedule")
    if args.batch % 4:
        raise UsageError(f"--batch {args.batch}: must be a multiple of 4: two micro-batches of pairs")
    if args.image_size % 32:
        raise UsageError(
            f"--image-size {args.image_size}: must be a multiple of 32, so that half as much again is one of 16"
        )
    width = max(map(len, CASES))
    for name in args.case or CASES:
        row = compare(name, steps=args.steps, batch=args.batch, image_size=args.image_size)
        print(f"{name:{width}}  {sentence(row)}", flush=True)
        measure.append({**row, "environment": measure.environment()}, args.out)


def sentence(row: dict[str, Any]) -> str:
    """What a row says."""
    return (
        f"{row['steps']} steps, loss {row['losses'][0]:.4f} to {row['losses'][-1]:.4f}; largest relative difference to "
        f"{row['peer']}: loss {row['loss']:.1e}, weights {row['weights']:.1e}, average {row['average']:.1e}"
    )


def compare(name: str, *, steps: int, batch: int, image_size: int) -> dict[str, Any]:
    """The row of a case: `steps` steps of both sides on the CPU, in float32, on batches of random images.

    steps is a multiple of five, the epochs of the schedule; batch one of 4, image_size (pixels of a side) one of 32.
    """
    case = CASES[name]
    size = image_size if case.start is None else image_size + image_size // 2
    with _teacher() as (teacher, file):
        ours = Stepper(recipes.load("deit_tiny", _overrides(case, batch, size, file)), steps=steps)
        if case.start is not None:
            ours.load(_resized(case.model, image_size, ours.model))
        peer = Peer(ours.recipe, case.loss, steps, ours.model.state_dict(), teacher)
        start = {key: tensor.clone() for key, tensor in ours.model.state_dict().items()}
        mine, theirs = [], []
        for images, labels in _batches(steps, batch, size):
            noise, number = ours.noise(), ours.number
            mine.append(ours.step(images, labels, noise)["loss"])
            theirs.append(peer.step(number, images, labels, [*noise.values()]))
    return {
        "what": "parity",
        "peer": "timm",
        "case": name,
        "model": case.model,
        "image_size": size,
        "batch": batch,
        "steps": steps,
        "loss": max(abs(a - b) / abs(b) for a, b in zip(mine, theirs, strict=True)),
        "weights": _difference(_detached(ours.model), _detached(peer.model), start),
        "average": _difference(ours.average, _detached(peer.average.module), start),
        "losses": mine,
        "peer_losses": theirs,
    }


def _overrides(case: Case, batch: int, size: int, teacher: Path) -> list[str]:
    taught = "method.use=distill" in case.overrides
    return [
        f"model.name={case.model}",
        f"model.num_classes={CLASSES}",
        f"model.image_size={size}",
        f"train.epochs={EPOCHS}",
        f"train.batch_size={batch}",
        f"data.group_size={batch // 2}",
        "optim.warmup_epochs=1",
        "optim.ema_decay=0.99",
        "engine.device=cpu",
        "engine.precision=fp32",
        *case.overrides,
        *([f"method.teacher.weights={teacher}"] if taught else []),
    ]


@contextmanager
def _teacher() -> Iterator[tuple[nn.Module, Path]]:
    """A network of timm's with random weights, and a file that holds these."""
    torch.manual_seed(1)
    network = timm.create_model(TEACHER, num_classes=CLASSES).eval()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "teacher.safetensors"
        save_file(network.state_dict(), file)
        yield network, file


def _resized(name: str, image_size: int, wanted: nn.Module) -> dict[str, Tensor]:
    """Weights made at `image_size`, for a network of another size: positions resized as the public code does it."""
    torch.manual_seed(2)
    weights = timm.create_model(name, img_size=image_size, num_classes=CLASSES).state_dict()
    (rows, columns), positions = wanted.config.grid, weights["pos_embed"]
    tokens = positions.shape[1] - (side := image_size // wanted.patch_size) ** 2
    grid = positions[:, tokens:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    grown = F.interpolate(grid, size=(rows, columns), mode="bicubic", align_corners=False)
    return weights | {"pos_embed": torch.cat([positions[:, :tokens], grown.flatten(2).transpose(1, 2)], 1)}


def _batches(steps: int, batch: int, size: int) -> Iterator[tuple[Tensor, Labels]]:
    """Random images, mixed with their flip, as mixup mixes them. Each class has a colour, so there is something to
    learn."""
    generator = torch.Generator().manual_seed(0)
    colours = torch.randn(CLASSES, 3, 1, 1, generator=generator)
    for _ in range(steps):
        y = torch.randint(CLASSES, (batch,), generator=generator)
        images = torch.randn(batch, 3, size, size, generator=generator) + colours[y]
        lam = torch.rand(1, generator=generator)
        yield lam * images + (1 - lam) * images.flip(0), Labels(y, y.flip(0), lam.expand(batch).clone())


def _detached(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def _difference(ours: dict[str, Tensor], theirs: dict[str, Tensor], start: dict[str, Tensor]) -> float:
    """How far apart the sides are, as a share of how far the peer has come from the `start`: norms over all tensors.

    A tensor that begins at 0 has no size of its own, so tensors are not compared one by one.
    """
    if ours.keys() != theirs.keys():
        raise ValueError(f"the sides have other parameters: {sorted(ours.keys() ^ theirs.keys())}")
    apart = torch.cat([(ours[name] - their).flatten() for name, their in theirs.items()]).norm()
    way = torch.cat([(their - start[name]).flatten() for name, their in theirs.items()]).norm()
    return float(apart / way)
