"""EXL2, ExLlamaV2's own format, which is named here to be refused with what it is."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm_bridge.quantization import scheme
from vllm_bridge.quantization.method import Method
from vllm_bridge.quantization.scheme import Scheme

if TYPE_CHECKING:
    from vllm_bridge.checkpoints.checkpoint import Checkpoint


class EXL2(Method):
    name = "exl2"
    title = "EXL2"
    made_for = "ExLlamaV2"
    note = "ExLlamaV2's own format, which vLLM does not load"

    def scheme(self, config: Mapping[str, Any]) -> Scheme:
        said = scheme.usual(config)
        return said._replace(
            format="exl2",
            producer=scheme.made_by("ExLlamaV2", config.get("version")),
        )

    def check(self, checkpoint: "Checkpoint") -> None:
        raise self.foreign()
