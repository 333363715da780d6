"""Layers of a GGUF model that are gated by SiLU compute their products in one call of ggml's, with
what is between them: decoding one sequence, each call takes long beside what it computes.
"""

import types
from typing import Any

import torch

from vllm_bridge.quantization.gguf import kernels
from vllm_bridge.quantization.gguf.layers import GGUFLinear

# Whose methods may be replaced.
TOUCHES = {
    "vllm.model_executor.models.llama": ("LlamaMLP.forward",),
    "vllm.model_executor.models.qwen2": ("Qwen2MLP.forward",),
}


def join(model: torch.nn.Module) -> None:
    """Has those layers of a loaded model computed so."""
    known = {f"{module}.{name}" for module, names in TOUCHES.items() for name in names}
    for module in model.modules():
        forward = type(module).forward
        if f"{forward.__module__}.{forward.__qualname__}" in known and all(
            _is_one_product(layer) for layer in (module.gate_up_proj, module.down_proj)
        ):
            module.forward = types.MethodType(_forward, module)


def _is_one_product(layer: Any) -> bool:
    """Whether a layer is nothing but a product, whose activations may be rounded."""
    method = layer.quant_method
    return (
        isinstance(method, GGUFLinear)
        and not method.is_exact
        and len(layer.packed) == 1
        and kernels.is_for_ggml(layer.weight)
        and layer.bias is None
        and layer.tp_size == 1
    )


def _forward(self: Any, x: torch.Tensor) -> torch.Tensor:
    first, second = self.gate_up_proj, self.down_proj
    ((_, first_type),), ((_, second_type),) = first.packed, second.packed
    return kernels.pair(x, first.weight, first_type, second.weight, second_type, is_gated=True)
