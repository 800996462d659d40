"""curves.png shows what metrics.jsonl holds, whatever is missing from it."""

import io

import pytest
from PIL import Image

from fastdeit.engine import metrics, report

pytestmark = pytest.mark.usefixtures("curves")


def draw(tmp_path, records):
    path, out = tmp_path / "metrics.jsonl", tmp_path / "curves.png"
    log = metrics.MetricsLog(path)
    for record in records:
        log.write(**record)
    log.close()
    report.curves(path, out)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["curves.png", "metrics.jsonl"]
    image = Image.open(io.BytesIO(out.read_bytes()))
    image.load()
    assert image.format == "PNG"
    return image.convert("RGB")


def train(step, **values):
    return {"kind": "train", "step": step, "epoch": step / 10, "loss": 7 - step / 100, "lr": 1e-3, **values}


def evaluation(step, **values):
    return {"kind": "eval", "step": step, "epoch": step / 10, **values}


def colours(image):
    """How many pixels have exactly the colour of each line."""
    counts = {colour: count for count, colour in image.getcolors(image.width * image.height)}
    return {name: counts.get(tuple(bytes.fromhex(name[1:])), 0) for name in (*report._COLOURS, report._GREY)}


BLUE, ORANGE, GREEN = report._COLOURS[:3]


def test_a_full_log_draws_every_line(tmp_path):
    records = [train(step) for step in range(200)]
    scores = [
        evaluation(step, top1_fused=step / 4, top1_class=step / 5, top1_distillation=step / 6)
        for step in range(10, 200, 10)
    ]
    image = draw(tmp_path, records + scores)
    assert 1000 <= image.width <= 1300
    assert 800 <= image.height <= 1200
    shown = colours(image)
    assert all(shown[colour] > 100 for colour in (BLUE, ORANGE, GREEN, report._GREY)), shown


def test_the_teacher_is_a_level(tmp_path):
    teacher = {"kind": "teacher", "step": 20, "teacher_top1": 70.0}
    image = draw(tmp_path, [evaluation(step, top1_class=float(step)) for step in (10, 20)] + [teacher])
    grey = tuple(bytes.fromhex(report._GREY[1:]))
    rows = {y for y in range(image.height) if sum(image.getpixel((x, y)) == grey for x in range(image.width)) > 100}
    assert 1 <= len(rows) <= 3


def test_panels_follow_the_data(tmp_path):
    heights = {}
    for name, records in {
        "loss": [train(0, lr=None)],
        "loss and rate": [train(0)],
        "accuracy": [evaluation(0, top1_class=1.0)],
        "all": [train(0), evaluation(0, top1_class=1.0)],
    }.items():
        folder = tmp_path / name
        folder.mkdir()
        image = draw(folder, records)
        heights[name] = image.height
        assert image.width == 1170
    assert heights["loss"] == heights["accuracy"] < heights["loss and rate"] < heights["all"]


def test_missing_and_non_finite_values_are_gaps(tmp_path):
    records = [
        train(0),
        {"kind": "train", "step": 1, "epoch": 0.1},
        {"kind": "train", "step": 2, "loss": 3.0},
        {"step": 3, "event": "resumed"},
        train(4, loss=float("nan"), lr=None),
        train(5, loss=float("inf")),
        evaluation(5, top1_class=None, top1_fused=3.0, top5_fused=9.0),
        evaluation(6, seconds=3.0),
    ]
    assert report._series(report._of_kind(records, "train"), "loss") == ([0.0], [7.0])
    assert colours(draw(tmp_path, records))[BLUE] > 20


def test_the_later_record_of_a_step_counts(tmp_path):
    records = [train(0), train(10, loss=9.0), train(20), train(10, loss=1.0), train(5, loss=2.0)]
    assert report._series(report._of_kind(records, "train"), "loss") == ([0.0, 0.5, 1.0, 2.0], [7.0, 2.0, 1.0, 6.8])


def test_the_running_mean_is_centred_and_keeps_a_line_straight():
    assert report._smooth([2.0] * 60) == [2.0] * 60
    values = [float(index) for index in range(400)]
    assert report._smooth(values)[5:-5] == pytest.approx(values[5:-5])
    assert report._smooth(values)[0] == pytest.approx(sum(range(6)) / 6)


def test_nothing_to_draw_is_an_error_and_leaves_no_file(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "kind": "train", "epoch": 0.1}\n')
    with pytest.raises(metrics.MetricsError, match="holds no loss"):
        report.curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()
