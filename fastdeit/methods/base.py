"""The method contract: a small `nn.Module` that owns the student and says what the loss of one micro-batch is.

A method knows nothing of DDP, AMP, EMA, checkpoints or logging; the engine wraps `forward` with all of them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from fastdeit.batch import Batch, Step
from fastdeit.methods.config import Fuse, MethodConfig
from fastdeit.methods.evaluators import Classify, Evaluator

if TYPE_CHECKING:
    from fastdeit.methods.teacher import Ensemble, Teacher

Momentum = float | Callable[[Step], Tensor]


@dataclass
class Out:
    """What a forward returns: a scalar loss, optionally logits `[B, K]`, and detached scalar parts for the log."""

    loss: Tensor
    logits: Tensor | None = None
    parts: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Phase:
    """A part of the run in which the same parameters are trained.

    name    what log, checkpoint and messages call it
    until   the epoch, counted from 0, before which it ends; None: the end of the run. Only the last phase has None
    trains  what is trained: parameters whose name in the method is one of these or lies below one, as
            "model.blocks.0" holds "model.blocks.0.mlp.fc1.weight". None: all that the method has not frozen

    What a phase does not train has no gradient, no place in the optimizer and none in the reduction over processes.
    A parameter that the phase before trained as well keeps its optimizer state; one that comes back starts anew.
    """

    name: str
    until: int | None = None
    trains: Sequence[str] | None = None

    def holds(self, parameter: str) -> bool:
        """Whether the phase trains the parameter of this name."""
        return self.trains is None or any(parameter == own or parameter.startswith(f"{own}.") for own in self.trains)


@dataclass(frozen=True)
class Context:
    """What a method may know of the run it is built for.

    num_classes, epochs, steps  of the data set; of the run, whose last epoch may end early
    teacher      makes the frozen network that a `TeacherConfig` describes
    ema_teacher  `ema_teacher(module, momentum)` is a module that answers as a running average of `module` does:
                 float32, in eval mode, without gradients, part of the method's state. The engine moves it after every
                 update, unless the update was skipped: average = m * average + (1 - m) * module, m = momentum or
                 momentum(step). Keep it where the method's `modules()` has it: as an attribute, or in an
                 nn.ModuleList or nn.ModuleDict
    class_counts  how many training images each class has; None where there are none, as in an evaluation
    """

    num_classes: int
    epochs: int
    steps: int
    teacher: "Callable[[Any], Teacher]"
    ema_teacher: Callable[[nn.Module, Momentum], nn.Module]
    class_counts: Callable[[], Sequence[int]] | None = None


class Method(nn.Module):
    """Base class of training methods. Override `forward`, and anything else only when the method differs there.

    A number of Python's that `forward`, `step` or `after_step` reads is a constant of the method: `torch.compile` and
    CUDA graphs keep the value they first saw. What changes during the run is a tensor: a buffer, or a function of
    `batch.step`. The engine raises an error if a number, a text, or a list, tuple, dict or set of these changes in an
    attribute of the method, or of a module below it, after a step was recorded as a CUDA graph.

    Networks may be split over processes (`engine.parallel: fsdp2`). Then parameters are whole tensors inside `forward`,
    `predict` and `features` alone, and in backward. Networks are called there, and nowhere else. Parameters are
    replaced after `__init__`, so a method keeps their names and not the tensors.
    """

    Config: ClassVar[type[MethodConfig]]
    """The recipe's `method:` section, which also lists the views of every sample (`MethodConfig.views`)."""
    teacher: "Teacher | Ensemble | None" = None
    resizes: bool = False
    """Whether images change their size during the run. The model then lays out their patches itself."""

    def __init__(self, model: nn.Module, config: MethodConfig, context: Context) -> None:
        super().__init__()
        self.model = model
        self.config = config

    @classmethod
    def needs(cls, config: MethodConfig) -> Mapping[str, Any]:
        """Stores by name (`data.loader.Store`): `batch.extras[name]` is what each holds for the batch's samples."""
        return {}

    def noise(self) -> dict[str, int]:
        """Columns of uniforms that every sample brings, by name: `batch.noise[name]` is float32 `[B, columns]`.

        They depend on the seed, the step and the place in the global batch, and not on the number of processes.
        """
        return {"drop_path": self.model.noise_per_sample}

    def phases(self) -> Sequence[Phase]:
        """The parts of the run, in order. Asked once, after the method is built."""
        return (Phase("train"),)

    def forward(self, batch: Batch) -> Out:
        """Loss of one micro-batch. No `.item()`, no collectives: this is what DDP and compilers wrap."""
        raise NotImplementedError

    def student(self, batch: Batch) -> Tensor | tuple[Tensor, Tensor]:
        """The student's logits of the first view."""
        return self.model(self.student_input(batch), noise=batch.noise.get("drop_path"))

    def student_input(self, batch: Batch) -> Tensor:
        """The first view as the student takes it: a model with a `patch_size` gets patches, unless the run `resizes`
        images, and another images."""
        patch_size = None if self.resizes else getattr(self.model, "patch_size", None)
        return batch.pixels() if patch_size is None else batch.patches(patch_size)

    def step(self, batch: Batch, engine: Any) -> None:
        """Gradients of one micro-batch: one forward, one backward. Inner loops override this and call `engine.run`."""
        with engine.micro():
            engine.backward(engine.run(batch).loss)

    def after_step(self, engine: Any) -> None:
        """After the optimizer's update, for the method's own buffers; `engine.now` is the `Step` that was made.

        It is called for a skipped update as well. `engine.skipped`, a bool scalar on the device, is then true, and what
        the forward returned may not be finite: `buffer.copy_(torch.where(engine.skipped, buffer, new))`. Afterwards
        every process has the main one's buffers.
        """

    def on_epoch(self, epoch: int, engine: Any) -> None:
        """Before the first step of an epoch; also when a run is resumed inside it, with `epoch` as before."""

    def on_phase(self, phase: Phase) -> None:
        """When a phase begins, before its optimizer groups are made. Also when a run is resumed or evaluated in it.

        A resumed run begins the first phase, then that of its checkpoint, and after that loads all weights and buffers.
        """

    def param_groups(self, base: list) -> list:
        """Optimizer groups; `base` is decayed and undecayed parameters (`engine.optim.ParamGroup`) of the phase."""
        return base

    def predict(self, x: Tensor) -> dict[str, Tensor]:
        """Named scores `[B, K]` for normalised images `[B, 3, H, W]`; the first is the method's answer."""
        return scores(self.model(x), self.config.fuse)

    @property
    def answers_with_logits(self) -> bool:
        """Whether `predict` is this class's: then the answer is the student's logits, two fused by `config.fuse`."""
        return type(self).predict is Method.predict

    def features(self, x: Tensor) -> Tensor:
        """Features `[B, D]` of normalised images `[B, 3, H, W]`, for neighbours and probes: the class token, or, of a
        model that says it has no `prefix_tokens`, the mean of the patches."""
        tokens = self.model.tokens(x)
        return tokens[:, 0] if getattr(self.model, "prefix_tokens", 1) else tokens.mean(1)

    def evaluators(self) -> Mapping[str, Evaluator]:
        """What the method is judged by, in order, the first metric of the first above all (recipe: `train.best_by`).

        A method that learns without labels overrides this, since its head, if it has one, has learned nothing.
        """
        return {"classify": Classify()}


def scores(logits: Tensor | tuple[Tensor, Tensor], fuse: Fuse) -> dict[str, Tensor]:
    """Scores of a model with one or two heads.

    Two heads are fused by the sum of softmaxes (DeiT paper, section 4), the mean of logits (the public code), or by
    reading one head alone.
    """
    if isinstance(logits, Tensor):
        return {"class": logits.float()}
    first, second = (head.float() for head in logits)
    fused = {
        "softmax": lambda: first.softmax(-1) + second.softmax(-1),
        "logit": lambda: (first + second) / 2,
        "class": lambda: first,
        "distillation": lambda: second,
    }[fuse]()
    return {"fused": fused, "class": first, "distillation": second}
