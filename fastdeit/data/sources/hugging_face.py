"""Data sets of the Hugging Face hub and its `datasets` library: Parquet and Arrow files.

A module of its own, because both readers need pyarrow, and kinds are told apart where it is not installed.
"""

from importlib import import_module
from pathlib import Path
from types import ModuleType

from fastdeit.data.sources import shards
from fastdeit.data.sources.kinds import Columns, Kind
from fastdeit.data.sources.source import DataError, NamedSource

_IMAGE, _LABEL = "image", "label"


def _reader(name: str) -> ModuleType:
    try:
        return import_module(f"fastdeit.data.sources.{name}")
    except ImportError as error:
        raise DataError(f"{name.capitalize()} files need pyarrow: pip install fastdeit[parquet] ({error})") from error


def _parquet(root: Path, split: str, columns: Columns) -> NamedSource:
    reader = _reader("parquet")
    return reader.ParquetSource(root, reader.files(root, split), columns.image or _IMAGE, columns.label or _LABEL)


def _arrow(root: Path, split: str, columns: Columns) -> NamedSource:
    reader = _reader("arrow")
    return reader.ArrowSource(root, reader.files(root, split), columns.image or _IMAGE, columns.label or _LABEL)


def _has_parquet(root: Path, train: str, val: str) -> bool:
    return shards.any_of(root, train, shards.PARQUET, shards.HUB_PLACES)


def _has_arrow(root: Path, train: str, val: str) -> bool:
    # One split that was saved on its own counts, too: to open it says what to do.
    alone = (root / "state.json").is_file() and (root / "dataset_info.json").is_file()
    return alone or shards.any_of(root, train, shards.ARROW)


PARQUET = Kind(
    "parquet",
    _parquet,
    "ROOT/{train}-*.parquet and ROOT/{val}-*.parquet, or the same in ROOT/data, with columns image, label",
    _has_parquet,
    (".parquet",),
    numbered=True,
    columns=True,
)
ARROW = Kind(
    "arrow",
    _arrow,
    "ROOT/{train}/*.arrow and ROOT/{val}/*.arrow, or ROOT/NAME-{train}.arrow and ROOT/NAME-{val}.arrow",
    _has_arrow,
    (".arrow",),
    numbered=True,
    columns=True,
)
