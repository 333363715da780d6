"""How engine options are written in Elixir, for what users are told to give."""

import json
from collections.abc import Mapping
from typing import Any


def options(given: Mapping[str, Any]) -> str:
    """Such as ``quantization: "hqq", quantization_config: %{nbits: 8}``."""
    return ", ".join(f"{name}: {_value(value)}" for name, value in given.items())


def _value(value: Any) -> str:
    return f"%{{{options(value)}}}" if isinstance(value, Mapping) else json.dumps(value)
