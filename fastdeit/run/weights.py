"""Weights by their address, what is known of them, and the network that they belong to.

Every verb and every field that takes weights goes through `open_weights` (see `address` for the words), so a run, a
file of somebody else's and a timm model can be handed to each of them. `load` puts them into a network, and `network`
makes the one that they belong to. What is chosen, stripped, renamed or resized is told; what does not fit is refused in
a sentence.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import isqrt
from pickle import UnpicklingError
from typing import Any, Literal

import safetensors.torch
import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from torch import Tensor, nn

from fastdeit import models, plugins
from fastdeit.engine.checkpoint import Checkpoint
from fastdeit.errors import UsageError
from fastdeit.fields import size_pair
from fastdeit.models import convert, pickled
from fastdeit.models.contract import ImageSize
from fastdeit.models.families import CONFIGS, names_by_shapes
from fastdeit.models.weights import load_weights, second_names
from fastdeit.run import classes as class_lists
from fastdeit.run import hub, reach
from fastdeit.run.address import Address, parse
from fastdeit.run.chosen import chosen, place_of, state_of
from fastdeit.text import one_line, some

KNOWN = "fastdeit"
"""Key of the JSON of `Known` in the header of a safetensors file that `fastdeit export` wrote."""
Purpose = Literal["student", "teacher", "features"]
"""What a network is loaded for.

student   it will be trained: a head and a distillation token that only one side has are made anew or left out
teacher   it will answer as it is: everything must be there, and nothing may be left over
features  as teacher, but nobody reads its head
"""


@dataclass(frozen=True)
class Known:
    """What is known of the network that weights belong to; None where nothing tells.

    name        a model of fastdeit.models, or an import path
    timm        a model of timm
    image_size  (height, width) in pixels that it was trained at
    num_classes outputs of its head
    classes     names in the order of the head
    mean, std   of the normalisation of its input, in units of [0, 1]
    crop_ratio  of evaluation
    method      `method.use` of the run
    """

    name: str | None = None
    timm: str | None = None
    image_size: tuple[int, int] | None = None
    num_classes: int | None = None
    classes: tuple[str, ...] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop_ratio: float | None = None
    method: str | None = None


@dataclass(frozen=True)
class Weights:
    """The tensors that an address names.

    origin      for messages: "runs/x, step 1250, averaged weights"
    tensors     by name as our models and timm have them, on the CPU; of a run the student's
    known       what is known of their network
    notes       what was chosen, stripped or skipped, one sentence each, to be said to the user
    checkpoint  where the address is of a run or checkpoint: state of method and engine, and the recipe
    averaged    whether they are the average of a run's weights
    as_named    the tensors as the file names them, where `tensors` has other names
    """

    origin: str
    tensors: dict[str, Tensor]
    known: Known = Known()
    notes: tuple[str, ...] = ()
    checkpoint: Checkpoint | None = None
    averaged: bool = False
    as_named: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def grid(self) -> tuple[int, int] | None:
        """(rows, columns) of the patches that the positional embedding is for; None where nothing tells."""
        patch, size = self.tensors.get("patch_embed.proj.weight"), self.known.image_size
        positions = self.tensors.get("pos_embed")
        if patch is None or patch.ndim != 4 or size is None or positions is None or positions.ndim != 3:
            return None
        grid = size[0] // patch.shape[2], size[1] // patch.shape[3]
        return grid if 0 <= positions.shape[1] - grid[0] * grid[1] < _MOST_PREFIX_TOKENS else None

    def square(self, name: str | None) -> int | None:
        """Pixels per side that the positional embedding is for, if it is that of a square.

        name  a model of fastdeit, which tells the size of its patches where they go through more than one layer
        """
        patch, positions = self.tensors.get("patch_embed.proj.weight"), self.tensors.get("pos_embed")
        pixels = patch.shape[2] if patch is not None and patch.ndim == 4 else None
        if pixels is None and name in CONFIGS:
            pixels = CONFIGS[name].patch_size
        if pixels is None or positions is None or positions.ndim != 3:
            return None
        counts = [positions.shape[1] - prefix for prefix in range(3)]
        side = next((isqrt(count) for count in counts if count > 0 and isqrt(count) ** 2 == count), None)
        return None if side is None else side * pixels

    @property
    def method(self) -> dict[str, Tensor]:
        """What a checkpoint has of the method besides the student, as its `state_dict` names it; averaged as these."""
        if self.checkpoint is None:
            return {}
        files = self.checkpoint.tensors
        own = dict(files["method"])
        return own | {name: files["ema"][name] for name in own.keys() & files["ema"].keys()} if self.averaged else own


_MOST_PREFIX_TOKENS = 32


@contextmanager
def _naming(origin: object) -> Iterator[None]:
    """A ValueError in the block is a UsageError of the weights: on one line, whatever names are in their file."""
    try:
        yield
    except ValueError as error:
        raise UsageError(one_line(f"{origin}: {error}")) from error


# ---- by address ------------------------------------------------------------------------------------------------------


def open_weights(address: str) -> Weights:
    """The weights at `address`, whole and on the CPU.

    Raises UsageError, in a sentence with the address and the way out, where there are none, where they are damaged, and
    where the address does not say which.
    """
    parsed = parse(address)
    try:
        found = _OPENERS[parsed.kind](parsed)
    except OSError as error:
        raise UsageError(f"{address}: it cannot be read: {error.strerror or error}") from error
    if not found.tensors:
        raise UsageError(f"{address}: there is no tensor in it")
    return found


def _run(address: Address) -> Weights:
    """Of the checkpoint that an address of a run or a checkpoint means."""
    found, notes = chosen(address)
    return _of_checkpoint(address, found, notes)


def _of_checkpoint(address: Address, found: Checkpoint, notes: list[str]) -> Weights:
    recipe, identity = state_of(address, found, "recipe"), state_of(address, found, "identity")
    tensors = dict(found.tensors.get("model", {}))
    if not tensors:
        raise UsageError(f"{address}: {found.path} is a checkpoint without a model")
    origin = one_line(f"{place_of(found)}, step {found.step}")
    try:
        known = _known_of_run(recipe, identity)
    except ValidationError as error:
        raise UsageError(f"{address}: what {found.path} says of its network is damaged: {_fields(error)}") from error
    except (KeyError, TypeError, ValueError) as error:
        why = f"{found.path} is no checkpoint of `fastdeit train`: its recipe has no {error}"
        raise UsageError(f"{address}: {why}") from error
    weights = Weights(origin, tensors, known, tuple(notes), found)
    if not address.ema:
        return weights
    if (average := average_of(weights)) is None:
        raise UsageError(f"{address}: the run keeps no average of its weights (optim.ema_decay); leave out the ema")
    return average


def average_of(weights: Weights) -> Weights | None:
    """The average of these weights, where their checkpoint has one; what it does not average stays as it is."""
    if weights.averaged or weights.checkpoint is None or "ema" not in weights.checkpoint.tensors:
        return None
    averages = weights.checkpoint.tensors["ema"]
    # Under the names of the method, of which the student is the part `model`.
    tensors = {name: averages.get(f"model.{name}", tensor) for name, tensor in weights.tensors.items()}
    return replace(weights, origin=f"{weights.origin}, averaged weights", tensors=tensors, averaged=True)


def _known_of_run(recipe: Mapping[str, Any], identity: Mapping[str, Any]) -> Known:
    model, data = recipe["model"], recipe["data"]
    names = tuple(identity["classes"])
    told = {
        "name": model["name"],
        "timm": model["timm"],
        "image_size": size_pair(model["image_size"], "image_size"),
        "num_classes": len(names),
        "classes": names,
        "mean": tuple(data["mean"]),
        "std": tuple(data["std"]),
        "crop_ratio": data["eval_crop_ratio"],
        "method": recipe["method"]["use"],
    }
    return TypeAdapter(Known).validate_python(told)


def _safetensors(address: Address) -> Weights:
    try:
        tensors = safetensors.torch.load_file(address.path)
        with safetensors.safe_open(address.path, "pt") as file:
            header = file.metadata() or {}
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(one_line(f"{address}: it is damaged, or no safetensors file ({reason})")) from error
    return _of_file(address, tensors, [], _known_of_header(address, header[KNOWN]) if KNOWN in header else None)


def _known_of_header(address: Address, text: str) -> Known:
    """What `fastdeit export` wrote into a file about its network."""
    try:
        known = TypeAdapter(Known).validate_json(text)
    except ValidationError as error:
        what = f"{address}: what its header says of the model is damaged: {_fields(error) or 'the JSON'}"
        raise UsageError(one_line(what)) from error
    plugins.read_from(address, (known.name or "", known.method or ""))
    return known


def _fields(error: ValidationError) -> str:
    """The first fields that are not as they should be."""
    return some([".".join(map(str, problem["loc"])) for problem in error.errors() if problem["loc"]])


def _pickle(address: Address) -> Weights:
    with _naming(address):
        found = pickled.read(address.path, address.entry)
    return _of_file(address, found.tensors, list(found.notes))


def _of_file(address: Address, tensors: dict[str, Tensor], notes: list[str], known: Known | None = None) -> Weights:
    """`known` is what the file itself tells of its network; None: a config.json beside it is asked."""
    with _naming(address):
        named, stripped = convert.bare(tensors)
        told = hub.described(address.path) if known is None else {}
    if told:
        architecture = told.pop("architecture")
        known = Known(**{"name" if architecture in models.MODELS else "timm": architecture}, **told)
        notes.append(f"{architecture}, as config.json beside it says")
    as_named = tensors if named.keys() != tensors.keys() else {}
    return Weights(one_line(address), named, known or Known(), (*notes, *stripped), as_named=as_named)


def is_cached(address: Address) -> bool:
    """Whether the weights of a timm model are in the hub's cache. Raises UsageError where timm publishes none."""
    from fastdeit.models import timm_model

    return timm_model.cached(_with_weights(address)) is not None


def published_classes(address: Address) -> int:
    """Classes that the weights of a timm model know, which timm tells without them. Raises as `is_cached`."""
    return _with_weights(address).num_classes


def _with_weights(address: Address) -> Any:
    config = _published(address.text, address.name)
    if config is None or not config.has_weights:
        raise UsageError(f"{address}: timm publishes no weights for it")
    return config


def _timm(address: Address) -> Weights:
    config = _with_weights(address)
    from fastdeit.models import timm_model

    if timm_model.cached(config) is None and (why := reach.hindrance(config)) is not None:
        raise UsageError(_no_weights(address, why))
    try:
        built = models.build_timm(address.name, pretrained=True)
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, SafetensorError, UnpicklingError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0].removesuffix(".")
        if (file := timm_model.cached(config)) is not None:
            why = f"timm's weights in the cache of the hub, {file}, are damaged ({reason}); remove that file"
            raise UsageError(f"{address}: {why}") from error
        raise UsageError(_no_weights(address, reason)) from error
    known = Known(
        timm=address.name,
        image_size=built.image_size,
        num_classes=built.inner.num_classes or None,
        classes=_imagenet_classes(config),
        mean=built.mean,
        std=built.std,
        crop_ratio=config.crop_pct,
    )
    return Weights(f"timm's {address.name}", dict(built.state_dict()), known)


def _no_weights(address: Address, reason: str) -> str:
    return (
        f"{address}: timm's weights are not on this machine and cannot be downloaded ({reason}). With no network, copy "
        "their file here and give its path instead, as in PATH.safetensors; or run this where there is one, and copy "
        f"the cache of the hub (HF_HOME): python -c \"import timm; timm.create_model('{address.name}', "
        'pretrained=True)"'
    )


def _published(origin: str, name: str) -> Any:
    # timm takes a second to import, and only its own weights need it.
    from fastdeit.models import timm_model

    with _naming(origin):
        return timm_model.published(name)


def _imagenet_classes(config: Any) -> tuple[str, ...] | None:
    """The WordNet ids of the head's rows, where timm knows on which part of ImageNet it was trained."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset(config)
    return None if subset is None else tuple(ImageNetInfo(subset).label_names())


_OPENERS: dict[str, Callable[[Address], Weights]] = {
    "run": _run,
    "checkpoint": _run,
    "safetensors": _safetensors,
    "pickle": _pickle,
    "timm": _timm,
}


# ---- into a network --------------------------------------------------------------------------------------------------


def load(
    network: nn.Module,
    weights: Weights,
    *,
    purpose: Purpose,
    classes: Sequence[str] | None = None,
    grid: tuple[int, int] | None = None,
) -> tuple[str, ...]:
    """Put `weights` into `network` and return what is to be said of it, one sentence each.

    classes  names of the classes of the data in the order of their labels; None: nothing is compared
    grid     (rows, columns) of the patches of the weights, where the weights do not tell it themselves

    The class lists are compared in order. In another order, the rows of the heads are put into that of the data. Other
    names in the same number are told for a student and refused for a teacher, as any other number is.
    Raises UsageError, before the network is changed, where the weights do not fit.
    """
    own = network.state_dict()
    tensors = weights.tensors
    if len(own.keys() & weights.as_named.keys()) > len(own.keys() & tensors.keys()):
        tensors = dict(weights.as_named)  # the network itself has the names that were stripped
    if weights.averaged:
        tensors = tensors | _averages_of_second_names(network, weights)
    notes, rows = [], None
    if classes is not None and purpose != "features":
        notes, rows = _compared(weights, classes, purpose)
    positions = weights.tensors.get("pos_embed")
    if grid is not None and (positions is None or positions.ndim != 3 or getattr(network, "grid", None) is None):
        raise UsageError(
            f"{weights.origin}: weights_grid describes a grid of positions, and there is none; leave it out"
        )
    if None not in (grid, weights.grid) and grid != weights.grid:
        theirs, said = (f"{rows} x {columns}" for rows, columns in (weights.grid, grid))
        raise UsageError(
            f"{weights.origin}: weights_grid says {said} patches, but the weights themselves say {theirs}; leave "
            "weights_grid out"
        )
    may_differ = {"student": None, "teacher": (), "features": (*network.head_names, "head", "head_dist")}[purpose]
    with _naming(weights.origin):
        report = load_weights(network, tensors, weights.grid or grid or _grid_as_of(network, weights), may_differ)
    if rows is not None and not report.reinitialised_heads:
        _permute_heads(network, rows)
    dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values() if tensor.is_floating_point()}
    if others := sorted(dtypes - {"float32"}):
        notes.append(f"converted from {' and '.join(others)} to float32")
    return (*notes, *([] if report.exact else [str(report)]))


def _averages_of_second_names(network: nn.Module, weights: Weights) -> dict[str, Tensor]:
    """By its further names the average of a tied tensor, which checkpoints of earlier versions have under the first
    alone."""
    there, tensors = weights.checkpoint.tensors["ema"], weights.tensors
    further = {name: first for name, first in second_names(network).items() if f"model.{name}" not in there}
    return {name: tensors[first] for name, first in further.items() if first in tensors}


def _grid_as_of(network: nn.Module, weights: Weights) -> tuple[int, int] | None:
    """(rows, columns) of the patches at the size that the weights were trained at, where the network tells its own
    `grid` and `image_size`; None where it does not, or where these are not the positions of the weights."""
    positions, known = weights.tensors.get("pos_embed"), weights.known.image_size
    grid, own = getattr(network, "grid", None), getattr(network, "image_size", None)
    if None in (positions, known, grid, own) or positions.ndim != 3:
        return None
    (height, width), (rows, columns) = size_pair(own, "image_size"), grid
    rows, columns = known[0] * rows // height, known[1] * columns // width
    return (rows, columns) if 0 <= positions.shape[1] - rows * columns < _MOST_PREFIX_TOKENS else None


def _compared(weights: Weights, ours: Sequence[str], purpose: Purpose) -> tuple[list[str], list[int] | None]:
    """(what is to be said of the classes `ours`, the order of the heads' rows that they need; None: as they are)."""
    theirs = weights.known.classes
    if theirs is None or not class_lists.comparable(theirs, ours):
        return [], None
    match = class_lists.match(theirs, ours)
    if match.kind == "permuted":
        told = "the classes are in another order: put the rows of the heads into that of the data"
        return [told], list(match.permutation)
    if match.kind == "other_names":
        why = class_lists.difference(theirs, ours)
        if purpose == "teacher":
            raise UsageError(f"{weights.origin}: the classes of the data are not those of the weights: {why}")
        return [f"the heads were trained on other classes and have to learn these: {why}"], None
    if match.kind == "other_count" and purpose == "teacher":
        raise UsageError(f"{weights.origin}: the weights know {len(theirs)} classes, and the data have {len(ours)}")
    return [], None


@torch.no_grad()
def _permute_heads(network: nn.Module, rows: list[int]) -> None:
    for name in network.head_names:
        for parameter in network.get_submodule(name).parameters():
            parameter.copy_(parameter[rows])


def network(
    weights: Weights,
    *,
    name: str | None = None,
    num_classes: int | None = None,
    image_size: ImageSize | None = None,
    classes: Sequence[str] | None = None,
    grid: tuple[int, int] | None = None,
    purpose: Purpose = "teacher",
    say: Callable[[str], None] | None = None,
) -> nn.Module:
    """The network that `weights` belong to, loaded, in eval mode, on the CPU.

    name         a model of fastdeit, an import path, or "timm:NAME"; None: the one that the weights are known to be of
    num_classes  None: as many as the weights' head has
    image_size   in pixels; None: what the weights were trained at. At another size positions are interpolated
    classes, grid, purpose   as of `load`; `say` is told what that tells

    Raises UsageError where nothing tells which network it is, and where the weights do not fit it.
    """
    known = _named(weights.known, name)
    if known.name is None and known.timm is None:
        raise UsageError(
            f"{weights.origin}: nothing tells which model these weights are of; name it{likely_models(weights)}"
        )
    size = image_size or known.image_size or weights.square(known.name)
    options: dict[str, Any] = {} if size is None else {"image_size": size}
    count = num_classes or known.num_classes or _rows_of_head(weights, known)
    if count is not None:
        options["num_classes"] = count
    with _naming(weights.origin):
        built = models.of(known.name, known.timm, **options)
    for note in load(built, weights, purpose=purpose, classes=classes, grid=grid):
        if say is not None:
            say(f"{weights.origin}: {note}")
    return built.eval()


def _named(known: Known, name: str | None) -> Known:
    if name is None:
        return known
    if name.startswith("timm:"):
        return replace(known, name=None, timm=name.removeprefix("timm:"))
    return replace(known, name=name, timm=None)


def _rows_of_head(weights: Weights, known: Known) -> int | None:
    """Classes of the head, where a file has it under the name that its network gives it."""
    names = ["head"]
    if known.timm is not None:
        config = _published(weights.origin, known.timm)
        classifier = None if config is None else config.classifier
        names = [classifier] if isinstance(classifier, str) else list(classifier or ())
    head = next((weights.tensors[f"{name}.weight"] for name in names if f"{name}.weight" in weights.tensors), None)
    return None if head is None else len(head)


def likely_models(weights: Weights) -> str:
    """The end of a sentence that asks for the name of a model: those whose shapes these are, or whose they could be."""
    fitting = names_by_shapes({name: tuple(tensor.shape) for name, tensor in weights.tensors.items()})
    if fitting:
        return f"; by their shapes they can be of {' or '.join(fitting)}"
    return f", a model of fastdeit or timm:NAME; they have {some(weights.tensors)}"
