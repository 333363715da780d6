"""MXFP4: floats of 4 bits in blocks of 32 with a power of two each."""

from collections.abc import Mapping
from typing import Any

from vllm_bridge.quantization.method import Bytes, Format, Grouped, Method


class MXFP4(Method):
    name = "mxfp4"
    formats = (Format("mxfp4", {}),)

    def bytes_per_weight(self, config: Mapping[str, Any]) -> Bytes:
        return Grouped(4, 32, 8).bytes()
