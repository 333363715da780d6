"""What one token takes in the KV cache of one layer, by the cache's dtype.

The layouts are those of vLLM 0.32 (``AttentionSpec.state_content_size_bytes`` in
``v1/kv_cache_interface.py``, and what backends make of it in ``customize_spec``).
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from vllm_bridge.errors import BridgeError
from vllm_bridge.quantization.kv_cache import OTHER_NAMES
from vllm_bridge.sizing.layers import Layer
from vllm_bridge.sizing.settings import ITEMSIZES

# Of all of one head's numbers, keys and values, where a head has scales of its own: two float32.
_SCALES = 8

# Latent vectors packed for sparse attention (``MLAAttention.get_kv_cache_spec``).
_PACKED_LATENT = {"fp8_ds_mla": 656, "nvfp4_ds_mla": 352}


def itemsize(dtype: object, other: int) -> int:
    """Bytes of a number of ``dtype``; ``other`` for ``"auto"`` and None."""
    return ITEMSIZES.get(str(dtype), other)


def cache_dtype(config: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    """vLLM's name of the cache's dtype: the user's, else what the checkpoint was made for, else
    ``"auto"``, which is the model's own."""
    asked = str(options.get("kv_cache_dtype") or "auto").strip().lower().replace("-", "_")
    asked = OTHER_NAMES.get(asked, asked)
    return asked if asked != "auto" else _scheme(config)


def _scheme(config: Mapping[str, Any]) -> str:
    inside = config.get("text_config")
    for part in (config, inside if isinstance(inside, dict) else {}):
        found = part.get("quantization_config") or part.get("compression_config")
        if isinstance(found, dict):
            inner = found.get("quantization")
            for one in (found, inner if isinstance(inner, dict) else {}):
                if isinstance(scheme := one.get("kv_cache_scheme"), dict):
                    return "nvfp4" if scheme.get("num_bits") == 4 else "fp8"
                if isinstance(name := one.get("kv_cache_quant_algo"), str):
                    return {"FP8": "fp8", "NVFP4": "nvfp4"}.get(name.upper(), "auto")
    return "auto"


def bytes_per_token(layer: Layer, ranks: int, dtype: str, itemsize: int, is_sparse: bool) -> int:
    """
    Args:
        ranks: of tensor parallelism. They divide the heads; where there are more ranks than heads,
            each has one of them, and every rank has the whole latent vector.
        itemsize: bytes of a number under ``"auto"``
        is_sparse: whether the model has sparse attention, for which vLLM packs an FP8 cache

    Raises:
        BridgeError: ``invalid_option`` for a dtype that is not known here
    """
    if layer.kind == "indexer":
        return layer.key_size
    heads = max(1, layer.heads // ranks)
    if layer.kind == "mla" and is_sparse and dtype.startswith("fp8"):
        return _PACKED_LATENT["fp8_ds_mla"]
    if layer.kind == "mla" and dtype in _PACKED_LATENT:
        return _PACKED_LATENT[dtype]
    return heads * _bytes_per_head(layer.key_size, layer.value_size, dtype, itemsize)


def _bytes_per_head(key: int, value: int, dtype: str, itemsize: int) -> int:
    if dtype in ("int8_per_token_head", "fp8_per_token_head"):
        return key + value + _SCALES
    if dtype == "int4_per_token_head":
        return key // 2 + value // 2 + _SCALES
    if dtype.startswith("nvfp4"):
        # Two numbers in a byte, and a byte of scale for sixteen.
        return key // 2 + key // 16 + value // 2 + value // 16
    if found := re.fullmatch(r"turboquant_(?:k(\d)v(\d)|(\d)bit)(?:_nc)?", dtype):
        of_keys, of_values = (int(bits or found[3]) for bits in found.group(1, 2))
        keys = key if of_keys == 8 else math.ceil(key * of_keys / 8) + 2
        size = keys + math.ceil(value * of_values / 8) + 4
        return size + size % 2
    if dtype == "ultraquant_4bit":
        # Two numbers in a byte, and a byte of scale for 32.
        return key // 2 + key // 32 + value // 2 + value // 32
    if dtype == "auto":
        return (key + value) * itemsize
    if dtype in ITEMSIZES:
        return (key + value) * ITEMSIZES[dtype]
    if dtype.startswith("fp8") or dtype == "int8":
        return key + value
    raise BridgeError(
        "invalid_option",
        f"What a KV cache of `{dtype}` takes is not known.",
        {"option": "kv_cache_dtype", "value": dtype},
        remedy="Name another as `kv_cache_dtype`; `fp8` takes half of what `auto` takes.",
    )
