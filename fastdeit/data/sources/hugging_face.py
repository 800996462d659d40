"""Data sets of the Hugging Face hub and its `datasets` library: Parquet and Arrow files.

A module of its own, because both readers need pyarrow, and kinds are told apart where it is not installed.
"""

from functools import partial
from importlib import import_module
from pathlib import Path

from fastdeit.data.sources import shards
from fastdeit.data.sources.kinds import Columns, Kind
from fastdeit.data.sources.source import DataError, NamedSource


def _open(name: str, source: str, root: Path, split: str, columns: Columns) -> NamedSource:
    """`source` of the module `name` for the files of a split."""
    try:
        reader = import_module(f"fastdeit.data.sources.{name}")
    except ImportError as error:
        raise DataError(f"{name.capitalize()} files need pyarrow: pip install fastdeit[parquet] ({error})") from error
    files = reader.files(root, split)
    return getattr(reader, source)(root, files, columns.image or "image", columns.label or "label")


def _has_arrow(root: Path, train: str, val: str) -> bool:
    # One split that was saved on its own counts, too: to open it says what to do.
    alone = (root / "state.json").is_file() and (root / "dataset_info.json").is_file()
    return alone or shards.any_of(root, train, shards.ARROW)


PARQUET = Kind(
    "parquet",
    partial(_open, "parquet", "ParquetSource"),
    "ROOT/{train}-*.parquet and ROOT/{val}-*.parquet, or the same in ROOT/data, with columns image, label",
    lambda root, train, val: shards.any_of(root, train, shards.PARQUET, shards.HUB_PLACES),
    (".parquet",),
    numbered=True,
    columns=True,
)
ARROW = Kind(
    "arrow",
    partial(_open, "arrow", "ArrowSource"),
    "ROOT/{train}/*.arrow and ROOT/{val}/*.arrow, or ROOT/NAME-{train}.arrow and ROOT/NAME-{val}.arrow",
    _has_arrow,
    (".arrow",),
    numbered=True,
    columns=True,
)
