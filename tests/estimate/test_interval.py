"""How far the estimate says it may be off, and how far its steps are from the counted ones."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastdeit import models
from fastdeit.bench import count, count_command
from fastdeit.bench.count_command import MODELS
from fastdeit.estimate import interval, memory, options
from fastdeit.estimate import model as estimate
from fastdeit.estimate.designs import EPILOGUE, FUSED, TIMM_COMPILE
from fastdeit.estimate.gpus import GPUS
from fastdeit.estimate.model import Op
from fastdeit.estimate.networks import Network, ViT, Work
from fastdeit.models.drop_path import dropped_of

COUNTS = sorted((Path(__file__).parents[1] / "golden" / "counts").glob("torch-*.json"))[-1]
WIDTHS = {"base": 768, "small": 384, "tiny": 192}
WORK = Work(256, "bf16", drop_path=True, ema=True)
H200 = GPUS["H200"]


def network(width):
    vit = ViT(196, 2, 768, width, 12, width // 64, 4 * width, 1000)
    return Network("deit", vit.parameters, vit.flops, 3 * 224 * 224, 2000, vit=vit)


# ---- counted ---------------------------------------------------------------------------------------------------------


BOTH = "mlp=epilogue,attention=fused_backward"
ONE_KERNEL = replace(EPILOGUE, attention="fused_backward", tried=True)


@pytest.mark.parametrize(("design", "form"), [(FUSED, "auto"), (ONE_KERNEL, BOTH)], ids=["fused", "epilogue"])
@pytest.mark.parametrize("size", WIDTHS)
def test_a_step_does_and_moves_what_is_counted_of_it(size, design, form):
    counted = json.loads(COUNTS.read_text())[f"deit_{size}_distilled_patch16_224 | all blocks | {form} | sm_90"]
    _, moved, flops = map(sum, zip(*(row for kind, row in counted.items() if kind != "memory"), strict=True))
    ops = estimate.ops(network(WIDTHS[size]), WORK, design, H200)
    assert sum(op.count * op.flops for op in ops) == flops
    assert sum(op.count * op.bytes for op in ops) == pytest.approx(moved, rel=0.06)


def test_the_step_that_a_trial_is_expected_to_choose_keeps_within_its_goals():
    """100 GB and 450 launches of DeiT-B, 256 images; activations that are kept leave out 3.4 GB more."""
    counted = json.loads(COUNTS.read_text())[f"deit_base_distilled_patch16_224 | all blocks | {BOTH} | sm_90"]
    launches, moved, _ = map(sum, zip(*(row for kind, row in counted.items() if kind != "memory"), strict=True))
    assert launches <= 450
    assert moved <= 100e9


@pytest.mark.slow
@pytest.mark.parametrize("option", ["residual", "skip", "fp8"])
def test_options_are_counted_alike(option):
    """A step with a 16-bit stream, one that skips what drop-path drops, and one with products of 8 bits; what lives
    where backward begins, too."""
    cell, design, work = count_command.cell(MODELS[-1], 256, drop_path=0.2), FUSED, WORK
    if option == "residual":
        found, design = count.ours(cell, 90, "auto", residual=torch.bfloat16), options.narrowed(FUSED)
    elif option == "fp8":
        found, design = count.ours(cell, 90, "auto", fp8=True), options.eight_bit(FUSED)
        assert found.by("name")["_scaled_mm"].launches == 2 * 4 * 11  # not in the last block
    else:
        found = count.ours(cell, 90, "auto", skip=True)
        dropped = dropped_of(models.build(cell.model, drop_path=0.2).config, count.SKIP_GROUP)
        work = replace(WORK, kept=options.kept(dropped, count.SKIP_GROUP))
    ops = estimate.ops(network(192), work, design, H200)
    assert sum(op.count * op.flops for op in ops) == pytest.approx(found.total.flops, rel=1e-9)
    assert sum(op.count * op.bytes for op in ops) == pytest.approx(found.total.bytes, rel=0.06)
    kept = sum(memory.peak(network(192), work, design, world=1, parallel="ddp")["blocks"])
    assert kept == pytest.approx(found.live - found.state, rel=0.06)


def test_launches_are_those_that_are_counted():
    counted = json.loads(COUNTS.read_text())["deit_base_distilled_patch16_224 | all blocks | auto | sm_90"]
    launches = sum(row[0] for kind, row in counted.items() if kind != "memory")
    ops = estimate.ops(network(768), WORK, FUSED, H200)
    assert sum(op.count * op.launches for op in ops) == pytest.approx(launches, rel=0.06)


def test_the_peer_computes_the_last_block_for_all_tokens():
    step = {design: sum(op.count * op.flops for op in estimate.ops(network(768), WORK, design, H200))
            for design in (FUSED, TIMM_COMPILE)}  # fmt: skip
    assert step[TIMM_COMPILE] > 1.05 * step[FUSED]
    kept = [memory.peak(network(768), WORK, of, world=1, parallel="ddp")["blocks"] for of in (FUSED, TIMM_COMPILE)]
    assert kept[0][-1] < kept[0][0]
    assert kept[1][-1] == kept[1][0]


# ---- drawn -----------------------------------------------------------------------------------------------------------


def test_shares_are_drawn_from_their_ranges_and_alike_in_every_call():
    drawn = interval.drawn(H200)
    interval.drawn.cache_clear()
    assert interval.drawn(H200) == drawn
    assert len(set(drawn)) == interval.DRAWS
    for of, name in (("gemm", "products"), ("pointwise", "pointwise"), ("gap", "gap"), ("epilogue", "epilogue")):
        factors = [getattr(card, of) / getattr(H200, of) for card in drawn]
        low, high = interval.RANGES[name]
        assert low <= min(factors) < (3 * low + high) / 4
        assert (low + 3 * high) / 4 < max(factors) <= high
    full = interval.drawn(replace(H200, gemm=1.0))
    assert max(card.gemm for card in full) == 1.0


@pytest.mark.parametrize("design", [TIMM_COMPILE, FUSED, EPILOGUE, options.eight_bit(FUSED)], ids=lambda d: d.name)
def test_draws_are_steps_of_the_same_model(monkeypatch, design):
    slower = replace(H200, gemm=0.5, epilogue=0.9, gap=5e-6)
    for card in (H200, slower):
        monkeypatch.setattr(interval, "drawn", lambda gpu, card=card: (card,))
        interval.steps.cache_clear()
        (found,) = interval.steps(network(768), WORK, design, H200)
        assert found == pytest.approx(estimate.step(network(768), WORK, design, card))
    interval.steps.cache_clear()


def test_a_ratio_is_known_better_than_a_speed():
    ours, peer = ([sum(step) for step in interval.steps(network(768), WORK, of, H200)] for of in (FUSED, TIMM_COMPILE))
    speed, ratio = interval.interval(ours), interval.interval([b / a for a, b in zip(ours, peer, strict=True)])
    assert ratio.high / ratio.low < speed.high / speed.low


def test_an_interval_leaves_out_the_extremes():
    assert interval.interval([*range(100), 10_000]) == (5, 95)


def test_what_multiplies_nothing_adds_up():
    ops = [
        Op("pointwise", "forward", bytes=8, count=2),
        Op("pointwise", "forward", bytes=1),
        Op("gemm", "forward", 3.0),
    ]
    assert interval._merged(ops) == [ops[2], Op("pointwise", "forward", bytes=17, launches=3.0)]
