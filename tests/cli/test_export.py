"""`fastdeit export`: every format gives back the numbers of the network, in fastdeit and in the program it is for."""

import json

import numpy as np
import pytest
import safetensors
import timm
import torch

from fastdeit import models
from fastdeit.cli import main as cli
from fastdeit.errors import FastdeitError, UsageError
from fastdeit.models.counterpart import counterpart
from fastdeit.run.classification import named_scores
from fastdeit.run.weights import Known, network, open_weights
from fastdeit.verbs import export
from fastdeit.verbs.formats import FORMATS, check_place
from tests.painted_runs import CLASSES, refused
from tests.small_runs import Tiny

SIZE = 16, 32


@pytest.fixture
def images():
    return torch.randn(5, 3, *SIZE, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits_of(run, images):
    return network(open_weights(str(run)))(images)


def exported(capsys, *argv):
    assert cli(["export", *map(str, argv)]) == 0
    return capsys.readouterr().out


def test_a_safetensors_file_tells_everything(run, tmp_path, images, capsys):
    out = tmp_path / "made" / "weights.safetensors"
    assert "normalised by mean (0.485, 0.456, 0.406)" in exported(capsys, f"{run}@ema", out)
    found = open_weights(str(out))
    assert found.known == open_weights(str(run)).known
    assert found.known.classes == CLASSES
    expected = logits_of(f"{run}@ema", images)
    torch.testing.assert_close(logits_of(out, images), expected, rtol=0, atol=0)
    with safetensors.safe_open(out, "pt") as file:
        damaged = {**file.metadata(), "fastdeit": '{"image_size": "large"}'}
    safetensors.torch.save_file(found.tensors, out, metadata=damaged)
    assert "what its header says of the model is damaged: image_size" in refused(capsys, "eval", out)


def test_a_checkpoint_as_deit_writes_it(run, tmp_path, images, capsys):
    exported(capsys, run, tmp_path / "w.pth")
    state = torch.load(tmp_path / "w.pth", weights_only=True)["model"]
    first, second = logits_of(run, images)
    theirs = counterpart(network(open_weights(f"{run}@ema")))
    theirs.load_state_dict(state)
    torch.testing.assert_close(theirs(images), (first, second))
    name = "deit_digits_distilled_patch8_32"
    again = network(open_weights(str(tmp_path / "w.pth")), name=name, image_size=SIZE, grid=(2, 4), purpose="teacher")
    torch.testing.assert_close(again(images), (first, second), rtol=0, atol=0)


def test_a_folder_for_timm(run, tmp_path, images, capsys):
    """timm builds the model from the folder alone, with the classes and the input that it was trained for."""
    exported(capsys, run, tmp_path / "folder")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval()
    first, second = logits_of(run, images)
    torch.testing.assert_close(loaded(images), (first + second) / 2)
    torch.testing.assert_close(logits_of(tmp_path / "folder" / "model.safetensors", images), (first, second))
    (tmp_path / "folder" / "config.json").rename(tmp_path / "folder" / "config")
    told = open_weights(str(tmp_path / "folder" / "model.safetensors"))
    (tmp_path / "folder" / "config").rename(tmp_path / "folder" / "config.json")
    again = open_weights(str(tmp_path / "folder" / "model.safetensors"))  # the file itself tells it, and more
    assert (again.known, again.notes) == (told.known, ()) == (open_weights(str(run)).known, ())
    wanted = timm.data.resolve_data_config(model=loaded)
    assert (wanted["input_size"], wanted["crop_pct"], wanted["interpolation"]) == ((3, *SIZE), 1.0, "bicubic")
    assert list(wanted["mean"]) == [0.485, 0.456, 0.406]
    assert json.loads((tmp_path / "folder" / "config.json").read_text())["label_names"] == list(CLASSES)


@pytest.mark.slow
@pytest.mark.parametrize("fuse", ["softmax", "none"])
def test_a_program_of_torch(run, fuse, tmp_path, images, capsys):
    out = tmp_path / "program.pt2"
    assert "checked on 6 pictures" in exported(capsys, run, out, "--fuse", fuse)
    found = torch.export.load(out).module()(images)
    logits = logits_of(run, images)
    expected = logits if fuse == "none" else named_scores(logits, "softmax")["softmax"][1]
    torch.testing.assert_close(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("fuse", ["logit", "none"])
def test_onnx(run, fuse, tmp_path, images, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    out = tmp_path / "program.onnx"
    assert "checked on 6 pictures" in exported(capsys, run, out, "--fuse", fuse)
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    found = session.run(None, {"pixels": images.numpy()})
    first, second = logits_of(run, images)
    expected = [first, second] if fuse == "none" else [(first + second) / 2]
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs.numpy(), rtol=1e-4, atol=1e-5)
    told = json.loads(session.get_modelmeta().custom_metadata_map["fastdeit"])
    assert told["classes"] == list(CLASSES)


def test_what_cannot_be_exported_is_said(run, bare, tmp_path, capsys):
    assert "the ending .gguf says no format" in refused(capsys, "export", run, tmp_path / "w.gguf")
    assert "nothing tells which model" in refused(capsys, "export", bare, tmp_path / "w.pth")
    (tmp_path / "file").write_text("")
    assert "cannot be written" in refused(capsys, "export", run, tmp_path / "file" / "w.pth", code=1)
    with pytest.raises(ValueError, match="timm has no ConvNet"):
        counterpart(models.build("convnet_digits"))
    assert "only .pt2 and .onnx fuse" in refused(capsys, "export", run, tmp_path / "w.pth", "--fuse", "class")


def test_a_file_that_cannot_be_written_is_told_in_every_format(run, tmp_path, capsys, monkeypatch):
    def full(path, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export.Path, "touch", full)
    for out in "w.safetensors", "w.pth", "w.pt2":
        told = refused(capsys, "export", run, tmp_path / out, code=1)
        assert f"{out}: cannot be written: No space left on device" in told


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_there_is_replaced_by_force_alone(format, tmp_path):
    """And only by its like: a folder of other things stays whatever is said."""
    whole, other = tmp_path / "out", tmp_path / "other"
    check_place(whole, format, False)
    (whole if FORMATS[format].suffix else whole / "config.json").parent.mkdir(exist_ok=True)
    (whole if FORMATS[format].suffix else whole / "config.json").write_text("")
    (other / "inside").mkdir(parents=True)
    with pytest.raises(UsageError, match="out is there already; --force replaces it"):
        check_place(whole, format, False)
    check_place(whole, format, True)
    with pytest.raises(UsageError, match=r"is a folder, and|has other things in it, such as inside"):
        check_place(other, format, True)
    (tmp_path / "file").write_text("")
    if not FORMATS[format].suffix:
        with pytest.raises(UsageError, match="file is a file, and a folder for timm"):
            check_place(tmp_path / "file", format, True)


def test_a_folder_is_whole_or_as_it_was(run, tmp_path, capsys, monkeypatch):
    """Neither a failure nor a process that was killed at any moment leaves half a folder under the name."""
    (tmp_path / ".tmp-hub" / "left").mkdir(parents=True)  # of a process that was killed
    assert cli(["export", str(run), str(tmp_path / "hub")]) == 0
    assert "is there already; --force replaces it" in refused(capsys, "export", run, tmp_path / "hub")
    before = (tmp_path / "hub" / "model.safetensors").read_bytes()
    assert cli(["export", f"{run}@ema", str(tmp_path / "hub"), "--force"]) == 0
    written = (tmp_path / "hub" / "model.safetensors").read_bytes()
    assert written != before

    def full(job, out):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "_safetensors", full)  # the last file of the folder
    assert "No space left" in refused(capsys, "export", run, tmp_path / "hub", "--force", code=1)
    assert (tmp_path / "hub" / "model.safetensors").read_bytes() == written
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hub"]


def test_a_program_that_is_wrong_takes_no_name(run, tmp_path, capsys, monkeypatch):
    def wrong(job, out):
        out.write_text("half of a file")
        raise FastdeitError("the exported program is wrong")

    (tmp_path / "w.pt2").write_text("the file before")
    monkeypatch.setitem(export._WRITERS, "torch", wrong)
    assert "is wrong" in refused(capsys, "export", run, tmp_path / "w.pt2", "--force", code=1)
    assert [file.name for file in tmp_path.iterdir()] == ["w.pt2"]
    assert (tmp_path / "w.pt2").read_text() == "the file before"


class FixedBatch(Tiny):
    def forward(self, x, noise=None):
        return super().forward(x.reshape(len(x), *x.shape[1:]))


def test_a_model_of_somebody_else_that_cannot_be_traced_is_told_why():
    model = FixedBatch(SIZE, 3)
    job = export.Job(None, model.eval(), Known(name="tests.cli.test_export:FixedBatch", image_size=SIZE), "class")
    with pytest.raises(
        UsageError, match=r"FixedBatch: torch.export cannot follow it .* write x.shape\[0\] and not len"
    ):
        export._traced(job)


def test_one_head_is_not_fused(tmp_path, capsys):
    argv = "export", tmp_path / "w.pth", tmp_path / "w.pt2", "--model", "timm:test_vit", "--fuse", "class"
    one = timm.create_model("test_vit", num_classes=3, img_size=32)
    torch.save(one.state_dict(), tmp_path / "w.pth")
    assert "there is nothing to fuse" in refused(capsys, *argv)


def test_layer_scale_has_the_names_of_deit_in_its_file(tmp_path):
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("gamma", torch.ones(2))

    network = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([torch.nn.ModuleDict({"ls1": Block()})])})
    export._WRITERS["deit"](export.Job(tmp_path / "w.pth", network, Known(), None), tmp_path / "w.pth")
    assert list(torch.load(tmp_path / "w.pth")["model"]) == ["blocks.0.gamma_1"]
