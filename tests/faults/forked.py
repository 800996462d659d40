"""Commands as processes that are forked from one which has imported all they need.

An interpreter that imports PyTorch costs seconds of a processor, a fork a tenth of one. What a command does is the
same: it has its own environment, folder, output, signals and exit code.
"""

import os
import runpy
import signal
import subprocess
import sys
from multiprocessing import get_context

from tests.conftest import PRELOADED

MORE = "fastdeit.cli", "fastdeit.data.execute.dali", "fastdeit.kernels.trial", "tests.faulty_ranks"
BY_DEFAULT = signal.SIGHUP, signal.SIGTERM, signal.SIGQUIT, signal.SIGUSR1


class Command:
    """`fastdeit WORDS` in `folder`, with the environment `env`; has what tests use of `subprocess.Popen`."""

    def __init__(self, words, folder, env, name):
        context = get_context("forkserver")
        context.set_forkserver_preload([*PRELOADED, *MORE])
        self._texts = [folder / f"{name}.{stream}" for stream in ("out", "err")]
        for text in self._texts:
            text.touch()
        self._process = context.Process(target=_be, args=([str(word) for word in words], folder, env, self._texts))
        self._process.start()

    def send_signal(self, number):
        os.kill(self._process.pid, number)

    def kill(self):
        self._process.kill()

    def communicate(self, timeout=None):
        """What it has said, once it has ended."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout)
        return tuple(text.read_text() for text in self._texts)

    @property
    def returncode(self):
        return self._process.exitcode


def _be(words, folder, env, texts):
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    for descriptor, text in zip((1, 2), texts, strict=True):
        os.dup2(os.open(text, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    for stream, descriptor in (("stdout", 1), ("stderr", 2)):
        setattr(sys, stream, open(descriptor, "w", closefd=False))  # noqa: SIM115 - for the life of the process
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the server that forks ignores it
    for number in BY_DEFAULT:
        signal.signal(number, signal.SIG_DFL)
    sys.argv = ["fastdeit", *words]
    code = 1
    try:
        runpy.run_module("fastdeit", run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
