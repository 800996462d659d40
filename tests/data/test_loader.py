import hashlib
import itertools
import os
import resource
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from fastdeit.batch import Batch
from fastdeit.data.execute.prefetch import Prefetch
from fastdeit.data.loader import EvalLoader, TrainLoader
from fastdeit.data.plan import order, plan, policy
from fastdeit.data.sources.source import DataError

ROOT = Path(__file__).parents[2]
AUGMENT, MIXING = plan.Augment(size=(48, 40)), plan.Mixing(group_size=8)
BATCH, NOISE = 32, {"drop_path": 5}
STEPS = 16  # 512 images; 136 samples are 4 steps an epoch


def fastdeit_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("fastdeit")]


def train(source, world=1, accumulate=1, threads=1, start=0, stop=STEPS, repeats=3, further=()) -> list[list[str]]:
    """For every step the MD5 of every mixing group, with all its arrays, in the order of the global batch."""
    steps: list[dict[int, list[str]]] = [{} for _ in range(start, stop)]
    for rank in range(world):
        loader = TrainLoader(
            source,
            [AUGMENT, *further],
            MIXING,
            seed=3,
            batch_size=BATCH,
            accumulate=accumulate,
            repeats=repeats,
            rank=rank,
            world=world,
            threads=threads,
            noise={"drop_path": 5},
        )
        for groups, micros in zip(steps, list(loader.batches(start, stop)), strict=True):
            for micro, samples in enumerate(micros):
                part = order.slice_of(BATCH // 8, micro, accumulate, rank, world)
                groups.update(zip(range(part.start, part.stop), by_group(samples), strict=True))
    return [[groups[g] for g in range(BATCH // 8)] for groups in steps]


def by_group(samples: Batch) -> list[str]:
    digests = []
    for start in range(0, len(samples), 8):
        digest = hashlib.md5()
        others = (*samples.targets, samples.pixel_lam, samples.noise["drop_path"], samples.index)
        for rows in (samples.partner - start, *others, *samples.images, *samples.box, *filter(None, samples.erase)):
            for array in rows if isinstance(rows, tuple) else (rows,):
                digest.update(array[start : start + 8].contiguous().numpy().tobytes())
        digests.append(digest.hexdigest())
    return digests


@pytest.fixture(scope="module")
def source(varied, memory):
    return memory(varied, classes=7)


@pytest.fixture(scope="module")
def reference(source):
    return train(source)


def test_every_group_is_different(reference):
    assert len(set(itertools.chain(*reference))) == STEPS * BATCH // 8


@pytest.mark.parametrize(("world", "accumulate", "threads"), [(2, 1, 2), (4, 1, 1), (1, 2, 1), (2, 2, 1), (1, 1, 2)])
def test_stream_is_the_same_for_any_division(source, reference, world, accumulate, threads):
    assert train(source, world, accumulate, threads) == reference


@pytest.mark.parametrize("start", [1, 3, 4, 5])
def test_restart_at_any_step(source, reference, start):
    assert train(source, start=start) == reference[start:]


def test_another_seed_or_epoch_is_another_stream(source, reference):
    loader = TrainLoader(
        source, [AUGMENT], MIXING, seed=4, batch_size=BATCH, repeats=3, threads=1, noise={"drop_path": 5}
    )
    other = next(by_group(samples) for (samples,) in loader.batches(0, 1))
    assert not set(other) & set(itertools.chain(*reference))


def test_samples_agree_with_the_plan(source):
    loader = TrainLoader(
        source, [AUGMENT], MIXING, seed=3, batch_size=BATCH, accumulate=2, threads=1, noise={"drop_path": 3}
    )
    assert loader.steps_per_epoch == 4
    ((first, second),) = loader.batches(5, 6)
    stream = order.groups(order.epoch(3, 1, 136, BATCH), 1, BATCH, 8)
    assert first.index.tolist() + second.index.tolist() == stream.sample.reshape(-1).tolist()
    assert first.targets.y1.tolist() == [i % 7 for i in first.index.tolist()]
    assert torch.equal(first.targets.y2, first.targets.y1[first.partner])
    assert np.array_equal(second.noise["drop_path"].numpy(), plan.noise(3, 5, np.arange(16, 32), 3))
    mix = plan.mix(MIXING, AUGMENT.size, 3, 5, slice(2, 4))
    assert np.array_equal(second.targets.lam.numpy(), mix.lam)
    for name in ("partner", "pixel_lam"):
        assert np.array_equal(getattr(second, name).numpy(), getattr(mix, name))
    assert np.array_equal(second.box.numpy(), mix.box[None])
    assert second.erase == (None,)
    assert [(view.shape, view.dtype) for view in first.images] == [((16, 48, 40, 3), torch.uint8)]


def test_images_stay_valid_while_held(source, reference):
    loader = TrainLoader(
        source, [AUGMENT], MIXING, seed=3, batch_size=BATCH, repeats=3, threads=2, noise={"drop_path": 5}
    )
    held = [samples for (samples,) in loader.batches(0, 20)]
    assert [by_group(samples) for samples in held[:STEPS]] == reference


def test_mixing_groups_must_divide(source):
    with pytest.raises(ValueError, match=r"batch size 32 .* accumulate 3 x nproc 1"):
        TrainLoader(source, [AUGMENT], MIXING, seed=0, batch_size=32, accumulate=3)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_counts_101_images_exactly_once(memory, varied, world):
    seen = []
    for rank in range(world):
        loader = EvalLoader(memory(varied[:101], 7), (40, 48), 0.9, rank=rank, world=world, batch_size=16, threads=1)
        for samples in loader.batches():
            assert [view.shape for view in samples.images] == [(len(samples), 40, 48, 3)]
            assert samples.targets.y1.tolist() == samples.targets.y2.tolist() == [i % 7 for i in samples.index.tolist()]
            assert (samples.targets.lam == 1).all()
            assert (samples.pixel_lam == 1).all()
            assert not samples.box.any()
            assert samples.partner.tolist() == list(range(len(samples)))
            seen += samples.index.tolist()
    assert sorted(seen) == list(range(101))


def test_evaluation_pixels_do_not_depend_on_the_batch(memory, varied):
    def images(batch_size, world):
        found = {}
        for rank in range(world):
            loader = EvalLoader(
                memory(varied[:50]), (40, 48), 0.9, rank=rank, world=world, batch_size=batch_size, threads=1
            )
            for samples in loader.batches():
                found.update(zip(samples.index.tolist(), samples.images[0].numpy(), strict=True))
        return np.stack([found[i] for i in range(50)])

    assert np.array_equal(images(50, 1), images(7, 3))


def test_a_process_without_images_evaluates_none(memory, varied):
    assert list(EvalLoader(memory(varied[:1]), (40, 48), 0.9, rank=1, world=2, threads=1).batches()) == []


def test_closing_early_ends_all_threads(source):
    batches = TrainLoader(source, [AUGMENT], MIXING, seed=0, batch_size=BATCH, threads=2).batches(0, 10**9)
    next(batches)
    assert {"fastdeit-reader", "fastdeit-decoder"} <= set(fastdeit_threads())
    batches.close()
    assert fastdeit_threads() == []


def test_dropping_the_iterator_ends_all_threads(source):
    for _ in TrainLoader(source, [AUGMENT], MIXING, seed=0, batch_size=BATCH, threads=2).batches(0, 10**9):
        break
    assert fastdeit_threads() == []


def test_errors_of_the_source_reach_the_consumer(memory, varied):
    broken = memory(varied)
    broken.read = lambda index: 1 / 0
    with pytest.raises(ZeroDivisionError):
        next(TrainLoader(broken, [AUGMENT], MIXING, seed=0, batch_size=BATCH, threads=2).batches(0, 1))
    with pytest.raises(ZeroDivisionError):
        next(EvalLoader(broken, (40, 48), 0.9, threads=1).batches())
    assert fastdeit_threads() == []


@pytest.mark.slow
def test_a_process_that_exits_in_mid_stream_exits(tmp_path):
    """And ends its threads before DALI's own handler, which aborts the process where one still decodes."""
    code = (
        "import atexit, threading, nvidia.dali\n"
        "names = lambda: [one.name for one in threading.enumerate() if one.name.startswith('fastdeit')]\n"
        "atexit.register(lambda: print('threads left:', names()))\n"
        "from fastdeit.data import loader\n"
        "from fastdeit.data.plan import plan\n"
        "from fastdeit.data.sources import synthetic\n"
        "views, mixing = [plan.Augment(size=(32, 32))], plan.Mixing(group_size=8)\n"
        "images = synthetic.SyntheticSource(64, 4, (40, 60))\n"
        "batches = loader.TrainLoader(images, views, mixing, seed=0, batch_size=16).batches(0, 10**9)\n"
        "next(batches)\n"
        "print('leaving')\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "leaving\nthreads left: []\n", "")


def test_prefetch_runs_ahead_only_so_far():
    produced, full = [], threading.Event()

    def items():
        for item in range(100):
            produced.append(item)
            if item == 3:
                full.set()
            yield item

    ahead = Prefetch(items(), 3, "fastdeit-test")
    assert full.wait(10)
    assert produced == [0, 1, 2, 3]  # three ready and one in hand
    assert next(ahead) == 0
    ahead.close()
    assert fastdeit_threads() == []


def test_prefetch_gives_what_came_before_an_error():
    def items():
        yield 1
        yield 2
        raise OSError("disk")

    ahead = Prefetch(items(), 5, "fastdeit-test")
    assert (next(ahead), next(ahead)) == (1, 2)
    with pytest.raises(OSError, match="disk"):
        next(ahead)
    ahead.close()


def test_closing_wakes_a_thread_that_waits_for_another():
    asked, release = threading.Event(), threading.Event()

    def stuck():
        asked.set()
        release.wait(10)
        yield 1

    def through(items):
        yield from items
        drained.append(True)

    drained: list[bool] = []
    first = Prefetch(stuck(), 1, "fastdeit-first")
    second = Prefetch(through(first), 1, "fastdeit-second")
    assert asked.wait(10)
    release.set()
    first.close()
    second.close()
    assert fastdeit_threads() == []
    assert not drained  # a stream that was closed is not one that ended


@pytest.mark.slow
def test_many_batches_leave_nothing_behind(memory, make_image, encode):
    """At most half a kilobyte a batch; the images alone are 13.8."""
    batches = 5000
    source = memory([encode(make_image(i, 24, 24)) for i in range(16)])
    augment = plan.Augment(size=(48, 48), policy=policy.parse("rand-m9-mstd0.5-inc1", (48, 48)))
    loader = TrainLoader(
        source, [augment], plan.Mixing(group_size=2), seed=0, batch_size=2, threads=1, noise={"drop_path": 4}
    )
    every = batches // 5
    found = [resident() for step, _ in enumerate(loader.batches(0, batches)) if step % every == every - 1]
    assert found[-1] - found[0] < 2 << 20


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def test_data_error_is_a_value_error():
    assert issubclass(DataError, ValueError)
