"""NVFP4, of NVIDIA's ModelOpt: floats of 4 bits in blocks of 16 with an FP8 scale each."""

from collections.abc import Mapping
from typing import Any

from vllm_bridge.quantization.method import Bytes, Grouped, Method


class NVFP4(Method):
    name = "modelopt_fp4"
    other_names = ("nvfp4",)

    def bytes_per_weight(self, config: Mapping[str, Any]) -> Bytes:
        return Grouped(4, 16, 8).bytes()
