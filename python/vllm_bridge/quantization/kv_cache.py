"""The dtype of the KV cache: what a user's value means, and whether the model runs with it here."""

from collections.abc import Iterator
from typing import Any, get_args

from vllm_bridge.errors import BridgeError, did_you_mean, nearest

# What dtypes are called elsewhere; else vLLM's names in any case, with `-` for `_`.
OTHER_NAMES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "e4m3": "fp8_e4m3",
    "fp8_e4m3fn": "fp8_e4m3",
    "e5m2": "fp8_e5m2",
}


def take_dtype(options: dict[str, Any]) -> str | None:
    """Brings ``options["kv_cache_dtype"]`` into vLLM's spelling.

    Returns:
        a name that vLLM does not know, which is taken out of the options: the error for it
        names what runs with the model, and for that there must be a config of it
    """
    from vllm.config.cache import CacheDType

    asked = options.get("kv_cache_dtype")
    if not isinstance(asked, str):
        return None
    name = asked.strip().lower().replace("-", "_")
    name = OTHER_NAMES.get(name, name)
    if name in get_args(CacheDType):
        options["kv_cache_dtype"] = name
        return None
    del options["kv_cache_dtype"]
    return asked


def check(config: Any, asked: str | None = None, unknown: str | None = None) -> None:
    """Refuses a dtype that no attention backend of this device has for the model, be it the user's
    or the checkpoint's.

    On a GPU vLLM chooses the backend by the dtype. On a CPU there is one backend, which takes any
    dtype and answers nonsense. Imports vLLM.

    Args:
        config: vLLM's config of the engine
        asked: the user's dtype
        unknown: what ``take_dtype`` returned

    Raises:
        BridgeError: ``unsupported``, or ``invalid_option`` for an unknown name
    """
    if config.model_config.is_attention_free:
        return
    dtype = str(config.cache_config.cache_dtype)
    if dtype == "auto" and getattr(config.quant_config, "kv_cache_scheme", None) is not None:
        dtype = "fp8"  # what vLLM takes such a scheme for, once it makes the layers
    if unknown is None and (dtype == "auto" or _runs(config, dtype)):
        return
    allowed = list(_allowed(config))
    value = unknown or dtype
    if is_checkpoints := unknown is None and asked in (None, "auto"):
        allowed.remove("auto")
    details: dict[str, Any] = {"option": "kv_cache_dtype", "value": value, "allowed": allowed}
    remedy = ""
    if is_checkpoints:
        reason = "unsupported"
        text = f"The checkpoint's config asks for a KV cache of {value}, which does not run here."
        remedy = "Name another as `kv_cache_dtype`. "
    elif unknown is None:
        reason, text = "unsupported", f'`kv_cache_dtype: "{value}"` does not run here.'
    else:
        reason, text = "invalid_option", f"There is no `kv_cache_dtype` `{value}`."
        if suggestion := nearest(value, allowed):
            details["nearest"] = suggestion
            remedy = did_you_mean(suggestion)
    remedy += f"Allowed for this model on this device: {', '.join(allowed)}."
    raise BridgeError(reason, text, details, remedy)


def _allowed(config: Any) -> Iterator[str]:
    from vllm.config.cache import CacheDType

    return (dtype for dtype in get_args(CacheDType) if dtype == "auto" or _runs(config, dtype))


def _runs(config: Any, dtype: str) -> bool:
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.platforms import current_platform
    from vllm.v1.attention.selector import get_attn_backend

    model = config.model_config
    if current_platform.is_cpu():
        # The names of plain dtypes mean no conversion of the values.
        if hasattr(torch, dtype):
            return True
        if not _has_instructions(config, dtype):
            return False
    try:
        with set_current_vllm_config(config):
            backend = get_attn_backend(
                model.get_head_size(), model.dtype, dtype, use_mla=model.use_mla
            )
    except ValueError:  # what vLLM raises where no backend has it
        return False
    return bool(backend.supports_kv_cache_dtype(dtype))


def _has_instructions(config: Any, dtype: str) -> bool:
    # What vLLM finds out when weights are loaded: whether this CPU computes with such a cache, for
    # heads of this size.
    from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

    model = config.model_config
    try:
        _get_attn_isa(model.dtype, config.cache_config.block_size, model.get_head_size(), dtype)
    except NotImplementedError:
        return False
    return True
