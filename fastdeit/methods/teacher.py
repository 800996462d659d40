"""Teachers: frozen networks that see exactly the augmented images of the student."""

from collections.abc import Callable, Collection, Sequence
from functools import cache
from math import log
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdeit.batch import Batch
from fastdeit.fields import size_pair
from fastdeit.models.contract import ImageSize, Logits, Tokens
from fastdeit.models.tokens import Taps, taps


class Teacher:
    """A frozen network in eval mode, outside the method's `parameters()` and `state_dict()`.

    It renders its own input from the batch, with its own normalisation and resolution, so that it judges the very image
    (crop, flip, mixing) that the student is given. Everything it answers is without gradient. `tokens` and `taps` need
    a transformer (`contract.Tokens`), and raise ValueError for any other network.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        image_size: ImageSize | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.size = None if image_size is None else size_pair(image_size, "image_size")
        self.mean, self.std = mean, std

    def to(self, device: torch.device) -> "Teacher":
        """The teacher itself, its network moved to `device`."""
        self.model.to(device)
        return self

    def __call__(self, batch: Batch) -> Tensor:
        """Logits `[B, K]`; a teacher with two heads answers with the mean of their logits."""
        return self.logits(self.pixels(batch))

    def scores(self, batch: Batch) -> dict[str, Tensor]:
        """Named scores `[B, K]` by which the teacher is judged."""
        return {"class": self(batch)}

    def pixels(self, batch: Batch, view: int = 0) -> Tensor:
        """A view of the batch as images `[B, 3, H, W]` in the teacher's normalisation."""
        return batch.pixels(view, mean=self.mean, std=self.std)

    @torch.no_grad()
    def logits(self, x: Tensor) -> Tensor:
        """Logits `[B, K]` of images `[B, 3, H, W]` in the teacher's normalisation, resized to its resolution."""
        return _answer(self.model(self._sized(x)))

    @torch.no_grad()
    def tokens(self, x: Tensor, *, stop: int | None = None, keep: Tensor | None = None) -> Tensor:
        """Tokens `[B, N, dim]` of images as in `logits`: after `stop` blocks without the final norm, or after all with
        it; `keep` as in `contract.Tokens.tokens`."""
        return self._transformer().tokens(self._sized(x), stop=stop, keep=keep)

    @torch.no_grad()
    def classify(self, tokens: Tensor) -> Tensor:
        """Logits `[B, K]` of all that `tokens` returned, so that tokens and answer are of one pass; two heads answer
        with the mean of theirs."""
        return _answer(self._transformer().classify(tokens))

    @torch.no_grad()
    def taps(
        self, x: Tensor, *, blocks: Collection[int] = (), qkv: Collection[int] = (), keep: Tensor | None = None
    ) -> Taps:
        """Tokens after `blocks` and q/k/v of the blocks `qkv` (`models.tokens.taps`) of images as in `logits`."""
        return taps(self._transformer(), self._sized(x), blocks=blocks, qkv=qkv, keep=keep)

    def _transformer(self) -> Tokens:
        if not isinstance(self.model, Tokens):
            raise ValueError(
                f"the teacher is a {type(self.model).__name__}, which has no tokens; a method that reads tokens needs "
                "a vision transformer of fastdeit or of timm"
            )
        return self.model

    def _sized(self, x: Tensor) -> Tensor:
        if self.size is None or tuple(x.shape[-2:]) == self.size:
            return x
        # In float32: on a CPU there is no antialiasing in 16 bit.
        return F.interpolate(x.float(), size=self.size, mode="bicubic", antialias=True)


def _answer(logits: Logits) -> Tensor:
    """The logits, or the mean of two heads'."""
    return (logits[0] + logits[1]) / 2 if isinstance(logits, tuple) else logits


class Ensemble:
    """Several teachers that answer as one: with the mean of their softmaxes.

    Each renders its own input, in its own normalisation and resolution.
    """

    def __init__(self, teachers: Sequence[Callable[[Batch], Tensor]]) -> None:
        self.teachers = tuple(teachers)

    def __call__(self, batch: Batch) -> Tensor:
        """Log-probabilities float32 `[B, K]`, which are logits of the mean p of the softmaxes: log p.

        Its argmax is that of p. At temperature tau its softmax is proportional to p ** (1 / tau), which is p at 1.
        """
        return _mean(self._answers(batch))

    def scores(self, batch: Batch) -> dict[str, Tensor]:
        """Scores `[B, K]` of all together ("class"), then of each ("1", "2", ...)."""
        answers = self._answers(batch)
        return {"class": _mean(answers)} | {str(number): each for number, each in enumerate(answers, 1)}

    def _answers(self, batch: Batch) -> list[Tensor]:
        return [teacher(batch).float().log_softmax(-1) for teacher in self.teachers]


def together(teachers: Sequence[Teacher]) -> "Teacher | Ensemble | None":
    """Teachers as one: None of none, and one is itself."""
    if len(teachers) < 2:
        return next(iter(teachers), None)
    return Ensemble(teachers)


def _mean(log_probabilities: Sequence[Tensor]) -> Tensor:
    """Log of the mean of probabilities, from their logs."""
    return torch.stack(tuple(log_probabilities)).logsumexp(0) - log(len(log_probabilities))


class DeferredTeacher:
    """A teacher that is built when it is first asked: most evaluations need none, and its weights may be elsewhere."""

    def __init__(self, make: Callable[[], Teacher]) -> None:
        self._teacher = cache(make)

    def __call__(self, batch: Batch) -> Tensor:
        return self._teacher()(batch)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # copy and pickle ask for such names
            raise AttributeError(name)
        return getattr(self._teacher(), name)
