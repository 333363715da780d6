"""FP8 caches round to the nearest value.

vLLM's operation leaves out the digits that do not fit, which makes all keys and values smaller and
their errors twice as large. What it is given here fits already.
"""

import functools
from collections.abc import Callable
from typing import Any

from vllm_bridge.patches import replace

SEEN = ("0.31.", "0.32.")
TOUCHES = {"vllm._custom_ops": ("cpu_attn_reshape_and_cache",)}


def apply() -> None:
    from vllm import _custom_ops

    replace(_custom_ops, "cpu_attn_reshape_and_cache", rounding)


def rounding(original: Callable[..., None]) -> Callable[..., None]:
    import torch

    dtypes = {
        "fp8": torch.float8_e4m3fn,
        "fp8_e4m3": torch.float8_e4m3fn,
        "fp8_e5m2": torch.float8_e5m2,
    }

    def rounded(x: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
        limits = torch.finfo(dtype)
        return (x.float() / scale).clamp(limits.min, limits.max).to(dtype).to(x.dtype)

    @functools.wraps(original)
    def wrapped(
        key: torch.Tensor,
        value: torch.Tensor,
        *rest: Any,
        k_scale: float = 1.0,
        v_scale: float = 1.0,
        kv_cache_dtype: str = "auto",
    ) -> None:
        dtype = dtypes.get(kv_cache_dtype)
        if dtype is not None:
            # Divided by their scales already: a second division could make them smaller again.
            key, k_scale = rounded(key, k_scale, dtype), 1.0
            value, v_scale = rounded(value, v_scale, dtype), 1.0
        original(key, value, *rest, k_scale=k_scale, v_scale=v_scale, kv_cache_dtype=kv_cache_dtype)

    return wrapped
