"""Layers of a GGUF model compute products with what is around them in one call: SwiGLU between
gate, up and down; the residual and the norm before a product, and the product before those.
Decoding one sequence, each call takes long beside what it computes.

A layer's modules stay where they are. Those whose work another does hand on what they are given.
"""

import types
from collections.abc import Callable
from typing import Any

import torch
from vllm.model_executor.layers.layernorm import RMSNorm

from vllm_bridge.quantization.gguf import kernels, operation
from vllm_bridge.quantization.gguf.layers import GGUFLinear

# Whose modules' methods may be replaced.
TOUCHES = {
    "vllm.model_executor.models.llama": (
        "LlamaDecoderLayer.forward",
        "LlamaAttention.forward",
        "LlamaMLP.forward",
    ),
    "vllm.model_executor.models.qwen2": (
        "Qwen2DecoderLayer.forward",
        "Qwen2Attention.forward",
        "Qwen2MLP.forward",
    ),
}
_KNOWN = {f"{module}.{name}" for module, names in TOUCHES.items() for name in names}


def join(model: torch.nn.Module) -> None:
    """Has those layers of a loaded model computed so."""
    for module in model.modules():
        if _is_known(module, "MLP") and _is_gated(module):
            _replace(module, _gated, module)
    for module in model.modules():
        if _is_known(module, "DecoderLayer") and _is_known(module.self_attn, "Attention"):
            _join(module)


def _is_known(module: torch.nn.Module, kind: str) -> bool:
    forward = type(module).forward
    return (
        forward.__qualname__.endswith(f"{kind}.forward")
        and f"{forward.__module__}.{forward.__qualname__}" in _KNOWN
    )


def _join(layer: Any) -> None:
    attention, mlp = layer.self_attn, layer.mlp
    if _is_joinable(layer.input_layernorm, attention.qkv_proj):
        _replace(layer.input_layernorm, _norm_and_qkv, layer)
        _replace(attention.qkv_proj, _given, attention.qkv_proj)
    if (
        _is_joinable(layer.post_attention_layernorm, attention.o_proj, most=1)
        and attention.o_proj.bias is None
        and _is_known(mlp, "MLP")
        and _is_gated(mlp)
    ):
        _replace(attention.o_proj, _given, attention.o_proj)
        _replace(layer.post_attention_layernorm, _output_norm_and_mlp, layer)
        _replace(mlp, _same, mlp)


def _replace(module: Any, forward: Callable[..., Any], owner: Any) -> None:
    module.forward = types.MethodType(forward, owner)


def _is_gated(mlp: Any) -> bool:
    return all(
        _is_product(layer, most=1) and layer.bias is None
        for layer in (mlp.gate_up_proj, mlp.down_proj)
    )


def _is_joinable(norm: Any, layer: Any, most: int = 2) -> bool:
    """Whether a product can be one with a norm. Without a C++ compiler what is compiled of torch's
    is faster."""
    return (
        type(norm) is RMSNorm
        and norm.has_weight
        and norm.variance_size_override is None
        and _is_product(layer, most)
        and operation.library() is not None
    )


def _is_product(layer: Any, most: int) -> bool:
    """Whether a layer is so many products at most, and activations may be rounded."""
    method = layer.quant_method
    return (
        isinstance(method, GGUFLinear)
        and not method.is_exact
        and len(layer.packed) <= most
        and kernels.is_for_ggml(layer.weight)
        and layer.tp_size == 1
    )


def _packed(layer: Any) -> list[tuple[torch.Tensor, int]]:
    return [(getattr(layer, name), type) for name, type in layer.packed]


def _gated(self: Any, x: torch.Tensor) -> torch.Tensor:
    """Of an MLP."""
    first, second = _packed(self.gate_up_proj) + _packed(self.down_proj)
    return kernels.pair(x, first, second, is_gated=True)


def _norm_and_qkv(self: Any, x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
    """Of a layer, in place of the norm before attention."""
    norm, qkv = self.input_layernorm, self.self_attn.qkv_proj
    if residual is None:
        return qkv.quant_method.apply(qkv, type(norm).forward(norm, x))
    return kernels.normed(
        *(x, residual, norm.weight, norm.variance_epsilon), _packed(qkv), is_gated=False
    )


def _output_norm_and_mlp(self: Any, x: torch.Tensor, residual: torch.Tensor) -> Any:
    """Of a layer, in place of the norm after attention."""
    norm, mlp = self.post_attention_layernorm, self.mlp
    return kernels.normed(
        *(x, residual, norm.weight, norm.variance_epsilon),
        _packed(mlp.gate_up_proj) + _packed(mlp.down_proj),
        is_gated=True,
        before=_packed(self.self_attn.o_proj)[0],
    )


def _given(self: Any, x: torch.Tensor) -> tuple[torch.Tensor, None]:
    """Of a linear layer whose product is there."""
    return (x if self.bias is None else x + self.bias), None


def _same(self: Any, x: torch.Tensor) -> torch.Tensor:
    return x
