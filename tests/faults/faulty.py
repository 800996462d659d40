"""What the tests of faults share: small checkpoints, faults at chosen points, and children that may be killed."""

import os
import signal

import torch

from fastdeit.engine import _fault, checkpoint
from fastdeit.engine.background import HostCopies, Worker

torch.set_num_threads(1)


def tensors(value):
    return {"model": {"w": torch.full((64, 64), float(value))}, "optim": {"m": torch.full((32,), float(value))}}


def save(root, step, background=False):
    """Save the checkpoint of `step`; in the background as `engine.async_checkpoints` does, and wait for it."""
    if not background:
        checkpoint.save(root, step, tensors(step), {"step": step})
        return
    worker, copies = Worker(), HostCopies().of(tensors(step))
    worker.begin(lambda: checkpoint.save(root, step, copies, {"step": step}))
    worker.result()


def never(path, reason):
    raise AssertionError(f"{path} reported as damaged: {reason}")


def assert_intact(found, step):
    """The checkpoint is the one of `step`, whole."""
    assert found.step == found.state["step"] == step
    for file, group in tensors(step).items():
        for name, tensor in group.items():
            assert torch.equal(found.tensors[file][name], tensor)


def leftovers(root):
    return [name for name in os.listdir(root) if not name.startswith("step_")]


def in_child(action):
    """Run `action` in a forked child and return its wait status."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            action()
            status = 0
        finally:
            os._exit(status)
    return os.waitpid(child, 0)[1]


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Nth:
    """A fault at the n-th point: the callback `fault`, called with the point's name."""

    def __init__(self, n, fault):
        self.n, self.fault, self.names = n, fault, []

    def __call__(self, name):
        self.names.append(name)
        if len(self.names) - 1 == self.n:
            self.fault(name)


def points(action):
    """Names of the fault points `action` passes."""
    seen = Nth(-1, None)
    with _fault.inject(seen):
        action()
    return seen.names
