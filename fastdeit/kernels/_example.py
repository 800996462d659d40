"""Examples of calls: what an op brings with its registration, for everything that has to call any op.

`fastdeit kernels lint` compiles the Triton kernels of every example on tensors without memory, `fastdeit kernels bench`
measures the first example of every op at the sizes of a model, and the tests check each example of each op at sizes of
a few elements. None of them keeps a list of ops or of arguments: it is here that they learn of a new one.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fastdeit.kernels.dtypes import HALVES

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of ImageNet's training images, by channel, in units of [0, 1]."""


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model and its batch, by which an example makes its arguments.

    name      what rows of the lint call these sizes
    tokens    patches and class tokens of an image
    dim       channels of a token; `hidden` of them in the middle of the MLP
    odd       whether rows start at any element, so that kernels cannot load or store 128 bits at a time
    """

    name: str
    dim: int
    heads: int
    hidden: int
    batch: int = 256
    tokens: int = 198
    depth: int = 12
    classes: int = 1000
    image: tuple[int, int] = (224, 224)
    patch: int = 16
    odd: bool = False

    @property
    def matrices(self) -> list[tuple[int, ...]]:
        """Shapes of the weights that decay, of all blocks and both heads."""
        block = [(3 * self.dim, self.dim), (self.dim, self.dim), (self.hidden, self.dim), (self.dim, self.hidden)]
        return [*block * self.depth, (self.dim, 3 * self.patch**2), *[(self.classes, self.dim)] * 2]

    @property
    def vectors(self) -> list[tuple[int, ...]]:
        """Shapes of biases and of LayerNorm's parameters, which do not decay."""
        channels = [self.dim, self.dim, 3 * self.dim, self.dim, self.dim, self.dim, self.hidden, self.dim]
        return [(count,) for count in [*channels * self.depth, self.classes]]


BASE = Sizes("deit_base", 768, 12, 3072)
SMALL = Sizes("deit_small", 384, 6, 1536)
TINY = Sizes("deit_tiny", 192, 3, 768)
MANY_CLASSES = replace(BASE, name="21,841 classes", classes=21_841, odd=True)
FEW = Sizes("few", 8, 2, 12, batch=3, tokens=5, depth=1, classes=7, image=(4, 6), patch=2)
"""A few elements each: what finite differences and checks of a registration can afford."""

BASE_FP16 = ((BASE, torch.float16),)
DEITS = tuple((sizes, dtype) for sizes in (BASE, SMALL, TINY) for dtype in HALVES)
"""Every DeiT in both 16-bit dtypes."""


@dataclass(frozen=True)
class Maker:
    """Makes the arguments of an example: its tensors have these sizes and this dtype, and are on this device.

    The values are random, hence `torch.manual_seed` repeats them. They are drawn in float32, the same for every dtype.
    """

    sizes: Sizes
    dtype: torch.dtype
    device: torch.device

    @property
    def full(self) -> torch.dtype:
        """Of parameters and of the residual stream: float32, or float64 where all is float64."""
        return torch.promote_types(self.dtype, torch.float32)

    def normal(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0, grad: bool = True) -> Tensor:
        """Normal values of standard deviation `scale`, of the maker's dtype unless another is given."""
        values = torch.randn(shape, device=self.device) * scale
        return values.to(dtype or self.dtype).requires_grad_(grad)

    def activations(self, parts: int = 1, dtype: torch.dtype | None = None) -> Tensor:
        """`[batch, tokens, parts * dim]`, such as the packed queries, keys and values for 3 parts."""
        return self.normal(self.sizes.batch, self.sizes.tokens, parts * self.sizes.dim, dtype=dtype)

    def vector(self, parts: int = 1) -> Tensor:
        """A parameter `[parts * dim]`."""
        return self.normal(parts * self.sizes.dim, dtype=self.full)

    def mlp_weights(self) -> list[Tensor]:
        """w1 `[hidden, dim]`, b1 `[hidden]`, w2 `[dim, hidden]`, b2 `[dim]`; products keep the scale of tokens."""
        dim, hidden = self.sizes.dim, self.sizes.hidden
        shapes = (hidden, dim), (hidden,), (dim, hidden), (dim,)
        return [self.normal(*shape, scale=shape[-1] ** -0.5) for shape in shapes]

    def logits(self, copies: int = 1, grad: bool = True) -> Tensor:
        """`[copies * batch, classes]`."""
        return self.normal(copies * self.sizes.batch, self.sizes.classes, grad=grad)

    def targets(self) -> tuple[Tensor, Tensor, Tensor]:
        """Two labels of each sample, and the share of the first, from 0 to 1."""
        first = torch.arange(self.sizes.batch, device=self.device) % self.sizes.classes
        return first, first.flip(0), torch.linspace(0, 1, self.sizes.batch, device=self.device)

    def scalar(self, value: float) -> Tensor:
        """float32 `[]`."""
        return torch.full((), value, device=self.device)


@dataclass(frozen=True)
class Example:
    """A call of an op.

    name      what is special about it; "" for nothing
    build     the arguments of the op, in order. Those that require a gradient are differentiated for
    compiled  the sizes and dtypes for which the lint compiles its kernels
    bytes     of these arguments: what forward and backward have to move at best. The first example of an op has it,
              and is measured
    """

    name: str
    build: Callable[[Maker], list[Any]]
    compiled: Sequence[tuple[Sizes, torch.dtype]] = BASE_FP16
    bytes: Callable[[Sequence[Any]], float] | None = None
