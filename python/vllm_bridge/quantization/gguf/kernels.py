"""Products with weights that stay packed as GGUF files have them.

A weight is a tensor of bytes, [rows, bytes of a row], or [experts, rows, bytes of a row] for a
stack of them; ``type`` is ggml's number of its type (``types.TYPES``).
"""

import torch
from torch.nn import functional

from vllm_bridge.quantization.gguf.types import TYPES

# Weights that are dequantized at once, so that a layer never is as a whole.
_CHUNK = 4 * 1024 * 1024


def columns(weight: torch.Tensor, type: int) -> int:
    """How many weights a row has."""
    packing = TYPES[type]
    return weight.shape[-1] // packing.size * packing.weights


def dequantize(weight: torch.Tensor, type: int, dtype: torch.dtype) -> torch.Tensor:
    """The weights as numbers, [..., rows, columns]: ggml's 32-bit values, rounded to ``dtype``."""
    packing = TYPES[type]
    values = packing.values(weight.reshape(-1, packing.size)).to(dtype)
    return values.view(*weight.shape[:-1], columns(weight, type))


def _product(x: torch.Tensor, weight: torch.Tensor, type: int) -> torch.Tensor:
    rows = max(1, _CHUNK // columns(weight, type))
    parts = [functional.linear(x, dequantize(part, type, x.dtype)) for part in weight.split(rows)]
    return torch.cat(parts, -1)


def _shape(x: torch.Tensor, weight: torch.Tensor, type: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


# As an operator of torch's, of which compiled graphs see the shape only. `torch.library.custom_op`
# makes one that takes twice the time of each call.
_OPERATORS = torch.library.Library("vllm_bridge_gguf", "DEF")
_OPERATORS.define("matmul(Tensor x, Tensor weight, int type) -> Tensor")
_OPERATORS.impl("matmul", _product, "CompositeExplicitAutograd")
torch.library.register_fake("vllm_bridge_gguf::matmul", _shape, lib=_OPERATORS)


def matmul(x: torch.Tensor, weight: torch.Tensor, type: int) -> torch.Tensor:
    """``x`` [..., columns] times the transpose of a weight [rows, bytes], in the dtype of ``x``."""
    product: torch.Tensor = torch.ops.vllm_bridge_gguf.matmul(x, weight, type)
    return product


def kernel() -> str:
    """What computes products here, for people to read."""
    return "torch (dequantized for each product)"
