"""Several views of a sample: one order, one fate of bad files, one mixing; and no view changes another."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastdeit import rng
from fastdeit.data.execute.dali import Executor, Work, files
from fastdeit.data.execute.route import route, routed
from fastdeit.data.loader import TrainLoader
from fastdeit.data.plan import order, plan, policy
from tests.data.oracle import execute
from tests.data.test_loader import AUGMENT, BATCH, MIXING, STEPS, train

GLOBAL = replace(AUGMENT, stream="global_1", crop_stream="global_1", erase=0.5, policy=policy.parse("3a", (48, 40)))
LOCAL = replace(AUGMENT, stream="local_0", crop_stream="local_0", size=(24, 20), crop_scale=(0.05, 0.3))
JITTER = replace(AUGMENT, stream="jitter", policy=policy.parse("none", (48, 40), color_jitter=0.4), erase=1.0)
SIMPLE = replace(AUGMENT, stream="simple", crop_stream="simple", crop="simple")


@pytest.fixture(scope="module")
def source(varied, memory):
    return memory(varied, classes=7)


@pytest.fixture(scope="module")
def reference(source):
    return train(source, further=(GLOBAL, LOCAL))


@pytest.fixture(scope="module")
def batches(source):
    """`batches(further...)` -> the samples of each step."""

    def batches(*further, steps=2):
        loader = TrainLoader(source, [AUGMENT, *further], MIXING, seed=3, batch_size=BATCH, threads=2)
        return [samples for (samples,) in loader.batches(0, steps)]

    return batches


@pytest.mark.parametrize(("world", "accumulate", "threads"), [(2, 1, 2), (4, 1, 1), (1, 2, 1), (2, 2, 1)])
def test_three_views_are_the_same_for_any_division(source, reference, world, accumulate, threads):
    assert len(set(itertools.chain(*reference))) == STEPS * BATCH // 8
    assert train(source, world, accumulate, threads, further=(GLOBAL, LOCAL)) == reference


@pytest.mark.parametrize("start", [1, 4, 5])
def test_three_views_restart_at_any_step(source, reference, start):
    assert train(source, start=start, further=(GLOBAL, LOCAL)) == reference[start:]


@pytest.mark.parametrize("further", [(GLOBAL,), (LOCAL, GLOBAL), (SIMPLE,)], ids=lambda views: len(views))
def test_further_views_change_nothing_of_the_first(batches, further):
    for alone, several in zip(batches(), batches(*further), strict=True):
        assert torch.equal(alone.images[0], several.images[0])
        assert all(map(torch.equal, alone.targets, several.targets))
        for name in ("partner", "pixel_lam", "index", "copy"):
            assert torch.equal(getattr(alone, name), getattr(several, name))
        assert torch.equal(alone.box[0], several.box[0])


def test_a_further_view_is_the_same_beside_any_other(batches):
    for two, four in zip(batches(GLOBAL), batches(LOCAL, GLOBAL, SIMPLE), strict=True):
        assert torch.equal(two.images[1], four.images[2])
        assert all(torch.equal(*arrays) for arrays in zip(two.erase[1], four.erase[2], strict=True))
        assert four.erase[:2] == (None, None)


def test_every_view_has_crops_and_colours_of_its_own(batches):
    (samples,) = batches(replace(AUGMENT, stream="b", crop_stream="b"), LOCAL, steps=1)
    assert [tuple(view.shape) for view in samples.images] == [(32, 48, 40, 3), (32, 48, 40, 3), (32, 24, 20, 3)]
    assert not (samples.images[0] == samples.images[1]).flatten(1).all(1).any()


def sides(routes):
    """int `[2, B]`: widths and heights."""
    return np.array([(one.width, one.height) for one in routes]).T


def test_a_clean_and_a_jittered_view_show_the_same_pixels(source):
    sample, copy, size = np.arange(136), np.zeros(136, int), sides(map(route, source.images))
    clean, jitter = (plan.samples(view, 3, 0, sample, copy, *size) for view in (AUGMENT, JITTER))
    assert np.array_equal(clean.box, jitter.box)
    assert np.array_equal(clean.flip, jitter.flip)
    assert (clean.ops.kind.shape, jitter.ops.kind.shape) == ((136, 0), (136, 3))
    assert jitter.erase_box.any(1).all()


def test_key_purposes_of_a_further_view_have_its_name_in_them(monkeypatch):
    purposes, key = [], rng.key
    monkeypatch.setattr(rng, "key", lambda seed, purpose, *ids: purposes.append(purpose) or key(seed, purpose, *ids))
    for view in (GLOBAL, SIMPLE, JITTER):
        plan.samples(view, 0, 0, [1, 2], [0, 0], [90, 90], [70, 70])
    common = "color_jitter", "erase", "erase_box", "policy"
    wanted = [f"{purpose}/global_1" for purpose in (*common, "crop", "flip")]
    wanted += [f"{purpose}/simple" for purpose in (*common, "simple_crop", "flip")]
    assert sorted(purposes) == sorted([*wanted, *(f"{purpose}/jitter" for purpose in common), "crop", "flip"])


def test_the_decoded_pair_differs_by_the_jitter_alone(batches):
    (samples,) = batches(replace(JITTER, policy=policy.NO_POLICY), steps=1)
    assert torch.equal(*samples.images)
    (samples,) = batches(JITTER, steps=1)
    assert not torch.equal(*samples.images)


def test_views_are_the_planned_pixels(varied):
    views = AUGMENT, LOCAL, SIMPLE
    encoded = [routed(np.frombuffer(data, np.uint8)) for data in varied[:32]]
    size = sides(one.route for one in encoded)
    planned = tuple(plan.samples(view, 0, 0, np.arange(32), np.zeros(32, int), *size) for view in views)
    executor = Executor([view.size for view in views], 32, threads=2, device="cpu", repair=None)
    ((_, images),) = executor.run([Work(encoded, planned)])
    for view, steps, got in zip(views, planned, images, strict=True):
        wanted = np.stack([execute(data, steps, row, view.size) for row, data in enumerate(varied[:32])])
        assert np.abs(got.numpy().astype(int) - wanted).mean() < 0.1  # the resize, see test_data_parity.py


def test_the_graph_of_the_gpu_renders_each_view_as_alone(varied):
    from fastdeit.data.execute import (
        graph,  # needs DALI, without which tests of other things are collected, too
    )

    views = GLOBAL, LOCAL, SIMPLE
    encoded = [routed(np.frombuffer(data, np.uint8)) for data in varied[:16]]
    size = sides(one.route for one in encoded)
    planned = [plan.samples(view, 0, 0, np.arange(16), np.zeros(16, int), *size) for view in views]

    def run(views, planned):
        sizes = [view.size for view in views]
        pipe = graph.whole(graph.forms(sizes, planned), False, batch_size=16, num_threads=2, device_id=None)
        pipe.build()
        for name, value in (graph.inputs(sizes, planned) | {"encoded": files(encoded, {})}).items():
            pipe.feed_input(name, value)
        return [np.asarray(images.as_tensor()) for images in pipe.run()]

    together = run(views, planned)
    for view, steps, images in zip(views, planned, together, strict=True):
        assert np.array_equal(run([view], [steps])[0], images)


def test_mixing_is_one_draw_and_its_box_is_scaled(batches):
    (samples,) = batches(LOCAL, steps=1)
    first, second = samples.box.double()
    cut = (first[:, 2] > first[:, 0]) & (first[:, 3] > first[:, 1])
    assert 0 < cut.sum() < BATCH
    assert not second[~cut].any()
    assert (second - first / 2).abs().max() <= 0.5
    assert (second[cut] != first[cut]).any()


def test_a_scaled_box_is_rounded_half_to_even():
    boxes = np.array([[1, 3, 7, 11], [0, 0, 0, 0], [0, 0, 12, 12]], np.int32)
    assert plan.scale_boxes(boxes, (12, 12), (6, 10)).tolist() == [[0, 2, 4, 9], [0, 0, 0, 0], [0, 0, 6, 10]]
    assert plan.scale_boxes(boxes, (12, 12), (12, 12)).tolist() == boxes.tolist()


@pytest.fixture(scope="module")
def shades(memory, make_image, encode):
    """64 images of one grey value each, four times their number; of the first two, one is empty and one has no
    quantisation tables, which only the decoder notices."""
    images = [encode(make_image(0, 60, 50).point(lambda _, i=i: 4 * i), "PNG") for i in range(64)]
    photo = encode(make_image(0, 60, 50))
    return memory([b"", photo[:20] + photo[20:].replace(b"\xff\xdb", b"\xff\xfe"), *images[2:]])


@pytest.mark.parametrize("options", [{}, {"accumulate": 2, "threads": 1}])
def test_a_bad_sample_has_the_same_substitute_in_every_view(shades, options):
    reports = []
    loader = TrainLoader(
        shades, [AUGMENT, LOCAL, SIMPLE], MIXING, seed=1, batch_size=32, repeats=1, max_bad_fraction=0.1,
        **{"threads": 2} | options, on_bad=lambda path, reason: reports.append(path),
    )  # fmt: skip
    got = [samples for micros in loader.batches(0, 4) for samples in micros]
    for samples in got:
        for view in samples.images:
            assert (view == 4 * samples.index.reshape(-1, 1, 1, 1)).all()
    assert sorted(reports) == ["memory:0", "memory:1"]

    met = 0
    for epoch, index in enumerate(torch.cat([samples.index for samples in got]).reshape(2, 64).tolist()):
        wanted = order.groups(order.epoch(1, epoch, 64, 32, 1), 0, 32, 8).sample.reshape(-1).tolist()
        wanted += order.groups(order.epoch(1, epoch, 64, 32, 1), 1, 32, 8).sample.reshape(-1).tolist()
        for used, original in zip(index, wanted, strict=True):
            stand_in, attempt = original, 0
            while stand_in < 2:
                stand_in = order.substitute(1, epoch, original, attempt, 64)
                attempt += 1
            assert used == stand_in
            met += attempt
    assert loader.bad.count == met
