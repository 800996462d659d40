"""Fused operations of vision transformers and their training, for any model.

Each op's file holds its mathematics, a `reference` in pure PyTorch that defines the result, its registration with
`torch.library`, and the public function. `info()` says which backend each op uses, and why, and `native_status()`
whether the kernels in CUDA C++ are there. `accelerate()` brings the ops into an existing model, and `nn` holds modules
for a new one. `Tuning` tries the backends out in the first steps of a run.
"""

from fastdeit.kernels import nn
from fastdeit.kernels._asked import use
from fastdeit.kernels._derivatives import transformed, with_bias_gradient
from fastdeit.kernels._op import OpInfo, format_info, info
from fastdeit.kernels.accelerate.patch import Report, accelerate, restore
from fastdeit.kernels.attention.op import attention, query_attention
from fastdeit.kernels.casts import autocast_copies
from fastdeit.kernels.cosub import cosub_loss
from fastdeit.kernels.fp8.linear import fp8_linear, fp8_mlp, fp8_refusal
from fastdeit.kernels.input import patchify, pixels, to_patches
from fastdeit.kernels.layer_norm.op import add_layer_norm
from fastdeit.kernels.linear import queries_apart
from fastdeit.kernels.losses import DistillationLoss, distillation_loss
from fastdeit.kernels.mlp.op import layer_norm_mlp, mlp
from fastdeit.kernels.native.choice import native_status
from fastdeit.kernels.optimizer.calls import fused_adamw, fused_lamb, fused_sgd, global_norm
from fastdeit.kernels.qk_norm_rope import qk_norm_rope
from fastdeit.kernels.rms_norm import add_rms_norm
from fastdeit.kernels.swiglu import swiglu
from fastdeit.kernels.trial.tuning import Tuning

__all__ = [
    "DistillationLoss",
    "OpInfo",
    "Report",
    "Tuning",
    "accelerate",
    "add_layer_norm",
    "add_rms_norm",
    "attention",
    "autocast_copies",
    "cosub_loss",
    "distillation_loss",
    "format_info",
    "fp8_linear",
    "fp8_mlp",
    "fp8_refusal",
    "fused_adamw",
    "fused_lamb",
    "fused_sgd",
    "global_norm",
    "info",
    "layer_norm_mlp",
    "mlp",
    "native_status",
    "nn",
    "patchify",
    "pixels",
    "qk_norm_rope",
    "queries_apart",
    "query_attention",
    "restore",
    "swiglu",
    "to_patches",
    "transformed",
    "use",
    "with_bias_gradient",
]
