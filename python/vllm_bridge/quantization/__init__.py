"""How quantized models are loaded and computed, where that is not all vLLM's doing."""

import logging
from typing import Any

logger = logging.getLogger(__name__)


async def note(llm: Any) -> str | None:
    """What users should know of how a loaded engine computes, in a sentence; it is logged too."""
    from vllm.platforms import current_platform

    text = None
    if current_platform.is_cpu():
        from vllm_bridge.quantization import fp8

        text = await fp8.note(llm, str(llm.model_config.dtype).removeprefix("torch."))
    if text is not None:
        logger.warning(text)
    return text
