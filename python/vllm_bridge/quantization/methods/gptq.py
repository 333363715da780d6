"""GPTQ: integers in groups."""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from vllm_bridge.checkpoints import packed_weights
from vllm_bridge.checkpoints.checkpoint import Found
from vllm_bridge.quantization import scheme
from vllm_bridge.quantization.method import Bytes, Format, Grouped, Method
from vllm_bridge.quantization.scheme import Scheme

if TYPE_CHECKING:
    from vllm_bridge.checkpoints.checkpoint import Checkpoint

# Where AutoGPTQ said how it quantized, before transformers had a place for it.
_CONFIG = "quantize_config.json"


def packed(config: Mapping[str, Any]) -> Bytes:
    """What a weight takes in this layout, which is also auto-round's."""
    bits, group = config.get("bits", 4), config.get("group_size", 128)
    # Zero points are in the file also where all are the same. Those that differ stay packed for
    # vLLM's kernels, which are for four and eight bits, and are floats for others.
    zero_point = 0 if config.get("sym", True) else bits if bits in (4, 8) else 16
    return Bytes(
        Grouped(bits, group, 16 + bits).bytes().disk,
        Grouped(bits, group, 16 + zero_point).bytes().memory,
    )


class GPTQ(Method):
    name = "gptq"
    title = "GPTQ"
    needs_checkpoint = True
    rounds_activations = True
    other_names = ("autogptq", "gptqmodel", "gptq-model")
    formats = (
        *(
            Format(
                f"gptq ({bits} bits)",
                {"bits": bits, "group_size": 128, "sym": True, "desc_act": False},
            )
            for bits in (2, 3, 4, 8)
        ),
    )
    experts = "GPTQ"

    def is_named(self, name: str) -> bool:
        # vLLM has several names for it, one for each of the kernels that it once had.
        return name.replace("_", "-") in ("gptq", "auto-gptq", "gptq-marlin")

    def scheme(self, config: Mapping[str, Any]) -> Scheme:
        said = scheme.usual(config)
        # Rules by layer: those with `-:` are of layers that are left as they are.
        rules = scheme.mapping(config, "dynamic")
        left = tuple(rule.removeprefix("-:") for rule in rules if rule.startswith("-:"))
        form = scheme.text(config, "checkpoint_format", "format") or "gptq"
        if scheme.boolean(config, "is_marlin_format"):
            form = "marlin"
        made_by = None
        if {"model_file_base_name", "damp_percent"} <= config.keys():
            made_by = "AutoGPTQ"
        elif "use_cuda_fp16" in config or "exllama_config" in config:
            made_by = "transformers"
        return said._replace(
            format=form, ignored=said.ignored + left, producer=said.producer or made_by
        )

    def bytes_per_weight(self, config: Mapping[str, Any]) -> Bytes:
        return packed(config)

    def find(self, folder: str, names: Collection[str]) -> Found | None:
        config = packed_weights.settings_beside(
            folder, names, _CONFIG, ("bits", "group_size", "desc_act", "sym")
        )
        if config is None or config.get("quant_method", self.name) != self.name:
            return None
        return Found({"quant_method": self.name, **config})

    def check(self, checkpoint: "Checkpoint") -> None:
        packed_weights.check_integers(checkpoint, "gptq")

    def check_layer(self, config: Any, layer: Any) -> None:
        from vllm_bridge.quantization.gptq import ranks

        ranks.check(config, layer)

    def install(self) -> None:
        from vllm_bridge.quantization.gptq import layers

        layers.register()
