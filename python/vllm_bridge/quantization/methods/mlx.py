"""Models of MLX, Apple's framework, which are known here so that they are refused by its name."""

from collections.abc import Mapping
from typing import Any

from vllm_bridge.quantization import scheme
from vllm_bridge.quantization.method import Method
from vllm_bridge.quantization.scheme import Scheme


class MLX(Method):
    name = "mlx"
    title = "MLX"
    made_for = "MLX"
    note = "the format of Apple's MLX, which vLLM does not load"

    def scheme(self, config: Mapping[str, Any]) -> Scheme:
        # Layers that differ have an entry of their own, or `false` where they are as they were.
        left = tuple(name for name, one in config.items() if one is False)
        mode = scheme.text(config, "mode") or "affine"
        return scheme.usual(config)._replace(
            format=mode,
            symmetric=mode != "affine",
            ignored=left,
            producer="mlx-lm",
        )
