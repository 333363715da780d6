"""Whether the weights of a checkpoint fit into the memory."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vllm_bridge import memory
from vllm_bridge.checkpoints.checkpoint import Checkpoint
from vllm_bridge.errors import BridgeError
from vllm_bridge.quantization import registry
from vllm_bridge.sizing import settings, weights


def loaded_bytes(checkpoint: Checkpoint, options: Mapping[str, Any]) -> int:
    """The least that the weights take in memory under these engine options, when it is most:
    once they are loaded, or before they are quantized online."""
    return weights.weights(checkpoint, options).peak


def check_memory(
    checkpoint: Checkpoint, options: Mapping[str, Any], available: int, kind: str
) -> None:
    """Raises ``out_of_memory`` if the weights alone are more than ``available`` bytes."""
    needed = loaded_bytes(checkpoint, options)
    if needed <= available:
        return
    advice = "Use a smaller model"
    if checkpoint.quantization is None and not options.get("quantization"):
        advice += f" or a quantized variant of this one ({registry.small_format()} takes a third)"
    if settings.itemsize(options) > 2:
        advice += ', or `dtype: "bfloat16"`, which takes half'
    online = registry.of(options.get("quantization")).online
    if online is not None and not online.as_read:
        for dtype, method in registry.online_dtypes().items():
            if method.online is not None and method.online.as_read:
                advice += f', or `dtype: "{dtype}"`, which quantizes each weight as it is read'
    kept = dataclasses.replace(checkpoint, is_dequantized=False, are_experts_dequantized=False)
    dequantized = ""
    if needed > loaded_bytes(kept, options):
        dequantized = ", dequantized because vLLM has no kernel for them here,"
    raise BridgeError(
        "out_of_memory",
        f"The model's weights{dequantized} need {memory.gib(needed)} and "
        f"{memory.gib(available)} of {kind} are available.",
        {"needed_bytes": needed, "available_bytes": available},
        remedy=f"{advice}.",
    )


def check_device_memory(checkpoint: Checkpoint, arguments: Mapping[str, Any]) -> None:
    """``check_memory`` against the accelerators that the engine may use; on CPUs again, for what
    only vLLM tells of them. Imports vLLM."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        check_memory(checkpoint, arguments, memory.available_cpu(), "memory")
        return
    if arguments.get("cpu_offload_gb"):
        return
    ranks = arguments.get("tensor_parallel_size", 1) * arguments.get("pipeline_parallel_size", 1)
    total = current_platform.get_device_total_memory() * ranks
    check_memory(checkpoint, arguments, total, f"{current_platform.device_name} memory")
