"""What LoRA adapters take of each rank: vLLM makes room for ``max_loras`` of the largest rank in
every layer when it starts, whatever an adapter then has (``lora/layers/``)."""

from collections.abc import Mapping
from typing import Any, Final

from vllm_bridge.sizing import layers, settings
from vllm_bridge.sizing.fields import Fields

# vLLM's defaults.
_RANK: Final = 16
_ADAPTERS: Final = 1


def bytes_per_rank(config: Mapping[str, Any], options: Mapping[str, Any]) -> int:
    """
    Args:
        config: a model's ``config.json``
        options: by vLLM's names; those that count are ``enable_lora``, ``max_loras``,
            ``max_lora_rank``, ``dtype``, ``tensor_parallel_size`` and ``pipeline_parallel_size``

    Returns:
        bytes of all adapters; 0 without ``enable_lora``
    """
    if not options.get("enable_lora"):
        return 0
    text = layers.text_config(config)
    rank = int(options.get("max_lora_rank") or _RANK)
    ranks = settings.count(options, "tensor_parallel_size")
    stages = settings.count(options, "pipeline_parallel_size")
    hidden, vocabulary = text.number("hidden_size"), text.number("vocab_size")
    per_layer = _attention(text, ranks) + _feed_forward(text, ranks)
    count = -(-layers.count(text) // stages)
    # Embeddings and the output layer: what goes in is of one size, what comes out of the other.
    outer = 2 * (hidden + vocabulary)
    numbers = rank * (count * per_layer + outer)
    return numbers * settings.itemsize(options) * int(options.get("max_loras") or _ADAPTERS)


def _attention(text: Fields, ranks: int) -> int:
    """Numbers of one layer for each of an adapter's ranks. The way in is whole on each device where
    outputs are divided, the way out where inputs are."""
    hidden, heads = text.number("hidden_size"), layers.query_heads(text)
    if not heads:
        return 0
    head = text.number("head_dim") or hidden // heads
    queries = heads * head
    keys = max(1, layers.key_heads(text) // ranks) * head
    return 3 * hidden + queries // ranks + 2 * keys + queries // ranks + hidden


def _feed_forward(text: Fields, ranks: int) -> int:
    hidden = text.number("hidden_size")
    experts = layers.experts(text) or 1
    inner = text.number("moe_intermediate_size") if experts > 1 else 0
    inner = (inner or text.number("intermediate_size")) // ranks
    return experts * (2 * hidden + 2 * inner + inner + hidden)
