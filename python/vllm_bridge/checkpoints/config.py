"""A model's ``config.json``."""

import os
from collections.abc import Mapping
from typing import Any

from vllm_bridge import json_files
from vllm_bridge.errors import BridgeError

# Those that make a folder a model, the usual one first. Mistral's own format has the other.
CONFIGS = ("config.json", "params.json")

_REMEDY = "Correct it, or download it again."


def read_config(folder: str) -> Mapping[str, Any]:
    path = os.path.join(folder, "config.json")
    config = json_files.read_or_refuse(path, "not_a_model", {"model": folder}, _REMEDY)
    quantization = config.get("quantization_config")
    if quantization is not None and (
        not isinstance(quantization, dict)
        or not isinstance(quantization.get("quant_method", ""), str)
    ):
        raise BridgeError(
            "invalid_checkpoint",
            f"The `quantization_config` in `{path}` does not name a method: it should be an "
            "object with `quant_method`, a string.",
            {"model": folder},
            remedy=_REMEDY,
        )
    return config
