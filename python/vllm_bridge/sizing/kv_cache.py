"""How much memory the KV cache of a model takes, from its config and the engine's options alone.

What vLLM 0.32 allocates: pages of one size for all layers, whose ids requests take from one pool.
Not counted are the scales of an FP8 cache with one scale per layer, which are eight bytes in each
layer and belong to the weights.
"""

import bisect
import dataclasses
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

from vllm_bridge.sizing import entries, layers, paging, settings
from vllm_bridge.sizing.fields import Fields
from vllm_bridge.sizing.layers import Kind, Layer

# vLLM's ``SchedulerConfig.DEFAULT_MAX_NUM_BATCHED_TOKENS`` and ``DEFAULT_MAX_NUM_SEQS``.
_BATCHED_TOKENS, _SEQUENCES = 2048, 128

# The entries of a config that vLLM takes the shortest of for the longest context.
_LENGTHS = (
    *("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"),
    *("max_target_positions", "max_sequence_length", "max_seq_length", "seq_len"),
)

# More than this as `model_max_length` is a tokenizer's way to say that it has none.
_UNLIMITED = 2**40

# Where those are the lengths before they were stretched.
_STRETCHED = ("linear", "dynamic")


@dataclasses.dataclass(frozen=True)
class Layers:
    """Layers of one kind on one rank.

    Args:
        kind: as ``layers.Layer`` says
        count: how many
        bytes_per_token: of all of them together, for a token that they keep
        bytes_per_sequence: of all of them together, for what does not grow with the text
        window: how many tokens they keep; None for all
    """

    kind: Kind
    count: int
    bytes_per_token: int
    bytes_per_sequence: int
    window: int | None


@dataclasses.dataclass(frozen=True)
class KVCache:
    """The KV cache of one rank, the one with the largest.

    Args:
        layers: what it consists of
        bytes_per_token: of a token, in all layers that keep every token
        block_size: tokens in a block of those layers
        page_size: bytes of a page, which is a block in one layer
        bytes_per_block: of a block in all layers that share its id
        groups: the layers that share the ids of their blocks; a request takes blocks for each
        in_flight: tokens that are computed at a time, which layers with a window keep beside it
        encoder_tokens: of the encoder's output, which layers with attention to it keep
        is_approximate: whether the model has caches that are not known here in detail, so that
            vLLM may take more or less
    """

    layers: tuple[Layers, ...]
    bytes_per_token: int
    block_size: int
    page_size: int
    bytes_per_block: int
    groups: tuple[paging.Group, ...]
    in_flight: int
    encoder_tokens: int
    is_approximate: bool

    def blocks(self, tokens: int) -> int:
        """That a request of so many tokens takes at most, prompt and answer together."""
        return sum(
            max(pages.blocks(tokens, self.in_flight, self.encoder_tokens) for pages in set(values))
            for values in (group.values() for group in self.groups)
        )

    def bytes(self, tokens: int, sequences: int = 1) -> int:
        """What the cache takes for ``sequences`` requests of ``tokens`` tokens each, with the one
        block that vLLM keeps for itself."""
        if not self.bytes_per_block:
            return 0
        return (self.blocks(tokens) * sequences + 1) * self.bytes_per_block

    def concurrency(self, memory: int, tokens: int) -> float:
        """How many requests of ``tokens`` tokens each fit into ``memory`` bytes: vLLM's "maximum
        concurrency". Infinite for a model without a cache."""
        if not self.bytes_per_block:
            return math.inf
        return memory // self.bytes_per_block / self.blocks(tokens)

    def tokens(self, memory: int, max_model_len: int) -> int:
        """How many tokens fit into ``memory`` bytes in requests of ``max_model_len`` tokens: vLLM's
        "KV cache size". 0 for a model without a cache."""
        if not self.bytes_per_block:
            return 0
        return int(self.concurrency(memory, max_model_len) * max_model_len)

    def longest(self, memory: int, limit: int) -> int:
        """The longest request that fits into ``memory`` bytes, up to ``limit`` tokens; 0 if none
        does. ``limit`` for a model without a cache."""
        return bisect.bisect_right(range(1, limit + 1), memory, key=self.bytes)


def of(config: Mapping[str, Any], options: Mapping[str, Any], kind: str = "cuda") -> KVCache:
    """
    Args:
        config: a model's ``config.json``
        options: engine options by vLLM's names; those that count are ``kv_cache_dtype``, ``dtype``,
            ``tensor_parallel_size``, ``pipeline_parallel_size``, ``block_size``,
            ``max_num_batched_tokens``, ``max_num_seqs``, ``max_model_len``,
            ``enable_prefix_caching``, ``mamba_cache_dtype``, ``mamba_ssm_cache_dtype`` and
            ``disable_hybrid_kv_cache_manager``
        kind: of the devices: ``"cpu"``, or another for accelerators

    Raises:
        BridgeError: ``invalid_option`` for a ``kv_cache_dtype`` that is not known
    """
    text = layers.text_config(config)
    blocks = layers.blocks(config)
    sizes = _Sizes.of(config, options, kind)
    every = dict(enumerate(layer for block in blocks for layer in block))
    pages = {
        number: sizes.pages(layer)
        for number, layer in every.items()
        if layer.kind not in ("shared", "none") and layer.is_known
    }
    groups = paging.groups(pages)
    numbers = iter(every)
    of_blocks = [[next(numbers) for _ in block] for block in blocks]
    ranks = [
        [number for index in share for number in of_blocks[index]]
        for share in paging.shares(len(blocks), settings.count(options, "pipeline_parallel_size"))
    ]
    largest = max(ranks, key=lambda rank: paging.bytes_per_block(groups, rank))
    tokens = batched_tokens(config, options)
    return KVCache(
        layers=_collected((every[number] for number in largest), sizes),
        bytes_per_token=sum(
            sizes.per_token(every[number])
            for number in largest
            if number in pages and pages[number].kind in paging.EVERY_TOKEN
        ),
        block_size=sizes.block_size,
        page_size=max((one.size for group in groups for one in group.values()), default=0),
        bytes_per_block=paging.bytes_per_block(groups, largest),
        groups=groups,
        in_flight=tokens * _batches(options, kind),
        encoder_tokens=tokens,
        is_approximate=text["model_type"] in layers.UNKNOWN
        or not all(layer.is_known for layer in every.values()),
    )


@dataclasses.dataclass(frozen=True)
class _Sizes:
    """The sizes of one model's layers under one set of options.

    Args:
        ranks: of tensor parallelism
        dtype: of keys and values
        itemsize: bytes of a number that the model computes with
        convolution: bytes of a number in the state of a convolution
        recurrent: of one in the rest of a state; None for what the model says
        is_sparse: whether attention is
        is_promoted: whether layers with a window have pages for every token nevertheless
        is_cached: whether prefixes are, for which a request keeps further states
        block_size: tokens in a block
        state_size: bytes of a page of a state
    """

    ranks: int
    dtype: str
    itemsize: int
    convolution: int
    recurrent: int | None
    is_sparse: bool
    is_promoted: bool
    is_cached: bool
    block_size: int
    state_size: int = 0

    @classmethod
    def of(cls, config: Mapping[str, Any], options: Mapping[str, Any], kind: str) -> "_Sizes":
        every = layers.layers(config)
        attention = [
            layer for layer in every if layer.kind in paging.EVERY_TOKEN and layer.is_known
        ]
        itemsize = settings.itemsize(options)
        is_latent = any(layer.kind == "mla" for layer in every)
        asked = str(options.get("mamba_ssm_cache_dtype") or "auto")
        if asked == "auto" and kind == "cpu":
            asked = "float32"  # what vLLM sets where the CPU has AVX512-BF16
        sizes = cls(
            ranks=settings.count(options, "tensor_parallel_size"),
            dtype=entries.cache_dtype(config, options),
            itemsize=itemsize,
            convolution=entries.itemsize(options.get("mamba_cache_dtype"), itemsize),
            recurrent=None if asked == "auto" else entries.itemsize(asked, itemsize),
            is_sparse=any(layer.kind == "indexer" for layer in every),
            is_promoted=_is_promoted(every, options),
            is_cached=bool(attention)
            and options.get("enable_prefix_caching") is not False
            and options.get("runner") != "pooling",
            block_size=int(options.get("block_size") or _block_size(kind, is_latent)),
        )
        state = max(map(sizes.per_sequence, every), default=0)
        if not (state and attention):
            return dataclasses.replace(sizes, state_size=state)
        per_token = sizes.per_token(attention[0])
        block_size = paging.aligned(sizes.block_size, _kernel(kind, is_latent), state, per_token)
        return dataclasses.replace(sizes, block_size=block_size, state_size=block_size * per_token)

    def per_token(self, layer: Layer) -> int:
        if layer.kind in ("mamba", "shared", "none"):
            return 0
        return entries.bytes_per_token(layer, self.ranks, self.dtype, self.itemsize, self.is_sparse)

    def per_sequence(self, layer: Layer) -> int:
        if layer.state is None:
            return 0
        recurrent = self.recurrent
        if recurrent is None:
            recurrent = entries.itemsize(layer.state.dtype, self.convolution)
        return layer.state.bytes(self.ranks, self.convolution, recurrent)

    def pages(self, layer: Layer) -> paging.Pages:
        if layer.state is not None:
            states = 2 + layer.state.blocks if self.is_cached else 1
            return paging.Pages("mamba", self.block_size, self.state_size, states=states)
        size = self.block_size * self.per_token(layer)
        if layer.window is not None and self.is_promoted:
            return paging.Pages("full", self.block_size, size)
        return paging.Pages(layer.kind, self.block_size, size, layer.window)


def max_length(config: Mapping[str, Any], options: Mapping[str, Any]) -> int:
    """``max_model_len``: as asked, else the longest context that the config tells of
    (``config/model.py``)."""
    asked = options.get("max_model_len")
    if isinstance(asked, int) and asked > 0:
        return asked
    text = layers.text_config(config)
    lengths = [found for name in _LENGTHS if (found := text.number(name)) > 0]
    if isinstance(limit := dict(text).get("model_max_length"), int) and 0 < limit <= _UNLIMITED:
        lengths.append(limit)
    if not lengths:
        return 2048
    turned = rope(text)
    type = turned.get("rope_type") or turned.get("type")
    if type in ("longrope", "su"):
        for part in (Fields(config), turned):
            if (original := part.number("original_max_position_embeddings")) > 0:
                return original
    factor = turned.get("factor") if type in _STRETCHED else None
    if isinstance(factor, int | float) and factor > 0 and "gemma3" not in text["model_type"]:
        return int(min(lengths) * factor)
    return min(lengths)


def rope(text: Fields) -> Fields:
    """What a config says of rotary embeddings, by its older and its newer name.

    Args:
        text: what ``layers.text_config`` returns
    """
    for name in ("rope_scaling", "rope_parameters"):
        if isinstance(found := text.get(name), dict):
            return Fields(found, name)
    return Fields({})


def batched_tokens(config: Mapping[str, Any], options: Mapping[str, Any]) -> int:
    """``max_num_batched_tokens``: how many tokens are computed at a time at most
    (``engine/arg_utils.py``)."""
    if asked := options.get("max_num_batched_tokens"):
        return int(asked)
    length = max_length(config, options)
    tokens = _BATCHED_TOKENS
    is_whole = layers.text_config(config).get("is_encoder_decoder") or layers.is_encoder(config)
    if is_whole:  # which is not computed in pieces
        tokens = max(tokens, length)
    return min(tokens, int(options.get("max_num_seqs") or _SEQUENCES) * length)


def sequences(config: Mapping[str, Any], options: Mapping[str, Any]) -> int:
    """``max_num_seqs``: how many requests are computed at a time at most."""
    asked = options.get("max_num_seqs")
    return int(asked) if asked else min(_SEQUENCES, batched_tokens(config, options))


def _batches(options: Mapping[str, Any], kind: str) -> int:
    """That are computed at a time: one on each pipeline rank and, but for CPUs, one that is being
    prepared (``VllmConfig.max_concurrent_batches``)."""
    is_asynchronous = kind != "cpu" and options.get("async_scheduling") is not False
    return settings.count(options, "pipeline_parallel_size") + int(is_asynchronous)


def _is_promoted(every: Iterable[Layer], options: Mapping[str, Any]) -> bool:
    """Whether layers with a window have pages for every token. With chunks they have unless a
    variable of vLLM's says otherwise (``config/vllm.py``)."""
    kinds = {layer.kind for layer in every}
    if not kinds.intersection(paging.EVERY_TOKEN):
        return False
    variable = "VLLM_ALLOW_CHUNKED_LOCAL_ATTN_WITH_HYBRID_KV_CACHE"
    if "chunked" in kinds and os.environ.get(variable, "1") != "1":
        return True
    return options.get("disable_hybrid_kv_cache_manager") is True


def _block_size(kind: str, is_latent: bool) -> int:
    """vLLM's default: of MLA's kernels on CPUs and GPUs, of others on both."""
    if kind == "cpu":
        return 16 if is_latent else 128
    return 64 if is_latent else 16


def _kernel(kind: str, is_latent: bool) -> int:
    """Of how many tokens a block of a model with states is a multiple."""
    if is_latent:
        return 128
    return 32 if kind == "cpu" else 16


def _collected(every: Iterable[Layer], sizes: _Sizes) -> tuple[Layers, ...]:
    found: dict[tuple[Kind, int | None], Layers] = {}
    for layer in every:
        key = (layer.kind, layer.window)
        known = found.get(key, Layers(layer.kind, 0, 0, 0, layer.window))
        found[key] = dataclasses.replace(
            known,
            count=known.count + 1,
            bytes_per_token=known.bytes_per_token + sizes.per_token(layer),
            bytes_per_sequence=known.bytes_per_sequence + sizes.per_sequence(layer),
        )
    return tuple(found.values())
