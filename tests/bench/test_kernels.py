"""`fastdeit kernels bench`: every op is measured, and the table of choices says what the rows say."""

import argparse
import json
from functools import partial

import pytest
import torch

from fastdeit import models
from fastdeit.bench import kernels
from fastdeit.errors import UsageError
from fastdeit.kernels._op import OPS

CPU = torch.device("cpu")
TINY = {"image_size": (32, 32), "depth": 1, "num_classes": 10}


def arguments(**changes):
    given = {"device": "cpu", "op": ["layer_norm"], "model": "deit_tiny_patch16_224", "batch": 1, "dtype": "fp32"}
    return argparse.Namespace(**given | {"rounds": 2, "out": None, "update_choices": False, "predict": False} | changes)


def test_every_op_has_work_that_it_can_do():
    with torch.device("meta"):
        config = models.build("deit_tiny_distilled_patch16_224", **TINY).config
    for name in OPS:
        work = kernels.work_of(name, config, 2, torch.float32, CPU)
        assert work.bytes > 0
        kernels._trained(OPS[name].native, work.args)


def test_a_row_holds_every_side_and_says_what_cannot_run(tmp_path, capsys, monkeypatch):
    def sides(name, device):
        yield "reference", lambda work: OPS[name].native(*work.args)
        yield "broken", lambda work: 1 / 0

    monkeypatch.setattr(kernels, "_sides", sides)
    kernels.main(arguments(out=str(tmp_path / "rows.jsonl")))
    (row,) = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert {name: len(seconds) for name, seconds in row["seconds"].items()} == {"reference": 2, "copy": 2}
    assert row["failed"] == {"broken": "ZeroDivisionError: division by zero"}
    assert row["card"] == "cpu"
    printed = capsys.readouterr().out
    assert "1.00x reference" in printed
    assert "broken     cannot run: ZeroDivisionError" in printed
    assert "they say nothing of a GPU" in printed


def test_a_row_is_appended_as_soon_as_it_is_measured(tmp_path, monkeypatch):
    def interrupted(name, build, args, device):
        if name == "attention":
            return {"op": name}
        raise KeyboardInterrupt

    out = tmp_path / "new" / "rows.jsonl"
    monkeypatch.setattr(kernels, "measure", interrupted)
    monkeypatch.setattr(kernels, "_lines", str)
    with pytest.raises(KeyboardInterrupt):
        kernels.main(arguments(out=str(out), op=None))
    assert json.loads(out.read_text()) == {"op": "attention"}


def test_sides_are_the_backends_the_reference_and_the_compiled_reference():
    assert [name for name, _ in kernels._sides("fused_adamw", CPU)] == ["aten", "reference", "compiled"]


def test_prediction_is_bytes_over_bandwidth_and_runs_nothing(capsys, monkeypatch):
    monkeypatch.setattr(kernels, "measure", None)
    kernels.main(arguments(predict=True, batch=256, op=None, dtype="bf16", model="deit_base_distilled_patch16_224"))
    title, head, *lines = capsys.readouterr().out.splitlines()
    assert "predictions, not measurements" in title
    assert head.split()[-2:] == ["H200", "us"]
    assert [line.split()[0] for line in lines] == list(OPS)
    norm = next(line.split() for line in lines if line.startswith("add_layer_norm"))
    moved = 28 * 256 * 198 * 768  # float32 stream read twice and written twice, 16-bit branch and tokens six times
    assert (norm[1], norm[-1]) == (f"{moved / 1e6:.1f}", f"{1e6 * moved / 4.8e12:.1f}")


def row(op, model, width, **seconds):
    return {"card": "sm_90", "op": op, "model": model, "batch": 256, "dtype": "bf16", "width": width} | {
        "seconds": {name: [value] * 3 for name, value in seconds.items()} | {"copy": [1.0]}
    }


def test_choices_are_the_fastest_at_each_width_and_over_all_models(tmp_path):
    table = tmp_path / "choices.json"
    earlier = {"backend": "triton", "because": "kept", "widths": {}}
    table.write_text(json.dumps({"sm_80": {"mlp": earlier}, "sm_90": {"mlp": earlier | {"widths": {"384": earlier}}}}))
    rows = [
        row("mlp", "deit_tiny", 192, triton=1.0, epilogue=0.8, reference=4.0, compiled=0.1, quack=0.1),
        row("mlp", "deit_base", 768, triton=1.0, epilogue=2.0, reference=4.0, compiled=0.1, quack=0.1),
        row("cosub_loss", "deit_tiny", 1000, reference=1.0),
    ]
    kernels.update_choices(rows, table)
    choices = json.loads(table.read_text())
    assert choices["sm_80"]["mlp"] == earlier
    assert choices["sm_90"]["mlp"] == {
        "backend": "triton",
        "because": "measured: 1.26 times epilogue, 4.00 times reference "
        "(deit_base batch 256 bf16, deit_tiny batch 256 bf16)",
        "widths": {
            "192": {
                "backend": "epilogue",
                "because": "measured: 1.25 times triton, 5.00 times reference (deit_tiny batch 256 bf16)",
            },
            "384": earlier,
            "768": {
                "backend": "triton",
                "because": "measured: 2.00 times epilogue, 4.00 times reference (deit_base batch 256 bf16)",
            },
        },
    }
    assert choices["sm_90"]["cosub_loss"]["because"].startswith("measured: nothing else runs")


@pytest.mark.slow
def test_a_row_knows_the_width_that_an_eager_call_is_looked_up_by(monkeypatch):
    monkeypatch.setattr(kernels, "_sides", lambda name, device: [("reference", lambda work: None)])
    with torch.device("meta"):
        config = models.build("deit_tiny_patch16_224", **TINY).config
    rows = {
        name: kernels.measure(name, partial(kernels.work_of, name, config, 1, torch.float32, CPU), arguments(), CPU)
        for name in OPS
    }
    dim, classes = config.dim, 1000
    assert {name: row["width"] for name, row in rows.items()} == {
        "attention": 3 * dim,
        "query_attention": dim,
        "add_layer_norm": dim,
        "layer_norm": dim,
        "add_rms_norm": dim,
        "rms_norm": dim,
        "qk_norm_rope": 3 * dim,
        "swiglu": 8 * dim,
        "mlp": dim,
        "layer_norm_mlp": dim,
        **dict.fromkeys(("fp8_rows", "fp8_columns", "fp8_product"), dim),
        **dict.fromkeys(("fp8_gelu", "fp8_gelu_gradient"), 4 * dim),
        "distillation_loss": classes,
        "cosub_loss": classes,
        "pixels": 3,
        "patchify": 3,
        "global_norm": dim,
        "fused_adamw": dim,
        "fused_lamb": dim,
        "fused_sgd": dim,
    }


@pytest.mark.parametrize(
    ("changes", "words"), [({"op": ["atention"]}, "no op 'atention' to measure"), ({"model": "deit_huge"}, "deit_huge")]
)
def test_mistakes_are_told(changes, words):
    with pytest.raises(UsageError, match=words):
        kernels.main(arguments(**changes))
