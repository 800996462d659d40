"""The floating-point types in which a step computes, by the names that recipes have for them."""

import torch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
HALVES = torch.float16, torch.bfloat16
