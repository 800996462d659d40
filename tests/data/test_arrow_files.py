"""Which Arrow files are a split: by their names, and by the state that `save_to_disk` writes."""

import pytest

from fastdeit.data.sources.source import DataError
from tests.data.writers import saved

pytest.importorskip("pyarrow")

from fastdeit.data.sources.arrow import files


def touch(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


@pytest.mark.parametrize(
    ("names", "split", "found"),
    [
        (["parquet-train.arrow", "parquet-validation.arrow", "cache-train.arrow"], "train", [0]),
        (["parquet-train.arrow", "parquet-validation.arrow", "cache-val.arrow"], "validation", [1]),
        (["x-train-00000-of-00002.arrow", "x-train-00001-of-00002.arrow"], "train", [0, 1]),
        (["train/data-00000-of-00001.arrow", "train/cache-0af1.arrow", "train/indices.json"], "train", [0]),
        (["train.arrow", "train.tfrecord"], "train", [0]),
        (["a-0-of-2.arrow", "a-1-of-2.arrow"], "a-*.arrow", [0, 1]),
        (["a-0-of-2.arrow"], "a-0-of-2.arrow", [0]),
    ],
)
def test_files_of_a_split(tmp_path, names, split, found):
    touch(tmp_path, *names)
    assert files(tmp_path, split) == [names[i] for i in found]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train-1-of-2.arrow"], "1 of 2 files, as .*: number 0 is missing"),
        (["train-0-of-1.arrow", "train-00-of-1.arrow"], "are the same part of the data set; remove one"),
        (["train-0-of-1.arrow", "train-0-of-2.arrow"], "belong to different sets of files"),
        (["val.arrow"], "no Arrow file of split 'train'; looked for train/state.json"),
    ],
)
def test_sets_of_files_that_are_not_complete(tmp_path, names, message):
    touch(tmp_path, *names)
    with pytest.raises(DataError, match=message):
        files(tmp_path, "train")


def test_the_saved_state_names_the_files(tmp_path):
    touch(tmp_path, "train/data-00000-of-00001.arrow", "train/old.arrow")
    saved(tmp_path / "train", ["data-00000-of-00001.arrow"])
    assert files(tmp_path, "train") == ["train/data-00000-of-00001.arrow"]
    saved(tmp_path / "validation", ["data-00000-of-00001.arrow"])
    touch(tmp_path, "validation/data-00000-of-00001.arrow")
    assert files(tmp_path, "validation") == ["validation/data-00000-of-00001.arrow"]


A, B = "data-00000-of-00002.arrow", "data-00001-of-00002.arrow"


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ("", "state.json: not what save_to_disk writes, or damaged"),
        ("[]", "not what save_to_disk writes"),
        ('{"_data_files": 1}', "not what save_to_disk writes"),
        ('{"_data_files": ["a"]}', "not what save_to_disk writes"),
        ("[" * 100_000, "not what save_to_disk writes"),
        ('{"_data_files": []}', "state.json: it lists no files"),
        (["../secret.arrow"], "state.json: '../secret.arrow' is no name of an Arrow file in this folder"),
        (["/etc/secret.arrow"], "is no name of an Arrow file in this folder"),
        (["passwd"], "'passwd' is no name of an Arrow file"),
        (
            [A, "data-00001-of-00003.arrow"],
            "data-00001-of-00003.arrow is listed, but not there; copy the data set anew",
        ),
        ([A], "1 of 2 files, as .*: number 1 is missing"),
        ([A, B, A], f"{A} and {A} are the same part of the data set"),
    ],
)
def test_states_that_cannot_be_used(tmp_path, state, message):
    touch(tmp_path, f"train/{A}", f"train/{B}", "secret.arrow")
    saved(tmp_path / "train", state) if isinstance(state, list) else (tmp_path / "train/state.json").write_text(state)
    with pytest.raises(DataError, match=message):
        files(tmp_path, "train")


def test_a_selection_that_is_not_flattened(tmp_path):
    touch(tmp_path, "train/dataset.arrow")
    saved(tmp_path / "train", ["dataset.arrow"], _indices_data_files=[{"filename": "indices.arrow"}])
    with pytest.raises(DataError, match=r"a selection of the rows is saved apart from them; save flatten_indices\(\)"):
        files(tmp_path, "train")
