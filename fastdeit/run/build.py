"""From a recipe to the parts of a run: sources, loaders, model, method, teacher."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from fastdeit import cores, kernels, methods, models, rng
from fastdeit.data.bad import BadList, OnBad
from fastdeit.data.loader import EvalLoader, TrainLoader
from fastdeit.data.plan import order
from fastdeit.data.plan.plan import Augment, Mixing
from fastdeit.data.sources import digits
from fastdeit.data.sources.datasets import advice, kinds_at, layout, open_held_out, open_pair
from fastdeit.data.sources.kinds import GENERATED, Columns
from fastdeit.data.sources.source import DataError, MachineError, Source
from fastdeit.data.sources.synthetic import SyntheticSource
from fastdeit.engine.checkpoint import MAX_STEP
from fastdeit.engine.clip import UnitClipping
from fastdeit.engine.dist import World
from fastdeit.engine.ema import EmaTeacher
from fastdeit.engine.step import DTYPES
from fastdeit.errors import UsageError
from fastdeit.fields import ImageSize, Section, size_pair
from fastdeit.methods.base import Context, Method, Momentum, scores
from fastdeit.methods.config import MethodConfig, TeacherConfig
from fastdeit.methods.evaluators import Classify, HeldOutLoss
from fastdeit.methods.frozen import freeze
from fastdeit.methods.teacher import Teacher
from fastdeit.models.freeze import freeze_parts
from fastdeit.recipe import differences, idle
from fastdeit.recipe.length import Length, LengthError, length
from fastdeit.run.places import check_root
from fastdeit.run.weights import load, network, open_weights
from fastdeit.views import View, overridden, parse_policy, resolved, size_at

if TYPE_CHECKING:
    from fastdeit.recipe.resolve import Recipe

Report = Callable[[str], None]
Opened = TypeVar("Opened")


def sources(recipe: "Recipe") -> tuple[Source, Source]:
    """(training, held-out) samples. Raises DataError or UsageError with the field, the path and the way out."""
    data = recipe.data
    if data.source == "synthetic":
        shape = {"classes": data.synthetic_classes, "size": image_size(recipe)}
        train = SyntheticSource(data.synthetic_samples, seed=recipe.train.seed, **shape)
        held_out = max(data.synthetic_samples // 10, 1)
        return train, SyntheticSource(held_out, seed=recipe.train.seed + 1, **shape)
    if data.source == "digits":
        return open_pair("folder", digits.prepare())
    return _opened(recipe, open_pair)


def held_out(recipe: "Recipe") -> Source:
    """The held-out samples alone, where the training split need not be there. Raises as `sources`."""
    if recipe.data.source in GENERATED:
        return sources(recipe)[1]
    return _opened(recipe, open_held_out)


def _opened(recipe: "Recipe", opened: Callable[..., Opened]) -> Opened:
    """What `opened` makes of the recipe's kind, root and splits, with errors that say what to do."""
    check_root(recipe)
    data = recipe.data
    splits = data.train, data.val
    try:
        columns = Columns(data.image_column, data.label_column)
        return opened(data.source, data.root, *splits, columns=columns, classes=data.classes)
    except MachineError:
        raise
    except DataError as error:
        raise DataError(
            f"data.source {data.source}: {error}{_expected(error, data.source, data.root, *splits)}"
        ) from error


def _expected(error: DataError, kind: str, root: str, train: str, val: str) -> str:
    """What to add to `error`, the reason why `root` is no data set of that kind."""
    found = kinds_at(root, train, val)
    if kind in found:
        return ""
    if found:
        return f"; it looks like {' or '.join(found)}: add data.source={found[0]}"
    known = advice(root, train, val)
    if known:
        return f"; {known}"
    expected = layout(kind, train, val)
    return "" if expected in str(error) else f"; expected are {expected}"


def compared_classes(recipe: "Recipe", source: Source) -> Sequence[str] | None:
    """Names of the classes of `source` in the order of their labels, with which those of weights are compared; None for
    synthetic images, whose classes have no names."""
    return None if recipe.data.source == "synthetic" else source.classes


def image_size(recipe: "Recipe") -> tuple[int, int]:
    """(height, width) in pixels of the model's input."""
    return size_pair(recipe.model.image_size, "model.image_size")


def scheduled_size(recipe: "Recipe", epoch: int) -> tuple[int, int] | None:
    """(height, width) that `data.size_schedule` has in an epoch; None where there is no schedule."""
    size = size_at(recipe.data.size_schedule, epoch, None)
    return None if size is None else size_pair(size, "data.size_schedule")


def loader_device(device: torch.device) -> str | int:
    """The device as the loaders name it: "cpu" or the index of a GPU."""
    return "cpu" if device.type == "cpu" else device.index or 0


def augmentations(recipe: "Recipe", epoch: int | None = None) -> tuple[Augment, ...]:
    """What the plan of a training sample is drawn from: one for each view that the method wants; `epoch` as of
    `views`."""
    made: dict[str, Augment] = {}
    for view in views(recipe, epoch):
        stream = view.name if made else ""
        made[view.name] = Augment(
            size=view.size,
            crop=view.crop,
            crop_scale=view.crop_scale,
            crop_ratio=view.crop_ratio,
            flip=view.flip,
            policy=parse_policy(view.augment, view.size, view.color_jitter),
            erase=view.erase,
            stream=stream,
            crop_stream=stream if view.crop_of is None else made[view.crop_of].crop_stream,
        )
    return tuple(made.values())


def views(recipe: "Recipe", epoch: int | None = None) -> tuple[View, ...]:
    """The views of every training sample, with every setting that method, recipe and data section give them, in an
    epoch; None: as if `data.size_schedule` were empty."""
    own, size = recipe.method.views(), recipe.model.image_size
    if epoch is not None:
        size = size_at(recipe.data.size_schedule, epoch, size)
    return resolved(overridden(own, recipe.data.views), recipe.data, size)


def mixing(recipe: "Recipe") -> Mixing:
    """How the recipe mixes samples."""
    return Mixing(**{field.name: getattr(recipe.data, field.name) for field in fields(Mixing)})


def run_length(recipe: "Recipe", images: int) -> Length:
    """The length of the recipe's run on so many training images.

    Raises UsageError where the warm-up does not fit, for more copies of an image than there are images, and for more
    steps than checkpoints have names.
    """
    if recipe.data.repeats > images:
        raise UsageError(
            f"recipe {recipe.name}: data.repeats is {recipe.data.repeats}, but there are {images} training images, so "
            "an epoch would show copies of one image alone; add data.repeats=1"
        )
    try:
        found = length(recipe, images, order.steps_per_epoch(images, recipe.train.batch_size))
    except LengthError as error:
        raise UsageError(f"recipe {recipe.name}: {error}") from error
    if found.total > MAX_STEP:
        given = "epochs" if recipe.train.steps is None else "steps"
        raise UsageError(
            f"recipe {recipe.name}: train.{given} makes {found.total:,} steps, and a run has at most {MAX_STEP:,}, "
            "since checkpoints are named by their step"
        )
    return found


def check_batch(recipe: "Recipe", processes: int) -> None:
    """Raise UsageError for a batch that does not divide into groups for so many processes, and for one whose pixels
    alone do not fit the memory of this machine, before any of it is taken."""
    train = recipe.train
    try:
        order.groups_per_batch(train.batch_size, recipe.data.group_size, train.accumulate, processes)
    except ValueError as error:
        raise UsageError(f"recipe {recipe.name} on {processes} processes: {error}") from error
    samples, there = train.batch_size // train.accumulate // processes, cores.memory()
    epochs = [epoch for epoch, _ in recipe.data.size_schedule] or [None]
    needed = samples * max(sum(3 * view.size[0] * view.size[1] for view in views(recipe, epoch)) for epoch in epochs)
    if needed > there:
        raise UsageError(
            f"recipe {recipe.name}: the images of a micro-batch, {samples:,} in a process, have "
            f"{needed / 2**30:,.1f} GiB, and there are {there / 2**30:,.1f} GiB of memory; lower train.batch_size, or "
            "raise train.accumulate"
        )


def notes(
    recipe: "Recipe", images: int, student: nn.Module, processes: int, device: torch.device, *, anew: bool
) -> list[str]:
    """What a user should know of a run on so many training images, processes and such devices, though it can be done.

    anew  whether the run begins: one that goes on has said already how it differs from public code
    """
    has_token = student.decay_groups(True) != student.decay_groups(False)
    evaluations = run_length(recipe, images).evaluations
    facts = idle.Facts(len(student.head_names), has_token, processes, device.type, evaluations)
    found, batch = idle.notes(recipe, facts), recipe.train.batch_size
    if batch > images:
        says = f"train.batch_size {batch} is more than the {images} training images"
        found.append(f"{says}: a batch has some of them repeatedly")
    # Last: the list is long, and what is wrong with the run comes before.
    return found + (differences.lines(recipe) if anew else [])


def train_loader(
    recipe: "Recipe",
    source: Source,
    world: World,
    noise: Mapping[str, int],
    on_bad: OnBad,
    bad_list: BadList | None = None,
) -> TrainLoader:
    """The stream of training batches that this process works on; `noise` is what `Method.noise` says, `bad_list` the
    run's own."""
    data = recipe.data
    check_batch(recipe, world.size)
    later = {epoch: augmentations(recipe, epoch) for epoch, _ in data.size_schedule[1:]}
    return TrainLoader(
        source,
        augmentations(recipe, 0),
        mixing(recipe),
        later=later,
        seed=recipe.train.seed,
        batch_size=recipe.train.batch_size,
        accumulate=recipe.train.accumulate,
        repeats=data.repeats,
        rank=world.rank,
        world=world.size,
        threads=data.threads,
        device=loader_device(world.device),
        noise=noise,
        stores=methods.find(recipe.method.use).needs(recipe.method),
        mean=data.mean,
        std=data.std,
        total_steps=run_length(recipe, len(source)).total,
        max_bad_fraction=data.max_bad_fraction,
        on_bad=on_bad,
        bad_list=bad_list,
    )


def eval_loader(
    recipe: "Recipe",
    source: Source,
    world: World,
    noise: Mapping[str, int],
    on_bad: OnBad,
    bad_list: BadList | None = None,
) -> EvalLoader:
    """Images of `source` as evaluation sees them, each exactly once over all processes."""
    data = recipe.data
    per_process = recipe.train.batch_size // (recipe.train.accumulate * world.size)
    return EvalLoader(
        source,
        size=image_size(recipe),
        crop_ratio=data.eval_crop_ratio,
        rank=world.rank,
        world=world.size,
        batch_size=max(per_process, 1),
        threads=data.threads,
        device=loader_device(world.device),
        noise=noise,
        mean=data.mean,
        std=data.std,
        max_bad_fraction=data.max_bad_fraction,
        on_bad=on_bad,
        bad_list=bad_list,
    )


def tuning(recipe: "Recipe", world: World, say: Report) -> kernels.Tuning:
    """The trials of kernels in the first steps of the run. Whole steps are compared where a forward and backward can
    be made once more: a method or a model of somebody else's may count them, with fsdp2 a gradient is kept that is not
    reduced, and a step that is compiled was compiled for one choice."""
    engine = recipe.engine
    share = {"share": world.same, "main": world.main}
    split = engine.parallel == "fsdp2" and world.size > 1
    ours = recipe.method.use in methods.METHODS and ":" not in (recipe.model.name or "")
    presets = ours and engine.capture != "compile" and not split
    recorded = engine.capture == "graph"
    return kernels.Tuning(engine.autotune, world.device, recorded=recorded, presets=presets, say=say, **share)


def model(recipe: "Recipe", num_classes: int, say: Report, classes: Sequence[str] | None = None) -> nn.Module:
    """The student, initialised from the seed alone and, if the recipe says so, from weights.

    `classes` names the classes of the data in the order of their labels; they are compared with those of the weights.
    """
    config = recipe.model
    if config.num_classes is not None and config.num_classes != num_classes:
        raise UsageError(f"model.num_classes is {config.num_classes}, but the data set has {num_classes} classes")
    torch.manual_seed(rng.key(recipe.train.seed, "init") >> 1)
    options = {"image_size": image_size(recipe), "num_classes": num_classes, "drop_path": config.drop_path}
    # Models take these where they have them. A model of somebody else's need not know them until a recipe asks, and
    # timm's have no mode: a recipe can only say theirs.
    asked = ("drop_path_mode", "dropout") if config.timm is None else ("dropout",)
    options |= {name: getattr(config, name) for name in asked if _is_set(config, name)}
    try:
        built = models.of(config.name, config.timm, **options)
    except ValueError as error:
        raise UsageError(f"model: {error}") from error
    if config.drop_path_skip:
        _skip_dropped(built, recipe)
    if recipe.engine.checkpoint_blocks:
        _checkpoint_blocks(built, recipe)
    if recipe.engine.keep_activations is True:
        _keep_activations(built)
    if recipe.engine.residual != "fp32":
        _keep_residual(built, recipe)
    if recipe.engine.products == "fp8":
        _fp8_products(built)
    for _, size in recipe.data.size_schedule:
        _check_takes(built, size)
    if config.weights is not None:
        with naming("model.weights"):
            found = open_weights(config.weights)
            notes = load(built, found, purpose="student", classes=classes, grid=config.weights_grid)
        for note in (*found.notes, *notes) or ("all tensors fit",):
            say(f"weights of {found.origin}: {note}")
    try:
        freeze_parts(built, config.freeze)
    except ValueError as error:
        raise UsageError(f"model.freeze: {error}") from error
    return built


def _is_set(section: Section, name: str) -> bool:
    return getattr(section, name) != type(section).model_fields[name].default


def _skip_dropped(network: nn.Module, recipe: "Recipe") -> None:
    if not hasattr(network, "set_drop_path_skip"):
        raise UsageError(f"model.drop_path_skip: {type(network).__name__} has no set_drop_path_skip(group)")
    try:
        network.set_drop_path_skip(recipe.data.group_size)
    except ValueError as error:
        raise UsageError(f"model.drop_path_skip: with groups of data.group_size, {error}") from error


def _checkpoint_blocks(network: nn.Module, recipe: "Recipe") -> None:
    if recipe.model.timm is not None and recipe.engine.capture == "graph":
        raise UsageError(
            "engine.checkpoint_blocks: timm's models bring a generator back to draw the same numbers again, which "
            "engine.capture graph cannot record; use none or compile"
        )
    if not hasattr(network, "set_grad_checkpointing"):
        raise UsageError(f"engine.checkpoint_blocks: {type(network).__name__} has no set_grad_checkpointing(enable)")
    try:
        network.set_grad_checkpointing(True)
    except ValueError as error:
        raise UsageError(f"engine.checkpoint_blocks: {error}") from error


def _keep_activations(network: nn.Module) -> None:
    if not hasattr(network, "set_keep_activations"):
        raise UsageError(
            f"engine.keep_activations: {type(network).__name__} has no set_keep_activations(enable): nothing of it is "
            "made again in backward, so leave it out"
        )
    network.set_keep_activations(True)


def _keep_residual(network: nn.Module, recipe: "Recipe") -> None:
    residual = recipe.engine.residual
    if not hasattr(network, "set_residual"):
        raise UsageError(f"engine.residual {residual}: {type(network).__name__} has no set_residual(dtype); use fp32")
    network.set_residual(DTYPES[residual])


def _fp8_products(network: nn.Module) -> None:
    if not hasattr(network, "set_fp8_products"):
        raise UsageError(
            f"engine.products fp8: {type(network).__name__} has no set_fp8_products(enable); use "
            "engine.products=precision"
        )
    try:
        network.set_fp8_products(True)
    except ValueError as error:
        raise UsageError(f"engine.products fp8: {error}; use engine.products=precision") from error


def _check_takes(network: nn.Module, size: int | tuple[int, int]) -> None:
    """Refuse a size of `data.size_schedule` that the network does not take, by the forward of one image, or, of a
    network without storage, as in a dry run, by the count of its operations."""
    height, width = size_pair(size, "data.size_schedule")
    try:
        network.flops((height, width))
        if not any(parameter.is_meta for parameter in network.parameters()):
            with torch.no_grad():
                network.eval()(torch.zeros(1, 3, height, width))
    except (ValueError, RuntimeError, AssertionError) as error:
        raise not_taken((height, width), error) from error
    finally:
        network.train()


def not_taken(size: tuple[int, int], error: Exception) -> UsageError:
    """The refusal of a (height, width) of `data.size_schedule` that the model does not take, which `error` says."""
    return UsageError(f"data.size_schedule: the model does not take images of {size[0]} x {size[1]} pixels: {error}")


@contextmanager
def naming(field: str) -> Iterator[None]:
    """Errors of usage inside say which field of the recipe they come from."""
    try:
        yield
    except UsageError as error:
        raise UsageError(f"{field}: {error}") from error


def method(
    recipe: "Recipe",
    student: nn.Module,
    num_classes: int,
    steps: int,
    teacher: Callable[[TeacherConfig], Teacher],
    source: Source | None = None,
) -> Method:
    """The training method around the student, for a run of so many steps.

    source  the training images; None in an evaluation, where the epochs of a run of `train.steps` are not known and its
            steps stand in for them

    Raises UsageError if the method cannot be built, and if it keeps an averaged teacher where the engine does not find
    it, such as in a list.
    """
    _check_fuse(recipe.method, student)
    kind = methods.find(recipe.method.use)
    averaged: list[EmaTeacher] = []

    def ema_teacher(module: nn.Module, momentum: Momentum) -> EmaTeacher:
        averaged.append(EmaTeacher(module, momentum))
        return averaged[-1]

    epochs = recipe.train.epochs or (steps if source is None else run_length(recipe, len(source)).epochs_begun)
    counts = None if source is None else partial(class_counts, source)
    try:
        context = Context(num_classes, epochs, steps, teacher, ema_teacher, counts)
        made = kind(student, recipe.method, context)
    except ValueError as error:
        raise UsageError(f"method {recipe.method.use}: {error}") from error
    if not set(averaged) <= set(made.modules()):
        raise UsageError(
            f"method {recipe.method.use}: what ema_teacher() returns must be an attribute of the method, or in an "
            "nn.ModuleList or nn.ModuleDict of it; the engine does not find it in a list or dict, and would never "
            "move it"
        )
    _check_evaluators(made, recipe)
    _check_judged(made, recipe)
    made.resizes = bool(recipe.data.size_schedule)
    return made


def _check_fuse(config: MethodConfig, student: nn.Module) -> None:
    """Refuse the choice of one of two heads where there is one. Both means of one head are that head."""
    if config.fuse in ("class", "distillation") and len(student.head_names) < 2:
        raise UsageError(
            f"method.fuse {config.fuse}: {type(student).__name__} has one head, and there is nothing to choose; train "
            "a distilled model, or leave method.fuse out"
        )


def _check_evaluators(made: Method, recipe: "Recipe") -> None:
    """Raise UsageError for a method that is judged by its loss and wants of a sample what held-out images have not."""
    if not any(isinstance(evaluator, HeldOutLoss) for evaluator in made.evaluators().values()):
        return
    views, stores = recipe.method.views(), type(made).needs(recipe.method)
    if len(views) > 1 or stores:
        what = f"extras ({', '.join(stores)})" if stores else f"{len(views)} views"
        raise UsageError(
            f"method {recipe.method.use}: its evaluators have HeldOutLoss, but its loss wants {what} of a sample, and "
            "held-out images have one view, which is not augmented, and no extras; judge it by Knn or LinearProbe, or "
            "by an evaluator of its own"
        )


def _check_judged(made: Method, recipe: "Recipe") -> None:
    """Raise UsageError where the recipe asks for metrics that the method does not have."""
    if recipe.train.stop_after is not None and not made.evaluators():
        raise UsageError(f"train.stop_after needs a metric, but method {recipe.method.use} has none")
    known = known_metrics(made)
    if known is not None:
        check_best_by(recipe, known)


def known_metrics(made: Method) -> list[str] | None:
    """Names of the metrics of a method's evaluations, where its heads tell them; None where only an evaluation does."""
    evaluators = list(made.evaluators().values())
    if not made.answers_with_logits or not all(type(each) is Classify and each.scores is None for each in evaluators):
        return None
    logits = tuple(torch.zeros(1, 1) for _ in made.model.head_names)
    answers = scores(logits if len(logits) > 1 else logits[0], made.config.fuse)
    return [f"{metric}_{answer}" for _ in evaluators for metric in ("top1", "top5") for answer in answers]


def check_best_by(recipe: "Recipe", metrics: Sequence[str]) -> None:
    """Raise UsageError where `train.best_by` is none of the metrics, of the weights or of an average that is kept."""
    averaged = [] if recipe.optim.ema_decay is None else [f"{name}_ema" for name in metrics]
    wanted, there_are = recipe.train.best_by, [*metrics, *averaged]
    if wanted is not None and wanted not in there_are:
        raise UsageError(f"train.best_by {wanted} is no metric of this run, which has {', '.join(there_are) or 'none'}")


def class_counts(source: Source) -> list[int]:
    """How many images each class has."""
    counts = [0] * len(source.classes)
    for index in range(len(source)):
        counts[source.label(index)] += 1
    return counts


def clipping(recipe: "Recipe", student: nn.Module) -> dict[str, Any]:
    """The arguments of `Engine` for what the recipe says of gradient clipping."""
    limit = recipe.optim.clip_grad
    if recipe.optim.clip_mode == "norm":
        return {"clip_grad": limit}
    return {"clip_units": UnitClipping(limit, [f"model.{head}" for head in student.head_names])}


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


def untrained_teacher(own: "Recipe", config: TeacherConfig, classes: int) -> Teacher:
    """The teacher as it will be but for its weights: what is built around it can be checked before it is trained."""
    frozen = freeze(model(own, classes, lambda text: None), image_size(own))
    mean, std = (own.data.mean, own.data.std) if config.mean is None else (config.mean, config.std)
    return Teacher(frozen, image_size=config.image_size or image_size(own), mean=mean, std=std)
