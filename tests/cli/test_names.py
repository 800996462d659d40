"""Names that somebody else has chosen, wherever they are printed: none forges a line or commands the terminal."""

import io
import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import fastdeit
from fastdeit import text
from fastdeit.cli import main as cli
from fastdeit.engine import report
from fastdeit.engine.progress import Progress, table
from fastdeit.run.weights import KNOWN
from tests.faults.test_hostile import rewrite_manifest
from tests.painted_runs import RECIPE

EVIL = "a\x1b[2J\x1b[1;1H\rx\nFORGED: 99 % top-1\x07\u202eb\u2028$x_"
"""It clears the terminal, begins a line, rings, turns the direction of writing, and is no TeX."""


def assert_harmless(*printed):
    """Of the texts that were printed, of which one at least has the name in it."""
    for out in printed:
        assert all(char.isprintable() or char == "\n" for char in out), repr(out)
        lines = [line.removeprefix("fastdeit:").lstrip() for line in out.splitlines()]
        assert not [line for line in lines if line.startswith("FORGED")], out
    assert "FORGED" in "".join(printed), "the name was not printed, so this proved nothing"


@pytest.fixture
def renamed(data, tmp_path):
    """A data set with a class, and in it a picture that is none, whose names are evil."""
    root = shutil.copytree(data, tmp_path / "data")
    for split in ("train", "val"):
        (root / split / "red").rename(root / split / f"{EVIL}")
        (root / split / EVIL / f"{EVIL}.png").write_bytes(b"no picture")
    return root


@pytest.fixture
def evil_run(run, tmp_path):
    """The run, with evil names for its classes, metrics and itself."""
    path = shutil.copytree(run, tmp_path / EVIL)
    for each in (path / "checkpoints").iterdir():
        rewrite_manifest(each, lambda manifest: manifest["state"]["identity"].update(classes=["blue", EVIL, "red"]))
    log = path / "metrics.jsonl"
    log.write_text(log.read_text().replace("top1_fused", json.dumps(f"top1_{EVIL}")[1:-1]))
    summary = json.loads((path / "summary.json").read_text())
    (path / "summary.json").write_text(json.dumps(summary | {"best_by": EVIL}))
    return path


COMMANDS = {
    "data check": lambda data, run: ["data", "check", data, "--processes", "1"],
    "train": lambda data, run: ["train", data.parent / "r.yaml", "data.max_bad_fraction=0.5", f"data.root={data}"],
    "train, too many": lambda data, run: ["train", data.parent / "r.yaml", f"data.root={data}"],
    "eval": lambda data, run: ["eval", run, f"data.root={data}"],
    "predict": lambda data, run: ["predict", run, data / "val" / "blue" / "0.png", "--top", "3"],
    "predict no picture": lambda data, run: ["predict", run, data / "val" / EVIL / f"{EVIL}.png"],
    "show": lambda data, run: [*_show(data), "--sample", "13"],
    "preview": lambda data, run: [*_show(data, "preview"), "data.max_bad_fraction=0.5"],
    "attention": lambda data, run: ["show", "attention", run, data / "val" / "blue" / "0.png", "--out", run / "x.png"],
    "runs list": lambda data, run: ["runs", "list", run.parent],
    "runs diff": lambda data, run: ["runs", "diff", run, run],
    "runs curves": lambda data, run: ["runs", "curves", run, "--out", run / "x.png"],
    "export": lambda data, run: ["export", run, run / "x.safetensors"],
    "resume": lambda data, run: ["train", "--resume", run],
    "unknown field": lambda data, run: ["train", data.parent / "r.yaml", f"data.{EVIL}=1"],
    "unknown section": lambda data, run: ["recipes", "show", data.parent / "keys.yaml", "--resolved"],
}
SLOW = {"data check", "train", "eval", "preview", "attention", "export", "runs curves", "show"}
"""More than a tenth of a second. What they have in common with the others is tried in the default tier."""


def _show(data, verb="show"):
    return ["data", verb, data.parent / "r.yaml", f"data.root={data}", "--out", data.parent / "x.png"]


@pytest.mark.parametrize(
    "command", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in COMMANDS]
)
def test_a_name_is_one_printable_line(command, renamed, evil_run, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(RECIPE)
    (tmp_path / "keys.yaml").write_text(json.dumps({EVIL: 1, "model": {EVIL: EVIL, "name": EVIL}}))
    cli([str(word) for word in COMMANDS[command](renamed, evil_run)])
    printed = capfd.readouterr()
    assert "Traceback" not in printed.err
    assert_harmless(*printed)


def test_names_of_tensors(bare, tmp_path, capsys):
    tensors = load_file(bare)
    evil = {f"{name}{EVIL}": tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors | evil, tmp_path / "more.safetensors")
    save_file(evil, tmp_path / "other.safetensors")
    save_file(tensors, tmp_path / "known.safetensors", {KNOWN: json.dumps({EVIL: 1, "num_classes": EVIL})})
    torch.save({EVIL: tensors, "b": {"x": tensors}}, tmp_path / "nested.pth")
    torch.save({"model": evil}, tmp_path / "named.pth")
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(Exception) as error:  # noqa: PT011 - whichever; what is printed is asked for
            fastdeit.load(path, model="deit_digits_distilled_patch8_32")
        assert cli(["predict", str(path), "x.png", "--model", "deit_digits_distilled_patch8_32"]) == 2
        assert_harmless(capsys.readouterr().err, str(error.value), "(FORGED need not be named)")


# ---- where everything is printed -------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_tables_and_messages(capsys):
    stream, terminal = io.StringIO(), Terminal()
    table([(EVIL, "[red]x[/red]")], (EVIL, "b"), stream)
    Progress(2, 1, stream=stream).message(EVIL)
    assert_harmless(stream.getvalue())
    with Progress(2, 1, stream=terminal) as progress:
        progress.message(f"[bold]{EVIL}")
    table([(EVIL, "[red]x[/red]")], (), terminal)
    assert "[bold]a\\x1b[2J" in terminal.getvalue(), "neither a code of the terminal nor markup of rich"
    assert "[red]x[/red]" in terminal.getvalue()
    assert "\x1b[2J" not in terminal.getvalue()


def test_a_traceback(capsys, monkeypatch):
    def broken(argv, began):
        raise RuntimeError(EVIL)

    monkeypatch.setattr("fastdeit.cli._dispatch", broken)
    assert cli(["train"]) == 1
    printed = capsys.readouterr().err
    assert "Traceback" in printed
    assert all(char.isprintable() or char == "\n" for char in printed)


NAMES = [pytest.param(name, marks=pytest.mark.slow) for name in (EVIL, "$" * 7, "x" * 10**6, "\udcff", "_hidden")]


@pytest.mark.parametrize("name", ["a$\\frac{$", *NAMES])
def test_pictures(tmp_path, curves, name):
    """matplotlib takes what stands between dollars for TeX, and raises where it is none."""
    record = {"kind": "train", "epoch": 1.0, "loss": 1.0, "lr": 0.1, "step": 1}
    judged = {"kind": "eval", "epoch": 1.0, f"top1_{name}": 50.0, "step": 1}
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(json.dumps(each) + "\n" for each in (record, judged)))
    report.curves(log, tmp_path / "curves.png")
    report.compare({name: log}, tmp_path / "both.png")
    with Image.open(tmp_path / "curves.png") as one, Image.open(tmp_path / "both.png") as both:
        assert max(*one.size, *both.size) < 2000


def test_what_a_notebook_shows(evil_run):
    evil = evil_run.rename(evil_run.with_name("<script>alert(1)<_script>"))
    shown = fastdeit.Run(evil)._repr_html_()
    assert "&lt;script&gt;" in shown
    assert "<script" not in shown


def test_the_texts():
    assert text.one_line("a b é 漢 ß") == "a b é 漢 ß"
    assert text.one_line("a\nb\x1b[0m\x85\u202e\ud800") == r"a\nb\x1b[0m\x85\u202e\ud800"
    assert text.lines("a\rb\n\x0bc") == [r"a\rb", r"\x0bc"]
    assert text.some(["a\n", "b", "c", "d"]) == r"a\n, b, c and 1 more"
    assert text.did_you_mean("abc", ["abc\n"]) == r"; did you mean abc\n?"
    assert text.for_picture("a$b", 3) == r"a\$b"
    assert text.for_picture("abcdef", 5) == "ab..."
