"""A method for real processes that one of them, or all, come to harm in: FAULT="hang 1 3" is rank 1 at step 3.

Whoever comes to the step says so with a file `RANK.STEP` in the folder FAULTS; a fault happens once in that folder.
"""

import ctypes
import os
import signal
import time
from pathlib import Path

from fastdeit.methods.supervised import Supervised

RECIPE = """\
model: {name: "tests.small_runs:Tiny", image_size: 32}
method: {use: "tests.faulty_ranks:Faulty"}
data:
  {source: synthetic, synthetic_samples: 48, synthetic_classes: 4, flip: 0, mixup: 0, cutmix: 0, group_size: 4,
   repeats: 1, mean: [0.3, 0.4, 0.5], std: [0.2, 0.25, 0.3], threads: 1}
optim: {lr: 1e-3, warmup_epochs: 0}
train: {epochs: 3, batch_size: 8, eval_every: 3}
engine: {device: cpu, precision: fp32, threads: 1, checkpoint_every: 0.3333, log_every: 100}
"""
"""Six steps an epoch, a checkpoint every other."""


def wait(step):
    while not (Path(os.environ["FAULTS"]) / f"go.{step}").exists():
        time.sleep(0.01)


def hang(step):
    while True:
        time.sleep(60)


FAULTS = {
    "hang": hang,
    "hold": lambda step: ctypes.PyDLL(None).sleep(3600),  # in C, and no other thread of Python comes to its turn
    "stop": lambda step: os.kill(os.getpid(), signal.SIGSTOP),
    "kill": lambda step: os.kill(os.getpid(), signal.SIGKILL),
    "pause": lambda step: time.sleep(0.05),
    "wait": wait,  # until the test makes the file `go.STEP`
    "raise": lambda step: 1 / 0,
}


class Faulty(Supervised):
    def forward(self, batch):
        if self.training:
            step, rank, folder = int(batch.step.number), os.environ.get("RANK", "0"), Path(os.environ["FAULTS"])
            for fault in os.environ.get("FAULT", "").split(","):
                what, whom, when = fault.split() if fault else ("pause", "nobody", "0")
                if whom in (rank, "all") and when in (str(step), "all"):
                    mark = folder / f"{what}.{rank}.{step}"
                    if what == "pause" or not mark.exists():
                        mark.touch()
                        FAULTS[what](step)
            (folder / f"{rank}.{step}").touch()
        return super().forward(batch)
