"""NVFP4, of NVIDIA's ModelOpt: floats of 4 bits in groups of 16 with an FP8 scale each."""

from collections.abc import Mapping
from typing import Any

from vllm_bridge.quantization.method import Bytes, Grouped, Method
from vllm_bridge.quantization.methods import modelopt
from vllm_bridge.quantization.scheme import Scheme


class NVFP4(Method):
    name = "modelopt_fp4"
    title = "NVFP4"
    bits = (4,)
    needs_checkpoint = True
    other_names = ("nvfp4",)

    def scheme(self, config: Mapping[str, Any]) -> Scheme:
        return modelopt.read(config)

    def bytes_per_weight(self, config: Mapping[str, Any]) -> Bytes:
        return Grouped(4, 16, 8).bytes()
