"""`fastdeit submit`: a run as a job of SLURM, by submitit, which writes the script and takes care of requeueing.

On each machine one task runs `fastdeit train --nproc N`, whose launcher starts the processes, saves, and reports. SLURM
announces the time limit, and preemption where it is set up to, with SIGUSR1: the run saves and ends with 75, and the
job goes back into the queue with the same directory. A job that `scancel` ends stays away.

submitit keeps the job as a pickle in the run's own folder `slurm/`, and loads it when the job begins. Whoever may write
there may run code as the owner of the job, as with any script of a job.
"""

import argparse
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from fastdeit.errors import FastdeitError, Interrupted, UsageError
from fastdeit.run import directory

SIGNAL = "USR1"
WARNING_S = 120
"""Seconds before its time limit that a job is told."""
_PORTS = range(20000, 32000)


@dataclass
class Job:
    """What a task of the job runs; submitit calls it, and `checkpoint` once the job is told to end.

    train    the command that begins the run, without its directory
    run      the directory of the run
    options  of the launcher
    """

    train: list[str]
    run: Path
    nproc: int
    nnodes: int
    program: list[str] = field(default_factory=lambda: [sys.executable, "-m", "fastdeit"])
    _pid: int | None = field(default=None, repr=False)

    def command(self, job: int, host: str) -> list[str]:
        """The command of one machine: to begin the run, or to go on with it. `host` is the first machine of `job`."""
        words = ["train", "--resume", str(self.run), *(word for word in self.train if word == "--trust")]
        if not directory.can_go_on(self.run):
            words = [*self.train, "--run-dir", str(self.run), "--resume"]
        meeting = f"{host}:{_PORTS[job % len(_PORTS)]}"
        nodes = ["--nnodes", str(self.nnodes), "--rdzv", meeting] if self.nnodes > 1 else []
        return [*self.program, *words, "--nproc", str(self.nproc), *nodes]

    def __call__(self) -> None:
        """Train. Raises FastdeitError where that ends with another code than 0."""
        import submitit

        here = submitit.JobEnvironment()
        # The job's own task is no rank: the launcher that it starts gives them.
        env = {name: value for name, value in os.environ.items() if name != "SLURM_STEP_NUM_TASKS"}
        process = subprocess.Popen(self.command(int(here.raw_job_id), here.hostnames[0]), env=env)
        self._pid = process.pid
        code = self._code()
        # The first task alone puts the job into the queue; it is not ended by this one.
        elsewhere = here.global_rank != 0
        if code != 0 and not (elsewhere and code == Interrupted.exit_code):
            raise FastdeitError(f"the run ended with exit code {code}; what it has said stands above")

    def checkpoint(self) -> object:
        """Have the run save and end; the same job for submitit to put into the queue, or None where the run failed."""
        from submitit.helpers import DelayedSubmission

        os.kill(self._pid, getattr(signal, f"SIG{SIGNAL}"))  # SLURM may have told this task alone
        if self._code() not in (0, Interrupted.exit_code):
            return None
        return DelayedSubmission(Job(self.train, self.run, self.nproc, self.nnodes, self.program))

    def _code(self) -> int:
        """The exit code of the run, once it has ended. The child stays a zombie, so that a signal handler that comes in
        between may ask as well."""
        ended = os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOWAIT)
        return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status


def main(args: argparse.Namespace) -> None:
    """Submit the run, and say where it will be. Raises UsageError without submitit or without SLURM."""
    try:
        import submitit
    except ImportError as error:
        raise UsageError("submit needs submitit; install it with pip install fastdeit[slurm]") from error
    if submitit.SlurmExecutor.affinity() < 0:
        raise UsageError("there is no SLURM here: srun is not on the PATH; submit from a login node of the cluster")
    folder = args.run_dir / "slurm"
    executor = submitit.SlurmExecutor(folder=folder, max_num_timeout=10**6)
    given = {key.replace("-", "_"): value for key, value in args.slurm}
    executor.update_parameters(
        job_name=f"fastdeit-{args.run_dir.name}",
        nodes=args.nnodes,
        ntasks_per_node=1,
        time=60 * args.hours,
        setup=[f"export SUBMITIT_PREEMPT_SIGNAL={SIGNAL}"],  # what submitit listens to in the job
        additional_parameters={"requeue": True, "signal": f"{SIGNAL}@{WARNING_S}", **given},
    )
    try:
        job = executor.submit(Job(args.train, args.run_dir, args.nproc, args.nnodes))
    except (subprocess.CalledProcessError, submitit.core.utils.FailedJobError, OSError) as error:
        raise FastdeitError(f"SLURM has not taken the job: {error}") from error
    print(f"job {job.job_id} submitted; the run will be in {args.run_dir}, what it says in {folder}")
