"""EXL2, ExLlamaV2's own format, which is known here so that it is refused by its name."""

from collections.abc import Mapping
from typing import Any

from vllm_bridge.quantization import scheme
from vllm_bridge.quantization.method import Method
from vllm_bridge.quantization.scheme import Scheme


class EXL2(Method):
    name = "exl2"
    title = "EXL2"
    made_for = "ExLlamaV2"
    note = "ExLlamaV2's own format, which vLLM does not load"

    def scheme(self, config: Mapping[str, Any]) -> Scheme:
        return scheme.usual(config)._replace(
            format="exl2", producer=scheme.made_by("ExLlamaV2", config.get("version"))
        )
