"""Engine options as sizes depend on them."""

from collections.abc import Mapping
from typing import Any, Final

# Bytes of a number, by vLLM's names of what models compute with.
ITEMSIZES: Final = {"float32": 4, "float": 4, "float16": 2, "half": 2, "bfloat16": 2}


def itemsize(options: Mapping[str, Any]) -> int:
    """Bytes of a number that the model computes with. vLLM computes in two-byte floats unless it is
    told to, even where weights are stored in four."""
    return ITEMSIZES.get(str(options.get("dtype")), 2)


def count(options: Mapping[str, Any], name: str) -> int:
    """How many ranks an option asks for; one where it does not say."""
    found = options.get(name)
    return found if isinstance(found, int) and found > 0 else 1
