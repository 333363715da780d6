"""Products with weights that stay packed as GGUF files have them.

A weight is a tensor of bytes, [rows, bytes of a row], or [experts, rows, bytes of a row] for a
stack of them; ``type`` is ggml's number of its type (``types.TYPES``).
"""

import torch

from vllm_bridge.quantization.gguf.types import TYPES
from vllm_bridge.quantization.packed import strips


def columns(weight: torch.Tensor, type: int) -> int:
    """How many weights a row has."""
    packing = TYPES[type]
    return int(weight.shape[-1]) // packing.size * packing.weights


def dequantize(weight: torch.Tensor, type: int, dtype: torch.dtype) -> torch.Tensor:
    """The weights as numbers, [..., rows, columns]: ggml's 32-bit values, rounded to ``dtype``."""
    packing = TYPES[type]
    values = packing.values(weight.reshape(-1, packing.size)).to(dtype)
    return values.view(*weight.shape[:-1], columns(weight, type))


def matmul(x: torch.Tensor, weight: torch.Tensor, type: int) -> torch.Tensor:
    """``x`` [..., columns] times the transpose of a weight [rows, bytes], in the dtype of ``x``."""
    product: torch.Tensor = torch.ops.vllm_bridge.gguf_matmul(x, weight, type)
    return product


def kernel() -> str:
    """What computes products here, for people to read."""
    return "torch (dequantized for each product)"


def _matmul(x: torch.Tensor, weight: torch.Tensor, type: int) -> torch.Tensor:
    return strips.matmul(x, weight.shape[0], lambda rows: dequantize(weight[rows], type, x.dtype))


strips.operation(
    "gguf_matmul(Tensor x, Tensor weight, int type)",
    _matmul,
    lambda x, weight, type: x.new_empty((*x.shape[:-1], weight.shape[0])),
)
