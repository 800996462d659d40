"""How far the executors are from Pillow and timm, operation by operation.

`python -m tests.data.parity` prints the table of docs/augmentation.md.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from fastdeit.data.execute.dali import Executor, Work, files
from fastdeit.data.execute.route import routed
from fastdeit.data.pixel_ops import KINDS
from fastdeit.data.plan import plan, policy
from fastdeit.data.plan.operations import Ops
from tests.data.conftest import encoded, picture
from tests.data.oracle import execute

SIZE = (112, 128)
SIGNED = (-1.0, -0.9, -0.31, 0.08, 0.31, 0.9, 1.0)
FACTORS = (0.1, 0.19, 0.7, 1.0, 1.36, 1.81, 1.9)
GRID = {
    "rotate": [30 * level for level in SIGNED],
    "posterize": [1, 2, 4, 7, 8],
    "solarize": [0, 1, 26, 128, 255, 256],
    "solarize_add": [0, 11, 55, 99, 128],
    **dict.fromkeys(("color", "contrast", "brightness", "sharpness"), FACTORS),
    "shear_x": [0.3 * level for level in SIGNED],
    "shear_y": [0.3 * level for level in SIGNED],
    "translate_x": [0.45 * SIZE[1] * level for level in SIGNED],
    "translate_y": [0.45 * SIZE[0] * level for level in SIGNED],
    "blur": [0.1, 0.5, 1.0, 2.0],
    "hue": [-0.5, -0.1, -0.01, 0.01, 0.1, 0.5],
}
EXACT = (0, 0.0)
MOVED = (1, 0.003)
WARPED = (90, 1.2)
# name: largest and mean difference of 255 levels that tests allow, on the CPU and in the GPU's graph, and why.
BOUNDS = {
    **dict.fromkeys(KINDS[1:], (EXACT, EXACT, "")),
    "rotate": (
        EXACT,
        WARPED,
        "graph: DALI's cubic has coefficient -0.75, Pillow's -1, and it blends with the fill at the edge",
    ),
    **dict.fromkeys(
        ("shear_x", "shear_y", "translate_x", "translate_y"),
        (MOVED, WARPED, "CPU: float32 where Pillow has float64, before truncation; graph: as rotate"),
    ),
    "auto_contrast": (EXACT, (1, 0.003), "graph: float32 where Pillow has float64, before truncation"),
    "equalize": (EXACT, (20, 5.0), "graph: OpenCV's table; apart most where an image has few levels"),
    "blur": (EXACT, (24, 0.8), "graph: a Gaussian, not three box filters"),
    "hue": (EXACT, (8, 0.02), "graph: float32 division puts some hues into the next of 256 steps"),
}

Run = Callable[[Work], np.ndarray]


def photographs() -> list[bytes]:
    """8 PNGs of SIZE: photograph-like, one of a single colour, one dark with few levels."""
    images = [picture(seed, SIZE[1], SIZE[0]) for seed in range(8)]
    images[6] = images[6].point(lambda level: 77)
    images[7] = images[7].point(lambda level: level // 9)
    return [encoded(image, "PNG") for image in images]


def work(photos: list[bytes], kind: int, value: float) -> Work:
    n = len(photos)
    view = replace(
        plan.unaugmented(np.tile(np.array([0, 0, *SIZE], np.int32), (n, 1)), None, None),
        flip=np.arange(n) % 2 == 1,
        ops=Ops(np.full((n, 1), kind, np.uint8), np.full((n, 1), value, np.float32)),
    )
    return Work([routed(np.frombuffer(data, np.uint8)) for data in photos], (view,))


def planned(images: list[bytes], augment: plan.Augment, epoch: int = 0) -> Work:
    """One sample of every image, planned as in training."""
    encoded = [routed(np.frombuffer(data, np.uint8)) for data in images]
    width, height = np.array([(one.route.width, one.route.height) for one in encoded]).T
    n = len(images)
    view = plan.samples(augment, 7, epoch, np.arange(n), np.zeros(n, int), width, height)
    return Work(encoded, (view,))


def on_cpu(size: tuple[int, int] = SIZE) -> Run:
    executor = Executor([size], 64, threads=2, device="cpu", repair=None)

    def run(batch: Work) -> np.ndarray:
        executor.submit(batch)
        return executor.collect()[1][0].numpy()

    return run


def in_graph(like: Work, size: tuple[int, int] = SIZE) -> Run:
    """The GPU's graph for works of the form of `like`, on DALI's CPU backend."""
    from fastdeit.data.execute import (
        graph as dali_graph,  # needs DALI, without which tests of other things are collected, too
    )

    forms = dali_graph.forms([size], like.views)
    pipe = dali_graph.whole(forms, False, batch_size=128, num_threads=2, device_id=None, prefetch_queue_depth=1)
    pipe.build()

    def run(batch: Work, drawn: Mapping[int, np.ndarray] = {}) -> np.ndarray:
        for name, value in (dali_graph.inputs([size], batch.views) | {"encoded": files(batch.encoded, drawn)}).items():
            pipe.feed_input(name, value)
        (images,) = pipe.run()
        return np.asarray(images.as_tensor())

    return run


def apart(run: Run, photos: list[bytes], name: str) -> tuple[int, float]:
    """Largest and mean difference from the oracle over the grid of operation `name`."""
    found = []
    for value in GRID.get(name, [0]):
        batch = work(photos, KINDS.index(name), value)
        wanted = np.stack([execute(data, batch.views[0], row, SIZE) for row, data in enumerate(photos)])
        found.append(np.abs(run(batch).astype(int) - wanted))
    return int(np.max(found)), float(np.mean(found))


def difference(run: Run, images: list[bytes], work: Work) -> np.ndarray:
    """Absolute difference from the oracle, `[B, H, W, 3]`; batches of 64, as the runs are built for."""
    batches = [run(work.take(range(first, min(first + 64, len(images))))) for first in range(0, len(images), 64)]
    got = np.concatenate(batches).astype(int)
    return np.abs(
        got - np.stack([execute(data, work.views[0], row, got.shape[1:3]) for row, data in enumerate(images)])
    )


def main() -> None:
    photos, cpu = photographs(), on_cpu()
    graph = in_graph(work(photos, 0, 0.0))
    print("| operation | CPU: max / mean (bound) | GPU graph: max / mean (bound) | reason |")
    print("|---|---|---|---|")
    for name in KINDS[1:]:
        *bounds, reason = BOUNDS[name]
        cells = [
            f"{largest} / {mean:.4f} ({limit[0]} / {limit[1]:g})"
            for (largest, mean), limit in zip((apart(run, photos, name) for run in (cpu, graph)), bounds, strict=True)
        ]
        print(f"| {name} | {' | '.join(cells)} | {reason} |")
    print("\n| whole plan, 256 images of 40 to 500 pixels a side, to 224 | CPU: mean, median of images | GPU graph |")
    print("|---|---|---|")
    size, three = (224, 224), policy.parse("three_augment", (224, 224), color_jitter=0.3)
    sides = np.random.default_rng(0).integers(40, 501, (256, 2)).tolist()
    images = [encoded(picture(seed, *side), quality=90) for seed, side in enumerate(sides)]
    recipes = {
        "random resized crop, flip": plan.Augment(),
        "simple crop, flip": plan.Augment(crop="simple"),
        "random resized crop, flip, rand-m9-mstd0.5-inc1": plan.Augment(
            policy=policy.parse("rand-m9-mstd0.5-inc1", size)
        ),
        "simple crop, flip, 3-Augment": plan.Augment(crop="simple", policy=three),
    }
    for name, augment in recipes.items():
        batch = planned(images, augment)
        runs = on_cpu(size), in_graph(batch, size)
        means = [difference(run, images, batch).mean((1, 2, 3)) for run in runs]
        print(f"| {name} | {' | '.join(f'{mean.mean():.3f}, {np.median(mean):.3f}' for mean in means)} |")


if __name__ == "__main__":
    main()
