"""Losses of 30 training steps of every method and optimizer, printed as JSON of exact (hexadecimal) floats.

Run by `test_golden.py` in a process of its own, where torch, MKL and oneDNN are told to use one portable code path,
so that the numbers do not depend on the vector width or the core count of the machine. Square roots are numpy's
(`exact_roots`), so that the numbers do not depend on the maker of the processor. Words name the runs to make; without
any, all are made. `losses/torch-VERSION` has them by the release of torch, because another release may sum in another
order.

`python tests/golden/golden_losses.py --write` writes those of the installed torch: after a deliberate change, or to add
a release. A deliberate change makes the other folders wrong; delete them.
"""

import json
import os
import sys
from pathlib import Path

PORTABLE = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "MKL_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
}
STEPS, BATCH, CLASSES = 30, 8, 10
RUNS = {
    "supervised": ({"use": "supervised"}, "adamw"),
    "supervised_bce": ({"use": "supervised", "loss": "bce", "smoothing": 0.0}, "adamw"),
    "supervised_lamb": ({"use": "supervised"}, "lamb"),
    "supervised_sgd": ({"use": "supervised"}, "sgd"),
    "distill_hard": ({"use": "distill", "distillation": "hard"}, "adamw"),
    "distill_soft_numel": ({"use": "distill", "distillation": "soft", "tau": 3.0, "alpha": 0.1}, "adamw"),
    "distill_soft_batchmean": (
        {"use": "distill", "distillation": "soft", "tau": 3.0, "reduction": "batchmean"},
        "adamw",
    ),
    "cosub": ({"use": "cosub"}, "adamw"),
}
"""Name of a run -> (configuration of the method, name of the optimizer)"""
FOLDER = Path(__file__).parent / "losses"


def main() -> None:
    import torch

    torch.set_num_threads(1)
    torch.backends.mkldnn.enabled = False
    torch.use_deterministic_algorithms(True)
    exact_roots()
    names = [word for word in sys.argv[1:] if word != "--write"] or RUNS
    losses = {name: [loss.hex() for loss in train(*RUNS[name])] for name in names}
    version = torch.__version__.split("+")[0]
    if "--write" in sys.argv:
        folder = FOLDER / f"torch-{version}"
        folder.mkdir(exist_ok=True)
        for name, lines in losses.items():
            (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    else:
        print(json.dumps({"torch": version, "losses": losses}))


def train(options: dict, optimizer_name: str) -> list[float]:
    """Loss of every step, with everything in the loop that a real run has: drop-path, mixing, schedule, clipping,
    EMA."""
    import torch

    from fastdeit import methods, models
    from fastdeit.engine.dist import World
    from fastdeit.engine.ema import Ema, EmaTeacher
    from fastdeit.engine.groups import default_groups
    from fastdeit.engine.optimizers import find
    from fastdeit.engine.schedule import learning_rate
    from fastdeit.engine.step import Engine
    from fastdeit.methods.base import Context
    from fastdeit.methods.config import TeacherConfig
    from fastdeit.methods.teacher import Teacher

    distill = options["use"] == "distill"
    name = "deit_digits_distilled_patch8_32" if distill else "deit_digits_patch8_32"
    student = models.build(name, num_classes=CLASSES, drop_path=0.1)
    network = models.build("convnet_digits", num_classes=CLASSES)
    for model in (student, network):
        fill(model)
    if distill:
        options = {**options, "teacher": TeacherConfig(recipe="digits_teacher")}
    context = Context(CLASSES, 1, STEPS, lambda config: Teacher(network), EmaTeacher)
    method = methods.find(options["use"])(student, methods.config(options["use"])(**options), context).train()
    _, exempt = student.decay_groups()
    groups = default_groups(method.named_parameters(), 0.05, {f"model.{n}" for n in exempt})
    optimizer = find(optimizer_name)(groups)
    ema = Ema(optimizer.params, 0.9, method)
    engine = Engine(
        method, optimizer, World(torch.device("cpu")), precision="fp32", accumulate=2, clip_grad=1.0, ema=ema
    )
    losses = []
    for step in range(STEPS):
        rate = learning_rate(
            step,
            schedule="cosine",
            steps_per_epoch=10,
            epochs=3,
            lr=2e-3,
            warmup_epochs=0.5,
            warmup_lr=1e-6,
            min_lr=1e-5,
        )
        engine.step([batch(step, micro, method.noise()) for micro in range(2)], rate)
        losses.append(engine.means()["loss"])
    return losses


def exact_roots() -> None:
    """Square roots are rounded correctly from now on. PyTorch takes those of a CPU from MKL, where MKL_CBWR has no say:
    of 66,600 numbers, 12,784 were rounded the other way on an Intel processor, and other ones on an AMD."""
    import numpy as np
    import torch

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.asarray(np.sqrt(x.numpy())))

    torch.sqrt = torch.Tensor.sqrt = rounded
    torch.Tensor.sqrt_ = lambda x: x.copy_(rounded(x))


def fill(model) -> None:
    """Weights from our own noise: torch's initialisers draw other numbers in other versions."""
    import torch

    from fastdeit import rng

    for name, parameter in model.named_parameters():
        with torch.no_grad():
            if parameter.ndim > 1:
                bound = 0.03 if "token" in name or "embed" in name else (parameter.numel() / len(parameter)) ** -0.5
                uniform = rng.uniform(rng.key(0, name), range(parameter.numel()), 1).reshape(parameter.shape)
                parameter.copy_(torch.from_numpy((2 * uniform - 1) * bound))
            elif name.endswith("bias"):
                parameter.zero_()


def batch(step: int, micro: int, noise: dict):
    """Coloured noise with a class-dependent brightness, mixed by the real plan; no decoder is involved."""
    import numpy as np
    import torch

    from fastdeit import rng
    from fastdeit.batch import Batch, Labels, Step
    from fastdeit.data.plan import plan

    index = rng.permutation(rng.key(0, "golden", step, micro), 160)[:BATCH]
    labels = index % CLASSES
    words = rng.bits(rng.key(0, "golden pixels"), index, 32 * 32 * 3).reshape(BATCH, 32, 32, 3)
    images = (words % 64 + 18 * labels.reshape(-1, 1, 1, 1)).astype(np.uint8)
    mix = plan.mix(plan.Mixing(group_size=4), (32, 32), 0, step, slice(2 * micro, 2 * micro + 2))
    positions = np.arange(micro * BATCH, (micro + 1) * BATCH)
    tensor = lambda array: torch.from_numpy(np.ascontiguousarray(array))  # noqa: E731
    return Batch(
        images=(torch.from_numpy(images),),
        targets=Labels(tensor(labels), tensor(labels[mix.partner]), tensor(mix.lam)),
        partner=tensor(mix.partner),
        pixel_lam=tensor(mix.pixel_lam),
        box=tensor(mix.box[None]),
        index=tensor(index),
        copy=torch.zeros(BATCH, dtype=torch.int64),
        step=Step.at(step, 10, STEPS),
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        noise={name: tensor(plan.noise(0, step, positions, count, name)) for name, count in noise.items()},
    )


if __name__ == "__main__":
    os.environ.update(PORTABLE)
    main()
