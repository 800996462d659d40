"""Files that are no images, or only half: nothing crashes, others keep their pixels, every bad one is named once."""

import io
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

from fastdeit.data import pixel_ops
from fastdeit.data.execute import dali
from fastdeit.data.execute.dali import Executor, Work
from fastdeit.data.execute.route import Encoded, Route, routed
from fastdeit.data.loader import EvalLoader, TrainLoader
from fastdeit.data.plan import order, plan, policy
from fastdeit.data.sources.folder import FolderSource
from fastdeit.data.sources.source import DataError

AUGMENT, MIXING = plan.Augment(size=(40, 40)), plan.Mixing(group_size=4, mixup=0.0, cutmix=0.0)


@pytest.fixture(scope="module")
def kinds(make_image, encode):
    photo, png = make_image(0, 90, 70), encode(make_image(1, 90, 70), "PNG")
    gif = encode(photo.convert("P"), "GIF")
    jpeg, data = encode(photo), png.index(b"IDAT")
    bad = {
        "zero_bytes.jpg": b"",
        "text.jpg": b"this is not a picture\n",
        "html.jpg": b"<!DOCTYPE html><html><body>404</body></html>",
        "gif_inside.jpg": gif[: len(gif) // 2],
        "truncated.jpg": jpeg[: len(jpeg) // 2],
        "header_only.jpg": jpeg[: jpeg.index(b"\xff\xda")] + b"\xff\xd9",  # these three pass the header check
        "no_tables.jpg": jpeg[:20] + jpeg[20:].replace(b"\xff\xdb", b"\xff\xfe"),
        "bad_stream.png": png[: data + 40] + bytes(60) + png[data + 100 :],
        "truncated.png": png[: len(png) // 2],
    }
    odd = {
        "png_inside.jpg": png,
        "palette.png": encode(photo.convert("P"), "PNG"),
        "one_pixel.jpg": encode(photo.resize((1, 1))),
        "cmyk.jpg": encode(photo.convert("CMYK")),
        "grey.jpg": encode(photo.convert("L")),
        "rgba.png": encode(photo.convert("RGBA"), "PNG"),
        "tail.jpg": jpeg + bytes(200),
    }
    return bad, odd


@pytest.fixture
def folder(tmp_path, kinds, varied):
    """10 bad files (class a), 7 odd but sound ones, 39 ordinary ones; and the same with the bad ones healed."""
    bad, odd = kinds
    for top in ("sick", "healed"):
        for name in "abc":
            (tmp_path / top / name).mkdir(parents=True)
        for name, data in odd.items():
            (tmp_path / top / "b" / name).write_bytes(data)
        for i in range(39):
            (tmp_path / top / "c" / f"{i:02d}.jpg").write_bytes(varied[i])
        (tmp_path / top / "a" / "directory.jpg").mkdir()
    for name, data in bad.items():
        (tmp_path / "sick" / "a" / name).write_bytes(data)
        (tmp_path / "healed" / "a" / name).write_bytes(varied[50])
    (tmp_path / "sick" / "a" / "dangling.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "healed" / "a" / "dangling.jpg").write_bytes(varied[50])
    return FolderSource(tmp_path / "sick"), FolderSource(tmp_path / "healed")


def train(source, reports=None, **options):
    options = {"batch_size": 8, "max_bad_fraction": 0.5, "threads": 1} | options
    loader = TrainLoader(source, [AUGMENT], MIXING, seed=2, **options, on_bad=lambda *report: reports.append(report))
    return loader, [samples for micros in loader.batches(0, 7) for samples in micros]


@pytest.mark.parametrize("options", [{"threads": 2}, {"accumulate": 2}])
def test_training_takes_substitutes_and_nothing_else_changes(folder, kinds, options):
    sick, healed = folder
    reports = []
    loader, got = train(sick, reports, **options)
    _, expected = train(healed, [], **options)
    index = np.concatenate([samples.index.numpy() for samples in expected])
    swapped = index < 10  # class a comes first
    assert swapped.sum() == 10  # 56 samples, 7 batches of 8: nothing is dropped

    images, wanted = (np.concatenate([samples.images[0].numpy() for samples in run]) for run in (got, expected))
    assert np.array_equal(images[~swapped], wanted[~swapped])
    used = np.concatenate([samples.index.numpy() for samples in got])
    labels = np.concatenate([samples.targets.y1.numpy() for samples in got])
    assert np.array_equal(used[~swapped], index[~swapped])
    attempts = 0
    for row in np.flatnonzero(swapped):
        stand_in, attempt = int(index[row]), 0
        while stand_in < 10:
            stand_in = order.substitute(2, 0, int(index[row]), attempt, 56)
            attempt += 1
        assert (used[row], labels[row]) == (stand_in, sick.label(stand_in))
        attempts += attempt

    assert loader.bad.count == attempts
    assert sorted(path.rsplit("/")[-1] for path, _ in reports) == sorted([*kinds[0], "dangling.jpg"])
    assert dict(reports) == loader.bad.reasons


def test_reasons_say_what_is_wrong(folder):
    reports = []
    train(folder[0], reports)
    reasons = {path.rsplit("/")[-1]: reason for path, reason in reports}
    assert reasons["zero_bytes.jpg"] == "the file is empty"
    assert reasons["html.jpg"].endswith("it starts with b'<!DOCTYPE html><'")
    assert "truncated" in reasons["truncated.jpg"]
    assert reasons["dangling.jpg"] == "the file cannot be read: No such file or directory"


def test_stream_with_bad_files_does_not_depend_on_the_division(folder):
    _, whole = train(folder[0], [], batch_size=16)
    parts = [train(folder[0], [], batch_size=16, world=2, rank=rank)[1] for rank in range(2)]
    for step, samples in enumerate(whole):
        halves = [part[step] for part in parts]
        assert np.array_equal(samples.index, np.concatenate([half.index for half in halves]))
        assert np.array_equal(samples.images[0], np.concatenate([half.images[0] for half in halves]))


def test_evaluation_leaves_bad_files_out(folder):
    sick, healed = folder
    reports = []
    options = {"batch_size": 8, "threads": 1, "max_bad_fraction": 0.5}
    loader = EvalLoader(sick, (40, 40), 0.875, **options, on_bad=lambda *report: reports.append(report))
    got = list(loader.batches())
    wanted = list(EvalLoader(healed, (40, 40), 0.875, **options).batches())
    assert np.concatenate([samples.index for samples in got]).tolist() == list(range(10, 56))
    images, expected = (np.concatenate([samples.images[0] for samples in run]) for run in (got, wanted))
    assert np.array_equal(images, expected[10:])
    assert loader.bad.count == len(reports) == len(loader.bad.reasons) == 10


def test_too_many_bad_files_are_an_error_that_lists_them(folder):
    sick, _ = folder
    with pytest.raises(DataError) as info:
        train(sick, [], max_bad_fraction=0.1)
    first, *listed = str(info.value).splitlines()
    # Two threads may each meet one too many; the first error to arrive counts those of both.
    assert re.match(
        r"[67] of 56 images .*, more than max_bad_fraction 0.1 allows; repair or delete the files that are", first
    )
    assert len(listed) == int(first[0])
    assert all("/sick/a/" in line for line in listed)
    loader = EvalLoader(sick, (40, 40), 0.875, max_bad_fraction=0.1, threads=1, on_bad=lambda path, reason: None)
    with pytest.raises(DataError, match=r"[67] of 56 images"):
        list(loader.batches())


def test_too_many_failures_of_an_operation_call_no_sound_file_damaged(memory, varied, monkeypatch):
    """On the CPU; the message is all that is left of the run."""

    def dark(image, value):
        raise ValueError("dark")

    failing = [replace(op, cpu=dark, compiled=None) if op.name == "brightness" else op for op in pixel_ops.PIXEL_OPS]
    monkeypatch.setattr(pixel_ops, "PIXEL_OPS", failing)
    augment = replace(AUGMENT, policy=policy.parse("three_augment", AUGMENT.size, color_jitter=(0.3, 0, 0)))
    loader = TrainLoader(
        memory(varied[:24]),
        [augment],
        MIXING,
        seed=0,
        batch_size=8,
        threads=1,
        max_bad_fraction=0.1,
        on_bad=lambda *_: None,
    )
    with pytest.raises(DataError) as info:
        next(loader.batches(0, 1))
    first, *listed = str(info.value).splitlines()
    assert re.match(r"4 of 24 images cannot be used, .*: ?$", first)
    assert "decode" not in str(info.value)
    reason = r"the file is sound, but the operation brightness\([\d.]+\) failed \(ValueError: dark\)"
    assert all(re.fullmatch(rf"  memory:\d+: {reason}", line) for line in listed)
    assert len(listed) == 4


def test_a_data_set_of_bad_files_only_ends(memory):
    loader = TrainLoader(
        memory([b""] * 30), [AUGMENT], MIXING, seed=0, batch_size=8, max_bad_fraction=1.0, on_bad=lambda *_: None
    )
    with pytest.raises(DataError, match=r"(?s)30 of 30 images .*\n  and 10 more$") as info:
        next(loader.batches(0, 1))
    assert str(info.value).count("memory:") == 20


def test_a_bad_file_is_a_warning_by_default(memory, varied):
    loader = EvalLoader(memory([b"", *varied[:20]]), (40, 40), 1.0, max_bad_fraction=0.1, threads=1)
    with pytest.warns(UserWarning, match="memory:0 is not used: the file is empty"):
        assert sum(len(samples) for samples in loader.batches()) == 20


def test_pillow_s_warnings_of_files_are_not_heard_but_others_are(memory, varied, encode, make_image):
    tiff = encode(make_image(0, 90, 70), "TIFF", tiffinfo={ExifTags.Base.Artist: "somebody" * 9})
    cut = tiff[: tiff.index(b"somebody") + 9]
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        with Image.open(io.BytesIO(cut)):
            pass
        assert {found.category for found in heard} == {UserWarning}
        heard.clear()
        loader = EvalLoader(memory([cut, *varied[:20]]), (40, 40), 1.0, max_bad_fraction=0.1, threads=1)
        assert sum(len(samples) for samples in loader.batches()) == 20
        assert [found.filename.rsplit("/")[-1] for found in heard] == ["bad.py"]
        Image._decompression_bomb_check((10_000, 10_000))
        assert len(heard) == 1
        warnings.warn_explicit("soon gone", DeprecationWarning, "Image.py", 1, module="PIL.Image")
        assert len(heard) == 2


def test_decoder_is_guarded_even_without_the_header_check(kinds, varied):
    """Without the guard this ends the process: at 48 images and 4 threads every time it was tried."""
    junk = [Encoded(np.frombuffer(data, np.uint8), Route("JPEG", 32, 32)) for data in kinds[0].values()]
    sound = [routed(np.frombuffer(data, np.uint8)) for data in varied[:48]]
    repaired = []

    def repair(work, failures):
        repaired.append(sorted(failures))
        return Work([sound[row] if row in failures else data for row, data in enumerate(work.encoded)], work.views)

    executor = Executor([(32, 32)], 48, threads=4, device="cpu", repair=repair)
    views = (plan.unaugmented(np.tile([0, 0, 30, 30], (48, 1)), None, None),)
    executor.submit(Work([junk[row // 3 % 9] if row % 3 == 0 else sound[row] for row in range(48)], views))
    executor.submit(Work(sound, views))
    (repaired_images,), (images,) = (executor.collect()[1] for _ in range(2))
    assert repaired == [list(range(0, 48, 3))]
    assert torch.equal(repaired_images, images)


def test_where_even_a_sound_image_fails_no_sample_is_blamed(varied, monkeypatch):
    executor = Executor([(32, 32)], 1, threads=1, device="cpu", repair=None)
    box = np.array([[0, 0, 30, 30]], np.int32)
    file = Encoded(np.frombuffer(b"broken", np.uint8), Route("JPEG", 30, 30))
    broken = Work([file], (plan.unaugmented(box, None, None),))
    monkeypatch.setattr(dali, "_sound", lambda like, sizes: broken)
    executor.submit(broken)
    with pytest.raises(RuntimeError, match="peek_image_shape"):
        executor.collect()


def test_an_operation_of_dali_that_fails_is_named_and_not_the_decoder():
    from nvidia.dali import fn, pipeline_def  # without which tests of other things are collected, too

    @pipeline_def
    def cropped():
        return fn.crop(fn.external_source(name="pixels"), crop=(90, 90))

    pipe = cropped(batch_size=1, num_threads=1, device_id=None)
    pipe.build()
    pipe.feed_input("pixels", [np.zeros((8, 8, 3), np.uint8)])
    with pytest.raises(RuntimeError) as info:
        pipe.run()
    reason = dali._fault(info.value)
    assert re.fullmatch(
        r"the file is sound, but DALI's operation crop failed \(Slice can't be placed out of bounds [^\n]*\)", reason
    )


def test_a_box_beside_the_picture_is_an_error_of_the_sample(varied):
    reasons = []

    def repair(work, failures):
        reasons.append(failures)
        return work.take([])

    executor = Executor([(32, 32)], 1, threads=1, device="cpu", repair=repair)
    outside = plan.unaugmented(np.array([[0, 0, 900, 900]], np.int32), None, None)
    executor.submit(Work([routed(np.frombuffer(varied[0], np.uint8))], (outside,)))
    assert executor.collect()[1] is None
    (reason,) = reasons[0].values()
    assert re.fullmatch(r"the box .* lies outside the picture, which has .* pixels", reason)
