"""FP8, with a scale per matrix, row or block. CPUs without a kernel for it dequantize the weights:
see ``patches.cpu.fp8``."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm_bridge.quantization import scheme
from vllm_bridge.quantization.method import Bytes, Format, Method, Online
from vllm_bridge.quantization.scheme import Scheme

if TYPE_CHECKING:
    from vllm_bridge.checkpoints.checkpoint import Checkpoint

_PLAIN = 2.0


class FP8(Method):
    name = "fp8"
    title = "FP8"
    other_names = ("float8",)
    formats = (Format("fp8", {"activation_scheme": "dynamic"}),)
    online = Online(bytes=1.0, words="8-bit floats with a scale per matrix")
    note = (
        "on CPUs whose vLLM has no kernel for it, weights are dequantized while they are loaded, "
        "and take 2 bytes in memory"
    )
    experts = "FP8"

    def is_named(self, name: str) -> bool:
        # `fp8_per_tensor` and the like are its other names in vLLM, by which it quantizes online.
        return name.startswith("fp8")

    def scheme(self, config: Mapping[str, Any]) -> Scheme:
        side = scheme.side(config, "weight_block_size")
        return scheme.usual(config)._replace(
            format=scheme.text(config, "fmt") or "e4m3",
            bits=8,
            group_size=side,
            strategy="block" if side else "tensor",
            symmetric=True,
            activation_bits=8,
            activations=scheme.text(config, "activation_scheme"),
            kv_cache="fp8" if config.get("kv_cache_scheme") else None,
        )

    def bytes_per_weight(self, config: Mapping[str, Any]) -> Bytes:
        return Bytes(1.0, 1.0)

    def online_bytes(self, checkpoint: "Checkpoint", options: Mapping[str, Any]) -> float:
        return _PLAIN if checkpoint.is_dequantized else 1.0
