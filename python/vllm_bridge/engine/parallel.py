"""Whether a model can be divided among the devices that the options ask for, by vLLM's rules and
from the model's config alone."""

import math
import re
from collections.abc import Mapping
from typing import Any, TypeGuard

from vllm_bridge.checkpoints.checkpoint import Checkpoint
from vllm_bridge.errors import BridgeError
from vllm_bridge.sizing.layers import text_config

# vLLM rounds the vocabulary up to a multiple of it. Source: ``DEFAULT_VOCAB_PADDING_SIZE`` in
# vLLM's vocab_parallel_embedding.py; a test compares.
VOCABULARY_PADDING = 64

# How many processes there are is their product.
_SIZES = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")

# What models have that are no mixtures of experts.
_DENSE = re.compile(r"\.mlp\.down_proj\.qweight$")


def check(checkpoint: Checkpoint, options: Mapping[str, Any]) -> None:
    """Refuses sizes that the model cannot be divided by.

    Args:
        options: engine options as the user gave them

    Raises:
        BridgeError: ``invalid_option``
    """
    _check_nodes(options)
    if not checkpoint.config:
        return
    text = text_config(checkpoint.config)
    ranks = _count(options, "tensor_parallel_size")
    if ranks > 1:
        _check_tensor_parallel(checkpoint, text, ranks)
    stages, layers = _count(options, "pipeline_parallel_size"), text.get("num_hidden_layers")
    if _is_size(layers) and stages > layers:
        raise BridgeError(
            "invalid_option",
            f"`pipeline_parallel_size: {stages}` deals out the model's {layers} layers, and some "
            "devices would have none.",
            {"option": "pipeline_parallel_size", "value": stages, "num_hidden_layers": layers},
            remedy=f"Give {layers} at most.",
        )


def _check_nodes(options: Mapping[str, Any]) -> None:
    """Refuses a number of nodes that cannot have equal shares."""
    nodes = _count(options, "nnodes")
    processes = math.prod(_count(options, name) for name in _SIZES)
    if processes % nodes:
        raise BridgeError(
            "invalid_option",
            f"{nodes} nodes cannot have equal shares of {processes} "
            f"{'process' if processes == 1 else 'processes'}.",
            {"option": "nodes", "nodes": nodes, "processes": processes},
            remedy=f"Have the product of {', '.join(f'`{name}`' for name in _SIZES)} be a multiple "
            f"of {nodes}.",
        )


def _check_tensor_parallel(checkpoint: Checkpoint, text: Mapping[str, Any], ranks: int) -> None:
    why = _why_not(checkpoint, text, ranks)
    if why is None:
        return
    allowed = [size for size in _sizes(text) if _why_not(checkpoint, text, size) is None]
    raise BridgeError(
        "invalid_option",
        f"`tensor_parallel_size: {ranks}` does not divide this model: {why}.",
        {"option": "tensor_parallel_size", "value": ranks, "allowed": allowed},
        remedy=(
            f"It can be {', '.join(map(str, allowed))}. `pipeline_parallel_size` and `replicas` "
            "use more devices, too."
        ),
    )


def _why_not(checkpoint: Checkpoint, text: Mapping[str, Any], ranks: int) -> str | None:
    heads, shared = text.get("num_attention_heads"), text.get("num_key_value_heads")
    if _is_size(heads) and heads % ranks:
        return f"it has {heads} attention heads"
    is_latent = "kv_lora_rank" in text
    # Where there are fewer of them than ranks, several ranks hold the same.
    if _is_size(shared) and not is_latent and max(shared, ranks) % min(shared, ranks):
        return f"it has {shared} heads of keys and values"
    vocabulary = text.get("vocab_size")
    if _is_size(vocabulary):
        padded = -(-vocabulary // VOCABULARY_PADDING) * VOCABULARY_PADDING
        if padded % ranks:
            return f"its vocabulary of {vocabulary} tokens, padded to {padded}, has no such part"
    return _cut_groups(checkpoint, text, ranks)


def _cut_groups(checkpoint: Checkpoint, text: Mapping[str, Any], ranks: int) -> str | None:
    """Whether a group of weights with a scale of its own would lie on two ranks, with the methods
    whose layers vLLM refuses then."""
    if checkpoint.quant_method != "awq" or not any(map(_DENSE.search, checkpoint.tensors)):
        return None
    group, columns = (
        (checkpoint.quantization or {}).get("group_size"),
        text.get("intermediate_size"),
    )
    if not _is_size(group) or not _is_size(columns) or columns % (ranks * group) == 0:
        return None
    return (
        f"each of them would have {columns / ranks:g} of the {columns} columns of a layer that is "
        f"quantized in groups of {group}"
    )


def _is_size(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and value > 0


def _sizes(text: Mapping[str, Any]) -> range:
    heads = text.get("num_attention_heads")
    return range(1, heads + 1 if _is_size(heads) else 65)


def _count(options: Mapping[str, Any], name: str) -> int:
    given = options.get(name)
    return given if isinstance(given, int) and not isinstance(given, bool) else 1
