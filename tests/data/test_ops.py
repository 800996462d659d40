"""Pixel operations: each against Pillow and timm on a grid of magnitudes, and all of them in random plans."""

import gc
import os
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastdeit.data import pixel_ops
from fastdeit.data.execute import dali, render
from fastdeit.data.execute.dali import Executor, Work
from fastdeit.data.execute.route import routed
from fastdeit.data.loader import TrainLoader
from fastdeit.data.pixel_ops import FILL, KINDS
from fastdeit.data.plan import order, plan, policy
from fastdeit.data.plan.operations import Ops
from fastdeit.data.sources.folder import FolderSource
from tests.data import oracle, parity

SIZE = (40, 48)


def test_a_tall_image_is_resized_in_width_before_height():
    """Pillow 13 does it the other way round; its passes, one after the other, are the same in every version."""
    noise = np.random.default_rng(0).integers(0, 256, (1999, 300, 3), dtype=np.uint8)
    image, (width, height) = Image.fromarray(noise), (256, 1706)
    orders = [[(width, 1999), (width, height)], [(300, height), (width, height)]]
    ours, apart = render.resized(noise, (height, width)).astype(int), []
    for passes in orders:
        theirs = image
        for size in passes:
            theirs = theirs.resize(size, Image.Resampling.BICUBIC)
        apart.append(np.abs(ours - np.asarray(theirs)).max())
    assert apart[0] <= 1
    assert apart[1] >= 10


@pytest.fixture(scope="module")
def photos():
    return parity.photographs()


@pytest.fixture(scope="module")
def cpu():
    return parity.on_cpu()


@pytest.fixture(scope="module")
def graph():
    return parity.in_graph(parity.work(parity.photographs(), 0, 0.0))


def test_every_operation_is_covered():
    assert set(parity.BOUNDS) == set(KINDS[1:])


def test_an_operation_keeps_its_code():
    """Plans store codes, and so does what is fingerprinted: new operations go to the end."""
    assert (
        *("none", "auto_contrast", "equalize", "invert", "rotate", "posterize", "solarize", "solarize_add", "color"),
        *("contrast", "brightness", "sharpness", "shear_x", "shear_y", "translate_x", "translate_y", "grayscale"),
        *("blur", "hue"),
    ) == KINDS


@pytest.mark.parametrize(("form", "missing"), [("GPU", {"gpu": None}), ("CPU", {"cpu": None})])
def test_an_operation_without_one_of_its_forms_is_an_error(form, missing):
    whole = next(op for op in pixel_ops.PIXEL_OPS if op.name == "invert")
    with pytest.raises(TypeError, match=f"pixel operation 'invert' has no form for the {form}"):
        replace(whole, **missing)


def test_an_operation_in_words():
    kind = np.array([KINDS.index(name) for name in ("rotate", "none", "invert", "posterize")], np.uint8)
    words = pixel_ops.described(kind, np.array([-7.25, 0, 0, 4], np.float32))
    assert words == "rotate by -7.2 degrees, then invert, then posterize keeping 4 of 8 bits"
    assert pixel_ops.described(kind[1:2], np.zeros(1, np.float32)) == "none"


@pytest.mark.parametrize("name", KINDS[1:])
def test_operation_on_the_cpu(cpu, photos, name):
    largest, mean = parity.BOUNDS[name][0]
    found = parity.apart(cpu, photos, name)
    assert found[0] <= largest
    assert found[1] <= mean


@pytest.mark.parametrize("name", KINDS[1:])
def test_operation_in_the_graph(graph, photos, name):
    largest, mean = parity.BOUNDS[name][1]
    found = parity.apart(graph, photos, name)
    assert found[0] <= largest
    assert found[1] <= mean


def test_what_geometry_uncovers_is_filled(photos, cpu):
    moved = cpu(parity.work(photos, KINDS.index("translate_y"), 20.0))
    assert (moved[:, -20:] == FILL).all()
    assert (moved[:6, -21] != FILL).any(-1).mean() > 0.9


def test_an_image_without_operations_is_returned_itself():
    image = np.zeros((4, 4, 3), np.uint8)
    nothing = np.zeros(2, np.uint8), np.zeros(2, np.float32)
    assert pixel_ops.apply(image, *nothing) is image


def test_operations_do_not_write_to_their_input(photos):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (16, 20, 3), dtype=np.uint8)
    image.flags.writeable = False
    before = image.copy()
    for kind in range(1, len(KINDS)):
        pixel_ops.apply(image, np.array([kind]), np.array([1.0], np.float32))
    assert np.array_equal(image, before)


def differences(image: np.ndarray, name: str, value: float) -> np.ndarray:
    """From Pillow, of one operation."""
    got = pixel_ops.apply(image, np.array([KINDS.index(name)]), np.array([value], np.float32))
    value = float(np.float32(value))
    return np.abs(got.astype(int) - np.asarray(oracle.OPERATIONS[name](Image.fromarray(image), value)))


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("name", KINDS[1:])
@pytest.mark.parametrize("size", [(1, 1), (30, 41)])
def test_operations_on_a_picture_that_has_become_grey(name, size):
    """It is held as one channel, and no operation may take it for something else, not even with two more behind it."""
    image = noise(*size)
    grey = np.array(Image.fromarray(image).convert("L").convert("RGB"))
    for then in ([], ["contrast", "invert"]):
        kind = np.array([KINDS.index(each) for each in ("grayscale", name, *then)], np.uint8)
        value = np.array([0, parity.GRID.get(name, [0])[1 % len(parity.GRID.get(name, [0]))], 1.3, 0][: len(kind)])
        got = pixel_ops.apply(image, kind, value.astype(np.float32))
        assert np.array_equal(got, pixel_ops.apply(grey, kind[1:], value[1:].astype(np.float32)))
        wanted = oracle.operate(Image.fromarray(grey), kind[1:], value[1:].astype(np.float32))
        assert np.abs(got.astype(int) - np.asarray(wanted)).max() <= parity.BOUNDS[name][0][0] * (1 + len(then))


# The last three are among those where rounding second differences would not give Pillow's pixels.
RADII = (*np.linspace(0, 3, 46), 1.4142, 0.12126756, 0.13636431, 0.15309316)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 2), (250, 130)])
def test_blur_makes_the_pixels_of_pillow(size):
    """Of black and white noise, too, whose second differences are the largest there are."""
    for image in (noise(*size), (noise(*size) & 1) * np.uint8(255)):
        apart = {radius: differences(image, "blur", radius).max() for radius in RADII}
        assert not any(apart.values()), apart


def test_auto_contrast_truncates_as_pillow_does_for_every_range():
    for spread in range(256):
        low = np.array([0, (255 - spread) // 2, 255 - spread])
        levels = (low + np.arange(spread + 1)[:, None]).astype(np.uint8)
        assert not differences(levels.reshape(1, -1, 3), "auto_contrast", 0).any()


SIZES = [(1, 1), (1, 9), (2, 7), (3, 3), (5, 120), (131, 4), (49, 50)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["auto_contrast", "brightness", "color", "contrast", "sharpness"])
def test_blends_of_any_size(size, name):
    for factor in (0.0, 0.37, 1.0, 1.9):
        assert not differences(noise(*size), name, factor).any()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["shear_x", "shear_y", "translate_x", "translate_y"])
def test_shifts_of_any_size_by_any_amount(size, name):
    """Also by more than the image is long; a uniform image keeps its levels."""
    length = size[1] if name.endswith("_x") else size[0]
    amounts = (0.27, 0.99, 3.0) if name.startswith("shear") else (0.27, 0.6 * length, length - 0.3, 2.5 * length)
    for amount in (*amounts, *(-x for x in amounts)):
        apart = differences(noise(*size), name, amount)
        assert apart.max() <= 1
        assert apart.sum() <= 1 + 0.003 * apart.size
        assert not differences(np.full((*size, 3), 77, np.uint8), name, amount).any()


def test_operations_take_images_in_any_memory_order():
    image = noise(30, 40)
    for kind in range(1, len(KINDS)):
        operation = np.array([kind]), np.array([1.0], np.float32)
        turned = pixel_ops.apply(np.asfortranarray(image), *operation)
        assert np.array_equal(turned, pixel_ops.apply(image, *operation))


@pytest.mark.parametrize("size", [(1, 1), (5, 4), (224, 224), (300, 171), (2, 20000)])
def test_flip_reverses_the_columns(size):
    assert np.array_equal(render.flipped(noise(*size)), noise(*size)[:, ::-1])


def test_flip_leaves_the_threads_of_torch_asleep():
    """They would be woken for every image, in every thread that renders."""
    image = np.zeros((224, 224, 3), np.uint8)

    def run():
        before = threads_of_this_process()
        render.flipped(image)
        found.append(threads_of_this_process() - before)

    found, threads = [], torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    finally:
        torch.set_num_threads(threads)
    assert found[0] <= 0  # threads of other tests may end meanwhile


def threads_of_this_process() -> int:
    return len(os.listdir("/proc/self/task"))


def all_kinds(count: int, layers: int = 3) -> Ops:
    """Every kind in every layer, with magnitudes from the grid."""
    rng = np.random.default_rng(1)
    kind = rng.integers(0, len(KINDS), (count, layers))
    value = [[rng.choice(parity.GRID.get(KINDS[index], [0])) for index in row] for row in kind.tolist()]
    return Ops(kind.astype(np.uint8), np.array(value, np.float32))


RECIPE = plan.Augment(size=SIZE, policy=policy.parse("rand-m9-mstd0.5-inc1", SIZE))
THREE = plan.Augment(size=SIZE, crop="simple", policy=policy.parse("three_augment", SIZE, color_jitter=0.3))


@pytest.mark.parametrize("augment", [RECIPE, THREE], ids=["rand_augment", "three_augment"])
def test_whole_plan_on_the_cpu(varied, augment):
    run = parity.on_cpu(SIZE)
    per_image = parity.difference(run, varied, parity.planned(varied, augment)).mean((1, 2, 3))
    assert per_image.mean() < 0.12  # one level of the resize, multiplied by equalize and posterize
    assert np.median(per_image) < 0.02


@pytest.mark.parametrize("augment", [RECIPE, THREE], ids=["rand_augment", "three_augment"])
def test_whole_plan_in_the_graph(varied, augment):
    work = parity.planned(varied[:64], augment)
    run = parity.in_graph(work, SIZE)
    apart = parity.difference(run, varied[:64], work)[:, 4:-4, 4:-4]  # a region sees the pixels around it
    assert apart.mean() < 2.0
    assert np.median(apart.mean((1, 2, 3))) < 0.6


def test_window_reflects_without_repeating_the_edge(varied):
    work = parity.planned(varied[:3], plan.Augment(size=SIZE, crop="simple"))
    edges = np.array([[-4, -4], [-1, 0], [3, -2]], np.int32)
    view = replace(work.views[0], resize=np.tile(np.array([[50, 52]], np.int32), (3, 1)), start=edges)
    work = replace(work, views=(view,))
    for run in (parity.on_cpu(SIZE), parity.in_graph(work, SIZE)):
        apart = parity.difference(run, varied[:3], work)
        assert apart.max() <= 8
        assert apart.mean() < 0.5


@pytest.fixture(scope="module")
def everything(varied):
    """272 samples, 2 of each image, with 3 operations of every kind."""
    work = parity.planned(varied * 2, plan.Augment(size=SIZE))
    return replace(work, views=(replace(work.views[0], ops=all_kinds(len(work.encoded))),))


def stream(work: Work, batch_size: int, threads: int, start: int = 0) -> np.ndarray:
    executor = Executor([SIZE], batch_size, threads=threads, device="cpu", repair=None)
    count = len(work.encoded)
    parts = (work.take(range(first, min(first + batch_size, count))) for first in range(start, count, batch_size))
    return np.concatenate([images.numpy() for _, (images,) in executor.run(parts)])


@pytest.fixture(scope="module")
def reference(everything):
    return stream(everything, 128, 2)


@pytest.mark.parametrize(("batch_size", "threads", "start"), [(64, 1, 0), (17, 3, 0), (1, 1, 250), (48, 2, 100)])
def test_pixels_do_not_depend_on_batches_threads_or_start(everything, reference, batch_size, threads, start):
    assert len(np.unique(everything.views[0].ops.kind)) == len(KINDS)
    assert np.array_equal(stream(everything, batch_size, threads, start), reference[start:])


def test_order_does_not_matter(everything, reference):
    shuffled = np.random.default_rng(2).permutation(len(everything.encoded))
    assert np.array_equal(stream(everything.take(shuffled), 64, 2), reference[shuffled])


def test_stream_of_the_recipe_is_the_same_from_files_and_memory_and_for_two_ranks(tmp_path, varied, memory):
    for i, data in enumerate(varied):
        (tmp_path / f"{i % 2}").mkdir(exist_ok=True)
        (tmp_path / f"{i % 2}" / f"{i:03d}.jpg").write_bytes(data)
    files = FolderSource(tmp_path)
    stored = memory([files.read(i).tobytes() for i in range(len(files))])
    options = {"seed": 5, "batch_size": 32, "threads": 1}
    views, mixing = [RECIPE], plan.Mixing(group_size=8)
    whole = [samples.images[0] for (samples,) in TrainLoader(files, views, mixing, **options).batches(0, 4)]
    ranks = [TrainLoader(stored, views, mixing, **options, rank=rank, world=2).batches(2, 4) for rank in range(2)]
    for step, ((first,), (second,)) in enumerate(zip(*ranks, strict=True), start=2):
        assert np.array_equal(whole[step], np.concatenate((first.images[0], second.images[0])))


def test_a_sample_that_cannot_be_augmented_is_named(varied, memory, monkeypatch):
    """An error after the decoder counts as a bad sample, and the others of its batch keep their pixels."""
    source = memory(varied[:32])
    augment, mixing = plan.Augment(size=SIZE, flip=0.0), plan.Mixing(group_size=8)
    options = {"seed": 0, "batch_size": 8, "threads": 2, "max_bad_fraction": 0.1}
    sound = [samples for (samples,) in TrainLoader(source, [augment], mixing, **options).batches(0, 4)]
    victim = parity.planned([varied[int(sound[1].index[3])]], augment).encoded[0]
    real = dali.Executor._pop

    def failing(self, stream, task):
        images = real(self, stream, task)
        if any(np.array_equal(one.data, victim.data) for one in task.work.encoded):
            raise dali.RenderError("it cannot be augmented (ValueError: no)")
        return images

    monkeypatch.setattr(dali.Executor, "_pop", failing)
    reports = []
    loader = TrainLoader(source, [augment], mixing, **options, on_bad=lambda *report: reports.append(report))
    got = [samples for (samples,) in loader.batches(0, 4)]
    index = int(sound[1].index[3])
    assert reports == [(f"memory:{index}", "it cannot be augmented (ValueError: no)")]
    for before, after in zip(sound, got, strict=True):
        kept = before.index != index
        assert np.array_equal(before.images[0][kept], after.images[0][kept])
    assert int(got[1].index[3]) == order.substitute(0, 0, index, 0, 32)


def test_an_error_of_an_operation_says_which(photos):
    broken = parity.work(photos[:1], KINDS.index("posterize"), float("nan"))
    executor = Executor([parity.SIZE], 1, threads=1, device="cpu", repair=lambda work, failures: repaired(failures))

    def repaired(failures):
        raise LookupError(failures[0])

    executor.submit(broken)
    with pytest.raises(
        LookupError, match=r"^the file is sound, but the operation posterize\(nan\) failed \(ValueError: its value is"
    ):
        executor.collect()


def test_an_error_of_the_crop_says_so():
    renderer = render.Renderer((0, 8), 1)
    view = plan.unaugmented(np.array([[0, 0, 8, 8]], np.int32), None, None)
    with pytest.raises(render.RenderError, match=r"^the file is sound, but cutting and resizing it failed \(Runtime"):
        renderer.batch([np.zeros((8, 8, 3), np.uint8)], np.zeros((1, 2), np.int32), view)
    renderer.close()


@pytest.mark.parametrize("dirt", [0, 255])
def test_a_window_needs_no_more_of_its_image_than_it_looks_at(dirt, monkeypatch):
    """Every kind of size and place: enlarged, shrunk, reflected at either end and at both."""
    monkeypatch.setattr(np, "empty", lambda shape, dtype: np.full(shape, dirt, dtype))
    monkeypatch.setattr(render, "_LONG", 10_000)  # what Pillow makes of a part is not the same to the bit
    draw = np.random.default_rng(5)
    saved = 0
    for _ in range(300):
        size = tuple(draw.integers(1, 40, 2).tolist())
        box = np.concatenate((draw.integers(0, 5, 2), draw.integers(1, 120, 2)))[None].astype(np.int32)
        resize = np.maximum(draw.integers(1, 90, (1, 2)), np.array(size) // 2 + 1)
        start = draw.integers(1 - resize, 2 * resize - np.array(size))  # as far out as one reflection goes
        view = plan.unaugmented(box, resize.astype(np.int32), start.astype(np.int32))
        source = draw.integers(0, 256, (*(box[0, :2] + box[0, 2:] + 3), 3), dtype=np.uint8)
        y, x, height, width = box[0]
        expected = render.window(
            render.resized(source[y : y + height, x : x + width], resize[0].tolist()), start[0], size
        )
        (part,) = render.source_region(view, size)
        whole = source[part[0] : part[0] + part[2], part[1] : part[1] + part[3]].copy()
        renderer = render.Renderer(size, 1)
        (got,) = renderer.batch([whole], part[None, :2], view)
        (of_all,) = renderer.batch([source], np.zeros((1, 2), np.int32), view)
        renderer.close()
        assert np.array_equal(got.numpy(), expected), (box, resize, start, size)
        assert np.array_equal(of_all.numpy(), expected), (box, resize, start, size)
        saved += whole.size < height * width * 3
    assert saved > 150


def test_a_window_has_the_same_pixels_when_only_a_part_is_decoded(varied, monkeypatch):
    """The decoder makes nothing up at the edge of a part, with chroma subsampling or without."""
    encoded = [routed(np.frombuffer(data, np.uint8)) for data in varied]
    width, height = np.array([(one.route.width, one.route.height) for one in encoded]).T
    resize, start = plan.eval_window(width, height, SIZE, 0.6)
    boxes = np.stack((0 * width, 0 * width, height, width), axis=1).astype(np.int32)
    view = plan.unaugmented(boxes, resize.astype(np.int32), start.astype(np.int32))
    assert (render.source_region(view, SIZE)[:, 2:].prod(axis=1) < 0.8 * width * height).all()

    def rendered():
        executor = Executor([SIZE], len(encoded), threads=2, device="cpu", repair=None)
        ((_, (images,)),) = executor.run([Work(encoded, (view,))])
        return images

    parts = rendered()
    for module in (dali, render):
        monkeypatch.setattr(module, "source_region", lambda view, size: view.box)
    assert torch.equal(parts, rendered())


def test_evaluation_decodes_what_its_window_looks_at():
    resize, start = plan.eval_window(500, 375, (224, 224), 0.875)
    view = plan.unaugmented(np.array([[0, 0, 375, 500]], np.int32), resize.astype(np.int32), start.astype(np.int32))
    (part,) = render.source_region(view, (224, 224)).tolist()
    assert part == [20, 81, 335, 336]
    assert dali._hull([view], [(224, 224)])[1].tolist() == [[335, 336]]


def test_where_a_window_needs_most_of_its_box_all_is_decoded():
    """Nothing has to be copied then. Of the two boxes the window needs 78 and 64 percent."""
    boxes = np.array([[5, 7, 375, 480], [5, 7, 375, 600]], np.int32)
    resize, start = np.array([[224, 286], [224, 358]], np.int32), np.array([[0, 30], [0, 60]], np.int32)
    view = plan.unaugmented(boxes, resize, start)
    corner, extent = dali._hull([view], [(224, 224)])
    assert np.concatenate((corner, extent), axis=1).tolist() == [[5, 7, 375, 480], [5, 104, 375, 383]]


@pytest.mark.slow
def test_memory_does_not_grow(everything):
    executor = Executor([SIZE], 8, threads=2, device="cpu", repair=None)

    def resident() -> int:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    def batches(count):
        for _ in executor_run(executor, (everything.take(range(i % 30 * 8, i % 30 * 8 + 8)) for i in range(count))):
            pass

    def executor_run(executor, works):
        for work in works:
            executor.submit(work)
            yield executor.collect()

    batches(120)
    before = resident()
    batches(240)
    assert resident() - before < 240 * 8 * SIZE[0] * SIZE[1] * 3 / 2  # half of what the images alone take
    executor.close()
