"""`fastdeit submit`: what SLURM is given, by an sbatch that keeps it, and what a job does when it is told to end."""

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("submitit")

from fastdeit.cli import main
from fastdeit.errors import FastdeitError
from fastdeit.verbs import submit
from fastdeit.verbs.submit import Job

SBATCH = """#!/bin/sh
cp "$1" "$(dirname "$0")/given.sh"
echo "Submitted batch job 4711"
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A cluster that keeps what it is given in `given.sh`."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", "#!/bin/sh\n")):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tools


def test_slurm_is_asked_for_machines_a_warning_and_to_take_the_job_again(slurm, capsys):
    words = "digits", "train.epochs=3", "--hours", "2", "--nproc", "4", "--nnodes", "2", "--run-dir", "runs/mine"
    assert main(["submit", *words, "--slurm", "partition=gpu", "--slurm", "gpus-per-node=4"]) == 0
    assert capsys.readouterr().out.startswith("job 4711 submitted; the run will be in ")
    given = (slurm / "given.sh").read_text()
    wanted = {"nodes=2", "ntasks-per-node=1", "time=120", "partition=gpu", "gpus-per-node=4", "requeue"}
    assert wanted | {f"signal={submit.SIGNAL}@{submit.WARNING_S}"} <= set(re.findall(r"^#SBATCH --(.*)$", given, re.M))
    assert "export SUBMITIT_PREEMPT_SIGNAL=USR1" in given


def test_without_slurm_submit_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert main(["submit", "digits", "--hours", "1"]) == 2
    assert "there is no SLURM here" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_job_begins_its_run_or_goes_on_with_it(tmp_path, monkeypatch):
    job = Job(["train", "digits"], tmp_path, 4, 2, ["fastdeit"])
    launcher = ["--nproc", "4", "--nnodes", "2", "--rdzv", "n1:20007"]
    assert job.command(7, "n1") == ["fastdeit", "train", "digits", "--run-dir", str(tmp_path), "--resume", *launcher]
    monkeypatch.setattr("fastdeit.run.directory.can_go_on", lambda run: True)
    assert job.command(12007, "n1") == ["fastdeit", "train", "--resume", str(tmp_path), *launcher]
    assert Job(["train"], tmp_path, 1, 1, ["fastdeit"]).command(7, "n1")[-2:] == ["--nproc", "1"]


def test_code_of_the_users_own_is_trusted_when_the_job_goes_on(slurm, monkeypatch, capsys):
    jobs = []
    monkeypatch.setattr(
        "submitit.SlurmExecutor.submit", lambda self, job: jobs.append(job) or SimpleNamespace(job_id=1)
    )
    words = "digits", "--hours", "1", "--run-dir"
    assert main(["submit", *words, "runs/mine", "model.name=tests.small_runs:Tiny"]) == 0
    assert main(["submit", *words, "runs/theirs", "--trust"]) == 0
    assert main(["submit", *words, "runs/plain"]) == 0
    monkeypatch.setattr("fastdeit.run.directory.can_go_on", lambda run: True)
    assert ["--trust" in job.command(7, "n1") for job in jobs] == [True, True, False]


RUN = """
import os, signal, sys
code = int(sys.argv[1])
if code < 100:
    sys.exit(code)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
signal.sigwait([signal.SIGUSR1])
sys.exit(code - 100)
"""


def job_of(tmp_path, code, monkeypatch):
    monkeypatch.setattr(
        "submitit.JobEnvironment", lambda: SimpleNamespace(raw_job_id="7", hostnames=["n1"], global_rank=0)
    )
    return Job(["train"], tmp_path, 1, 1, [sys.executable, "-c", RUN, str(code)])


@pytest.mark.parametrize("code", [0, 3])
def test_a_job_ends_as_its_run_does(tmp_path, monkeypatch, code):
    job = job_of(tmp_path, code, monkeypatch)
    if code == 0:
        job()
        return
    with pytest.raises(FastdeitError, match="ended with exit code 3"):
        job()


@pytest.mark.parametrize(("code", "again"), [(75, True), (1, False)])
def test_a_job_that_is_told_to_end_waits_until_its_run_has_saved(tmp_path, monkeypatch, code, again):
    """The signal comes while the job waits for the run, so the handler waits for the same process."""
    job, found = job_of(tmp_path, 100 + code, monkeypatch), []
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])  # as the run will have it, from its first moment
    before = signal.signal(signal.SIGUSR2, lambda number, frame: found.append(job.checkpoint()))
    started = subprocess.Popen

    def popen(*args, **options):
        process = started(*args, **options)
        threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGUSR2)).start()
        return process

    monkeypatch.setattr(submit.subprocess, "Popen", popen)
    try:
        with pytest.raises(FastdeitError, match=f"exit code {code}"):
            job()
    finally:
        signal.signal(signal.SIGUSR2, before)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    assert [each is not None for each in found] == [again]
    if again:
        assert found[0].function == Job(job.train, Path(tmp_path), 1, 1, job.program)
