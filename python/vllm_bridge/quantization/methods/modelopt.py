"""FP8, of NVIDIA's ModelOpt, which says what it did in a file of its own or in ``config.json``."""

import os
from collections.abc import Collection, Mapping
from typing import Any

from vllm_bridge import json_files
from vllm_bridge.checkpoints.checkpoint import Found
from vllm_bridge.quantization import scheme
from vllm_bridge.quantization.method import Bytes, Method
from vllm_bridge.quantization.scheme import Scheme

_CONFIG = "hf_quant_config.json"


class ModelOpt(Method):
    name = "modelopt"
    title = "ModelOpt"
    bits = (8,)
    needs_checkpoint = True
    other_names = ("modelopt-fp8", "nvidia-modelopt")
    note = "NVIDIA's; FP8 checkpoints"

    def find(self, folder: str, names: Collection[str]) -> Found | None:
        if _CONFIG not in names:
            return None
        try:
            config = json_files.read(os.path.join(folder, _CONFIG))
        except (OSError, ValueError):
            return None
        if not scheme.mapping(config, "quantization"):
            return None
        return Found(config)

    def scheme(self, config: Mapping[str, Any]) -> Scheme:
        return read(config)

    def bytes_per_weight(self, config: Mapping[str, Any]) -> Bytes:
        return Bytes(1.0, 1.0)


def read(config: Mapping[str, Any]) -> Scheme:
    """What ModelOpt says, in the form of its own file or in that of compressed-tensors."""
    own = scheme.mapping(config, "quantization") or config
    said = scheme.usual(own)
    algorithm = (scheme.text(own, "quant_algo") or "").upper()
    # `FP8`, `NVFP4`, `FP8_PB_WO`, `W4A8_AWQ`, …
    bits = scheme.digits(algorithm)
    cache = scheme.text(own, "kv_cache_quant_algo")
    group = said.group_size or (16 if algorithm == "NVFP4" else None)
    weights_only = algorithm.startswith(("W4A16", "FP8_PB_WO"))
    return said._replace(
        format=algorithm or None,
        bits=bits,
        group_size=group,
        strategy="group" if group else "tensor" if algorithm == "FP8" else None,
        symmetric=True,
        activation_bits=None if weights_only else 8 if algorithm.startswith("W4A8") else bits,
        kv_cache=cache.lower() if cache else scheme.cache(scheme.mapping(own, "kv_cache_scheme")),
        producer=scheme.producer(config) or "ModelOpt",
    )
