"""FP8 weights on CPUs whose vLLM cannot compute with them.

vLLM's build for CPUs declares the operations that quantize to FP8 and leaves them empty, so that
models with a scale per tensor end while they are loaded; blocks need Intel's AMX; and a scale per
channel goes through torch's reference implementation, many times slower than bfloat16. There the
weights are dequantized when they are loaded, each part by its own scale, and the layers computed
like those of a model that never was quantized. It spares the disk, not the memory; activations
are not quantized, so that answers are those of the dequantized model.

``apply`` adds this to vLLM's own lists of kernels, behind those that the CPU supports. On builds
whose operations are not empty it does nothing.
"""

from typing import Any

import torch
from vllm import _custom_ops
from vllm.model_executor.kernels import linear
from vllm.model_executor.kernels.linear.scaled_mm import cpu, pytorch
from vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel import (
    Fp8BlockScaledMMLinearKernel,
)
from vllm.model_executor.kernels.linear.scaled_mm.ScaledMMLinearKernel import (
    FP8ScaledMMLinearKernel,
)
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.utils import w8a8_utils
from vllm.model_executor.utils import replace_parameter
from vllm.platforms import PlatformEnum, current_platform
from vllm.v1.worker.worker_base import WorkerBase

from vllm_bridge.patches import add, replace
from vllm_bridge.patches.cpu import amx

SEEN = ("0.31.", "0.32.")
TOUCHES = {
    "vllm._custom_ops": ("scaled_fp8_quant",),
    "vllm.model_executor.layers.quantization.utils.w8a8_utils": ("requantize_with_max_scale",),
    "vllm.v1.worker.worker_base": ("WorkerBase",),
}

# Weights are dequantized in parts of so many rows, which bounds the float32 copy of a part.
ROWS = 1024

# What a layer is marked with whose weights were dequantized.
MARK = "vllm_bridge_dequantized"

# The name of the method of vLLM's workers that counts them.
COUNT_METHOD = "vllm_bridge_count_dequantized"


def is_missing() -> bool:
    """Whether this is a CPU with a vLLM that declares its FP8 operations and does not have them."""
    if not current_platform.is_cpu():
        return False
    operation = getattr(torch.ops._C, "static_scaled_fp8_quant", None)
    # The empty declaration takes no arguments.
    return operation is None or not operation.default._schema.arguments


def apply() -> None:
    amx.apply()  # Which kernels the CPU supports depends on it.
    if not is_missing() or not add(WorkerBase, COUNT_METHOD, _count_dequantized):
        return
    kernels = linear._POSSIBLE_FP8_KERNELS[PlatformEnum.CPU]
    first = next(
        i for i, k in enumerate(kernels) if issubclass(k, pytorch.TorchFP8ScaledMMLinearKernel)
    )
    kernels.insert(first, DequantizedFP8LinearKernel)
    linear._POSSIBLE_WFP8A16_KERNELS[PlatformEnum.CPU].append(DequantizedFP8LinearKernel)
    linear._POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CPU].append(DequantizedFp8BlockLinearKernel)
    replace(_custom_ops, "scaled_fp8_quant", lambda _empty: _scaled_fp8_quant)
    if not cpu.CPUFp8PerTensorScaledMMLinearKernel.is_supported()[0]:
        replace(w8a8_utils, "requantize_with_max_scale", lambda _original: _scale_per_row)


def always_dequantized() -> bool:
    """Whether weights are dequantized whatever their scales are: no kernel of vLLM comes first."""
    if not is_missing():
        return False
    apply()
    for kernels in (linear._POSSIBLE_FP8_KERNELS, linear._POSSIBLE_FP8_BLOCK_KERNELS):
        for kernel in kernels[PlatformEnum.CPU]:
            if issubclass(kernel, _Dequantized):
                break
            if kernel.is_supported()[0]:
                return False
    return True


async def note(llm: Any, dtype: str) -> str | None:
    """What is to be said of a loaded engine, if weights of its model were dequantized.

    Args:
        llm: the engine
        dtype: that it computes in
    """
    if not is_missing() or not any(await llm.collective_rpc(COUNT_METHOD)):
        return None
    return (
        f"FP8 weights, computed in {dtype}: this build of vLLM for CPUs has no FP8 kernel. They "
        f"take the memory of {dtype} weights; activations are not quantized."
    )


class _Dequantized:
    """What the kernels below have in common: a plain layer, once the weights are loaded."""

    config: Any

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        return (True, None) if is_missing() else (False, "is for CPUs without an FP8 kernel")

    @classmethod
    def can_implement(cls, config: Any) -> tuple[bool, str | None]:
        return True, None

    def load_plain(
        self, layer: torch.nn.Module, weight: torch.Tensor, scale: torch.Tensor, columns: int
    ) -> None:
        """Gives the layer the dequantized weights; the arguments are those of ``dequantize``."""
        plain = dequantize(weight, scale, columns, self.config.out_dtype)
        replace_parameter(layer, "weight", torch.nn.Parameter(plain, requires_grad=False))
        setattr(layer, MARK, True)
        self._method = UnquantizedLinearMethod()
        self._method.process_weights_after_loading(layer)

    def apply_weights(
        self, layer: torch.nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> Any:
        return self._method.apply(layer, x, bias)


class DequantizedFP8LinearKernel(_Dequantized, FP8ScaledMMLinearKernel):  # type: ignore[misc]
    """A layer with a scale per tensor or per channel."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        weight, scale, _, _ = self._get_layer_params(layer)
        rows = weight.t()  # vLLM hands them over transposed
        self.load_plain(layer, rows, scale.reshape(-1, 1), rows.shape[1])

    def apply_scaled_mm(self, **_: Any) -> torch.Tensor:
        raise NotImplementedError("`apply_weights` is overridden")


class DequantizedFp8BlockLinearKernel(_Dequantized, Fp8BlockScaledMMLinearKernel):  # type: ignore[misc]
    """A layer with a scale per block."""

    def process_weights_after_loading(self, layer: torch.nn.Module) -> None:
        params, block = self._get_layer_params(layer), self.weight_group_shape
        scale = params.block_scale.repeat_interleave(block.row, dim=0)[: params.weight.shape[0]]
        self.load_plain(layer, params.weight, scale, block.col)

    def apply_block_scaled_mm(self, *_: Any, **__: Any) -> torch.Tensor:
        raise NotImplementedError("`apply_weights` is overridden")


def dequantize(
    weight: torch.Tensor, scale: torch.Tensor, columns: int, dtype: torch.dtype
) -> torch.Tensor:
    """The weights as plain numbers.

    Args:
        weight: a row per output
        scale: a row per row of ``weight``, or one for all; in it a number per block of ``columns``
        columns: of one block
    """
    count, width = weight.shape
    plain = torch.empty(weight.shape, dtype=dtype)
    for start in range(0, count, ROWS):
        rows = slice(start, start + ROWS)
        scales = (scale if len(scale) == 1 else scale[rows]).to(torch.float32)
        if scales.shape[1] > 1:
            scales = scales.repeat_interleave(columns, dim=1)[:, :width]
        plain[rows] = (weight[rows].to(torch.float32) * scales).to(dtype)
    return plain


def _scale_per_row(
    weight: torch.Tensor, weight_scale: torch.Tensor, logical_widths: list[int]
) -> tuple[torch.Tensor, torch.Tensor]:
    # In the place of vLLM's requantizing of layers that were fused, which gives their parts one
    # scale for a kernel that can have no more, and loses a little by it. Parts without a scale of
    # their own, which the checkpoint had fused already, have the mark of an unset one.
    if weight_scale.ndim == 0 or weight_scale[-1] <= torch.finfo(torch.float8_e4m3fn).min:
        return weight_scale.max(), weight
    return w8a8_utils.convert_to_channelwise(weight_scale, logical_widths), weight


def _scaled_fp8_quant(
    input: torch.Tensor, scale: torch.Tensor | None = None, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    # What the empty operation is asked for while a model is loaded: one given scale for all, or
    # one for each row of a layer of experts.
    dtype = current_platform.fp8_dtype()
    limits = torch.finfo(dtype)
    if scale is None and options == {"use_per_token_if_dynamic": True}:
        largest = input.abs().amax(-1, keepdim=True).to(torch.float32)
        scale = (largest / limits.max).clamp_min(1.0 / (limits.max * 512))
    elif scale is None or scale.numel() != 1 or options:
        raise NotImplementedError("vLLM's build for CPUs does not quantize to FP8 in this way.")
    scaled = input.to(torch.float32) / scale.to(torch.float32)
    return scaled.clamp_(limits.min, limits.max).to(dtype), scale


def _count_dequantized(worker: Any) -> int:
    return sum(hasattr(layer, MARK) for layer in worker.get_model().modules())
