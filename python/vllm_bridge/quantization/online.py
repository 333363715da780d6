"""Plain models that are quantized while they are loaded: by ``dtype: "int8"`` or ``"int4"``, with
the method that is best here, or with a method that the user names and its settings.

What is best was measured on the demo model, on a CPU, against the model as it is (KL divergence;
tokens per second and the memory of linear layers relative to it; more in guides/quantization.md):

==== ============================= ======= ===== ====== =========================================
int8 torchao, weights per channel  .00004   0.77   0.51 the fastest of those with eight bits
     torchao, activations as well  .00003   0.45   0.51
     bitsandbytes, LLM.int8()      .00003   0.33   0.51 which vLLM has for checkpoints only
int4 bitsandbytes, NF4             .00039   0.56   0.28
     torchao, groups of 32                              a byte per weight where it runs on CPUs
==== ============================= ======= ===== ====== =========================================

None is as fast as 16 bits there: what they spare is memory. torchao quantizes once the whole model
is loaded, so that there must be room for it in 16 bits; bitsandbytes each weight as it is read.

vLLM's own methods with eight bits quantize the experts of mixtures only. Both choices need
nothing of the device but what vLLM asks for them, and are vLLM's documented ways on GPUs too.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from vllm_bridge.checkpoints.checkpoint import Checkpoint
from vllm_bridge.errors import BridgeError
from vllm_bridge.quantization import availability, naming, registry


def take_dtype(options: dict[str, Any]) -> str | None:
    """Replaces a ``dtype`` that means a quantization by what vLLM knows.

    Returns:
        the dtype that was asked for, if it means a method

    Raises:
        BridgeError: ``invalid_option`` or ``unsupported_quantization``
    """
    # A loader is chosen by its method, and only the method is checked.
    if loads := registry.of_load_format(options.get("load_format")):
        del options["load_format"]
        options.setdefault("quantization", loads.name)
    asked = options.get("dtype")
    dtype = asked.strip().lower() if isinstance(asked, str) else None
    method = registry.online_dtypes().get(dtype or "")
    if method is None:
        return None
    if (named := options.get("quantization")) is not None:
        if isinstance(named, str) and registry.meant_by(named).needs_checkpoint:
            raise BridgeError(
                "invalid_option",
                f'`quantization: "{named}"` is for models that are quantized already, and `dtype: '
                f'"{dtype}"` quantizes plain ones.',
                {"option": "dtype", "value": asked},
                remedy=(
                    "Leave out `dtype`; or, if the model is a plain one, leave out `quantization`."
                ),
            )
        raise BridgeError(
            "invalid_option",
            f'`dtype: "{dtype}"` chooses the method of quantization, and so does `quantization`.',
            {"option": "dtype", "value": asked},
            remedy="Leave out one of the two.",
        )
    availability.check_packages(method.name)
    del options["dtype"]
    options["quantization"] = method.name
    return dtype


def check(checkpoint: Checkpoint, dtype: str | None) -> None:
    """Refuses to quantize what is quantized.

    Args:
        dtype: what ``take_dtype`` returned
    """
    if dtype is not None and checkpoint.quantization is not None:
        raise BridgeError(
            "unsupported_quantization",
            f'`dtype: "{dtype}"` quantizes a plain model while it is loaded, and this one is '
            f"quantized already, with {checkpoint.description}.",
            {"option": "dtype", "value": dtype, "checkpoint": checkpoint.quant_method},
            remedy="Leave `dtype` out, or use the plain model.",
        )


def take_settings(checkpoint: Checkpoint, options: dict[str, Any]) -> str | None:
    """Gives the settings of a method that has its own to the place where vLLM looks for them.

    Args:
        checkpoint: the plain model

    Returns:
        their name; see ``Method.take_settings``

    Raises:
        BridgeError: ``invalid_option``, or ``unsupported_quantization`` without the packages
    """
    asked = options.get("quantization")
    name = naming.resolve(asked) if isinstance(asked, str) else None
    if name is None:
        return None
    availability.check_packages(name)
    return registry.of(name).take_settings(checkpoint, options)


def check_settings(checkpoint: Checkpoint, arguments: Mapping[str, Any]) -> None:
    """Refuses settings of a quantization that no method has taken and that are none of vLLM's.
    Imports vLLM.

    Args:
        arguments: of the engine, by vLLM's names, once methods have taken theirs
    """
    given = arguments.get("quantization_config")
    if given is None:
        return
    from vllm.config.quantization import QuantizationConfigArgs

    known = [field.name for field in dataclasses.fields(QuantizationConfigArgs)]
    if not isinstance(given, dict | str) or (
        isinstance(given, dict) and given.keys() <= set(known)
    ):
        return  # vLLM's to look at
    remedy = "Leave it out."
    if isinstance(given, dict) and "activations" in given:
        takers = ", ".join(method.title for method in registry.every() if method.rounds_activations)
        why = f"`activations` is for GGUF, and for {takers} whose activations have 16 bits"
    elif checkpoint.quantization is not None:
        why = f"the model is quantized already, with {checkpoint.description}"
    elif (method := arguments.get("quantization")) is not None:
        why = f'`quantization: "{method}"` takes no such settings'
    else:
        takers = " or ".join(f'`quantization: "{name}"`' for name in registry.with_settings())
        why, remedy = (
            "no method is named that it could be for",
            f"Give {takers} as well, or leave it out.",
        )
    raise BridgeError(
        "invalid_option",
        f"`quantization_config` has no use here: {why}.",
        {"option": "quantization_config", "value": given, "allowed": known},
        remedy=(f"{remedy} vLLM's own settings, for its online methods, are {', '.join(known)}."),
    )


def note(dtype: str | None, settings: str | None, model_config: Any) -> str | None:
    """What is to be said of a loaded engine.

    Args:
        dtype: what ``take_dtype`` returned
        settings: what ``take_settings`` returned
        model_config: vLLM's
    """
    method = registry.of(model_config.quantization)
    if dtype is not None and method.online is not None:
        how = method.online.words
    elif settings is not None:
        how = f"{method.name}'s {settings}"
    else:
        return None
    experts = method.experts_note if model_config.is_moe else ""
    return f"Quantized while it was loaded: {how}. {experts}".rstrip()
