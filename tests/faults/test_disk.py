"""A disk that refuses, for every file of a run, with every error, at its first and its last writing.

The cases are generated: a run is watched once, and whatever it writes, syncs, renames or removes is a case.
"""

import errno
import operator
import os
import re
import resource
import shlex
import signal

import pytest
import torch

from fastdeit.cli import main as cli
from fastdeit.engine import _fault, checkpoint, disk, report
from fastdeit.engine.dist import World
from fastdeit.errors import FastdeitError, UsageError
from fastdeit.recipe import resolve as recipes
from fastdeit.run import directory
from fastdeit.run.record import RunLog
from fastdeit.training import train
from tests.faults.faulty import Nth, in_child, never, points, save
from tests.small_runs import assert_same_weights

RECIPE = """\
model: {name: "tests.small_runs:Tiny", image_size: 32}
method: {use: supervised}
data: {source: synthetic, synthetic_samples: 24, synthetic_classes: 2, group_size: 2, mixup: 0, cutmix: 0, repeats: 1}
optim: {lr: 1e-3, warmup_epochs: 0}
train: {epochs: 3, batch_size: 12}
engine: {device: cpu, log_every: 1, checkpoint_every: 0.5}
"""
TOTAL = 6
WAYS = {"waited for": (), "in the background": ("engine.async_checkpoints=true",)}
"""How checkpoints are written: the overrides for it."""
ERRORS = {"ENOSPC": errno.ENOSPC, "EROFS": errno.EROFS, "EDQUOT": errno.EDQUOT, "EIO": errno.EIO}
HARMLESS = "curves.png"
"""What is drawn from other files."""


def write(folder):
    (folder / "small.yaml").write_text(RECIPE)
    return folder / "small.yaml"


def small(folder, *overrides):
    return recipes.load(str(write(folder)), overrides)


def run_of(folder, *overrides, resume=False):
    return train(small(folder, *overrides), folder / "run", World(torch.device("cpu")), resume=resume)


def file_of(point):
    """The file of a run that the point belongs to: a checkpoint is one, whatever its step."""
    name = re.sub(r"^\.tmp-", "", point.split()[-1])
    if name.endswith(".safetensors") or name in ("manifest.json", "checkpoints") or name.startswith("step_"):
        return "checkpoint"
    return name


class Refuses:
    """From the `after`-th point of `file` on (-1: the last of `count`), the disk refuses whatever is done to it."""

    def __init__(self, file, number, at=0):
        self.file, self.number, self.at, self.seen = file, number, at, 0

    def __call__(self, point):
        if file_of(point) != self.file:
            return
        self.seen += 1
        if self.seen > self.at:
            raise OSError(self.number, os.strerror(self.number), point.split()[-1])


@pytest.fixture(scope="module")
def watched(tmp_path_factory, curves):
    """(an undisturbed run, {file: how often something is done to it})."""
    folder = tmp_path_factory.mktemp("watched")
    counts = {}

    def count(point):
        counts[file_of(point)] = counts.get(file_of(point), 0) + 1

    with _fault.inject(count):
        run_of(folder)
    return folder / "run", counts


FILES = ("lock.json", "checkpoint", "recipe.yaml", "environment.json", "metrics.jsonl", "summary.json", HARMLESS)
DEFAULT = {("checkpoint", "ENOSPC", "last"), ("metrics.jsonl", "EDQUOT", "middle")}
WHEN = "first", "middle", "last"
WRITTEN = [*(("waited for", file) for file in FILES), ("in the background", "checkpoint")]
CASES = [
    pytest.param(way, file, name, when, marks=[] if (file, name, when) in DEFAULT else [pytest.mark.slow])
    for place, (way, file) in enumerate(WRITTEN)
    for number, name in enumerate(ERRORS)
    for when in [WHEN[(place + number + 1) % 3]]
]
"""Every file with every error, every file at every time, and every error at every time."""


def test_the_cases_have_every_pair():
    cases = [case.values for case in CASES]
    assert {(way, file, error) for way, file, error, _ in cases} == {
        (*each, error) for each in WRITTEN for error in ERRORS
    }
    assert {(way, file, when) for way, file, _, when in cases} == {(*each, when) for each in WRITTEN for when in WHEN}
    assert {(error, when) for _, _, error, when in cases} == {(error, when) for error in ERRORS for when in WHEN}
    assert {case[1:] for case in cases} >= DEFAULT


def test_the_cases_are_all_files_that_a_run_writes(watched):
    run, counts = watched
    ours = {name for name in counts if name not in (run.name, run.parent.name)}
    assert ours == set(FILES)
    written = {path.name for path in run.iterdir()} - {"checkpoints"}
    assert written <= set(FILES)
    assert {*FILES, "bad_images.jsonl", "wandb_id"} - {"checkpoint"} == directory._WRITTEN, "else it may be a link"


@pytest.mark.parametrize(("way", "file", "name", "when"), CASES)
def test_a_disk_that_refuses_a_file(tmp_path, watched, capsys, way, file, name, when):
    whole, counts = watched
    number = ERRORS[name]
    at = {"first": 0, "middle": counts[file] // 2, "last": counts[file] - 1}[when]
    with _fault.inject(Refuses(file, number, at)):
        if file == HARMLESS:
            run_of(tmp_path, *WAYS[way])
        else:
            with pytest.raises(FastdeitError) as stop:
                run_of(tmp_path, *WAYS[way])
    if file == HARMLESS:
        assert "curves.png was not drawn" in capsys.readouterr().out
        assert_same_weights(whole, tmp_path / "run", TOTAL)
        return
    said = str(stop.value)
    assert os.strerror(number) in said
    assert str(tmp_path / "run") in said
    assert disk.way_out(OSError(number, "")) in said
    assert re.search("go on with `|start it again|choose another --run-dir", said)
    assert stop.value.exit_code == 1
    if (tmp_path / "run").exists():
        root = tmp_path / "run" / "checkpoints"
        checkpoint.newest(root, never)
        assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".tmp-")]
    command = re.search("go on with `([^`]*)`", said)
    # Once it is mended, the command goes on, and nothing is lost.
    if command:
        assert cli(shlex.split(command[1])[1:]) == 0
    else:
        run_of(tmp_path)
    assert_same_weights(whole, tmp_path / "run", TOTAL)
    assert (tmp_path / "run" / "summary.json").exists()


def test_what_the_disk_refuses_of_tensors_keeps_its_number(tmp_path):
    """In earnest: files can have 1,000 bytes. safetensors tells of it in words alone, and the way out depends on it."""

    def fill():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
        with pytest.raises(checkpoint.CheckpointError, match=": File too large; earlier") as refused:
            save(tmp_path, 1)
        assert refused.value.__cause__.errno == errno.EFBIG

    assert in_child(fill) == 0


# ---- where the run goes on -------------------------------------------------------------------------------------------


class RefusesFor(Refuses):
    """Refuses the first `times` times, and then no more."""

    def __init__(self, file, number, times):
        super().__init__(file, number)
        self.times = times

    def __call__(self, point):
        if self.times > 0:
            try:
                super().__call__(point)
            except OSError:
                self.times -= 1
                raise


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "file", ["checkpoint", *(pytest.param(f, marks=pytest.mark.slow) for f in ("metrics.jsonl", "summary.json"))]
)
def test_a_run_that_is_to_go_on_says_so_and_does(tmp_path, watched, capsys, file, way):
    whole, _ = watched
    skip = {"checkpoint": 1, "metrics.jsonl": 5, "summary.json": 0}[file]  # not what the start of a run needs
    fault = RefusesFor(file, errno.ENOSPC, 2)
    fault.at = skip
    with _fault.inject(fault):
        run_of(tmp_path, "engine.on_save_error=warn", *WAYS[way])
    assert fault.times == 0
    out = capsys.readouterr().out
    assert out.count("warning: ") == (2 if file == "checkpoint" else 1), "the same words are said once"
    assert "the run goes on (engine.on_save_error is warn), and tries the next time again" in out
    assert_same_weights(whole, tmp_path / "run", TOTAL)


@pytest.mark.parametrize("way", WAYS)
def test_a_best_that_could_not_be_saved_costs_no_earlier_one(tmp_path, monkeypatch, way):
    """Else the checkpoint of the earlier best would go, and @best would name one that is not there."""
    values, save = iter((5.0, 9.0, 1.0)), checkpoint.save

    def refuse(root, step, *rest):
        if step == 4:
            raise checkpoint.CheckpointError("the checkpoint of step 4 was not saved")
        return save(root, step, *rest)

    monkeypatch.setattr(RunLog, "_judged_by", lambda self, results: ("top1_class", next(values), operator.gt))
    monkeypatch.setattr(checkpoint, "save", refuse)
    run_of(tmp_path, "engine.on_save_error=warn", *WAYS[way])
    root = tmp_path / "run" / "checkpoints"
    assert checkpoint.newest_state(root)["record"]["best_step"] == 2
    assert checkpoint.steps(root) == [2, 5, 6]


@pytest.mark.parametrize("way", WAYS)
def test_the_last_checkpoint_is_never_given_up(tmp_path, watched, way):
    def refuse(point):
        if file_of(point) == "checkpoint" and not point.startswith("mkdir"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with _fault.inject(refuse), pytest.raises(FastdeitError, match=f"step {TOTAL} was not saved") as stop:
        run_of(tmp_path, "engine.on_save_error=warn", *WAYS[way])
    run = tmp_path / "run"
    again = ["train", str(run / "recipe.yaml"), "--run-dir", str(run), "--resume"]
    with pytest.raises(UsageError, match="no checkpoint to go on from") as no_checkpoint:
        directory.recipe_of(run)
    with pytest.raises(UsageError, match="already holds a run") as taken:
        directory.check_free(run, resume=False)
    for error in (stop, no_checkpoint, taken):  # no way out leads to another refusal
        assert f"with `{shlex.join(['fastdeit', *again])}`" in str(error.value)
    assert cli(again) == 0
    assert_same_weights(watched[0], run, TOTAL)


def refused_on_main(rank, size, folder, overrides):
    """A run of which the disk of the main process is full: what each process is told, and its exit code."""
    with _fault.inject(Refuses("checkpoint", errno.ENOSPC, 1 if rank == 0 else 10**9)):
        try:
            recipe = recipes.load(str(folder / "small.yaml"), overrides)
            train(recipe, folder / "run", World(torch.device("cpu"), rank, size))
        except FastdeitError as error:
            return str(error), error.exit_code
    return None


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_every_process_is_told(tmp_path, ranks, way):
    small(tmp_path)
    one, other = ranks(2, refused_on_main, tmp_path, WAYS[way])
    assert one == other
    assert "step 1 was not saved" in one[0]
    assert one[1] == 1


# ---- what is on the disk after a power cut ---------------------------------------------------------------------------


def test_a_new_directory_and_a_new_file_are_synced_with_the_folder_they_are_in(tmp_path):
    seen = []
    with _fault.inject(seen.append):
        disk.make_directory(tmp_path / "checkpoints")
        disk.make_directory(tmp_path / "checkpoints")
        disk.replace_text(tmp_path / "recipe.yaml", "text")
    assert seen == [
        *("mkdir checkpoints", f"fsync {tmp_path.name}", "mkdir checkpoints"),
        *("write recipe.yaml", "fsync .tmp-recipe.yaml", "rename recipe.yaml", f"fsync {tmp_path.name}"),
    ]
    assert (tmp_path / "recipe.yaml").read_text() == "text"


@pytest.mark.parametrize("number", ERRORS.values(), ids=list(ERRORS))
def test_a_file_that_cannot_be_replaced_stays(tmp_path, number):
    path = tmp_path / "summary.json"
    path.write_text("old")

    def fail(point):
        raise OSError(number, os.strerror(number))

    names = points(lambda: disk.replace_text(path, "old"))
    for at in range(len(names) - 1):  # once it is renamed, only a power cut could bring the old one back
        with (
            _fault.inject(Nth(at, fail)),
            pytest.raises(disk.DiskError, match=re.escape(f"{path} could not be written: {os.strerror(number)}; ")),
        ):
            disk.replace_text(path, "new")
        assert path.read_text() == "old"
        assert os.listdir(tmp_path) == ["summary.json"]


# ---- pictures and sinks ----------------------------------------------------------------------------------------------


def test_a_picture_that_cannot_be_drawn_costs_nothing(tmp_path, monkeypatch, capsys):
    def broken(*args):
        raise RuntimeError("no font")

    monkeypatch.setattr(report, "curves", broken)
    assert cli(["train", str(write(tmp_path)), "--run-dir", str(tmp_path / "run")]) == 0
    assert "curves.png was not drawn (RuntimeError: no font); the run goes on" in capsys.readouterr().out
