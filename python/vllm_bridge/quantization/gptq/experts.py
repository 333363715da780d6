"""GPTQ's experts where vLLM has no kernel for their format: they are dequantized while they are
read, and computed like those of a model that never was quantized."""

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import UnquantizedFusedMoEMethod
from vllm.platforms import current_platform

from vllm_bridge.quantization.gptq import format
from vllm_bridge.quantization.gptq.format import Settings
from vllm_bridge.quantization.layers import DEQUANTIZED_EXPERTS

_PARTS = ("qweight", "qzeros", "scales", "g_idx")


class GPTQExpertsMethod(UnquantizedFusedMoEMethod):  # type: ignore[misc]
    """Experts in GPTQ's format, which become plain ones.

    Each matrix comes in several tensors, one after another: they are kept until all are there.
    """

    def __init__(self, settings: Settings, moe: Any) -> None:
        settings.check_columns(moe.intermediate_size_per_partition_unpadded, 1)
        if current_platform.is_cpu() and moe.is_lora_enabled:
            raise ValueError("vLLM has no kernel for adapters over experts on CPUs")
        super().__init__(moe)
        self.settings = settings
        self._needed = set(_PARTS) if settings.is_ordered else set(_PARTS) - {"g_idx"}
        self._read: dict[tuple[int, str], dict[str, torch.Tensor]] = {}

    def create_weights(self, layer: Any, *args: Any, **attributes: Any) -> None:
        super().create_weights(layer, *args, **attributes)
        for matrix in ("w13", "w2"):
            for part in _PARTS:
                empty = torch.nn.Parameter(torch.empty(0), requires_grad=False)
                empty.weight_loader = self._keeping(layer, f"{matrix}_weight", part)
                layer.register_parameter(f"{matrix}_{part}", empty)

    def _keeping(self, layer: Any, matrix: str, part: str) -> Any:
        # vLLM gives the arguments by these names.
        def load(
            param: Any,
            loaded_weight: torch.Tensor,
            weight_name: str,
            shard_id: str,
            expert_id: int,
            return_success: bool = False,
        ) -> bool | None:
            if layer._map_global_expert_id_to_local_expert_id(expert_id) == -1:
                return False if return_success else None
            parts = self._read.setdefault((expert_id, shard_id), {})
            parts[part] = loaded_weight
            if self._needed <= parts.keys():
                weight = self._plain(layer, self._read.pop((expert_id, shard_id)))
                target = getattr(layer, matrix)
                name = weight_name.replace(part, "weight")
                layer.weight_loader(target, weight, name, shard_id, expert_id, True)
            return True if return_success else None

        return load

    def _plain(self, layer: Any, parts: dict[str, torch.Tensor]) -> torch.Tensor:
        tensors = (parts.get(part) for part in _PARTS)
        return format.dequantize(self.settings, layer.params_dtype, *tensors)

    def process_weights_after_loading(self, layer: Any) -> None:
        for matrix in ("w13", "w2"):
            for part in _PARTS:
                delattr(layer, f"{matrix}_{part}")
        super().process_weights_after_loading(layer)
        if current_platform.is_cpu():
            setattr(layer, DEQUANTIZED_EXPERTS, True)
