"""Intel's auto-round, which vLLM calls by the name of the tool that it came with. Its checkpoints
are laid out as those of GPTQ or AWQ."""

from collections.abc import Mapping
from typing import Any

from vllm_bridge.quantization.method import Bytes, Grouped, Method


class AutoRound(Method):
    name = "inc"
    needs_checkpoint = True
    other_names = ("autoround", "auto-round", "intel-auto-round")

    note = (
        "auto-round by the name of Intel's tools; its checkpoints are laid out as GPTQ's or AWQ's"
    )

    def bytes_per_weight(self, config: Mapping[str, Any]) -> Bytes:
        bits, group = config.get("bits", 4), config.get("group_size", 128)
        return Grouped(bits, group, 16 + bits).bytes()
