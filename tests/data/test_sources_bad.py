"""Every kind of source, every kind of odd file: decoded as PIL does, or left out with a reason that names the file."""

import io
import multiprocessing
import os
import re
import tarfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdeit.data.execute.decode import pixels
from fastdeit.data.execute.pillow import pixels as by_pillow
from fastdeit.data.execute.route import routed
from fastdeit.data.loader import EvalLoader, TrainLoader
from fastdeit.data.plan import plan
from fastdeit.data.sources.folder import FolderSource
from fastdeit.data.sources.packed import PackedSource, pack
from fastdeit.data.sources.source import BadImage, DataError
from fastdeit.data.sources.tar import TarSource
from fastdeit.data.sources.tfrecord import TFRecordSource
from fastdeit.verbs.check.samples import looked_at
from tests.data.conftest import sides
from tests.data.writers import arrow, tfrecord

KINDS = ["folder", "packed", "tar", "tfrecord", "parquet", "arrow"]
# That all kinds give the same bytes is shown below; these show it once more through the loader.
MORE = [pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[2:]]
ROWS = ("tfrecord", "parquet", "arrow")  # samples are called by their number
SIDE = 64


def with_size(png: bytes, width: int, height: int) -> bytes:
    return png[:16] + width.to_bytes(4, "big") + height.to_bytes(4, "big") + png[24:]


@pytest.fixture(scope="session")
def sound(make_image, encode):
    photo = make_image(0, SIDE, SIDE)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown rotated by 90 degrees; nobody's published numbers do
    deep = Image.fromarray(np.asarray(photo.convert("L")).astype(np.uint16) * 257)
    clear = photo.convert("P")
    clear.info["transparency"] = 3
    return {
        "photo.jpg": encode(photo),
        "cmyk.jpg": encode(photo.convert("CMYK")),
        "grey.jpg": encode(photo.convert("L")),
        "progressive.jpg": encode(photo, progressive=True),
        "exif_rotated.jpg": encode(photo, exif=exif),
        "tail.jpg": encode(photo) + bytes(300),
        "one_pixel.jpg": encode(photo.resize((1, 1))),
        "png_inside.jpg": encode(photo, "PNG"),
        "jpeg_inside.png": encode(photo),
        "palette.png": encode(clear, "PNG"),
        "alpha.png": encode(photo.convert("RGBA"), "PNG"),
        "grey_alpha.png": encode(photo.convert("LA"), "PNG"),
        "black_and_white.png": encode(photo.convert("1"), "PNG"),
        "sixteen_bit.png": encode(deep, "PNG"),
        "lossy.webp": encode(photo, "WEBP"),
        "lossless.webp": encode(photo, "WEBP", lossless=True),
        "scan.tiff": encode(photo, "TIFF"),
        "bitmap.bmp": encode(photo, "BMP"),
        "pixels.ppm": encode(photo, "PPM"),
    }


@pytest.fixture(scope="session")
def broken(make_image, encode):
    photo = make_image(0, SIDE, SIDE)
    jpeg, png, bmp = encode(photo), encode(photo, "PNG"), encode(photo, "BMP")
    frame = jpeg.index(b"\xff\xc0")
    return {
        "empty.jpg": (b"", "the file is empty"),
        "text.jpg": (b"this is not a picture\n", "no format that Pillow reads: it starts with b'this is not a pi'"),
        "html.jpg": (b"<!DOCTYPE html><html>404</html>", "starts with b'<!DOCTYPE html><'"),
        "cut_jpeg.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "cut_png.png": (png[: len(png) // 2], "truncated"),
        "cut_webp.webp": (encode(photo, "WEBP")[:200], "decod|header"),
        "cut_tiff.tiff": (encode(photo, "TIFF")[:5000], "header|truncated|no format"),
        "header_only.jpg": (jpeg[: frame + 5], "the header cannot be read: Truncated"),
        "huge_png.png": (with_size(png, 60_000, 60_000), "60000 x 60000 pixels; more than 178956970 are not decoded"),
        "huge_jpeg.jpg": (
            jpeg[: frame + 5] + b"\xff\xdc\xff\xdc" + jpeg[frame + 9 :],
            "65500 x 65500 pixels; more than",
        ),
        "huge_bitmap.bmp": (
            bmp[:18] + 2 * (100_000).to_bytes(4, "little") + bmp[26:],
            "the header cannot be read: .*10000000000",
        ),
        "no_width.png": (with_size(png, 0, SIDE), "0 x 64 pixels"),
        "avif_inside.jpg": (b"\0\0\0\x1cftypavif" + bytes(200), r"no format .* starts with b.*ftypavif"),
        "svg_inside.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no format that Pillow reads"),
        "postscript.jpg": (encode(photo, "EPS"), "EPS is refused, because Pillow would run it as a program"),
    }


def make(kind: str, root: Path, files: dict[str, bytes]):
    """A source with two classes of the same `files`; the path of each sample ends in its name in the folder."""
    names = [(label, name) for label in (0, 1) for name in sorted(files)]
    if kind in ("folder", "packed"):
        for label, name in names:
            path = root / "images" / str(label) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(files[name])
        folder = FolderSource(root / "images")
        if kind == "folder":
            return folder
        pack(folder, root / "a.pack")
        return PackedSource(root / "a.pack")
    if kind == "tar":
        with tarfile.open(root / "a.tar", "w") as archive:
            for label, name in names:
                for member, data in ((name, files[name]), (Path(name).stem + ".cls", b"%d" % label)):
                    info = tarfile.TarInfo(f"{label}/{member}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))
        return TarSource(root, ["a.tar"])
    if kind == "tfrecord":
        tfrecord(root / "a.tfrecord", [files[name] for _, name in names], [label for label, _ in names])
        return TFRecordSource(root, ["a.tfrecord"])
    pyarrow = pytest.importorskip("pyarrow")
    if kind == "arrow":
        from fastdeit.data.sources.arrow import ArrowSource

        arrow(root / "a.arrow", [files[name] for _, name in names], [label for label, _ in names], rows=7)
        return ArrowSource(root, ["a.arrow"])
    from pyarrow import parquet

    from fastdeit.data.sources.parquet import ParquetSource

    images = [{"bytes": files[name], "path": name} for _, name in names]
    table = pyarrow.table({"image": images, "label": [label for label, _ in names]})
    parquet.write_table(table, root / "a.parquet", row_group_size=7)
    return ParquetSource(root, ["a.parquet"])


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def files(sound, broken):
    return sound | {name: data for name, (data, _) in broken.items()}


def named(source, files):
    """(index, name) of every sample."""
    return [(i, sorted(files)[i % len(files)]) for i in range(len(source))]


def test_bytes_and_labels_are_those_of_the_files(tmp_path, kind, files):
    source = make(kind, tmp_path, files)
    assert len(source) == 2 * len(files)
    for i, name in named(source, files):
        assert source.read(i).tobytes() == files[name]
        assert source.label(i) == i // len(files)
        assert kind in ROWS or source.path(i).endswith(name)


def reason(data) -> str | None:
    """What the header is refused for, else what the decoder says."""
    try:
        pixels(data)
    except BadImage as error:
        return str(error)
    return None


def test_sound_files_pass_and_broken_ones_have_a_reason(tmp_path, kind, files, sound, broken):
    source = make(kind, tmp_path, files)
    for i, name in named(source, files):
        data = source.read(i)
        if name in sound:
            with Image.open(io.BytesIO(sound[name])) as image:
                assert sides(data) == image.size
            assert reason(data) is None
        else:
            assert re.search(broken[name][1], reason(data)), name


@pytest.mark.parametrize("kind", ["folder", *MORE])
def test_loader_decodes_as_pil_and_names_the_broken_ones(tmp_path, kind, files, sound):
    source = make(kind, tmp_path, files)
    bad = {}
    loader = EvalLoader(
        source, (SIDE, SIDE), 1.0, batch_size=8, threads=2, max_bad_fraction=0.9, on_bad=bad.__setitem__
    )
    batches = list(loader.batches())
    index = np.concatenate([samples.index for samples in batches])
    images = np.concatenate([samples.images[0] for samples in batches])
    assert [i for i, name in named(source, files) if name in sound] == index.tolist()
    assert set(bad) == {source.path(i) for i, name in named(source, files) if name not in sound}
    for i, image in zip(index, images, strict=True):
        name = sorted(files)[i % len(files)]
        with Image.open(io.BytesIO(sound[name])) as opened:
            # PIL clips 16 bits to 255 where a picture of 8 bits would have their upper half.
            expected = Image.fromarray(np.asarray(opened) // 257) if name == "sixteen_bit.png" else opened
            expected = np.asarray(expected.convert("RGB").resize((SIDE, SIDE)), dtype=np.int64)
        assert np.abs(image.astype(np.int64) - expected).max() <= 1, name


def test_no_format_is_rotated_but_the_one_that_pillow_rotates(memory, make_image, encode):
    photo, exif = make_image(0, 90, 70), Image.Exif()
    exif[0x0112] = 6
    images = [encode(photo, kind, exif=exif) for kind in ("JPEG", "PNG", "TIFF", "WEBP")]
    assert [sides(np.frombuffer(data, np.uint8)) for data in images] == [(90, 70), (90, 70), (70, 90), (90, 70)]
    (samples,) = EvalLoader(memory(images[:2] + images[3:]), (70, 90), 1.0, threads=1).batches()
    assert np.array_equal(samples.images[0][1], np.asarray(photo))


@pytest.mark.parametrize("kind", ["folder", *MORE])
def test_report_names_the_broken_ones(tmp_path, kind, files, sound):
    source = make(kind, tmp_path, files)
    found = looked_at(source)
    assert [index for index, _ in found.bad] == [i for i, name in named(source, files) if name not in sound]
    assert found.formats.total() == 2 * len(sound)


def test_files_that_vanish_in_mid_run_are_read_errors(tmp_path, kind, sound):
    source = make(kind, tmp_path, sound)
    source.read(0)
    last = len(source) - 1
    for path in (source.path(last), *tmp_path.glob("a.*")):
        if os.path.exists(path):
            os.unlink(path)
    with pytest.raises(OSError, match="No such file"):
        source.read(last)
    bad = {}
    loader = EvalLoader(source, (8, 8), 1.0, max_bad_fraction=1.0, threads=1, on_bad=bad.__setitem__)
    with suppress(DataError):  # all are lost, where all are in one file
        list(loader.batches())
    assert "cannot be read" in bad[source.path(last)]


def bad_ones(source):
    return [(source.path(index), reason) for index, reason in looked_at(source).bad]


def test_entries_that_cannot_be_read(tmp_path, sound):
    source = make("folder", tmp_path, sound)
    top = tmp_path / "images" / "0"
    (top / "dangling.jpg").symlink_to("nowhere")
    (top / "loop.jpg").symlink_to("loop.jpg")
    (top / "folder.jpg").mkdir()
    os.mkfifo(top / "pipe.jpg")
    before, source = len(source), FolderSource(tmp_path / "images")
    assert len(source) == before + 3
    reasons = {Path(path).name: reason for path, reason in bad_ones(source)}
    assert reasons == {
        "dangling.jpg": "the file cannot be read: No such file or directory",
        "loop.jpg": "the file cannot be read: Too many levels of symbolic links",
        "pipe.jpg": "the file cannot be read: Illegal seek",
    }


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(tmp_path, sound):
    source = make("folder", tmp_path, sound)
    os.chmod(source.path(3), 0)
    assert bad_ones(source) == [(source.path(3), "the file cannot be read: Permission denied")]


@pytest.mark.parametrize("kind", KINDS)
def test_threads_read_what_one_does(tmp_path, kind, sound):
    source = make(kind, tmp_path, sound)
    order = np.random.default_rng(0).permutation(np.repeat(np.arange(len(source)), 20)).tolist()
    expected = [source.read(i).tobytes() for i in range(len(source))]
    with ThreadPoolExecutor(8) as pool:
        for i, data in zip(order, pool.map(source.read, order), strict=True):
            assert data.tobytes() == expected[i]


@pytest.mark.parametrize("kind", KINDS)
def test_a_forked_process_reads_what_its_parent_does(tmp_path, kind, sound):
    source = make(kind, tmp_path, sound)
    expected = [source.read(i).tobytes() for i in range(len(source))]
    with multiprocessing.get_context("fork").Pool(2, _keep, (source,)) as pool:
        assert pool.map(_read, range(len(source)), chunksize=1) == expected
    assert [source.read(i).tobytes() for i in range(len(source))] == expected


def _keep(source):
    global _kept
    _kept = source


def _read(index):
    return _kept.read(index).tobytes()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP", "PPM"])
@pytest.mark.filterwarnings("ignore")
def test_no_damage_ends_in_another_exception(make_image, encode, kind):
    """Bytes changed, removed or repeated at random: the header is refused, or the picture, or it has sides."""
    noise = np.random.default_rng(0)
    whole = np.frombuffer(encode(make_image(0, 24, 24), kind), np.uint8)
    for _ in range(150):
        data = whole.copy()
        at = noise.integers(0, min(len(data), 400), noise.integers(1, 9))
        data[at] = noise.integers(0, 256, len(at))
        start, stop = np.sort(noise.integers(0, len(data) + 1, 2))
        data = [data, data[:stop], np.concatenate((data[:stop], data[start:]))][noise.integers(3)]
        with suppress(BadImage):
            file = routed(data)
            assert file.route.width > 0 < file.route.height
            assert by_pillow(file).ndim == 3


def train(source, start):
    views, mixing = [plan.Augment(size=(24, 24))], plan.Mixing(group_size=4, mixup=0.0, cutmix=0.0)
    options = {"batch_size": 8, "threads": 1, "max_bad_fraction": 0.9, "on_bad": lambda path, reason: None}
    # From step 5 on 256 images.
    steps = TrainLoader(source, views, mixing, seed=3, repeats=2, **options).batches(start, 37)
    return [samples for micros in steps for samples in micros]


@pytest.mark.parametrize("kind", ["packed", *MORE])
def test_training_does_not_depend_on_the_kind_and_resumes_at_any_step(tmp_path, kind, files):
    whole = train(make("folder", tmp_path, files), 0)
    resumed = train(make(kind, tmp_path, files), 5)
    for expected, got in zip(whole[5:], resumed, strict=True):
        assert np.array_equal(expected.index, got.index)
        assert np.array_equal(expected.targets.y1, got.targets.y1)
        assert np.array_equal(expected.images[0], got.images[0])
