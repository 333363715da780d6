"""What peft says of an adapter, which is no model of its own."""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from vllm_bridge import json_files
from vllm_bridge.quantization import scheme

CONFIG = "adapter_config.json"

# Where its weights may be, by vLLM's order. What is in others than the first is not looked at.
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "adapter_model.pt")


class Adapter(NamedTuple):
    """An adapter, by peft's names of what it has.

    Args:
        type: in lower case: ``lora``, ``ia3``, ``prefix_tuning``, …
        base_model: a folder or a name on the hub, as it stands in the config
        rank: of the matrices; the largest where they differ
        alpha: by which they are scaled, over the rank
        target_modules: names, or parts of names, of the layers that it changes
        dora: whether magnitudes are learned as well
        rslora: whether ``alpha`` is over the root of the rank
        modules_to_save: layers that it replaces as a whole
    """

    type: str
    base_model: str | None = None
    rank: int | None = None
    alpha: float | None = None
    target_modules: tuple[str, ...] = ()
    dora: bool = False
    rslora: bool = False
    modules_to_save: tuple[str, ...] = ()


def read(folder: str) -> Adapter:
    """The adapter in a folder.

    Raises:
        BridgeError: ``invalid_checkpoint`` for a config that cannot be read
    """
    path = os.path.join(folder, CONFIG)
    details, remedy = {"model": folder}, "Download the adapter again."
    return of(json_files.read_or_refuse(path, "invalid_checkpoint", details, remedy))


def of(config: Mapping[str, Any]) -> Adapter:
    """What an ``adapter_config.json`` says."""
    base, kind = config.get("base_model_name_or_path"), config.get("peft_type")
    own = scheme.mapping(config, "rank_pattern")
    ranks = [scheme.integer(config, "r"), *(scheme.integer(own, name) for name in own)]
    return Adapter(
        type=kind.lower() if isinstance(kind, str) else "unknown",
        base_model=base if isinstance(base, str) and base else None,
        rank=max((rank for rank in ranks if rank is not None), default=None),
        alpha=scheme.number(config, "lora_alpha"),
        target_modules=_names(config.get("target_modules")),
        dora=config.get("use_dora") is True,
        rslora=config.get("use_rslora") is True,
        modules_to_save=_names(config.get("modules_to_save")),
    )


def _names(value: Any) -> tuple[str, ...]:
    """Of a list, or of a pattern that stands for one."""
    if isinstance(value, str):
        return (value,)
    return tuple(sorted(n for n in value if isinstance(n, str))) if isinstance(value, list) else ()
