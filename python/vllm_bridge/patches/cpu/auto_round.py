"""Checkpoints of auto-round in GPTQ's layout that vLLM refuses on CPUs: those of 2, 3 and 8 bits,
and asymmetric ones. They are computed like GPTQ's own."""

import functools
from collections.abc import Callable
from typing import Any

from vllm.model_executor.layers.quantization.inc.schemes.inc_wna16_scheme import INCWna16Scheme

from vllm_bridge.patches import replace
from vllm_bridge.quantization.gptq.format import Settings
from vllm_bridge.quantization.gptq.layers import GPTQLinearMethod

SEEN = ("0.31.", "0.32.")
TOUCHES = {
    "vllm.model_executor.layers.quantization.inc.schemes.inc_wna16_scheme": (
        "INCWna16Scheme.get_linear_method",
    ),
}


def apply() -> None:
    replace(INCWna16Scheme, "get_linear_method", _or_as_gptq)


def settings(of_layer: Any) -> Settings:
    """GPTQ's of a layer of auto-round's."""
    made = Settings(of_layer.bits, of_layer.group_size, False, of_layer.sym)
    made.check()
    return made


def _or_as_gptq(get_linear_method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(get_linear_method)
    def wrapped(scheme: Any, config: Any, layer: Any, prefix: str, of_layer: Any) -> Any:
        try:
            return get_linear_method(scheme, config, layer, prefix, of_layer)
        except NotImplementedError:  # vLLM's word for formats that it has no kernel for
            if not of_layer.is_gptq:
                raise
            return GPTQLinearMethod(settings(of_layer))

    return wrapped
