"""A real pretrained transformer is loaded by its address, fine-tuned, and teaches."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fastdeit import cli
from fastdeit.run.weights import network, open_weights
from tests import pretrained

pytestmark = pytest.mark.slow
COLORS = {"blue": (40, 60, 220), "green": (40, 200, 60), "red": (220, 40, 40)}
SMALL = [
    *("model.image_size=56", "train.batch_size=6", "data.group_size=6", "data.augment=none", "data.mixup=0"),
    "data.crop_scale=[0.8,1]",
    *("train.eval_every=4", "optim.warmup_epochs=0", "engine.threads=1"),
]


@pytest.fixture(scope="module")
def onnx():
    return pretrained.onnx_file()


@pytest.fixture(scope="module")
def file(onnx, tmp_path_factory):
    """The backbone as a safetensors file under timm's names."""
    path = tmp_path_factory.mktemp("weights") / "dinov2.safetensors"
    save_file(pretrained.backbone(onnx), path)
    return path


@pytest.fixture
def photos(tmp_path):
    """Squares of three colours in noise: 12 pictures of each for training, 4 held out."""
    noise = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 4)):
        for name, color in COLORS.items():
            folder = tmp_path / "photos" / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = noise.integers(0, 256, (56, 56, 3), dtype=np.uint8)
                pixels[10:46, 10:46] = color
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "photos"


def test_tokens_are_those_of_onnxruntime(onnx, file):
    """At 224 pixels, so that the positions of 37 x 37 patches are interpolated to 16 x 16 on both sides."""
    images = np.random.default_rng(0).standard_normal((2, 3, 224, 224), dtype=np.float32)
    told = []
    built = network(
        open_weights(str(file)), name=f"timm:{pretrained.MODEL}", image_size=224, purpose="features", say=told.append
    )
    with torch.no_grad():
        tokens = built.tokens(torch.from_numpy(images)).numpy()
    expected = pretrained.tokens_by_onnxruntime(onnx, images)
    assert tokens.shape == expected.shape == (2, 257, 384)
    assert np.abs(tokens - expected).max() < 1e-5 * np.abs(expected).max()
    assert any("37x37 -> 1+16x16" in note for note in told)


def test_a_probe_of_it_learns_and_teaches(file, photos, tmp_path):
    """Its head alone is trained; then a small student learns from the result, which sees its own size."""
    probe, student = tmp_path / "probe", tmp_path / "student"
    overrides = ["model.name=null", f"model.timm={pretrained.MODEL}", f"model.weights={file}", "optim.layer_decay=1"]
    words = ["finetune", *SMALL, *overrides, "model.drop_path=0", "model.freeze=[all_but_head]", "train.epochs=4"]
    assert cli.main(["train", *words, "optim.lr=2e-3", "--data", str(photos), "--run-dir", str(probe)]) == 0
    assert summary(probe)["top1_class"] == 100
    weights = open_weights(str(probe)).tensors
    before = open_weights(str(file)).tensors
    assert torch.equal(weights["blocks.11.mlp.fc2.weight"], before["blocks.11.mlp.fc2.weight"])

    words = ["digits", *SMALL, "data.source=folder", "train.epochs=1", f"method.teacher={probe}"]
    assert cli.main(["train", *words, "--data", str(photos), "--run-dir", str(student)]) == 0
    assert summary(student)["teacher_top1"] == 100


def summary(run):
    return json.loads((run / "summary.json").read_text())
