"""Spoils a checkpoint, as a broken disk or a stranger would."""

import os
import pickle
import random
from pathlib import Path
from typing import Any

from fastdeit.engine import checkpoint


class _Canary:
    """Unpickled, it makes a folder: the proof that something was executed."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


def spoil(root: Path, rng: random.Random, canary: Path) -> str | None:
    """Spoil a file of the newest checkpoint under `root`, and say how; None where no other checkpoint would be left.

    canary  a folder that is made if the run unpickles what was put there
    """
    steps = checkpoint.steps(root)
    if len(steps) < 2 or any(not _verifies(checkpoint.path_of(root, step)) for step in steps):
        return None
    newest = checkpoint.path_of(root, steps[-1])
    file = rng.choice(sorted(newest.iterdir()))
    data = bytearray(file.read_bytes())
    how = rng.choice(("a flipped bit", "a flipped bit", "a cut", "a pickle"))
    if how == "a flipped bit":
        bit = rng.randrange(8 * len(data))
        data[bit // 8] ^= 1 << bit % 8
    elif how == "a cut":
        del data[rng.randrange(len(data)) :]
    else:
        data = pickle.dumps(_Canary(canary))
    file.write_bytes(data)
    return f"{how} in {newest.name}/{file.name}"


def _verifies(path: Path) -> bool:
    try:
        checkpoint.load(path, tensors=False)
    except checkpoint.CheckpointError:
        return False
    return True
