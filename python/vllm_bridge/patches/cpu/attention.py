"""Attention on CPUs writes to the KV cache itself, and keeps its views of it.

vLLM makes views of the cache anew in every layer of every step, once to write to it and once to
read it, each in an operation of its own that looks another up by its name: that takes longer than
all else that the attention of one decoded token takes. Here a layer makes them once for the cache
that it has, and its attention writes first, as that of vLLM's other backends may
(``forward_includes_kv_cache_update``). The operations are vLLM's, with the same arguments. What is
rare stays vLLM's: encoders, quantized caches, sinks, outputs that are scaled. So does everything
where the operations take other arguments than these.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from vllm_bridge.patches import replace

SEEN = ("0.31.", "0.32.")
TOUCHES = {
    "vllm.v1.attention.backends.cpu_attn": (
        "CPUAttentionBackend.forward_includes_kv_cache_update",
        "CPUAttentionBackendImpl.forward",
    ),
}

# Of a cache: blocks, heads, tokens of a block, and numbers of a key and of a value.
DIMENSIONS = 4

# What the operations take, in this order.
WRITE = (
    *("key", "value", "key_cache", "value_cache", "slot_mapping", "isa"),
    *("k_scale", "v_scale", "kv_cache_dtype"),
)
ATTEND = (
    *("query", "key_cache", "value_cache", "output", "query_start_loc", "seq_lens", "scale"),
    *("causal", "alibi_slopes", "sliding_window_size", "block_table", "softcap"),
    *("scheduler_metadata", "s_aux", "dynamic_causal", "k_scale", "v_scale", "kv_cache_dtype"),
)

# Where a layer's attention keeps the cache and the views of it.
KEPT = "vllm_bridge_views"


def apply() -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

    if is_known():
        CPUAttentionBackend.forward_includes_kv_cache_update = True
        replace(CPUAttentionBackendImpl, "forward", attending)


def is_known() -> bool:
    """Whether vLLM's operations take what they are given here."""
    operations = torch.ops._C
    return all(
        hasattr(operations, name)
        and tuple(argument.name for argument in getattr(operations, name).default._schema.arguments)
        == arguments
        for name, arguments in (
            ("cpu_attn_reshape_and_cache", WRITE),
            ("cpu_attention_with_kv_cache", ATTEND),
        )
    )


def attending(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    write = torch.ops._C.cpu_attn_reshape_and_cache.default
    attend = torch.ops._C.cpu_attention_with_kv_cache.default

    @functools.wraps(original)
    def forward(
        self: Any,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        has_new = (
            attn_metadata is not None
            and key is not None
            and value is not None
            and self.kv_sharing_target_layer_name is None
        )
        views = _views(self, kv_cache)
        is_scaled = output_scale is not None or output_block_scale is not None
        if views is None or attn_metadata is None or is_scaled:
            if has_new:
                slots = attn_metadata.slot_mapping
                self.do_kv_cache_update(layer, key, value, kv_cache, slots)
            return original(
                *(self, layer, query, key, value, kv_cache, attn_metadata, output),
                output_scale=output_scale,
                output_block_scale=output_block_scale,
            )
        count = attn_metadata.num_actual_tokens
        scales = (layer._k_scale_float, layer._v_scale_float)
        is_padded = count != query.shape[0]
        if has_new:
            write(
                key[:count] if is_padded else key,
                value[:count] if is_padded else value,
                *views,
                attn_metadata.slot_mapping,
                layer.isa,
                *scales,
                self.kv_cache_dtype,
            )
        attend(
            query[:count] if is_padded else query,
            *views,
            output[:count] if is_padded else output,
            attn_metadata.query_start_loc,
            attn_metadata.seq_lens,
            self.scale,
            attn_metadata.causal,
            self.alibi_slopes,
            self.sliding_window,
            attn_metadata.block_table,
            self.logits_soft_cap,
            attn_metadata.scheduler_metadata,
            None,
            attn_metadata.dynamic_causal,
            *scales,
            self.kv_cache_dtype,
        )
        return output

    return forward


def _views(attention: Any, cache: torch.Tensor) -> list[torch.Tensor] | None:
    """The keys and the values of a layer's cache; None where its attention is left to vLLM."""
    kept = attention.__dict__.get(KEPT)
    if kept is None or kept[0] is not cache:
        kept = (cache, _made_views(attention, cache))
        setattr(attention, KEPT, kept)
    views: list[torch.Tensor] | None = kept[1]
    return views


def _made_views(attention: Any, cache: torch.Tensor) -> list[torch.Tensor] | None:
    if (
        attention.attn_type != "decoder"
        or attention.kv_cache_dtype != "auto"
        or attention.sinks is not None
        or cache.dim() != DIMENSIONS
    ):
        return None
    blocks, heads, size, _ = cache.shape
    return list(cache.view(blocks, heads, 2 * size, -1).chunk(2, dim=2))
