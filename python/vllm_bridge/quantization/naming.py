"""What a user's ``quantization`` means: which of the installed vLLM's methods, and whether the
checkpoint is quantized with it. Imports vLLM, whose registry is what is asked.
"""

from collections.abc import Mapping
from typing import Any

from vllm_bridge.checkpoints.checkpoint import Checkpoint
from vllm_bridge.errors import BridgeError, nearest
from vllm_bridge.quantization import availability, registry

_OVERRIDES = ("quantization_config", "quantization_config_file", "quantization_config_dict_json")


def check(checkpoint: Checkpoint, arguments: dict[str, Any]) -> None:
    """Brings ``arguments["quantization"]`` into vLLM's spelling, and refuses what the installed
    vLLM does not have and what the checkpoint is not.

    A name that means the checkpoint's own method is dropped: where vLLM has several kernels
    for a format it chooses the fastest only if none is named.

    Raises:
        BridgeError: ``unsupported_quantization``
    """
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    own = checkpoint.quant_method
    own_method = own and resolve(own)
    if own_method is not None:
        availability.check_packages(own_method)
    elif own is not None:
        raise BridgeError(
            "unsupported_quantization",
            f"The checkpoint is quantized with {own}, which the installed vLLM does not have. "
            f"{availability.advice()}",
            {"quantization": own, "allowed": methods()},
        )
    if loads := registry.of_load_format(arguments.get("load_format")):
        availability.check_packages(loads.name)
    asked = arguments.get("quantization")
    if asked is None:
        return
    method = resolve(asked)
    if method is None:
        raise _unknown(asked)
    availability.check_packages(method)
    arguments["quantization"] = method
    if own_method is None:
        _check_plain(checkpoint, method, arguments.get("hf_overrides"))
    elif _same(method, own_method):
        del arguments["quantization"]
    elif not _takes(method, checkpoint.quantization or {}):
        raise _mismatch(asked, checkpoint, own_method)


def resolve(name: str) -> str | None:
    """vLLM's name of a method; also of one whose package is an extra that is not installed."""
    spelling = _spelling(name)
    known = {_spelling(method): method for method in [*registry.extras(), *methods()]}
    return known.get(spelling) or known.get(_spelling(registry.other_names().get(spelling, "")))


def methods() -> list[str]:
    """The methods of the installed vLLM and its plugins."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    return list(QUANTIZATION_METHODS)


def _same(method: str, own: str) -> bool:
    from vllm.model_executor.layers.quantization import get_quantization_config

    return method == own or get_quantization_config(method) is get_quantization_config(own)


def _takes(method: str, config: Mapping[str, Any]) -> bool:
    """Whether vLLM has the method load a checkpoint that another one made."""
    from vllm.model_executor.layers.quantization import get_quantization_config

    own = dict(config)
    taken = get_quantization_config(method).override_quantization_method(own, method)
    return taken is not None and _spelling(taken) == _spelling(method)


def _check_plain(checkpoint: Checkpoint, method: str, overrides: Any) -> None:
    if checkpoint.folder is None or not checkpoint.config:
        return
    # By these, vLLM takes a config of quantization from the user.
    if isinstance(overrides, dict) and any(name in overrides for name in _OVERRIDES):
        return
    if not availability.needs_checkpoint(method, checkpoint.folder):
        return
    raise BridgeError(
        "unsupported_quantization",
        f"`quantization: {_quoted(method)}` needs a checkpoint that was quantized with it, and "
        "this one is not quantized. Use a quantized variant of the model, or leave the option "
        f"out. {availability.advice_online()}".rstrip(),
        {"option": "quantization", "checkpoint": None},
    )


def _mismatch(asked: str, checkpoint: Checkpoint, own: str) -> BridgeError:
    return BridgeError(
        "unsupported_quantization",
        f"`quantization: {_quoted(asked)}` is not what the checkpoint is: it is quantized with "
        f"{checkpoint.description}. Write `quantization: {_quoted(own)}`, or "
        "leave the option out.",
        {"option": "quantization", "checkpoint": own},
    )


def _unknown(asked: str) -> BridgeError:
    others = registry.other_names()
    suggestion = nearest(_spelling(asked), [*methods(), *registry.extras(), *others])
    suggestion = suggestion and others.get(suggestion, suggestion)
    return BridgeError(
        "unsupported_quantization",
        f"The installed vLLM has no quantization method `{asked}`."
        + (f" Did you mean `{suggestion}`?" if suggestion else "")
        + f" {availability.advice()} It has: {', '.join(methods())}.",
        {"option": "quantization", "nearest": suggestion, "allowed": methods()},
    )


def _quoted(name: str) -> str:
    return f'"{name}"'


def _spelling(name: str) -> str:
    return name.strip().lower().replace("_", "-")
