"""Whole runs in small: a world that stops, and what a run left on the disk."""

import json
from dataclasses import asdict

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fastdeit.engine.dist import World
from fastdeit.recipe import resolve as recipes
from fastdeit.run import sharing, state
from fastdeit.run.record import Record
from fastdeit.training import train

FSDP2_IS_THERE = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= sharing.OLDEST
fsdp2_is_there = pytest.mark.skipif(
    not FSDP2_IS_THERE,
    reason=f"engine.parallel fsdp2 needs PyTorch {'.'.join(map(str, sharing.OLDEST))}",
)


class StopAt(World):
    """A world in which somebody asks to stop once `step` steps are done."""

    def __init__(self, *steps):
        super().__init__(torch.device("cpu"))
        self.steps, self.asked = set(steps), 0

    def stop_requested(self):
        self.asked += 1
        return self.asked in self.steps


class Tiny(nn.Module):
    """A model by import path with two heads and five tensors: its runs cost a tenth of a second."""

    noise_per_sample, patch_size, head_names = 0, None, ("head", "head_dist")

    def __init__(self, image_size, num_classes, drop_path=0.0):
        super().__init__()
        self.rows = nn.Parameter(torch.zeros(image_size[0]))
        self.head, self.head_dist = nn.Linear(3, num_classes), nn.Linear(3, num_classes)

    def forward(self, x, noise=None):
        x = (x + self.rows[:, None]).mean((2, 3))
        return self.head(x), self.head_dist(x)

    def decay_groups(self, decay_dist_token=False):
        return ["head.weight", "head_dist.weight"], ["head.bias", "head_dist.bias", "rows"]

    def flops(self, image_size=None):
        return 12 * self.head.out_features


def train_rank(rank, size, path, overrides, run):
    """Train the recipe at `path` as one process of several (fixture `ranks`)."""
    return train(recipes.load(str(path), overrides), run, World(torch.device("cpu"), rank, size), resume=False)


def run_state(recipe):
    """The JSON state of a checkpoint of a run by this recipe."""
    return {
        "schema": state.SCHEMA,
        "recipe": recipe.model_dump(mode="json"),
        "identity": {"train": "t", "val": "v", "classes": ["a", "b"]},
        "record": asdict(Record(phase="all")),
        "steps": 9,
        "steps_per_epoch": 3,
        "lineage": [],
        "world": 1,
        "versions": {"fastdeit": "0"},
        "changes": [],
    }


def stored(run, step):
    """{file: {name: tensor}} of the checkpoint of `step`."""
    folder = run / "checkpoints" / f"step_{step:08d}"
    return {file.name: load_file(file) for file in sorted(folder.glob("*.safetensors"))}


def assert_same_weights(run, other, step):
    """Every tensor of the two checkpoints has the same bits."""
    mine, theirs = stored(run, step), stored(other, step)
    assert mine.keys() == theirs.keys()
    for file in mine:
        assert mine[file].keys() == theirs[file].keys()
        for name, tensor in mine[file].items():
            assert torch.equal(tensor, theirs[file][name]), f"{file} {name}"


def assert_close_weights(run, other, step):
    """Every tensor of the two checkpoints is the same but for the order of its sums. The runs may have had different
    numbers of processes: of what each process has added up, the sum counts."""
    mine, theirs = stored(run, step), stored(other, step)
    assert mine.keys() == theirs.keys()
    for file in mine:
        assert mine[file].keys() == theirs[file].keys()
        for name, tensor in mine[file].items():
            pair = (tensor, theirs[file][name])
            if name.startswith("sum."):
                pair = [sums.sum() for sums in pair]
            torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-6, msg=lambda said, at=(file, name): f"{at}: {said}")


def logged(run):
    """What was measured, and at which step, without what depends on the clock."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    clocks = "images_per_second", "data_wait_percent", "seconds"
    return [{key: value for key, value in record.items() if key not in clocks} for record in records]
