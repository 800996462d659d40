"""What goes into a checkpoint comes out bit for bit, and nothing else is accepted."""

import json
import math
import os
import stat

import numpy as np
import pytest
import torch

from fastdeit.engine import checkpoint
from fastdeit.engine.checkpoint import CheckpointError


def never(path, reason):
    raise AssertionError(f"{path} reported as damaged: {reason}")


def bits(tensor):
    dense = torch.empty(tensor.numel(), dtype=tensor.dtype)
    dense.copy_(tensor.detach().flatten())
    return dense.view(torch.uint8).numpy().tobytes()


def assert_same(loaded, saved):
    assert loaded.keys() == saved.keys()
    for name, tensor in saved.items():
        assert loaded[name].dtype == tensor.dtype, name
        assert loaded[name].shape == tensor.shape, name
        assert bits(loaded[name]) == bits(tensor), name


FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def awkward_tensors():
    base = torch.arange(24.0).reshape(4, 6)
    special = torch.tensor([math.nan, -math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, 3.4e38])
    tensors = {f"float_{dtype}": special.to(dtype) for dtype in FLOATS}
    tensors |= {
        f"int_{dtype}": torch.tensor([torch.iinfo(dtype).min, torch.iinfo(dtype).max], dtype=dtype)
        for dtype in INTEGERS
    }
    tensors |= {
        "nan_payload": torch.tensor([0x7FC12345, -0x3EDCBB], dtype=torch.int32).view(torch.float32),
        "bool": torch.tensor([True, False, True]),
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.empty(0, 3),
        "transposed": base.t(),
        "strided": base[:, ::2],
        "expanded": torch.ones(3, 1).expand(3, 4),
        "channels_last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "base": base,
        "same": base,
        "slice": base[1:3],
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
        "negated": torch.tensor([1 + 2j]).conj().imag,
        "": torch.ones(1),
        "a/../b": torch.ones(2),
    }
    return tensors


def test_awkward_tensors_round_trip_bit_for_bit(tmp_path):
    tensors = {"model": awkward_tensors(), "optim": {"step": torch.tensor(7.0)}, "empty_group": {}}
    loaded = checkpoint.load(checkpoint.save(tmp_path, 3, tensors, {}))
    assert loaded.step == 3
    assert loaded.tensors.keys() == tensors.keys()
    for file, group in tensors.items():
        assert_same(loaded.tensors[file], group)


def test_loaded_tensors_are_writable_and_independent(tmp_path):
    shared = torch.zeros(4)
    path = checkpoint.save(tmp_path, 1, {"model": {"a": shared, "b": shared}}, {})
    first, second = checkpoint.load(path), checkpoint.load(path)
    first.tensors["model"]["a"].add_(1)
    assert first.tensors["model"]["b"].sum() == 0
    assert second.tensors["model"]["a"].sum() == 0


@pytest.mark.gpu
@pytest.mark.card
def test_cuda_tensors_are_saved_from_the_device(tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    tensor = torch.randn(5, 3, device="cuda").t()
    loaded = checkpoint.load(checkpoint.save(tmp_path, 1, {"model": {"w": tensor}}, {}))
    assert_same(loaded.tensors["model"], {"w": tensor.cpu()})
    assert loaded.tensors["model"]["w"].device.type == "cpu"


def test_state_round_trips(tmp_path):
    state = {
        "seed": 2**63,
        "negative": -(2**63),
        "lr": 5e-4,
        "third": 1 / 3,
        "tiny": 5e-324,
        "minus_zero": -0.0,
        "best": -math.inf,
        "loss": math.nan,
        "done": False,
        "none": None,
        "text": 'Zürich "\n\ud800 \x00',
        "nested": {"list": [1, [2.5, {"deep": []}]], "empty": {}},
        "sha256": "a key that the manifest also uses",
    }
    loaded = checkpoint.load(checkpoint.save(tmp_path, 0, {}, state)).state
    assert math.isnan(loaded.pop("loss"))
    state.pop("loss")
    assert loaded == state
    assert list(loaded) == list(state)
    assert math.copysign(1, loaded["minus_zero"]) == -1
    assert {key: type(value) for key, value in loaded.items()} == {key: type(value) for key, value in state.items()}


@pytest.mark.parametrize(
    ("state", "named"),
    [
        ({"best": {"top1": np.float64(1.0)}}, r"state\['best'\]\['top1'\] is a numpy.float64"),
        ({"best": [0, np.float32(1.0)]}, r"state\['best'\]\[1\] is a numpy.float32"),
        ({"betas": (0.9, 0.999)}, r"state\['betas'\] is a tuple"),
        ({"step": torch.tensor(3)}, r"state\['step'\] is a torch.Tensor"),
        ({"path": {1: "a"}}, r"state\['path'\] has the key 1, a int"),
        ({"blob": b"x"}, r"state\['blob'\] is a bytes"),
        ([], "state is a list"),
    ],
)
def test_state_that_json_would_change_is_refused_by_name(tmp_path, state, named):
    with pytest.raises(CheckpointError, match=named):
        checkpoint.save(tmp_path, 1, {}, state)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        ({"model": {"w": [1.0]}}, r"tensors\['model'\]\['w'\] is a list"),
        ({"model": {3: torch.ones(1)}}, r"tensors\['model'\]\[3\] is keyed by a int"),
        ({"model": {"w": torch.ones(2, dtype=torch.complex128)}}, "complex128"),
        ({"model": {"w": torch.ones(2, 2).to_sparse()}}, "sparse"),
        ({"model": {"w": torch.ones(2, device="meta")}}, "meta"),
        ({"../model": {}}, "cannot name a checkpoint file"),
        ({"Model": {}}, "cannot name a checkpoint file"),
        ({"model\n": {}}, "cannot name a checkpoint file"),
        ({"": {}}, "cannot name a checkpoint file"),
    ],
)
def test_tensors_that_cannot_be_stored_are_refused_by_name(tmp_path, tensors, named):
    with pytest.raises(CheckpointError, match=named):
        checkpoint.save(tmp_path, 1, tensors, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", [-1, 10**8])
def test_steps_without_a_name_are_refused(tmp_path, step):
    with pytest.raises(CheckpointError, match=f"step {step}"):
        checkpoint.save(tmp_path, step, {}, {})


def test_layout_is_the_documented_one(tmp_path):
    root = tmp_path / "run" / "checkpoints"
    path = checkpoint.save(root, 1250, {"model": {"w": torch.ones(2)}, "optim": {}}, {"epoch": 1})
    assert path == root / "step_00001250"
    assert sorted(os.listdir(root)) == ["step_00001250"]
    assert sorted(os.listdir(path)) == ["manifest.json", "model.safetensors", "optim.safetensors"]
    manifest = json.loads((path / "manifest.json").read_text())
    assert list(manifest) == ["format", "step", "state", "files", "sha256"]
    assert manifest["step"] == 1250
    assert manifest["state"] == {"epoch": 1}
    assert manifest["files"]["model.safetensors"]["bytes"] == (path / "model.safetensors").stat().st_size


def test_others_may_read_it_as_the_umask_says(tmp_path):
    path = checkpoint.save(tmp_path, 1, {"model": {}}, {})
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "file").touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    expected = stat.S_IMODE((tmp_path / "plain" / "file").stat().st_mode)
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {expected}


def test_equal_contents_give_equal_files(tmp_path):
    tensors = {"model": awkward_tensors()}
    reverse = {"model": dict(reversed(tensors["model"].items()))}
    paths = [checkpoint.save(tmp_path / name, 5, group, {"a": 1}) for name, group in (("x", tensors), ("y", reverse))]
    for name in os.listdir(paths[0]):
        assert (paths[0] / name).read_bytes() == (paths[1] / name).read_bytes(), name


def test_saving_a_step_twice_leaves_the_first(tmp_path):
    first = checkpoint.save(tmp_path, 4, {"model": {"w": torch.ones(2)}}, {"run": 1})
    inodes = {file.name: file.stat().st_ino for file in first.iterdir()}
    assert checkpoint.save(tmp_path, 4, {"model": {"w": torch.zeros(2)}}, {"run": 2}) == first
    assert {file.name: file.stat().st_ino for file in first.iterdir()} == inodes
    assert checkpoint.load(first).state == {"run": 1}


def test_saving_a_step_again_replaces_a_damaged_one(tmp_path):
    path = checkpoint.save(tmp_path, 4, {"model": {"w": torch.ones(2)}}, {"run": 1})
    (path / "model.safetensors").write_bytes(b"")
    checkpoint.save(tmp_path, 4, {"model": {"w": torch.zeros(2)}}, {"run": 2})
    assert checkpoint.load(path).state == {"run": 2}
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize(
    "make", [lambda path: path.write_text("mine"), lambda path: path.symlink_to(path.parent / "x")]
)
def test_a_file_in_the_place_of_a_checkpoint_is_not_touched(tmp_path, make):
    obstacle = tmp_path / "step_00000004"
    make(obstacle)
    with pytest.raises(CheckpointError, match="in the way"):
        checkpoint.save(tmp_path, 4, {}, {})
    assert os.listdir(tmp_path) == [obstacle.name]


def test_newest_wins_and_none_means_none(tmp_path):
    assert checkpoint.newest(tmp_path / "absent", never) is None
    assert checkpoint.newest(tmp_path, never) is None
    for step in (9, 100, 20):
        checkpoint.save(tmp_path, step, {}, {"step": step})
    assert checkpoint.steps(tmp_path) == [9, 20, 100]
    assert checkpoint.newest(tmp_path, never).state == {"step": 100}


def test_only_exact_names_are_checkpoints(tmp_path):
    strangers = (
        "step_1",
        "step_000000010",
        "old-step_00000900",
        "step_00000900-bak",
        "step_0000090x",
        "best",
        ".tmp-x",
    )
    for name in strangers:
        (tmp_path / name).mkdir()
    (tmp_path / "step_00000901").write_text("a file")
    assert checkpoint.steps(tmp_path) == []
    assert checkpoint.newest(tmp_path, never) is None


def test_a_copy_under_another_name_loads_but_not_as_another_step(tmp_path):
    path = checkpoint.save(tmp_path, 7, {}, {"a": 1})
    path.rename(tmp_path / "best")
    assert checkpoint.load(tmp_path / "best").step == 7
    (tmp_path / "best").rename(tmp_path / "step_00000008")
    with pytest.raises(CheckpointError, match="that of step 7"):
        checkpoint.load(tmp_path / "step_00000008")


# ---- retention -----------------------------------------------------------------------------------


def test_prune_keeps_the_last_and_the_named(tmp_path):
    for step in range(1, 8):
        checkpoint.save(tmp_path, step, {"model": {"w": torch.ones(1)}}, {})
    checkpoint.prune(tmp_path, keep_last=2, keep={3, 99})
    assert checkpoint.steps(tmp_path) == [3, 6, 7]
    assert sorted(os.listdir(tmp_path)) == ["step_00000003", "step_00000006", "step_00000007"]


def test_prune_does_not_count_damaged_checkpoints(tmp_path):
    for step in range(1, 7):
        checkpoint.save(tmp_path, step, {"model": {"w": torch.ones(9)}}, {})
    (tmp_path / "step_00000006" / "model.safetensors").write_bytes(b"short")
    (tmp_path / "step_00000005" / "manifest.json").unlink()
    (tmp_path / "step_00000002" / "manifest.json").unlink()
    checkpoint.prune(tmp_path, keep_last=2)
    assert checkpoint.steps(tmp_path) == [3, 4, 5, 6]


def test_prune_removes_nothing_else(tmp_path):
    outside = tmp_path / "outside"
    checkpoint.save(outside, 1, {}, {})
    root = tmp_path / "root"
    for step in (2, 3):
        checkpoint.save(root, step, {}, {})
    (root / "step_00000001").symlink_to(outside / "step_00000001")
    for name in ("step_1", "old-step_00000001", "step_00000001-bak", ".tmp-mine", "notes"):
        (root / name).mkdir()
        (root / name / "file").touch()
    before = set(os.listdir(root))
    checkpoint.prune(root, keep_last=1)
    assert before - set(os.listdir(root)) == {"step_00000002"}
    assert checkpoint.load(outside / "step_00000001").step == 1


def test_prune_removes_what_a_user_put_inside_too(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, {}, {})
    (tmp_path / "step_00000001" / "samples" / "deep").mkdir(parents=True)
    (tmp_path / "step_00000001" / "samples" / "a.png").touch()
    (tmp_path / "target").mkdir()
    (tmp_path / "target" / "kept").touch()
    (tmp_path / "step_00000001" / "link").symlink_to(tmp_path / "target")
    checkpoint.prune(tmp_path, keep_last=1)
    assert sorted(os.listdir(tmp_path)) == ["step_00000002", "target"]
    assert (tmp_path / "target" / "kept").exists()


def test_prune_must_keep_one(tmp_path):
    checkpoint.save(tmp_path, 1, {}, {})
    with pytest.raises(ValueError, match="keep_last is 0"):
        checkpoint.prune(tmp_path, keep_last=0)
    assert checkpoint.steps(tmp_path) == [1]


def test_many_saves_with_pruning_hold_three_checkpoints_at_most(tmp_path):
    seen = 0
    for step in range(60):
        checkpoint.save(tmp_path, step, {"model": {"w": torch.full((8,), float(step))}}, {})
        seen = max(seen, len(os.listdir(tmp_path)))
        checkpoint.prune(tmp_path, keep_last=2)
    assert seen == 3
    assert checkpoint.steps(tmp_path) == [58, 59]
