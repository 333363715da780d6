"""AWQ: integers of 4 bits in groups, with zero points."""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from vllm_bridge.checkpoints import packed_weights
from vllm_bridge.checkpoints.checkpoint import Found
from vllm_bridge.quantization import scheme
from vllm_bridge.quantization.method import Bytes, Format, Grouped, Method
from vllm_bridge.quantization.scheme import Scheme

if TYPE_CHECKING:
    from vllm_bridge.checkpoints.checkpoint import Checkpoint

# Where AutoAWQ and llm-awq said how they quantized, before transformers had a place for it.
_CONFIG = "quant_config.json"


class AWQ(Method):
    name = "awq"
    title = "AWQ"
    needs_checkpoint = True
    rounds_activations = True
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
        bits = config.get("bits", config.get("w_bit", 4))
        group = config.get("group_size", config.get("q_group_size", 128))
        return Grouped(bits, group, 16 + bits).bytes()

    def find(self, folder: str, names: Collection[str]) -> Found | None:
        config = packed_weights.settings_beside(
            folder, names, _CONFIG, ("w_bit", "q_group_size", "zero_point")
        )
        return None if config is None else Found({"quant_method": self.name, **config})

    def check(self, checkpoint: "Checkpoint") -> None:
        packed_weights.check_integers(checkpoint, "awq")
