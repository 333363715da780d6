"""Models of MLX, Apple's framework, which are named here to be refused with what they are."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm_bridge.quantization import scheme
from vllm_bridge.quantization.method import Method
from vllm_bridge.quantization.scheme import Scheme

if TYPE_CHECKING:
    from vllm_bridge.checkpoints.checkpoint import Checkpoint


class MLX(Method):
    name = "mlx"
    title = "MLX"
    made_for = "MLX"
    note = "the format of Apple's MLX, which vLLM does not load"

    def scheme(self, config: Mapping[str, Any]) -> Scheme:
        # Layers that differ have an entry of their own, or `false` where they are as they were.
        left = tuple(name for name, one in config.items() if one is False)
        mode = scheme.text(config, "mode") or "affine"
        return scheme.usual(config)._replace(
            format=mode,
            symmetric=mode != "affine",
            ignored=left,
            producer="mlx-lm",
        )

    def check(self, checkpoint: "Checkpoint") -> None:
        raise self.foreign()
