"""`engine.reduce`: whole runs of two processes whose gradients travel in 16 bit."""

import numpy as np
import pytest
import torch

from tests.small_runs import assert_same_weights, stored, train_rank
from tests.test_train_batchnorm import two_runs

RECIPE = """\
model: {name: "tests.small_runs:Tiny", image_size: 32}
method: {use: supervised}
data: {source: folder, flip: 0.0, mixup: 0, cutmix: 0, group_size: 16, repeats: 1}
optim: {lr: 1e-2, warmup_epochs: 0, min_lr: 1e-5}
train: {epochs: 2, batch_size: 128}
engine: {device: cpu, precision: fp32, log_every: 3}
"""
TOTAL = 6


@pytest.mark.slow
def test_a_run_is_near_that_in_32_bit_and_goes_on_bit_for_bit(ranks, write, few_digits, tmp_path):
    overrides = [f"data.root={few_digits}"]
    ranks(2, train_rank, write(RECIPE), overrides, tmp_path / "exact")
    ranks(2, two_runs, write(RECIPE), [*overrides, "engine.reduce=bf16"], tmp_path)
    assert_same_weights(tmp_path / "whole", tmp_path / "parts", TOTAL)
    exact, rounded = (stored(tmp_path / run, TOTAL)["model.safetensors"] for run in ("exact", "whole"))
    apart = torch.cat([(exact[name] - rounded[name]).flatten() for name in exact]).abs().numpy()
    assert 0 < np.median(apart) < 1e-3  # an update moves a weight by up to 1e-2
