"""torchao, whose configs are settings of vLLM's method for it."""

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from vllm_bridge.errors import BridgeError, did_you_mean, nearest
from vllm_bridge.quantization import scheme
from vllm_bridge.quantization.method import Bytes, Extra, Method, Online
from vllm_bridge.quantization.scheme import Scheme

if TYPE_CHECKING:
    from vllm_bridge.checkpoints.checkpoint import Checkpoint

# How it quantizes where nothing is named.
DEFAULT = "Int8WeightOnlyConfig"


class TorchAO(Method):
    name = "torchao"
    title = "torchao"
    bits = (4, 8)
    other_names = ("ao", "torch-ao")
    extra = Extra("torchao", {"torchao": "torchao"})
    # It quantizes once the whole model is loaded.
    online = Online(
        bytes=2.0, dtype="int8", words="8-bit weights with a scale per channel, by torchao"
    )

    note = (
        "the whole model is loaded before it is quantized, so that there must be room for it in 16 "
        "bits; `quantization_config:` takes the name of any of torchao's configs"
    )
    # vLLM does not have torchao quantize them.
    experts_note = "Its experts are left as they are."

    def scheme(self, config: Mapping[str, Any]) -> Scheme:
        said = scheme.usual(config)
        kind = config.get("quant_type")
        one = scheme.mapping(kind, "default") if isinstance(kind, dict) else {}
        # Older configs have a name such as `int4_weight_only` and its arguments beside it.
        form = scheme.text(one, "_type") or (kind if isinstance(kind, str) else None)
        settings = scheme.mapping(one, "_data") or scheme.mapping(config, "quant_type_kwargs")
        name = (form or "").lower().replace("_", "")
        # Eight bits of activations stand before the weights' in such names.
        bits = re.findall(r"(?:int|float|fp|uint)(\d+)", name)
        activations = bits and ("dynamicactivation" in name or "staticactivation" in name)
        group = scheme.integer(settings, "group_size")
        return said._replace(
            format=form,
            bits=int(bits[-1]) if bits else None,
            group_size=group,
            strategy="group" if group else "channel" if bits else None,
            activation_bits=int(bits[0]) if activations else None,
            activations=None if not activations else "static" if "static" in name else "dynamic",
            producer=said.producer or "torchao",
        )

    def bytes_per_weight(self, config: Mapping[str, Any]) -> Bytes | None:
        return Bytes(1.0, 1.0) if "int8" in str(config).lower() else None

    def online_memory(self, checkpoint: "Checkpoint", options: Mapping[str, Any]) -> float:
        return 1.0

    def take_settings(self, checkpoint: "Checkpoint", options: dict[str, Any]) -> str | None:
        """They are the option ``quantization_config``: the name of one of torchao's configs, or a
        map with the name as ``type`` and its arguments. Imports torchao."""
        overrides = options.get("hf_overrides") or {}
        if not isinstance(overrides, dict) or any(
            name.startswith("quantization_config") for name in overrides
        ):
            return None
        name, said = settings(options.pop("quantization_config", None))
        options["hf_overrides"] = overrides | {"quantization_config_dict_json": json.dumps(said)}
        return name


def settings(given: Any, option: str = "quantization_config") -> tuple[str, Any]:
    """What was given as one of torchao's configs. Imports torchao.

    Args:
        given: the name of one, or a map with the name as ``type`` and its arguments
        option: what it was given as

    Returns:
        the name of the config, and the config as torchao writes it

    Raises:
        BridgeError: ``invalid_option``
    """
    import torchao.quantization
    from torchao.core.config import AOBaseConfig, config_to_dict

    known = {
        name: value
        for name, value in vars(torchao.quantization).items()
        if isinstance(value, type) and issubclass(value, AOBaseConfig)
    }
    arguments = dict(given) if isinstance(given, dict) else {"type": given or DEFAULT}
    name = arguments.pop("type", DEFAULT)
    if name not in known:
        suggestion = nearest(str(name), {key.lower(): key for key in known})
        suggestion = suggestion and next(key for key in known if key.lower() == suggestion)
        raise BridgeError(
            "invalid_option",
            f"torchao has no config `{name}`.",
            {"option": option, "nearest": suggestion, "allowed": sorted(known)},
            remedy=did_you_mean(suggestion) + f"It has: {', '.join(sorted(known))}.",
        )
    try:
        return name, config_to_dict(known[name](**arguments))
    except Exception as error:  # each config checks its arguments in its own way
        raise BridgeError(
            "invalid_option",
            f"torchao's `{name}` does not take these settings: {error}.",
            {"option": option, "value": given},
            remedy=f"Change them, or leave `{option}` out.",
        ) from error
