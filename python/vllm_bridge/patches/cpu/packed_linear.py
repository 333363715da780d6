"""Layers of AWQ, GPTQ and compressed-tensors (W2A16, W4A16, W8A16) are computed by the kernels of
``packed``.

vLLM's own kernel for them on CPUs is slower than bfloat16 at any number of tokens, and knows
integers of 4 bits only. The weights that it would be given are laid out again, not copied: a layer
takes the memory of its packed integers and their scales.
"""

from typing import Any

import torch
from vllm.config import get_current_vllm_config
from vllm.model_executor.kernels import linear
from vllm.model_executor.kernels.linear.mixed_precision.MPLinearKernel import (
    MPLinearKernel,
    MPLinearLayerConfig,
)
from vllm.model_executor.layers.quantization.utils.quant_utils import (
    unpack_quantized_values_into_int32,
)
from vllm.platforms import PlatformEnum

from vllm_bridge.quantization import activations
from vllm_bridge.quantization.packed import grouped, native

SEEN = ("0.32.",)
TOUCHES = {"vllm.model_executor.kernels.linear": ("_POSSIBLE_KERNELS",)}

# Those that fill the 32-bit words of a checkpoint, whose bytes are then streams of bits.
BITS = (2, 4, 8)

# The one that vLLM's own kernel knows.
VLLM_BITS = 4


def apply() -> None:
    kernels = linear._POSSIBLE_KERNELS[PlatformEnum.CPU]
    if PackedLinearKernel not in kernels:
        kernels.insert(0, PackedLinearKernel)


class PackedLinearKernel(MPLinearKernel):  # type: ignore[misc]
    @classmethod
    def get_min_capability(cls) -> int:
        return -1

    @classmethod
    def can_implement(cls, c: MPLinearLayerConfig) -> tuple[bool, str | None]:
        kind = c.weight_type
        if kind.size_bits not in BITS or kind.is_signed() or not kind.is_integer():
            return False, f"is for unsigned integers of {BITS} bits"
        if c.act_type not in (torch.bfloat16, torch.float16, torch.float32):
            return False, "is for activations of 16 or 32 bits"
        columns = c.partition_weight_shape[0]
        if columns * kind.size_bits % 32 or columns % _group(c):
            return False, f"{columns} inputs are no whole words or groups"
        if kind.size_bits == VLLM_BITS and not native.has_vectors():
            return False, "is faster with AVX-512's bfloat16 and a C++ compiler only"
        return True, None

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        kind = self.config.weight_type
        packed, scales = getattr(layer, self.w_q_name), getattr(layer, self.w_s_name)
        zeros_name = self.w_zp_name or "zeros"
        points = torch.full((1, 1), float(kind.bias), dtype=scales.dtype)
        if self.config.zero_points:
            zeros = getattr(layer, zeros_name)
            integers = unpack_quantized_values_into_int32(zeros.data, kind, zeros.packed_dim)
            points = _by_row(integers.to(scales.dtype), zeros.output_dim)
        values = {
            self.w_q_name: _by_row(packed.data, packed.output_dim).view(torch.uint8),
            self.w_s_name: _by_row(scales.data, scales.output_dim),
            zeros_name: points,
        }
        for name, value in values.items():
            setattr(layer, name, torch.nn.Parameter(value, requires_grad=False))
        self._names, self._bits = tuple(values), kind.size_bits
        self._rounded = activations.are_rounded(get_current_vllm_config())

    def apply_weights(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> Any:
        packed, scales, zeros = (getattr(layer, name) for name in self._names)
        product = grouped.matmul(x, packed, scales, zeros, self._bits, self._rounded)
        return product if bias is None else product + bias


def _by_row(values: torch.Tensor, output_dim: int) -> torch.Tensor:
    """Outputs first."""
    return (values if output_dim == 0 else values.t()).contiguous()


def _group(c: MPLinearLayerConfig) -> int:
    return int(c.group_size) if c.group_size > 0 else int(c.partition_weight_shape[0])
