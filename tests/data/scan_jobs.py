"""What a process of `data.sources.scan` runs in the tests: found by its name, and quick to import in each process."""

import os
import signal
import sys
import time
from pathlib import Path

PATHS = [f"train-{number:04d}.tar" for number in range(11)]


def who(path):
    return path, os.getpid()


def modules(path):
    return set(sys.modules)


def session(path):
    return os.getsid(0)


def killed(caller, path):
    if os.getpid() != caller and path == PATHS[5]:
        os.kill(os.getpid(), signal.SIGKILL)
    return path


def fails(path):
    return 1 // (path != PATHS[9])


def meets(folder, path):
    """Waits for the others of its part."""
    place = PATHS.index(path)
    Path(folder, path).touch()
    for other in PATHS[place // 4 * 4 : place // 4 * 4 + 4]:
        until(Path(folder, other).exists)
    return path


def hangs_behind_the_first(path):
    if path not in PATHS[:4]:
        time.sleep(20)
    return path


def outlives_its_starter(path):
    if path in PATHS[8:]:
        starter = os.getppid()
        until(lambda: os.getppid() != starter)
    return path, os.getpid()


def until(condition):
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.01)
    raise TimeoutError
