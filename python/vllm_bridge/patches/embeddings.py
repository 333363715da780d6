"""Embeddings that stay packed in every model.

Some models of vLLM (Gemma, Mixtral) make their embedding without the config of their quantization
method, so that it would be dequantized, which for a large vocabulary doubles the memory of a small
model. A config that can have embeddings packed says so by ``has_embeddings``.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from vllm_bridge.patches import replace

SEEN = ("0.32.",)
TOUCHES = {
    "vllm.model_executor.layers.vocab_parallel_embedding": ("VocabParallelEmbedding.__init__",)
}


def apply() -> None:
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    replace(VocabParallelEmbedding, "__init__", with_config)


def with_config(original: Callable[..., None]) -> Callable[..., None]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def __init__(*args: Any, **keywords: Any) -> None:
        from vllm.config import get_current_vllm_config_or_none

        config = get_current_vllm_config_or_none()
        quant_config = None if config is None else config.quant_config
        given = signature.bind(*args, **keywords)
        if (
            getattr(quant_config, "has_embeddings", False)
            and given.arguments.get("quant_config") is None
            and given.arguments.get("quant_method") is None
        ):
            given.arguments["quant_config"] = quant_config
        original(*given.args, **given.kwargs)

    return __init__
