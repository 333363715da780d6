"""How a model is quantized, from its config and the headers of its files. Imports neither torch nor
vLLM, and reads no weights.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vllm_bridge.checkpoints.checkpoint import Checkpoint
from vllm_bridge.checkpoints.models import check_model
from vllm_bridge.quantization import registry


@dataclasses.dataclass(frozen=True)
class Detected:
    """How a model is quantized.

    Args:
        method: vLLM's name of the method; None for a plain model
        quant_method: what the checkpoint itself calls it
    """

    method: str | None = None
    quant_method: str | None = None

    def to_wire(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def detect(model: str, options: Mapping[str, Any]) -> Detected:
    """Looks at a model.

    Args:
        options: of the engine that it would be loaded with, as the user gave them

    Raises:
        BridgeError: see ``check_model``
    """
    return of(check_model(model, options))


def of(checkpoint: Checkpoint) -> Detected:
    """How a checkpoint is quantized."""
    named = checkpoint.quant_method
    return Detected(method=named and (registry.meant_by(named).name or named), quant_method=named)
