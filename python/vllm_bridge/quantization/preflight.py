"""vLLM's config of an engine, with all that is looked at before the engine starts."""

from typing import Any

from vllm_bridge.models import Checkpoint
from vllm_bridge.quantization import availability, kv_cache, traps


def engine_config(
    model: str,
    checkpoint: Checkpoint,
    arguments: dict[str, Any],
    unknown_kv_cache_dtype: str | None = None,
) -> tuple[Any, str | None]:
    """The config of an engine that can run as it is asked to, as far as can be known without
    weights, and the name of the kernel that computes its quantized layers.

    Args:
        unknown_kv_cache_dtype: what ``kv_cache.take_dtype`` returned

    Raises:
        BridgeError: with the reason why it cannot
    """
    from vllm.engine.arg_utils import AsyncEngineArgs

    with availability.refusals(checkpoint, arguments.get("quantization")):
        config = AsyncEngineArgs(model=model, **arguments).create_engine_config()
        kv_cache.check(config, unknown_kv_cache_dtype)
        return config, traps.check(config, checkpoint)
