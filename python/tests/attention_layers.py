"""Layers of vLLM's attention on CPUs, by themselves."""

from types import SimpleNamespace
from typing import Any

import torch
from vllm import _custom_ops as ops
from vllm.v1.attention.backends import cpu_attn

SIZE, BLOCK = 64, 128


def layer(k_scale: float, v_scale: float) -> SimpleNamespace:
    """What attention reads of the layer that it is in."""
    isa = cpu_attn._get_attn_isa(torch.bfloat16, BLOCK, SIZE, "auto")
    return SimpleNamespace(isa=isa, _k_scale_float=k_scale, _v_scale_float=v_scale)


def implementation(**settings: Any) -> cpu_attn.CPUAttentionBackendImpl:
    """The attention of a layer of a decoder, with settings other than the usual ones."""
    made = cpu_attn.CPUAttentionBackendImpl.__new__(cpu_attn.CPUAttentionBackendImpl)
    made.__dict__.update(
        attn_type="decoder",
        scale=SIZE**-0.5,
        alibi_slopes=None,
        sliding_window=-1,
        logits_soft_cap=0,
        sinks=None,
        kv_cache_dtype="auto",
        kv_sharing_target_layer_name=None,
    )
    made.__dict__.update(settings)
    return made


def metadata(
    starts: list[int],
    lengths: list[int],
    heads: tuple[int, int],
    table: torch.Tensor,
    slots: torch.Tensor,
    isa: str,
    sliding_window: int = -1,
) -> cpu_attn.CPUAttentionMetadata:
    """Of a step that attends to the last tokens of sequences.

    Args:
        starts: of each sequence among the queries, and their number
        heads: of queries, and of keys and values
        table: the blocks of each sequence
        slots: where the new tokens are in the cache
    """
    query_starts, seq_lens = (
        torch.tensor(numbers, dtype=torch.int32) for numbers in (starts, lengths)
    )
    return cpu_attn.CPUAttentionMetadata(
        num_actual_tokens=starts[-1],
        max_query_len=starts[-1],
        query_start_loc=query_starts,
        max_seq_len=max(lengths),
        seq_lens=seq_lens,
        block_table=table.to(torch.int32),
        slot_mapping=slots,
        scheduler_metadata=ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(lengths),
            num_heads=heads[0],
            num_kv_heads=heads[1],
            head_dim=SIZE,
            seq_lens=seq_lens,
            dtype=torch.bfloat16,
            query_start_loc=query_starts,
            causal=True,
            sliding_window_size=sliding_window,
            isa=isa,
            enable_kv_split=False,
        ),
    )
