"""What trials have found in this process: the backend of an op for shapes like those of a call.

`trial/` writes it, and `_op` reads it wherever a backend is not forced. Without a trial there is nothing here, and a
call pays one look at a variable for it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

INDUCTOR = "inductor"
"""The name under which a trial knows the reference compiled by `torch.compile`."""


class Shape(NamedTuple):
    """What calls have in common that share a choice; plain values, so that JSON can hold it.

    rows     product of all dimensions of the first argument but the last, rounded up to a power of two, since the
             samples that drop-path keeps differ in number from block to block; of a list, of all elements
    tokens   its last dimension but one; of a list, the number of its tensors
    width    its last dimension; of a list, that of the first tensor
    dtype    its dtype, and that of autocast where it is on
    others   what the other arguments are: tensors, lists, None, whole numbers and words, but no fractions
    trained  whether the call is differentiated
    """

    rows: int
    tokens: int
    width: int
    dtype: str
    others: str
    trained: bool

    def __str__(self) -> str:
        use = ", trained" if self.trained else ""
        return f"up to {self.rows} rows, tokens {self.tokens}, width {self.width}, {self.dtype}, {self.others}{use}"


class Choice(NamedTuple):
    """A backend's name, or `INDUCTOR`, and the reason."""

    backend: str
    reason: str


def shape_of(args: Sequence[Any], trained: bool) -> Shape:
    """The shape of a call with these arguments, of which the first is a tensor or a list of tensors."""
    first, *others = args
    if isinstance(first, Tensor):
        rows, tokens, width = _sizes(first)
    else:
        rows, tokens, (first, *_) = sum(map(Tensor.numel, first)), len(first), first
        width = _sizes(first)[2]
    dtype, device = _name(first.dtype), first.device.type
    if autocast_dtype(device) not in (None, first.dtype):
        dtype += f" in {_name(autocast_dtype(device))}"
    marks = " ".join(filter(None, map(_mark, others)))
    return Shape(1 << max(rows - 1, 0).bit_length(), tokens, width, dtype, marks, trained)


def autocast_dtype(device: str) -> torch.dtype | None:
    """The dtype of autocast on devices of that type in the current region; None outside one, and for meta tensors."""
    return torch.get_autocast_dtype(device) if device != "meta" and torch.is_autocast_enabled(device) else None


def _sizes(x: Tensor) -> tuple[int, int, int]:
    width = x.shape[-1] if x.dim() else 1
    return x.numel() // max(width, 1), x.shape[-2] if x.dim() > 1 else 1, width


_MARKS = {Tensor: "tensor", nn.Parameter: "tensor", type(None): "-", float: ""}
"""What most arguments are, by their type: this is asked at every call."""


def _mark(value: Any) -> str:
    mark = _MARKS.get(type(value))
    if mark is not None:
        return mark
    if isinstance(value, Tensor):
        return "tensor"
    if isinstance(value, list | tuple):
        return "list" if value else "-"
    return _name(value) if isinstance(value, torch.dtype) else str(value)


@cache
def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


Meet = Callable[[Any, Sequence[Any], Shape], Choice | None]
"""Called with (op, arguments, their shape) at the first call of a shape."""
Untried = Callable[[Any, Sequence[Any]], Choice | None]
"""Called with (op, arguments) where nothing was tried."""


@dataclass
class Tried:
    """Choices by op and shape, and what is out of use.

    wrong    {(op, backend): why} of backends that computed something wrong, or raised: they are not used any more
    untried  what runs a call of which nothing is known; None: as if there were no trials
    """

    chosen: dict[str, dict[Shape, Choice]] = field(default_factory=dict)
    wrong: dict[tuple[str, str], str] = field(default_factory=dict)
    untried: Untried = lambda op, args: None
    _meet: Meet | None = None
    _thread: int = 0

    def open(self, meet: Meet | None) -> None:
        """From now on ask `meet` at the first call of each shape in this thread, and in those of autograd that run its
        backward; None: no longer."""
        self._meet, self._thread = meet, get_ident()

    def choice(self, op: Any, args: Sequence[Any], trained: bool | None) -> Choice | None:
        """The choice for a call, tried out now if need be. One that was not tried goes by what was chosen first at its
        width, with the backward if it is trained, else by `untried`.

        args     those of the call; none for what holds in general
        trained  as of `Shape`; None for a backward, which has other arguments and goes by its width
        """
        own = self.chosen.get(op.name, {})
        if not args:
            return next(iter(own.values()), None)
        shape = shape_of(args, bool(trained))
        found = own.get(shape) if trained is not None else None
        if found is None and trained is not None and self._meet is not None and self._may_meet(shape.trained):
            found = self._meet(op, args, shape)
        if found is None:
            alike = (other for other in own if other.width == shape.width and (other.trained or trained is False))
            found = next(map(own.__getitem__, alike), None)
        return found or self.untried(op, args)

    def _may_meet(self, trained: bool) -> bool:
        """Whether this thread is that of `open`, or one of autograd's, in which a backward calls ops of its own. There
        a call that is differentiated would wait for ever: its trial needs the very thread."""
        return self._thread == get_ident() or (not trained and torch._C._current_graph_task_id() != -1)


_current: Tried | None = None


def current() -> Tried | None:
    """What holds in this process; None where nothing was tried."""
    return _current


def install(tried: Tried | None) -> None:
    """Make `tried` what holds in this process."""
    global _current
    _current = tried
