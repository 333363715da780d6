"""Which quantization methods run here: those whose packages are installed and whose layers the
installed vLLM can make and compute on this device. Imports vLLM.
"""

import contextlib
import functools
import importlib.util
import os
import re
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

from vllm_bridge import diagnosis
from vllm_bridge.checkpoints.checkpoint import Checkpoint
from vllm_bridge.errors import BridgeError
from vllm_bridge.quantization import layers, registry
from vllm_bridge.quantization.method import Method

# What the layer is called that methods are looked at with.
_LAYER = "layer"

# Why a method does not run that has nothing to do with linear layers.
EXPERTS_ONLY = "it leaves linear layers as they are"


def check_packages(method: str) -> None:
    """Raises ``unsupported_quantization`` where a method needs packages that are not there."""
    extra = registry.of(method).extra
    if extra is None:
        return
    missing = [name for name in extra.modules.values() if not importlib.util.find_spec(name)]
    if missing:
        raise BridgeError(
            "unsupported_quantization",
            f"Quantization with {method} needs packages that are not installed "
            f"({', '.join(missing)}).",
            {"quantization": method, "missing": missing, "extra": extra.name},
            remedy=f"Run `mix vllm.setup --with {extra.name}`.",
        )


def formats() -> tuple[str, ...]:
    """The formats of checkpoints that run here."""
    return tuple(name for name, refused in of_formats().items() if refused is None)


def online() -> tuple[str, ...]:
    """The methods that quantize a plain model while it is loaded, and run here."""
    return tuple(name for name, refused in of_methods_online().items() if refused is None)


@functools.cache
def of_formats() -> Mapping[str, str | None]:
    """Why formats of checkpoints do not run here, by their names; None for those that do."""
    return {
        name: _format_refusal(method, config)
        for method in registry.every()
        for name, config in method.formats
    }


@functools.cache
def of_methods_online() -> Mapping[str, str | None]:
    """The same of methods that quantize a plain model while it is loaded."""
    from vllm.model_executor.layers.quantization import QUANTIZATION_METHODS

    found = {}
    for name in QUANTIZATION_METHODS:
        method = registry.of(name)
        if method.needs_checkpoint:
            continue
        try:
            check_packages(method.name)
            config = online_config(name)
            if config is not None:
                found[name] = refusal(config)
            elif method.online is not None:
                found[name] = None  # by settings of the user's
        except BridgeError as error:
            found[name] = error.message
        except Exception as error:
            found[name] = str(error)
    return found


def online_config(method: str) -> Any:
    """vLLM's config of a method that needs nothing from a checkpoint; None for the others."""
    from vllm.config.quantization import _ONLINE_SHORTHANDS
    from vllm.model_executor.layers.quantization import get_quantization_config
    from vllm.model_executor.layers.quantization.online.base import OnlineQuantizationConfig

    if shorthand := _ONLINE_SHORTHANDS.get(method):
        return OnlineQuantizationConfig(shorthand)
    try:
        return get_quantization_config(method)()
    except TypeError:  # there are settings that have no defaults
        return None


def advice() -> str:
    """What to do instead of what does not run: a sentence with what does."""
    if not formats():
        return "Use the model in its plain form."
    return f"These run here: {', '.join(formats())}; use such a variant of the model."


def advice_online() -> str:
    if not online():
        return ""
    return f"A plain model can be quantized while it is loaded with: {', '.join(online())}."


def refusal(quant_config: Any) -> str | None:
    """Why a method cannot quantize linear layers on this device; None where it can."""
    import torch
    from vllm.config import VllmConfig

    config = VllmConfig()
    # All that methods ask of the model.
    config.model_config = SimpleNamespace(dtype=torch.bfloat16)
    try:
        # What some of them compile is not worth it for one layer: it takes seconds.
        with (
            torch.compiler.set_stance("force_eager"),
            layers.linear(config, torch.bfloat16, quant_config, _LAYER) as layer,
        ):
            if not layers.is_quantized(layer):
                return EXPERTS_ONLY
            return layers.missing_operation(layer)
    except Exception as error:
        return str(error)


@contextlib.contextmanager
def refusals(checkpoint: Checkpoint, method: str | None) -> Iterator[None]:
    """Adds what to do instead to vLLM's word that it does not run a quantization.

    Args:
        method: as the user named it, if so
    """
    try:
        yield
    except BridgeError:
        raise
    except Exception as error:
        refused = diagnosis.load_error(error)
        method = method or checkpoint.quant_method
        if isinstance(error, ImportError) and method is not None:
            raise refused_for(checkpoint, method, str(error)) from error
        if refused.reason != "unsupported_quantization":
            raise
        refused.what = diagnosis.sentence(refused.what)
        refused.remedy = remedy(checkpoint, str(error))
        raise refused from error


def refused_for(checkpoint: Checkpoint, method: str, text: str) -> BridgeError:
    """The error for a method that vLLM cannot run here, in its own words."""
    return BridgeError(
        "unsupported_quantization",
        f"vLLM cannot run {method} here: {diagnosis.sentence(diagnosis.readable(text))}",
        {"quantization": method, "exception": text},
        remedy(checkpoint, text),
    )


def remedy(checkpoint: Checkpoint, text: str) -> str:
    """What to do about vLLM's refusal of a quantization, of which ``text`` is the reason."""
    if "Supported dtypes" in text:
        dtypes = re.findall(r"torch\.(\w+)", text.partition("Supported dtypes")[2])
        return f"Give `dtype` as one of {', '.join(dtypes)}, or leave it out."
    if checkpoint.quantization is None:
        return advice_online() or advice()
    return f"The checkpoint is {checkpoint.description}. {advice()}"


def needs_checkpoint(method: str, folder: str) -> bool:
    """Whether a method runs only checkpoints that were quantized with it, and the folder has no
    config of its own that says so."""
    from vllm.config.quantization import ONLINE_QUANT_SHORTHAND_NAMES
    from vllm.model_executor.layers.quantization import get_quantization_config

    if method in ONLINE_QUANT_SHORTHAND_NAMES:
        return False
    files = get_quantization_config(method).get_config_filenames()
    if any(os.path.exists(os.path.join(folder, name)) for name in files):
        return False
    return online_config(method) is None


def _format_refusal(method: Method, config: Mapping[str, Any]) -> str | None:
    from vllm.model_executor.layers.quantization import get_quantization_config

    name = method.name
    try:
        check_packages(name)
        made = get_quantization_config(name).from_config({"quant_method": name, **config})
    except BridgeError as error:
        return error.message
    except ValueError as error:
        return str(error)
    method.ready_for_look(made, config, _LAYER)
    return refusal(made)
