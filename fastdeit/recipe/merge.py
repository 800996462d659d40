"""One recipe laid over another: field by field, but for what means nothing once a decision changes."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from fastdeit.data.sources.kinds import GENERATED
from fastdeit.data.sources.share import is_share
from fastdeit.recipe.sections import ADAMW
from fastdeit.recipe.yaml import NOWHERE, FieldPath, Item, first_place


def insert(root: Item, path: FieldPath, item: Item | None) -> None:
    """Put `item` at `path` below `root`, with the sections on the way; None puts the sections alone."""
    for part in path[:-1]:
        root = root.value.setdefault(part, Item({}, NOWHERE))
    if item is not None:
        root.value[path[-1]] = item


class _Choice(NamedTuple):
    """Fields that decide what a section is about, and those of a base that mean nothing once the decision changes."""

    deciding: tuple[str, ...]
    stale: tuple[str, ...] | None = None
    """None: the whole section but for `shared`."""
    shared: tuple[str, ...] = ()
    default: Any = None


_CHOICES: dict[FieldPath, _Choice] = {
    ("model",): _Choice(("name", "timm"), stale=("name", "timm")),
    ("method",): _Choice(("use",)),
    ("method", "teacher"): _Choice(("recipe", "timm", "model")),
    # Rates, decay and clipping of one optimizer say nothing of another's; the schedule and the average are for all.
    ("optim",): _Choice(
        ("name",),
        shared=("schedule", "warmup_epochs", "warmup_lr", "min_lr", "ema_decay", "layer_decay", "decay_dist_token"),
        default=ADAMW,
    ),
    ("train",): _Choice(("epochs", "steps"), stale=("epochs", "steps")),
    ("data",): _Choice(
        ("source",),
        stale=(
            *("root", "train", "val", "image_column", "label_column", "classes"),
            *("synthetic_samples", "synthetic_classes"),
        ),
        default="folder",
    ),
}


# Fields of which a section has one: the one that is given drops the other of a base.
_RIVALS: dict[FieldPath, tuple[str, ...]] = {("method",): ("teacher", "cached")}


def merged(base: Item, child: Item, path: FieldPath = ()) -> Item:
    """`child` laid over `base`: mappings field by field, anything else replaced."""
    if not isinstance(base.value, dict) or not isinstance(child.value, dict):
        return child
    kept = dict(base.value)
    if not path and "data" in kept and _changes_method(base, child):
        kept["data"] = kept["data"].without("views")
    choice = _CHOICES.get(path)
    if choice is not None and _decides_anew(choice, base.value, child.value):
        if choice.stale is None:
            shared = {key: item for key, item in kept.items() if key in choice.shared}
            return Item(shared | child.value, first_place(child))
        kept = base.without(*choice.stale).value
        held_out = base.value.get("val")
        generated = "source" in child.value and child.value["source"].value in GENERATED
        if not generated and held_out is not None and isinstance(held_out.value, str) and is_share(held_out.value):
            kept["val"] = held_out  # a share is one of any source that is read
    rivals = _RIVALS.get(path, ())
    if any(key in child.value and child.value[key].value is not None for key in rivals):
        kept = {key: item for key, item in kept.items() if key not in rivals or key in child.value}
    for key, item in child.value.items():
        kept[key] = merged(kept[key], item, (*path, key)) if key in kept else item
    return Item(kept, child.place if child.place != NOWHERE else base.place)


def _changes_method(base: Item, child: Item) -> bool:
    """Whether the views of `base` belong to a method that is not trained."""
    old, new = (root.value["method"].value if "method" in root.value else None for root in (base, child))
    return isinstance(old, dict) and isinstance(new, dict) and _decides_anew(_CHOICES["method",], old, new)


def _decides_anew(choice: _Choice, base: Mapping[str, Item], child: Mapping[str, Item]) -> bool:
    return any(
        key in child and child[key].value not in (None, base[key].value if key in base else choice.default)
        for key in choice.deciding
    )
