"""How products with packed weights are computed on CPUs: with activations rounded to 8 bits where
that is faster, or with all that they have. Users say it as ``quantization_config: %{activations:
"int8"}``."""

from collections.abc import Mapping
from typing import Any, Final

from vllm_bridge.errors import BridgeError

VALUES: Final = ("int8", "exact")

# Where vLLM's processes find it, in what vLLM's config has for others.
_KEY: Final = "packed_activations"


def take(arguments: dict[str, Any]) -> str | None:
    """Takes it out of the engine's arguments; None where it is not given.

    Raises:
        BridgeError: ``invalid_option`` for anything but one of ``VALUES``
    """
    given = arguments.get("quantization_config")
    if not isinstance(given, dict) or "activations" not in given:
        return None
    rest = {key: value for key, value in given.items() if key != "activations"}
    arguments["quantization_config"] = rest or None
    value = given["activations"]
    if value not in VALUES:
        raise refused(f"`activations` in `quantization_config` cannot be {value!r}.", given)
    return str(value)


def refused(message: str, given: Any) -> BridgeError:
    return BridgeError(
        "invalid_option",
        message,
        {
            "option": "quantization_config",
            "value": given,
            "allowed": [{"activations": value} for value in VALUES],
        },
        remedy=f"Give `activations` as one of {', '.join(map(repr, VALUES))}.",
    )


def pass_on(arguments: dict[str, Any]) -> None:
    """Tells the kernels of vLLM's processes what is given. Imports vLLM.

    Raises:
        BridgeError: ``invalid_option``, also where they are to be rounded on a GPU
    """
    from vllm.platforms import current_platform

    value = take(arguments)
    if value is None:
        return
    if value == VALUES[0] and not current_platform.is_cpu():
        raise BridgeError(
            "invalid_option",
            "Activations can be rounded to 8 bits on CPUs only: on GPUs vLLM's kernels compute "
            "these weights, with all that activations have.",
            {"option": "quantization_config", "value": {"activations": value}},
            remedy="Leave `activations` out.",
        )
    more = arguments.get("additional_config") or {}
    arguments["additional_config"] = {**more, _KEY: value}


def are_rounded(config: Any) -> bool:
    """Whether they are to be rounded where that is faster.

    Args:
        config: vLLM's of the engine
    """
    more = config.additional_config
    return isinstance(more, Mapping) and more.get(_KEY) == VALUES[0]
