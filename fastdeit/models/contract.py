"""The contract of fastdeit's models, and what they share: options, decay groups, stages, a count of operations.

`Model` is what the engine and the methods ask of every network that is trained. `Tokens` is what a transformer offers
besides. Both are structural: a class is a `Model` by having the parts, not by inheriting.
"""

import copy
import inspect
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastdeit.text import did_you_mean, some

ConfigT = TypeVar("ConfigT")
ImageSize = int | tuple[int, int]
Logits = Tensor | tuple[Tensor, Tensor]
Owner = nn.Module | nn.Parameter
TokenMaps = Mapping[int, Callable[[Tensor], Tensor]]
Attends = Mapping[int, Callable[[Tensor, Tensor, Tensor], Tensor]]


@runtime_checkable
class Model(Protocol):
    """A network that can be trained: an `nn.Module` with these parts besides.

    Its `state_dict` is all that a checkpoint keeps of it. In eval mode its result is a function of the parameters, the
    buffers and the input alone. What it computes once for eval mode, such as a table of attention's biases, belongs
    into its `train(mode)`: fastdeit puts a network into eval mode anew after it has changed the weights.

    A parameter may be used several times, and have several names. Such a tied parameter counts once, under the first
    name that `named_parameters()` gives it.

    Weights are taken over by the names of the state dict. `pos_embed` `[1, N, dim]` is interpolated where the model has
    `grid`, the (rows, columns) of its patches; `image_size`, the (height, width) that they are of, tells those of a
    run. The positions before the patches are the rest, unless `prefix_positions` says how many there are. What else
    depends on the size of images, such as tables of biases, is resized by the optional `resized_weights(tensors)`,
    which gets weights by name, perhaps of a model for another size, and returns them as this model needs them. Buffers
    that follow from the size alone are registered with `persistent=False`.

    Six more methods are optional, and a recipe that needs one is refused where it is missing: `layers()` (see
    `models.layers`), `set_grad_checkpointing(enable)`, which computes activations again in backward instead of keeping
    them, `set_keep_activations(enable)`, which keeps those that the kernels would make again, `set_residual(dtype)`,
    the dtype of the residual stream, `set_fp8_products(enable)`, which lets products of training be of 8 bits, and
    `set_drop_path_skip(group)`, which computes no branch of a sample that drops it.
    """

    noise_per_sample: int
    """Columns of `noise` that `forward` needs in training mode, such as one for each draw of drop-path; 0 for none."""
    patch_size: int | None
    """Pixels per side of a patch where `forward` takes patchified input as well, else None."""
    head_names: tuple[str, ...]
    """Names of the `nn.Linear` layers whose outputs are the logits, in the order of the logits, as many as `forward`
    returns; empty where no such layer makes them, and then weights for other classes cannot be taken over."""

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Logits:
        """Logits `[B, K]`, or (class, distillation) logits of a model with two heads, in train and eval mode alike.

        x      float images `[B, C, H, W]`. A model with a `patch_size` p takes their patches `[B, P, C*p*p]` as well,
               each as the weight of a patch convolution is laid out (`kernels.to_patches`), and a keyword
               `grid=(rows, columns)`, which says how they lie where that is not the model's own grid
        noise  float32 `[B, noise_per_sample]` uniforms in [0, 1): the random numbers of training mode, which a training
               forward must be given. Unused in eval mode, and by a model whose `noise_per_sample` is 0 (timm's models
               draw from torch's generator instead)

        Raises ValueError for an input or noise that does not fit.
        """

    def decay_groups(self, decay_dist_token: bool = False) -> tuple[list[str], list[str]]:
        """Names of the parameters `(with, without)` weight decay: each parameter once. One that the model itself has
        frozen may be left out.

        `decay_dist_token=True` decays a distillation token, as DeiT's public code does.
        """

    def flops(self, image_size: ImageSize | None = None) -> int:
        """Floating-point operations (2 per multiply-add) of `forward` for one image, by default of the model's size."""


@runtime_checkable
class Tokens(Protocol):
    """What a vision transformer offers besides `Model`: its tokens, whole or in parts.

    Blocks count from 0. Tokens are `[B, N, dim]`, prefix tokens (class, distillation, registers) first, then the
    patches row by row. `taps` reads tokens and q/k/v of several blocks in one pass.
    """

    blocks: nn.ModuleList | nn.Sequential
    """The transformer blocks, in order."""

    def tokens(
        self,
        x: Tensor,
        *,
        at: TokenMaps | None = None,
        stop: int | None = None,
        keep: Tensor | None = None,
        attend: Attends | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """All tokens `[B, N, dim]` after the final norm; `x` and `noise` as in `forward`.

        at      {block index: fn}: the tokens before that block are replaced by `fn(tokens)`, which may be fewer
        stop    run blocks [0, stop) and nothing after them, and return their tokens without the final norm
        keep    int64 `[B, M]`: the patches that take part, by their number in the image, in this order; each keeps its
                position
        attend  {block index: fn}: in that block `fn(q, k, v)` of `qkv` stands in for softmax(q @ k.mT / sqrt(head_dim))
                @ v, and returns the same shape `[B, heads, N, head_dim]`: attention with a mask, within windows, ...

        Raises ValueError for an index that no block has.
        """

    def qkv(self, block: int, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values `[B, heads, N, head_dim]` that `block` makes of the tokens `[B, N, dim]` before it.

        They are what its softmax is given, `softmax(q @ k.mT / sqrt(head_dim)) @ v`. Raises ValueError where a block
        has no such attention.
        """

    def classify(self, tokens: Tensor) -> Logits:
        """Logits of what `tokens` returned: `forward` is `classify` of `tokens`."""

    def stages(self, depths: Sequence[int]) -> list[list[Owner]]:
        """Owners of the parameters in the order of the computation; `depths[i]` blocks go to stage i.

        What comes before the blocks belongs to the first stage, what comes after them to the last: every parameter has
        exactly one owner. For layer-wise learning rates, freezing and incubation. Raises ValueError for depths that do
        not add up to the number of blocks.
        """


_PARTS = {
    "noise_per_sample": "the columns of noise that training needs, 0 for none",
    "patch_size": "the side of a patch if forward takes patches as well, else None",
    "head_names": "the names of the linear layers that make the logits",
    "forward": "forward(x, noise=None), which returns logits",
    "decay_groups": "the names of the parameters with and without weight decay",
    "flops": "the floating-point operations for one image",
}


def missing(model: nn.Module) -> list[str]:
    """What `model` lacks to be a `Model`, each part with an explanation; empty if it has all of them.

    Looked at are names and signatures, not what the parts do.
    """
    lacking = [f"{name} ({meaning})" for name, meaning in _PARTS.items() if not hasattr(model, name)]
    for name, argument in (("forward", "noise"), ("decay_groups", "decay_dist_token"), ("flops", "image_size")):
        signature = inspect.signature(getattr(model, name, lambda: None))
        # The size goes by its place, whatever it is called.
        takes = signature.parameters if name == "flops" else argument in signature.parameters
        if hasattr(model, name) and not takes:
            lacking.append(f"{argument} in {name}{signature} ({_PARTS[name]})")
    return lacking


def wrong(model: nn.Module) -> list[str]:
    """What contradicts itself in a model that lacks no part (`missing`), a clause each; empty if all is right.

    Names that no tensor has would be passed over in training: a misspelt one would be decayed, or its head not be made
    anew for other classes.
    """
    found = []
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in model.head_names:
        if not isinstance(modules.get(name), nn.Linear):
            found.append(f"head_names has {name!r}, which is no nn.Linear of it; leave out what is none")
    if not (isinstance(model.noise_per_sample, int) and model.noise_per_sample >= 0):
        found.append(f"noise_per_sample is {model.noise_per_sample!r}, but has to be a number of columns")
    told = Counter(name for group in model.decay_groups() for name in group)
    # What the model itself has frozen, such as a table of sines, never decays, whether it is named or not.
    told.update(name for name, p in model.named_parameters() if not p.requires_grad and name not in told)
    return found + not_once("decay_groups()", told, model)


def not_once(source: str, told: Counter[str], model: nn.Module) -> list[str]:
    """What is wrong with names of parameters that ought to be all of the model's, each once. A tied parameter has the
    first of its names."""
    names = [name for name, _ in model.named_parameters()]
    other = dict.fromkeys(name for name, _ in model.named_parameters(remove_duplicate=False) if name not in names)
    problems = {
        "names {}, which is no parameter": [name for name in told if name not in names and name not in other],
        "names {}, which is the second name of a tied parameter; name it as named_parameters() does": [
            name for name in told if name in other
        ],
        "leaves out {}": [name for name in names if name not in told],
        "names {} more than once": [name for name, count in told.items() if count > 1],
    }
    return [f"{source} {what.format(some(which))}" for what, which in problems.items() if which]


def with_options(config: ConfigT, owner: str, options: Mapping[str, Any]) -> ConfigT:
    """The frozen dataclass `config` with some fields replaced; raises ValueError for a field it does not have."""
    known = [field.name for field in fields(config)]
    for option in options:
        if option not in known:
            hint = did_you_mean(option, known)
            raise ValueError(f"{owner} has no option {option!r}{hint or '; it takes ' + ', '.join(known)}")
    return replace(config, **options)


def split_decay(model: nn.Module, exempt: Collection[str]) -> tuple[list[str], list[str]]:
    """Names of the parameters `(with, without)` weight decay, in the order of `named_parameters()`.

    Without decay are 1-D parameters, biases, and the names in `exempt`.
    """
    decay, no_decay = [], []
    for name, parameter in model.named_parameters():
        free = parameter.ndim <= 1 or name.rpartition(".")[2] == "bias" or name in exempt
        (no_decay if free else decay).append(name)
    return decay, no_decay


def counted_flops(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Floating-point operations (2 per multiply-add) of `model` in eval mode on a tensor of `shape`.

    Counted are convolutions, matrix products and attention, on a copy without storage (meta device): nothing is
    computed.
    """
    twin = copy.deepcopy(model).to("meta").eval().requires_grad_(False)  # the counter trips over views of parameters
    # As plain products: torch before 2.9 leaves some fused attention kernels out of its count.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        twin(torch.empty(shape, device="meta"))
    return counter.get_total_flops()


def refuse_patches(x: Tensor, owner: str) -> None:
    """ValueError unless `x` is a batch of images `[B, C, H, W]`."""
    if x.ndim != 4:
        raise ValueError(
            f"{owner} takes images [B, C, H, W], but got a tensor of shape {tuple(x.shape)}; "
            "patchified input is only for fastdeit's vision transformers that look at each patch by itself"
        )
