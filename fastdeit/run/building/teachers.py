"""From a recipe to the networks that teach."""

from collections.abc import Sequence
from pathlib import Path

from fastdeit.errors import UsageError, naming
from fastdeit.fields import ImageSize, size_pair
from fastdeit.kernels.dtypes import DTYPES
from fastdeit.methods.config import TeacherConfig
from fastdeit.methods.frozen import freeze
from fastdeit.methods.teacher import Teacher
from fastdeit.recipe.resolve import Recipe
from fastdeit.run.building.messages import Report
from fastdeit.run.building.pictures import image_size
from fastdeit.run.building.student import model
from fastdeit.run.weights import network, open_weights


def teacher(
    config: TeacherConfig,
    size: tuple[int, int],
    num_classes: int,
    trained: Path | None,
    precision: str = "fp32",
    *,
    classes: Sequence[str] | None = None,
    say: Report | None = None,
) -> Teacher:
    """The teacher that `config` describes, ready to be asked in `precision` (of the recipe's engine).

    size     (height, width) in pixels of the student's input
    trained  the run of a teacher that has a recipe of its own, else None
    classes  names of the data's classes in the order of their labels, compared with those of the teacher's weights

    A teacher that is a run sees the size and normalisation that it was trained with, unless `config` says otherwise,
    whatever the student's are. Raises UsageError where its weights do not fit, have anything left over, or are of other
    classes.
    """
    name = config.model if config.timm is None else f"timm:{config.timm}"
    address = config.weights or (str(trained) if config.recipe is not None else name)
    with naming(teacher_field(config)):
        found = open_weights(address)
        known = found.known
        check_classes(found.origin, config, known.num_classes, num_classes)
        told = [f"{found.origin}: {note}" for note in found.notes]
        of_a_run = found.checkpoint is not None
        trained_as = known.name if known.timm is None else f"timm:{known.timm}"
        if of_a_run and name not in (None, trained_as):
            field = "model" if config.timm is None else "timm"
            raise UsageError(
                f"{found.origin} is of {trained_as}, but method.teacher.{field} says {name}; a run tells its network "
                f"itself: add method.teacher.{field}=null"
            )
        side = config.image_size or (known.image_size if of_a_run else None)
        built = network(
            found,
            name=name,
            num_classes=num_classes if config.classifies else None,
            image_size=side or size,
            classes=classes,
            grid=config.weights_grid,
            purpose="teacher" if config.classifies else "features",
            say=told.append,
        )
        if size_pair(side or size, "method.teacher.image_size") != size:
            told.append(
                f"{found.origin}: sees {_pixels(side)}, the student {_pixels(size)} (method.teacher.image_size)"
            )
    for note in told if say is not None else ():
        say(f"teacher: {note}")
    mean, std = (config.mean, config.std) if config.mean is not None else (known.mean, known.std)
    if mean is None and config.timm is not None:
        mean, std = built.mean, built.std
    frozen = freeze(built, size_pair(side or size, "method.teacher.image_size"), DTYPES[precision])
    return Teacher(frozen, image_size=side, mean=mean, std=std)


def teacher_field(config: TeacherConfig) -> str:
    """The field of a recipe that says where the weights of the teacher are."""
    return "method.teacher" if config.weights is None else "method.teacher.weights"


def check_classes(origin: str, config: TeacherConfig, known: int | None, num_classes: int) -> None:
    """Raise UsageError for a teacher whose weights know another number of classes than the data have; None: nothing
    tells it."""
    if config.classifies and known not in (None, num_classes):
        raise UsageError(
            f"{origin}: the weights know {known} classes, but the data set has {num_classes}; give a teacher that was "
            "trained on this data set"
        )


def _pixels(size: ImageSize) -> str:
    height, width = size_pair(size, "image_size")
    return f"{height}x{width} pixels"


def untrained_teacher(own: Recipe, config: TeacherConfig, classes: int) -> Teacher:
    """The teacher as it will be but for its weights: what is built around it can be checked before it is trained."""
    frozen = freeze(model(own, classes, lambda text: None), image_size(own))
    mean, std = (own.data.mean, own.data.std) if config.mean is None else (config.mean, config.std)
    return Teacher(frozen, image_size=config.image_size or image_size(own), mean=mean, std=std)
