"""What a source knows of a sample besides its class: that it comes with every batch, and that boxes lie in each view
where their pixels do."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fastdeit.cli import main as cli
from fastdeit.data.execute.render import Renderer
from fastdeit.data.loader import EvalLoader, TrainLoader
from fastdeit.data.pixel_ops import KINDS
from fastdeit.data.plan import plan
from fastdeit.data.plan.geometry import geometry
from fastdeit.data.plan.operations import Ops
from fastdeit.data.sources.packed import pack
from fastdeit.data.sources.parts import divided, numbered_by
from fastdeit.data.sources.source import DataError
from fastdeit.errors import UsageError
from fastdeit.recipe import resolve as recipes
from fastdeit.run import build
from fastdeit.run.subset import Renumbered
from tests.toys import toy_batch

SIZE, COUNT = (64, 80), 16
BOXES = np.array([(20 + 3 * i, 30 + 2 * i, 60 + 2 * i, 90 - i) for i in range(COUNT)], np.float32)
CROP = plan.Augment(size=SIZE, crop_scale=(0.5, 1.0), flip=0.5)
VIEWS = {
    "crop": CROP,
    "wide": replace(CROP, size=(72, 96), crop_scale=(0.6, 1.0), crop_ratio=(1.3, 1.6)),
    "simple": replace(CROP, crop="simple"),
}
OPERATIONS = {"rotate": 12.0, "shear_x": 0.2, "shear_y": -0.2, "translate_x": 9.0, "translate_y": -7.0, "invert": 0.0}


def painted():
    """Black pictures of 100 x 120 pixels with a green box each."""
    pictures = np.zeros((COUNT, 100, 120, 3), np.uint8)
    for picture, (x0, y0, x1, y1) in zip(pictures, BOXES.astype(int), strict=True):
        picture[y0:y1, x0:x1, 1] = 255
    return pictures


def extent(image):
    """The box (x0, y0, x1, y1) around what is green, or what is left of it after `invert`."""
    green = np.abs(image[..., 1].astype(int) - image[..., 0]) > 128
    (y,), (x,) = green.any(1).nonzero(), green.any(0).nonzero()
    return [x[0], y[0], x[-1] + 1, y[-1] + 1]


def in_batch(planned, size, images):
    matrices = torch.from_numpy(geometry(planned, size))[None]
    return replace(toy_batch(images, torch.arange(COUNT)), geometry=matrices)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("operations", [(), *[(name,) for name in OPERATIONS], ("shear_x", "rotate", "translate_y")])
def test_a_box_lies_where_its_pixels_lie(view, operations):
    augment, sample = VIEWS[view], np.arange(COUNT)
    planned = plan.samples(augment, 5, 0, sample, 0 * sample, [120] * COUNT, [100] * COUNT)
    kind = np.tile(np.array([KINDS.index(name) for name in operations], np.uint8), (COUNT, 1))
    value = np.tile(np.array([OPERATIONS[name] for name in operations], np.float32), (COUNT, 1))
    planned = replace(planned, ops=Ops(kind, value))
    assert 0 < planned.flip.sum() < COUNT
    pictures = painted()
    images = Renderer(augment.size, 1).batch(list(pictures), planned.box[:, :2] * 0, planned)
    boxes, share = in_batch(planned, augment.size, images).boxes(torch.from_numpy(BOXES)[:, None])
    seen = torch.tensor([extent(image) for image in images.numpy()])
    # The box around the four corners; a pixel at its edge has less than half of the colour.
    cut = bool({"shear_x", "shear_y", "rotate"} & set(operations))
    difference = (boxes[:, 0] - seen)[share[:, 0] == 1] if cut else boxes[:, 0] - seen
    assert len(difference) > 1
    assert difference.abs().max() <= (3.0 if cut else 1.5)


def test_the_share_of_a_box_that_is_in_the_view():
    batch = replace(toy_batch(torch.zeros(1, 10, 20, 3, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)))
    batch = replace(batch, geometry=torch.tensor([[[[-1.0, 0, 20], [0, 2, 0]]]]))
    boxes = torch.tensor([[[0.0, 0, 4, 4], [15, 1, 25, 3], [30, 0, 40, 4], [0, 0, 0, 0], [0, 2, 20, 10]]])
    moved, share = batch.boxes(boxes)
    assert moved[0, :2].tolist() == [[16, 0, 20, 8], [0, 2, 5, 6]]
    assert share.tolist() == [[1.0, 0.5, 0.0, 0.0, pytest.approx(6 / 16)]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_round_boxes(dtype):
    batch = toy_batch(torch.zeros(1, 224, 224, 3, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64))
    batch = replace(batch, geometry=torch.tensor([[[[0.31, 0.0, -101.3], [0.0, 0.29, -57.7]]]]))
    boxes = torch.tensor([[[503, 401, 901, 777], [1003, 203, 1029, 419]]])
    moved, share = batch.boxes(boxes)
    with torch.autocast("cpu", dtype):
        again = batch.boxes(boxes)
    assert moved.dtype == again[0].dtype == torch.float32
    assert torch.equal(again[0], moved)
    assert torch.equal(again[1], share)


def test_a_batch_without_geometry_says_why():
    with pytest.raises(
        ValueError, match=r"either data.source has no annotations .*; set data.mixup=0 and data.cutmix=0"
    ):
        toy_batch(torch.zeros(1, 2, 2, 3, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64)).boxes(
            torch.zeros(1, 1, 4)
        )


# ---- from a source to batches ----------------------------------------------------------------------------------------


class Annotated:
    """Wraps a source of bytes: of each sample a box and a number of objects."""

    skipped = ()

    def __init__(self, whole, change=None):
        self._whole, self.classes, self.fingerprint = whole, whole.classes, whole.fingerprint
        self.read, self.label, self.path = whole.read, whole.label, whole.path
        self._change = change or (lambda index, known: known)

    def __len__(self):
        return COUNT

    def name(self, index):
        return f"{index}.png"

    def annotations(self, index):
        return self._change(index, {"box": BOXES[index][None], "objects": index})


@pytest.fixture
def source(memory, encode):
    return Annotated(memory([encode(Image.fromarray(picture), "PNG") for picture in painted()]))


def loader(source, mixup=0, **options):
    views = [CROP, replace(VIEWS["wide"], stream="wide", crop_stream="wide")]
    options = {"seed": 3, "batch_size": 8, "threads": 1} | options
    return TrainLoader(source, views, plan.Mixing(mixup=mixup, cutmix=0, group_size=4), **options)


def assert_moved(batch):
    assert torch.equal(batch.extras["objects"], batch.index)
    for view in range(len(batch.images)):
        boxes, _ = batch.boxes(batch.extras["box"], view)
        seen = torch.tensor([extent(image) for image in batch.images[view].numpy()])
        assert (boxes[:, 0] - seen).abs().max() <= 1.5


def test_every_view_and_every_held_out_image_has_its_box_where_it_lies(source):
    for (batch,) in loader(source).batches(0, 3):
        assert len(batch.images) == 2
        assert_moved(batch)
    (batch,) = EvalLoader(source, (48, 40), 0.9, threads=1).batches()
    assert_moved(batch)


def test_a_substitute_brings_what_is_known_of_it(source):
    source._whole.images[3] = np.frombuffer(b"no picture", np.uint8)
    for micro_batches in loader(source, accumulate=2, max_bad_fraction=0.5, on_bad=lambda *_: None).batches(0, 4):
        for batch in micro_batches:
            assert_moved(batch)


def test_boxes_of_mixed_pictures_are_refused(source):
    ((batch,),) = loader(source, mixup=0.8).batches(0, 1)
    assert torch.equal(batch.extras["objects"], batch.index)
    with pytest.raises(ValueError, match=r"its pictures are mixed; set data.mixup=0"):
        batch.boxes(batch.extras["box"])


def test_a_part_of_the_samples_keeps_their_annotations(source):
    for part in divided(source, "40%"):
        assert [part.annotations(i)["objects"] for i in range(len(part))] == [
            int(part.name(i).removesuffix(".png")) for i in range(len(part))
        ]


def test_other_class_numbers_than_those_of_the_annotations_are_refused(source, tmp_path):
    (tmp_path / "names.txt").write_text("b\na\n")
    with pytest.raises(DataError, match=r"names.txt: the data set has annotations, .*; leave data.classes out"):
        numbered_by(source, tmp_path / "names.txt")
    with pytest.raises(UsageError, match="the data set has annotations"):
        Renumbered(source, [*source.classes, "more"])


def test_data_without_them_are_refused_to_a_method_that_asks_for_boxes(tmp_path):
    """Before training, and before an evaluation too."""
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            shutil.copy(tmp_path / "one.png", tmp_path / split / name)
    method = '{use: "tests.plugins.detection:Detection", window: 2, whole: [3]}'
    plain = [f"method={method}", "data.mixup=0", "data.cutmix=0"]
    for overrides in (["data.source=folder", f"data.root={tmp_path}"], ["data.source=synthetic"]):
        recipe = recipes.load("digits", [*plain, *overrides])
        for opened in (build.sources, build.held_out):
            with pytest.raises(UsageError, match=r"asks where things lie .* data.source \w+ has no annotations"):
                opened(recipe)


@pytest.mark.parametrize("words", [[], ["--normalise"]], ids=["as they are", "normalised"])
def test_a_pack_would_lose_them_and_is_refused(tmp_path, capsys, words):
    """Before anything is written, whichever split it is of."""
    (tmp_path / "classes.json").write_text('["a"]')
    for split in ("train", "val"):
        (tmp_path / f"{split}.json").write_text(f'{{"{split}.png": [[0, 1, 2, 3, 4]]}}')
    own = ["--source", "tests.plugins.detection:Annotations", *words]
    assert cli(["data", "pack", str(tmp_path), str(tmp_path / "out"), *own]) == 2
    assert "train.png: the data set has annotations (boxes, labels), and a packed file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_not_even_the_function_packs_them(source, tmp_path):
    with pytest.raises(DataError, match=r"the data set has annotations \(box, objects\)"):
        pack(divided(source, "40%")[0], tmp_path / "train.pack")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda index, known: known if index % 2 else known | {"box": np.zeros((2, 4), np.float32)}, r"float32 \["),
        (lambda index, known: known if index % 2 else {"box": known["box"]}, "missing"),
        (lambda index, known: known | ({"box": np.zeros((2, 4), np.float32)} if index else {}), r"float32 \["),
        (lambda index, known: None if index else known, "missing"),
        (lambda index, known: known | ({} if index == 0 else {"more": 1}), "there, and missing"),
    ],
)
def test_annotations_of_different_shapes_are_refused_with_the_way_out(source, change, found):
    with pytest.raises(DataError, match=rf"annotation '\w+' is .*{found}.*padded to the longest"):
        next(loader(Annotated(source._whole, change)).batches(0, 1))


def test_annotations_that_the_first_sample_lacks_are_refused(source):
    with pytest.raises(DataError, match="memory:1: annotations are there, and missing for memory:0"):
        list(
            EvalLoader(
                Annotated(source._whole, lambda i, known: known if i else None), (8, 8), 1.0, batch_size=1
            ).batches()
        )


@pytest.mark.parametrize("value", ["a word", [None], 1j])
def test_annotations_are_numbers(source, value):
    with pytest.raises(DataError, match=r"annotation 'what' has dtype \S+, not one of numbers"):
        next(EvalLoader(Annotated(source._whole, lambda index, known: {"what": value}), (8, 8), 1.0).batches())


def test_one_name_for_a_store_and_an_annotation_is_refused(source):
    class Zeros:
        def read(self, epoch, index, copy, place):
            return np.zeros(len(index))

    with pytest.raises(DataError, match="'box' is the name of a store of the method and of an annotation"):
        next(loader(source, stores={"box": Zeros()}).batches(0, 1))
