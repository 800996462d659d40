import argparse
import shutil

import pytest
import torch
from safetensors.torch import save_file

from tests.run.noise_as_weights import make_run, tensors


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with a run, and the same model in files of every kind."""
    folder = tmp_path_factory.mktemp("made")

    def write(text):
        (folder / "r.yaml").write_text(text)
        return str(folder / "r.yaml")

    make_run(folder / "run", write)
    ours = tensors(7)
    save_file(ours, folder / "w.safetensors")
    training = {"model": ours, "model_ema": tensors(8), "optimizer": {"state": {}}, "args": argparse.Namespace(a=1)}
    for ending in ("pth", "pt", "bin"):
        torch.save(training, folder / f"w.{ending}")
    torch.save({f"module.{key}": tensor for key, tensor in ours.items()}, folder / "ddp.pth")
    return folder


@pytest.fixture
def here(made, tmp_path, monkeypatch):
    """A copy of it to work in."""
    shutil.copytree(made, tmp_path / "here", dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"
