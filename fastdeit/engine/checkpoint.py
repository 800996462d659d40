"""Checkpoints: a directory of safetensors files that exists if and only if it is complete.

    ROOT/step_00001250/model.safetensors, optim.safetensors, ...
    ROOT/step_00001250/manifest.json     {format, step, state, files: {name: {bytes, sha256}}, sha256}

Everything is written into a temporary directory beside its destination, synced, and renamed: the rename is the
commit, so a process killed at any moment leaves the earlier checkpoints and nothing that looks like a new one. There
is no "latest" pointer that could lie; the newest directory that verifies wins. The manifest holds the hash of every
file and its own, so damage is found before anything is parsed, and no pickle is involved anywhere. Files are hashed a
piece at a time and then mapped into memory, so a checkpoint is never in memory twice. The hash is SHA-256, which
processors have instructions for. Format 1 had BLAKE2b, which they have not.

This needs a file system on which rename is atomic: any local one, and NFS or Lustre for a single writer; no object
store.
"""

import json
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b, sha256
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any, TypeVar

from fastdeit.engine import _fault
from fastdeit.engine.disk import make_directory, way_out
from fastdeit.engine.disk import sync as _sync

if TYPE_CHECKING:
    from torch import Tensor

Found = TypeVar("Found")

FORMAT = 2
MANIFEST = "manifest.json"

MAX_STEP = 10**8 - 1
"""The name of a checkpoint has eight digits."""
_STEP = re.compile(r"step_(\d{8})")
_NAME = re.compile(r"[a-z_]+")
_FILE = re.compile(r"[a-z_]+\.safetensors")
_TEMPORARY = re.compile(r"\.tmp-step_\d{8}-[0-9a-f]{8}-(?P<pid>\d+)-(?P<start>\d+)-(?P<host>.+)")
_MANIFEST_LIMIT = 1 << 26
_CHUNK = 1 << 20
_HASHES: dict[Any, tuple[str, Callable[[], Any]]] = {
    1: ("blake2b", partial(blake2b, digest_size=16)),
    2: ("sha256", sha256),
}
"""By format the name of its hashes and a new one of them. All of these can be read; `FORMAT` is written."""
_FOREIGN_SECONDS = 24 * 3600


class CheckpointError(Exception):
    """A checkpoint could not be written, or what is on disk is not the checkpoint that was written."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint: `tensors[file][name]` on the CPU, and the JSON `state` it was saved with.

    `tensors` is empty where it was read without them. They are mapped from the files, which are read when the values
    are; what is written into them does not reach the files.

    digest  the manifest's own hash, which stands for all that is in the checkpoint
    """

    path: Path
    step: int
    tensors: dict[str, dict[str, "Tensor"]]
    state: dict[str, Any]
    digest: str = ""


# ---- writing -------------------------------------------------------------------------------------


def save(root: Path, step: int, tensors: Mapping[str, Mapping[str, "Tensor"]], state: dict[str, Any]) -> Path:
    """Write `root/step_%08d` and return it; when this returns, the checkpoint survives a kill and a power cut.

    Each key of `tensors` becomes a file (`[a-z_]+`, ".safetensors" is added). Tensors of any device, stride and
    sharing are accepted and stored dense and separate; values, shapes and dtypes come back bit for bit, strides and
    aliasing do not. `state` holds str, int, float (also NaN and infinities), bool, None, and lists and str-keyed
    dicts of them.

    A checkpoint of this step that verifies is left alone; a damaged one is replaced.
    Raises CheckpointError when something cannot be stored or the disk fails; earlier checkpoints are not touched.
    """
    root = Path(root)
    if type(state) is not dict:
        raise CheckpointError(f"state is a {_type_name(state)}; it must be a dict")
    _check_state(state, "state")
    from fastdeit.engine import tensor_files  # torch takes seconds to import, which who reads a manifest need not wait

    try:
        files = {_file_name(name): tensor_files.storable(group, name) for name, group in tensors.items()}
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    final = path_of(root, step)
    if os.path.lexists(final):
        if not _is_directory(final):
            raise CheckpointError(f"{final} is in the way of a checkpoint and is not a directory; move it away")
        if _opens(final, verify=True):
            return final
    temporary = root / _temporary_name(final.name)
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        make_directory(root)
        temporary.mkdir()
        _write_files(temporary, step, files, tensor_files.write, state)
        _commit(temporary, final)
    except OSError as error:
        why = f"{error.strerror or error}; earlier checkpoints are intact; {way_out(error)}"
        raise CheckpointError(f"the checkpoint of step {step} was not saved to {root}: {why}") from error
    finally:
        # After the rename there is nothing left here. What cannot be removed now, `sweep` removes at the next start.
        shutil.rmtree(temporary, ignore_errors=True)
    return final


def _write_files(
    directory: Path,
    step: int,
    files: dict[str, dict[str, "Tensor"]],
    write: Callable[[dict[str, "Tensor"], Path], None],
    state: dict[str, Any],
) -> None:
    entries = {}
    for name, group in files.items():
        path = directory / name
        _fault.point(f"write {name}")
        write(group, path)
        # Some versions of safetensors give the owner alone access; the directory's mode tells what the umask allows.
        path.chmod(directory.stat().st_mode & 0o666)
        _sync(path)
        entries[name] = {"bytes": path.stat().st_size, _HASHES[FORMAT][0]: _hash_file(path)}
    _fault.point(f"write {MANIFEST}")
    (directory / MANIFEST).write_bytes(_encode({"format": FORMAT, "step": step, "state": state, "files": entries}))
    _sync(directory / MANIFEST)
    _sync(directory)


def _commit(temporary: Path, final: Path) -> None:
    # Only a damaged checkpoint is ever in the way, and rename cannot replace a directory that is not empty.
    displaced = _set_aside(final) if final.exists() else None
    _fault.point(f"rename {final.name}")
    temporary.rename(final)
    _sync(final.parent)
    if displaced is not None:
        _remove_tree(displaced)


def _file_name(name: str) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise CheckpointError(f"{name!r} cannot name a checkpoint file; use lower-case letters and underscores")
    return f"{name}.safetensors"


def _check_state(value: Any, where: str) -> None:
    """Refuse what JSON would turn into something else (a tuple, a numpy float, an int key) or cannot hold."""
    if type(value) is dict:
        for key, item in value.items():
            if type(key) is not str:
                raise CheckpointError(f"{where} has the key {key!r}, a {_type_name(key)}; keys must be strings")
            _check_state(item, f"{where}[{key!r}]")
    elif type(value) is list:
        for index, item in enumerate(value):
            _check_state(item, f"{where}[{index}]")
    elif value is not None and type(value) not in (str, int, float, bool):
        raise CheckpointError(
            f"{where} is a {_type_name(value)}; state holds str, int, float, bool, None, and lists and dicts of them"
        )


def _type_name(value: Any) -> str:
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _encode(manifest: dict[str, Any]) -> bytes:
    """The manifest as JSON whose last entry is the hash of the rest. One content has one encoding."""
    name, _ = _HASHES.get(manifest.get("format"), _HASHES[FORMAT])
    rest = {key: value for key, value in manifest.items() if key != name}
    rest[name] = _hash(json.dumps(rest).encode(), manifest.get("format"))
    return json.dumps(rest, indent=1).encode() + b"\n"


# ---- reading -------------------------------------------------------------------------------------


def load(path: Path, tensors: bool = True, verify: bool = True) -> Checkpoint:
    """Read the checkpoint directory `path`; sizes and hashes are verified before any tensor file is parsed.

    tensors  False: the files are verified and not parsed, for which torch need not be there
    verify   False: the manifest and the sizes of the files are verified, and not the files' hashes, for which all of
             them would be read: for a checkpoint that another process of this machine has just verified

    Raises CheckpointError, which names the file and what is wrong with it, for anything but a sound checkpoint.
    """
    try:
        return open_step(Path(path), tensors, verify)
    except CheckpointError as error:
        raise CheckpointError(f"checkpoint {path} cannot be used: {error}") from error


def open_step(path: Path, tensors: bool = True, verify: bool = True) -> Checkpoint:
    """`load`, with errors that give the reason only."""
    manifest = _read_manifest(path)
    files = manifest["files"]
    for name, entry in files.items():
        _check_size(path / name, entry)
    if verify:
        _check_hashes(path, manifest)
    found = {}
    if tensors:
        from fastdeit.engine import tensor_files

        for name in files:
            try:
                found[name.removesuffix(".safetensors")] = tensor_files.mapped(path / name)
            except ValueError as error:
                raise CheckpointError(f"{name} is not a safetensors file ({error})") from error
    return Checkpoint(path, manifest["step"], found, manifest["state"], manifest[_HASHES[manifest["format"]][0]])


def newest(root: Path, on_damaged: Callable[[Path, str], None], tensors: bool = True) -> Checkpoint | None:
    """The newest checkpoint under `root` that verifies, or None if `root` holds no checkpoint at all; `tensors` as of
    `load`.

    Each newer one that is damaged is reported as `on_damaged(path, reason)` and skipped. Raises CheckpointError
    naming all of them if there are checkpoints and none verifies: starting over in silence would hide the loss.
    """
    return newest_by(root, lambda path: open_step(path, tensors), on_damaged)


def newest_state(root: Path) -> dict[str, Any] | None:
    """The JSON state of the newest checkpoint under `root` whose manifest is intact; its tensors are not looked at.

    None if `root` holds no checkpoint. Raises CheckpointError if there are some and no manifest is intact.
    """
    return newest_by(root, lambda path: _read_manifest(path)["state"], lambda path, reason: None)


def newest_by(root: Path, read: Callable[[Path], Found], on_damaged: Callable[[Path, str], None]) -> Found | None:
    """What `read` makes of the newest checkpoint under `root` for which it raises no CheckpointError.

    `on_damaged`, the answer None, and CheckpointError as of `newest`.
    """
    reasons = []
    for step in reversed(steps(root)):
        path = path_of(root, step)
        try:
            return read(path)
        except CheckpointError as error:
            on_damaged(path, str(error))
            reasons.append(f"{path.name}: {error}")
    if reasons:
        raise CheckpointError(
            f"none of the {len(reasons)} checkpoints in {root} can be used; move them away to start anew:\n  "
            + "\n  ".join(reasons)
        )
    return None


def digest(path: Path) -> str:
    """The manifest's own hash of the checkpoint at `path`, or what is wrong with the manifest."""
    try:
        manifest = _read_manifest(path)
    except CheckpointError as error:
        return str(error)
    return manifest[_HASHES[manifest["format"]][0]]


def steps(root: Path) -> list[int]:
    """Steps of the checkpoint directories under `root`, ascending, damaged ones included."""
    root = Path(root)
    if not root.is_dir():
        return []
    return sorted(int(match[1]) for path in root.iterdir() if (match := _STEP.fullmatch(path.name)) and path.is_dir())


def _read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest, once its own hash and every field of it have been checked."""
    data = _read_bytes(directory / MANIFEST, _MANIFEST_LIMIT)
    try:
        manifest = json.loads(data)
        if not isinstance(manifest, dict):
            raise CheckpointError(f"{MANIFEST} does not match its own hash")
        if (written := manifest.get("format")) not in list(_HASHES):
            raise CheckpointError(
                f"{MANIFEST} has format {written!r}; this version of fastdeit reads format "
                f"{' and '.join(map(str, _HASHES))}"
            )
        intact = _encode(manifest) == data
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{MANIFEST} is not JSON ({error})") from error
    if not intact:
        raise CheckpointError(f"{MANIFEST} does not match its own hash")
    _check_manifest(manifest, directory)
    return manifest


def _check_manifest(manifest: dict[str, Any], directory: Path) -> None:
    step, files = manifest.get("step"), manifest.get("files")
    named = _STEP.fullmatch(directory.name)
    if type(step) is not int or (named and int(named[1]) != step):
        raise CheckpointError(f"{MANIFEST} is that of step {step!r}")
    if not isinstance(manifest.get("state"), dict) or not isinstance(files, dict):
        raise CheckpointError(f"{MANIFEST} has no state or no list of files")
    for name, entry in files.items():
        if not _FILE.fullmatch(name):
            raise CheckpointError(f"{MANIFEST} lists {name!r}, which is not the name of a checkpoint file")
        known = isinstance(entry, dict) and type(entry.get("bytes")) is int
        if not known or type(entry.get(_HASHES[manifest["format"]][0])) is not str:
            raise CheckpointError(f"{MANIFEST} gives no size or no hash for {name}")


def _check_size(path: Path, entry: dict[str, Any]) -> None:
    size = _size(path)
    if size != entry["bytes"]:
        raise CheckpointError(f"{path.name} has {size} bytes, the manifest says {entry['bytes']}")


def _size(path: Path) -> int:
    try:
        info = path.lstat()
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(info.st_mode):
        raise CheckpointError(f"{path.name} is not a regular file")
    return info.st_size


def _read_bytes(path: Path, limit: int) -> bytes:
    if _size(path) > limit:
        raise CheckpointError(f"{path.name} is larger than {limit} bytes")
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path.name} cannot be read: {error.strerror}") from error


def _check_hashes(directory: Path, manifest: dict[str, Any]) -> None:
    """Raise CheckpointError unless all listed files have the hashes they were written with.

    Files are hashed side by side, a piece at a time: hashing takes longer than reading from most disks. The threads are
    daemons, and not those of an executor, so that a process which fails or is interrupted meanwhile ends at once.
    """
    files = manifest["files"]
    found: dict[str, str | CheckpointError] = {}

    def look_at(name: str) -> None:
        try:
            found[name] = _hash_file(directory / name, manifest["format"])
        except OSError as error:
            found[name] = CheckpointError(f"{name} cannot be read: {error.strerror}")

    threads = [Thread(target=look_at, args=[name], daemon=True, name="fastdeit-hash") for name in files]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, entry in files.items():
        hashed = found[name]
        if isinstance(hashed, CheckpointError):
            raise hashed
        if hashed != entry[_HASHES[manifest["format"]][0]]:
            raise CheckpointError(f"{name} has changed since it was written: its hash differs from the manifest's")


def _opens(directory: Path, verify: bool) -> bool:
    """Whether the manifest is intact and every file has its size; with `verify`, which reads them all, its hash too."""
    try:
        open_step(directory, tensors=False, verify=verify)
    except CheckpointError:
        return False
    return True


def _hash(data: bytes, written: Any = FORMAT) -> str:
    """Hash of `data` in a manifest of the format `written`."""
    digest = _HASHES.get(written, _HASHES[FORMAT])[1]()
    digest.update(data)
    return digest.hexdigest()


def _hash_file(path: Path, written: int = FORMAT) -> str:
    digest = _HASHES[written][1]()
    piece = memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(piece):
            digest.update(piece[:count])
    return digest.hexdigest()


# ---- retention -----------------------------------------------------------------------------------


def prune(root: Path, keep_last: int, keep: Collection[int] = ()) -> None:
    """Remove all but the newest `keep_last` checkpoints and the steps in `keep`.

    Only whole checkpoints count towards `keep_last`: intact manifest, files of the recorded sizes. (Contents are not
    hashed again, which would read `keep_last` checkpoints at every save.) So damaged ones never push out good ones;
    they stay, for inspection, until `keep_last` whole ones are newer. Nothing but real directories named step_ and
    eight digits is removed. A checkpoint is renamed away before its files go, so a kill here leaves no half
    checkpoint either. Raises CheckpointError if the file system refuses.
    """
    if keep_last < 1:
        raise ValueError(f"keep_last is {keep_last}; at least the newest checkpoint must stay")
    whole = 0
    for step in reversed(steps(root)):
        path = path_of(root, step)
        if whole < keep_last:
            whole += _opens(path, verify=False)
        elif step not in keep and _is_directory(path):
            try:
                _remove_tree(_set_aside(path))
            except OSError as error:
                raise CheckpointError(
                    f"the old checkpoint {path} could not be removed: {error}; {way_out(error)}"
                ) from error


def sweep(root: Path) -> None:
    """Remove what savers that are no more left half-written under `root`. Call it once at start, from one process.

    A temporary directory names its owner. It goes when that process is gone from this machine; one of another
    machine, whose processes cannot be seen from here, goes when nothing was added to it for a day.
    """
    root = Path(root)
    if not root.is_dir():
        return
    for path in sorted(root.iterdir()):
        match = _TEMPORARY.fullmatch(path.name)
        if match and _is_directory(path) and _is_abandoned(path, match):
            try:
                _remove_tree(path)
            except OSError as error:
                what = f"the unfinished checkpoint {path} could not be removed: {error}; {way_out(error)}"
                raise CheckpointError(what) from error


def _is_abandoned(path: Path, owner: re.Match[str]) -> bool:
    if owner["host"] != os.uname().nodename:
        return time.time() - path.stat().st_mtime > _FOREIGN_SECONDS
    return _start_of(int(owner["pid"])) != int(owner["start"])


def _start_of(pid: int) -> int | None:
    """Start time of a living process in clock ticks since boot, which tells it from a later one of the same id."""
    try:
        # The command name, in parentheses, may hold spaces; field 3 (state) follows it and field 22 is the start time.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] in "ZX" else int(fields[19])


# ---- the file system -----------------------------------------------------------------------------


def path_of(root: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies. Raises CheckpointError for a number that cannot name one."""
    if not 0 <= step <= MAX_STEP:
        raise CheckpointError(f"step {step} cannot name a checkpoint; it must be between 0 and {MAX_STEP}")
    return Path(root) / f"step_{step:08d}"


def _temporary_name(name: str) -> str:
    pid = os.getpid()
    return f".tmp-{name}-{uuid.uuid4().hex[:8]}-{pid}-{_start_of(pid)}-{os.uname().nodename}"


def _is_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _set_aside(path: Path) -> Path:
    """Take a checkpoint out of sight in one step, under a name that `sweep` clears up should this process die."""
    aside = path.with_name(_temporary_name(path.name))
    _fault.point(f"rename {path.name}")
    return path.rename(aside)


def _remove_tree(directory: Path) -> None:
    for parent, directories, files in os.walk(directory, topdown=False):
        for name in files:
            _fault.point(f"unlink {name}")
            os.unlink(os.path.join(parent, name))
        for name in directories:
            entry = os.path.join(parent, name)
            (os.unlink if os.path.islink(entry) else os.rmdir)(entry)
    _fault.point(f"unlink {directory.name}")
    os.rmdir(directory)
