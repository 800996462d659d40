"""Calibration by the rows of `fastdeit bench step`: sides become designs, and what a row says becomes the work."""

import json
from dataclasses import replace

import pytest

from fastdeit.errors import UsageError
from fastdeit.estimate import model as estimate
from fastdeit.estimate import rows
from fastdeit.estimate.designs import FUSED, TIMM, TIMM_COMPILE
from fastdeit.estimate.gpus import GPUS
from fastdeit.estimate.networks import Network, ViT, Work

VIT = ViT(patches=196, prefix=1, patch_values=768, dim=192, depth=12, heads=3, hidden=768, classes=1000)
OURS = Network("tiny", VIT.parameters, VIT.flops, 3 * 224 * 224, 1000, vit=VIT)
TIMMS = replace(OURS, own=False, vit=replace(VIT, pruned=False))


def calibrated(tmp_path, row, asked=None):
    path = tmp_path / "h200.jsonl"
    path.write_text(json.dumps(row) + "\n")

    def network(name, size):
        if asked is not None:
            asked.append((name, size))
        return OURS

    return rows.calibrations([path], network)


def row(**changes):
    given = {"what": "step", "device": "cuda", "model": "tiny", "batch": 64, "image_size": 384, "precision": "bf16"}
    given |= {"teacher": None, "ema": True, "drop_path": 0.1, "environment": {"gpus": [{"name": "NVIDIA H200"}]}}
    return given | changes


def seconds(network, design, **changes):
    return sum(estimate.step(network, replace(Work(64, "bf16", True, True), **changes), design, GPUS["H200"]))


def test_sides_are_designs(tmp_path):
    sides = {
        "fastdeit": 2 * seconds(OURS, FUSED),
        "timm": 3 * seconds(TIMMS, TIMM),
        "timm_compile": 4 * seconds(TIMMS, TIMM_COMPILE),
        "timm_compile_cudnn": 1.0,
        "accelerate": 1.0,
        "fastdeit_graph": 1.0,
    }
    asked = []
    found = calibrated(tmp_path, row(seconds={name: [value] * 3 for name, value in sides.items()}), asked)
    assert found == {
        ("H200", "fused", "bf16"): pytest.approx((2, 1, 2, 2)),
        ("H200", "timm", "bf16"): pytest.approx((3, 1, 3, 3)),
        ("H200", "timm_compile", "bf16"): pytest.approx((4, 1, 4, 4)),
    }
    assert set(asked) == {("tiny", (384, 384))}


@pytest.mark.parametrize(("ema", "drop_path"), [(False, 0.1), (True, 0.0)])
def test_the_work_is_what_the_row_says(tmp_path, ema, drop_path):
    taken = seconds(TIMMS, TIMM, ema=ema, drop_path=bool(drop_path))
    assert taken != seconds(TIMMS, TIMM)
    found = calibrated(tmp_path, row(seconds={"timm": [taken]}, ema=ema, drop_path=drop_path))
    assert found["H200", "timm", "bf16"].factor == pytest.approx(1)


def test_a_step_with_a_teacher_does_not_calibrate(tmp_path):
    assert calibrated(tmp_path, row(seconds={"fastdeit": [1.0]}, teacher="regnety_160")) == {}


@pytest.mark.parametrize(
    "changes", [{"what": None}, {"seconds": {"fastdeit": []}}, {"environment": {"gpus": []}, "seconds": {}}]
)
def test_a_damaged_row_does_not_calibrate(tmp_path, changes):
    assert calibrated(tmp_path, row(seconds={"fastdeit": [1.0]}) | changes) == {}


def test_a_file_that_holds_no_rows_is_told_with_its_place(tmp_path):
    path = tmp_path / "h200.jsonl"
    path.write_text(json.dumps(row(seconds={})) + "\n{")
    with pytest.raises(UsageError, match=r"h200\.jsonl:2 is no JSON"):
        rows.calibrations([path], lambda name, size: OURS)


def test_a_row_in_which_nothing_ran_does_not_calibrate(tmp_path):
    assert calibrated(tmp_path, row(seconds={})) == {}


def test_older_rows_are_as_they_were(tmp_path):
    newer = {"drop_path", "ema", "image_size", "precision"}
    older = {name: value for name, value in row().items() if name not in newer}
    taken = sum(estimate.step(OURS, Work(64, "fp32", drop_path=False), FUSED, GPUS["H200"]))
    asked = []
    found = calibrated(tmp_path, older | {"seconds": {"fastdeit": [taken], "timm": [1.0]}}, asked)
    assert found == {("H200", "fused", "fp32"): pytest.approx((1, 1, 1, 1))}
    assert asked == [("tiny", None)]
