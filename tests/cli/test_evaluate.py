"""`fastdeit eval`, `predict` and `show attention`, on runs, checkpoints, bare files and models of timm."""

import argparse
import csv
import json
import shutil

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fastdeit.cli import main as cli
from fastdeit.engine.dist import World
from fastdeit.run import build, chosen, directory
from fastdeit.run import settings as settings_of
from fastdeit.run.settings import doubt, settings
from fastdeit.run.weights import Known, Weights, open_weights
from fastdeit.verbs import attention, evaluate, pictures
from fastdeit.verbs.evaluate import judge
from tests.painted_runs import CLASSES, paint, refused


@pytest.fixture
def held_out(data, tmp_path):
    """A data set that has its held-out split alone."""
    shutil.copytree(data / "val", tmp_path / "held_out" / "val")
    return tmp_path / "held_out"


def found(capsys, *argv):
    assert cli([str(word) for word in argv]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_run_is_judged_as_it_was_in_training_and_in_detail(run, capsys):
    facts = found(capsys, "eval", run, "--json")
    assert facts["image_size"] == [16, 32]
    assert (facts["crop_ratio"], facts["images"], facts["unreadable"]) == (1.0, 18, 0)
    weights, average = facts["results"]
    assert (weights["averaged"], average["averaged"]) == (False, True)
    summary = json.loads((run / "summary.json").read_text())
    for head, name in (("softmax", "fused"), ("class", "class"), ("distillation", "distillation")):
        assert weights["metrics"][f"top1_{head}"] == summary[f"top1_{name}"]
        assert average["metrics"][f"top1_{head}"] == summary[f"top1_{name}_ema"]
    assert {f"{measure}_logit" for measure in ("top1", "top5", "loss", "ece", "nonfinite")} <= weights["metrics"].keys()
    assert found(capsys, "eval", f"{run}@ema", "--json")["results"] == [average]
    assert cli(["eval", str(run)]) == 0
    said = capsys.readouterr().out
    assert f"{run}, step 2: 18 images (0 unreadable) at 16x32 pixels, crop ratio 1" in said
    assert f"{summary['top1_fused']:.2f} %" in next(line for line in said.splitlines() if "mean of softmaxes" in line)
    assert "both heads (mean of logits), averaged weights" in said


def test_a_run_whose_steps_were_recorded_on_a_gpu_is_judged_on_a_cpu(run, monkeypatch):
    def recorded(*where, checked=directory.checked_recipe):
        recipe = checked(*where)
        return recipe.model_copy(update={"engine": recipe.engine.model_copy(update=on_gpu)})

    on_gpu = {"device": "auto", "capture": "graph"}
    for module in (directory, settings_of):
        monkeypatch.setattr(module, "checked_recipe", recorded)
    chosen.check(str(run), ["engine.device=cpu"])
    assert settings(open_weights(str(run)), None, ["engine.device=cpu"]).engine.device == "cpu"


def test_a_bare_file_gives_the_numbers_of_its_run(run, bare, held_out, capsys):
    """The model, the size and the crop have to be told; the run's training split need not be there."""
    told = "model.image_size=[16,32]", "model.weights_grid=[2,4]", "data.eval_crop_ratio=1"
    batch = "train.batch_size=12", "data.group_size=4"  # as of the run: sums of batches of other sizes round otherwise
    name = "deit_digits_distilled_patch8_32"
    facts = found(capsys, "eval", bare, "--model", name, "--data", held_out, "--json", *told, *batch)
    assert facts["results"] == found(capsys, "eval", run, "--json")["results"][:1]
    assert "nothing tells which model" in refused(capsys, "eval", bare, "--data", held_out)
    assert "model.timm: String should have at least 1" in refused(capsys, "eval", bare, "--model", "timm:")
    assert "says itself which model" in refused(capsys, "eval", run, "--model", name)


def test_other_data_are_matched_by_the_names_of_their_classes(run, tmp_path, capsys):
    fewer, others = paint(tmp_path / "fewer", ("val",), ("blue", "red")), tmp_path / "others"
    for number, name in enumerate(CLASSES):
        shutil.copytree(fewer.parent / "fewer" / "val" / "red", others / "val" / f"shade {number} of {name}")
    shutil.copytree(fewer / "val" / "red", tmp_path / "unknown" / "val" / "mauve")
    shutil.copytree(fewer / "val" / "red", tmp_path / "unknown" / "val" / "red")
    assert "do not know mauve, of the 2 classes of the data" in refused(
        capsys, "eval", run, "--data", tmp_path / "unknown"
    )
    assert "shade 0 of blue" in refused(capsys, "eval", run, "--data", others)
    assert "no subfolder 'val'" in refused(capsys, "eval", run, "--data", fewer / "val")


def test_data_of_some_classes_are_judged_among_all(run, data, tmp_path, capsys):
    """Every image has the answer that it has in the whole data set, which may be a class that the data have not."""
    for name in "blue", "red":
        shutil.copytree(data / "val" / name, tmp_path / "some" / "val" / name)
    rows = {}
    for place in data, tmp_path / "some":
        table = tmp_path / f"{place.name}.csv"
        assert cli(["eval", str(run), "--data", str(place), "--confusion", str(table)]) == 0
        rows[place.name] = list(csv.reader(table.read_text().splitlines()))
    assert "the data have 2 of the 3 classes; an answer may be any of these" in capsys.readouterr().err
    whole, some = rows[data.name], rows["some"]
    assert (some[0], some[1], some[3]) == (whole[0], whole[1], whole[3])
    assert some[2] == ["green", "0", "0", "0"]


def test_tables_of_classes(run, tmp_path, capsys):
    facts = found(
        *(capsys, "eval", run, "--json", "--classes", tmp_path / "c.csv", "--confusion", tmp_path / "confusion.png"),
        *("--calibration", tmp_path / "calibration.png"),
    )
    table = list(csv.DictReader((tmp_path / "c.csv").open()))
    assert [row["class"] for row in table] == list(CLASSES)
    mean = sum(float(row["top1"]) for row in table) / 3
    assert mean == pytest.approx(facts["results"][0]["metrics"]["top1_logit"], abs=0.01)
    confusion = list(csv.reader((tmp_path / "confusion.csv").open()))
    assert confusion[0][1:] == [row[0] for row in confusion[1:]] == list(CLASSES)
    assert [sum(map(int, row[1:])) for row in confusion[1:]] == [6, 6, 6]
    bins = list(csv.DictReader((tmp_path / "calibration.csv").open()))
    assert [row["confidence up to"] for row in bins[::7]] == ["0.0667", "0.5333", "1.0000"]
    assert sum(int(row["images"]) for row in bins) == 18
    right, sure = (sum(int(row["images"]) * float(row[name]) / 18 for row in bins) for name in ("top1", "confidence"))
    assert right == pytest.approx(facts["results"][0]["metrics"]["top1_logit"], abs=0.01)
    apart = sum(int(row["images"]) * abs(float(row["top1"]) - float(row["confidence"])) / 18 for row in bins)
    assert apart == pytest.approx(facts["results"][0]["metrics"]["ece_logit"], abs=0.01)
    assert 100 / 3 < sure < 100
    for name in "confusion.png", "calibration.png":
        with Image.open(tmp_path / name) as picture:
            assert picture.size[0] > 100


def test_a_file_without_a_folder_is_refused_before_the_images_are_read(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "judge", lambda *args, **options: pytest.fail("the images were read"))
    for flag in ("--classes", "--confusion", "--calibration"):
        told = refused(capsys, "eval", run, flag, tmp_path / "no" / "c.csv", code=1)
        assert f"cannot be written: there is no folder {tmp_path / 'no'}" in told


def test_an_address_may_have_an_equals_sign(run, data, tmp_path, capsys):
    """`@step=1` is no override, and neither is a file whose name has such a sign."""
    assert found(capsys, "eval", f"{run}@step=1,ema", "--json")["weights"] == f"{run}, step 1, averaged weights"
    shutil.copy(data / "val" / "red" / "0.png", tmp_path / "hue=red.png")
    first, second = (
        found(capsys, "predict", f"{run}@step={step}", tmp_path / "hue=red.png", "--json") for step in (1, 2)
    )
    assert first[0]["answers"] != second[0]["answers"]
    assert "there is no checkpoint of step 7" in refused(capsys, "predict", f"{run}@step=7", data / "val" / "red")


def test_scores_that_are_not_finite(bare, tmp_path, data, capsys):
    """Neither a loss of 0 nor a word that JSON does not know stands for what cannot be told."""
    tensors = {name: torch.full_like(tensor, torch.nan) for name, tensor in load_file(bare).items()}
    save_file(tensors, tmp_path / "nan.safetensors")
    told = "--model", "deit_digits_distilled_patch8_32", "model.image_size=[16,32]", "model.weights_grid=[2,4]"
    argv = tmp_path / "nan.safetensors", *told
    metrics = found(capsys, "eval", *argv, "--data", data, "--json")["results"][0]["metrics"]
    assert (metrics["top1_softmax"], metrics["nonfinite_softmax"]) == (0, 18)
    assert (metrics["loss_softmax"], metrics["ece_softmax"]) == (None, None)
    error = refused(capsys, "predict", *argv, data / "val" / "red" / "0.png", code=1)
    assert "0.png: the network's scores are not finite" in error


def test_a_method_that_does_not_fit_the_overrides_is_refused(run, monkeypatch, capsys):
    monkeypatch.setattr(Weights, "method", {"queue": torch.zeros(3)})
    assert 'its method does not fit what the overrides ask for: Unexpected key(s) in state_dict: "queue"' in refused(
        capsys, "eval", run
    )


def test_heads_that_a_method_did_not_train_are_told():
    of_mae = Known(method="tests.plugins.mae:MaskedAutoencoder")
    assert "MaskedAutoencoder, which is judged in its own way" in doubt(Weights("w", {}, of_mae))
    for method in (None, "supervised", "distill", "gone.away:Method"):
        assert doubt(Weights("w", {}, Known(method=method))) is None


def test_a_model_of_timm_with_weights_of_this_machine(data, tmp_path, capsys):
    import timm

    model = timm.create_model("test_vit", num_classes=3, img_size=32)
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "w.pth")
    argv = "eval", tmp_path / "w.pth", "--model", "timm:test_vit", "--data", data
    facts = found(capsys, *argv, "--json")
    assert facts["model"] == "timm:test_vit"
    assert facts["image_size"] == [32, 32]
    assert facts["crop_ratio"] == timm.get_pretrained_cfg("test_vit").crop_pct
    assert "top1_class" in facts["results"][0]["metrics"]
    assert "no subfolder 'test'" in refused(capsys, *argv, "data.val=test")


def judged_by_rank(rank, size, run):
    weights = open_weights(str(run))
    recipe = settings(weights, None, [])
    found = judge(weights, recipe, build.held_out(recipe), World(torch.device("cpu"), rank, size), confusion=True)
    return [(each.result.metrics, each.details.confusion.tolist()) for each in found]


@pytest.mark.slow
def test_two_processes_find_what_one_does(run, ranks):
    alone = [(pytest.approx(metrics), confusion) for metrics, confusion in judged_by_rank(0, 1, run)]
    assert ranks(2, judged_by_rank, run) == [alone] * 2


def test_predictions(run, data, tmp_path, capsys):
    picture, broken = data / "val" / "red" / "0.png", tmp_path / "broken.png"
    broken.write_text("no picture")
    (answer,) = found(capsys, "predict", run, picture, "--json")
    assert answer["picture"] == str(picture)
    assert sorted(each["class"] for each in answer["answers"]) == list(CLASSES)
    shares = [each["probability"] for each in answer["answers"]]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(1)
    assert cli(["predict", str(run), str(data / "val" / "red"), "--top", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert f"{data / 'val' / 'red' / '0.png'}: {answer['answers'][0]['class']} {100 * shares[0]:.1f} %" in lines
    assert cli(["eval", str(run), "--images", str(picture)]) == 0
    assert lines[0].split(":")[0] in capsys.readouterr().out
    error = refused(capsys, "predict", run, broken, picture, code=1)
    assert f"{broken}: " in error
    assert "there is no answer for 1 of 2 pictures" in error
    error = refused(capsys, "predict", run, broken, code=1)
    assert "there is no answer for 1 of 1 pictures" in error
    assert "max_bad_fraction" not in error
    assert len(found(capsys, "predict", run, picture, picture, "--json")) == 2
    assert "there is no such picture" in refused(capsys, "predict", run, tmp_path / "none.png")
    assert "no picture in this folder" in refused(capsys, "predict", run, data / "val")


def test_a_picture_of_attention(run, data, tmp_path, capsys):
    picture, out = data / "val" / "red" / "0.png", tmp_path / "attention.png"
    assert cli(["show", "attention", str(run), str(picture), "--out", str(out)]) == 0
    with Image.open(out) as image:
        assert image.size[0] > 500
    argv = "show", "attention", run, picture, "--out"
    assert "blocks 0 to 3" in refused(capsys, *argv, out, "--block", 9)
    assert "cannot be written" in refused(capsys, *argv, tmp_path / "no" / "a.png", code=1)
    (tmp_path / "broken.png").write_text("no picture")
    for other, why in {tmp_path / "broken.png": "the picture cannot be read", data / "val": "name one picture"}.items():
        assert why in refused(capsys, "show", "attention", run, other, "--out", out)


def test_a_picture_that_cannot_be_read_is_told_once(run, held_out, capsys):
    (held_out / "val" / "red" / "0.png").write_text("no picture")
    assert cli(["eval", str(run), "--data", str(held_out), "data.max_bad_fraction=0.5"]) == 0
    assert capsys.readouterr().err.count("0.png") == 1


def test_class_attention_of_cait(tmp_path, data, capsys):
    """What is drawn is the attention with which the block made its class token."""
    torch.manual_seed(0)
    options = {"img_size": 32, "num_classes": 3, "depth": 1, "embed_dim": 24, "num_heads": 2}
    cait = timm.create_model("cait_xxs24_224", **options).eval()
    for parameter in cait.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        queries, keys, tokens = attention._of_class(cait, x, 1)
        looks, _ = attention.maps(queries, keys, tokens, (32, 32))
        chosen, normed = cait.blocks_token_only[1], []
        chosen.attn.register_forward_pre_hook(lambda module, given: normed.append(given[0][0]))
        chosen.attn.proj_drop.register_forward_hook(lambda module, given, out: normed.append(out[0, 0]))
        cait(x)
        weights = (queries @ keys.mT / queries.shape[-1] ** 0.5).softmax(-1)[:, 0]
        values = chosen.attn.v(normed[0]).unflatten(-1, (2, -1)).transpose(0, 1)
        torch.testing.assert_close(chosen.attn.proj((weights[:, None] @ values).flatten()), normed[1])
    assert torch.equal(looks.flatten(1), weights[:, 1:])
    assert len(attention.class_blocks(cait)) == 2
    levit = timm.create_model("levit_128s", num_classes=3)
    save_file(levit.state_dict(), tmp_path / "levit.safetensors")
    argv = (
        "show",
        "attention",
        tmp_path / "levit.safetensors",
        data / "val" / "red" / "0.png",
        "--out",
        tmp_path / "a.png",
    )
    assert "timm:levit_128s cannot be shown; what can are" in refused(capsys, *argv, "--model", "timm:levit_128s")


def test_maps_of_attention_are_those_of_the_tokens():
    """Two heads on 2 x 3 patches after two prefix tokens; the second patch of the second row gets most attention."""
    generator = torch.Generator().manual_seed(0)
    queries, keys = torch.randn(2, 2, 8, 4, generator=generator)
    tokens = torch.randn(8, 5, generator=generator)
    keys[:, 6] = 5 * queries[:, 0]
    looks, alike = attention.maps(queries, keys, tokens, (32, 48))
    expected = torch.stack([(q @ k.T / 2).softmax(-1)[0, 2:].reshape(2, 3) for q, k in zip(queries, keys, strict=True)])
    torch.testing.assert_close(looks, expected)
    assert list(alike) == ["like the class token", "like patch 1, 1"]
    torch.testing.assert_close(
        alike["like patch 1, 1"], torch.cosine_similarity(tokens[2:], tokens[6][None]).reshape(2, 3)
    )
    torch.testing.assert_close(
        alike["like the class token"], torch.cosine_similarity(tokens[2:], tokens[0][None]).reshape(2, 3)
    )


def test_pictures_of_the_data_as_weights_see_them(run, bare, data, tmp_path, capsys):
    """`data show` and `data preview` take an address: a run has a recipe, and of a file its input is known."""
    out = tmp_path / "sample.png"
    assert cli(["data", "show", f"{run}@step=1", "--sample", "0", "--out", str(out)]) == 0
    assert "resized to 32 x 16" in capsys.readouterr().out
    assert out.exists()
    args = argparse.Namespace(overrides=["data.eval_crop_ratio=0.5"], data=None)
    assert pictures._recipe(str(run), args).data.eval_crop_ratio == 0.5
    assert "nothing tells which model" in refused(capsys, "data", "preview", bare, "--out", out)
    assert "there is no recipe 'nothing'" in refused(capsys, "data", "preview", "nothing", "--out", out)
