"""AWQ: integers of 4 bits in groups, with zero points."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm_bridge.checkpoints import packed_weights
from vllm_bridge.quantization.method import Bytes, Format, Grouped, Method

if TYPE_CHECKING:
    from vllm_bridge.checkpoints.checkpoint import Checkpoint


class AWQ(Method):
    name = "awq"
    needs_checkpoint = True
    other_names = ("autoawq", "llm-awq")
    formats = (Format("awq (4 bits)", {"bits": 4, "group_size": 128, "zero_point": True}),)
    experts = "AWQ"

    def bytes_per_weight(self, config: Mapping[str, Any]) -> Bytes:
        bits, group = config.get("bits", 4), config.get("group_size", 128)
        return Grouped(bits, group, 16 + bits).bytes()

    def check(self, checkpoint: "Checkpoint") -> None:
        packed_weights.check_integers(checkpoint, "awq")
