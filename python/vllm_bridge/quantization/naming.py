"""What a user's ``quantization`` means: which of the installed vLLM's methods, and whether the
checkpoint is quantized with it. Imports vLLM, whose registry is what is asked.
"""

import os
from collections.abc import Mapping
from typing import Any

from vllm_bridge.checkpoints.checkpoint import Checkpoint
from vllm_bridge.errors import BridgeError, did_you_mean, nearest
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
    own = checkpoint.quant_method
    own_method = own and resolve(own)
    if own_method is not None:
        availability.check_packages(own_method)
    elif own is not None:
        raise unknown_of(checkpoint, availability.advice())
    if loads := registry.of_load_format(arguments.get("load_format")):
        availability.check_packages(loads.name)
    asked = arguments.get("quantization")
    if asked is None:
        return
    method = resolve(asked)
    if method is None:
        raise unknown(asked, availability.advice())
    availability.check_packages(method)
    arguments["quantization"] = method
    if own_method is None:
        _check_plain(checkpoint, method, arguments.get("hf_overrides"))
    elif _same(method, own_method):
        del arguments["quantization"]
    elif not _takes(method, checkpoint.quantization or {}):
        raise _mismatch(asked, checkpoint, own_method)


def check_known(checkpoint: Checkpoint, options: Mapping[str, Any]) -> None:
    """What can be said of a quantization without vLLM: that its packages are not there, or that it
    is not what the checkpoint is.

    Args:
        options: engine options as the user gave them

    Raises:
        BridgeError: ``unsupported_quantization``
    """
    asked = options.get("quantization")
    for name in (checkpoint.quant_method, asked):
        if isinstance(name, str):
            availability.check_packages(registry.meant_by(name).name)
    method = registry.meant_by(asked) if isinstance(asked, str) else None
    if (
        method is not None
        and method.needs_checkpoint
        and checkpoint.quantization is None
        and _describes_itself(checkpoint, options.get("hf_overrides"))
        # Some tools have a file of their own for their settings.
        and not any("quant" in name for name in os.listdir(checkpoint.folder or ""))
    ):
        dtypes = " or ".join(f'`dtype: "{dtype}"`' for dtype in registry.online_dtypes())
        raise _not_quantized(method.name, f"A plain model is quantized while it loads by {dtypes}.")


def resolve(name: str) -> str | None:
    """vLLM's name of a method; also of one whose package is an extra that is not installed."""
    spelling = _spelling(name)
    known = {_spelling(method): method for method in [*registry.extras(), *methods()]}
    return known.get(spelling) or known.get(_spelling(registry.other_names().get(spelling, "")))


def methods() -> list[str]:
    """The methods of the installed vLLM and its plugins."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    return list(QUANTIZATION_METHODS)


def unknown_of(checkpoint: Checkpoint, advice: str) -> BridgeError:
    """The error for a checkpoint whose method the installed vLLM does not have.

    Args:
        advice: what to do instead: a sentence
    """
    own = checkpoint.quant_method
    return BridgeError(
        "unsupported_quantization",
        f"The checkpoint is quantized with {own}, which the installed vLLM does not have.",
        {"quantization": own, "allowed": methods()},
        remedy=advice,
    )


def unknown(asked: str, advice: str = "") -> BridgeError:
    """The error for a name that is none of the installed vLLM's methods.

    Args:
        advice: what to do instead, beside naming another: a sentence
    """
    others = registry.other_names()
    suggestion = nearest(_spelling(asked), [*methods(), *registry.extras(), *others])
    suggestion = suggestion and others.get(suggestion, suggestion)
    return BridgeError(
        "unsupported_quantization",
        f"The installed vLLM has no quantization method `{asked}`.",
        {"option": "quantization", "nearest": suggestion, "allowed": methods()},
        remedy=did_you_mean(suggestion) + f"{advice} It has: {', '.join(methods())}.".lstrip(),
    )


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
    if not _describes_itself(checkpoint, overrides):
        return
    if availability.needs_checkpoint(method, checkpoint.folder or ""):
        raise _not_quantized(method, availability.advice_online())


def _describes_itself(checkpoint: Checkpoint, overrides: Any) -> bool:
    """Whether a checkpoint's own config says how it is quantized, or that it is not."""
    # By these, vLLM takes a config of quantization from the user.
    is_overridden = isinstance(overrides, dict) and any(name in overrides for name in _OVERRIDES)
    return checkpoint.folder is not None and bool(checkpoint.config) and not is_overridden


def _not_quantized(method: str, advice: str) -> BridgeError:
    return BridgeError(
        "unsupported_quantization",
        f"`quantization: {_quoted(method)}` needs a checkpoint that was quantized with it, and "
        "this one is not quantized.",
        {"option": "quantization", "checkpoint": None},
        remedy=(
            f"Use a quantized variant of the model, or leave the option out. {advice}".rstrip()
        ),
    )


def _mismatch(asked: str, checkpoint: Checkpoint, own: str) -> BridgeError:
    return BridgeError(
        "unsupported_quantization",
        f"`quantization: {_quoted(asked)}` is not what the checkpoint is: it is quantized with "
        f"{checkpoint.description}.",
        {"option": "quantization", "checkpoint": own},
        remedy=f"Write `quantization: {_quoted(own)}`, or leave the option out.",
    )


def _quoted(name: str) -> str:
    return f'"{name}"'


def _spelling(name: str) -> str:
    return name.strip().lower().replace("_", "-")
