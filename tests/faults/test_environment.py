"""Environment variables with garbage: a run works as if they were unset, or is refused in a sentence with exit code 2.

The table has every variable that the sources name; one that is new fails until it stands here.
"""

import ast
import re
from pathlib import Path

import pytest

import fastdeit
from fastdeit import kernels, training
from fastdeit.cli import main as cli
from fastdeit.kernels import _asked

GARBAGE = "", "garbage", "-1", "0", "1e9", "99999999999999999999", "a\x1b[2Jb\nfastdeit: done", "x" * 5000
FOLDERS = "/nonexistent", "/dev/null", "/proc", "~/x", "x" * 5000
NUMBERS = [
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR"),
    *("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "FASTDEIT_BEGAN", "FASTDEIT_LAUNCHER_PID"),
    *("SLURM_JOB_ID", "SLURM_LOCALID", "SLURM_PROCID", "SLURM_STEP_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS"),
    *("SLURM_STEP_TASKS_PER_NODE", "TERM", "COLUMNS", "NO_COLOR", "FASTDEIT_KERNELS", "FASTDEIT_NATIVE"),
    *("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "TORCHELASTIC_USE_AGENT_STORE"),
    "TORCH_ELASTIC_SHUTDOWN_TIMEOUT",
]
PATHS = ["FASTDEIT_CACHE", "CUDA_HOME", "CUDA_PATH", "HOME", "TMPDIR", "XDG_CACHE_HOME"]
ELSEWHERE = {"TRITON_CACHE_DIR", "TRITON_DUMP_PTXAS_LOG", "TRITON_INTERPRET", "TORCH_CUDNN_SDPA_AVOID_RECOMPILE"}
"""Set by fastdeit for Triton, and never read by it; and with the last one cuDNN's attention is refused by name."""
AS_UNSET = {
    "RANK": (),
    "WORLD_SIZE": (),
    "LOCAL_RANK": ("0",),
    "FASTDEIT_KERNELS": ("",),
    "FASTDEIT_NATIVE": ("", "0"),
}
"""Variables of which garbage is refused, and the values that are none; every other is not read, or does as if unset."""
REFUSED = {*AS_UNSET, "LOCAL_WORLD_SIZE", "OMP_NUM_THREADS", "SLURM_STEP_NUM_TASKS"}


@pytest.fixture
def started(monkeypatch, tmp_path):
    """`started()` is `fastdeit train` up to the first of its parts; (the exit code, whether it came there)."""
    for name in (*NUMBERS, "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    reached = []

    def train(recipe, *_, **__):
        kernels.info()
        reached.append(recipe)

    monkeypatch.setattr(training, "train", train)
    words = ["train", "digits", "engine.device=cpu", "--run-dir", str(tmp_path / "run")]

    def start():
        _asked.environment.cache_clear()
        reached.clear()
        return cli(words), bool(reached)

    yield start
    monkeypatch.undo()
    _asked.environment.cache_clear()


@pytest.mark.parametrize("name", [*NUMBERS, *PATHS])
def test_garbage_is_refused_in_a_sentence_or_does_nothing(started, monkeypatch, capsys, name):
    codes = {}
    for value in GARBAGE if name in NUMBERS else FOLDERS:
        monkeypatch.setenv(name, value)
        code, reached = started()
        said = capsys.readouterr().err
        assert (code, reached) in ((0, True), (2, False)), (value, said)
        assert len(said.splitlines()) == (code == 2), said
        assert said.rstrip("\n").isprintable()
        assert code == 0 or name in said
        assert len(said) < 6000
        codes[value] = code
    if name in REFUSED:
        assert codes["garbage"] == 2
        assert all(codes[value] == 0 for value in AS_UNSET.get(name, ()))
    else:
        assert set(codes.values()) == {0}


def named():
    """Every variable that the sources name in a string of its own."""
    pattern = re.compile(
        "(FASTDEIT|SLURM|TORCH|TORCHELASTIC|TRITON|OMP|MASTER|CUDA|XDG|LOCAL|GROUP)_[A-Z_]+|RANK|WORLD_SIZE|TERM|HOME"
    )
    for path in Path(fastdeit.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and pattern.fullmatch(node.value):
                yield node.value


@pytest.mark.slow
def test_the_table_has_every_variable_that_the_sources_name():
    assert set(named()) - {*NUMBERS, *PATHS} == ELSEWHERE
