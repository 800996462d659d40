"""Formats of images that are not read: by which names they are known, and how to get to one that is.

One table. To read a format after all, write a reader (docs/data.md) and strike it out here.
"""

import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from shlex import quote

from fastdeit.data.sources.names import is_litter

_LOOKED_AT = 1000  # entries of a folder
_FEW = 20
_PACK = "`fastdeit data pack ROOT OUT --source mine:NAME`, with a reader as in docs/data.md,"
_CONVERTS = f"{_PACK} converts it"
_HAS_ONE = f"{_PACK} which has the one for it, converts it"


@dataclass(frozen=True)
class Foreign:
    """A format: called `name`, of files whose names the pattern `file` matches; `way_out` is a command with {path}."""

    name: str
    file: str
    way_out: str


FOREIGN = (
    Foreign("a zip archive", r"(?i).+\.zip", "unpack it: `python -m zipfile -e {path} FOLDER`"),
    Foreign(
        "a compressed tar archive",
        r"(?i).+\.(tar\.(gz|bz2|xz|zst|lz4)|tgz|tbz2|txz)",
        "unpack it: `mkdir FOLDER && tar -xf {path} -C FOLDER`; of shards in the WebDataset layout uncompress each to "
        "a plain .tar",
    ),
    Foreign("an archive", r"(?i).+\.(7z|rar)", "unpack it: `7z x {path} -oFOLDER`"),
    Foreign(
        "an LMDB database",
        r"(?i)(data|lock)\.mdb|.+\.(lmdb|mdb)",
        f"its keys and values have no common form: {_CONVERTS}",
    ),
    Foreign("MXNet's RecordIO", r"(?i).+\.rec", _HAS_ONE),
    Foreign(
        "FFCV's format",
        r"(?i).+\.(beton|ffcv)",
        "its images have been resized and encoded anew: pack the data set that it was made from by `fastdeit data pack "
        "ORIGINAL OUT`",
    ),
    Foreign(
        "MosaicML's MDS format",
        r"(?i).+\.mds(\.zstd?|\.gz|\.br|\.snappy)?",
        f"{_CONVERTS} by the package mosaicml-streaming",
    ),
    Foreign("LitData's format", r"(?i)chunk-\d+-\d+(\.\w+)?\.bin", f"{_CONVERTS} by the package litdata"),
    Foreign("MNIST's IDX format", r"(?i).+[-.]idx[13][-.]ubyte(\.gz)?", _HAS_ONE),
    Foreign("SVHN's MATLAB format", r"(?i)(train|test|extra)_32x32\.mat", _HAS_ONE),
    Foreign("STL-10's binary format", r"(train|test|unlabeled)_[Xy]\.bin", _CONVERTS),
    Foreign(
        "a pickle",
        r"(?i).+\.(pkl|pickle)",
        f"it may run any program when it is opened: {_CONVERTS}, if you trust who made it",
    ),
    Foreign("an HDF5 file", r"(?i).+\.(h5|hdf5)", _CONVERTS),
    Foreign("a NumPy archive", r"(?i).+\.(npz|npy)", f"{_CONVERTS}, with the images encoded as PNG"),
)


def of_file(path: Path) -> str | None:
    """What a file is that is not read, and the way out, in a sentence; None where it is of no format in `FOREIGN`."""
    for one in FOREIGN:
        if re.fullmatch(one.file, path.name):
            return f"{path} is {one.name}, which is not read: {one.way_out.format(path=quote(str(path)))}"
    return None


def of_folder(root: Path, *splits: str) -> str | None:
    """`of_file` for the first such file in the folder `root`, or in one of its folders `splits` or of any name, or in
    a folder in these."""
    try:
        inner = [entry for entry in islice(sorted(root.iterdir()), _LOOKED_AT) if not is_litter(entry.name)]
        folders = [root / split for split in splits if (root / split).is_dir()]
        folders += [entry for entry in inner if entry.is_dir() and entry not in folders]
        files = [*inner, *(one for folder in folders for one in islice(folder.iterdir(), _LOOKED_AT))]
        deeper = [one for one in files[len(inner) :] if one.is_dir() and not is_litter(one.name)][:_LOOKED_AT]
        files += [one for folder in deeper for one in islice(folder.iterdir(), _FEW)]
    except OSError:
        return None  # what is wrong with it is told by who opens it
    return next((found for found in map(of_file, files) if found), None)
