"""Intel's auto-round, which vLLM calls by the name of the tool that it came with. Its checkpoints
are laid out as those of GPTQ or AWQ."""

from collections.abc import Mapping
from typing import Any

from vllm_bridge.quantization import scheme
from vllm_bridge.quantization.method import Bytes, Method
from vllm_bridge.quantization.methods import gptq
from vllm_bridge.quantization.scheme import Scheme


class AutoRound(Method):
    name = "inc"
    title = "AutoRound"
    bits = (2, 3, 4, 8)
    needs_checkpoint = True
    rounds_activations = True
    # vLLM has none of its methods for it.
    copies_head = False
    other_names = ("autoround", "auto-round", "intel-auto-round")

    note = (
        "auto-round by the name of Intel's tools; its checkpoints are laid out as GPTQ's or AWQ's"
    )

    def scheme(self, config: Mapping[str, Any]) -> Scheme:
        said = scheme.usual(config)
        layers = scheme.mapping(config, "extra_config")
        left = tuple(
            name
            for name, one in layers.items()
            if isinstance(one, dict) and (scheme.number(one, "bits") or 0) >= 16
        )
        activations = scheme.integer(config, "act_bits")
        return said._replace(
            format=scheme.text(config, "packing_format", "backend"),
            ignored=said.ignored + left,
            activation_bits=activations if (activations or 16) < 16 else None,
            producer=said.producer or "AutoRound",
        )

    def bytes_per_weight(self, config: Mapping[str, Any]) -> Bytes:
        return gptq.packed(config)
