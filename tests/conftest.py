"""Shared by all tests: one compute thread, so that results do not depend on the core count; Triton's interpreter where
there is no card, or with FASTDEIT_IR=90 compiled kernels on the CPU; signals that a shell has ignored are heard; two
workers for whole folders; and `ranks`."""

import os
import random
import shutil
import signal
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from packaging.version import Version

from tests.process_of_ranks import be_rank, without_curves

torch.set_num_threads(1)
for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[name] = "1"  # for the processes that tests start, and so that `fastdeit train` in this one takes no more
TIMEOUT_S = 120
WORKERS = 2
PRELOADED = "torch", "torch.distributed", "torch._dynamo", "fastdeit.kernels", "fastdeit.training"
"""What a rank needs besides the test's own module; DistributedDataParallel imports torch._dynamo, for a second."""
COMPILED = "FASTDEIT_IR" in os.environ and not torch.cuda.is_available()
"""Whether tests marked gpu run without a card, on kernels compiled for the architecture that the variable names."""
if not torch.cuda.is_available() and not COMPILED:
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of fastdeit.kernels
# Tests send themselves signals that `pytest &` in a script and `nohup pytest` ignore. A hangup still ends no tests.
for number, heard in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, lambda *_: None)):
    if signal.getsignal(number) is signal.SIG_IGN:
        signal.signal(number, heard)


def pytest_configure():
    """Refuses versions with which nothing that is asked for can run, rather than to fail or skip every test.

    Triton before 3.7 makes an int of an array in its interpreter, which numpy has refused since 2.4. What runs compiled
    kernels on the CPU is made for one version of Triton.
    """
    found = version("triton")  # whoever imports it earlier than the tests do gets no interpreter
    new = Version(np.__version__) >= Version("2.4")
    if "TRITON_INTERPRET" in os.environ and Version(found) < Version("3.7") and new:
        raise pytest.UsageError(
            f"the interpreter of Triton {found} does not run with numpy {np.__version__}: pip install 'numpy<2.4', "
            "or a newer torch"
        )
    if COMPILED:
        from tests.kernels.ir import executed  # of newer versions of Triton than the oldest that is supported

        if reason := executed.unavailable():
            raise pytest.UsageError(f"FASTDEIT_IR: {reason}")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Folders are shared by two workers (pytest-xdist), which costs the start of two interpreters; files and single
    tests run here, and so does everything under `--pdb`, `-n 0` or `-p no:xdist`.

    Each worker begins with one half of the tests, in their order, so that the fixtures of a module are made once. The
    worker that is done first takes over some of the other's tests.
    """
    option = config.option
    asked = getattr(option, "numprocesses", 0) is not None or option.dist != "no" or option.usepdb
    if not asked and not hasattr(config, "workerinput") and any(Path(arg).is_dir() for arg in config.args):
        option.numprocesses, option.dist = WORKERS, "worksteal"


def pytest_ignore_collect(collection_path, config):
    """`pytest -m gpu` reads only files that have such a test. A machine with a card may lack what the others import,
    and a file that cannot be collected ends the session. `pytest -m slow` leaves out the others as well, for they would
    be half of what each worker imports."""
    if not collection_path.name.startswith("test_"):
        return None
    if config.option.markexpr in ("gpu", "card"):
        kernels = "kernels" in collection_path.parent.parts  # there the fixture `device` has the mark
        return None if kernels or "mark.gpu" in collection_path.read_text() else True
    if config.option.markexpr == "slow":
        return None if "mark.slow" in collection_path.read_text() else True
    return None


def pytest_collection_modifyitems(config, items):
    """Without a card, tests of one are not even skipped: they would fill the report."""
    if not torch.cuda.is_available():
        without = ("card",) if COMPILED else ("card", "gpu")
        left_out = [item for item in items if any(map(item.get_closest_marker, without))]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """What a test draws does not depend on the tests before it, which are others on every machine."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def modes():
    """What PyTorch keeps for a whole thread, and a test that leaves it changed passes on to those after it."""
    return {
        "saved tensor hooks are refused because": torch._C._autograd._saved_tensors_hooks_get_disabled_error_message(),
        "level of torch.func": torch._C._functorch.maybe_current_level(),
        "level of forward-mode AD": torch.autograd.forward_ad._current_level,
        "grad mode": torch.is_grad_enabled(),
        "keys of dispatch": [
            str(keys()) for keys in (torch._C._dispatch_tls_local_include_set, torch._C._dispatch_tls_local_exclude_set)
        ],
        "default dtype": torch.get_default_dtype(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
    }


@pytest.fixture(autouse=True)
def modes_stay():
    """Fails the test that leaves a mode of PyTorch changed, rather than one that happens to run after it."""
    before = modes()
    yield
    assert modes() == before


@pytest.fixture(scope="session", autouse=True)
def no_curves():
    """Runs of tests draw no curves, which takes longer than most of them. The fixture `curves` undoes this."""
    return without_curves()


@pytest.fixture(scope="module")
def curves(no_curves):
    """Runs of this module draw their curves, as those of users do."""
    report, draw = no_curves
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "curves", draw)
        yield


@pytest.fixture
def roomy(monkeypatch):
    """A disk with room for the checkpoints of any recipe, as the machine that runs the tests need not have it."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=2**50, used=0, free=2**50))


@pytest.fixture
def ranks(tmp_path: Path):
    """`ranks(size, function, *arguments)` -> [function(rank, size, *arguments) of every rank], over gloo.

    Ranks are forked from a server that has torch loaded and has never run it: that costs 0.2 s where an interpreter
    costs several, and unlike a fork of this process it cannot inherit a lock that one of its threads held.
    """

    def run(size, function, *arguments):
        context = get_context("forkserver")
        context.set_forkserver_preload(list(PRELOADED))
        results = context.Queue()
        rendezvous = tmp_path / f"rendezvous_{os.urandom(4).hex()}"
        processes = [
            context.Process(target=be_rank, args=(function, rank, size, rendezvous, arguments, results), daemon=True)
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        answers = {}
        try:
            for _ in processes:
                rank, value, error = results.get(timeout=TIMEOUT_S)
                assert error is None, f"rank {rank} failed:\n{error}"
                answers[rank] = value
        finally:
            for process in processes:
                process.kill()
                process.join()
        return [answers[rank] for rank in range(size)]

    return run


@pytest.fixture(scope="session")
def few_digits(tmp_path_factory):
    """An image folder of 400 training and 100 held-out digits."""
    from fastdeit.data.sources import digits

    os.environ.setdefault("FASTDEIT_CACHE", str(tmp_path_factory.mktemp("cache")))
    root, full = tmp_path_factory.mktemp("digits"), Path(digits.prepare())
    for split, count in (("train", 40), ("val", 10)):
        for folder in sorted((full / split).iterdir()):
            (root / split / folder.name).mkdir(parents=True)
            for file in sorted(folder.iterdir())[:count]:
                shutil.copy(file, root / split / folder.name)
    return root


@pytest.fixture
def write(tmp_path):
    """`write(text, name)` -> path of a recipe file, as a string."""

    def write(text, name="r.yaml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return write
