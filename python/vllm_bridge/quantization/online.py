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

import json
from collections.abc import Mapping
from typing import Any

from vllm_bridge.errors import BridgeError, nearest
from vllm_bridge.models import Checkpoint
from vllm_bridge.quantization import availability, naming

# The method for each dtype that is none of vLLM's, and what to say of it.
METHODS: Mapping[str, tuple[str, str]] = {
    "int8": ("torchao", "8-bit weights with a scale per channel, by torchao"),
    "int4": ("bitsandbytes", "4-bit weights (NF4), by bitsandbytes"),
}

# torchao's way to quantize where none is named.
TORCHAO_DEFAULT = "Int8WeightOnlyConfig"


def take_dtype(options: dict[str, Any]) -> str | None:
    """Replaces a ``dtype`` that means a quantization by what vLLM knows.

    Returns:
        the dtype that was asked for, if it was one of ``METHODS``

    Raises:
        BridgeError: ``invalid_option`` or ``unsupported_quantization``
    """
    # The loader of bitsandbytes is chosen by the method, and only the method is checked.
    if options.get("load_format") == "bitsandbytes":
        del options["load_format"]
        options.setdefault("quantization", "bitsandbytes")
    asked = options.get("dtype")
    dtype = asked.strip().lower() if isinstance(asked, str) else None
    if dtype is None or dtype not in METHODS:
        return None
    if options.get("quantization") is not None:
        raise BridgeError(
            "invalid_option",
            f'`dtype: "{dtype}"` chooses the method of quantization; leave out `quantization`, '
            "or the dtype.",
            {"option": "dtype", "value": asked},
        )
    method = METHODS[dtype][0]
    availability.check_packages(method)
    del options["dtype"]
    options["quantization"] = method
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
            f"quantized already, with {checkpoint.description}. Leave `dtype` out, or use the "
            "plain model.",
            {"option": "dtype", "value": dtype, "checkpoint": checkpoint.quant_method},
        )


def take_settings(options: dict[str, Any]) -> str | None:
    """Gives torchao its settings in the place where vLLM looks for them.

    They are the option ``quantization_config``: the name of one of torchao's configs, or a map
    with the name as ``type`` and its arguments. Imports vLLM and torchao.

    Returns:
        the name of the config

    Raises:
        BridgeError: ``invalid_option``, or ``unsupported_quantization`` without torchao
    """
    asked = options.get("quantization")
    overrides = options.get("hf_overrides") or {}
    if (
        not isinstance(asked, str)
        or naming.resolve(asked) != "torchao"
        or not isinstance(overrides, dict)
        or any(name.startswith("quantization_config") for name in overrides)
    ):
        return None
    availability.check_packages("torchao")
    name, settings = _torchao_config(options.pop("quantization_config", None))
    options["hf_overrides"] = overrides | {"quantization_config_dict_json": json.dumps(settings)}
    return name


def note(dtype: str | None, settings: str | None, is_mixture: bool) -> str | None:
    """What is to be said of a loaded engine.

    Args:
        dtype: what ``take_dtype`` returned
        settings: what ``take_settings`` returned
        is_mixture: whether the model has experts, which vLLM does not have torchao quantize
    """
    how = METHODS[dtype][1] if dtype else f"torchao's {settings}" if settings else None
    if how is None:
        return None
    experts = " Its experts are left as they are." if settings and is_mixture else ""
    return f"Quantized while it was loaded: {how}.{experts}"


def _torchao_config(given: Any) -> tuple[str, Any]:
    import torchao.quantization
    from torchao.core.config import AOBaseConfig, config_to_dict

    known = {
        name: value
        for name, value in vars(torchao.quantization).items()
        if isinstance(value, type) and issubclass(value, AOBaseConfig)
    }
    arguments = dict(given) if isinstance(given, dict) else {"type": given or TORCHAO_DEFAULT}
    name = arguments.pop("type", TORCHAO_DEFAULT)
    if name not in known:
        suggestion = nearest(str(name), {key.lower(): key for key in known})
        suggestion = suggestion and next(key for key in known if key.lower() == suggestion)
        raise BridgeError(
            "invalid_option",
            f"torchao has no config `{name}`."
            + (f" Did you mean `{suggestion}`?" if suggestion else "")
            + f" It has: {', '.join(sorted(known))}.",
            {"option": "quantization_config", "nearest": suggestion, "allowed": sorted(known)},
        )
    try:
        return name, config_to_dict(known[name](**arguments))
    except Exception as error:  # each config checks its arguments in its own way
        raise BridgeError(
            "invalid_option",
            f"torchao's `{name}` does not take these settings: {error}.",
            {"option": "quantization_config", "value": given},
        ) from error
