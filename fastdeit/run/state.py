"""What the JSON state of a run's checkpoint holds, by schema number, and how an older one becomes the present one.

A change of the fields below gets another number, a migration, and a tiny checkpoint in `tests/run/checkpoints` that is
resumed by every later version. This module imports no torch.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from fastdeit.errors import UsageError
from fastdeit.version import __version__

SCHEMA = 1


def _from_0(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Schema 0 had no number, and did not say by how many processes and which versions it was written."""
    return {**plain, "schema": 1, "world": None, "versions": {}, "changes": []}


_LATER = {"engine": {"autotune": "off", "keep_activations": False}}
"""Fields of a recipe that the first runs did not have yet, and what these runs did, which rounds otherwise than the
default of today."""


MIGRATIONS: Mapping[int, Callable[[Mapping[str, Any]], dict[str, Any]]] = {0: _from_0}
"""By schema number, the state of the next one."""


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class _Identity(_Part):
    train: str
    val: str
    classes: list[str]
    cache: dict[str, Any] = {}


class _Clock(_Part):
    seconds: FiniteFloat
    paused: FiniteFloat
    at: FiniteFloat


class _Record(_Part):
    evaluated_step: int = 0
    best_step: int = 0
    best: float | None = None
    best_by: str | None = None
    evaluations_since_best: int = 0
    phase: str
    train_loss: float | None = None
    teacher_top1: float | None = None
    metrics: dict[str, float] = {}
    images: int = 0
    seconds: FiniteFloat = 0.0
    waited: FiniteFloat = 0.0
    kernels: list[Annotated[tuple[str, list[Any], str], Field(strict=False)]] | None = None
    clock: _Clock | None = None


class _State(_Part):
    number: int = Field(alias="schema")
    recipe: dict[str, Any]
    identity: _Identity
    record: _Record
    steps: int
    steps_per_epoch: int
    lineage: list[dict[str, Any]]
    world: int | None
    versions: dict[str, str | None]
    changes: list[dict[str, Any]]


def checked(plain: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """The state of the checkpoint at `where` in the present schema. Its recipe keeps what the run began with.

    Raises UsageError, with what to do, for a schema that this version does not know, and for fields that are missing,
    unknown or of another type.
    """
    number = plain.get("schema", 0)
    if type(number) is not int or not 0 <= number <= SCHEMA:
        by = (plain.get("versions") or {}).get("fastdeit") if isinstance(plain.get("versions"), dict) else None
        raise UsageError(
            f"{where} has schema {number!r}, and this version of fastdeit ({__version__}) reads 0 to {SCHEMA}; go on "
            f"with the version that wrote it{f', {by}' if by else ''}"
        )
    while number < SCHEMA:
        plain = MIGRATIONS[number](plain)
        number += 1
    try:
        _State.model_validate(plain)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        more = f" ({error.error_count() - 1} more fields do not fit either)" if error.error_count() > 1 else ""
        raise UsageError(
            f"{where} is intact, but not as this version of fastdeit ({__version__}) writes it: state {field}: "
            f"{first['msg'].lower()}{more}; go on with the version that wrote it"
        ) from error
    return {**plain, "recipe": _as_it_began(plain["recipe"])}


def _as_it_began(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with `_LATER` in the sections that it has."""
    given = {name: recipe[name] for name in _LATER if isinstance(recipe.get(name), dict)}
    return {**recipe, **{name: _LATER[name] | section for name, section in given.items()}}
