"""FP8 of Meta's FBGEMM, with a scale per row: Llama 3.1 405B was published in it."""

from collections.abc import Mapping
from typing import Any

from vllm_bridge.quantization import scheme
from vllm_bridge.quantization.method import Bytes, Method
from vllm_bridge.quantization.scheme import Scheme


class FBGEMM(Method):
    name = "fbgemm_fp8"
    title = "FBGEMM FP8"
    bits = (8,)
    needs_checkpoint = True

    def scheme(self, config: Mapping[str, Any]) -> Scheme:
        return scheme.usual(config)._replace(
            format="e4m3",
            bits=8,
            group_size=-1,
            strategy="channel",
            symmetric=True,
            activation_bits=8,
            activations="dynamic",
        )

    def bytes_per_weight(self, config: Mapping[str, Any]) -> Bytes:
        return Bytes(1.0, 1.0)
