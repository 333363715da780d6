"""A quantization method that vLLM does not have: it rounds the weights of a plain model to whole
numbers of 8 bits. What vLLM needs of it comes first; the rest is all that this library needs.
"""

from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from vllm_bridge.quantization import registry
from vllm_bridge.quantization.method import Method, Online


class RoundedLinear(LinearMethodBase):  # type: ignore[misc]
    kernel_name = "whole numbers"

    def __init__(self) -> None:
        self._plain = UnquantizedLinearMethod()

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        self._plain.create_weights(layer, *args, **kwargs)

    def process_weights_after_loading(self, layer: Any) -> None:
        scale = layer.weight.abs().amax(1, keepdim=True) / 127
        layer.weight.data = (layer.weight / scale).round() * scale
        self._plain.process_weights_after_loading(layer)

    def apply(self, layer: Any, *args: Any) -> Any:
        return self._plain.apply(layer, *args)


class RoundedConfig(QuantizationConfig):  # type: ignore[misc]
    get_name = staticmethod(lambda: "made-up")
    get_supported_act_dtypes = staticmethod(lambda: [torch.bfloat16])
    get_min_capability = staticmethod(lambda: -1)
    from_config = classmethod(lambda cls, _config: cls())

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        return RoundedLinear() if isinstance(layer, LinearBase) else None


class MadeUp(Method):
    name = "made-up"
    other_names = ("invented",)
    online = Online(bytes=1.0, words="whole numbers of 8 bits")

    def loaded_note(self, config: Any) -> str:
        return f"Rounded, computed in {config.model_config.dtype}."

    def install(self) -> None:
        register_quantization_config(self.name)(RoundedConfig)


def install() -> None:
    """The entry point for vLLM."""
    registry.register(MadeUp)
    MadeUp().install()
