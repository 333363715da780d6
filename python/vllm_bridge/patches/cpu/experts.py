"""Quantized experts of mixtures on CPUs whose vLLM cannot compute with them.

vLLM's kernels for experts of 4 and 8 bits ask for Intel's AMX, or take only some of the formats.
Where vLLM finds none, and the format is known here, the weights are dequantized when they are
loaded, each by its own scale, and the experts computed like those of a model that never was
quantized. It spares the disk, not the memory; activations are not quantized, so that answers are
those of the dequantized model.

``apply`` puts this behind vLLM's own choice of a kernel. Where vLLM has one, it does nothing.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts
from vllm.model_executor.layers.fused_moe.oracle import fp8 as choice_of_fp8
from vllm.model_executor.layers.fused_moe.oracle import int8 as choice_of_int8
from vllm.model_executor.layers.fused_moe.oracle import int_wna16 as choice_of_int4
from vllm.model_executor.layers.fused_moe.oracle.unquantized import select_unquantized_moe_backend
from vllm.model_executor.layers.quantization import auto_awq, auto_gptq, fp8
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_w8a8_fp8,
    compressed_tensors_moe_w8a8_int8,
    compressed_tensors_moe_wna16,
)
from vllm.model_executor.layers.quantization.inc.schemes import inc_wna16_scheme
from vllm.model_executor.layers.quantization.online import fp8 as online_fp8
from vllm.v1.worker.worker_base import WorkerBase

from vllm_bridge.patches import add, replace
from vllm_bridge.patches.cpu import auto_round
from vllm_bridge.patches.cpu.fp8 import dequantize
from vllm_bridge.quantization.gptq.experts import GPTQExpertsMethod
from vllm_bridge.quantization.layers import DEQUANTIZED_EXPERTS

SEEN = ("0.31.", "0.32.")
TOUCHES = {
    "vllm.model_executor.layers.quantization.fp8": (
        "select_fp8_moe_backend",
        "Fp8MoEMethod.create_weights",
        "Fp8MoEMethod.process_weights_after_loading",
    ),
    "vllm.model_executor.layers.quantization.online.fp8": (
        "select_fp8_moe_backend",
        "_Fp8OnlineMoEBase._setup_kernel",
    ),
    "vllm.model_executor.layers.quantization.auto_awq": (
        "select_wna16_moe_backend",
        "AutoAWQMoEMethod.create_weights",
        "AutoAWQMoEMethod.process_weights_after_loading",
    ),
    "vllm.model_executor.layers.quantization.auto_gptq": (
        "select_wna16_moe_backend",
        "AutoGPTQMoEMethod.create_weights",
        "AutoGPTQMoEMethod.process_weights_after_loading",
    ),
    "vllm.model_executor.layers.quantization.inc.schemes.inc_wna16_scheme": (
        "INCWna16Scheme.get_moe_method",
    ),
    "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe"
    ".compressed_tensors_moe_w8a8_fp8": (
        "select_fp8_moe_backend",
        "CompressedTensorsW8A8Fp8MoEMethod.create_weights",
        "CompressedTensorsW8A8Fp8MoEMethod.process_weights_after_loading",
    ),
    "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe"
    ".compressed_tensors_moe_w8a8_int8": (
        "select_int8_moe_backend",
        "CompressedTensorsW8A8Int8MoEMethod.create_weights",
        "CompressedTensorsW8A8Int8MoEMethod.process_weights_after_loading",
    ),
    "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe"
    ".compressed_tensors_moe_wna16": (
        "select_wna16_moe_backend",
        "CompressedTensorsWNA16MoEMethod.create_weights",
        "CompressedTensorsWNA16MoEMethod.process_weights_after_loading",
    ),
    "vllm.v1.worker.worker_base": ("WorkerBase",),
    "vllm_bnb_plugin.quantization.fused_moe": (
        "BitsAndBytesMoEMethod.process_weights_after_loading",
    ),
}

# The name of the method of vLLM's workers that counts them.
COUNT_METHOD = "vllm_bridge_count_dequantized_experts"

# Bits of the integers that weights are packed into.
_WORD = 32

# Where AWQ puts each of the eight outputs that share an integer.
_AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]

Plain = Callable[[Any, Any, str], torch.Tensor]
"""Makes plain numbers of the weights of a layer: by vLLM's method, the layer, and a name, which is
``w13`` for the gates and ups of all experts and ``w2`` for their downs."""


class DequantizedExperts(CPUUnquantizedExperts):  # type: ignore[misc]
    """Says in a method of vLLM that its experts are to be dequantized; it is never made."""


def apply() -> None:
    if not add(WorkerBase, COUNT_METHOD, _count_dequantized):
        return
    for module in (fp8, compressed_tensors_moe_w8a8_fp8, online_fp8):
        replace(module, "select_fp8_moe_backend", _last_of_all)
    replace(compressed_tensors_moe_w8a8_int8, "select_int8_moe_backend", _last_of_all)
    for module in (compressed_tensors_moe_wna16, auto_awq, auto_gptq):
        replace(module, "select_wna16_moe_backend", _last_of_all)
    for method, plain in (
        (fp8.Fp8MoEMethod, _scaled),
        (compressed_tensors_moe_w8a8_fp8.CompressedTensorsW8A8Fp8MoEMethod, _scaled),
        (compressed_tensors_moe_w8a8_int8.CompressedTensorsW8A8Int8MoEMethod, _scaled),
        (compressed_tensors_moe_wna16.CompressedTensorsWNA16MoEMethod, _packed),
        (auto_awq.AutoAWQMoEMethod, _awq),
        (auto_gptq.AutoGPTQMoEMethod, _gptq),
    ):
        replace(method, "create_weights", _with_exact_scales)
        replace(method, "process_weights_after_loading", functools.partial(_dequantizing, plain))
    replace(online_fp8._Fp8OnlineMoEBase, "_setup_kernel", _dequantizing_at_once)
    replace(inc_wna16_scheme.INCWna16Scheme, "get_moe_method", lambda _original: _auto_round)
    with contextlib.suppress(ImportError):
        from vllm_bnb_plugin.quantization.fused_moe import BitsAndBytesMoEMethod

        replace(BitsAndBytesMoEMethod, "process_weights_after_loading", _dequantizing_bitsandbytes)


def always_dequantized() -> bool:
    """Whether quantized experts are dequantized whatever their format is: this CPU is none that
    vLLM has kernels for."""
    kernels = [
        kernel
        for choice, backends in (
            (
                choice_of_fp8,
                [choice_of_fp8.Fp8MoeBackend.CPU_W8A8, choice_of_fp8.Fp8MoeBackend.CPU],
            ),
            (choice_of_int8, [choice_of_int8.Int8MoeBackend.CPU]),
            (choice_of_int4, choice_of_int4._get_priority_backends()),
        )
        for backend in backends
        for kernel in choice.backend_to_kernel_cls(backend)
    ]
    return not any(kernel._supports_current_device() for kernel in kernels)


async def note(llm: Any, dtype: str) -> str | None:
    """What is to be said of a loaded engine, if experts of its model were dequantized.

    Args:
        llm: the engine
        dtype: that it computes in
    """
    if not llm.model_config.is_moe or not any(await llm.collective_rpc(COUNT_METHOD)):
        return None
    return (
        f"Quantized experts, computed in {dtype}: vLLM has no kernel for them on this CPU. They "
        f"take the memory of {dtype} weights; activations are not quantized."
    )


def _last_of_all(select: Callable[..., Any]) -> Callable[..., Any]:
    """Adds dequantizing to what vLLM chooses a kernel from."""
    signature = inspect.signature(select)

    @functools.wraps(select)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        refusal, backend, kernel = None, None, None
        try:
            backend, kernel = select(*args, **kwargs)
        except NotImplementedError as error:
            refusal = error
        if kernel is not None:
            return backend, kernel
        given = signature.bind(*args, **kwargs).arguments
        if _is_possible(given["config"], given["weight_key"]):
            return backend, DequantizedExperts
        raise refusal or NotImplementedError("vLLM has no kernel for these experts on this CPU.")

    return wrapped


def _is_possible(config: Any, weight_key: Any) -> bool:
    bits = getattr(weight_key.dtype, "size_bits", 8)
    with contextlib.suppress(NotImplementedError):
        _, kernel = select_unquantized_moe_backend(config)
        # With adapters vLLM takes a kernel of GPUs.
        return _WORD % bits == 0 and issubclass(kernel, CPUUnquantizedExperts)
    return False


def _with_exact_scales(create_weights: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(create_weights)
    def create(method: Any, layer: Any, *args: Any, **kwargs: Any) -> None:
        create_weights(method, layer, *args, **kwargs)
        if method.experts_cls is DequantizedExperts:
            # Otherwise those of float16 would be rounded to bfloat16 before anything is computed.
            for name, parameter in layer.named_parameters(recurse=False):
                if name.endswith(("_scale", "_scales")):
                    parameter.data = parameter.data.to(torch.float32)

    return create


def _dequantizing(plain: Plain, process_weights: Callable[..., None]) -> Callable[..., None]:
    """Has a method of vLLM dequantize what it has loaded, where it has no kernel."""

    @functools.wraps(process_weights)
    def process(method: Any, layer: Any) -> None:
        if method.experts_cls is not DequantizedExperts:
            process_weights(method, layer)
        else:
            load_plain(method, layer, plain(method, layer, "w13"), plain(method, layer, "w2"))

    return process


def _dequantizing_at_once(setup_kernel: Callable[..., None]) -> Callable[..., None]:
    """The same for vLLM's methods that quantize a plain model."""

    @functools.wraps(setup_kernel)
    def setup(
        method: Any,
        layer: Any,
        w13: torch.Tensor,
        w2: torch.Tensor,
        w13_scale: torch.Tensor,
        w2_scale: torch.Tensor,
        *input_scales: Any,
        **named: Any,
    ) -> None:
        if method.experts_cls is not DequantizedExperts:
            setup_kernel(method, layer, w13, w2, w13_scale, w2_scale, *input_scales, **named)
            return
        block, shards = method.weight_block_size, method.moe.w13_num_shards
        load_plain(
            method,
            layer,
            scaled(w13, w13_scale, shards, block, layer.params_dtype),
            scaled(w2, w2_scale, 1, block, layer.params_dtype),
        )

    return setup


def _dequantizing_bitsandbytes(process_weights: Callable[..., None]) -> Callable[..., None]:
    """The same for the plugin's method, which computes with a kernel of GPUs."""

    @functools.wraps(process_weights)
    def process(method: Any, layer: Any) -> None:
        w13, w2 = method._apply_4bit_dequnt(layer)
        load_plain(method, layer, w13.to(layer.params_dtype), w2.to(layer.params_dtype))

    return process


def _auto_round(_scheme: Any, _config: Any, layer: Any, _prefix: str, settings: Any) -> Any:
    # In the place of vLLM's choice, which on CPUs takes them for experts that are not quantized.
    if settings.is_gptq and (settings.bits, settings.sym) not in auto_gptq.AutoGPTQConfig.TYPE_MAP:
        return GPTQExpertsMethod(auto_round.settings(settings), layer.moe_config)
    if settings.is_gptq:
        return inc_wna16_scheme._resolve_gptq_moe(layer, settings)
    if settings.is_awq:
        return inc_wna16_scheme._resolve_awq_moe(layer, settings)
    raise NotImplementedError(f"vLLM does not compute experts with {settings}.")


def load_plain(method: Any, layer: Any, w13: torch.Tensor, w2: torch.Tensor) -> None:
    """Has experts computed like those that never were quantized.

    Args:
        method: vLLM's method for the layer
        layer: its experts, with what was loaded
        w13: the dequantized gates and ups of all of them
        w2: the downs
    """
    for name in list(layer._parameters):
        if name.startswith(("w13_", "w2_")) and not name.endswith("_bias"):
            delattr(layer, name)
    for name, weight in (("w13_weight", w13), ("w2_weight", w2)):
        layer.register_parameter(name, torch.nn.Parameter(weight, requires_grad=False))
    plain = UnquantizedFusedMoEMethod(layer.moe_config)
    plain.process_weights_after_loading(layer)
    method.moe_quant_config = plain.moe_quant_config
    method.moe_kernel, method.apply = plain.moe_kernel, plain.apply
    setattr(layer, DEQUANTIZED_EXPERTS, True)


def scaled(
    weight: torch.Tensor,
    scale: torch.Tensor,
    shards: int,
    block: list[int] | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Weights of 8 bits as plain numbers.

    Args:
        weight: of each expert, a row per output
        scale: of each expert a number, or one for each shard, each row or each block
        shards: how many matrices are fused in each
        block: rows and columns of the blocks that have a scale each; None where there are none
    """
    experts, rows, columns = weight.shape
    plain = torch.empty(weight.shape, dtype=dtype)
    for expert in range(experts):
        numbers = scale[expert]
        if numbers.numel() in (1, shards):
            by_row = numbers.reshape(-1, 1).repeat_interleave(rows // numbers.numel(), dim=0)
        elif block is None:
            by_row = numbers.reshape(rows, 1)
        else:
            # The last block of each shard may be a part of one.
            by_shard = numbers.reshape(shards, -1, numbers.shape[-1])
            by_shard = by_shard.repeat_interleave(block[0], dim=1)[:, : rows // shards]
            by_row = by_shard.reshape(rows, -1)
        width = columns if block is None else block[1]
        plain[expert] = dequantize(weight[expert], by_row, width, dtype)
    return plain


def grouped(
    weight: torch.Tensor, zero: torch.Tensor | int, scale: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Unpacked weights of one expert as plain numbers.

    Args:
        weight: integers, a row per output
        zero: what stands for zero: one for all, or a row per output and a column per group
        scale: a row per output, a column per group
    """
    columns = weight.shape[1] // scale.shape[1]
    if isinstance(zero, torch.Tensor):
        zero = zero.repeat_interleave(columns, dim=1)
    return dequantize(weight - zero, scale, columns, dtype)


def unpack(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The numbers in integers of 32 bits, lowest first, in the place of each integer of a row."""
    shifts = torch.arange(0, _WORD, bits, dtype=torch.int32)
    return (packed.unsqueeze(-1) >> shifts & (1 << bits) - 1).flatten(1)


def _scaled(method: Any, layer: Any, part: str) -> torch.Tensor:
    weight = getattr(layer, f"{part}_weight")
    scale = getattr(layer, f"{part}_{getattr(method, 'weight_scale_name', 'weight_scale')}")
    shards = method.moe.w13_num_shards if part == "w13" else 1
    # vLLM's own method refines its blocks where they do not fit the ranks.
    block = getattr(method, "moe_block_shape", getattr(method, "weight_block_size", None))
    return scaled(weight, scale, shards, block, layer.params_dtype)


def _packed(method: Any, layer: Any, part: str) -> torch.Tensor:
    """Of compressed-tensors: along the rows, zero points along the columns."""
    packed, scale = (getattr(layer, f"{part}_weight_{name}") for name in ("packed", "scale"))
    zeros = getattr(layer, f"{part}_weight_zero_point", None)
    bits = method.num_bits
    return _stack(
        layer,
        lambda expert: grouped(
            unpack(packed[expert], bits),
            1 << (bits - 1) if zeros is None else unpack(zeros[expert].T, bits).T,
            scale[expert],
            layer.params_dtype,
        ),
    )


def _awq(method: Any, layer: Any, part: str) -> torch.Tensor:
    """Along the columns, a row per input; eight outputs share an integer, in an order of AWQ's."""
    weights, zeros, scales = (getattr(layer, f"{part}_{name}") for name in _OF_AUTO)

    def outputs(packed: torch.Tensor) -> torch.Tensor:
        numbers = unpack(packed, 4)
        return numbers.reshape(len(packed), -1, 8)[..., _AWQ_ORDER].flatten(1).T

    return _stack(
        layer,
        lambda expert: grouped(
            outputs(weights[expert]),
            outputs(zeros[expert]) if method.quant_config.zero_point else 8,
            scales[expert].T,
            layer.params_dtype,
        ),
    )


def _gptq(method: Any, layer: Any, part: str) -> torch.Tensor:
    """Along the columns, a column per output."""
    if not method.quant_config.is_sym:
        raise NotImplementedError("GPTQ's experts with zero points are not known here.")
    weights, _, scales = (getattr(layer, f"{part}_{name}") for name in _OF_AUTO)
    bits = method.quant_config.weight_bits
    _keep_biases(layer)
    return _stack(
        layer,
        lambda expert: grouped(
            unpack(weights[expert].T, bits),
            1 << (bits - 1),
            scales[expert].T,
            layer.params_dtype,
        ),
    )


# The names that AWQ and GPTQ have for the parts of a layer.
_OF_AUTO = ("qweight", "qzeros", "scales")


def _keep_biases(layer: Any) -> None:
    """GPTQ checkpoints may have biases that their architecture has not; vLLM has made room."""
    if layer._loaded_expert_biases:
        layer.moe_config.has_bias = True
    elif not layer.moe_config.has_bias:
        for name in ("w13_bias", "w2_bias"):
            if name in layer._parameters:
                delattr(layer, name)


def _stack(layer: Any, of_expert: Callable[[int], torch.Tensor]) -> torch.Tensor:
    """All experts in one tensor, without all of them in memory twice."""
    first = of_expert(0)
    plain = torch.empty((layer.local_num_experts, *first.shape), dtype=first.dtype)
    for expert in range(layer.local_num_experts):
        plain[expert] = of_expert(expert) if expert else first
    return plain


def _count_dequantized(worker: Any) -> int:
    return sum(hasattr(layer, DEQUANTIZED_EXPERTS) for layer in worker.get_model().modules())
