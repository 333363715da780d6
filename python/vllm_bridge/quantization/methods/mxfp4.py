"""MXFP4: floats of 4 bits in blocks of 32 with a power of two each."""

from collections.abc import Mapping
from typing import Any

from vllm_bridge.quantization import scheme
from vllm_bridge.quantization.method import Bytes, Format, Grouped, Method
from vllm_bridge.quantization.scheme import Scheme


class MXFP4(Method):
    name = "mxfp4"
    title = "MXFP4"
    formats = (Format("mxfp4", {}),)
    # Marlin's and TensorRT-LLM's (`mxfp4_round_up_hidden_size_and_intermediate_size`).
    expert_multiples = (256, 128)

    def scheme(self, config: Mapping[str, Any]) -> Scheme:
        return scheme.usual(config)._replace(
            format="mxfp4", bits=4, group_size=32, strategy="group", symmetric=True
        )

    def bytes_per_weight(self, config: Mapping[str, Any]) -> Bytes:
        return Grouped(4, 32, 8).bytes()
