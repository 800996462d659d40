"""A recipe as the estimate sees it: its networks, how much of them is trained and how, and the amount of data.

Networks are built on the meta device, without storage; no data set is opened.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastdeit import models, plugins
from fastdeit.data.plan import order
from fastdeit.engine import optimizers
from fastdeit.engine.groups import ParamGroup
from fastdeit.errors import UsageError
from fastdeit.estimate import options as estimate_options
from fastdeit.estimate.networks import Network, Trained, ViT, Work
from fastdeit.fields import size_pair
from fastdeit.models.drop_path import dropped_of
from fastdeit.models.freeze import freeze_parts
from fastdeit.models.layers import hidden_matrices, layers
from fastdeit.recipe import resolve as recipes
from fastdeit.recipe.length import Length, LengthError, length
from fastdeit.run.address import parse
from fastdeit.run.build import not_taken, views
from fastdeit.run.weights import open_weights

if TYPE_CHECKING:
    from fastdeit.methods.config import TeacherConfig
    from fastdeit.models.contract import ImageSize
    from fastdeit.recipe.resolve import Recipe

IMAGENET = 1_281_167, 50_000, 1000
# (training images, held-out images, classes) of sources that are the same everywhere, as their authors distribute them.
SIZES = {
    "imagenet": IMAGENET,
    "cifar10": (50_000, 10_000, 10),
    "cifar100": (50_000, 10_000, 100),
    "flowers102": (2_040, 6_149, 102),
    "stanford_cars": (8_144, 8_041, 196),
    "inat2018": (437_513, 24_426, 8_142),
    "inat2019": (265_213, 3_030, 1_010),
    "tiny_imagenet": (100_000, 10_000, 200),
    "digits": (1_438, 359, 10),
}


@dataclass(frozen=True)
class Subject:
    """A recipe as the estimate sees it. kept: as of `Work`. teacher_runs: the trainings of teachers that have recipes
    of their own. sized: for each entry of `data.size_schedule` the same networks on its images."""

    recipe: "Recipe"
    student: Network
    teachers: tuple[Network, ...]
    images: int
    held_out: int
    assumed: str | None
    trained: Trained
    kept: tuple[float, ...] = ()
    teacher_runs: tuple["Subject", ...] = ()
    sized: tuple["Subject", ...] = ()

    @property
    def stages(self) -> tuple[tuple[int, "Subject"], ...]:
        """(steps, what they train) of each size of the images in turn; all of the run without a size schedule. Raises
        as `length`."""
        if not self.sized:
            return ((self.steps, self),)
        begins = [epoch * self.length.steps_per_epoch for epoch, _ in self.recipe.data.size_schedule]
        spans = pairwise([*begins, self.steps])
        return tuple((end - begin, part) for (begin, end), part in zip(spans, self.sized, strict=True))

    @property
    def largest(self) -> "Subject":
        """What it trains where the images are largest."""
        return max(self.sized or (self,), key=lambda part: part.student.flops)

    @property
    def length(self) -> Length:
        """Steps and evaluations of the run. Raises UsageError where the warm-up does not fit."""
        try:
            return length(self.recipe, self.images, order.steps_per_epoch(self.images, self.recipe.train.batch_size))
        except LengthError as error:
            raise UsageError(f"recipe {self.recipe.name}: {error}") from error

    @property
    def steps(self) -> int:
        """Steps of the run."""
        return self.length.total

    @property
    def evaluations(self) -> int:
        """How often the run is evaluated."""
        return self.length.evaluations


def subject(recipe: "Recipe", images: int | None = None) -> Subject:
    """The networks and the amount of data of a recipe; `images` replaces the number of training images."""
    train, held_out, classes, assumed = _data(recipe)
    if images is not None:
        train, assumed = images, None
    model = recipe.model
    classes = model.num_classes or classes
    size = size_pair(model.image_size, "model.image_size")
    student = network(model.name, model.timm, size, classes, model.drop_path)
    own, known = [], []
    for config in recipe.method.teachers():
        if config.recipe is not None:
            own.append(subject(recipes.load(config.recipe, own=plugins.is_own(config.recipe)), images))
            trained = own[-1].recipe.model
            name, timm, size = trained.name, trained.timm, trained.image_size
        else:
            name, timm, size = _teacher(config)
        known.append((name, timm, config.image_size or size))

    def teachers(image_size: "ImageSize") -> tuple[Network, ...]:
        sizes = [size_pair(size or image_size, "method.teacher.image_size") for *_, size in known]
        return tuple(network(*names, size, classes) for (*names, _), size in zip(known, sizes, strict=True))

    trained, kept = trained_of(recipe, classes), () if student.vit is None else kept_of(recipe)
    whole = Subject(recipe, student, teachers(model.image_size), train, held_out, assumed, trained, kept, tuple(own))
    sized = [
        replace(whole, student=replace(on_size, parameters=student.parameters), teachers=teachers(size))
        for size, on_size in students(recipe, classes)
    ]
    return replace(whole, sized=tuple(sized))


def students(recipe: "Recipe", classes: int) -> Iterator[tuple[tuple[int, int], Network]]:
    """((height, width), the student on such images) for each entry of `data.size_schedule`. UsageError for a size that
    it does not take."""
    model = recipe.model
    for epoch, _ in recipe.data.size_schedule:
        size = views(recipe, epoch)[0].size
        try:
            yield size, network(model.name, model.timm, size, classes, model.drop_path)
        except UsageError as error:
            raise not_taken(size, error) from error


def work_of(recipe: "Recipe", processes: int, precision: str, trained: Trained, kept: tuple[float, ...]) -> Work:
    """What the student computes in a micro-batch of one process: each image as often as the method shows it."""
    images = recipe.method.passes * recipe.train.batch_size // (processes * recipe.train.accumulate)
    averaged = recipe.optim.ema_decay is not None
    return Work(images, precision, recipe.model.drop_path > 0, averaged, trained, kept)


def kept_of(recipe: "Recipe") -> tuple[float, ...]:
    """`Work.kept` of the student. Raises UsageError where `model.drop_path_skip` does not fit the model."""
    model = recipe.model
    if not model.drop_path_skip:
        return ()
    size, classes = size_pair(model.image_size, "model.image_size"), model.num_classes or 1
    config = _built(model.name, None, size, classes, model.drop_path).config
    config = replace(config, drop_path_mode=model.drop_path_mode or config.drop_path_mode)
    try:
        return estimate_options.kept(dropped_of(config, recipe.data.group_size), recipe.data.group_size)
    except ValueError as error:
        raise UsageError(f"model.drop_path_skip: {error}") from error


def _teacher(config: "TeacherConfig") -> tuple[str | None, str | None, "ImageSize | None"]:
    """(fastdeit's name, timm's name, image size) of the teacher; its weights may tell them, the size those of a run."""
    if config.model is not None or config.timm is not None:
        return config.model, config.timm, None
    address = parse(config.weights)
    if address.kind == "timm":
        return None, address.name, None  # nothing of it has to be downloaded to make a plan
    found = open_weights(config.weights)
    known = found.known
    if known.name is None and known.timm is None:
        raise UsageError(f"method.teacher: {address} does not tell which network it is of; add method.teacher.model")
    return known.name, known.timm, known.image_size if found.checkpoint is not None else None


def _data(recipe: "Recipe") -> tuple[int, int, int, str | None]:
    """(training images, held-out images, classes, what is assumed)."""
    data = recipe.data
    if data.source == "synthetic":
        return data.synthetic_samples, max(data.synthetic_samples // 10, 1), data.synthetic_classes, None
    if data.source in SIZES:
        return *SIZES[data.source], None
    return *IMAGENET, f"data.source {data.source} does not tell; assumed are ImageNet-1k's numbers (see --images)"


_ALIKE = 0.03
"""Of a network's FLOPs: what the shape of a plain vision transformer may leave out of it."""


@cache
def network(
    name: str | None, timm: str | None, size: tuple[int, int] | None, classes: int, drop_path: float = 0.0
) -> Network:
    """A network built without storage, of its own image size for None; UsageError where it cannot be built, or its
    FLOPs not be counted."""
    built = _built(name, timm, size, classes, drop_path)
    size = size or built.config.image_size
    other = {}
    try:
        with _of_others(name):
            flops = built.flops()
            shape = _shape(built)
            if shape is None or abs(shape.flops - flops) > _ALIKE * flops:  # another network, or more in it than that
                shape, other = None, _activations(built, size)
    except (NotImplementedError, RuntimeError) as error:
        raise UsageError(f"the FLOPs of {timm or name} cannot be counted on the meta device ({error})") from error
    parameters = sum(parameter.numel() for parameter in built.parameters())
    outputs = classes * max(1, len(built.head_names))  # where no linear layer makes the logits, one kind of them
    return Network(timm or name, parameters, flops, 3 * size[0] * size[1], outputs, timm is None, shape, **other)


def _built(
    name: str | None, timm: str | None, size: tuple[int, int] | None, classes: int, drop_path: float
) -> nn.Module:
    """The network on the meta device, without storage."""
    options = {"num_classes": classes, "drop_path": drop_path} | ({"image_size": size} if size else {})
    if timm is not None:
        import_module("timm")  # inside torch.device its first import fails (torch 2.8)
    with _of_others(name):
        try:
            with torch.device("meta"):
                return models.of(name, timm, **options)
        except ValueError as error:
            raise UsageError(f"recipe: {error}") from error


@contextmanager
def _of_others(name: str | None) -> Iterator[None]:
    """Errors of somebody else's class, which may ask for values that the meta device has not, are UsageErrors."""
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        if ":" not in (name or ""):
            raise
        raise UsageError(f"{name} fails on the meta device ({type(error).__name__}: {error})") from error


def trained_of(recipe: "Recipe", classes: int) -> Trained:
    """What the recipe trains of its student, and what its optimizer keeps for that. Raises UsageError where it trains
    nothing, and for words of `model.freeze` and optimizers that do not fit the model."""
    model = recipe.model
    built = _built(model.name, model.timm, size_pair(model.image_size, "model.image_size"), classes, model.drop_path)
    try:
        freeze_parts(built, model.freeze)
    except ValueError as error:
        raise UsageError(f"model.freeze: {error}") from error
    trained = {name: parameter for name, parameter in built.named_parameters() if parameter.requires_grad}
    if not trained:
        raise UsageError("model.freeze leaves nothing to train")
    still, above = 0, list(built.parameters())
    if model.freeze and hasattr(built, "blocks"):
        depths = layers(built)
        still = next(depth for depth, names in enumerate(depths) if trained.keys() & set(names))
        own = dict(built.named_parameters())
        above = [own[name] for names in depths[still:] for name in names]
    count = sum(parameter.numel() for parameter in trained.values())
    share = count / sum(parameter.numel() for parameter in above)
    return Trained(count, _states(recipe, built, trained), still, share, recipe.engine.checkpoint_blocks)


def _states(recipe: "Recipe", built: nn.Module, trained: Mapping[str, torch.Tensor]) -> int:
    """Numbers that the optimizer keeps for the parameters `trained` of a network on the meta device."""
    kind = optimizers.find(recipe.optim.name)
    try:
        matrices = hidden_matrices(built) if kind.tells_matrices else set()
    except ValueError as error:
        raise UsageError(f"optim.name {recipe.optim.name}: {error}") from error
    groups = [
        ParamGroup({name: p for name, p in trained.items() if (name in matrices) == matrix}, 0.0, matrix=matrix)
        for matrix in (True, False)
    ]
    with _of_others(recipe.optim.name):
        made = kind([group for group in groups if group.params], recipe.optim)
        return sum(tensor.numel() for state in made.state.values() for tensor in state.values())


def _shape(built: nn.Module) -> ViT | None:
    if isinstance(built, models.vit.VisionTransformer):
        config = built.config
        rows, columns = config.grid
        # Parallel blocks count as blocks in turn, and the stem as one product of as many FLOPs.
        patches, depth = rows * columns, config.depth * config.parallel
        hidden, values = int(config.dim * config.mlp_ratio), built.patch_embed.multiply_adds(1) // config.dim
        shape = patches, built.prefix_tokens, values, config.dim, depth, config.heads, hidden
        return ViT(*shape, config.num_classes, pruned=config.pool == "token")
    inner = getattr(built, "inner", None)
    mlp = getattr(getattr(inner, "blocks", [None])[0], "mlp", None)
    if type(inner).__name__ not in ("VisionTransformer", "VisionTransformerDistilled") or not hasattr(mlp, "fc1"):
        return None
    rows, columns = built.grid
    values, hidden = inner.patch_embed.proj.weight[0].numel(), mlp.fc1.out_features
    shape = rows * columns, inner.num_prefix_tokens, values, inner.embed_dim, len(inner.blocks)
    return ViT(*shape, inner.blocks[0].attn.num_heads, hidden, inner.num_classes, pruned=False)


def _activations(built: nn.Module, size: tuple[int, int]) -> dict[str, int]:
    """`saved`, `widest` and `layers` of a `Network`, counted on the meta device, where nothing is computed.

    The batch has two images, since batch norm wants more than one. Wide is a layer's input and output together.
    """
    kept: dict[int, torch.UntypedStorage] = {}
    weights = {parameter.untyped_storage()._cdata for parameter in built.parameters()}
    widths: list[int] = []

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    def measure(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        tensors = [tensor for tensor in (*inputs, output) if isinstance(tensor, torch.Tensor)]
        widths.append(sum(tensor.numel() * tensor.element_size() for tensor in tensors))

    hooks = [module.register_forward_hook(measure) for module in built.modules() if not list(module.children())]
    columns = getattr(built, "noise_per_sample", 0)
    noise = {"noise": torch.empty(2, columns, device="meta")} if columns else {}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        built(torch.empty(2, 3, *size, device="meta"), **noise)
    for hook in hooks:
        hook.remove()
    saved = sum(storage.nbytes() for storage in kept.values())
    return {"saved": saved // 2, "widest": max(widths) // 2, "layers": len(widths)}
