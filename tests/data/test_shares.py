"""A share of the training split that is held out: it follows from the names of the samples, whoever asks."""

import pytest

from fastdeit import cli
from fastdeit.data.sources import parts
from fastdeit.data.sources.datasets import open_source
from fastdeit.data.sources.source import DataError
from fastdeit.recipe import resolve as recipes
from fastdeit.recipe.resolve import RecipeError
from tests.data.layouts import as_train, files, folders, labels


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("FASTDEIT_CACHE", str(tmp_path_factory.mktemp("cache")))


def test_a_share_follows_from_the_names_alone(tmp_path):
    """It does not change when files are added, and that of the pack is the same."""
    root, pack = tmp_path / "images", tmp_path / "packed"
    files(root, *(f"{name}/{i}.jpg" for name in ("cat", "dog") for i in range(100)))
    train, val = as_train(root, "data.val=20%")
    before = [{source.name(i) for i in range(len(source))} for source in (train, val)]
    assert len(before[0] | before[1]) == 200 == len(train) + len(val)
    assert 25 <= len(val) <= 55
    assert labels(val) == [val.name(i)[:3] for i in range(len(val))]
    assert val.read(3).tobytes() == val.name(3).encode()
    assert val.path(3) == f"{root}/{val.name(3)}"
    files(root, *(f"{name}/more{i}.jpg" for name in ("cat", "dog") for i in range(50)))
    train, val = as_train(root, "data.val=20%")
    after = [{source.name(i) for i in range(len(source))} for source in (train, val)]
    assert (before[0] - after[0], before[1] - after[1], len(after[0] | after[1])) == (set(), set(), 300)
    assert after[1] > {as_train(root, "data.val=5%")[1].name(0)}
    assert cli.main(["data", "pack", str(root), str(pack)]) == 0
    from_pack = as_train(pack, "data.val=20%")
    assert [source.fingerprint for source in from_pack] == [train.fingerprint, val.fingerprint]
    assert train.fingerprint != val.fingerprint != as_train(root, "data.val=21%")[1].fingerprint


@pytest.mark.parametrize(
    ("below", "splits"), [("", ["20%"]), ("train/", ["20%"]), ("train/", ["train", "20%"]), ("fit/", ["20%", "fit"])]
)
def test_a_share_is_checked_and_packed_as_it_is_trained_on(tmp_path, capsys, below, splits):
    root, pack = tmp_path / "images", tmp_path / "packed"
    files(root, *(f"{below}{name}/{i}.jpg" for name in ("cat", "dog") for i in range(30)))
    words = [str(root), *(word for split in splits for word in ("--split", split))]
    assert cli.main(["data", "check", *words, "--processes", "1"]) == 1  # no file is a picture
    expected = as_train(root, "data.val=20%", *(["data.train=fit"] if below == "fit/" else []))
    assert f"\n20%: {len(expected[1])} samples" in "\n" + capsys.readouterr().out
    assert cli.main(["data", "pack", *words, str(pack)]) == 0
    packed = [open_source("packed", pack, split) for split in ((below or "train").strip("/"), "val")]
    for one, other in zip(expected, packed, strict=True):
        assert one.fingerprint == other.fingerprint
        assert [one.read(i).tobytes() for i in range(len(one))] == [other.read(i).tobytes() for i in range(len(other))]


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (["10%", "20%"], "--split 10% --split 20%: give a share, as 10%, alone or with its split"),
        (["train", "val", "10%"], "--split train --split val --split 10%: give a share, as 10%, alone"),
        (["100%"], "--split must be a share between 0% and 100%, as in 10%, got '100%'"),
        (["0.01%"], "data.val=0.01%: of 4 images no held-out image is left; give another share\n"),
    ],
)
def test_shares_that_cannot_be_checked(tmp_path, capsys, splits, message):
    folders(tmp_path, ".")
    words = [word for split in splits for word in ("--split", split)]
    for verb in (["check"], ["pack", str(tmp_path / "out")]):
        assert cli.main(["data", verb[0], str(tmp_path), *verb[1:], *words]) == 2
        assert message in capsys.readouterr().err


def test_the_place_of_a_name_never_changes():
    assert parts.place_of("cat/1.jpg") == 0.19533620396206075
    assert parts.place_of("caf\udce9") == 0.9346532780527071


def test_a_folder_of_splits_is_no_folder_of_classes(tmp_path):
    folders(tmp_path, "training", "validation")
    with pytest.raises(DataError, match="no subfolder 'train'"):
        as_train(tmp_path, "data.val=10%")


@pytest.mark.parametrize("share", ["0%", "100%", "-5%", "x%", "5%%"])
def test_what_is_no_share(share):
    with pytest.raises(RecipeError, match=r"data\.val: must be a share between 0% and 100%, as in 10%, got"):
        recipes.load("deit_tiny", [f"data.val={share}"])


def test_a_share_that_leaves_nothing(tmp_path):
    folders(tmp_path, ".")
    with pytest.raises(DataError, match=r"data\.val=0\.01%: of 4 images no held-out image is left"):
        as_train(tmp_path, "data.val=0.01%")
