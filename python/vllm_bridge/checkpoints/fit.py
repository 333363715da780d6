"""Whether the weights of a checkpoint fit into the memory."""

import math
import re
from collections.abc import Mapping
from typing import Any

from vllm_bridge import memory
from vllm_bridge.checkpoints.checkpoint import CAST, Checkpoint
from vllm_bridge.errors import BridgeError
from vllm_bridge.quantization import registry

# What a weight takes at least, in bytes, where a plain model is quantized while it is loaded by a
# method of which nothing is known.
_ONLINE_LEAST = 0.5

# Matrices that no method quantizes.
_NO_LAYER = re.compile(r"embed|lm_head")


def loaded_bytes(checkpoint: Checkpoint, options: Mapping[str, Any]) -> int:
    """The least that the weights take in memory under these engine options, when it is most:
    once they are loaded, or before they are quantized online."""
    if options.get("dtype") in ("float32", "float"):
        return checkpoint.bytes + 2 * checkpoint.floats
    method = options.get("quantization")
    if not isinstance(method, str) or checkpoint.quantization is not None:
        return checkpoint.bytes
    each = registry.of(method).online_bytes(checkpoint, options)
    each = _ONLINE_LEAST if each is None else each
    return checkpoint.bytes - int(_matrix_elements(checkpoint) * (2 - each))


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
    if options.get("dtype") in ("float32", "float"):
        advice += ', or `dtype: "bfloat16"`, which takes half'
    online = registry.of(options.get("quantization")).online
    if online is not None and not online.as_read:
        for dtype, method in registry.online_dtypes().items():
            if method.online is not None and method.online.as_read:
                advice += f', or `dtype: "{dtype}"`, which quantizes each weight as it is read'
    dequantized = ""
    if checkpoint.added:
        dequantized = ", dequantized because vLLM has no kernel for them here,"
    raise BridgeError(
        "out_of_memory",
        f"The model's weights{dequantized} need {needed / memory.GIB:.1f} GiB and "
        f"{available / memory.GIB:.1f} GiB of {kind} are available.",
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


def _matrix_elements(checkpoint: Checkpoint) -> int:
    """How many weights a method can quantize."""
    return sum(
        math.prod(tensor.shape)
        for name, tensor in checkpoint.tensors.items()
        if tensor.dtype in CAST and len(tensor.shape) > 1 and not _NO_LAYER.search(name)
    )
