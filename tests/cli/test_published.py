"""`fastdeit published`: the table of published accuracy, and the same numbers from an ImageNet folder."""

import json
import shutil

import pytest
import timm
import torch
from safetensors.torch import save_file

from fastdeit.cli import main as cli
from fastdeit.models import timm_model
from fastdeit.run import published, reach
from tests.painted_runs import paint, refused

SYNSETS = "n01440764", "n01443537", "n01484850"


@pytest.fixture
def imagenet(tmp_path, monkeypatch):
    """Three classes of ImageNet. timm's test_vit is in the hub's cache, test_vit2 is not, and there is no network."""
    torch.manual_seed(1)
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "cached.safetensors")

    def look_up(repository, name, revision=None):
        return str(tmp_path / "cached.safetensors") if repository == "timm/test_vit.r160_in1k" else None

    def no_network(*args, **options):
        raise OSError("Name or service not known")

    monkeypatch.setattr(timm_model, "try_to_load_from_cache", look_up)
    monkeypatch.setattr(reach.socket, "create_connection", no_network)
    rows = [
        published.Published("test_vit2.r160_in1k", 160, 0.95, 60.0, 80.0),
        published.Published("test_vit.r160_in1k", 64, 0.8, 50.0, 75.0),
    ]
    monkeypatch.setattr(published, "_table", lambda: rows)
    painted = paint(tmp_path / "painted", ("val",), ("red", "green", "blue"))
    for name, synset in zip(("red", "green", "blue"), SYNSETS, strict=True):
        shutil.copytree(painted / "val" / name, tmp_path / "imagenet" / "val" / synset)
    return tmp_path / "imagenet"


def test_models_are_shown_what_the_published_number_is_of(imagenet, capsys):
    assert cli(["published", "test_vit", "--data", str(imagenet), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    as_published = "model.image_size=64", "data.eval_crop_ratio=0.8"
    assert cli(["eval", "timm:test_vit.r160_in1k", "--data", str(imagenet), "--json", *as_published]) == 0
    expected = json.loads(capsys.readouterr().out)
    metrics = expected["results"][0]["metrics"]
    assert facts["here"] == {"top1": metrics["top1_class"], "top5": metrics["top5_class"]}
    assert (facts["image_size"], facts["crop_ratio"], facts["images"]) == (64, 0.8, expected["images"])
    assert facts["published"] == {"top1": 50.0, "top5": 75.0}


def test_a_model_whose_weights_are_not_here_is_named_and_the_others_go_on(imagenet, capsys):
    assert cli(["published", "--data", str(imagenet)]) == 1
    said = capsys.readouterr()
    header, row = said.out.splitlines()
    assert header.split() == ["pixels", "crop", "published", "here", "difference"]
    model, pixels, crop, theirs, _, here, _, difference = row.split()
    assert (model, pixels, crop, theirs) == ("test_vit.r160_in1k", "64", "0.8", "50.00")
    assert float(difference) == pytest.approx(float(here) - 50, abs=0.011)
    assert "test_vit2.r160_in1k: timm's weights are not on this machine" in said.err
    assert "ImageNet's validation has 50,000: the published accuracy is of other images" in said.err
    assert "1 of 2 could not be evaluated: test_vit2.r160_in1k" in said.err


def test_the_table(capsys):
    assert cli(["published", "deit_base*", "levit_256"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["pixels", "crop", "top-1", "top-5"]
    assert [row.split()[0] for row in rows] == [
        "deit_base_patch16_224.fb_in1k", "deit_base_patch16_384.fb_in1k",
        "deit_base_distilled_patch16_224.fb_in1k", "deit_base_distilled_patch16_384.fb_in1k",
        "levit_256.fb_dist_in1k",
    ]  # fmt: skip
    assert rows[0].split()[1:] == ["224", "0.9", "81.98", "%", "95.74", "%"]
    assert "did you mean deit_tiny_patch16_224" in refused(capsys, "published", "deit_tny_patch16_224")


def test_what_cannot_be_measured_is_said_at_once(capsys):
    assert "--data nowhere: there is no such folder" in refused(capsys, "published", "--data", "nowhere")
    for word in ("--json", "--nproc=2", "engine.precision=bf16"):
        assert "needs a data set; add --data DIR" in refused(capsys, "published", word)


@pytest.mark.parametrize("override", ["model.image_size=64", "data.eval_crop_ratio=1", "optim.lr=1", "data=x"])
def test_what_is_as_published_cannot_be_set(override, imagenet, capsys):
    told = refused(capsys, "published", "--data", str(imagenet), override)
    assert f"{override}: a published number has its own model, size, crop" in told


def test_data_that_cannot_be_read_are_said_before_any_weights(imagenet, capsys):
    told = refused(capsys, "published", "--data", str(imagenet.parent / "painted" / "val"))
    assert "timm's weights" not in told
    assert "val" in told


def test_a_name_may_be_an_address(imagenet):
    assert published.published(["timm:test_vit"]) == published.published(["test_vit"])


def test_every_row_is_of_weights_that_timm_has_and_of_a_size_it_names():
    for row in published.published():
        config = timm.get_pretrained_cfg(row.model)
        named = (config.input_size, config.crop_pct), (config.test_input_size, config.test_crop_pct)
        assert ((3, row.image_size, row.image_size), row.crop_ratio) in named
