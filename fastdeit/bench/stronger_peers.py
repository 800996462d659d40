"""What makes the compiled peer stronger than a good script would: newer FlashAttention, and a last block that computes
no more than what the heads read, as ours does."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn import attention as torch_attention

from fastdeit.bench.measure import CannotRun
from fastdeit.kernels.attention.libraries import FLASH, installed


def check_flash(name: str, device: torch.device) -> None:
    """Raise CannotRun where this release of `FLASH` cannot run on `device`, with the reason."""
    package, majors = FLASH[name]
    if not hasattr(torch_attention, "activate_flash_attention_impl"):
        raise CannotRun(f"{name} needs a torch that other FlashAttentions can be given to, not {torch.__version__}")
    if device.type != "cuda":
        raise CannotRun(f"{name} needs a CUDA device")
    major, minor = torch.cuda.get_device_capability(device)
    if major not in majors:
        cards = " or ".join(f"sm_{known}0" for known in majors)
        raise CannotRun(f"{name} needs {cards}, not sm_{major}{minor}")
    if not installed(package):
        raise CannotRun(f"{name} is not installed: there is no package {package}")


@contextmanager
def flash(name: str | None) -> Iterator[None]:
    """Inside, torch's FlashAttention is that of `FLASH`, in the whole process; None changes nothing."""
    if name is None:
        yield
        return
    torch_attention.activate_flash_attention_impl(name)
    try:
        yield
    finally:
        torch_attention.restore_flash_attention_impl()


class PrunedBlock(nn.Module):
    """timm's last block, of which the first `rows` tokens come out: keys and values are those of all tokens, all else
    is computed for these alone. What the heads read is what the whole block would give them."""

    def __init__(self, block: nn.Module, rows: int) -> None:
        super().__init__()
        self.block, self.rows = block, rows

    def forward(self, x: Tensor) -> Tensor:
        """`[B, N, dim]` -> `[B, rows, dim]`."""
        block, attn = self.block, self.block.attn
        normed, x = block.norm1(x), x[:, : self.rows]
        # The packed weight in two parts: queries, and keys with values.
        sizes = x.shape[-1], 2 * x.shape[-1]
        (w_q, w_kv), (b_q, b_kv) = attn.qkv.weight.split(sizes), attn.qkv.bias.split(sizes)
        q = F.linear(normed[:, : self.rows], w_q, b_q).unflatten(2, (attn.num_heads, -1)).transpose(1, 2)
        k, v = F.linear(normed, w_kv, b_kv).unflatten(2, (2, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + block.drop_path1(block.ls1(attn.proj(mixed)))
        return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def prune(model: nn.Module) -> None:
    """Let the last block of timm's `model` compute what its heads read. CannotRun for a model that it changes."""
    blocks = getattr(model, "blocks", None)
    if blocks is None or getattr(model, "global_pool", None) != "token":
        raise CannotRun(f"the heads of timm's {type(model).__name__} read more than the class token")
    block = blocks[-1]
    attn = getattr(block, "attn", None)
    plain = type(block).__name__ == "Block" and attn.qkv.bias is not None and attn.gate is None and not attn.attn_drop.p
    if not plain or not all(isinstance(part, nn.Identity) for part in (attn.q_norm, attn.k_norm, attn.norm)):
        raise CannotRun(f"the last block of timm's {type(model).__name__} is not a plain one")
    blocks[-1] = PrunedBlock(block, model.num_prefix_tokens)
