"""How the weights of a vision transformer begin."""

from torch import Tensor, nn
from torch._subclasses import FakeTensor

from fastdeit.models.stems import PatchEmbed


def trunc_normal_(tensor: Tensor, std: float = 0.02) -> Tensor:
    """Fill with a normal of standard deviation `std`, truncated at -2 and 2: absolute, as in DeiT, so hardly ever.

    `nn.init.normal_` would do as well, but on the meta device it imports all of `torch._dynamo`, which takes seconds.
    Fake tensors stay as they are: PyTorch's function looks at the values, and they have none.
    """
    if isinstance(tensor, FakeTensor):
        return tensor
    return nn.init.trunc_normal_(tensor, std=std, a=-2.0, b=2.0)


def init_linear(linear: nn.Linear) -> None:
    """DeiT's initialisation of a linear layer."""
    trunc_normal_(linear.weight)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def init_deit(model: nn.Module) -> None:
    """DeiT's: truncated normal of standard deviation 0.02 for tokens, learned positions and linear weights, heads too;
    zero biases; LayerNorm 1 and 0; convolutions keep PyTorch's default or what their stem gave them."""
    for parameter in model.parameters(recurse=False):
        if parameter.requires_grad:
            trunc_normal_(parameter)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            init_linear(module)


def init_vit(model: nn.Module) -> None:
    """That of the first vision transformers, as in big_vision and, but for attention, in pycls.

    Xavier's uniform for the weights of attention (of queries, keys and values each by itself) and MLP; a normal of 1e-6
    for the biases of the MLP; zero heads and class token; a normal of 0.02 for learned positions, and of variance 1 /
    fan-in for the linear embedding of patches.
    """
    for name, parameter in model.named_parameters(recurse=False):
        if parameter.requires_grad:
            trunc_normal_(parameter) if name == "pos_embed" else nn.init.zeros_(parameter)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            _init_linear_of_vit(name.rpartition(".")[2], module)
    if isinstance(model.patch_embed, PatchEmbed):
        weight, bias = model.patch_embed.proj.weight, model.patch_embed.proj.bias
        trunc_normal_(weight, std=weight[0].numel() ** -0.5)
        nn.init.zeros_(bias)


def _init_linear_of_vit(name: str, linear: nn.Linear) -> None:
    nn.init.zeros_(linear.bias)
    if name.startswith("head"):
        nn.init.zeros_(linear.weight)
        return
    weight = linear.weight.detach()
    for part in weight.chunk(3) if name == "qkv" else [weight]:
        nn.init.xavier_uniform_(part)
    if name in ("fc1", "fc2"):
        trunc_normal_(linear.bias, std=1e-6)


SCHEMES = {"deit": init_deit, "vit": init_vit}
"""By `ViTConfig.init`."""
