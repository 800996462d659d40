"""`fastdeit data`: sound and damaged data sets, packing, and pictures of what the model sees."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from fastdeit import cli
from fastdeit.data.plan import order
from fastdeit.data.sources.datasets import open_pair
from fastdeit.engine.dist import World
from fastdeit.launch import launch
from fastdeit.recipe import resolve as recipes
from fastdeit.run import build
from fastdeit.verbs import data as data_verbs
from fastdeit.verbs import pictures

SMALL = ["model.image_size=32", "train.batch_size=16", "data.group_size=4", "data.repeats=2", "train.epochs=6"]
SYNTHETIC = ["deit_tiny", *SMALL, "data.source=synthetic", "data.synthetic_samples=50", "data.synthetic_classes=5"]


@pytest.fixture
def folder(tmp_path):
    """12 training and 4 held-out images in 2 classes."""
    noise = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for name in ("cat", "dog"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = noise.integers(0, 256, (20, 24, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / split / name / f"{i}.png")
    return tmp_path / "images"


@pytest.fixture
def run(capsys):
    """Exit code, stdout and stderr of a command."""

    def run(*argv):
        code = cli.main([str(word) for word in argv])
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return run


@pytest.fixture
def fails(run):
    def fails(*argv):
        done = run(*argv)
        started = f"starting: {argv[1]}\n" if argv[0] == "train" else ""
        assert (done.code, done.out) == (2, started)
        assert done.err.startswith("fastdeit: ")
        assert done.err.count("\n") == 1
        return done.err

    return fails


# check


def test_a_sound_data_set(run, folder):
    done = run("data", "check", folder, "--processes", 1)
    assert done.code == 0
    assert "train: 12 samples: 12 PNG RGB" in done.out
    assert "val: 4 samples: 4 PNG RGB" in done.out
    assert done.err == "checking train: 12 of 12\nchecking val: 4 of 4\n"


def test_a_damaged_sample_is_named_and_exit_code_1(run, folder):
    (folder / "train" / "dog" / "3.png").write_bytes(b"junk")
    done = run("data", "check", folder, "--processes", 1)
    assert done.code == 1
    assert f"{folder}/train/dog/3.png: no format that Pillow reads" in done.out
    assert run("data", "check", folder, "--processes", 1, "--split", "val").code == 0


def test_one_packed_file_is_checked_on_its_own(run, folder, tmp_path):
    run("data", "pack", folder, tmp_path / "packed")
    done = run("data", "check", tmp_path / "packed" / "val.pack", "--processes", 1)
    assert (done.code, done.out.splitlines()[0]) == (0, "val.pack: 4 samples: 4 PNG RGB")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["check", "nowhere"], "nowhere: no such file or directory"),
        (["check", "README"], "README: a file of no known kind (.pack, .tar, .tfrecord, "),
        (["check", "."], "images holds data of kind folder: give that folder"),
        (
            ["check", "images/val/cat"],
            "none of the data sets that are recognised by their layout; say how to read it with",
        ),
        (["check", "images", "--source", "zip"], "--source zip: 'zip' must be one of folder, packed"),
        (["check", "images", "--source", "packed"], "train.pack: the packed data set cannot be read"),
        (
            ["check", "images", "--split", "test", "--source", "folder"],
            "images: no subfolder 'test'; the expected layout is ROOT/",
        ),
        (["check", "train.pack", "--split", "train"], "--split does not go with train.pack"),
        (["check"], "the following arguments are required: PATH"),
        (["pack", "images"], "the following arguments are required: OUT"),
        (["pack", "images", "README"], "README: the folder for the packed files cannot be made"),
        (["pack", "images", "out", "--split", "train", "--split", "train*"], "would become the files train, train"),
    ],
)
def test_what_cannot_be_read(fails, folder, monkeypatch, argv, message):
    monkeypatch.chdir(folder.parent)
    (folder.parent / "README").touch()
    (folder.parent / "train.pack").touch()
    (folder.parent / "images" / "train*").mkdir()
    shutil.copytree(folder / "train" / "cat", folder / "train*" / "cat")
    shutil.copytree(folder / "train" / "dog", folder / "train*" / "dog")
    if argv == ["check", "."]:
        (folder.parent / "train.pack").unlink()
    assert message in fails("data", *argv)


def test_two_kinds_in_one_place_have_to_be_told_apart(fails, run, folder):
    run("data", "pack", folder, folder)
    assert "holds folder and packed; say how to read it with --source" in fails("data", "check", folder)
    assert run("data", "check", folder, "--source", "packed", "--processes", 1).code == 0


def test_a_missing_split_is_advised_upon(fails, folder):
    shutil.rmtree(folder / "val")
    assert "if there is only one split, or others, name them: --split NAME" in fails("data", "check", folder)


# pack


def test_a_pack_is_the_data_set(run, folder, tmp_path):
    done = run("data", "pack", folder, tmp_path / "packed")
    assert done.code == 0
    assert done.out.count(" images, ") == 2
    for before, after in zip(open_pair("folder", folder), open_pair("packed", tmp_path / "packed"), strict=True):
        assert (after.fingerprint, after.classes) == (before.fingerprint, before.classes)
        assert all(np.array_equal(before.read(i), after.read(i)) for i in range(len(before)))


def test_packed_files_are_replaced_only_by_force(run, folder, tmp_path):
    run("data", "pack", folder, tmp_path / "packed")
    before = (tmp_path / "packed" / "val.pack").stat().st_ino
    refused = run("data", "pack", folder, tmp_path / "packed", "--split", "val")
    assert (refused.code, refused.err) == (
        2,
        f"fastdeit: {tmp_path}/packed/val.pack: already there; --force replaces it\n",
    )
    assert (tmp_path / "packed" / "val.pack").stat().st_ino == before
    assert run("data", "pack", folder, tmp_path / "packed", "--split", "val", "--force").code == 0
    assert (tmp_path / "packed" / "val.pack").stat().st_ino != before


def test_splits_of_different_classes_are_not_packed(fails, folder, tmp_path):
    shutil.move(folder / "val" / "dog", folder / "val" / "wolf")
    assert "the classes of train and val differ" in fails("data", "pack", folder, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


# --data


@pytest.fixture
def packed(run, folder, tmp_path):
    run("data", "pack", folder, tmp_path / "packed")
    return str(tmp_path / "packed")


def test_data_detects_packed_files_and_says_so(packed, capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    root = f"data.root={packed}"
    assert data_verbs.implied("deit_tiny", [root], packed) == ["data.source=packed"]
    assert capsys.readouterr().out == f"{packed} holds data of kind packed: reading it with data.source=packed\n"
    for rank, told in (("1", False), ("0", True)):
        monkeypatch.setenv("RANK", rank)
        assert data_verbs.implied("deit_tiny", [root], packed, told) == ["data.source=packed"]
        assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("rank", "by_us", "said"), [(None, False, 1), ("0", False, 1), ("0", True, 0)])
def test_what_data_implies_is_said_once_also_by_a_launcher(packed, capsys, monkeypatch, rank, by_us, said):
    """The launcher of `--nproc` says it, before it starts the worker that is rank 0; torchrun says nothing."""
    work = []
    monkeypatch.setattr(launch, "run", lambda args, *_: work.append(args.overrides) or 0)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    ranks = dict.fromkeys(("RANK", "LOCAL_RANK"), rank) | dict.fromkeys(
        ("WORLD_SIZE", "LOCAL_WORLD_SIZE"), rank and "1"
    )
    ranks |= {"MASTER_ADDR": rank and "127.0.0.1", "MASTER_PORT": rank and "29500"}
    for name, value in {**ranks, launch.LAUNCHER_VARIABLE: by_us and "1"}.items():
        monkeypatch.delenv(name, raising=False)
        if value:
            monkeypatch.setenv(name, value)
    assert cli.main(["train", "deit_tiny", "--data", packed]) == 0
    assert "data.source=packed" in work[0]
    assert capsys.readouterr().out.count("holds data of kind packed") == said


def test_data_leaves_a_choice_of_the_user_alone(packed, folder, tmp_path):
    assert data_verbs.implied("deit_tiny", ["data.source=folder"], packed) == []
    assert data_verbs.implied("deit_tiny", [], str(folder)) == []
    assert data_verbs.implied("deit_tiny", [], None) == []
    mine = tmp_path / "mine.yaml"
    mine.write_text("base: deit_tiny\ndata: {source: cifar10}\n")
    assert data_verbs.implied(str(mine), [], packed) == []


def test_a_file_is_only_one_split(fails, packed):
    message = fails("train", "deit_tiny", "--data", f"{packed}/train.pack")
    assert f"give the folder that holds both splits: --data {packed}\n" in message


# show and preview


def test_show_finds_every_sample_where_the_loader_has_it():
    recipe = recipes.load(SYNTHETIC[0], SYNTHETIC[1:])
    source, _ = build.sources(recipe)
    loader = build.train_loader(recipe, source, World(torch.device("cpu")), {}, print)
    steps = loader.steps_per_epoch
    for step, (samples,) in enumerate(loader.batches(steps, 2 * steps), steps):
        stream = order.epoch(0, 1, 50, 16, 2)
        copies = order.groups(stream, step - steps, 16, 4).copy.reshape(-1)
        for row, (sample, copy) in enumerate(zip(samples.index.tolist(), copies.tolist(), strict=True)):
            assert pictures.locate(recipe, 50, sample, 1, copy) == pictures.Place(step, *divmod(row, 4))


def test_a_group_alone_is_that_of_the_whole_batch():
    recipe = recipes.load(SYNTHETIC[0], [*SYNTHETIC[1:], "train.accumulate=2"])
    source, _ = build.sources(recipe)
    whole = build.train_loader(recipe, source, World(torch.device("cpu")), {}, print)
    ((first, second),) = whole.batches(5, 6)
    alone = pictures._group(recipe, source, 5, 2)
    assert torch.equal(alone.index, second.index[:4])
    assert torch.equal(alone.pixels(), second.pixels()[:4])
    assert not torch.equal(alone.index, first.index[:4])


def where_of(epoch, copy=0):
    """A sample that has that copy in the epoch, and one that is not in it."""
    stream = order.epoch(0, epoch, 50, 16, 2)
    seen = stream.sample[stream.copy == copy].tolist()
    return seen[0], next(i for i in range(50) if i not in stream.sample)


def coloured(picture):
    """Share of the pixels that are not grey: of the images, not of text on white."""
    return (np.ptp(np.asarray(picture.convert("RGB")).astype(int), axis=-1) > 20).mean()


def test_show_draws_a_picture_and_says_the_plan(run, tmp_path):
    sample, _ = where_of(2, copy=1)
    out = tmp_path / "a.png"
    argv = ["data", "show", *SYNTHETIC, "data.erase=1", "--sample", sample, "--epoch", 2, "--copy", 1, "--out", out]
    done = run(*argv)
    assert done.code == 0
    assert done.out.startswith(f"sample {sample} of 50, epoch 2, copy 1: step ")
    words = dict(line.split(maxsplit=1) for line in done.out.splitlines()[1:-1])
    assert list(words) == ["file", "crop", "flip", "ops", "erase", "mix", "target"]
    assert words["file"] == f"synthetic:{sample}"
    assert words["crop"].endswith("of 32 x 32, resized to 32 x 32")
    assert words["erase"].endswith("filled with noise")
    with Image.open(out) as picture:
        assert picture.format == "PNG"
        assert coloured(picture) > 0.2
    before = out.read_bytes()
    run(*argv)
    assert out.read_bytes() == before


def test_the_words_of_a_mixed_sample_are_its_own():
    recipe = recipes.load(SYNTHETIC[0], [*SYNTHETIC[1:], "data.mixup=0", "data.mix_mode=element"])
    source, _ = build.sources(recipe)
    batch = pictures._group(recipe, source, 0, 1)
    said = [pictures._mixed(batch, slot) for slot in range(4)]
    for slot, (y0, x0, y1, x1) in enumerate(batch.box[0].tolist()):
        partner = batch.index[batch.partner[slot]]
        words = f"cutmix: {x1 - x0} x {y1 - y0} pixels from ({x0}, {y0}) are those of sample {partner}"
        assert said[slot] == (words if y1 > y0 and x1 > x0 else "not mixed")
    assert len(set(said)) > 2


def test_show_says_that_a_substitute_stands_in(run, folder, tmp_path):
    (folder / "train" / "cat" / "0.png").write_bytes(b"junk")
    overrides = ["model.image_size=32", "train.batch_size=12", "data.group_size=4", "data.repeats=1"]
    argv = ["deit_tiny", *overrides, "data.max_bad_fraction=0.5", "--data", folder, "--sample", 0]
    done = run("data", "show", *argv, "--out", tmp_path / "a.png")
    assert done.code == 0, done.err
    assert "  sample  0 cannot be used; training takes sample " in done.out
    assert "cat/0.png: no format that Pillow reads" in done.err


def test_preview_draws_training_and_evaluation_images(run, tmp_path):
    out = tmp_path / "b.png"
    done = run("data", "preview", *SYNTHETIC, "--rows", 2, "--columns", 3, "--out", out)
    assert done.code == 0
    words = "evaluation crop ratio 0.875: resized to cover 36 x 36, of which the central 32 x 32 pixels are seen"
    assert done.out == f"{words}\npicture in {out}\n"
    with Image.open(out) as picture:
        assert picture.format == "PNG"
        assert coloured(picture) > 0.2


@pytest.mark.parametrize(
    ("grid", "drawn"), [((), (2, 8)), (("--columns", 6), (3, 6)), (("--rows", 9, "--columns", 20), (1, 16))]
)
def test_a_preview_of_a_batch_smaller_than_the_grid_draws_all_of_it(run, tmp_path, monkeypatch, grid, drawn):
    shapes = []

    def block(part, title, images, columns):
        shapes.append((-(-len(images) // columns), columns, len(images)))

    monkeypatch.setattr(pictures, "_block", block)
    out = tmp_path / "b.png"
    words = [word.replace("samples=50", "samples=400") for word in SYNTHETIC]
    done = run("data", "preview", *words, *grid, "--out", out)
    assert done.code == 0
    asked = {(): 32, ("--columns", 6): 24}.get(grid, 180)
    assert done.out.startswith(
        f"a batch of recipe deit_tiny has 16 images: all are drawn, fewer than the {asked} asked"
    )
    assert shapes == [(*drawn, 16), (1, drawn[1], drawn[1])]
    assert out.exists()


def test_a_preview_of_the_digits_needs_no_data(run, tmp_path):
    out = tmp_path / "b.png"
    assert run("data", "preview", "digits", "--rows", 1, "--columns", 2, "--out", out).code == 0
    assert out.exists()


def test_evaluation_crops_are_spread_over_the_classes():
    recipe = recipes.load(SYNTHETIC[0], SYNTHETIC[1:])
    _, held_out = build.sources(recipe)
    assert len(held_out) == 5
    labels = [label for _, label in pictures._evaluation(recipe, held_out, 2)]
    assert labels == ["'class_0000'", "'class_0002'"]


def test_where_a_sample_is_not(fails, tmp_path):
    present, absent = where_of(0)
    shown = next(e for e in range(1, 6) if absent in order.epoch(0, e, 50, 16, 2).sample)
    show = ["data", "show", *SYNTHETIC, "--out", tmp_path / "a.png", "--sample"]
    assert f"sample {absent} does not occur in epoch 0, it does in epoch {shown}: with 2" in fails(*show, absent)
    assert f"sample {present} has no copy 2 in epoch 0, only 0, 1" in fails(*show, present, "--copy", 2)
    assert "there is no sample 50: the training split has samples 0 to 49" in fails(*show, 50)
    assert "there is no sample -1" in fails(*show, -1)
    assert "there is no epoch 6: recipe deit_tiny has epochs 0 to 5" in fails(*show, 0, "--epoch", 6)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["show", "digits", "--out", "a.png"], "the following arguments are required: --sample"),
        (["show", "digits", "--sample", "1"], "the following arguments are required: --out"),
        (["show", "--sample", "1", "--out", "a.png"], "name a recipe or a run: fastdeit data show RECIPE"),
        (["show", "digit", "--sample", "1", "--out", "a.png"], "there is no recipe 'digit'; did you mean digits"),
        (["show", "digits", "--sample", "1", "--out", "a.jpg"], "give a name that ends in .png"),
        (["show", "digits", "--sample", "1", "--out", "no/a.png"], "there is no folder no"),
        (["show", "digits", "--sample", "one", "--out", "a.png"], "invalid int value: 'one'"),
        (["preview", "deit_tiny", "--out", "a.png"], "recipe deit_tiny needs images: add --data ROOT"),
        (["preview", "deit_tiny", "--out", "a.png", "--data", "no"], "data.source folder: no: no such directory"),
        (["preview", "digits", "--out", "a.png", "--data", "x"], "does not go with data.source digits"),
    ],
)
def test_pictures_that_cannot_be_drawn(fails, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    assert message in fails("data", *argv)
    assert list(tmp_path.glob("*.png")) == []
