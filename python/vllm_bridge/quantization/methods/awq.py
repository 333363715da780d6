"""AWQ: integers of 4 bits in groups, with zero points."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm_bridge.checkpoints import packed_weights
from vllm_bridge.quantization import scheme
from vllm_bridge.quantization.method import Bytes, Format, Grouped, Method
from vllm_bridge.quantization.scheme import Scheme

if TYPE_CHECKING:
    from vllm_bridge.checkpoints.checkpoint import Checkpoint


class AWQ(Method):
    name = "awq"
    title = "AWQ"
    needs_checkpoint = True
    other_names = ("autoawq", "llm-awq")
    formats = (Format("awq (4 bits)", {"bits": 4, "group_size": 128, "zero_point": True}),)
    experts = "AWQ"

    def scheme(self, config: Mapping[str, Any]) -> Scheme:
        said = scheme.usual(config)
        version = scheme.text(config, "version", "format")
        # AutoAWQ does not sign what it makes.
        made_by = "AutoAWQ" if "version" in config else None
        return said._replace(
            format=version.lower() if version else None, producer=said.producer or made_by
        )

    def bytes_per_weight(self, config: Mapping[str, Any]) -> Bytes:
        bits, group = config.get("bits", 4), config.get("group_size", 128)
        return Grouped(bits, group, 16 + bits).bytes()

    def check(self, checkpoint: "Checkpoint") -> None:
        packed_weights.check_integers(checkpoint, "awq")
