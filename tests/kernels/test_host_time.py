"""What an op costs the host beside its launches: how many functions a call and its backward go through, which says the
same on a busy machine as on a quiet one."""

import sys
from collections import Counter
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from fastdeit.kernels import _triton
from tests.kernels.examples import every_example, few
from tests.kernels.test_optimizer import interpreted

MOST = {"add_layer_norm": 164, "attention": 234, "mlp": 193}
"""Functions of Python and C that a call and its backward go through, launches left out: a tenth more than they are."""


def functions_in(run):
    """Names of the functions that `run` calls, each as often as it does."""
    called = Counter()

    def note(frame, event, argument):
        if event == "call":
            called[frame.f_code.co_qualname] += 1
        elif event == "c_call":
            called[argument.__qualname__] += 1

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return called


@pytest.mark.parametrize("name", [interpreted(name) for name in MOST])
def test_functions_of_a_call_and_its_backward(name, monkeypatch):
    monkeypatch.setattr(_triton, "launch", lambda *args, **constants: None)
    op, example = every_example()[{"add_layer_norm": "add_layer_norm-drop_path"}.get(name, name)]
    args = few(example)
    (backend, *_) = (backend for backend in op.backends if backend.name == "triton")
    monkeypatch.setattr(op, "backends", (backend._replace(capability=lambda *_: (True, "")), op.backends[-1]))

    def run():
        result, *_ = op(*args)
        result.backward(torch.ones_like(result))

    run()
    called = functions_in(run)
    assert 0 < called.total() <= MOST[name], called.most_common()


@pytest.mark.parametrize(("current", "entered"), [(0, [1]), (1, [])])
def test_a_launch_makes_its_device_the_current_one_where_it_is_not(current, entered, monkeypatch):
    """Entering a device's context takes as long as several launches."""
    made = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device", lambda device: made.append(device.index) or nullcontext())
    monkeypatch.setattr(_triton, "Tensor", SimpleNamespace)
    launched = []
    kernel = {(1,): lambda *args, **options: launched.append((args, list(made)))}
    tensor = SimpleNamespace(device=torch.device("cuda", 1))
    _triton.launch(kernel, (1,), tensor, warps=1)
    assert launched == [((tensor,), entered)]
