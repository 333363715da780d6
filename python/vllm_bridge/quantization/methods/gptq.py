"""GPTQ: integers in groups."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm_bridge.checkpoints import packed_weights
from vllm_bridge.quantization.method import Bytes, Format, Grouped, Method

if TYPE_CHECKING:
    from vllm_bridge.checkpoints.checkpoint import Checkpoint


class GPTQ(Method):
    name = "gptq"
    needs_checkpoint = True
    other_names = ("autogptq", "gptqmodel", "gptq-model")
    formats = (
        Format(
            "gptq (4 bits, symmetric)",
            {"bits": 4, "group_size": 128, "sym": True, "desc_act": False},
        ),
        Format("gptq (8 bits)", {"bits": 8, "group_size": 128, "sym": True, "desc_act": False}),
    )
    experts = "GPTQ"

    def bytes_per_weight(self, config: Mapping[str, Any]) -> Bytes:
        # Zero points are there also where all are the same.
        bits, group = config.get("bits", 4), config.get("group_size", 128)
        return Grouped(bits, group, 16 + bits).bytes()

    def check(self, checkpoint: "Checkpoint") -> None:
        packed_weights.check_integers(checkpoint, "gptq")
