"""How quantized models are loaded and computed, where that is not all vLLM's doing."""

import dataclasses
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm_bridge.checkpoints.checkpoint import Checkpoint

logger = logging.getLogger(__name__)


def check(checkpoint: "Checkpoint") -> None:
    """Raises ``invalid_checkpoint`` where a checkpoint's weights are not what its config says.
    Reads headers and a few small tensors."""
    from vllm_bridge.checkpoints import packed_weights
    from vllm_bridge.quantization import registry

    if checkpoint.quantization is None:
        packed_weights.check_plain(checkpoint)
    else:
        registry.of((checkpoint.quant_method or "").lower()).check(checkpoint)


def as_loaded(checkpoint: "Checkpoint") -> "Checkpoint":
    """What the checkpoint is in memory, on this platform. Imports vLLM."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return checkpoint
    from vllm_bridge.patches.cpu import experts, fp8

    return dataclasses.replace(
        checkpoint,
        is_dequantized=fp8.always_dequantized(),
        are_experts_dequantized=experts.always_dequantized(),
    )


async def note(llm: Any, online: str | None, kernel: str | None) -> str | None:
    """What users should know of how a loaded engine computes; it is logged too.

    Args:
        online: what ``online.note`` says
        kernel: the name of the one that computes quantized layers
    """
    from vllm.platforms import current_platform

    from vllm_bridge.quantization import registry

    notes = []
    of_method = registry.of(llm.model_config.quantization).loaded_note(llm.vllm_config)
    of_activations = _of_activations(kernel, llm.vllm_config)
    for said in (online, of_method or _of_kernel(kernel), of_activations):
        if said is not None:
            logger.info(said)
            notes.append(said)
    if current_platform.is_cpu():
        from vllm_bridge.patches.cpu import experts, fp8

        dtype = str(llm.model_config.dtype).removeprefix("torch.")
        for replaced in (await fp8.note(llm, dtype), await experts.note(llm, dtype)):
            if replaced is not None:
                logger.warning(replaced)
                notes.append(replaced)
    return " ".join(notes) or None


def _of_kernel(kernel: str | None) -> str | None:
    """What is to be said where layers of vLLM's own are computed by kernels of this library."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return None
    from vllm_bridge.patches.cpu.packed_linear import PackedLinearKernel
    from vllm_bridge.quantization.packed import native

    # Only then are they looked for: they may have to be compiled.
    if kernel not in (PackedLinearKernel.__name__, native.TORCH):
        return None
    return native.note(is_cpu=True)


def _of_activations(kernel: str | None, config: Any) -> str | None:
    """Whether activations are rounded, where the user has asked for it."""
    from vllm_bridge.quantization import activations

    if not activations.are_rounded(config):
        return None
    from vllm_bridge.patches.cpu.packed_linear import PackedLinearKernel
    from vllm_bridge.quantization.packed import native

    if kernel in (PackedLinearKernel.__name__, native.kernel()):
        return native.rounding_note(config.model_config.dtype)
    return "Activations are not rounded to 8 bits: another kernel computes the layers."
