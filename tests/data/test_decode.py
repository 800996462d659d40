"""One truth about every picture: training, evaluation and `pixels` see what Pillow sees, or refuse the same files."""

import io
from contextlib import closing

import numpy as np
import pytest
from PIL import Image

from fastdeit.data.execute import pillow
from fastdeit.data.execute.dali import Decoder, Work
from fastdeit.data.execute.decode import pixels
from fastdeit.data.execute.route import Encoded, Route, route, routed
from fastdeit.data.loader import EvalLoader, TrainLoader
from fastdeit.data.plan import plan
from fastdeit.data.sources.source import BadImage
from tests.data import parity, pictures
from tests.data.conftest import sides

SIZE = pictures.SIDE, pictures.SIDE


def array(data: bytes) -> np.ndarray:
    return np.frombuffer(data, np.uint8)


def by_pillow(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


@pytest.fixture(scope="module")
def matrix():
    """(name, bytes, pixels of Pillow or ours, None where nobody reads it) of every kind of file."""
    read = pictures.ordinary() | pictures.odd() | pictures.damaged()
    rows = [(name, data, by_pillow(data)) for name, data in read.items()]
    rows += [(name, data, wanted) for name, (data, wanted) in pictures.deep().items()]
    rows += [(name, data, pixels(array(data))) for name, data in pictures.forgiven().items()]
    return rows + [(name, data, None) for name, data in pictures.refused().items()]


@pytest.fixture(scope="module")
def source(matrix, memory):
    return memory([data for _, data, _ in matrix])


def wrong(matrix, seen: dict[int, np.ndarray]) -> dict[str, str]:
    """What is not as in the matrix, by name; seen: pixels by row, without those that were refused."""
    found = {}
    for row, (name, _, wanted) in enumerate(matrix):
        got = seen.get(row)
        if (got is None) != (wanted is None):
            found[name] = "refused" if got is None else "read"
        elif got is not None and not np.array_equal(got, wanted):
            found[name] = f"{got.shape}, {np.abs(got.astype(int) - wanted.astype(int)).max()} apart"
    return found


def test_pixels(matrix):
    seen = {}
    for row, (_, data, _) in enumerate(matrix):
        try:
            seen[row] = pixels(array(data))
        except BadImage:
            continue
    assert wrong(matrix, seen) == {}


def test_evaluation(matrix, source):
    """Kinds that DALI and Pillow decode, and some that nobody reads, in batches of 25."""
    loader = EvalLoader(source, SIZE, 1.0, batch_size=25, threads=1, max_bad_fraction=1, on_bad=lambda *_: None)
    seen = {}
    for samples in loader.batches():
        seen |= zip(samples.index.tolist(), samples.images[0].numpy(), strict=True)
    assert wrong(matrix, seen) == {}


def test_training(matrix, source):
    """All kinds in one batch, in another order, with substitutes. The box is the whole picture: nothing is resized."""
    augment, mixing = (
        plan.Augment(size=SIZE, crop_scale=(1, 1), crop_ratio=(1, 1), flip=0.0),
        plan.Mixing(group_size=1, mixup=0.0, cutmix=0.0),
    )
    loader = TrainLoader(
        source, [augment], mixing, seed=0, batch_size=len(matrix), threads=1, max_bad_fraction=1, on_bad=lambda *_: None
    )
    ((samples,),) = loader.batches(0, 1)
    seen = dict(zip(samples.index.tolist(), samples.images[0].numpy(), strict=True))
    assert len(seen) + len(loader.bad.reasons) == len(matrix)
    assert wrong(matrix, seen) == {}


def test_a_box_has_the_pixels_of_the_picture(matrix):
    """Whoever decodes it, and however much around it: a box is what is decoded in training."""
    y, x, height, width = box = 3, 9, 17, 11
    small = [(name, data, wanted) for name, data, wanted in matrix if wanted is not None and len(data) < 1 << 20]
    read = [(name, routed(array(data)), wanted) for name, data, wanted in small]
    files, boxes = [one for _, one, _ in read], np.tile(np.array(box, np.int32), (len(read), 1))
    work = Work(files, (plan.unaugmented(boxes, None, None),))
    decoder = Decoder([(height, width)], len(read), threads=1, device="cpu", repair=lambda work, failures: work)
    with closing(decoder.run([work])) as batches:
        _, (parts,) = next(batches)
        names = [name for part, (name, _, wanted) in zip(parts, read, strict=True)
                 if not np.array_equal(part, wanted[y : y + height, x : x + width])]  # fmt: skip
    assert names == []


def test_the_graph_of_the_gpu_takes_what_pillow_decodes(matrix):
    """On DALI's CPU backend: pictures that Pillow has decoded beside files."""
    read = [(routed(array(data)), wanted) for _, data, wanted in matrix[25:55] if wanted is not None]
    drawn = {row: pillow.pixels(one) for row, (one, _) in enumerate(read) if one.route.by_pillow}
    boxes = np.tile(np.array([0, 0, *SIZE], np.int32), (len(read), 1))
    like = Work([one for one, _ in read], (plan.unaugmented(boxes, None, None),))
    images = parity.in_graph(like, SIZE)(like, drawn)
    assert 0 < len(drawn) < len(read)
    assert [row for row, (_, wanted) in enumerate(read) if not np.array_equal(images[row], wanted)] == []


@pytest.mark.parametrize("kinds", [pictures.ordinary, pictures.damaged, pictures.forgiven], ids=lambda f: f.__name__)
def test_headers_that_dali_decodes_need_no_pillow(kinds, monkeypatch):
    """At no cost for them: nothing but their first bytes, and their last, is looked at."""
    files = kinds()
    monkeypatch.delattr(Image, "open")
    assert {name: route(array(data)).why for name, data in files.items()} == dict.fromkeys(files, "")


def test_routes_say_size_and_reason():
    for kinds in (pictures.ordinary, pictures.odd):
        for name, data in kinds().items():
            found = route(array(data))
            assert (found.width, found.height) == SIZE
            assert found.by_pillow == (kinds is pictures.odd), name
    odd = {name: (route(array(data)).format, route(array(data)).why) for name, data in pictures.odd().items()}
    assert odd["gif"] == ("GIF", "GIF")
    assert odd["tiff lzma"] == ("TIFF", "TIFF")
    assert odd["jpeg progressive, of its first scan"] == ("JPEG", "progressive JPEG without all of its scans")
    assert odd["jpeg CMYK"] == ("JPEG", "JPEG of 4 colours with 8 bits")
    assert odd["png of 16-bit colours"] == ("PNG", "PNG with colours of 16 bits")
    assert odd["webp lossless, odd, with EXIF"] == ("WEBP", "WebP with EXIF behind a chunk of odd size")


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("JPEG", "RGB", {}),
        ("JPEG", "L", {"progressive": True}),
        ("JPEG", "CMYK", {"exif": b"Exif\0\0" + bytes(60_000)}),
        ("PNG", "RGBA", {}),
        ("WEBP", "RGB", {}),
        ("WEBP", "RGB", {"lossless": True}),
        ("WEBP", "RGBA", {"exif": pictures.exif(6)}),
        ("GIF", "P", {}),
        ("TIFF", "RGB", {}),
    ],
)
def test_width_and_height(make_image, encode, kind, mode, options):
    assert sides(array(encode(make_image(0, 91, 47).convert(mode), kind, **options))) == (91, 47)


def test_huffman_tables_may_come_before_the_frame(jpeg):
    at = jpeg.index(b"\xff\xc4")
    table = jpeg[at : at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")]
    found = route(array(jpeg[:2] + table + b"\xff" + jpeg[2:]))
    assert (found.width, found.height, found.by_pillow) == (90, 70, False)


def test_what_is_no_picture_is_refused_with_a_reason(jpeg, make_image, encode):
    png, frame, scan = encode(make_image(0, 90, 70), "PNG"), jpeg.index(b"\xff\xc0"), jpeg.index(b"\xff\xda")
    cases = {
        "the file is empty": b"",
        "starts with b'<!DOCTYPE html><'": b"<!DOCTYPE html><html>404</html>",
        "EPS is refused, because Pillow would run it as a program": pictures.refused()["eps"],
        "IPTC is refused, because it may hold any file": pictures.refused()["jpeg in iptc"],
        "ICNS is refused, because it may hold a picture that is larger": pictures.refused()["jpeg 2000 in icns"],
        "BLP is refused, because it may hold a picture that is larger": pictures.refused()["blp"],
        "HEIF, which Pillow does not read": b"\0\0\0\x18ftypheic" + bytes(40),
        "JPEG XL, which Pillow does not read": b"\xff\x0a" + bytes(40),
        "a pointer of Git LFS instead of the file": b"version https://git-lfs.github.com/spec/v1\n",
        "^the header is cut off or damaged": png[:29] + bytes(4) + png[33:],
        "the header cannot be read: Truncated": jpeg[: frame + 5],
        "the header is cut off or damaged": b"\xff\xd8\x00\xc0" + jpeg[frame + 2 :],
        "image file is truncated": jpeg[: scan + (len(jpeg) - scan) // 2],
        "the header cannot|cannot load": jpeg[:scan],
        "image file is truncated ": png[: len(png) // 2],
        "the header": png[:40],
        "0 x 70 pixels": png[:16] + bytes(4) + png[20:],
    }
    for reason, data in cases.items():
        with pytest.raises(BadImage, match=reason.strip()):
            pixels(array(data))


def test_a_picture_of_other_sides_than_its_header_is_refused():
    gif = array(pictures.odd()["gif"])
    with pytest.raises(BadImage, match=f"the header says 16 x 16 pixels, but the picture has {SIZE[1]} x {SIZE[0]}"):
        pillow.pixels(Encoded(gif, Route("GIF", 16, 16, "GIF")))
